"""Exact discrete noise: the only source of privacy randomness.

Map: `KeyStream` (random words) -> Bernoulli(exp(-x)) -> one-sided geometric -> discrete Laplace
-> discrete Gaussian. Everything is integer valued and every parameter is a Fraction.

Invariant: the law of every sampler is *exactly* the documented one. Floating point only decides
cases whose error bound leaves no doubt; the others extend the *same* random bits and compare in
integer arithmetic of growing precision. Nothing is truncated. This closes the attacks on
floating-point noise (Mironov, "On significance of the least significant bits for differential
privacy", CCS 2012).

Sources: Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020
(arXiv:2004.00010). Shape suffix: N = number of samples.

Not here: constant time (the time taken depends on the drawn noise), sensitivities, budgets.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal, localcontext
from fractions import Fraction
from functools import lru_cache, partial
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

__all__ = [
    "KeyStream",
    "RandomWords",
    "bernoulli_exp",
    "discrete_gaussian",
    "discrete_laplace",
    "one_sided_geometric",
]

_ZEROS = bytes(1 << 16)  # the plaintext whose encryption is the key stream
_CHUNK = 1 << 16  # samples at a time: the working arrays stay in the processor's cache
_MAX_SCALE = 1 << 48  # keeps every sample far inside int64

# bernoulli_exp: exponents arrive within 2^-48 (1 + x); up to x = 44 that moves exp(-x) by a factor
# below 1 + 2^-42, and numpy's exp adds a few units of 2^-53. 2^-40 covers both with room to spare.
_MARGIN = 2.0**-40
_LARGE_EXPONENT = 44.0  # exp(-44) < 2^-53: beyond, 53 zero bits are needed to accept at all


class RandomWords(Protocol):
    """A source of independent uniform 64-bit words."""

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return `count` fresh words; no word is ever given twice."""
        ...


class KeyStream:
    """AES-256 in counter mode under a fresh key of the operating system; one per release.

    There is deliberately no way to give it a key or a seed. A forked child never continues its
    parent's stream: it draws a new key at its first word.
    """

    __slots__ = ("_encryptor", "_pid")

    def __init__(self) -> None:
        self._rekey()

    def _rekey(self) -> None:
        self._pid = os.getpid()
        self._encryptor = Cipher(AES(os.urandom(32)), CTR(bytes(16))).encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return `count` fresh uniform 64-bit words."""
        if os.getpid() != self._pid:
            self._rekey()
        size = 8 * count
        raw = bytearray(size + 15)  # update_into wants room for a block's end
        view = memoryview(raw)
        for start in range(0, size, len(_ZEROS)):
            length = min(len(_ZEROS), size - start)
            self._encryptor.update_into(_ZEROS[:length], view[start : start + length + 15])
        return np.frombuffer(raw, np.uint64, count)


Bracket = Callable[[int], tuple[int, int]]


@lru_cache(maxsize=1024)
def _exp_bracket(x: Fraction, bits: int) -> tuple[int, int]:
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


def _logistic_bracket(x: Fraction, bits: int) -> tuple[int, int]:
    """Return integers low <= 2^bits / (1 + exp(x)) <= high: the probability with odds exp(-x)."""
    low, high = _exp_bracket(x, bits)
    one = 1 << bits
    return (low << bits) // (one + low), -((-high << bits) // (one + high))


def _decide(u: int, bits: int, bracket: Bracket, stream: RandomWords) -> bool:
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


def _bernoulli(stream: RandomWords, count: int, bracket: Bracket) -> NDArray[np.bool_]:
    """Return `count` independent Bernoulli(p), one p for all; 16 bits decide nearly every one."""
    low, high = bracket(16)
    u_N = stream.words(-(-count // 4)).view(np.uint16)[:count]
    hit_N = u_N < low
    for i in np.flatnonzero((u_N >= low) & (u_N < high)):
        hit_N[i] = _decide(int(u_N[i]), 16, bracket, stream)
    return hit_N


def _coins(stream: RandomWords, count: int) -> NDArray[np.bool_]:
    octets = stream.words(-(-count // 64)).view(np.uint8)
    return np.unpackbits(octets, count=count).view(np.bool_)


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
    u_N = stream.words(near_N.size)
    v_N = (u_N >> np.uint64(11)).astype(np.float64) * 2.0**-53  # exact: U is in [v, v + 2^-53)
    p_N = np.exp(-np.minimum(near_N, _LARGE_EXPONENT))
    sure_N = np.where(near_N < _LARGE_EXPONENT, p_N * (1.0 - _MARGIN), 0.0)
    hit_N: NDArray[np.bool_] = v_N + 2.0**-53 <= sure_N
    for i in np.flatnonzero(~hit_N & (v_N < p_N * (1.0 + _MARGIN))):
        bracket = partial(_exp_bracket, exact(int(i)))
        hit_N[i] = _decide(int(u_N[i]), 64, bracket, stream)
    return hit_N


def one_sided_geometric(stream: RandomWords, count: int, scale: Fraction) -> NDArray[np.int64]:
    """Return `count` independent G >= 0 with P(G >= k) = exp(-k / scale), exactly.

    P(G = k) is proportional to the product over k's binary digits b_j of exp(-b_j 2^j / scale),
    so the digits are independent, digit j with odds exp(-2^j / scale), and floor(G / 2^J) is
    geometric again with ratio exp(-2^J / scale): a loop over the few that survive it.

    Args:
        stream: The random words.
        count: How many.
        scale: Positive, at most 2^48.

    Returns:
        (count,) int64.

    Raises:
        ValueError: The scale is out of range.
    """
    if not 0 < scale <= _MAX_SCALE:
        raise ValueError(f"scale={scale} must be positive and at most 2^48")
    digits = (math.ceil(8 * scale) - 1).bit_length()  # 2^digits >= 8 scale: 1 in 2980 survives
    value_N = np.zeros(count, np.int64)
    for j in range(digits):
        bit_N = _bernoulli(stream, count, partial(_logistic_bracket, (1 << j) / scale))
        value_N += bit_N.astype(np.int64) << j
    step = 1 << digits
    survives = partial(_exp_bracket, step / scale)
    alive = np.arange(count)
    while (alive := alive[_bernoulli(stream, alive.size, survives)]).size:
        value_N[alive] += step
    return value_N


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
    value_N = np.empty(count, np.int64)
    open_ = np.arange(count)
    while open_.size:
        size = one_sided_geometric(stream, open_.size, scale)
        minus = _coins(stream, open_.size)
        again = minus & (size == 0)
        value_N[open_] = np.where(minus, -size, size)
        open_ = open_[again]
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
    if not 0 < sigma2 < _MAX_SCALE**2 // 4:
        raise ValueError(f"sigma2={sigma2} must be positive and below 2^94")
    value_N = np.empty(count, np.int64)
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        value_N[start : start + size] = _gaussian_chunk(stream, size, sigma2)
    return value_N


def _gaussian_chunk(stream: RandomWords, count: int, sigma2: Fraction) -> NDArray[np.int64]:
    t = math.isqrt(math.floor(sigma2)) + 1
    mode, twice = float(sigma2 / t), float(2 * sigma2)
    value_N = np.empty(count, np.int64)
    open_ = np.arange(count)
    while open_.size:
        y = discrete_laplace(stream, open_.size, Fraction(t))
        # |y| and `mode` carry 2^-53 each, so the square's error is below 2^-48 (1 + exponent).
        near = np.square(np.abs(y) - mode) / twice
        kept = bernoulli_exp(stream, near, partial(_gaussian_exponent, y, sigma2, t))
        value_N[open_[kept]] = y[kept]
        open_ = open_[~kept]
    return value_N


def _gaussian_exponent(y_N: NDArray[np.int64], sigma2: Fraction, t: int, i: int) -> Fraction:
    return (abs(int(y_N[i])) - sigma2 / t) ** 2 / (2 * sigma2)
