"""The unit of privacy: who is protected, and clipping each one's contribution on an integer grid.

Map: `Contributions` (one row per patient) -> `clip_to_grid` (integer rows of bounded length)
-> `clipped_sum` (their exact sum).

Invariant: one patient moves the returned sum by an integer vector of L2 norm <= `limit`, checked
in integer arithmetic *after* rounding; floating point only proposes the rows.

Neighbouring relation (zero-out): two data sets are neighbours when one patient's whole
contribution is replaced by zeros; the number of patients is public.

Shape suffixes: N = patients of a chunk, D = parameters, K = chosen parameters.

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
    "NEIGHBOURS",
    "Contributions",
    "PatientRows",
    "PrivacyUnit",
    "clip_to_grid",
    "clipped_sum",
    "grid_limit",
]

PrivacyUnit = Literal["patient", "hospital"]

NEIGHBOURS: Final[dict[PrivacyUnit, str]] = {
    "patient": "zero-out: one patient's whole contribution is replaced by zeros; "
    "the number of patients is public",
    "hospital": "zero-out: the hospital's whole contribution is replaced by zeros",
}

_MAX_LIMIT = 1 << 30  # squares of a row, even before it is shrunk, fit in int64
_MAX_SUM = 1 << 31  # squares of a sum fit in int64
_BLOCK = 1 << 18  # numbers worked on at a time: bounds the memory whatever the chunks are


class Contributions(Protocol):
    """One row per patient, readable more than once.

    Row i must be a function of patient i's data and of public facts only (the round's public
    model, fresh optimiser state): the privacy guarantee rests on this. The two readings need not
    agree to the bit, for each is clipped on its own. For the unit "hospital" there is one row.
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
    """Return the clipping length in grid units of 2^-bits, rounded down.

    Args:
        clip: L2 bound of one contribution; a public constant, never taken from patients.
        bits: The grid is 2^-bits.

    Raises:
        ValueError: `bits` is not in 0..64 or the limit not in 1..2^30 grid units.
    """
    limit = math.floor(Fraction(clip) * Fraction(2) ** bits)
    if not 0 <= bits <= 64 or not 1 <= limit <= _MAX_LIMIT:
        raise ValueError(f"clip={clip} on a grid of 2^-{bits} must be 1 to 2^30 grid units")
    return limit


def clip_to_grid(rows_ND: NDArray[Any], *, limit: int, bits: int) -> NDArray[np.int64]:
    """Round each row to the grid and shrink it to L2 norm <= `limit` grid units.

    Formal guarantee: every returned row is a function of the same input row alone, and its exact
    integer L2 norm is at most `limit`, whatever the input.

    Args:
        rows_ND: (N, D) real numbers.
        limit: L2 bound in grid units, 1 to 2^30.
        bits: The grid is 2^-bits.

    Returns:
        (N, D) int64 in grid units.

    Raises:
        UpdateRejected: A number is NaN or infinite, or the array is not two-dimensional.
    """
    values_ND = _finite(rows_ND)
    norm_N = np.sqrt(np.square(values_ND).sum(axis=1))
    scale_N = np.full(len(norm_N), 2.0**bits)
    np.divide(limit, norm_N, out=scale_N, where=norm_N * 2.0**bits > limit)
    grid_ND: NDArray[np.int64] = np.rint(values_ND * scale_N[:, None]).astype(np.int64)
    while (over := np.flatnonzero(_squares(grid_ND) > limit * limit)).size:
        # Factor < 1 and truncation: every non-zero entry loses at least one, so this ends.
        factor = limit / np.sqrt(_squares(grid_ND[over])) * (1.0 - 2.0**-40)
        grid_ND[over] = np.trunc(grid_ND[over] * factor[:, None]).astype(np.int64)
    return grid_ND


def clipped_sum(
    contributions: Contributions,
    *,
    limit: int,
    bits: int,
    chosen_K: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Return the exact sum of all clipped contributions.

    Formal guarantee: under zero-out of one patient the result moves by an integer vector of L2
    norm <= `limit`. With `chosen_K` (public), the rows are restricted to it *before* clipping.

    Args:
        contributions: One row per patient.
        limit: L2 bound of each row in grid units.
        bits: The grid is 2^-bits.
        chosen_K: Restrict every row to these parameters; None keeps all.

    Returns:
        (D,) or (K,) int64 in grid units.

    Raises:
        UpdateRejected: NaN, infinity, wrong shape, no patient, or more patients than the grid
            can sum.
    """
    num_patients, num_parameters = contributions.num_patients, contributions.num_parameters
    if num_patients < 1 or num_patients * limit >= _MAX_SUM:
        raise UpdateRejected(
            f"{num_patients} patients with contributions of up to {limit} grid units",
            f"their sum must lie between 1 and {_MAX_SUM - 1} grid units",
            "Choose fewer grid bits or a smaller clip, or contribute at least one patient.",
        )
    total = np.zeros(num_parameters if chosen_K is None else chosen_K.size, np.int64)
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
            total += clip_to_grid(kept, limit=limit, bits=bits).sum(axis=0)
        seen += len(rows_ND)
    if seen != num_patients:
        raise UpdateRejected(
            f"{seen} contributions came", f"{num_patients} patients were announced"
        )
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


def _squares(grid_ND: NDArray[np.int64]) -> NDArray[np.int64]:
    squares: NDArray[np.int64] = np.square(grid_ND).sum(axis=1)
    return squares
