"""Exact one-sided geometric numbers, digit by digit.

Map: `one_sided_geometric` <- `_Digit` (a number below 256 with geometric weights, by a table).

Invariant: P(G >= k) = exp(-k / scale) exactly, for every k; nothing is cut off. A table decides
what 16 random bits decide; the few others extend the same bits (as in `bernoulli`).

Source: that the binary digits of a geometric number are independent is folklore, proved in the
docstring of `one_sided_geometric`. Shape suffixes: N = numbers, K = those still undecided.

Not here: signs (`noise`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from p2pfed.privacy.bernoulli import bernoulli, exp_bracket
from p2pfed.privacy.keystream import RandomWords

__all__ = ["CHUNK", "MAX_SCALE", "one_sided_geometric"]

CHUNK = 1 << 16  # numbers at a time: the working arrays stay in the processor's cache

MAX_SCALE = 1 << 48  # keeps every number far inside int64
_MARGIN = 2.0**-40  # far more than the error of a boundary


@dataclass(frozen=True, slots=True, eq=False)
class _Digit:
    """A number 0 <= b < size with P(b) proportional to exp(-b step): `size` is at most 256.

    P(below b) = (1 - exp(-b step)) / (1 - exp(-size step)). The first 16 bits of a uniform number
    look b up in a table of 2^16 cells; the few cells that a boundary runs through say -1. `size`
    times `step` is at most 16.

    Attributes:
        size: How many values there are.
        step: The step between two exponents.
        below: (size + 1,) float64, P(below b), each within 2^-45.
        table: (2^16,) int16.
    """

    size: int
    step: Fraction
    below: NDArray[np.float64]
    table: NDArray[np.int16]

    @classmethod
    def of(cls, size: int, step: Fraction) -> _Digit:
        near = float(step)
        below = np.expm1(-near * np.arange(size + 1)) / math.expm1(-near * size)
        edges = below * 65536
        table = np.repeat(np.arange(size, dtype=np.int16), np.diff(np.rint(edges).astype(np.int64)))
        for margin in (-(2.0**-20), 2.0**-20):  # far more than the error of an edge
            through = np.floor(edges[1:-1] + margin).astype(np.int64)
            table[through[(through >= 0) & (through < 65536)]] = -1
        return cls(size, step, below, table)

    def draw(self, stream: RandomWords, count: int) -> NDArray[np.int16]:
        """Return `count` independent values."""
        u_N = stream.octets(2 * count).view(np.uint16)
        value_N = self.table.take(u_N)
        open_ = np.flatnonzero(value_N < 0)
        if open_.size:
            top = u_N[open_].astype(np.uint64) << np.uint64(48)
            value_N[open_] = self._settle(stream, top | stream.words(open_.size) >> np.uint64(16))
        return value_N

    def _settle(self, stream: RandomWords, u_K: NDArray[np.uint64]) -> NDArray[np.intp]:
        """Return the values of uniform numbers of which 64 bits are known."""
        v_K = (u_K >> np.uint64(11)).astype(np.float64) * 2.0**-53
        value_K = np.searchsorted(self.below[1:-1], v_K, side="right")
        room = np.minimum(v_K - self.below[value_K], self.below[value_K + 1] - v_K)
        for i in np.flatnonzero(room < _MARGIN):
            value_K[i] = self._exactly(stream, int(u_K[i]), int(value_K[i]))
        return value_K

    def _exactly(self, stream: RandomWords, u: int, near: int) -> int:
        """Return the value where floating point must not decide; it is at most one off.

        No value's probability is below exp(-16) (1 - exp(-1/16)), far above `_MARGIN`.
        """
        bits = 64
        while True:
            for value in range(max(0, near - 1), min(self.size, near + 2)):
                _, low = self._bracket(value, bits)
                high, _ = self._bracket(value + 1, bits)
                if low <= u < high:
                    return value
            u = u << 64 | int(stream.words(1)[0])
            bits += 64

    def _bracket(self, value: int, bits: int) -> tuple[int, int]:
        """Return integers low <= 2^bits P(below value) <= high."""
        one = 1 << bits
        if value in {0, self.size}:
            return (0, 0) if value == 0 else (one, one)
        low, high = exp_bracket(value * self.step, bits)
        all_low, all_high = exp_bracket(self.size * self.step, bits)
        return (
            (one - high << bits) // (one - all_low),
            -((low - one << bits) // (one - all_high)) if all_high < one else one,
        )


@lru_cache(maxsize=4)
def _digits(scale: Fraction) -> tuple[_Digit, ...]:
    """Return the digits of a geometric number, the highest first; together they reach 8 scales."""
    bits = (math.ceil(8 * scale) - 1).bit_length()
    places = range(0, bits, 8)
    found = [_Digit.of(1 << min(8, bits - place), (1 << place) / scale) for place in places]
    return tuple(reversed(found))


def one_sided_geometric(stream: RandomWords, count: int, scale: Fraction) -> NDArray[np.int64]:
    """Return `count` independent G >= 0 with P(G >= k) = exp(-k / scale), exactly.

    P(G = k) is proportional to the product over k's digits b_j to the base 256 of
    exp(-b_j 256^j / scale), so the digits are independent, and floor(G / 2^J) is geometric again
    with ratio exp(-2^J / scale): a loop over the few that survive it.

    Args:
        stream: The random words.
        count: How many.
        scale: Positive, at most 2^48.

    Returns:
        (count,) int64.

    Raises:
        ValueError: The scale is out of range.
    """
    if not 0 < scale <= MAX_SCALE:
        raise ValueError(f"scale={scale} must be positive and at most 2^48")
    value_N = np.zeros(count, np.int64)
    for start in range(0, count, CHUNK):
        _fill_geometric(stream, value_N[start : start + CHUNK], scale)
    return value_N


def _fill_geometric(stream: RandomWords, value_N: NDArray[np.int64], scale: Fraction) -> None:
    step = 1
    for digit in _digits(scale):
        if step > 1:
            value_N *= digit.size
        value_N += digit.draw(stream, value_N.size)
        step *= digit.size
    survives = partial(exp_bracket, step / scale)
    alive = bernoulli(stream, value_N.size, survives)
    while alive.size:
        value_N[alive] += step
        alive = alive[bernoulli(stream, alive.size, survives)]
