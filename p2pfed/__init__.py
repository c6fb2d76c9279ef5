"""p2pfed: hospitals train one model together as peers, without a server.

Importing this package loads nothing but itself; each room is imported where it is needed.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
