"""Do the real samplers follow their laws, and does every release draw noise of its own?

Goodness of fit. Between the sample's distribution function and the exact one lies at most
sqrt(ln(2 / a) / (2 n)), but for a probability of at most a (Dvoretzky, Kiefer, Wolfowitz 1956, with
Massart's constant, 1990); that holds for discrete laws too, and needs no other assumption. The
shares of some events are compared in the same way. Beside the numbers themselves their last base
256 digits are tested, which the sampler draws apart, and pairs of neighbours.

Own noise: two sources never give the same numbers, whatever other generators were seeded with, and
neither does a forked child and its parent.

Invariant: correct samplers fail with probability at most `FALSE_ALARM` in all.

Map: `findings` <- `fits` (the fit of one sample) <- exact distribution functions.

Not here: what the noise is used for (`enumeration`, `distinguishing`).
"""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, Final

import numpy as np
import torch
from numpy import random as other_noise
from numpy.typing import NDArray

from p2pfed.audit.findings import Finding
from p2pfed.privacy.noise import ExactNoise, NoiseSource, Trials

__all__ = ["FALSE_ALARM", "findings", "fits", "reach"]

FALSE_ALARM: Final = 1e-6
_TESTS = 64  # more than there are
SCALES: Final = (Fraction(3), Fraction(40), Fraction(1000), Fraction(10**6))
_SIGMA2 = (Fraction(1, 2), Fraction(9), Fraction(1600), Fraction(10**6), Fraction(10**12))
_EXPONENTS = (Fraction(0), Fraction(1, 1000), Fraction(1, 3), Fraction(2), Fraction(7))
_POINTS = 2000  # where distribution functions are compared, at most

Numbers = NDArray[Any]
Distribution = Callable[[Numbers], NDArray[np.float64]]


def findings(quick: bool) -> list[Finding]:
    """Test every sampler and the independence of releases.

    Args:
        quick: Fewer numbers.
    """
    return [*_laws(30_000 if quick else 3_000_000), *_own_noise()]


def reach(count: int) -> float:
    """How far apart the distribution functions may be; see the module docstring."""
    return math.sqrt(math.log(2 * _TESTS / FALSE_ALARM) / (2 * count))


def fits(name: str, sample: Numbers, below: Distribution) -> Finding:
    """Compare a sample with its law.

    Args:
        name: Of the law.
        sample: (N,) whole numbers.
        below: Gives P(number <= k) for some k.
    """
    ordered = np.sort(sample)
    points = np.unique(ordered[:: max(1, ordered.size // _POINTS)])
    found = np.searchsorted(ordered, points, side="right") / ordered.size
    farthest = float(np.abs(found - below(points)).max())
    allowed = reach(ordered.size)
    return Finding(
        f"samplers/{name}",
        f"{ordered.size} numbers have its distribution within {allowed:.2g}",
        f"farthest apart {farthest:.2g}",
        passed=farthest <= allowed,
    )


# --- laws --------------------------------------------------------------------------------------


def _laws(count: int) -> Iterator[Finding]:
    for scale in SCALES:
        drawn = ExactNoise().geometric(count, scale)
        yield fits(f"geometric/{scale}", drawn, _geometric(scale))
        yield fits(f"geometric/{scale}/low digit", drawn % 256, _low_digit(scale))
        drawn = ExactNoise().laplace(count, scale)
        yield fits(f"laplace/{scale}", drawn, _laplace(scale))
    for sigma2 in _SIGMA2:
        drawn = ExactNoise().gaussian(count, sigma2)
        yield fits(f"gaussian/{sigma2}", drawn, _gaussian(sigma2))
    yield _neighbours("geometric", ExactNoise().geometric(2 * count, SCALES[0]))
    yield _neighbours("two sources", *(ExactNoise().geometric(count, SCALES[0]) for _ in range(2)))
    yield from _trials(count)
    yield fits("subset/2 of 5", _subsets(count // 200), lambda rank: (rank + 1) / 10)


def _geometric(scale: Fraction) -> Distribution:
    return lambda k: -np.expm1(-(k + 1) / float(scale))


def _low_digit(scale: Fraction) -> Distribution:
    return lambda k: np.expm1(-(k + 1) / float(scale)) / math.expm1(-256 / float(scale))


def _laplace(scale: Fraction) -> Distribution:
    step = 1 / float(scale)

    def below(k: Numbers) -> NDArray[np.float64]:
        tail = np.exp(-np.where(k < 0, -k, k + 1) * step) / (1 + math.exp(-step))
        return np.where(k < 0, tail, 1 - tail)

    return below


def _gaussian(sigma2: Fraction) -> Distribution:
    """Sums the weights; a wide one is a normal law to within 1 / (24 sigma^2), far below notice."""
    sigma = math.sqrt(sigma2)
    if sigma > 2000:
        return lambda k: np.array([math.erfc(-(y + 0.5) / (sigma * math.sqrt(2))) / 2 for y in k])
    far = math.ceil(12 * sigma)
    weight = np.exp(-np.square(np.arange(-far, far + 1.0)) / (2 * float(sigma2)))
    whole = np.cumsum(weight / weight.sum())
    return lambda k: whole[np.clip(k + far, 0, 2 * far)]


def _neighbours(name: str, first: Numbers, second: Numbers | None = None) -> Finding:
    """Pairs of independent numbers; each is cut at 15, and the pairs are numbered."""
    if second is None:
        first, second = first[::2], first[1::2]
    cut = np.append(_geometric(SCALES[0])(np.arange(15.0)), 1.0)
    chance = np.diff(cut, prepend=0.0)
    whole = np.cumsum(np.outer(chance, chance).ravel())
    pairs = np.minimum(first, 15) * 16 + np.minimum(second, 15)
    return fits(f"pairs/{name}", pairs, lambda k: whole[k])


def _trials(count: int) -> Iterator[Finding]:
    """Rows of trials in which the exponents take turns, with and without bounds told."""
    kinds = len(_EXPONENTS)
    near = np.array([float(x) for x in _EXPONENTS])
    for name, least, most in (("", 0.0, math.inf), ("/bounded", 0.0, float(_EXPONENTS[-1]))):
        row = Trials(
            count=count,
            near=lambda asked: near[asked % kinds],
            exact=lambda i: _EXPONENTS[i % kinds],
            least=least,
            most=most,
        )
        hit = np.zeros(count, np.int64)
        hit[ExactNoise().successes(row)] = 1
        for kind, x in enumerate(_EXPONENTS):
            yield fits(f"trials{name}/{x}", hit[kind::kinds], _at_most_one(math.exp(-x)))


def _at_most_one(chance: float) -> Distribution:
    return lambda k: np.where(k < 1, 1 - chance, 1.0)


def _subsets(count: int) -> Numbers:
    """The numbers of drawn subsets in a list of all."""
    number: dict[tuple[int, ...], int] = {
        pair: rank for rank, pair in enumerate(itertools.combinations(range(5), 2))
    }
    noise = ExactNoise()
    drawn = (tuple(np.flatnonzero(noise.subset(5, 2)).tolist()) for _ in range(count))
    return np.array([number[pair] for pair in drawn])


# --- own noise ---------------------------------------------------------------------------------


def _own_noise() -> Iterator[Finding]:
    yield _differ("two releases", "two sources of noise", _numbers(ExactNoise()), _fresh())
    yield _differ("seeds", "two sources after equal seeds elsewhere", *_after_seeds())
    if hasattr(os, "fork"):
        noise = ExactNoise()
        theirs = _forked(noise)
        yield _differ("fork", "a forked child and its parent", theirs, _numbers(noise))


def _differ(name: str, who: str, first: Numbers, second: Numbers) -> Finding:
    """Numbers below 2^47 or so: two equal ones at one place have a chance of about 2^-47."""
    equal = int((first == second).sum()) if first.size == second.size else first.size
    return Finding(
        f"samplers/own noise/{name}",
        f"{who} never draw the same numbers",
        f"{equal} of {first.size} are equal",
        passed=first.size == second.size > 0 and equal == 0,
    )


def _numbers(noise: NoiseSource) -> Numbers:
    return noise.geometric(64, Fraction(1 << 46))


def _fresh() -> Numbers:
    return _numbers(ExactNoise())


def _after_seeds() -> tuple[Numbers, Numbers]:
    """Seed every other generator twice alike, draw after each, and leave them as they were."""
    before = (
        random.getstate(),
        other_noise.get_state(),  # noqa: NPY002 - not drawn from
        torch.get_rng_state(),
    )
    drawn = []
    for _ in range(2):
        random.seed(1)
        other_noise.seed(1)  # noqa: NPY002 - not drawn from
        torch.manual_seed(1)
        drawn.append(_fresh())
    random.setstate(before[0])
    other_noise.set_state(before[1])  # noqa: NPY002 - not drawn from
    torch.set_rng_state(before[2])
    return drawn[0], drawn[1]


def _forked(noise: NoiseSource) -> Numbers:
    """What a forked child draws from a source that its parent goes on using."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, _numbers(noise).tobytes())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return np.frombuffer(told, np.int64)
