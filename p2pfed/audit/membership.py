"""Was this patient in? The strongest simple attack on what leaves, and what it proves.

The adversary knows the public model, all other patients' contributions, the target's own one, and
the public plan. It sees one release and says "in" or "out" by the likelihood ratio, which no other
rule beats (Neyman, Pearson 1933). Many releases with and without the target (zero-out, as
`privacy.units` has it) give rates of right and false alarms, and these a lower bound of epsilon
that holds with confidence 1 - 1e-6: (epsilon, delta)-privacy means right <= e^epsilon false + delta
for every rule, and the same with "in" and "out" exchanged. Against `svt` the values alone and the
choice of coordinates alone are rules too: they notice a fault that the other half's noise hides.

Map: `most_exposed` (the target) -> `play` (a `Game`: the scores) -> `Game.shown` (the bound) ->
`finding`; `play_all` is what the command runs.

Invariant: a correct mechanism fails a finding with probability at most 1e-6.

Sources: Clopper, Pearson 1934 (the exact interval); Jagielski, Ullman, Oprea, "Auditing
Differentially Private Machine Learning", NeurIPS 2020 (arXiv:2006.07709) (rates to epsilon).

Shapes: D parameters, K released coordinates.

Not here: how a record is recovered (`inversion`), the exact law at small D (`enumeration`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2pfed.audit.findings import Finding
from p2pfed.audit.victims import DELTA, fresh_noise, plan, rho_of
from p2pfed.privacy.accountant import epsilon_spent
from p2pfed.privacy.clipping import Ball, clip_to_grid
from p2pfed.privacy.gaussian import GaussianPlan
from p2pfed.privacy.mechanism import Mechanism, Release
from p2pfed.privacy.plain import PlainPlan
from p2pfed.privacy.schedules import public_positions
from p2pfed.privacy.svt import SvtPlan
from p2pfed.privacy.units import PatientRows

__all__ = ["Game", "finding", "most_exposed", "play", "play_all", "upper_bound"]

Score = Callable[[Release], tuple[float, ...]]

FALSE_ALARM: Final = 1e-6
CUTS: Final = (-4.0, -2.0, 0.0, 2.0, 4.0)  # fixed beforehand: scores at which "in" may begin
_QUANTILES = 4000  # of the threshold's noise, in the adversary's sum over it


@dataclass(frozen=True, slots=True, eq=False)
class Game:
    """Many releases with the target and as many without, and the adversary's scores.

    Attributes:
        mechanism: By name.
        epsilon: Claimed for one release, by the accountant; infinite without privacy.
        delta: Goes with it.
        with_target: Scores by rule, shape (releases, rules); above 0 a rule says "in". The first
            rule is the likelihood ratio of the whole release.
        without_target: Scores where the target's contribution was zeros.
    """

    mechanism: str
    epsilon: float
    delta: float
    with_target: NDArray[np.float64]
    without_target: NDArray[np.float64]

    @property
    def inside(self) -> NDArray[np.float64]:
        """The likelihood ratios where the target was in, shape (releases,)."""
        return self.with_target[:, 0]

    @property
    def outside(self) -> NDArray[np.float64]:
        """The likelihood ratios where it was out."""
        return self.without_target[:, 0]

    def rates(self, cut: float = 0.0) -> tuple[float, float]:
        """How often the adversary says "in" where it is right, and where it is wrong."""
        return float((self.inside > cut).mean()), float((self.outside > cut).mean())

    @property
    def advantage(self) -> float:
        """Rate of right alarms minus rate of false ones: 1 tells all apart, 0 is guessing."""
        right, false = self.rates()
        return right - false

    @property
    def shown(self) -> float:
        """No smaller epsilon fits these releases, with confidence 1 - 1e-6."""
        rules = range(self.with_target.shape[1])
        return max(self._shown_by(rule, cut) for rule in rules for cut in CUTS)

    @property
    def showable(self) -> float:
        """What so many releases show if the adversary is always right."""
        most = self._at_most(len(self.inside), 0), self._at_most(len(self.outside), 0)
        return _epsilon_of(1 - most[0], most[1], self.delta)

    def _at_most(self, count: int, hits: int) -> float:
        """An upper bound of one rate; all bounds of a game hold together."""
        rates = 2 * len(CUTS) * self.with_target.shape[1]
        return upper_bound(count, hits, FALSE_ALARM / rates)

    def _shown_by(self, rule: int, cut: float) -> float:
        inside, outside = self.with_target[:, rule], self.without_target[:, rule]
        most_missed = self._at_most(len(inside), int((inside <= cut).sum()))
        most_false = self._at_most(len(outside), int((outside > cut).sum()))
        return max(
            _epsilon_of(1 - most_missed, most_false, self.delta),
            _epsilon_of(1 - most_false, most_missed, self.delta),
        )


def most_exposed(rows: NDArray[Any]) -> int:
    """The patient with the longest contribution: whoever is easiest to find."""
    return int(np.argmax(np.linalg.norm(rows, axis=1)))


def play(rows: NDArray[Any], target: int, mechanism: Mechanism, count: int) -> Game:
    """Release `count` times with the target and `count` times without.

    Args:
        rows: All patients' contributions.
        target: Whose membership is guessed.
        mechanism: The public plan.
        count: How many of each, at least 1.
    """
    others = rows.copy()
    others[target] = 0
    inside, outside = PatientRows(rows), PatientRows(others)
    score = _adversary(mechanism, inside, outside, target)
    scores = [
        np.array([score(release) for release in _releases(mechanism, rows, count)])
        for rows in (inside, outside)
    ]
    epsilon = math.inf
    if mechanism.cost.rho_nano:
        epsilon = epsilon_spent({mechanism.cost: 1}, DELTA)
    return Game(mechanism.name, epsilon, DELTA, scores[0], scores[1])


def play_all(rows: NDArray[Any], *, quick: bool) -> Iterator[Game]:
    """Yield a game without privacy, then both mechanisms at two budgets for one release.

    Args:
        rows: All patients' contributions.
        quick: Fewer releases, and the smaller budget alone.
    """
    target, width = most_exposed(rows), rows.shape[1]
    yield play(rows, target, plan("none", width), 20)
    for epsilon in (1.0,) if quick else (1.0, 4.0):  # below what so many releases could show
        for made in (
            plan("gaussian", width, rho=rho_of(epsilon)),
            plan("svt", width, rho=rho_of(epsilon), seed=b"audit"),
        ):
            yield play(rows, target, made, 400 if quick else 1500)


def finding(game: Game) -> Finding:
    """What a game says about its claim; of `none`, whether the attack works at all."""
    right, false = game.rates()
    seen = f"{right:.1%} right alarms, {false:.1%} false ones"
    if math.isinf(game.epsilon):
        return Finding(
            f"membership/{game.mechanism}",
            "without privacy the attack finds the patient (else it were too weak)",
            seen,
            passed=game.advantage >= 0.99,
        )
    return Finding(
        f"membership/{game.mechanism}/epsilon={game.epsilon:.3g}",
        f"no attack shows more than the claimed epsilon {game.epsilon:.3g} (delta {game.delta:g})",
        f"{seen}; shown: epsilon >= {game.shown:.2f}"
        f" (2 x {len(game.inside)} releases could show {game.showable:.1f})",
        passed=game.shown <= game.epsilon,
    )


# --- the adversary -----------------------------------------------------------------------------


def _releases(mechanism: Mechanism, rows: PatientRows, count: int) -> Iterator[Release]:
    total = mechanism.total(rows)
    for _ in range(count):
        yield mechanism.draw(total.copy(), rows, fresh_noise())


def _adversary(
    mechanism: Mechanism, inside: PatientRows, outside: PatientRows, target: int
) -> Score:
    """The log-likelihood ratio of "in" to "out" as a function of a release, and further rules."""
    if isinstance(mechanism, GaussianPlan):
        return _against_gaussian(mechanism, inside, outside)
    if isinstance(mechanism, SvtPlan):
        return _against_svt(mechanism, inside, outside, target)
    if isinstance(mechanism, PlainPlan):
        return _against_nothing(mechanism, inside, outside)
    raise TypeError(f"no attack is written for mechanism {mechanism.name!r}")


def _against_nothing(mechanism: PlainPlan, inside: PatientRows, outside: PatientRows) -> Score:
    """Which of the two possible releases is it? Half of the squared distance is one unit."""
    with_it, without_it = (
        _dense(next(_releases(mechanism, rows, 1)), rows.num_parameters)
        for rows in (inside, outside)
    )
    step = with_it - without_it

    def score(release: Release) -> tuple[float, ...]:
        seen = _dense(release, step.size)
        return (float((seen - (with_it + without_it) / 2) @ step / (step @ step)),)

    return score


def _against_gaussian(mechanism: GaussianPlan, inside: PatientRows, outside: PatientRows) -> Score:
    with_it, without_it = (mechanism.total(rows).astype(np.float64) for rows in (inside, outside))

    def score(release: Release) -> tuple[float, ...]:
        chosen = release.indices
        sigma2 = float(mechanism.sigma2)
        return (_of_normal(release.values, with_it[chosen], without_it[chosen], sigma2),)

    return score


def _against_svt(
    mechanism: SvtPlan, inside: PatientRows, outside: PatientRows, target: int
) -> Score:
    """The choice of blocks and the values on them both tell something: together, then alone."""
    of_choice = _choice(mechanism, inside, outside)

    def score(release: Release) -> tuple[float, ...]:
        chosen = release.indices
        bound = Ball(mechanism.values_limit(chosen.size))
        part = clip_to_grid(inside.rows[:, chosen], bound=bound, bits=mechanism.bits)
        with_it = part.sum(axis=0).astype(np.float64)
        sigma2 = float(mechanism.sigma2(chosen.size))
        of_values = _of_normal(release.values, with_it, with_it - part[target], sigma2)
        choice = of_choice(chosen)
        return choice + of_values, of_values, choice

    return score


def _of_normal(
    values: NDArray[Any], with_it: NDArray[Any], without_it: NDArray[Any], sigma2: float
) -> float:
    """Log-ratio of two normal laws with one variance; the discrete ones differ by nothing seen."""
    return float((values - (with_it + without_it) / 2) @ (with_it - without_it) / sigma2)


def _choice(
    mechanism: SvtPlan, inside: PatientRows, outside: PatientRows
) -> Callable[[NDArray[Any]], float]:
    """Log-ratio of the segments' outcomes, from a table made once; see `privacy.svt`, Lemma 1.

    Knows the segmented schedule; of a sequential one it says nothing.
    """
    blocks, width = mechanism.num_blocks, mechanism.segment_blocks
    if mechanism.is_sequential:
        return lambda _chosen: 0.0
    place = public_positions(mechanism.shuffle_seed, np.arange(blocks), blocks)
    laws = [
        _segment_laws(
            mechanism, _norms(mechanism.total(rows), mechanism.block_size)[np.argsort(place)]
        )
        for rows in (inside, outside)
    ]
    table = np.log(np.maximum(laws[0], 1e-300)) - np.log(np.maximum(laws[1], 1e-300))

    def score(chosen: NDArray[Any]) -> float:
        accepted = place[np.unique(chosen // mechanism.block_size)]
        outcome = np.full(len(table), width)  # "none of them"
        outcome[accepted // width] = accepted % width
        return float(table[np.arange(len(table)), outcome].sum())

    return score


def _segment_laws(mechanism: SvtPlan, query: NDArray[np.float64]) -> NDArray[np.float64]:
    """P(segment s releases its k-th block), last column: none; (segments, width + 1)."""
    l1, l2 = (float(scale) for scale in mechanism.scales)
    width = mechanism.segment_blocks
    share = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    noise = -l1 * np.log1p(-share)
    padded = np.full(mechanism.num_segments * width, -np.inf)
    padded[: len(query)] = query
    law = np.zeros((mechanism.num_segments, width + 1))
    for s, block in enumerate(padded.reshape(-1, width)):
        going = np.ones(_QUANTILES)
        for k in range(width):
            accepts = np.exp(-np.maximum(mechanism.threshold + noise - block[k], 0) / l2)
            law[s, k] = (going * accepts).mean()
            going = going * (1 - accepts)
        law[s, width] = going.mean()
    return law


def _norms(total: NDArray[Any], block_size: int) -> NDArray[np.float64]:
    padded = np.pad(total.astype(np.float64), (0, -total.size % block_size))
    norms: NDArray[np.float64] = np.linalg.norm(padded.reshape(-1, block_size), axis=1)
    return np.floor(norms)


def _dense(release: Release, width: int) -> NDArray[np.float64]:
    dense = np.zeros(width)
    dense[release.indices] = release.values
    return dense


# --- from counts to epsilon --------------------------------------------------------------------


@lru_cache(maxsize=1024)
def upper_bound(count: int, hits: int, alpha: float) -> float:
    """The largest probability that fits `hits` of `count`, Clopper and Pearson's, one-sided.

    Formal guarantee: whatever the true probability is, it lies above the result with probability
    at most `alpha`.

    Args:
        count: Independent trials, at least 1.
        hits: How many of them hit.
        alpha: Of being wrong.
    """
    if hits >= count:
        return 1.0
    below = np.arange(hits + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    ways = log_factorial[count] - log_factorial[below] - log_factorial[count - below]
    low, high = hits / count, 1.0
    for _ in range(60):
        p = (low + high) / 2
        terms = ways + below * math.log(p) + (count - below) * math.log1p(-p)
        if math.fsum(np.exp(terms)) > alpha:
            low = p
        else:
            high = p
    return high


def _epsilon_of(at_least: float, at_most: float, delta: float) -> float:
    return max(0.0, math.log(max(at_least - delta, 1e-300) / at_most))
