"""Clipping every contribution on an integer grid, and their exact sum.

Map: `grid_limit` (the bound in grid units) -> `Ball`, `Blocks` or `Box` (what a row is clipped to)
-> `clipped_sum` (the exact sum).

Invariant: every row of the sum is an integer vector inside its bound, checked exactly *after*
rounding; floating point only proposes the rows, and sums whole numbers below 2^53, which is exact.
So a neighbouring data set, in which one row is zero (or, for groups and hospitals, any other row
inside the bound) moves the sum by at most `units.Unit.moves` times the bound.

Shape suffixes: N = rows of a chunk, D = parameters, K = chosen parameters, B = blocks.

Not here: whose rows they are (`units`), noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfed.errors import UpdateRejected
from p2pfed.privacy.units import Contributions

__all__ = ["Ball", "Blocks", "Bound", "Box", "clip_to_grid", "clipped_sum", "grid_limit"]

_MAX_LIMIT = 1 << 26  # squares of a row in the bound are whole numbers up to 2^52, exact in float64
_MAX_SUM = 1 << 31  # sums fit in int32, their squares in int64
_BLOCK = 1 << 15  # numbers worked on at a time: they stay in the cache, whatever the chunks are


def grid_limit(clip: Fraction | float, bits: int) -> int:
    """Return a clipping bound in grid units of 2^-bits, rounded down.

    Args:
        clip: Bound of one contribution; a public constant, never taken from patients.
        bits: The grid is 2^-bits.

    Raises:
        ValueError: `bits` is not in 0..64 or the limit not in 1..2^26 grid units.
    """
    limit = math.floor(Fraction(clip) * Fraction(2) ** bits)
    if not 0 <= bits <= 64 or not 1 <= limit <= _MAX_LIMIT:
        raise ValueError(f"clip={clip} on a grid of 2^-{bits} must be 1 to 2^26 grid units")
    return limit


@dataclass(frozen=True, slots=True)
class Ball:
    """Rows of L2 norm at most `limit` grid units."""

    limit: int

    def clip(self, rows_ND: NDArray[np.floating[Any]], unit: float) -> NDArray[np.int64]:
        """Multiply rows by `unit`, round them, and shrink them into the bound."""
        return _rounded(rows_ND, self._factors(rows_ND, unit)).astype(np.int64)

    def add(
        self, rows_ND: NDArray[np.floating[Any]], unit: float, total: NDArray[np.int32]
    ) -> None:
        """Add the clipped rows to `total`, some columns at a time."""
        factor_N = self._factors(rows_ND, unit)
        for part in _columns(rows_ND):
            column_sum = _rounded(rows_ND[:, part], factor_N).sum(axis=0)
            np.add(total[part], column_sum, out=total[part], casting="unsafe")  # whole numbers

    def _factors(self, rows_ND: NDArray[np.floating[Any]], unit: float) -> NDArray[np.float64]:
        """Return for each row the factor after which, rounded, it lies in the bound.

        The squares of whole numbers are summed exactly below 2^53; a sum beyond is beyond the
        bound as well. Rounding D numbers adds about D / 12 to a square, and some multiple of its
        root: room is left for that, so few rows need another turn. Each turn shrinks more than the
        last, so this ends.
        """
        unit_N = np.full(len(rows_ND), unit)
        norm_N = np.sqrt(_squares(rows_ND, unit_N))
        _check_finite(norm_N)
        factor_N = unit_N.copy()
        room = min(2.0**-10, 2 / self.limit) + rows_ND.shape[1] / (24 * self.limit**2)
        reach = unit * self.limit * max(0.5, 1 - room)
        np.divide(reach, norm_N, out=factor_N, where=norm_N > self.limit)
        extra, over = 2.0**-24, np.arange(len(rows_ND))
        while True:
            rows = rows_ND if over.size == len(rows_ND) else rows_ND[over]
            square_K = _squares(rows, factor_N[over], rounded=True)
            long = square_K > float(self.limit) ** 2
            over = over[long]
            if not over.size:
                return factor_N
            factor_N[over] *= self.limit / np.sqrt(square_K[long]) * (1.0 - extra)
            extra *= 2


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows of L2 norm at most `limit` whose blocks of `size` each have at most `block_limit`."""

    limit: int
    size: int
    block_limit: int

    def clip(self, rows_ND: NDArray[np.floating[Any]], unit: float) -> NDArray[np.int64]:
        """Multiply rows by `unit`, round them, and shrink them into the bound."""
        width = rows_ND.shape[1]
        padded = np.pad(_in_units(rows_ND, unit), ((0, 0), (0, -width % self.size)))
        block_NBk = padded.reshape(len(rows_ND), -1, self.size)
        norm_NB = np.sqrt(np.square(block_NBk).sum(axis=2))
        scale_NB = np.ones_like(norm_NB)
        np.divide(self.block_limit, norm_NB, out=scale_NB, where=norm_NB > self.block_limit)
        norm_N = np.sqrt(np.square(norm_NB * scale_NB).sum(axis=1))
        scale_N = np.ones(len(norm_N))
        np.divide(self.limit, norm_N, out=scale_N, where=norm_N > self.limit)
        scale_NB *= scale_N[:, None]
        grid = np.rint(block_NBk * scale_NB[:, :, None]).astype(np.int64)
        grid = _inside(grid.reshape(-1, self.size), self.block_limit)  # then only gets smaller
        return _inside(grid.reshape(len(rows_ND), -1)[:, :width], self.limit)

    def add(
        self, rows_ND: NDArray[np.floating[Any]], unit: float, total: NDArray[np.int32]
    ) -> None:
        """Add the clipped rows to `total`."""
        total += self.clip(rows_ND, unit).sum(axis=0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Box:
    """Rows of which no number is larger than `limit` grid units."""

    limit: int

    def clip(self, rows_ND: NDArray[np.floating[Any]], unit: float) -> NDArray[np.int64]:
        """Multiply rows by `unit`, round them, and cut their numbers at the bound."""
        inside_ND = np.clip(_in_units(rows_ND, unit), -self.limit, self.limit)
        return np.rint(inside_ND).astype(np.int64)

    def add(
        self, rows_ND: NDArray[np.floating[Any]], unit: float, total: NDArray[np.int32]
    ) -> None:
        """Add the clipped rows to `total`."""
        for part in _columns(rows_ND):
            total[part] += self.clip(rows_ND[:, part], unit).sum(axis=0, dtype=np.int32)


Bound = Ball | Blocks | Box


def clip_to_grid(rows_ND: NDArray[Any], *, bound: Bound, bits: int) -> NDArray[np.int64]:
    """Round each row to the grid of 2^-bits and shrink it into the bound.

    Formal guarantee: every returned row is a function of the same input row alone, and lies in the
    bound by exact integer arithmetic, whatever the input.

    Args:
        rows_ND: (N, D) real numbers.
        bound: What each row must satisfy, in grid units.
        bits: The grid is 2^-bits.

    Returns:
        (N, D) int64 in grid units.

    Raises:
        UpdateRejected: A number is NaN or infinite, or the array is not two-dimensional.
    """
    return bound.clip(_single(rows_ND), 2.0**bits)


def clipped_sum(
    contributions: Contributions,
    *,
    bound: Bound,
    bits: int,
    chosen_K: NDArray[Any] | None = None,
) -> NDArray[np.int32]:
    """Return the exact sum of all clipped contributions.

    Formal guarantee: under zero-out of one row the result moves by an integer vector inside the
    bound; under replacement of one row, by the difference of two such vectors. With `chosen_K`
    (public), the rows are restricted to it *before* clipping.

    Args:
        contributions: One row per patient, group or hospital.
        bound: What each row is clipped to, in grid units.
        bits: The grid is 2^-bits.
        chosen_K: Restrict every row to these parameters; None keeps all.

    Returns:
        (D,) or (K,) int32 in grid units.

    Raises:
        UpdateRejected: NaN, infinity, wrong shape, no row, or more rows than the grid can sum.
    """
    num_rows, num_parameters = contributions.num_patients, contributions.num_parameters
    if num_rows < 1 or num_rows * bound.limit >= _MAX_SUM:
        raise UpdateRejected(
            f"{num_rows} contributions of up to {bound.limit} grid units",
            f"their sum must lie between 1 and {_MAX_SUM - 1} grid units",
            "Choose fewer grid bits or a smaller clip, or contribute at least one patient.",
        )
    total = np.zeros(num_parameters if chosen_K is None else chosen_K.size, np.int32)
    seen = 0
    for rows_ND in contributions.chunks():
        if rows_ND.ndim != 2 or rows_ND.shape[1] != num_parameters:
            raise UpdateRejected(
                f"contributions of shape {rows_ND.shape}", f"expected (any, {num_parameters})"
            )
        step = max(1, _BLOCK // max(1, total.size))
        for start in range(0, len(rows_ND), step):
            kept = _single(rows_ND[start : start + step])
            bound.add(kept if chosen_K is None else _chosen(kept, chosen_K), 2.0**bits, total)
        seen += len(rows_ND)
    if seen != num_rows:
        raise UpdateRejected(f"{seen} contributions came", f"{num_rows} were announced")
    return total


def _single(rows_ND: NDArray[Any]) -> NDArray[np.float32]:
    """Refuse what are no rows of floats; what single precision cannot hold becomes infinite."""
    if rows_ND.ndim != 2 or rows_ND.dtype.kind != "f":
        raise UpdateRejected(
            f"contributions of shape {rows_ND.shape} and type {rows_ND.dtype}",
            "expected floats, one row per patient",
        )
    with np.errstate(over="ignore"):
        return rows_ND.astype(np.float32, copy=False)


def _chosen(rows_ND: NDArray[np.float32], chosen_K: NDArray[Any]) -> NDArray[np.float32]:
    """Return rows_ND[:, chosen_K], without wide copies of the indices."""
    rows_NK = np.empty((len(rows_ND), chosen_K.size), np.float32)
    for part in _columns(rows_NK):
        rows_NK[:, part] = rows_ND[:, chosen_K[part]]
    return rows_NK


def _check_finite(numbers: NDArray[np.float64]) -> None:
    if not np.isfinite(numbers).all():
        raise UpdateRejected(
            "a contribution holds NaN or infinity",
            "its length cannot be bounded, so nothing was released",
            "Look at the learning rate and at the data of this hospital.",
        )


def _in_units(rows_ND: NDArray[np.floating[Any]], unit: float) -> NDArray[np.float64]:
    scaled_ND: NDArray[np.float64] = np.multiply(rows_ND, unit, dtype=np.float64)
    _check_finite(scaled_ND)
    return scaled_ND


def _columns(rows_ND: NDArray[Any]) -> Iterator[slice]:
    """Cut the columns alike whatever the number of rows: a row depends on itself alone."""
    for start in range(0, rows_ND.shape[1], _BLOCK):
        yield slice(start, start + _BLOCK)


def _rounded(
    rows_ND: NDArray[np.floating[Any]], factor_N: NDArray[np.float64]
) -> NDArray[np.float64]:
    scaled_ND = _scaled(rows_ND, factor_N)
    return np.rint(scaled_ND, out=scaled_ND)


def _scaled(
    rows_ND: NDArray[np.floating[Any]], factor_N: NDArray[np.float64]
) -> NDArray[np.float64]:
    scaled_ND = rows_ND.astype(np.float64)
    scaled_ND *= factor_N[:, None]
    return scaled_ND


def _squares(
    rows_ND: NDArray[np.floating[Any]], factor_N: NDArray[np.float64], *, rounded: bool = False
) -> NDArray[np.float64]:
    """Return per row the sum of squares of the multiplied numbers, as they are or rounded."""
    square_N = np.zeros(len(rows_ND))
    for part in _columns(rows_ND):
        scaled = (_rounded if rounded else _scaled)(rows_ND[:, part], factor_N)
        square_N += np.square(scaled, out=scaled).sum(axis=1)
    return square_N


def _inside(grid_ND: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """Shrink rows of integers until their exact L2 norm is at most `limit`."""
    while (over := np.flatnonzero(_integer_squares(grid_ND) > limit * limit)).size:
        # Factor < 1 and truncation: every non-zero entry loses at least one, so this ends.
        factor = limit / np.sqrt(_integer_squares(grid_ND[over])) * (1.0 - 2.0**-40)
        grid_ND[over] = np.trunc(grid_ND[over] * factor[:, None]).astype(np.int64)
    return grid_ND


def _integer_squares(grid_ND: NDArray[np.int64]) -> NDArray[np.int64]:
    squares: NDArray[np.int64] = np.square(grid_ND).sum(axis=1)
    return squares
