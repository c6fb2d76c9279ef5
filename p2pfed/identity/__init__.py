"""Who is who, and what was agreed: node keys, stewards' signatures, rosters and run files.

`signing` signs exact bytes; `keys` keeps the secret halves on disk; `roster` and `run` are the two
documents that stewards sign; `book` decides which rosters a node believes. Nothing here does
network I/O, and nothing here re-encodes a document in order to verify it.
"""
