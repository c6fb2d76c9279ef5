"""The exact law of small releases by the product's own code, against what is claimed for them.

Real contributions of a few patients go through `plan.total` (so clipping is part of it) and through
the choice and the noise of every mechanism, once for every combination of noise (`replay`). For all
neighbours of a case, as the unit defines them, the laws must lie within the claim:

- `svt-textbook`, `worth-gate`: pure epsilon. `gaussian`, `svt`: zCDP, of the choice, of the values
  and of both. Of a choice also the largest log-ratio that Lemma 1 of `privacy.svt` allows; zCDP
  hides much of it where the budget is as large as small cases need.
- Every choice also has exactly the law of its definition, block by block, which is written here
  once more without any of the product's shortcuts: some faults change the law of a few blocks and
  break the claim only on many.

Invariant: realised figures are lower bounds, so a failed claim is a fault.

Map: `findings` <- one function per mechanism <- `cases.Case` (a plan and its neighbours), programs
(what is enumerated), claims, definitions.

Not here: the verdicts (`cases`), the enumeration of noise (`replay`), the samplers (`samplers`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2pfed.audit.cases import Book, Case, Rows, Vector
from p2pfed.audit.findings import Finding
from p2pfed.audit.replay import Program, epsilon, zcdp
from p2pfed.privacy import svt
from p2pfed.privacy.accountant import NANO
from p2pfed.privacy.gaussian import GaussianPlan
from p2pfed.privacy.mechanism import Mechanism, Release
from p2pfed.privacy.noise import NoiseSource
from p2pfed.privacy.schedules import public_positions
from p2pfed.privacy.svt import SvtPlan
from p2pfed.privacy.textbook import TextbookPlan
from p2pfed.privacy.units import HOSPITAL, PATIENT, PatientRows, Unit
from p2pfed.privacy.worth import WorthGate, WorthPlan

__all__ = ["findings", "gaussian", "segmented", "sequential", "textbook", "values", "worth"]

GROUPS: Final = Unit("patient", 2)


def findings(quick: bool) -> list[Finding]:
    """Check every mechanism.

    Args:
        quick: Fewer and smaller cases.
    """
    parts = (textbook, segmented, sequential, values, gaussian, worth)
    return [finding for part in parts for finding in part(quick=quick)]


# --- the mechanisms ----------------------------------------------------------------------------


def textbook(*, quick: bool) -> Iterator[Finding]:
    """Its choice and its whole release: pure epsilon; and the choice's definition."""
    cases = []
    for budget in (12,) if quick else (12, 24):
        for size, cutoff in ((3, 3), (3, 1), (2, 1)):
            plan = _textbook(size, cutoff, budget)
            # One that is hardly ever refused tells the threshold's noise.
            others = [(0,) * (size - 1) + (plan.threshold + high,) for high in (1, 0)]
            own: list[Vector] = [(1, 1, -1), (9, 9, -9)] if size > 2 else _box(size)
            cases.append(Case(plan=plan, others=others, own=own))
    book = Book(cases, _textbook_choice)
    yield book.judge(
        "svt-textbook/choice", epsilon, lambda plan: plan.epsilon * plan.select_share, least=0.7
    )
    yield book.defined("svt-textbook", _textbook_definition)
    whole = [
        Case(plan=_textbook(2, cutoff, 16, unit), others=[(0, 0)], own=[(1, 1), (-7, -7), (-1, 0)])
        for cutoff, unit in ((1, PATIENT), (2, PATIENT), (1, HOSPITAL), (1, GROUPS))
    ]
    book = Book(whole, _release)
    yield book.judge("svt-textbook/release", epsilon, _debited_epsilon, least=0.5)


def segmented(*, quick: bool) -> Iterator[Finding]:
    """The choice of `svt` in segments: zCDP, log-ratio, definition."""
    pair = _svt("segmented", 2, 2, 32)
    cases = [
        Case(plan=pair, others=[(1, 4), (4, 1)], own=[(-3, 0), (0, -3), (-4, 4), (4, -4)]),
        Case(plan=_svt("segmented", 3, 3, 32), others=[(0, 0, 3)], own=[(1, 1, -2)]),
        Case(plan=_svt("segmented", 2, 1, 32), others=[(1, 1)], own=[(2, 2), (-1, -1)]),
    ]
    if not quick:
        wide = _svt("segmented", 4, 2, 32, block_size=2)
        group = replace(pair, unit=GROUPS, clip=1)
        cases += [
            Case(plan=replace(pair, rho_select=Fraction(12)), others=[(2, 3)], own=[(-2, 2)]),
            Case(plan=pair, others=_grid((0, 4), 2), own=[(2, -2), (-2, 2), (-1, 1), (9, 9)]),
            Case(plan=wide, others=[(1, 0, 3, 3)], own=[(0, 0, -2, -2), (1, 1, -1, -1)]),
            Case(plan=group, others=[(1, 2), (2, 1)], own=[(1, 0), (-1, 0), (0, 1), (0, -1)]),
        ]
    yield from _choice("segmented", cases)


def sequential(*, quick: bool) -> Iterator[Finding]:
    """The choice of `svt` in one pass: zCDP, log-ratio, definition."""
    cases = [
        Case(
            plan=_svt("sequential", 3, 3, 32),
            others=[(0, 0, 2), (0, 2, 0), (2, 0, 0)],
            own=[(1, 1, -1), (1, -1, 1), (-1, 1, 1), (0, 0, -9), (0, -9, 0), (-9, 0, 0)],
        ),
        Case(plan=_svt("sequential", 2, 1, 32), others=[(1, 1)], own=[(1, -1), (9, 9)]),
    ]
    if not quick:
        wide = _svt("sequential", 4, 2, 32, block_size=2)
        cases += [
            Case(plan=wide, others=[(1, 0, 3, 3)], own=[(0, 0, -9, -9), (1, 1, -1, -1)]),
        ]
    yield from _choice("sequential", cases)


def values(*, quick: bool) -> Iterator[Finding]:
    """The values of `svt` on each support, and its whole release: zCDP."""
    own = [(3, 0), (0, -9), (9, 9), (2, -1)]
    units = (PATIENT, GROUPS) if quick else (PATIENT, GROUPS, HOSPITAL)
    for support in ((0,), (1,), (0, 1)):
        cases = [
            Case(plan=_svt("segmented", 2, 1, 2, unit=unit), others=[(0, 0)], own=own)
            for unit in units
        ]
        book = Book(cases, partial(_values, support=support))
        yield book.judge(f"svt/values/{support}", zcdp, lambda plan: plan.rho_values, least=0.9)
    plans = [_svt(schedule, 1, 1, 8) for schedule in ("segmented", "sequential")]
    whole = [Case(plan=plan, others=[(1,)], own=[(1,), (-9,)]) for plan in plans]
    book = Book(whole, _release)
    yield book.judge("svt/release", zcdp, _debited_rho, least=0.15)


def gaussian(*, quick: bool) -> Iterator[Finding]:
    """The whole release: zCDP."""
    cases = [
        Case(
            plan=GaussianPlan(
                num_parameters=2, clip=3, bits=0, rho=Fraction(2), fraction=fraction, unit=unit
            ),
            others=[(0, 0), (-1, 2)],
            own=[(3, 0), (-9, 9), (0, 2), (0, -3)],
        )
        for fraction in (1, Fraction(1, 2))
        for unit in ((PATIENT, GROUPS) if quick else (PATIENT, GROUPS, HOSPITAL))
    ]
    yield Book(cases, _release).judge("gaussian/release", zcdp, _debited_rho, least=0.9)


def worth(*, quick: bool) -> Iterator[Finding]:
    """All answers of one instance: pure epsilon, and its definition."""
    cases = [
        Case(plan=plan, others=others, own=own)
        for plan, others, own in (
            (_Asks(2, 12), [(4, 0), (4, 1), (2, 0)], [(-2, 2), (2, -2), (-9, 9)]),
            (_Asks(3, 12), [(4, 4, 0)], [(-2, -2, 2)]),
        )[: 1 if quick else 2]
    ]
    book = Book(cases, _answers)
    yield book.judge("worth-gate", epsilon, lambda plan: plan.worth.epsilon, least=0.6)
    yield book.defined("worth-gate", _worth_definition)


def _choice(schedule: str, cases: Sequence[Case]) -> Iterator[Finding]:
    name, book = f"svt/{schedule}", Book(cases, _svt_choice)
    yield book.judge(f"{name}/choice", zcdp, lambda plan: plan.rho_select, least=0.05)
    yield book.judge(f"{name}/log-ratio", epsilon, _log_ratio, least=0.7)
    yield book.defined(name, _svt_definition)


# --- plans and claims --------------------------------------------------------------------------


def _textbook(size: int, cutoff: int, budget: int, unit: Unit = PATIENT) -> TextbookPlan:
    return TextbookPlan(
        num_parameters=size, clip=1, bits=0, epsilon=Fraction(budget), cutoff=cutoff, unit=unit
    )


def _svt(schedule: Any, size: int, segment: int, rho: int, **more: Any) -> SvtPlan:
    terms: dict[str, Any] = {
        "num_parameters": size,
        "clip": 3 if schedule == "segmented" else 2,
        "bits": 0,
        "rho_select": Fraction(rho),
        "rho_values": Fraction(2),
        "shuffle_seed": b"audit",
        "segment_blocks": segment,
        "schedule": schedule,
        "block_reach": Fraction(1),
        "threshold": 1,
    }
    return SvtPlan(**{**terms, **more})


class _Asks:
    """A worth gate over some rounds of one parameter each; a row holds a patient's rounds."""

    def __init__(self, rounds: int, budget: int) -> None:
        self.round = GaussianPlan(num_parameters=1, clip=2, bits=0, rho=Fraction(1, 2))
        self.worth = WorthPlan(epsilon=Fraction(budget), ratio=Fraction(1))
        self.num_parameters, self.unit, self.bits = rounds, self.round.unit, self.round.bits

    def totals(self, rows: Rows) -> list[Any]:
        return [
            self.round.total(PatientRows(rows[:, t : t + 1])) for t in range(self.num_parameters)
        ]


def _debited_epsilon(plan: Mechanism) -> Fraction:
    return Fraction(plan.cost.pure_nano or 0, NANO)


def _debited_rho(plan: Mechanism) -> Fraction:
    return Fraction(plan.cost.rho_nano, NANO)


def _log_ratio(plan: SvtPlan) -> float:
    """The largest log-ratio that Lemma 1 and the theorems of `privacy.svt` allow for rho_select.

    They are worked out here once more from rho_select alone. One AboveThreshold has at most
    u / l1 + (u + v) / l2, where u = D- and v = D+, with u^2 + v^2 <= S^2 and, in one pass, u and v
    at most m g; over n of them the squares share S^2, or each has all of it.
    """
    patient = plan.unit.kind == "patient" and plan.unit.patients_per_row == 1
    moves, count, floors = 1 if patient else 2, plan.num_segments, int(plan.block_size > 1)
    reach, block = moves * plan.limit, moves * plan.block_limit + floors
    if plan.is_sequential:
        width = min(2 * block, math.sqrt(2) * reach + 2 * floors)
        a = math.sqrt(8 * plan.rho_select / count) / width
    else:
        extremes = min(2, plan.segment_blocks)
        width = math.sqrt(extremes) * reach + floors * extremes * math.sqrt(count)
        a = math.sqrt(8 * plan.rho_select) / width
    x = a * 1000 / 2587
    y = (a - x) / 2
    if plan.is_sequential:
        return count * min(block * a, math.hypot(x + y, y) * (reach + floors * math.sqrt(2)))
    return math.hypot(x + y, y) * (math.sqrt(count) * reach + floors * math.sqrt(2) * count)


def _grid(levels: Iterable[int], size: int) -> list[Vector]:
    return list(itertools.product(levels, repeat=size))


def _box(size: int) -> list[Vector]:
    """Everything in the box of one grid unit, and some of what is cut to it."""
    return [*_grid((-1, 0, 1), size), (7,) * size, (-7, *(7,) * (size - 1))]


# --- programs ----------------------------------------------------------------------------------


class _Chosen:
    """Enumerated noise for the choice alone: values get none, for only the coordinates are told."""

    def __init__(self, noise: NoiseSource) -> None:
        self.successes, self.geometric, self.subset = noise.successes, noise.geometric, noise.subset
        self.gaussian = noise.gaussian

    def laplace(self, count: int, scale: Fraction) -> NDArray[np.int64]:  # noqa: ARG002 - no noise
        return np.zeros(count, np.int64)


def _textbook_choice(plan: TextbookPlan, rows: Rows) -> Program:
    contributions = PatientRows(rows)
    total = plan.total(contributions)
    return lambda noise: tuple(
        plan.draw(total.copy(), contributions, _Chosen(noise)).indices.tolist()
    )


def _svt_choice(plan: SvtPlan, rows: Rows) -> Program:
    total = plan.total(PatientRows(rows))
    return lambda noise: tuple(svt.select(plan, total.copy(), noise).tolist())


def _release(plan: Mechanism, rows: Rows) -> Program:
    contributions = PatientRows(rows)
    total = plan.total(contributions)
    return lambda noise: _outcome(plan.draw(total.copy(), contributions, noise))


def _values(plan: SvtPlan, rows: Rows, support: tuple[int, ...]) -> Program:
    contributions, chosen = PatientRows(rows), np.array(support, np.int32)
    return lambda noise: _outcome(plan.values(contributions, chosen, noise))


def _answers(plan: _Asks, rows: Rows) -> Program:
    """In which round the gate says "yes", if in any."""
    totals = plan.totals(rows)

    def ask(noise: NoiseSource) -> Hashable:
        gate = WorthGate(plan.worth)
        gate.open(plan.round, noise)
        return next((t for t, s in enumerate(totals) if gate.ask(plan.round, s, noise)), None)

    return ask


def _worth_definition(plan: _Asks, rows: Rows) -> Program:
    lengths = [abs(int(total[0])) for total in plan.totals(rows)]
    (l1, l2), threshold = plan.worth.scales(plan.round), plan.worth.threshold(plan.round)

    def ask(noise: NoiseSource) -> Hashable:
        bound = threshold + _geometric(noise, l1)
        return next((t for t, s in enumerate(lengths) if s + _geometric(noise, l2) >= bound), None)

    return ask


def _outcome(release: Release) -> Hashable:
    return tuple(release.indices.tolist()), tuple(release.values.tolist())


def _textbook_definition(plan: TextbookPlan, rows: Rows) -> Program:
    """All coordinates are tested; of those that pass, a random `cutoff`."""
    (l1, l2, _), threshold = plan.scales, plan.threshold
    total = np.abs(plan.total(PatientRows(rows))).tolist()

    def choose(noise: NoiseSource) -> Hashable:
        bound = threshold + _geometric(noise, l1)
        passed = [i for i, query in enumerate(total) if query + _geometric(noise, l2) >= bound]
        if len(passed) > plan.cutoff:
            kept = noise.subset(len(passed), plan.cutoff)
            passed = [i for i, keep in zip(passed, kept, strict=True) if keep]
        return tuple(passed)

    return choose


def _svt_definition(plan: SvtPlan, rows: Rows) -> Program:
    """Blocks one by one in the public order; each AboveThreshold ends with its acceptance."""
    l1, l2 = plan.scales
    count, size = plan.num_blocks, plan.block_size
    total = plan.total(PatientRows(rows)).astype(float)
    queries = [math.floor(np.linalg.norm(total[b * size :][:size])) for b in range(count)]
    order = np.argsort(public_positions(plan.shuffle_seed, np.arange(count), count)).tolist()
    width = count if plan.is_sequential else plan.segment_blocks
    parts = [order[start : start + width] for start in range(0, count, width)]
    most = plan.cutoff if plan.is_sequential else 1

    def accepted(part: list[int], noise: NoiseSource) -> Iterator[int]:
        bound = plan.threshold + _geometric(noise, l1)
        for block in part:
            if queries[block] + _geometric(noise, l2) >= bound:
                yield block
                bound = plan.threshold + _geometric(noise, l1)

    def choose(noise: NoiseSource) -> Hashable:
        blocks = sorted(b for part in parts for b in itertools.islice(accepted(part, noise), most))
        return tuple(i for b in blocks for i in range(b * size, min((b + 1) * size, total.size)))

    return choose


def _geometric(noise: NoiseSource, scale: Fraction) -> int:
    return int(noise.geometric(1, scale)[0])
