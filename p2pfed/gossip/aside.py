"""Deltas that came too early: set aside until the node's own round comes near.

They count neither for the model nor for the digests, only as a sign of where their origin is. A
payload beyond `MAX_BYTES` in all is not kept; its name is, so that it is not asked for again and
again, and it is fetched once its round is near.

Invariant: at most `EACH` deltas per origin and `MAX_BYTES` of payloads, whatever is sent; one
origin's deltas never push out another's.

Not here: who is listed, and what too early means (`intake`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from p2pfed.gossip.asked import Key
from p2pfed.wire.delta import Delta
from p2pfed.wire.messages import NAME_BYTES

__all__ = ["EACH", "MAX_BYTES", "Aside"]

EACH = 8  # per origin; the newest ones say best how far it is
MAX_BYTES = 64 << 20  # four of the longest deltas; usual ones are a hundredth of that


@dataclass(frozen=True, slots=True)
class _Early:
    name: bytes
    round: int
    origin: str
    delta: Delta | None

    @property
    def size(self) -> int:
        return len(self.delta.payload) if self.delta is not None else 0


class Aside:
    """See the module docstring."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, str], _Early] = {}
        self._named: set[bytes] = set()
        self._newest: dict[str, int] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: Key) -> bool:
        """Whether a delta of this name, or of this (round, origin), is set aside."""
        return key in (self._held if isinstance(key, tuple) else self._named)

    @property
    def num_bytes(self) -> int:
        """Bytes of payloads held."""
        return self._bytes

    @property
    def newest(self) -> dict[str, int]:
        """The newest round of each origin; not to be changed."""
        return self._newest

    def clear(self) -> None:
        """Forget all."""
        for early in list(self._held.values()):
            self._drop(early)

    def add(self, delta: Delta) -> None:
        """Keep a delta, if it is among the newest of its origin."""
        header = delta.header
        key = (header.round, header.origin)
        mine = [held for held in self._held.values() if held.origin == header.origin]
        if key in self._held:
            return
        if len(mine) >= EACH:
            oldest = min(mine, key=lambda held: held.round)
            if header.round <= oldest.round:
                return
            self._drop(oldest)
        early = _Early(delta.fact[:NAME_BYTES], header.round, header.origin, delta)
        if self._bytes + early.size > MAX_BYTES:
            early = replace(early, delta=None)
        self._held[key] = early
        self._named.add(early.name)
        self._bytes += early.size
        self._newest[header.origin] = max(header.round, self._newest.get(header.origin, 0))

    def take(self, last: int) -> list[Delta]:
        """Take out what is of rounds up to `last`; of what was not kept nothing is known then."""
        near = [held for held in self._held.values() if held.round <= last]
        for held in near:
            self._drop(held)
        return [held.delta for held in near if held.delta is not None]

    def _drop(self, early: _Early) -> None:
        del self._held[early.round, early.origin]
        self._named.discard(early.name)
        self._bytes -= early.size
        rounds = [held.round for held in self._held.values() if held.origin == early.origin]
        if rounds:
            self._newest[early.origin] = max(rounds)
        else:
            self._newest.pop(early.origin, None)
