"""The exact output law of a program that draws noise: run once for every combination of noise.

Map: `law_of` (a program) -> `Law` (probability of every outcome), by `EnumeratedNoise`, a
`privacy.noise.NoiseSource` that takes each number from a script of choices. Two laws give
`epsilon`, `log_range` and `zcdp`: what the pair shows.

Invariant: everything told is a lower bound. Branches of a probability below a floor are left out
and their mass is kept in `Law.missing`; where it would count against the mechanism, all of it is
given to the other side. So a violation is a violation; what is lost is a part in 10^6 or so.

Here a program is the product's own code, not a model of it: noise is the only thing replaced.

Not here: which programs and which neighbours (`enumeration`); that the real noise follows these
laws (`samplers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2pfed.privacy.noise import NoiseSource, Trials

__all__ = ["EnumeratedNoise", "Law", "Program", "epsilon", "law_of", "log_range", "zcdp"]

Program = Callable[[NoiseSource], Hashable]

FLOOR: Final = 1e-9  # branches below are left out
_TABLE = 1e-18  # tables of one number end where less than this is left
_NEAR = 1.01 * 2.0**-48  # what `Trials` promises, and one more rounding
ALPHAS: Final = (1.05, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0, 16.0, 32.0)


@dataclass(frozen=True, slots=True, eq=False)
class Law:
    """Outcomes and their probabilities, from below.

    Attributes:
        probability: Outcome -> at least this.
        missing: Probability of all branches that were left out.
        replays: How often the program ran.
        consistent: Whether all `Trials` told the same exponents exactly, nearly and by bounds.
    """

    probability: dict[Hashable, float]
    missing: float
    replays: int
    consistent: bool

    def at_most(self, outcome: Hashable) -> float:
        """No outcome is likelier than this."""
        return self.probability.get(outcome, 0.0) + self.missing


@dataclass(frozen=True, slots=True, eq=False)
class _Choice:
    """One number to be chosen: values, the likeliest first; `left[k]` is the mass from k on."""

    values: Sequence[Any]
    chance: Sequence[float]
    left: Sequence[float]

    @classmethod
    def of(cls, values: Sequence[Any], chance: Sequence[float], beyond: float = 0.0) -> _Choice:
        left = [beyond]
        for p in reversed(chance):
            left.append(left[-1] + p)
        return cls(values, chance, left[::-1])


class EnumeratedNoise:
    """One run through a script of choices; beyond its end every choice is the likeliest.

    Args:
        script: Which value each choice takes.
        floor: Branches of less are left out.

    Attributes:
        probability: Of this run.
        others: Scripts of the runs that branch off here.
        missing: What was left out here.
        consistent: See `Law`.
    """

    __slots__ = ("_floor", "_path", "_script", "consistent", "missing", "others", "probability")

    def __init__(self, script: tuple[int, ...], floor: float) -> None:
        self._script = script
        self._floor = floor
        self._path: list[int] = []
        self.probability = 1.0
        self.others: list[tuple[int, ...]] = []
        self.missing = 0.0
        self.consistent = True

    def _choose(self, choice: _Choice) -> Any:
        depth = len(self._path)
        k = self._script[depth] if depth < len(self._script) else 0
        if depth >= len(self._script) - 1:  # here this run is the first: its neighbour is due
            follows = k + 1
            if (
                follows < len(choice.values)
                and self.probability * choice.chance[follows] >= self._floor
            ):
                self.others.append((*self._path, follows))
            else:
                self.missing += self.probability * choice.left[follows]
        self._path.append(k)
        self.probability *= choice.chance[k]
        return choice.values[k]

    def successes(self, trials: Trials) -> NDArray[np.int32]:
        """Choose for each trial whether it succeeds."""
        near = trials.near(np.arange(trials.count)).tolist()
        outside = set(trials.outside.tolist())
        hits = []
        for i in range(trials.count):
            exact = trials.exact(i)
            choice, x = _trial(exact)
            slack = _NEAR * (1 + x)
            within = i in outside or trials.least - slack <= x
            self.consistent &= abs(near[i] - x) <= slack and within and x <= trials.most + slack
            if self._choose(choice):
                hits.append(i)
        return np.array(hits, np.int32)

    def geometric(self, count: int, scale: Fraction) -> NDArray[np.int64]:
        """Choose `count` one-sided geometric numbers."""
        return self._numbers(count, _geometric(scale))

    def laplace(self, count: int, scale: Fraction) -> NDArray[np.int64]:
        """Choose `count` discrete Laplace numbers."""
        return self._numbers(count, _laplace(scale))

    def gaussian(self, count: int, sigma2: Fraction) -> NDArray[np.int64]:
        """Choose `count` discrete Gaussian numbers."""
        return self._numbers(count, _gaussian(sigma2))

    def subset(self, count: int, size: int) -> NDArray[np.bool_]:
        """Choose a subset."""
        mask = np.zeros(count, np.bool_)
        mask[list(self._choose(_subsets(count, size)))] = True
        return mask

    def _numbers(self, count: int, choice: _Choice) -> NDArray[np.int64]:
        return np.array([self._choose(choice) for _ in range(count)], np.int64)


def law_of(program: Program, *, floor: float = FLOOR) -> Law:
    """Run `program` for every combination of noise that is likelier than `floor`.

    Args:
        program: Noise -> what it lets out; it must depend on nothing else that changes.
        floor: Branches of less are left out; more of it means fewer runs and a coarser law.
    """
    probability: dict[Hashable, float] = {}
    missing, replays, consistent = 0.0, 0, True
    scripts: list[tuple[int, ...]] = [()]
    while scripts:
        noise = EnumeratedNoise(scripts.pop(), floor)
        outcome = program(noise)
        probability[outcome] = probability.get(outcome, 0.0) + noise.probability
        scripts += noise.others
        missing += noise.missing
        consistent &= noise.consistent
        replays += 1
    return Law(probability, missing, replays, consistent)


# --- what two laws show ------------------------------------------------------------------------


def epsilon(p: Law, q: Law) -> float:
    """At least this pure epsilon, one way: the largest log-ratio of an outcome of `p`."""
    return max(_log(chance, q.at_most(outcome)) for outcome, chance in p.probability.items())


def log_range(p: Law, q: Law) -> float:
    """At least this range of the log-ratio: its largest value minus its smallest."""
    return epsilon(p, q) + epsilon(q, p)


def zcdp(p: Law, q: Law) -> float:
    """At least this zCDP, one way: the largest Renyi divergence of order alpha over alpha."""
    chance = np.array(list(p.probability.values()))
    other = np.array([q.at_most(outcome) for outcome in p.probability])
    kept = chance > 0
    chance, other = chance[kept], other[kept]
    if not other.all():
        return math.inf
    log_p, log_q = np.log(chance), np.log(other)
    found = 0.0
    for alpha in ALPHAS:
        terms = alpha * log_p + (1 - alpha) * log_q
        top = float(terms.max())
        divergence = (top + math.log(math.fsum(np.exp(terms - top)))) / (alpha - 1)
        found = max(found, divergence / alpha)
    return found


def _log(chance: float, other: float) -> float:
    if chance <= 0:
        return -math.inf
    return math.log(chance) - math.log(other) if other > 0 else math.inf


# --- the laws of single numbers ----------------------------------------------------------------


@lru_cache(maxsize=4096)
def _trial(exact: Fraction) -> tuple[_Choice, float]:
    """Whether a trial of this exponent succeeds, and the exponent rounded once."""
    x = float(exact)
    both = [(math.exp(-x), True), (-math.expm1(-x), False)]
    both = sorted((pair for pair in both if pair[0] > 0), reverse=True)
    return _Choice.of([value for _, value in both], [chance for chance, _ in both]), x


@lru_cache(maxsize=256)
def _geometric(scale: Fraction) -> _Choice:
    step = 1 / float(scale)
    count = math.ceil(-math.log(_TABLE) / step) + 1
    first = -math.expm1(-step)
    chance = [first * math.exp(-k * step) for k in range(count)]
    return _Choice.of(range(count), chance, math.exp(-count * step))


@lru_cache(maxsize=256)
def _laplace(scale: Fraction) -> _Choice:
    step = 1 / float(scale)
    reach = math.ceil(-math.log(_TABLE) / step) + 1
    middle = math.tanh(step / 2)  # (1 - exp(-step)) / (1 + exp(-step))
    values = _both_ways(reach)
    chance = [middle * math.exp(-abs(y) * step) for y in values]
    return _Choice.of(values, chance, 2 * math.exp(-(reach + 1) * step) / (1 + math.exp(-step)))


@lru_cache(maxsize=256)
def _gaussian(sigma2: Fraction) -> _Choice:
    twice = 2 * float(sigma2)
    reach = math.ceil(math.sqrt(-math.log(_TABLE) * twice)) + 1
    values = _both_ways(reach)
    weight = [math.exp(-(y * y) / twice) for y in values]
    # Beyond: each weight is at most exp(-reach / twice) of the one before it, on both sides.
    beyond = 2 * math.exp(-((reach + 1) ** 2) / twice) / -math.expm1(-reach / twice)
    whole = math.fsum(weight)
    return _Choice.of(values, [w / whole for w in weight], beyond / whole)


@lru_cache(maxsize=256)
def _subsets(count: int, size: int) -> _Choice:
    values = list(combinations(range(count), size))
    return _Choice.of(values, [1 / len(values)] * len(values))


def _both_ways(reach: int) -> list[int]:
    return [0, *(side for y in range(1, reach + 1) for side in (y, -y))]
