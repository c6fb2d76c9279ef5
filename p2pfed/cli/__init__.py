"""The command line: one command is one call of the admin socket and one printer.

`main` finds the command and tells errors; `locate` finds the socket; `text` formats for people. The
other modules hold the commands. Client commands load the standard library, `p2pfed.errors` and
`p2pfed.admin.client`, nothing else.
"""
