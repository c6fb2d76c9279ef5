"""What a mechanism is: the one protocol between the gate and the ways to release an update.

Map: `Mechanism` (a public plan for one round) -> `total` (validate, clip, sum; spends nothing) ->
`draw` (the randomised release) -> `Release`; `Outlook` says beforehand what to expect of it.

Invariant: a release is a function of the plan, the clipped contributions and fresh random words,
and nothing else of the contributions leaves `draw`. `draw` must run only after `cost` is durably
debited (`gate`).

Not here: the mechanisms (`gaussian`, `plain`, `svt`, `textbook`), how one is chosen (`mechanisms`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from p2pfed.errors import UpdateRejected
from p2pfed.privacy.accountant import Cost
from p2pfed.privacy.geometric import MAX_SCALE
from p2pfed.privacy.noise import NoiseSource
from p2pfed.privacy.units import Contributions, Unit

__all__ = [
    "Grid",
    "Mechanism",
    "Outlook",
    "Release",
    "add_noise",
    "check_fraction",
    "check_scales",
    "check_shape",
    "check_width",
]

Grid = NDArray[np.int32] | NDArray[np.int64]
"""Numbers in grid units, in as few bytes as hold them."""

_CHUNK = 1 << 15


@dataclass(frozen=True, slots=True, eq=False)
class Release:
    """What may leave: noisy sums on chosen coordinates, in grid units.

    Attributes:
        indices: (K,) int32 or int64, strictly increasing.
        values: (K,) int32, or int64 where a noise so large was drawn.
    """

    indices: Grid
    values: Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What a plan will do, known before any patient is looked at.

    Attributes:
        released: Coordinates released, at most.
        value_noise: Standard deviation of the noise on a released sum, as a share of the clip C.
        query_noise: The same for one test of a block (threshold and query together); 0 without.
    """

    released: int
    value_noise: float
    query_noise: float = 0.0


class Mechanism(Protocol):
    """One round's plan, all of it public."""

    @property
    def name(self) -> str:
        """As runs name it."""
        ...

    @property
    def unit(self) -> Unit:
        """Whom it protects, and from which neighbouring data sets."""
        ...

    @property
    def num_parameters(self) -> int:
        """Length D of an update."""
        ...

    @property
    def bits(self) -> int:
        """The grid is 2^-bits."""
        ...

    @property
    def cost(self) -> Cost:
        """What one `draw` costs."""
        ...

    def total(self, contributions: Contributions) -> Grid:
        """Validate the contributions and return their exact clipped sum; spends nothing.

        Args:
            contributions: One row per patient, group or hospital.

        Returns:
            (D,) in grid units; private, must not leave.

        Raises:
            UpdateRejected: NaN, infinity, wrong shape, no row, or too large for the grid.
        """
        ...

    def draw(self, total_D: Grid, contributions: Contributions, noise: NoiseSource) -> Release:
        """Draw the release; call it only when its cost is durably debited.

        Args:
            total_D: (D,) what `total` returned.
            contributions: The same rows, for mechanisms that read them a second time.
            noise: Fresh noise.

        Raises:
            UpdateRejected: The second reading holds NaN, infinity or has the wrong shape.
        """
        ...

    def outlook(self) -> Outlook:
        """Return what to expect of a draw."""
        ...


def add_noise(values_K: Grid, draw: Callable[[int], NDArray[np.int64]]) -> Grid:
    """Return the values with fresh noise on each, in as few bytes as the sums need.

    `values_K` may be changed in place: after this only the noisy numbers are left.

    Args:
        values_K: (K,) exact numbers.
        draw: Count -> so many fresh numbers.
    """
    for start in range(0, values_K.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        noisy = values_K[part] + draw(values_K[part].size)
        info = np.iinfo(values_K.dtype)
        if noisy.min() < info.min or noisy.max() > info.max:  # rare, and never cut off
            values_K = values_K.astype(np.int64)
        values_K[part] = noisy
    return values_K


def check_shape(num_parameters: int) -> None:
    """Refuse a plan for an update without parameters.

    Raises:
        ValueError: `num_parameters` is not in 1..2^31 - 1.
    """
    if not 1 <= num_parameters < 1 << 31:
        raise ValueError(f"num_parameters={num_parameters} must be 1 to 2^31 - 1")


def check_fraction(fraction: Fraction | float) -> None:
    """Refuse a share that is none.

    Raises:
        ValueError: `fraction` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} must be in (0, 1]")


def check_scales(*scales: Fraction) -> None:
    """Refuse a plan whose noise could not be drawn: a draw that fails has been paid for.

    Raises:
        ValueError: A scale is above 2^48 grid units.
    """
    if max(scales) > MAX_SCALE:
        raise ValueError("the budget is too small for so fine a grid: a noise scale is above 2^48")


def check_width(contributions: Contributions, num_parameters: int) -> None:
    """Refuse contributions to another model.

    Raises:
        UpdateRejected: They have another number of parameters.
    """
    if contributions.num_parameters != num_parameters:
        raise UpdateRejected(
            f"an update of {contributions.num_parameters} parameters",
            f"the model has {num_parameters}",
        )
