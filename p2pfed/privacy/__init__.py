"""The privacy room: what is clipped, noised, accounted and remembered before anything leaves.

Read `gate` first: it is the one entry the trainer calls. Then `units` (who is protected),
`mechanisms` and `svt` (what is released), `noise` (the only randomness), `accountant` and
`ledger` on `journal` (what it costs, for ever).

Importing this package loads nothing but itself.
"""
