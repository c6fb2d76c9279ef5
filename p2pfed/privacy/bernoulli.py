"""Exact trials that succeed with probability exp(-x), x rational.

Map: `exp_bracket` (integers around 2^bits exp(-x)) -> `decide` (is this uniform number below it?)
-> `bernoulli` (many trials of one x), `bernoulli_exp` (each with its own) and `successes` (a long
row of `Trials` of which one byte decides most).

Invariant: the law is exact. Floating point only decides what its error bound leaves no doubt about;
the rest extends the *same* random bits and compares in integer arithmetic of growing precision.

Not here: what the trials are for (`geometric`, `noise`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal, localcontext
from fractions import Fraction
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from p2pfed.privacy.keystream import RandomWords

__all__ = [
    "Bracket",
    "Trials",
    "bernoulli",
    "bernoulli_exp",
    "decide",
    "exp_bracket",
    "successes",
]

# Exponents arrive within 2^-48 (1 + x); up to x = 44 that moves exp(-x) by a factor below
# 1 + 2^-42, and numpy's exp adds a few units of 2^-53. 2^-40 covers both with room to spare.
_MARGIN = 2.0**-40
_LARGE_EXPONENT = 44.0  # exp(-44) < 2^-53: beyond, 53 zero bits are needed to accept at all

_CHUNK = 1 << 15  # trials at a time: the working arrays stay in the processor's cache
_OCTETS = 1 << 18  # the same where a byte decides nearly all


@dataclass(frozen=True, slots=True, eq=False)
class Trials:
    """A row of independent trials; number i succeeds with probability exp(-x_i), x_i >= 0.

    Attributes:
        count: How many.
        near: (K,) numbers of trials -> (K,) float64, each within 2^-48 (1 + x_i) of x_i and >= 0.
        exact: Number of a trial -> the rational x_i.
        least: No x_i is below it, up to the same error, but for those `outside`.
        most: No x_i is above it, up to the same error.
        outside: Numbers of trials with smaller exponents, increasing.
    """

    count: int
    near: Callable[[NDArray[np.intp]], NDArray[np.float64]]
    exact: Callable[[int], Fraction]
    least: float = 0.0
    most: float = math.inf
    outside: NDArray[np.intp] = field(default_factory=lambda: np.empty(0, np.intp))


Bracket = Callable[[int], tuple[int, int]]
"""Number of bits -> integers low <= 2^bits p <= high for some probability p."""


@lru_cache(maxsize=1024)
def exp_bracket(x: Fraction, bits: int) -> tuple[int, int]:
    """Return integers low <= 2^bits exp(-x) <= high, at most 2 apart, for x >= 0.

    The relative error of the three rounded operations is below (x + 4) 10^(1 - precision); with x
    <= bits and the precision chosen here the absolute error of `scaled` is below 10^-20 for every
    bits < 10^6, far inside the slack.
    """
    if x == 0:
        return 1 << bits, 1 << bits
    if x > bits:  # 2^bits exp(-x) < 1
        return 0, 1
    slack = Decimal("1e-9")
    with localcontext(Context(prec=bits // 3 + 32)):
        scaled = (Decimal(-x.numerator) / Decimal(x.denominator)).exp() * (1 << bits)
        low = int((scaled - slack).to_integral_value(ROUND_FLOOR))
        high = int((scaled + slack).to_integral_value(ROUND_CEILING))
    return max(0, low), high


def decide(u: int, bits: int, bracket: Bracket, stream: RandomWords) -> bool:
    """Tell whether the uniform number 0.u... (its first `bits` bits known) is below p.

    Ends with probability one: p is 1 or irrational (exp of a rational), so the bits differ
    somewhere; every turn is needed with probability <= 2^-62 only.
    """
    while True:
        low, high = bracket(bits)
        if u < low:
            return True
        if u >= high:
            return False
        u = u << 64 | int(stream.words(1)[0])
        bits += 64


def bernoulli(stream: RandomWords, count: int, bracket: Bracket) -> NDArray[np.intp]:
    """Return which of `count` independent trials of one small probability succeed, increasing."""
    low, high = bracket(16)
    u_N = stream.octets(2 * count).view(np.uint16)
    hit_K = np.flatnonzero(u_N < high)
    u_K = u_N[hit_K]
    open_ = np.flatnonzero(u_K >= low).tolist()
    missed = [i for i in open_ if not decide(int(u_K[i]), 16, bracket, stream)]
    return np.delete(hit_K, missed) if missed else hit_K


def bernoulli_exp(
    stream: RandomWords, near_N: NDArray[np.float64], exact: Callable[[int], Fraction]
) -> NDArray[np.bool_]:
    """Return independent Bernoulli(exp(-x_i)) for rational x_i >= 0.

    Args:
        stream: The random words.
        near_N: (N,) the exponents, each within 2^-48 (1 + x_i) of the exact one and >= 0.
        exact: Gives the exact exponent x_i of entry i; asked only for the few undecided entries.

    Returns:
        (N,) booleans whose law is exactly that of the exact exponents.
    """
    return _below_exp(stream, stream.words(near_N.size), near_N, exact)


def _below_exp(
    stream: RandomWords,
    u_N: NDArray[np.uint64],
    near_N: NDArray[np.float64],
    exact: Callable[[int], Fraction],
) -> NDArray[np.bool_]:
    """Tell for each uniform number, of which 64 bits are known, whether it is below exp(-x_i)."""
    v_N = (u_N >> np.uint64(11)).astype(np.float64)
    v_N *= 2.0**-53  # exact: U is in [v, v + 2^-53)
    p_N = np.minimum(near_N, _LARGE_EXPONENT)
    np.exp(np.negative(p_N, out=p_N), out=p_N)
    v_N -= p_N
    hit_N: NDArray[np.bool_] = v_N < 0
    p_N *= _MARGIN
    p_N += 2.0**-52
    for i in np.flatnonzero(np.abs(v_N, out=v_N) <= p_N):
        bracket = partial(exp_bracket, exact(int(i)))
        hit_N[i] = decide(int(u_N[i]), 64, bracket, stream)
    return hit_N


def successes(stream: RandomWords, trials: Trials) -> NDArray[np.int32]:
    """Return the numbers of the trials that succeed, increasing.

    One random byte is drawn for each. The bounds of all exponents tell from it alone what becomes
    of most trials; the others read their exponents and extend the same byte to 64 bits and more.
    Those named as outside the bounds get words of their own instead.
    """
    surely = max(0, math.floor(256 * math.exp(-trials.most) * (1 - _MARGIN) - 2.0**-40))
    maybe = min(256, math.ceil(256 * math.exp(-trials.least) * (1 + _MARGIN) + 2.0**-40))
    at_once = _OCTETS if maybe <= 64 and maybe - surely <= 8 else _CHUNK
    scratch = np.empty(min(at_once, trials.count), np.bool_)
    found = [np.empty(0, np.int32)]
    for start in range(0, trials.count, at_once):
        octet_N = stream.octets(min(at_once, trials.count - start))
        hit_N = np.less(octet_N, maybe, out=scratch[: octet_N.size])
        hit_K = np.flatnonzero(hit_N)
        octet_K = octet_N[hit_K]
        found.append(_extended(stream, trials, hit_K + start, octet_K, surely))
    if not trials.outside.size:
        return np.concatenate(found)
    rest = trials.outside
    own = rest[bernoulli_exp(stream, trials.near(rest), lambda i: trials.exact(int(rest[i])))]
    inside = np.setdiff1d(np.concatenate(found), rest, assume_unique=True)
    return np.sort(np.concatenate([inside, own.astype(np.int32)]))


def _extended(
    stream: RandomWords,
    trials: Trials,
    hit_K: NDArray[np.intp],
    octet_K: NDArray[np.uint8],
    surely: int,
) -> NDArray[np.int32]:
    """Decide those trials that a byte leaves open, by more bits of the same number."""
    open_ = np.flatnonzero(octet_K >= surely)
    asked = hit_K[open_]
    top = octet_K[open_].astype(np.uint64) << np.uint64(56)
    u = top | stream.words(open_.size) >> np.uint64(8)
    below = _below_exp(stream, u, trials.near(asked), lambda i: trials.exact(int(asked[i])))
    if open_.size == hit_K.size:
        return hit_K[below].astype(np.int32)
    kept = hit_K.astype(np.int32)
    return np.delete(kept, open_[~below])
