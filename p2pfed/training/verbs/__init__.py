"""What `python -m p2pfed.training VERB` does: one module per verb, loaded when it is asked for.

Each has `arguments(parser)`, which declares its flags, and `run(args)`, which returns the exit
code. The node and the command line start them as processes of their own and never import them.
"""
