"""The textbook sparse vector technique: single coordinates, pure epsilon; kept for comparison.

How it works. Every contribution is cut to a box, |x_i| <= B. A threshold T = threshold + Geo(l1) is
drawn once; coordinate i is accepted if |s_i| + Geo(l2) >= T; of the accepted, `cutoff` random ones
are released as s_i plus discrete Laplace noise of scale l3. One pass, and never a refill.

Formal guarantee: between neighbours (`units.Unit`) every |s_i| moves by at most M = `unit.moves` B.
With l1 = M / e1, l2 = 2 c M / e2 and l3 = c M / e3 a release is (e1 + e2 + e3)-differentially
private. Proof. Given T the acceptances are independent, so a random c-subset of the accepted is
what going through the coordinates in random order and stopping at the c-th gives; fix the order.
Replace the threshold noise r by r + M: p(r) = exp(M/l1) p(r + M); a refusal only gets more likely;
each of at most c acceptances costs exp(2M/l2). So selection is (e1 + e2)-private (Lyu, Su, Li, VLDB
2017, Algorithm 7, with one-sided noise: Liu et al., arXiv:2407.20068). Given the coordinates, their
sums move by at most c M in L1 and get Laplace noise of that scale: e3 (Dwork, Roth 2014, Theorem
3.6). QED

How little it is worth: the noise on a released sum is c M / e3, so with n patients it stays below
the signal n B only for c < n e3. `svt` is what runs should use.

Not here: the samplers (`noise`), composition over rounds (`accountant`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import numpy as np
from numpy.typing import NDArray

from p2pfed.privacy.accountant import NANO, Cost
from p2pfed.privacy.clipping import Box, clipped_sum, grid_limit
from p2pfed.privacy.mechanism import (
    Grid,
    Outlook,
    Release,
    add_noise,
    check_scales,
    check_shape,
    check_width,
)
from p2pfed.privacy.noise import NoiseSource, Trials
from p2pfed.privacy.units import PATIENT, Contributions, Unit

__all__ = ["TextbookPlan"]

_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class TextbookPlan:
    """Everything about one release, all of it public.

    Attributes:
        num_parameters: Length D of an update.
        clip: Bound B of one contribution's every number, in the update's own units.
        bits: The grid is 2^-bits.
        epsilon: Pure epsilon paid for one release, at least 1e-9.
        cutoff: c, most coordinates that are released.
        select_share: Share of epsilon that pays for the choice, in (0, 1).
        unit: Whom it protects.

    Raises:
        ValueError: A value is out of range.
    """

    num_parameters: int
    clip: Fraction | float
    bits: int
    epsilon: Fraction
    cutoff: int
    select_share: Fraction = Fraction(1, 2)
    unit: Unit = PATIENT

    def __post_init__(self) -> None:
        check_shape(self.num_parameters)
        grid_limit(self.clip, self.bits)
        if self.epsilon < Fraction(1, NANO):
            raise ValueError(f"epsilon={self.epsilon} must be at least 1e-9")
        if not 1 <= self.cutoff <= self.num_parameters:
            raise ValueError(f"cutoff={self.cutoff} must be 1 to num_parameters")
        if not 0 < self.select_share < 1:
            raise ValueError(f"select_share={self.select_share} must be in (0, 1)")
        check_scales(self.scales[0], self.scales[2])  # that of the queries is for trials only

    @property
    def name(self) -> str:
        """As runs name it."""
        return "svt-textbook"

    @property
    def limit(self) -> int:
        """B in grid units."""
        return grid_limit(self.clip, self.bits)

    @property
    def cost(self) -> Cost:
        """What one draw costs."""
        return Cost.pure(self.epsilon)

    @property
    def scales(self) -> tuple[Fraction, Fraction, Fraction]:
        """(l1, l2, l3) in grid units: the noise of the threshold, the queries and the values."""
        moved = self.unit.moves * self.limit
        ratio = Fraction((2 * self.cutoff) ** (2 / 3)).limit_denominator(
            1000
        )  # e2 : e1, any is valid
        select = self.epsilon * self.select_share
        e1 = select / (1 + ratio)
        values = self.epsilon - select
        return moved / e1, 2 * self.cutoff * moved / (select - e1), self.cutoff * moved / values

    @property
    def threshold(self) -> int:
        """Public: with its noise l2 ln(D / c) on average, so a zero passes with about c / D."""
        l1, l2, _ = self.scales
        share = Fraction(math.log(self.num_parameters / self.cutoff))
        return max(0, math.ceil(l2 * share - l1))

    def total(self, contributions: Contributions) -> Grid:
        """Validate, clip and sum; see `Mechanism.total`."""
        check_width(contributions, self.num_parameters)
        return clipped_sum(contributions, bound=Box(self.limit), bits=self.bits)

    def draw(
        self,
        total_D: Grid,
        contributions: Contributions,
        noise: NoiseSource,
    ) -> Release:
        """Choose coordinates and noise their sums; see `Mechanism.draw`."""
        largest = contributions.num_patients * self.limit  # public: no sum is beyond
        chosen_K = self.select(total_D, noise, largest=largest)
        draw = partial(noise.laplace, scale=self.scales[2])
        return Release(chosen_K, add_noise(total_D[chosen_K], draw))

    def select(
        self, total_D: Grid, noise: NoiseSource, *, largest: int | None = None
    ) -> NDArray[np.int32]:
        """Choose at most `cutoff` coordinates: (e1 + e2)-private.

        Args:
            total_D: (D,) what `total` returned.
            noise: Fresh noise.
            largest: No |s_i| is beyond it; where it is not known the sums are searched.

        Returns:
            (K,) increasing.
        """
        l1, l2, _ = self.scales
        threshold = self.threshold + int(noise.geometric(1, l1)[0])
        found = noise.successes(_trials(total_D, threshold, l2, largest))
        if found.size <= self.cutoff:
            return found
        refused = noise.subset(found.size, found.size - self.cutoff)
        kept = 0
        for start in range(0, found.size, _CHUNK):  # in place: memory is promised
            part = found[start : start + _CHUNK]
            part = part[~refused[start : start + _CHUNK]]
            found[kept : kept + part.size] = part
            kept += part.size
        return found[:kept]

    def outlook(self) -> Outlook:
        """Return what to expect of a draw."""
        l1, l2, l3 = map(float, self.scales)
        return Outlook(
            released=self.cutoff,
            value_noise=math.sqrt(2) * l3 / self.limit,
            query_noise=math.hypot(l1, l2) / self.limit,
        )


def _trials(total_D: Grid, threshold: int, scale: Fraction, largest: int | None) -> Trials:
    """Coordinate i is accepted with probability exp(-max(0, threshold - |s_i|) / scale).

    Sums so large that their probability is more than 1/256 above that of zero are told apart.
    """
    inverse = float(1 / scale)
    zeros = math.exp(-min(threshold * inverse, 600.0))
    small = min(threshold, math.floor(scale * Fraction(math.log1p(1 / (256 * zeros)))))
    outside = [np.empty(0, np.intp)]
    everywhere = total_D.size if largest is None or largest > small else 0
    for start in range(0, everywhere, _CHUNK):
        part = total_D[start : start + _CHUNK]
        if part.max() > small or part.min() < -small:
            outside.append(np.flatnonzero((part > small) | (part < -small)) + start)

    def gaps(asked: NDArray[np.intp]) -> NDArray[np.float64]:
        gap_K: NDArray[np.float64] = threshold - np.abs(total_D[asked].astype(np.float64))
        return np.maximum(gap_K, 0.0, out=gap_K)

    return Trials(
        count=total_D.size,
        near=lambda asked: gaps(asked) * inverse,
        exact=lambda i: max(0, threshold - abs(int(total_D[i]))) / scale,
        least=(threshold - small) * inverse,
        most=threshold * inverse,
        outside=np.concatenate(outside),
    )
