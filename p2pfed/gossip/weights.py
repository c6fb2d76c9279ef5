"""What a member weighs in the average: n**p of its public sample count, in whole numbers.

n is the count that a roster states, never a live one (that would leak), and it is capped at
`sample_cap` times the median of the members that train, because it is self-declared. The power p is
a quarter a/4: 1 is the pooled objective of FedAvg (McMahan et al. 2017, arXiv:1602.05629), 0 gives
every hospital one vote.

Invariants. A weight is floor((n**a * M**(b - a)) ** (1 / b)) for p = a/b and M = 2**20, computed
with integer roots: no float, the same number on every machine. It is from 1 to M for a member that
trains, so that the fold's sums stay exact. It depends on one roster version and the run's rules.

Which roster version a delta is weighed by is decided in `facts`.
"""

from __future__ import annotations

from math import isqrt

from p2pfed.identity.roster import MAX_SAMPLES, Roster
from p2pfed.identity.rules import Averaging

__all__ = ["weight_of", "weights_of"]


def weight_of(samples: int, median: int, averaging: Averaging) -> int:
    """Weight of a member that trains.

    Args:
        samples: Its sample count, 1 to 2**20.
        median: Lower median of the counts of the roster's training members.
        averaging: Gives the power and the cap.

    Returns:
        An integer from 1 to 2**20.
    """
    if averaging.sample_cap:
        samples = max(1, min(samples, int(averaging.sample_cap * median)))
    power = averaging.weight_power
    degree = power.denominator  # 1, 2 or 4: see `Averaging`
    weight: int = samples**power.numerator * MAX_SAMPLES ** (degree - power.numerator)
    while degree > 1:  # the fourth root is the root of the root, also when both round down
        weight, degree = isqrt(weight), degree // 2
    return weight


def weights_of(roster: Roster, averaging: Averaging) -> dict[str, int]:
    """Weight by peer id of every member of a roster that trains."""
    counts = {member.peer_id: member.samples for member in roster.members if member.trains}
    median = sorted(counts.values())[(len(counts) - 1) // 2] if counts else 0
    return {peer: weight_of(samples, median, averaging) for peer, samples in counts.items()}
