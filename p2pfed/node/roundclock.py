"""How long the last round took here, and how much of it passed after this node's own training.

What passes after one's own training is waiting: for the deltas of peers, or for the run's shortest
interval between rounds. Seen from the network process: what a round's training is made of is known
to the trainer alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["RoundClock"]


class RoundClock:
    """Times one round after the other.

    Attributes:
        last: Of the last round that ended by itself: `round`, `seconds`, and of these `waiting`
            after this node's own training (all of them where it did not train); empty before.
    """

    def __init__(self) -> None:
        self.last: dict[str, Any] = {}
        self._round = -1
        self._began = 0.0
        self._trained = 0.0

    def note(self, kind: str, data: Mapping[str, Any], now: float) -> None:
        """Take in an event of the core's log; others than of rounds mean nothing here."""
        if kind == "round.started":
            self._round, self._began, self._trained = data["round"], now, now
        elif kind == "round.finished" and data["round"] == self._round:
            self.last = {
                "round": self._round,
                "seconds": round(now - self._began, 3),
                "waiting": round(now - self._trained, 3),
            }

    def age(self, now: float) -> float | None:
        """Seconds since the round at hand began; None before the first."""
        return None if self._round < 0 else round(now - self._began, 3)

    def trained(self, round_: int, now: float) -> None:
        """This node's own training for a round has ended, one way or another."""
        if round_ == self._round:
            self._trained = now
