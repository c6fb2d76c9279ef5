r"""Sparse vector technique over blocks of coordinates, segmented, values re-clipped.

Map: `SvtPlan` (everything public) -> `select` (which blocks) -> `release_values` (their noisy
sums on the chosen support) -> `Release`; `next_threshold` steers the public threshold.

How it works. The coordinates form blocks of `block_size`; a public shuffle deals the blocks into
segments of `segment_blocks`. Each segment runs one AboveThreshold of its own: draw a fresh
threshold T = threshold + Geo(l1), go through the blocks, and accept the first with
floor(norm of the block's sum) + Geo(l2) >= T, then stop. A segment accepts at most one block.
Geo(l) is one-sided geometric, P(Geo(l) >= k) = exp(-k / l). On the released support A each
patient's raw update is clipped again, to C_A = C sqrt(|A| / D), and summed with discrete
Gaussian noise: the noise falls with the released share.

Formal guarantee: for zero-out of one patient (`units.NEIGHBOURS`) a release is
(rho_select + rho_values)-zCDP, for every threshold >= 0, shuffle and number of patients, all of
which may depend on earlier releases. Notation: C = `limit` in grid units, x = the patient's
clipped integer contribution, ||x|| <= C; queries q_B = floor(||s_B||), delta_B = q_B - q'_B;
a = 1/l1 + 2/l2.

Lemma 1 (one segment). For a fixed neighbouring pair let D+ = max(0, max delta_B), D- = max(0,
max -delta_B), W = D+ + D-. The log-ratio L of the two outcome laws satisfies max L - min L <= W a.
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

Theorem (all segments). D+ and D- of a segment are reached at two different blocks, so with real
norms W_j^2 <= m sum_{B in j} ||x_B||^2 for m = min(2, segment_blocks), and sum_j W_j^2 <= m C^2.
Flooring adds less than 1 to each of at most m integer extremes (nothing for block_size 1, where
|s_i| is an integer), so by Minkowski sqrt(sum_j W_j^2) <= R = sqrt(m) C + m sqrt(segments). For
a fixed pair the segments are independent, so selection is (a^2 R^2 / 8)-zCDP: it does not
depend on how many segments accept. Given A, the values have L2 sensitivity C_A and cost C_A^2 /
(2 sigma2) = rho_values (Canonne et al. 2020, Theorem 14); zCDP composes adaptively. QED

Sources: Dwork, Roth 2014, section 3.6; Lyu, Su, Li, "Understanding the Sparse Vector Technique
for Differential Privacy", VLDB 2017 (noised queries, noised threshold, refresh); one-sided noise:
Liu et al., arXiv:2407.20068.

Shape suffixes: D = parameters, B = blocks, S = segments, K = released coordinates.

Not here: textbook SVT over single coordinates in pure epsilon (it drowns above a hundred
coordinates), the sequential schedule with a cut-off, dense noise (`mechanisms`).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from p2pfed.privacy.accountant import NANO, Cost, rho_nano_cost
from p2pfed.privacy.noise import (
    RandomWords,
    bernoulli_exp,
    discrete_gaussian,
    one_sided_geometric,
)
from p2pfed.privacy.units import Contributions, clipped_sum, grid_limit

__all__ = ["Release", "SvtPlan", "next_threshold", "release_values", "select"]

# Variance-optimal split of a = 1/l1 + 2/l2 (Lyu et al., section 4.2): l1 = (1 + 2^(2/3)) / a.
_THRESHOLD_SHARE = Fraction(1000, 2587)

_TARGET = Fraction(97, 100)  # measured: share of accepting segments that trains best


@dataclass(frozen=True, slots=True, eq=False)
class Release:
    """What may leave: noisy sums on chosen coordinates, in grid units.

    Attributes:
        indices: (K,) int64, strictly increasing.
        values: (K,) int64.
    """

    indices: NDArray[np.int64]
    values: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SvtPlan:
    """Everything about one release, all of it public.

    Attributes:
        num_parameters: Length D of an update.
        clip: L2 bound of one patient's contribution, in the update's own units.
        bits: The grid is 2^-bits.
        rho_select: zCDP paid for choosing blocks, at least 1e-9.
        rho_values: zCDP paid for their values, at least 1e-9.
        shuffle_seed: Public seed of the shuffle, new in every round, e.g. a hash of (run, round).
        block_size: Coordinates per block.
        segment_blocks: Blocks per segment; about one in so many is released.
        threshold: Grid units, >= 0; may change from round to round by public facts
            (`next_threshold`).

    Raises:
        ValueError: A value is out of range.
    """

    mechanism: ClassVar[Literal["svt"]] = "svt"

    num_parameters: int
    clip: Fraction | float
    bits: int
    rho_select: Fraction
    rho_values: Fraction
    shuffle_seed: bytes
    block_size: int = 1
    segment_blocks: int = 2
    threshold: int = 0

    def __post_init__(self) -> None:
        grid_limit(self.clip, self.bits)
        for name in ("num_parameters", "block_size", "segment_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("rho_select", "rho_values"):
            if getattr(self, name) < Fraction(1, NANO):  # keeps all noise scales in range
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1e-9")
        if not 0 <= self.threshold < 1 << 60:
            raise ValueError(f"threshold={self.threshold} must be 0 to 2^60 grid units")

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
        threshold: int | None = None,
    ) -> Self:
        """Return a plan that spends at most `rho`, `select_share` of it on the choice of blocks.

        Without a threshold it takes half of l2, a fair start for the first round.
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
            threshold=threshold or 0,
        )
        return plan if threshold is not None else plan.at_threshold(math.floor(plan.scales[1] / 2))

    def at_threshold(self, threshold: int) -> Self:
        """Return the same plan with another public threshold."""
        return replace(self, threshold=threshold)

    @property
    def limit(self) -> int:
        """C: L2 bound of one contribution in grid units."""
        return grid_limit(self.clip, self.bits)

    @property
    def num_blocks(self) -> int:
        """Number of blocks; the last may be short."""
        return -(-self.num_parameters // self.block_size)

    @property
    def num_segments(self) -> int:
        """Number of segments; the last may be short."""
        return -(-self.num_blocks // self.segment_blocks)

    @property
    def rho_nano(self) -> int:
        """The whole cost in nano-rho, rounded up."""
        return rho_nano_cost(self.rho_select + self.rho_values)

    @property
    def cost(self) -> Cost:
        """What a release costs."""
        return Cost.zcdp(self.rho_select + self.rho_values)

    @property
    def scales(self) -> tuple[Fraction, Fraction]:
        """(l1, l2) in grid units: the noise of the threshold and of the queries.

        Solves a^2 R^2 / 8 <= rho_select (the theorem above) with every rounding towards more
        noise.
        """
        extremes = min(2, self.segment_blocks)
        reach = _sqrt(Fraction(extremes * self.limit**2), up=True)
        if self.block_size > 1:
            reach += extremes * _sqrt(Fraction(self.num_segments), up=True)
        a = _sqrt(8 * self.rho_select / reach**2, up=False)
        return 1 / (_THRESHOLD_SHARE * a), 2 / ((1 - _THRESHOLD_SHARE) * a)

    def values_limit(self, released: int) -> int:
        """C_A: L2 bound, in grid units, of a contribution on `released` coordinates."""
        return max(1, math.isqrt(self.limit**2 * released // self.num_parameters))


def select(plan: SvtPlan, total_D: NDArray[np.int64], stream: RandomWords) -> NDArray[np.int64]:
    """Choose the coordinates to release: rho_select-zCDP (module docstring).

    Given the thresholds, the acceptances are independent with probability
    min(1, exp(-(T - q) / l2)), so they are drawn as such, for all blocks at once.

    Args:
        plan: The public plan.
        total_D: (D,) exact sum of contributions clipped to `plan.limit`.
        stream: Fresh random words.

    Returns:
        (K,) increasing coordinates: whole blocks, at most one block per segment.
    """
    l1, l2 = plan.scales
    threshold_S = plan.threshold + one_sided_geometric(stream, plan.num_segments, l1)
    order_B = _public_order(plan.shuffle_seed, plan.num_blocks)
    segment_B = np.arange(plan.num_blocks) // plan.segment_blocks
    query_B = _floor_norms(total_D, plan.block_size)[order_B]
    gap_B = np.maximum(threshold_S[segment_B] - query_B, 0)
    hit_B = bernoulli_exp(stream, gap_B * float(1 / l2), partial(_exponent, gap_B, l2))
    first = np.unique(segment_B[hit_B], return_index=True)[1]  # then the segment stops
    blocks = order_B[np.flatnonzero(hit_B)[first]]
    indices = (blocks[:, None] * plan.block_size + np.arange(plan.block_size)).ravel()
    chosen: NDArray[np.int64] = np.sort(indices[indices < plan.num_parameters])
    return chosen


def release_values(
    plan: SvtPlan,
    contributions: Contributions,
    indices_K: NDArray[np.int64],
    stream: RandomWords,
) -> Release:
    """Sum the contributions on public coordinates, re-clipped, with noise: rho_values-zCDP.

    Args:
        plan: The public plan.
        contributions: One row per patient, read once more.
        indices_K: (K,) what `select` returned.
        stream: Fresh random words.

    Returns:
        The release.

    Raises:
        UpdateRejected: NaN, infinity or wrong shape in this reading.
    """
    limit = plan.values_limit(indices_K.size)
    total_K = clipped_sum(contributions, limit=limit, bits=plan.bits, chosen_K=indices_K)
    sigma2 = Fraction(limit**2) / (2 * plan.rho_values)
    return Release(indices_K, total_K + discrete_gaussian(stream, indices_K.size, sigma2))


def next_threshold(plan: SvtPlan, release: Release) -> int:
    """Return the next round's threshold from what this round made public: costs nothing.

    Aims at 97 % accepting segments: up slowly while more accept, down quickly when fewer do.
    """
    accepted = Fraction(np.unique(release.indices // plan.block_size).size, plan.num_segments)
    step = Fraction(3, 2) * plan.scales[1] * (accepted - _TARGET) / _TARGET
    return min(max(0, plan.threshold + round(step)), (1 << 60) - 1)


def _exponent(gap_B: NDArray[np.int64], l2: Fraction, i: int) -> Fraction:
    return int(gap_B[i]) / l2


def _floor_norms(total_D: NDArray[np.int64], block_size: int) -> NDArray[np.int64]:
    """Return floor of the L2 norm of each block, exactly; squares are below 2^62."""
    padding = -len(total_D) % block_size
    blocks = np.pad(total_D, (0, padding)).reshape(-1, block_size)
    square_B = np.square(blocks).sum(axis=1)
    root_B: NDArray[np.int64] = np.sqrt(square_B.astype(np.float64)).astype(np.int64)  # within 1
    root_B -= np.square(root_B) > square_B
    root_B += np.square(root_B + 1) <= square_B
    return root_B


def _public_order(seed: bytes, count: int) -> NDArray[np.int64]:
    """Return a public permutation of 0..count-1; no privacy randomness goes into it."""
    keys = np.frombuffer(hashlib.shake_256(b"p2pfed-shuffle" + seed).digest(8 * count), "<u8")
    order: NDArray[np.int64] = np.argsort(keys, kind="stable")
    return order


def _sqrt(x: Fraction, *, up: bool) -> Fraction:
    """Return the square root of `x` to 128 binary places, rounded up or down."""
    root = math.isqrt(math.floor(x * (1 << 256)))
    return Fraction(root + up, 1 << 128)
