"""A measure: what a hospital lets all members know of how good the common model is on its patients.

One number, rounded to two digits: the task's main metric on the hospital's own test patients. It
crosses only where the hospital's policy says so (`privacy.share_metrics`), from its trainer to its
network process and from there in beats of version 2.

Invariant: whatever its source says, a `Measure` has a short printable name and a number within
bounds; nothing else can be written or read.

Formal guarantee: none. A released metric is outside the accounting of epsilon: of few test patients
even a rounded one can tell whether a certain patient is among them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from p2pfed.errors import RemoteProtocolError
from p2pfed.wire.codec import Items

__all__ = ["MAX_HUNDREDTHS", "MAX_NAME", "Measure", "read_measure"]

MAX_NAME = 32
MAX_HUNDREDTHS = 10**7  # 100,000.00; a perplexity may be large
MAX_ROUND = 1 << 31


@dataclass(frozen=True, slots=True)
class Measure:
    """One value of a metric.

    Attributes:
        name: As the task calls it, e.g. `dice`; 1 to 32 printable characters.
        round: The round whose model was evaluated.
        hundredths: The value, times 100 and rounded; at most 10⁷ up or down.
    """

    name: str
    round: int
    hundredths: int

    @property
    def value(self) -> float:
        """The value with its two digits."""
        return self.hundredths / 100

    def as_json(self) -> dict[str, Any]:
        """As trainers tell it and as it is shown: `name`, `round`, `value`."""
        return {"name": self.name, "round": self.round, "value": self.value}

    @classmethod
    def of(cls, name: Any, round_: Any, value: Any) -> Measure | None:
        """The measure for a value as it was computed; None where it cannot be told."""
        if not isinstance(name, str) or not (0 < len(name) <= MAX_NAME and name.isprintable()):
            return None
        if type(round_) is not int or not 0 <= round_ <= MAX_ROUND:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        if not math.isfinite(value) or abs(value) > MAX_HUNDREDTHS / 100:
            return None
        return cls(name, round_, round(100 * value))

    @classmethod
    def from_json(cls, told: Any) -> Measure | None:
        """What `as_json` wrote; None for anything else."""
        if not isinstance(told, dict):
            return None
        return cls.of(told.get("name"), told.get("round"), told.get("value"))


def read_measure(items: Items) -> Measure | None:
    """Read the next item of a message: a measure, or an empty array for none.

    Raises:
        RemoteProtocolError: It is neither.
    """

    def one(item: Items) -> Measure | None:
        if item.at_end():
            return None
        name = item.text(MAX_NAME)
        if not name:
            raise RemoteProtocolError("measure: it has no name")
        return Measure(
            name,
            item.integer(0, MAX_ROUND),
            item.integer(-MAX_HUNDREDTHS, MAX_HUNDREDTHS),
        )

    return items.one(one)
