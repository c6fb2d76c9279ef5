"""When a late delta counts: soon if it is a little late, rarely if it is very late.

A delta of age a (rounds) makes everybody replay about a rounds, so a member that sends everything
late would make the others replay without end. It counts, always, and exactly; but

* one of age 2**k to 2**(k + 1) - 1 waits for a round divisible by 2**k, so that all of that age
  share one replay: at most about two folds a round for each of the log2(hot_rounds) classes;
* one older than `hot_rounds` waits until `late_interval_s` have passed since the last such replay;
* while no round starts there is one replay after 1, 2, 4, ... seconds.

Pure: which rounds are due, not what is in them. What waits is part of the digests at once, so that
nobody sends it twice.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["due", "is_late"]


def is_late(delta_round: int, round_: int) -> bool:
    """Whether a delta that arrives in `round_` waits at all; one of the last round does not."""
    return round_ - delta_round >= 2


def due(waiting: Iterable[int], round_: int, *, hot_rounds: int, old_too: bool) -> set[int]:
    """The rounds whose late deltas are folded in at the start of a round.

    Args:
        waiting: Rounds that have deltas waiting.
        round_: The round that starts.
        hot_rounds: Up to this age.
        old_too: Whether it is time for older ones.
    """
    found = set()
    for delta_round in waiting:
        age = max(1, round_ - delta_round)
        if (old_too and age > hot_rounds) or (age <= hot_rounds and round_ % _period(age) == 0):
            found.add(delta_round)
    return found


def _period(age: int) -> int:
    return 1 << (age.bit_length() - 1)
