"""Exact sums over the payloads of one round: weighted sums, squared norms, inner products.

Invariant: every sum is the sum of integers, so its value depends neither on the order of payloads,
nor on where pieces begin, nor on the machine. A sum is computed in float64 only where all of its
partial sums are integers of at most 2**53, which float64 holds exactly in any order, fused or not;
else in int64, whose bound the callers keep:

* a value is |q| <= 2**15, so `weighted` needs coefficients whose magnitudes sum to at most 2**47;
* a piece has 2**16 coordinates: its inner products are at most 2**46. Pieces add up in Python
  integers.

Memory: payloads are kept while they fit into 256 MiB together; the others are read again from
their source each time they are needed, one at a time, and cost one array of 8 bytes a parameter.
Rules that need pairs of payloads (`gram`) hold two groups of at most that size besides.

Pieces are such that BLAS starts no threads, which wait for each other where a trainer uses all
cores (measured: up to 20 times slower); only `gram` has enough to multiply for them.

Which coefficients are used is decided in `robust`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from p2pfed.wire.payload import Payload

__all__ = ["CHUNK", "MAX_COEFFICIENTS", "Contribution", "Payloads"]

CHUNK = 1 << 16  # coordinates of a piece: a few arrays of it stay in a cache of 2 MB
KEPT_BYTES = 1 << 28
MAX_COEFFICIENTS = 1 << 47  # sum of magnitudes: 2**15 times it is below 2**63
EXACT = 1 << 38  # 2**15 times it is 2**53
ROW = 1 << 13  # of an inner product: OpenBLAS uses threads from 10,000 coordinates on
ROWS = 4  # dense payloads that are summed at once
GROUP = 64  # payloads whose inner products are taken at once


class Contribution(Protocol):
    """One delta as the fold sees it."""

    @property
    def payload(self) -> Payload:
        """What it says; may be read from disk at each access."""

    @property
    def weight(self) -> int:
        """What it weighs, an integer >= 1."""


class Payloads:
    """The payloads of one round.

    Args:
        deltas: Where they come from.
        num_parameters: P.
    """

    def __init__(self, deltas: Sequence[Contribution], num_parameters: int) -> None:
        self._deltas = deltas
        self._size = num_parameters
        self._kept: dict[int, Payload] = {}
        self._room = KEPT_BYTES
        self._extra: list[Payload] = []

    def __len__(self) -> int:
        return len(self._deltas) + len(self._extra)

    def __getitem__(self, i: int) -> Payload:
        if i >= len(self._deltas):
            return self._extra[i - len(self._deltas)]
        kept = self._kept.get(i)
        if kept is not None:
            return kept
        payload = self._deltas[i].payload
        size = _bytes_of(payload)
        if size <= self._room:
            self._room -= size
            self._kept[i] = payload
        return payload

    def append(self, payload: Payload) -> None:
        """One more, that no delta brought; it stays in memory."""
        self._extra.append(payload)

    # --- sums ----------------------------------------------------------------------------------

    def squares(self) -> list[int]:
        """Squared norm of each, in squares of the grid; at most 2**60."""
        found = []
        for i in range(len(self)):
            values = self[i].values
            found.append(_dot(values, values))
        return found

    def products(self, centre: NDArray[np.int16]) -> list[int]:
        """Inner product of each with a vector of shape (P,); at most 2**60."""
        return [self._product(self[i], centre) for i in range(len(self))]

    def _product(self, payload: Payload, centre: NDArray[np.int16]) -> int:
        if self._is_dense(payload):
            return _dot(payload.values, centre)
        return _dot(payload.values, centre[payload.indices])

    def weighted(
        self, coefficients: Sequence[int]
    ) -> Iterator[tuple[slice, NDArray[np.float64] | NDArray[np.int64]]]:
        """The sum of coefficient times payload, in pieces.

        Args:
            coefficients: One per payload, not negative, in sum at most 2**47.

        Yields:
            The coordinates of a piece and its sums, integers in float64 or int64; the array is
            used again for the next piece.
        """
        total = sum(coefficients)
        if len(coefficients) != len(self) or min(coefficients, default=0) < 0:
            raise ValueError("one coefficient per payload, none of them negative")
        if total > MAX_COEFFICIENTS:
            raise ValueError(f"coefficients of {total} in sum: int64 could overflow")
        kind: type[Any] = np.float64 if total <= EXACT else np.int64
        near, rest = [], None
        for i, coefficient in enumerate(coefficients):
            payload = self[i] if coefficient else None
            if payload is None:
                continue
            if i in self._kept or i >= len(self._deltas):
                near.append((payload, coefficient))
                continue
            rest = np.zeros(self._size, kind) if rest is None else rest
            for part, sums in self._pieces([(payload, coefficient)], rest, kind):
                rest[part] = sums
        yield from self._pieces(near, rest, kind)

    def _pieces(
        self, terms: Sequence[tuple[Payload, int]], begin: NDArray[Any] | None, kind: type[Any]
    ) -> Iterator[tuple[slice, NDArray[Any]]]:
        dense = [(p.values, c) for p, c in terms if self._is_dense(p)]
        groups = [dense[at : at + ROWS] for at in range(0, len(dense), ROWS)]
        sparse = [
            (p.indices, p.values, kind(c), self._ends(p)) for p, c in terms if not self._is_dense(p)
        ]
        longest = min(CHUNK, self._size)
        block, buffer = np.empty((min(ROWS, len(dense)), longest), kind), np.empty(longest, kind)
        factors = [np.array([c for _, c in group], kind) for group in groups]
        for k, start in enumerate(range(0, self._size, CHUNK)):
            part = slice(start, min(start + CHUNK, self._size))
            sums = buffer[: part.stop - start]
            sums[:] = 0 if begin is None else begin[part]
            for group, factor in zip(groups, factors, strict=True):
                rows = block[: len(group), : sums.size]
                for row, (values, _) in zip(rows, group, strict=True):
                    row[:] = values[part]
                sums += np.einsum("i,ij->j", factor, rows)
            for indices, values, weight, ends in sparse:
                here = slice(ends[k], ends[k + 1])
                np.add.at(sums, indices[here] - start, values[here] * weight)
            yield part, sums

    def gram(self) -> NDArray[np.int64]:
        """Inner products of all pairs, shape (n, n), each at most 2**60; n**2 P / 2 products."""
        n = len(self)
        products = np.zeros((n, n), np.int64)
        largest = max((_bytes_of(self[i]) for i in range(n)), default=1)
        size = min(GROUP, max(1, KEPT_BYTES // max(1, largest)))
        groups = [slice(at, min(at + size, n)) for at in range(0, n, size)]
        for a, rows in enumerate(groups):
            held = [self[i] for i in range(rows.start, rows.stop)]
            for columns in groups[a:]:
                others = [self[j] for j in range(columns.start, columns.stop)]
                for one, other in zip(self._blocks(held), self._blocks(others), strict=True):
                    products[rows, columns] += (one @ other.T).astype(np.int64)
                products[columns, rows] = products[rows, columns].T
        return products

    def _blocks(self, payloads: Sequence[Payload]) -> Iterator[NDArray[np.float64]]:
        """Pieces of the payloads as rows."""
        ends = [None if self._is_dense(p) else self._ends(p) for p in payloads]
        for k, start in enumerate(range(0, self._size, CHUNK)):
            block = np.zeros((len(payloads), min(CHUNK, self._size - start)))
            for row, payload, end in zip(block, payloads, ends, strict=True):
                if end is None:
                    row[:] = payload.values[start : start + row.size]
                else:
                    here = slice(end[k], end[k + 1])
                    row[payload.indices[here] - start] = payload.values[here]
            yield block

    def _ends(self, payload: Payload) -> NDArray[np.int64]:
        """Where the pieces of a sparse payload begin, and the last one ends."""
        edges = np.append(np.arange(0, self._size, CHUNK), self._size)
        return np.searchsorted(payload.indices, edges)

    def _is_dense(self, payload: Payload) -> bool:
        return payload.is_dense or payload.values.size == self._size


def _bytes_of(payload: Payload) -> int:
    return payload.values.nbytes + (0 if payload.is_dense else payload.indices.nbytes)


def _dot(one: NDArray[np.int16], other: NDArray[np.int16]) -> int:
    total = 0
    for start in range(0, one.size, CHUNK):
        part = slice(start, start + CHUNK)
        left = one[part].astype(np.float64)
        right = left if other is one else other[part].astype(np.float64)
        whole = left.size - left.size % ROW
        rows = (left[:whole].reshape(-1, ROW), right[:whole].reshape(-1, ROW))
        total += int(np.vecdot(*rows).sum()) + int(np.dot(left[whole:], right[whole:]))
    return total
