"""Rows with a goal, and what became of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rows import Row, show

__all__ = ["Goal", "tell"]


@dataclass(frozen=True, slots=True)
class Goal(Row):
    """A row whose ratio should reach the goal, or not pass it where lower is better."""

    goal: float | None = None

    @property
    def verdict(self) -> str:
        """One line; only of a row that has a ratio and a goal."""
        assert self.ratio is not None
        assert self.goal is not None
        high = self.better == "higher"
        met = self.ratio >= self.goal if high else self.ratio <= self.goal
        bound = "at least" if high else "at most"
        return (
            f"{'met   ' if met else 'MISSED'}  {self.name}: {self.ratio:.3g} x {self.baseline}, "
            f"goal {bound} {self.goal:.3g}"
        )


def tell(rows: Sequence[Row], *, as_json: bool) -> None:
    """Print the rows, and for people what became of the goals."""
    show(rows, as_json=as_json)
    if not as_json:
        for row in rows:
            if isinstance(row, Goal) and row.goal is not None:
                print(row.verdict)
        sys.stdout.flush()
