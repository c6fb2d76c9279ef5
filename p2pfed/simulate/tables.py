"""Strict reading of a scenario's TOML tables: every mistake is collected, none stops the reading.

Invariant: a key that is unknown, of the wrong type or out of bounds is one line of `Mistakes`, with
where it stands, what is wrong and what would be right; the reading goes on with the default.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from p2pfed.errors import ConfigError

__all__ = ["Mistakes", "Table"]

MOST = 1e15  # an integer of a TOML file may be longer than any float


class Mistakes:
    """What is wrong with one file."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: list[str] = []

    def add(self, where: str, what: str, do: str = "") -> None:
        """Note one mistake.

        Args:
            where: The key, e.g. `event[2].at_s`.
            what: What is wrong with it.
            do: What would be right.
        """
        self.lines.append(f"{where}: {what}" + (f"; {do}" if do else ""))

    def tell(self) -> None:
        """Report all mistakes, if there are any.

        Raises:
            ConfigError: There are.
        """
        if self.lines:
            count = len(self.lines)
            raise ConfigError(
                f"{self.file} has {count} mistake{'s' * (count > 1)}",
                "\n".join(self.lines),
                "correct the file; what a scenario may say is told in docs/simulate.md",
            )


class Table:
    """One TOML table that is read key by key; `done` refuses what was not read.

    Args:
        data: The table; anything else is a mistake.
        where: Its name in the file, empty for the whole file.
        mistakes: Where mistakes go.
    """

    def __init__(self, data: Any, where: str, mistakes: Mistakes) -> None:
        self.where = where
        self.mistakes = mistakes
        self._data: dict[str, Any] = data if isinstance(data, dict) else {}
        self._known: set[str] = set()
        if not isinstance(data, dict):
            mistakes.add(where, f"{data!r:.40} is no table", f"write it as [{where}]")

    def __contains__(self, key: str) -> bool:
        return key in self._data

    def at(self, key: str) -> str:
        """The full name of a key."""
        return f"{self.where}.{key}" if self.where else key

    def wrong(self, key: str, what: str, do: str = "") -> None:
        """Note a mistake in the value of a key."""
        self.mistakes.add(self.at(key), what, do)

    def raw(self, key: str, default: Any = None) -> Any:
        """The value of a key as it stands."""
        self._known.add(key)
        return self._data.get(key, default)

    def number(self, key: str, default: float, *, low: float = 0.0, high: float = MOST) -> float:
        """A number in [low, high]."""
        value = self.raw(key, default)
        if type(value) not in {int, float} or not low <= value <= high:
            bounds = f"from {low:g}" + (f" to {high:g}" if high < MOST else " up")
            self.wrong(key, f"{value!r:.40} is wrong", f"a number {bounds} is expected")
            return default
        return float(value)

    def integer(self, key: str, default: int, *, low: int = 0, high: int = 1 << 31) -> int:
        """An integer in [low, high]."""
        value = self.raw(key, default)
        if type(value) is not int or not low <= value <= high:
            self.wrong(
                key, f"{value!r:.40} is wrong", f"an integer from {low} to {high} is expected"
            )
            return default
        return value

    def flag(self, key: str, *, default: bool = False) -> bool:
        """A truth value."""
        value = self.raw(key, default)
        if type(value) is not bool:
            self.wrong(key, f"{value!r:.40} is wrong", "true or false is expected")
            return default
        return value

    def text(self, key: str, default: str = "") -> str:
        """A printable text."""
        value = self.raw(key, default)
        if not isinstance(value, str) or not value.replace("\n", " ").isprintable():
            self.wrong(key, f"{value!r:.40} is wrong", "a text is expected")
            return default
        return value

    def one_of(self, key: str, allowed: Sequence[str], default: str) -> str:
        """One of some words."""
        value = self.raw(key, default)
        if value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(allowed)}"
            self.wrong(key, f"{value!r:.40} is unknown", meant)
            return default
        return str(value)

    def pair(self, key: str, default: tuple[float, float]) -> tuple[float, float]:
        """Two numbers, the smaller one first, not negative."""
        value = self.raw(key, list(default))
        good = (
            isinstance(value, list)
            and len(value) == 2
            and all(type(v) in {int, float} and 0 <= v <= MOST for v in value)
            and value[0] <= value[1]
        )
        if not good:
            self.wrong(key, f"{value!r:.40} is wrong", "two numbers [least, most] are expected")
            return default
        return float(value[0]), float(value[1])

    def table(self, key: str) -> Table:
        """A table inside this one; empty if it is missing."""
        return Table(self.raw(key, {}), self.at(key), self.mistakes)

    def tables(self, key: str) -> list[Table]:
        """A list of tables."""
        value = self.raw(key, [])
        if not isinstance(value, list):
            self.wrong(key, "is no list of tables", f"write each as [[{self.at(key)}]]")
            return []
        return [Table(item, f"{self.at(key)}[{i}]", self.mistakes) for i, item in enumerate(value)]

    def done(self) -> None:
        """Refuse keys that nobody asked for."""
        for key in self._data:
            if key not in self._known:
                near = difflib.get_close_matches(key, sorted(self._known), n=1)
                meant = f"did you mean {near[0]!r}?" if near else ""
                self.wrong(key, "there is no such key", meant)
