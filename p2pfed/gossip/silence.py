"""How long a peer may be silent, by its path and by what others say of it. Pure arithmetic.

A peer beats every second and answers every beat, so it is silent for as long as its path delays a
word, not for as long as the path is. Two beats may be missing, and a segment may be lost twice: TCP
sends it again after RTO, then after 2 RTO. Silence beyond that is suspect. From then on others are
asked: the more of them do not hear the peer either, the sooner it is away; when one has heard it,
its silence begins anew with that word.

Invariants: suspect between `suspect_after` and half of `away_after`; away not before `away_least`
whoever says what, and not after `away_after` if nobody hears it (all times the factor of
`LocalHealth`).

Source: RTO of RFC 6298, sections 2 and 5.5; LHA-Suspicion of Lifeguard (Dadgar, Phillips, Currey
2018, section IV.B, arXiv 1707.00788).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from p2pfed.gossip.membership import Liveness

__all__ = ["ASKED", "Doubt", "RoundTrip", "away_after", "suspect_after"]

ASKED = 3  # K of Lifeguard: so many are asked, and so many confirmations count
BEATS_MISSED = 2
LOST_TWICE = 3  # RTO + 2 RTO


@dataclass(slots=True)
class RoundTrip:
    """Smoothed round-trip time to a peer and its deviation, seconds; 0 before the first answer."""

    smoothed: float = 0.0
    deviation: float = 0.0

    def measure(self, seconds: float) -> None:
        """Take in one round trip."""
        if not self.smoothed:
            self.smoothed, self.deviation = seconds, seconds / 2
            return
        self.deviation += (abs(seconds - self.smoothed) - self.deviation) / 4
        self.smoothed += (seconds - self.smoothed) / 8

    @property
    def timeout(self) -> float:
        """RTO: an answer that takes longer is late."""
        return self.smoothed + 4 * self.deviation


@dataclass(slots=True)
class Doubt:
    """What is known about a member that is suspect.

    Attributes:
        since: When it became so, seconds.
        heard_at: The newest word that somebody else had of it.
        unheard_by: Those that do not hear it either.
    """

    since: float
    heard_at: float = float("-inf")
    unheard_by: set[str] = field(default_factory=set)


def suspect_after(live: Liveness, path: RoundTrip) -> float:
    """Silence after which a peer on this path is suspect, seconds."""
    expected = BEATS_MISSED * live.beat_interval + LOST_TWICE * path.timeout
    return max(live.suspect_after, min(expected, live.away_after / 2))


def away_after(live: Liveness, path: RoundTrip, doubt: Doubt) -> float:
    """Silence after which a suspect peer is away, seconds; less for each that confirms it."""
    suspect = suspect_after(live, path)
    most = live.away_after - suspect
    least = min(most, max(live.away_least - suspect, BEATS_MISSED * live.beat_interval))
    share = math.log(min(len(doubt.unheard_by), ASKED) + 1) / math.log(ASKED + 1)
    return suspect + most - (most - least) * share
