r"""Sparse vector technique over blocks of coordinates, in two schedules, values clipped again.

Map: `SvtPlan` (everything public) -> `select` (which blocks) -> `draw` (their noisy sums) ->
`Release`; `next_threshold` steers the public threshold; `schedules` draws.

How it works. The coordinates form blocks of `block_size`, looked at in a public order. An
AboveThreshold draws a threshold T = threshold + Geo(l1), goes through blocks, and accepts the first
with floor(norm of the block's sum) + Geo(l2) >= T; then it ends. Geo(l) is one-sided geometric,
P(Geo(l) >= k) = exp(-k / l). *Segmented*: the order is cut into segments of `segment_blocks`, each
with one AboveThreshold of its own, so it accepts at most one block. *Sequential*: one pass; after
each acceptance a new AboveThreshold goes on, until `cutoff` are accepted; every contribution's
block is clipped to g. On the released support A each contribution is clipped again, from its raw
values, to C_A = C sqrt(|A| / D), and the sum gets discrete Gaussian noise: it falls with the share.

Formal guarantee: between neighbours (`units.Unit`) a release is (rho_select + rho_values)-zCDP, for
every threshold >= 0, order and number of contributions, all of which may depend on earlier
releases. Notation: C = `limit` in grid units, m = `unit.moves`; x = the difference of the two sums,
an integer vector with ||x|| <= S = m C and, sequential, ||x_B|| <= m g; queries q_B =
floor(||s_B||), delta_B = q_B - q'_B, so |delta_B| <= ||x_B|| + f with f = 1, and f = 0 for blocks
of one coordinate, where |s_i| is an integer; a = 1/l1 + 2/l2.

Lemma 1 (one AboveThreshold). For a fixed neighbouring pair let D+ = max(0, max delta_B), D- =
max(0, max -delta_B), W = D+ + D- over its blocks. The log-ratio L of the two outcome laws satisfies
max L - min L <= W a.
Proof. P(accept k) = sum_r p(r) S(t+r-q_k) prod_{i<k} F(t+r-q_i), with p the law of Geo(l1),
S(u) = P(Geo(l2) >= u) = min(1, exp(-u/l2)), F = 1 - S. Replace r by r + D-, an integer:
p(r) = exp(D-/l1) p(r + D-); F is non-decreasing and each of its arguments grows by
D- + delta_i >= 0; S(u) <= exp(v/l2) S(u + v) with v = D- + delta_k >= 0. Hence L(k) <= D-/l1 +
(D- + delta_k)/l2 and L(none) <= D-/l1; exchanging the data sets, -L(k) <= D+/l1 + (D+ -
delta_k)/l2 and -L(none) <= D+/l1. As delta_k - delta_k' <= W, any two outcomes differ by at most
W/l1 + 2W/l2. QED

Lemma 2 (bounded range to zCDP; Cesar, Rogers, ALT 2021). If L ranges over an interval of length
h, then D_alpha <= alpha h^2 / 8. Proof. K(u) = ln E_Q exp(u L) has K(0) = K(1) = 0 and K'' <=
h^2/4 (the variance of a variable with range h, Popoviciu), so K(u) - u(u-1) h^2/8 is concave and
zero at 0 and 1, hence <= 0 for u = alpha > 1; D_alpha = K(alpha) / (alpha - 1). QED

Theorem, segmented. D+ and D- of a segment are reached at two different blocks, so with real norms
W_j^2 <= e sum_{B in j} ||x_B||^2 for e = min(2, segment_blocks), and sum_j W_j^2 <= e S^2. Flooring
adds less than f to each of at most e extremes, so by Minkowski sqrt(sum_j W_j^2) <= R = sqrt(e) S +
f e sqrt(segments). For a fixed pair the segments are independent, so selection is (a^2 R^2 /
8)-zCDP: it does not depend on how many segments accept. Theorem, sequential. Each of at most
`cutoff` AboveThresholds has W <= min(2 (m g + f), sqrt(2) S + 2 f), by the block clip and, as
above, by two different blocks. Given what was accepted before, the next one runs on fixed blocks:
zCDP composes adaptively, selection is (cutoff a^2 W^2 / 8)-zCDP. Values. Given A, the sum has L2
sensitivity m C_A and costs (m C_A)^2 / (2 sigma2) = rho_values (Canonne et al. 2020, Theorem 14).
QED

The cheaper schedule is taken where a run says "auto": sequential when cutoff W^2 < R^2, which with
the default block clip is below an eighth of the blocks.

Sources: Dwork, Roth 2014, section 3.6; Lyu, Su, Li, "Understanding the Sparse Vector Technique
for Differential Privacy", VLDB 2017 (noised queries, noised threshold, refresh); one-sided noise:
Liu et al., arXiv:2407.20068.

Not here: drawing the blocks (`schedules`), the pure-epsilon form over single coordinates
(`textbook`), dense noise (`gaussian`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Final, Literal, Self

import numpy as np
from numpy.typing import NDArray

from p2pfed.privacy.accountant import NANO, Cost
from p2pfed.privacy.clipping import Ball, Blocks, Bound, clipped_sum, grid_limit
from p2pfed.privacy.mechanism import (
    Grid,
    Outlook,
    Release,
    add_noise,
    check_scales,
    check_shape,
    check_width,
)
from p2pfed.privacy.noise import NoiseSource
from p2pfed.privacy.schedules import candidates, public_positions, segmented, sequential
from p2pfed.privacy.units import PATIENT, Contributions, Unit

__all__ = ["SCHEDULES", "Schedule", "SvtPlan", "next_threshold", "select"]

Schedule = Literal["auto", "segmented", "sequential"]
SCHEDULES: Final[tuple[Schedule, ...]] = ("auto", "segmented", "sequential")

# Variance-optimal split of a = 1/l1 + 2/l2 (Lyu et al., section 4.2): l1 = (1 + 2^(2/3)) / a.
_THRESHOLD_SHARE = Fraction(1000, 2587)

_ACCEPTING = Fraction(97, 100)  # measured: share of accepting segments that trains best
_PASSED = Fraction(9, 10)  # measured: where in the pass the cut-off should be reached
_HIGHEST = (1 << 60) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SvtPlan:
    """Everything about one release, all of it public.

    Attributes:
        num_parameters: Length D of an update.
        clip: L2 bound of one contribution, in the update's own units.
        bits: The grid is 2^-bits.
        rho_select: zCDP paid for choosing blocks, at least 1e-9.
        rho_values: zCDP paid for their values, at least 1e-9.
        shuffle_seed: Public seed of the order, new in every round, e.g. a hash of (run, round).
        block_size: Coordinates per block.
        segment_blocks: About one block in so many is released.
        schedule: "segmented", "sequential", or "auto" for the cheaper one.
        block_reach: Sequential: a contribution's block is clipped to this many times what it has
            if its length C is spread evenly.
        threshold: Grid units, >= 0; may change from round to round by public facts
            (`next_threshold`).
        unit: Whom it protects.

    Raises:
        ValueError: A value is out of range.
    """

    num_parameters: int
    clip: Fraction | float
    bits: int
    rho_select: Fraction
    rho_values: Fraction
    shuffle_seed: bytes
    block_size: int = 1
    segment_blocks: int = 2
    schedule: Schedule = "auto"
    block_reach: Fraction = Fraction(2)
    threshold: int = 0
    unit: Unit = PATIENT

    def __post_init__(self) -> None:
        check_shape(self.num_parameters)
        grid_limit(self.clip, self.bits)
        for name in ("block_size", "segment_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("rho_select", "rho_values"):
            if getattr(self, name) < Fraction(1, NANO):
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1e-9")
        if self.schedule not in SCHEDULES or self.block_reach <= 0:
            raise ValueError(f"schedule={self.schedule!r}, block_reach={self.block_reach}")
        if not 0 <= self.threshold <= _HIGHEST:
            raise ValueError(f"threshold={self.threshold} must be 0 to 2^60 - 1 grid units")
        check_scales(*self.scales)

    @classmethod
    def for_budget(
        cls,
        rho: Fraction,
        *,
        num_parameters: int,
        clip: Fraction | float,
        bits: int,
        shuffle_seed: bytes,
        block_size: int = 1,
        segment_blocks: int = 2,
        select_share: Fraction = Fraction(1, 5),
        schedule: Schedule = "auto",
        block_reach: Fraction = Fraction(2),
        threshold: int | None = None,
        unit: Unit = PATIENT,
    ) -> Self:
        """Return a plan that spends at most `rho`, `select_share` of it on the choice of blocks.

        Without a threshold it takes a fair start for the first round: half of l2, or, sequential,
        what lets about twice `cutoff` blocks of zeros pass.
        """
        plan = cls(
            num_parameters=num_parameters,
            clip=clip,
            bits=bits,
            rho_select=rho * select_share,
            rho_values=rho * (1 - select_share),
            shuffle_seed=shuffle_seed,
            block_size=block_size,
            segment_blocks=segment_blocks,
            schedule=schedule,
            block_reach=block_reach,
            threshold=threshold or 0,
            unit=unit,
        )
        if threshold is not None:
            return plan
        start = 0.5
        if plan.is_sequential:
            start = max(0.0, 0.8 * math.log(plan.num_blocks / plan.cutoff))
        return plan.at_threshold(math.floor(plan.scales[1] * Fraction(start)))

    def at_threshold(self, threshold: int) -> Self:
        """Return the same plan with another public threshold."""
        return replace(self, threshold=threshold)

    @property
    def name(self) -> str:
        """As runs name it."""
        return "svt"

    @property
    def limit(self) -> int:
        """C: L2 bound of one contribution in grid units."""
        return grid_limit(self.clip, self.bits)

    @property
    def block_limit(self) -> int:
        """g: L2 bound of one contribution's block in grid units, with the sequential schedule."""
        even = _sqrt(Fraction(self.limit**2, self.num_blocks), up=False)
        return min(self.limit, max(1, math.floor(self.block_reach * even)))

    @property
    def num_blocks(self) -> int:
        """Number of blocks; the last may be short."""
        return -(-self.num_parameters // self.block_size)

    @property
    def num_segments(self) -> int:
        """Number of segments; the last may be short."""
        return -(-self.num_blocks // self.segment_blocks)

    @property
    def cutoff(self) -> int:
        """Blocks after which the sequential schedule stops: as many as there are segments."""
        return self.num_segments

    @property
    def cost(self) -> Cost:
        """What one draw costs."""
        return Cost.zcdp(self.rho_select + self.rho_values)

    @property
    def is_sequential(self) -> bool:
        """Whether the sequential schedule is used; "auto" takes the cheaper one."""
        if self.schedule == "auto":
            return self._reach_sequential < self._reach_segmented
        return self.schedule == "sequential"

    @property
    def scales(self) -> tuple[Fraction, Fraction]:
        """(l1, l2) in grid units: the noise of the threshold and of the queries.

        Solves a^2 R^2 / 8 <= rho_select (the theorems above) with every rounding towards more
        noise.
        """
        reach = self._reach_sequential if self.is_sequential else self._reach_segmented
        a = _sqrt(8 * self.rho_select / reach**2, up=False)
        return 1 / (_THRESHOLD_SHARE * a), 2 / ((1 - _THRESHOLD_SHARE) * a)

    @property
    def _floors(self) -> int:
        return 1 if self.block_size > 1 else 0  # f: a norm of one integer needs no flooring

    @property
    def _reach_segmented(self) -> Fraction:
        """R of the theorem."""
        extremes, moved = min(2, self.segment_blocks), self.unit.moves * self.limit
        flooring = self._floors * extremes * _sqrt(Fraction(self.num_segments), up=True)
        return _sqrt(Fraction(extremes * moved**2), up=True) + flooring

    @property
    def _reach_sequential(self) -> Fraction:
        """sqrt(cutoff) W of the theorem."""
        moves = self.unit.moves
        by_block = Fraction(2 * (moves * self.block_limit + self._floors))
        by_length = _sqrt(Fraction(2 * (moves * self.limit) ** 2), up=True) + 2 * self._floors
        return _sqrt(Fraction(self.cutoff), up=True) * min(by_block, by_length)

    def values_limit(self, released: int) -> int:
        """C_A: L2 bound, in grid units, of a contribution on `released` coordinates."""
        return max(1, math.isqrt(self.limit**2 * released // self.num_parameters))

    def sigma2(self, released: int) -> Fraction:
        """The values' variance parameter, in squared grid units, on `released` coordinates."""
        return Fraction((self.unit.moves * self.values_limit(released)) ** 2) / (
            2 * self.rho_values
        )

    def total(self, contributions: Contributions) -> Grid:
        """Validate, clip and sum; see `Mechanism.total`."""
        check_width(contributions, self.num_parameters)
        bound: Bound = Ball(self.limit)
        if self.is_sequential:
            bound = Blocks(self.limit, self.block_size, self.block_limit)
        return clipped_sum(contributions, bound=bound, bits=self.bits)

    def draw(self, total_D: Grid, contributions: Contributions, noise: NoiseSource) -> Release:
        """Choose blocks, then sum and noise their values; see `Mechanism.draw`."""
        return self.values(contributions, select(self, total_D, noise), noise)

    def values(
        self, contributions: Contributions, chosen_K: NDArray[np.int32], noise: NoiseSource
    ) -> Release:
        """Sum the contributions on public coordinates, clipped again, with noise: rho_values-zCDP.

        Raises:
            UpdateRejected: NaN, infinity or wrong shape in this reading.
        """
        bound = Ball(self.values_limit(chosen_K.size))
        total_K = clipped_sum(contributions, bound=bound, bits=self.bits, chosen_K=chosen_K)
        sigma2 = self.sigma2(chosen_K.size)
        return Release(chosen_K, add_noise(total_K, partial(noise.gaussian, sigma2=sigma2)))

    def outlook(self) -> Outlook:
        """Return what to expect of a draw."""
        most = min(self.num_parameters, self.cutoff * self.block_size)
        variance = sum(float(scale) ** 2 for scale in self.scales)  # one-sided: scale^2 each
        return Outlook(
            released=most,
            value_noise=math.sqrt(self.sigma2(most)) / self.limit,
            query_noise=math.sqrt(variance) / self.limit,
        )


def select(plan: SvtPlan, total_D: Grid, noise: NoiseSource) -> NDArray[np.int32]:
    """Choose the coordinates to release: rho_select-zCDP (module docstring).

    Args:
        plan: The public plan.
        total_D: (D,) what `plan.total` returned.
        noise: Fresh noise.

    Returns:
        (K,) increasing coordinates of whole blocks.
    """
    l1, l2 = plan.scales
    found = candidates(
        total_D, block_size=plan.block_size, threshold=plan.threshold, scale=l2, noise=noise
    )
    position_C = public_positions(plan.shuffle_seed, found.blocks, plan.num_blocks)
    if plan.is_sequential:
        blocks = sequential(found, position_C=position_C, cutoff=plan.cutoff, scale=l1, noise=noise)
    else:
        blocks = segmented(
            found,
            position_C=position_C,
            segment_blocks=plan.segment_blocks,
            scale=l1,
            noise=noise,
        )
    if plan.block_size == 1:
        return blocks
    del found, position_C  # before the coordinates, of which there are many more
    within = np.arange(plan.block_size, dtype=np.int32)
    indices = np.add.outer(blocks * np.int32(plan.block_size), within).ravel()
    kept: NDArray[np.int32] = indices[: np.searchsorted(indices, plan.num_parameters)]
    return kept


def next_threshold(plan: SvtPlan, release: Release) -> int:
    """Return the next round's threshold from what this round made public: costs nothing.

    Segmented: aims at 97 % accepting segments, up slowly while more accept, down quickly when fewer
    do. Sequential: aims at reaching the cut-off after nine tenths of the blocks.
    """
    blocks = np.unique(release.indices // plan.block_size)
    l2 = plan.scales[1]
    if plan.is_sequential:
        seen = plan.num_blocks
        if blocks.size >= plan.cutoff:
            places = public_positions(plan.shuffle_seed, blocks, plan.num_blocks)
            seen = int(places.max()) + 1
        wanted = plan.cutoff / (float(_PASSED) * plan.num_blocks)
        step = l2 * Fraction(0.7 * math.log(max(float(blocks.size), 0.3) / seen / wanted))
    else:
        accepted = Fraction(int(blocks.size), plan.num_segments)
        step = Fraction(3, 2) * l2 * (accepted - _ACCEPTING) / _ACCEPTING
    return min(max(0, plan.threshold + round(step)), _HIGHEST)


def _sqrt(x: Fraction, *, up: bool) -> Fraction:
    """Return the square root of `x` to 128 binary places, rounded up or down."""
    root = math.isqrt(math.floor(x * (1 << 256)))
    return Fraction(root + up, 1 << 128)
