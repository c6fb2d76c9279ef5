"""A distinguishing test on the real gate's draws: nothing is replaced, not even the noise.

Small releases of one data set with a patient and of its neighbour without, many of each. From the
first half of the draws an event is picked that tells the two apart best; on the second half its
rates are counted, and exact intervals of them give an epsilon that the mechanism has at least, with
confidence 1 - 1e-6. It must not be more than what the accountant tells for one release.

What this sees and `enumeration` does not: the real key stream, samplers and mechanism together.

Invariant: the event is fixed before the draws that it is tested on are looked at, so a correct
mechanism fails with probability at most `FALSE_ALARM` in all.

Map: `findings` -> `_Game` (plan, two data sets) -> `shown` <- `membership.upper_bound`.

Not here: attacks on real records (`membership`, `inversion`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import numpy as np

from p2pfed.audit.findings import Finding
from p2pfed.audit.membership import upper_bound
from p2pfed.audit.victims import DELTA, fresh_noise
from p2pfed.privacy.accountant import NANO, epsilon_spent
from p2pfed.privacy.gaussian import GaussianPlan
from p2pfed.privacy.mechanism import Mechanism
from p2pfed.privacy.svt import SvtPlan
from p2pfed.privacy.textbook import TextbookPlan
from p2pfed.privacy.units import PatientRows

__all__ = ["FALSE_ALARM", "findings", "pick", "shown"]

FALSE_ALARM: Final = 1e-6
_RATES = 128  # more than are bounded in all
_CUTS = (1.0, 1.5, 3.0, 6.0)  # from which ratio on an outcome belongs to the event
_CLIP = 64  # grid units

Draws = Sequence[Hashable]


@dataclass(frozen=True, slots=True)
class _Game:
    """A plan, others' sum and one patient's contribution, in grid units."""

    name: str
    plan: Any
    others: tuple[int, ...]
    own: tuple[int, ...]

    def draws(self, count: int, *, inside: bool) -> Draws:
        """Release `count` times, each with fresh noise; values are told in half deviations."""
        plan: Mechanism = self.plan
        with_it, without_it = (
            PatientRows(np.array([one, self.others], np.float32))
            for one in (self.own, np.zeros_like(self.own))
        )
        middle = (plan.total(with_it) + plan.total(without_it)) / 2
        width = plan.outlook().value_noise * _CLIP / 2
        contributions = with_it if inside else without_it
        total = plan.total(contributions)

        def drawn() -> Hashable:
            release = plan.draw(total.copy(), contributions, fresh_noise())
            place = (release.values - middle[release.indices]) // width
            return tuple(release.indices.tolist()), tuple(np.clip(place, -4, 3).tolist())

        return [drawn() for _ in range(count)]


def findings(quick: bool) -> list[Finding]:
    """Test every mechanism that protects anybody.

    Args:
        quick: Fewer releases.
    """
    return [_finding(game, 1000 if quick else 2500) for game in _games()]


def pick(inside: Iterable[Hashable], outside: Iterable[Hashable]) -> list[frozenset[Hashable]]:
    """Return events that are likelier inside, by how often each outcome was seen."""
    often, seldom = Counter(inside), Counter(outside)
    ratio = {
        outcome: (often[outcome] + 0.5) / (seldom[outcome] + 0.5)
        for outcome in often.keys() | seldom.keys()
    }
    return [frozenset(o for o, much in ratio.items() if much > cut) for cut in _CUTS]


def shown(inside: Draws, outside: Draws, delta: float) -> float:
    """Return an epsilon that the two laws have at least, with confidence 1 - `FALSE_ALARM`.

    (epsilon, delta)-privacy means right <= e^epsilon false + delta for every event, both ways.

    Args:
        inside: Independent outcomes with the patient.
        outside: As many without.
        delta: Of the claim.
    """
    half = len(inside) // 2
    best = 0.0
    for one, other in ((inside, outside), (outside, inside)):
        for event in pick(one[:half], other[:half]):
            missed = sum(outcome not in event for outcome in one[half:])
            false = sum(outcome in event for outcome in other[half:])
            right = 1 - upper_bound(len(one) - half, missed, FALSE_ALARM / _RATES)
            wrong = upper_bound(len(other) - half, false, FALSE_ALARM / _RATES)
            if right > delta:
                best = max(best, math.log((right - delta) / wrong))
    return best


def _finding(game: _Game, count: int) -> Finding:
    plan: Mechanism = game.plan
    delta, claimed = DELTA, epsilon_spent({plan.cost: 1}, DELTA)
    if plan.cost.pure_nano is not None:
        delta, claimed = 0.0, plan.cost.pure_nano / NANO
    found = shown(game.draws(count, inside=True), game.draws(count, inside=False), delta)
    most = shown([1] * count, [0] * count, delta)
    return Finding(
        f"distinguishing/{game.name}/epsilon={claimed:.3g}",
        f"no event shows more than the claimed epsilon {claimed:.3g} (delta {delta:g})",
        f"shown: epsilon >= {found:.2f} (2 x {count} releases could show {most:.1f})",
        passed=found <= claimed < most,
    )


def _games() -> list[_Game]:
    base: dict[str, Any] = {"clip": _CLIP, "bits": 0}
    svt: dict[str, Any] = {
        "num_parameters": 2,
        "rho_select": Fraction(1, 20),
        "rho_values": Fraction(1, 10),
        "shuffle_seed": b"audit",
    }
    return [
        _Game(
            "svt-textbook/cut-off",
            TextbookPlan(num_parameters=2, epsilon=Fraction(2), cutoff=1, **base),
            (0, 60),
            (64, 64),
        ),
        _Game(
            "svt-textbook",
            TextbookPlan(num_parameters=3, epsilon=Fraction(2), cutoff=3, **base),
            (64, 0, 0),
            (-64, 64, 64),
        ),
        _Game(
            "svt/segmented",
            SvtPlan(segment_blocks=1, schedule="segmented", **base, **svt),
            (0, 0),
            (60, 60),
        ),
        _Game(
            "svt/sequential",
            SvtPlan(segment_blocks=2, schedule="sequential", **base, **svt),
            (0, 0),
            (60, 0),
        ),
        _Game("gaussian", GaussianPlan(num_parameters=1, rho=Fraction(1, 8), **base), (0,), (64,)),
    ]
