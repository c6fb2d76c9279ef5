"""The unit of privacy: who is protected, and clipping each one's contribution on an integer grid.

Map: `Unit` (whom, and how far one may move the sum) -> `Contributions` (one row per patient, per
group of patients or per hospital) -> `Ball`, `Blocks` or `Box` (what a row is clipped to) ->
`clipped_sum` (the exact sum).

Invariant: every row of the sum is an integer vector inside its bound, checked in integer arithmetic
*after* rounding; floating point only proposes the rows. So a neighbouring data set, in which one
row is zero (or, for groups and hospitals, any other row inside the bound) moves the sum by at most
`Unit.moves` times the bound.

Neighbouring relations (`Unit.neighbours`). One row per patient: *zero-out*, one patient's whole
contribution is replaced by zeros. Several patients per row: removing one changes the group's row to
another one of the same bound, so the sum moves by 2 C, not C. Hospital: its whole row is replaced
by any other, 2 C as well; that covers a change of any number of its patients, so debits for a
hospital count for its patients too. The number of patients is public.

Shape suffixes: N = rows of a chunk, D = parameters, K = chosen parameters, B = blocks.

Not here: noise, budgets, how a contribution is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from p2pfed.errors import UpdateRejected

__all__ = [
    "HOSPITAL",
    "PATIENT",
    "Ball",
    "Blocks",
    "Bound",
    "Box",
    "Contributions",
    "PatientRows",
    "PrivacyUnit",
    "Unit",
    "clip_to_grid",
    "clipped_sum",
    "grid_limit",
]

PrivacyUnit = Literal["patient", "hospital"]

_MAX_LIMIT = 1 << 30  # squares of a row, even before it is shrunk, fit in int64
_MAX_SUM = 1 << 31  # sums fit in int32, their squares in int64
_BLOCK = 1 << 18  # numbers worked on at a time: bounds the memory whatever the chunks are


@dataclass(frozen=True, slots=True)
class Unit:
    """Who is protected, and what neighbouring data sets are.

    Attributes:
        kind: "patient" or "hospital".
        patients_per_row: Patients whose records make one contribution together; 1 for a hospital,
            which makes one contribution whatever its size.

    Raises:
        ValueError: A hospital with groups of patients, or a group without patients.
    """

    kind: PrivacyUnit
    patients_per_row: int = 1

    def __post_init__(self) -> None:
        if self.patients_per_row < 1 or (self.kind == "hospital" and self.patients_per_row != 1):
            raise ValueError(f"patients_per_row={self.patients_per_row} for unit {self.kind!r}")

    @property
    def moves(self) -> int:
        """How many times the clipping bound a neighbour moves the sum: 1 or 2."""
        return 1 if self.kind == "patient" and self.patients_per_row == 1 else 2

    @property
    def neighbours(self) -> str:
        """The neighbouring relation, in words."""
        if self.kind == "hospital":
            return "replacement: the hospital's whole contribution is replaced by any other"
        if self.patients_per_row == 1:
            return (
                "zero-out: one patient's whole contribution is replaced by zeros; "
                "the number of patients is public"
            )
        return (
            f"replacement: one patient of a group of {self.patients_per_row} changes the group's "
            "contribution to any other; the number of patients is public"
        )


PATIENT: Final = Unit("patient")
HOSPITAL: Final = Unit("hospital")


class Contributions(Protocol):
    """One row per patient, readable more than once.

    Row i must be a function of patient i's data and of public facts only (the round's public
    model, fresh optimiser state): the privacy guarantee rests on this. The two readings need not
    agree to the bit, for each is clipped on its own. For groups of patients and for the unit
    "hospital" read "the group" and "the hospital" for "patient i".
    """

    @property
    def num_patients(self) -> int:
        """How many rows there are in all; public."""
        ...

    @property
    def num_parameters(self) -> int:
        """The length D of each row."""
        ...

    def chunks(self) -> Iterator[NDArray[np.float32]]:
        """Yield all rows as arrays (N, D), in any chunking."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class PatientRows:
    """Contributions that are all in memory.

    Attributes:
        rows: (patients, parameters) floats.
    """

    rows: NDArray[np.floating[Any]]

    @property
    def num_patients(self) -> int:
        """How many rows there are."""
        return len(self.rows)

    @property
    def num_parameters(self) -> int:
        """The length of each row."""
        return int(self.rows.shape[1])

    def chunks(self) -> Iterator[NDArray[np.float32]]:
        """Yield all rows at once."""
        with np.errstate(over="ignore"):  # beyond float32 becomes infinite, refused later
            rows_ND = self.rows.astype(np.float32, copy=False)
        yield rows_ND


def grid_limit(clip: Fraction | float, bits: int) -> int:
    """Return a clipping bound in grid units of 2^-bits, rounded down.

    Args:
        clip: Bound of one contribution; a public constant, never taken from patients.
        bits: The grid is 2^-bits.

    Raises:
        ValueError: `bits` is not in 0..64 or the limit not in 1..2^30 grid units.
    """
    limit = math.floor(Fraction(clip) * Fraction(2) ** bits)
    if not 0 <= bits <= 64 or not 1 <= limit <= _MAX_LIMIT:
        raise ValueError(f"clip={clip} on a grid of 2^-{bits} must be 1 to 2^30 grid units")
    return limit


@dataclass(frozen=True, slots=True)
class Ball:
    """Rows of L2 norm at most `limit` grid units."""

    limit: int

    def clip(self, rows_ND: NDArray[np.float64]) -> NDArray[np.int64]:
        """Round rows given in grid units, and shrink them into the bound."""
        norm_N = np.sqrt(np.square(rows_ND).sum(axis=1))
        scale_N = np.ones(len(norm_N))
        np.divide(self.limit, norm_N, out=scale_N, where=norm_N > self.limit)
        return _inside(np.rint(rows_ND * scale_N[:, None]).astype(np.int64), self.limit)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows of L2 norm at most `limit` whose blocks of `size` each have at most `block_limit`."""

    limit: int
    size: int
    block_limit: int

    def clip(self, rows_ND: NDArray[np.float64]) -> NDArray[np.int64]:
        """Round rows given in grid units, and shrink them into the bound."""
        width = rows_ND.shape[1]
        padded = np.pad(rows_ND, ((0, 0), (0, -width % self.size)))
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


@dataclass(frozen=True, slots=True)
class Box:
    """Rows of which no number is larger than `limit` grid units."""

    limit: int

    def clip(self, rows_ND: NDArray[np.float64]) -> NDArray[np.int64]:
        """Round rows given in grid units, and cut their numbers at the bound."""
        return np.rint(np.clip(rows_ND, -self.limit, self.limit)).astype(np.int64)


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
    return bound.clip(_finite(rows_ND) * 2.0**bits)


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
        step = max(1, _BLOCK // num_parameters)
        for start in range(0, len(rows_ND), step):
            kept = rows_ND[start : start + step]
            kept = kept if chosen_K is None else kept[:, chosen_K]
            total += clip_to_grid(kept, bound=bound, bits=bits).sum(axis=0, dtype=np.int32)
        seen += len(rows_ND)
    if seen != num_rows:
        raise UpdateRejected(f"{seen} contributions came", f"{num_rows} were announced")
    return total


def _finite(rows_ND: NDArray[Any]) -> NDArray[np.float64]:
    if rows_ND.ndim != 2 or rows_ND.dtype.kind != "f":
        raise UpdateRejected(
            f"contributions of shape {rows_ND.shape} and type {rows_ND.dtype}",
            "expected floats, one row per patient",
        )
    with np.errstate(over="ignore"):
        values_ND = rows_ND.astype(np.float32, copy=False).astype(np.float64)
    if not np.isfinite(values_ND).all():
        raise UpdateRejected(
            "a contribution holds NaN or infinity",
            "its length cannot be bounded, so nothing was released",
            "Look at the learning rate and at the data of this hospital.",
        )
    return values_ND


def _inside(grid_ND: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """Shrink rows of integers until their exact L2 norm is at most `limit`."""
    while (over := np.flatnonzero(_squares(grid_ND) > limit * limit)).size:
        # Factor < 1 and truncation: every non-zero entry loses at least one, so this ends.
        factor = limit / np.sqrt(_squares(grid_ND[over])) * (1.0 - 2.0**-40)
        grid_ND[over] = np.trunc(grid_ND[over] * factor[:, None]).astype(np.int64)
    return grid_ND


def _squares(grid_ND: NDArray[np.int64]) -> NDArray[np.int64]:
    squares: NDArray[np.int64] = np.square(grid_ND).sum(axis=1)
    return squares
