"""No privacy: the largest coordinates of the true sum leave as they are.

Formal guarantee: none. Sparsity does not protect patients. A run has to ask for it by name, the
hospital's configuration has to allow it, and every status line says so.

Not here: local training, which makes the one row (training room).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from p2pfed.errors import UpdateRejected
from p2pfed.privacy.accountant import Cost
from p2pfed.privacy.gaussian import top_k
from p2pfed.privacy.mechanism import (
    Grid,
    Outlook,
    Release,
    check_fraction,
    check_shape,
    check_width,
)
from p2pfed.privacy.noise import NoiseSource
from p2pfed.privacy.units import HOSPITAL, Contributions, Unit

__all__ = ["PlainPlan"]

_MAX_GRID = 1 << 53  # every integer up to here is a float64


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainPlan:
    """The mechanism "none"; see the module docstring.

    Attributes:
        num_parameters: Length D of an update.
        bits: The grid is 2^-bits.
        fraction: Share of the coordinates that is sent, in (0, 1].

    Raises:
        ValueError: A value is out of range.
    """

    num_parameters: int
    bits: int
    fraction: Fraction | float = Fraction(1)

    def __post_init__(self) -> None:
        check_shape(self.num_parameters)
        check_fraction(self.fraction)
        if not 0 <= self.bits <= 52:
            raise ValueError(f"bits={self.bits} must be 0 to 52")

    @property
    def name(self) -> str:
        """As runs name it."""
        return "none"

    @property
    def unit(self) -> Unit:
        """Nobody is protected; the hospital makes one contribution."""
        return HOSPITAL

    @property
    def cost(self) -> Cost:
        """Nothing is paid, and nothing is promised."""
        return Cost.nothing()

    def total(self, contributions: Contributions) -> Grid:
        """Sum on the grid, without clipping; see `Mechanism.total`."""
        check_width(contributions, self.num_parameters)
        total_D = np.zeros(self.num_parameters)
        for rows_ND in contributions.chunks():
            if rows_ND.ndim != 2 or rows_ND.shape[1] != self.num_parameters:
                raise UpdateRejected(
                    f"contributions of shape {rows_ND.shape}",
                    f"expected (any, {self.num_parameters})",
                )
            with np.errstate(invalid="ignore", over="ignore"):  # refused below
                total_D += rows_ND.sum(axis=0, dtype=np.float64)
        total_D *= 2.0**self.bits
        if not (np.abs(total_D) < _MAX_GRID).all():  # NaN fails as well
            raise UpdateRejected(
                "an update holds NaN, infinity or a number too large for the grid",
                "it cannot be averaged, so nothing was released",
                "Look at the learning rate and at the data of this hospital.",
            )
        return np.rint(total_D).astype(np.int64)

    def draw(
        self,
        total_D: Grid,
        contributions: Contributions,  # noqa: ARG002 - of the protocol; read once only
        noise: NoiseSource,  # noqa: ARG002 - there is no noise
    ) -> Release:
        """Give the largest coordinates as they are; see `Mechanism.draw`."""
        return top_k(total_D, self.fraction)

    def outlook(self) -> Outlook:
        """Return what to expect of a draw."""
        kept = max(1, -int(-self.num_parameters * Fraction(self.fraction) // 1))
        return Outlook(released=kept, value_noise=0.0)
