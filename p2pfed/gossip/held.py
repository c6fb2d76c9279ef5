"""Which deltas of a run are held: signed headers of the last rounds, 40 bytes each of the others.

A ten-month run has hundreds of thousands of deltas. Of the last rounds (hot) the signed headers are
at hand; of older ones (cold) only what the fold and the digests need: name, origin and roster. The
signed header of a cold delta is asked of the archive when somebody needs it, which is when its
origin has signed a second one.

Invariant: `cool` changes what is in memory, never what any question answers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

from p2pfed.wire.delta import SignedHeader

__all__ = ["Entry", "Held"]

T = TypeVar("T")

_ROW = struct.Struct("<32sII")


class Entry(NamedTuple):
    """What is known of one held delta without its header: full name, origin, roster's hash."""

    fact: bytes
    origin: str
    roster_hash: bytes


class _Table(Generic[T]):
    """Numbers values, so that a row can name one by four bytes."""

    def __init__(self) -> None:
        self.values: list[T] = []
        self._numbers: dict[T, int] = {}

    def number(self, value: T) -> int:
        if value not in self._numbers:
            self._numbers[value] = len(self.values)
            self.values.append(value)
        return self._numbers[value]


class Held:
    """See the module docstring.

    Args:
        recall: Reads a stored signed header by its full name; None if it is damaged. Without it
            nothing gets cold.
    """

    def __init__(self, recall: Callable[[bytes], SignedHeader | None] | None = None) -> None:
        self._recall = recall
        self._hot: dict[int, dict[str, SignedHeader]] = {}
        self._cold: dict[int, bytes] = {}
        self._origins: _Table[str] = _Table()
        self._rosters: _Table[bytes] = _Table()
        self._count: dict[str, int] = {}
        self._size = 0
        self._cooled = 0

    def __len__(self) -> int:
        return self._size

    def add(self, signed: SignedHeader) -> None:
        """Hold one more; the caller has seen that its slot is free."""
        header = signed.header
        self._hot.setdefault(header.round, {})[header.origin] = signed
        self._count[header.origin] = self._count.get(header.origin, 0) + 1
        self._size += 1

    def count(self, origin: str) -> int:
        """How many deltas of one origin are held."""
        return self._count.get(origin, 0)

    def rounds(self) -> Iterator[int]:
        """The rounds that hold a delta, in no order."""
        yield from self._hot.keys() | self._cold.keys()

    def origins(self, round_: int) -> set[str]:
        """Who has a delta in a round."""
        return {*self._hot.get(round_, ()), *(e.origin for e in self._rows(round_))}

    def entries(self, round_: int) -> list[Entry]:
        """What is held of one round, in no order."""
        return [*self._rows(round_), *self._fresh(round_)]

    def holds(self, round_: int, origin: str) -> bool:
        """Whether there is a delta of one origin in one round."""
        hot = self._hot.get(round_)
        if hot is not None and origin in hot:
            return True
        return round_ in self._cold and any(e.origin == origin for e in self._rows(round_))

    def entry(self, round_: int, origin: str) -> Entry | None:
        """What is held of one origin in one round."""
        signed = self._hot.get(round_, {}).get(origin)
        if signed is not None:
            return Entry(signed.fact, origin, signed.header.roster_hash)
        return next((e for e in self._rows(round_) if e.origin == origin), None)

    def signed(self, round_: int, origin: str) -> SignedHeader | None:
        """The signed header of one origin in one round."""
        hot = self._hot.get(round_, {}).get(origin)
        if hot is not None or self._recall is None:
            return hot
        cold = self.entry(round_, origin)
        return None if cold is None else self._recall(cold.fact)

    def cool(self, before: int) -> None:
        """Let go of the headers of all rounds before this one."""
        if self._recall is None or before <= self._cooled:
            return
        self._cooled = before
        for round_ in [r for r in self._hot if r < before]:
            fresh = self._fresh(round_)
            rows = (_ROW.pack(e.fact, *self._numbers_of(e)) for e in fresh)
            self._cold[round_] = self._cold.get(round_, b"") + b"".join(rows)
            del self._hot[round_]

    def _numbers_of(self, entry: Entry) -> tuple[int, int]:
        return self._origins.number(entry.origin), self._rosters.number(entry.roster_hash)

    def _fresh(self, round_: int) -> list[Entry]:
        hot = self._hot.get(round_, {})
        return [Entry(s.fact, origin, s.header.roster_hash) for origin, s in hot.items()]

    def _rows(self, round_: int) -> Iterator[Entry]:
        for fact, origin, roster in _ROW.iter_unpack(self._cold.get(round_, b"")):
            yield Entry(fact, self._origins.values[origin], self._rosters.values[roster])
