"""The audit room: shows on this machine that the gate does what it claims, and how attacks fare.

Read `findings` first: what every check returns. Checks of the gate itself: `enumeration` (the exact
law of small releases, by `replay` of the installed code over `cases` of neighbours), `samplers`
(goodness of fit), `distinguishing` (a test on many releases).
Attacks on real records, `victims`: `membership` (was this patient in?) and `inversion` (what does
the record look like?).

Invariant: an audit draws from the product's own mechanisms and samplers and spends no budget: what
it draws stays on this machine.

A passed audit is no proof of privacy. The proof is in docs/privacy.md; the audit finds mistakes.

Importing this package loads nothing but itself.
"""
