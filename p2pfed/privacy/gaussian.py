"""Discrete Gaussian noise on every coordinate: the accuracy reference.

Formal guarantee: between neighbours (`units.Unit`) the sum moves by at most `sensitivity` =
`unit.moves` x clip in L2, every coordinate gets independent discrete Gaussian noise of variance
parameter sensitivity^2 / (2 rho), so a release is rho-zCDP (Canonne, Kamath, Steinke 2020,
arXiv:2004.00010, Theorem 14). Keeping the largest *noisy* values is post-processing: it costs
nothing and saves traffic.

Not here: the sampler (`noise`), the choice of rho (`accountant`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import numpy as np

from p2pfed.privacy.accountant import NANO, Cost
from p2pfed.privacy.clipping import Ball, clipped_sum, grid_limit
from p2pfed.privacy.mechanism import (
    Grid,
    Outlook,
    Release,
    add_noise,
    check_fraction,
    check_shape,
    check_width,
)
from p2pfed.privacy.noise import NoiseSource
from p2pfed.privacy.units import PATIENT, Contributions, Unit

__all__ = ["GaussianPlan", "top_k"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GaussianPlan:
    """Discrete Gaussian noise on every coordinate; see the module docstring.

    Attributes:
        num_parameters: Length D of an update.
        clip: L2 bound of one contribution, in the update's own units.
        bits: The grid is 2^-bits.
        rho: zCDP paid, at least 1e-9.
        fraction: Share of the noisy values that is sent, in (0, 1].
        unit: Whom it protects.

    Raises:
        ValueError: A value is out of range.
    """

    num_parameters: int
    clip: Fraction | float
    bits: int
    rho: Fraction
    fraction: Fraction | float = Fraction(1)
    unit: Unit = PATIENT

    def __post_init__(self) -> None:
        check_shape(self.num_parameters)
        check_fraction(self.fraction)
        grid_limit(self.clip, self.bits)
        if self.rho < Fraction(1, NANO):  # keeps the noise scale in range
            raise ValueError(f"rho={self.rho} must be at least 1e-9")

    @property
    def name(self) -> str:
        """As runs name it."""
        return "gaussian"

    @property
    def limit(self) -> int:
        """L2 bound of one contribution in grid units."""
        return grid_limit(self.clip, self.bits)

    @property
    def sensitivity(self) -> int:
        """How far a neighbour moves the sum, L2, in grid units."""
        return self.unit.moves * self.limit

    @property
    def sigma2(self) -> Fraction:
        """The noise's variance parameter in squared grid units."""
        return Fraction(self.sensitivity**2) / (2 * self.rho)

    @property
    def cost(self) -> Cost:
        """What one draw costs."""
        return Cost.zcdp(self.rho)

    def total(self, contributions: Contributions) -> Grid:
        """Validate, clip and sum; see `Mechanism.total`."""
        check_width(contributions, self.num_parameters)
        return clipped_sum(contributions, bound=Ball(self.limit), bits=self.bits)

    def draw(
        self,
        total_D: Grid,
        contributions: Contributions,  # noqa: ARG002 - of the protocol; read once only
        noise: NoiseSource,
    ) -> Release:
        """Add the noise; see `Mechanism.draw`."""
        noisy = add_noise(total_D, partial(noise.gaussian, sigma2=self.sigma2))
        return top_k(noisy, self.fraction)

    def outlook(self) -> Outlook:
        """Return what to expect of a draw."""
        kept = math.ceil(Fraction(self.fraction) * self.num_parameters)
        return Outlook(released=kept, value_noise=math.sqrt(self.sigma2) / self.limit)


def top_k(update_D: Grid, fraction: Fraction | float) -> Release:
    """Keep the largest values by magnitude, at least one.

    Private only if `update_D` already is (post-processing); applied to a true update it protects
    nobody.

    Args:
        update_D: (D,) integers.
        fraction: Share to keep, in (0, 1].
    """
    keep = math.ceil(Fraction(fraction) * update_D.size)
    if keep == update_D.size:
        return Release(np.arange(keep, dtype=np.int32), update_D)
    largest = np.argpartition(-np.abs(update_D), keep - 1)[:keep].astype(np.int32)
    indices = np.sort(largest)
    return Release(indices, update_D[indices])
