"""Exact discrete noise: the only source of privacy randomness.

Map: `NoiseSource` (what mechanisms draw from) <- `ExactNoise`, by functions on random words
(`keystream`): trials (`bernoulli`) -> one-sided geometric (`geometric`) -> discrete Laplace ->
discrete Gaussian; uniform subsets. Everything is integer valued and every parameter is a Fraction.

Invariant: the law of every sampler is *exactly* the documented one. Floating point only decides
cases whose error bound leaves no doubt; the others extend the *same* random bits and compare in
integer arithmetic of growing precision. Nothing is truncated. This closes the attacks on
floating-point noise (Mironov, "On significance of the least significant bits for differential
privacy", CCS 2012).

Sources: Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020
(arXiv:2004.00010). Shape suffixes: N = number of samples, K = those still undecided.

Not here: constant time (the time taken depends on the drawn noise), sensitivities, budgets.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from p2pfed.privacy.bernoulli import Trials, bernoulli_exp, successes
from p2pfed.privacy.geometric import CHUNK, one_sided_geometric
from p2pfed.privacy.keystream import KeyStream, RandomWords

__all__ = [
    "ExactNoise",
    "NoiseSource",
    "Trials",
    "discrete_gaussian",
    "discrete_laplace",
    "uniform_subset",
]

_PROPOSALS = 3 << 13  # at a time: each takes about forty bytes
_MOST_SIGMA2 = 1 << 94  # keeps every number far inside int64


class NoiseSource(Protocol):
    """The laws that mechanisms draw from. An audit enumerates them instead of drawing."""

    def successes(self, trials: Trials) -> NDArray[np.int32]:
        """Return the numbers of the trials that succeed, increasing."""
        ...

    def geometric(self, count: int, scale: Fraction) -> NDArray[np.int64]:
        """Return `count` one-sided geometric numbers: P(G >= k) = exp(-k / scale)."""
        ...

    def laplace(self, count: int, scale: Fraction) -> NDArray[np.int64]:
        """Return `count` discrete Laplace numbers of this scale."""
        ...

    def gaussian(self, count: int, sigma2: Fraction) -> NDArray[np.int64]:
        """Return `count` discrete Gaussian numbers of this variance parameter."""
        ...

    def subset(self, count: int, size: int) -> NDArray[np.bool_]:
        """Return a mask of `size` of `count` places, every such subset as likely as another."""
        ...


class ExactNoise:
    """The noise of one release, drawn exactly from one key stream of its own.

    Args:
        stream: The random words; by default a fresh `KeyStream`.
    """

    __slots__ = ("_stream",)

    def __init__(self, stream: RandomWords | None = None) -> None:
        self._stream = KeyStream() if stream is None else stream

    def successes(self, trials: Trials) -> NDArray[np.int32]:
        """See `successes`."""
        return successes(self._stream, trials)

    def geometric(self, count: int, scale: Fraction) -> NDArray[np.int64]:
        """See `one_sided_geometric`."""
        return one_sided_geometric(self._stream, count, scale)

    def laplace(self, count: int, scale: Fraction) -> NDArray[np.int64]:
        """See `discrete_laplace`."""
        return discrete_laplace(self._stream, count, scale)

    def gaussian(self, count: int, sigma2: Fraction) -> NDArray[np.int64]:
        """See `discrete_gaussian`."""
        return discrete_gaussian(self._stream, count, sigma2)

    def subset(self, count: int, size: int) -> NDArray[np.bool_]:
        """See `uniform_subset`."""
        return uniform_subset(self._stream, count, size)


def discrete_laplace(stream: RandomWords, count: int, scale: Fraction) -> NDArray[np.int64]:
    """Return `count` independent Y with P(Y = y) proportional to exp(-|y| / scale), exactly.

    A signed geometric whose "minus zero" is drawn again (Canonne et al., Algorithm 2).

    Args:
        stream: The random words.
        count: How many.
        scale: Positive, at most 2^48.

    Returns:
        (count,) int64.

    Raises:
        ValueError: The scale is out of range.
    """
    value_N = one_sided_geometric(stream, count, scale)
    for start in range(0, count, CHUNK):
        part = value_N[start : start + CHUNK]
        minus = _coins(stream, part.size)
        zero = np.flatnonzero(part == 0)
        again = zero[minus[zero]]
        part *= 1 - 2 * minus.view(np.int8)
        while again.size:
            size = one_sided_geometric(stream, again.size, scale)
            minus = _coins(stream, again.size)
            part[again] = np.where(minus, -size, size)
            again = again[minus & (size == 0)]
    return value_N


def discrete_gaussian(stream: RandomWords, count: int, sigma2: Fraction) -> NDArray[np.int64]:
    """Return `count` independent Y with P(Y = y) proportional to exp(-y^2 / (2 sigma2)), exactly.

    Canonne et al., Algorithm 3: a discrete Laplace of scale t = floor(sigma) + 1, kept with
    probability exp(-(|Y| - sigma2 / t)^2 / (2 sigma2)).

    Args:
        stream: The random words.
        count: How many.
        sigma2: The variance parameter, positive, at most 2^94.

    Returns:
        (count,) int64.

    Raises:
        ValueError: The variance parameter is out of range.
    """
    if not 0 < sigma2 < _MOST_SIGMA2:
        raise ValueError(f"sigma2={sigma2} must be positive and below 2^94")
    value_N = np.empty(count, np.int64)
    for start in range(0, count, _PROPOSALS):
        size = min(_PROPOSALS, count - start)
        value_N[start : start + size] = _gaussian_chunk(stream, size, sigma2)
    return value_N


def _gaussian_chunk(stream: RandomWords, count: int, sigma2: Fraction) -> NDArray[np.int64]:
    """Return the first `count` accepted of independent proposals."""
    t = math.isqrt(math.floor(sigma2)) + 1
    mode, twice = float(sigma2 / t), float(2 * sigma2)
    value_N = np.empty(count, np.int64)
    missing = count
    while missing:
        y = discrete_laplace(stream, min(_PROPOSALS, missing + missing // 2 + 8), Fraction(t))
        # |y| and `mode` carry 2^-53 each, so the square's error is below 2^-48 (1 + exponent).
        near = np.abs(y).astype(np.float64)
        near -= mode
        np.square(near, out=near)
        near /= twice
        kept = y[bernoulli_exp(stream, near, partial(_gaussian_exponent, y, sigma2, t))][:missing]
        value_N[count - missing :][: kept.size] = kept
        missing -= kept.size
    return value_N


def _gaussian_exponent(y_N: NDArray[np.int64], sigma2: Fraction, t: int, i: int) -> Fraction:
    return (abs(int(y_N[i])) - sigma2 / t) ** 2 / (2 * sigma2)


def uniform_subset(stream: RandomWords, count: int, size: int) -> NDArray[np.bool_]:
    """Return a mask of `size` of `count` places, every such subset exactly as likely as another.

    Numbers come by rejection, and those that are marked already are passed over: which set comes
    of it does not depend on the names of the places.
    """
    mask = np.zeros(count, np.bool_)
    fair = np.uint64((1 << 64) - (1 << 64) % count - 1)  # the last word of whole rounds of `count`
    missing = size
    while missing:
        words = stream.words(min(missing, CHUNK))
        mask[(words[words <= fair] % np.uint64(count)).astype(np.int64)] = True
        missing = size - int(np.count_nonzero(mask))
    return mask


def _coins(stream: RandomWords, count: int) -> NDArray[np.bool_]:
    return np.unpackbits(stream.octets(-(-count // 8)), count=count).view(np.bool_)
