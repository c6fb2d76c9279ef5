"""Robust rules over the set: how much of each delta enters the round's mean.

Every rule is a choice of integer coefficients, so a clipped delta is not rounded value by value:
the mean is (sum of coefficient times value) / total. With w_i the weights, W their sum:

* `none`: coefficient w_i, total W.
* `clip-median` (default): w_i a_i of W 2**16, where a_i is 2**16 times the factor that takes the
  delta's norm down to the median norm of the round. One member's push is bounded by the typical
  one's, whatever it sends (Sun et al. 2019, arXiv:1911.07963, section 3.2).
* `centred-clipping` (Karimireddy et al. 2021, arXiv:2012.10333, Algorithm 2): the same around a
  centre v, v + sum w_i a_i (x_i - v) / W with the median distance as radius. v is the clipped mean
  of this round, rounded to the grid, that is the second iteration from 0; it is one more payload,
  whose coefficient is what the others lack. The paper begins at the last round's mean; that would
  be one more array in every checkpoint and tie a round to who took part in the one before
  (measured: no better, nor are more iterations).
* `nearest-neighbour-mixing` (Allouah et al. 2023, arXiv:2302.01772, Algorithm 2): each delta is
  replaced by the mean of its n - f nearest ones (f: a quarter of them), then clipped to the median
  norm. Costs the inner products of all pairs. Measured with 3 of 16 members sending their update
  times -4: next to nothing is lost, where clipping loses 6 points of accuracy; without attackers
  it costs a point where hospitals differ much.

Deltas without content are left out of a median: where most release nothing in a round (sparse
vector technique), the median norm would be 0 and silence those who did. They keep their weight.

Invariant: the coefficients depend on the set of (payload, weight) alone. Squared norms and
distances are exact integers, a factor is the integer square root of a quotient of them, equal
distances are treated alike; no float is involved, nor the order of the deltas.

What is summed how is in `sums`; whether a delta counts at all is decided in `facts`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from p2pfed.gossip.sums import EXACT, Payloads
from p2pfed.wire.payload import Payload

__all__ = ["UNCLIPPED", "Mixture", "median_factors", "mix"]

UNCLIPPED = 1 << 16  # the factor 1; weights of 2**20 from 2**10 members keep sums below 2**62
LOW = (1 << 30) - 1


@dataclass(frozen=True, slots=True)
class Mixture:
    """The round's mean, as coefficients of its payloads.

    Attributes:
        coefficients: One per payload, not negative.
        total: What they are parts of.
    """

    coefficients: tuple[int, ...]
    total: int


def mix(payloads: Payloads, weights: Sequence[int], rule: str, size: int) -> Mixture:
    """The coefficients that a rule gives to the payloads of a round.

    Args:
        payloads: At least one; `centred-clipping` appends its centre.
        weights: One per payload, from 1 up.
        rule: One of `identity.rules.ROBUST`.
        size: P.
    """
    if rule == "none":
        return Mixture(tuple(weights), sum(weights))
    if rule == "nearest-neighbour-mixing":
        return _nearest_neighbours(payloads.gram(), weights)
    squares = payloads.squares()
    clipped = _clipped(median_factors(squares), weights)
    if rule == "centred-clipping":
        return _centred(payloads, weights, squares, clipped, size)
    return clipped


def median_factors(
    squares: Sequence[int | Fraction], speaks: Sequence[bool] | None = None
) -> list[int]:
    """By how much to scale each so that no norm passes the median: parts of 2**16, rounded down.

    The median is the lower one of those that speak.

    Args:
        squares: Squared norms, exact.
        speaks: Whose norm has a part in the median; by default those that are not 0.
    """
    voices = [square > 0 for square in squares] if speaks is None else speaks
    heard = sorted(square for square, voice in zip(squares, voices, strict=True) if voice)
    if not heard:
        return [UNCLIPPED] * len(squares)
    median = heard[(len(heard) - 1) // 2]
    return [
        UNCLIPPED if square <= median else math.isqrt(median * UNCLIPPED**2 // square)
        for square in squares
    ]


def _clipped(factors: Sequence[int], weights: Sequence[int]) -> Mixture:
    if min(factors) == UNCLIPPED:  # the same mean, from smaller numbers
        return Mixture(tuple(weights), sum(weights))
    parts = (weight * factor for weight, factor in zip(weights, factors, strict=True))
    return Mixture(tuple(parts), sum(weights) * UNCLIPPED)


def _centred(
    payloads: Payloads, weights: Sequence[int], squares: Sequence[int], clipped: Mixture, size: int
) -> Mixture:
    centre = np.empty(size, np.int16)  # a mean of int16 values is one
    for part, sums in payloads.weighted(clipped.coefficients):
        centre[part] = np.rint(sums / clipped.total)
    payloads.append(Payload.dense(centre))
    *products, length = payloads.products(centre)
    distances = [s - 2 * p + length for s, p in zip(squares, products, strict=True)]
    factors = median_factors(distances, [square > 0 for square in squares])
    parts = [weight * factor for weight, factor in zip(weights, factors, strict=True)]
    whole = sum(weights) * UNCLIPPED
    return Mixture((*parts, whole - sum(parts)), whole)


def _nearest_neighbours(gram: NDArray[np.int64], weights: Sequence[int]) -> Mixture:
    lengths = np.diagonal(gram)
    distances = lengths[:, None] - 2 * gram + lengths  # at most 2**62
    n = len(weights)
    farthest = np.sort(distances, axis=1)[:, n - (n - 1) // 4 - 1]
    near = (distances <= farthest[:, None]).astype(np.int64)
    sizes = near.sum(axis=1)
    # The squared norm of a sum of neighbours is up to 2**60 n**2: in two halves, each exact.
    chosen = near.astype(np.float64)
    high, low = (
        ((chosen @ half.astype(np.float64)) * chosen).sum(axis=1)
        for half in (gram >> 30, gram & LOW)
    )
    squares = [
        Fraction((int(h) << 30) + int(rest), int(size) ** 2)
        for h, rest, size in zip(high, low, sizes, strict=True)
    ]
    parts = UNCLIPPED * sum(weights)
    shares = [
        weight * factor * EXACT // (parts * int(size))
        for weight, factor, size in zip(weights, median_factors(squares), sizes, strict=True)
    ]
    mixed = near.T @ np.array(shares, np.int64)
    return Mixture(tuple(int(coefficient) for coefficient in mixed), EXACT)
