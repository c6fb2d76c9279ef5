"""The operator's socket: HTTP/1.1 and JSON over a Unix socket, and the thin client that reads it.

`app` says which endpoints there are, `server` binds the socket and survives rude clients, `client`
is all that a client command loads (standard library and `p2pfed.errors` only).
"""
