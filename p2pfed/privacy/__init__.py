"""The privacy room: what is clipped, noised, accounted and remembered before anything leaves.

Read `gate` first: it is the one entry the trainer calls. Then

* `units` (who is protected) and `clipping`;
* `mechanism` (what one is) and `mechanisms` (by name): `svt` on `schedules`, `gaussian`,
  `textbook`, `plain`; `worth` asks whether a round is worth its budget;
* `noise` on `bernoulli`, `geometric` and `keystream`: the only randomness;
* `accountant` on `composition` (what it costs), `shares` (of a run's budget), `planning` (before);
* `ledger` on `records` and `journal` (for ever), `extract` and `review` (for an auditor).

Importing this package loads nothing but itself.
"""
