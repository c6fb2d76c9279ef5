"""Digests of the delta set: one per round, joined into a binary tree over rounds.

Two peers compare digests of ranges, from large to small, until they find the rounds in which they
differ: O(log rounds) messages of a few hundred bytes, whatever the length of the run.

Invariant: equal sets give equal digests, unequal sets unequal ones (BLAKE2b, 128 bits; a deliberate
collision would take 2**64 signed deltas). An empty range has the digest of zeros. A late delta
recomputes O(log rounds) nodes.
"""

from __future__ import annotations

import hashlib

from p2pfed.wire.beat import HASH_BYTES
from p2pfed.wire.messages import Range

__all__ = ["EMPTY", "DigestTree"]

EMPTY = bytes(HASH_BYTES)


class DigestTree:
    """Names of facts by round, and digests of aligned power-of-two ranges of rounds."""

    def __init__(self) -> None:
        self._rounds: dict[int, set[bytes]] = {}
        self._cache: dict[tuple[int, int], bytes] = {}
        self._versions: dict[int, int] = {}
        self._levels = 1  # how many levels of the tree were ever asked for
        self._end = 0

    @property
    def end(self) -> int:
        """One more than the highest round that holds a fact."""
        return self._end

    def version(self, round_: int) -> int:
        """Changes whenever the facts of the round do."""
        return self._versions.get(round_, 0)

    def add(self, round_: int, fact: bytes) -> None:
        """Add a fact to a round."""
        self._rounds.setdefault(round_, set()).add(fact)
        self._end = max(self._end, round_ + 1)
        self._forget_cached(round_)

    def discard(self, round_: int, fact: bytes) -> None:
        """Take a fact out of a round; nothing happens if it is not there."""
        held = self._rounds.get(round_)
        if not held or fact not in held:
            return
        held.discard(fact)
        while self._end and not self._rounds.get(self._end - 1):
            self._end -= 1
        self._forget_cached(round_)

    def facts(self, round_: int) -> frozenset[bytes]:
        """The facts of one round."""
        return frozenset(self._rounds.get(round_, ()))

    def digest(self, start: int, length: int) -> bytes:
        """Digest of the rounds [start, start + length), aligned, length a power of two."""
        if start >= self._end:
            return EMPTY
        key = (start, length)
        if key not in self._cache:
            self._levels = max(self._levels, length.bit_length())
            self._cache[key] = self._compute(start, length)
        return self._cache[key]

    def cover(self) -> tuple[Range, ...]:
        """The fewest aligned ranges that cover [0, end), largest first."""
        ranges, start = [], 0
        while start < self._end:
            length = 1 << ((self._end - start).bit_length() - 1)
            ranges.append(Range(start, length, self.digest(start, length)))
            start += length
        return tuple(ranges)

    def parts(self, start: int, length: int) -> tuple[Range, ...]:
        """The quarters (halves, if length is 2) of a range: one step down the tree."""
        step = max(1, length // 4)
        return tuple(
            Range(at, step, self.digest(at, step)) for at in range(start, start + length, step)
        )

    def _compute(self, start: int, length: int) -> bytes:
        if length == 1:
            facts = self._rounds.get(start)
            parts = sorted(facts) if facts else []
        else:
            half = length // 2
            both = [self.digest(start, half), self.digest(start + half, half)]
            parts = [] if both == [EMPTY, EMPTY] else both
        if not parts:
            return EMPTY
        return hashlib.blake2b(b"".join(parts), digest_size=HASH_BYTES).digest()

    def _forget_cached(self, round_: int) -> None:
        self._versions[round_] = self._versions.get(round_, 0) + 1
        for level in range(self._levels):
            self._cache.pop((round_ >> level << level, 1 << level), None)
