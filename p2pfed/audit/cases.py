"""Small data sets with their neighbours, and whether the laws of their releases keep a claim.

Map: `Case` (a plan, and its neighbours as the unit defines them) -> `Book` (the law of each data
set, enumerated once) -> `Book.judge` (the worst pair against the claim) and `Book.defined` (the law
against the one of a definition).

Invariant: realised figures are lower bounds (`replay`), so a claim that fails is a fault. A claim
of which the cases realise less than a stated share fails as well: then nothing was tested.

Not here: which cases, programs and claims (`enumeration`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2pfed.audit.findings import Finding
from p2pfed.audit.replay import Law, Program, epsilon, law_of, zcdp
from p2pfed.privacy.units import Unit

__all__ = ["Book", "Case", "Claim", "Measure", "Rows", "Vector"]

Rows = NDArray[np.float32]
Vector = tuple[int, ...]
Measure = Callable[[Law, Law], float]
Claim = Callable[[Any], float | Fraction]

_MEASURES: Final[dict[Measure, str]] = {epsilon: "log-ratios", zcdp: "Renyi divergences"}
_ROUNDING = 1e-9  # of the floating-point sums, relative


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A plan, what other patients add up to, and what one patient may contribute.

    Attributes:
        plan: Public.
        others: Their sums, in grid units.
        own: One patient's raw contributions, in grid units; they may lie outside the bound.
    """

    plan: Any
    others: Sequence[Vector]
    own: Sequence[Vector]

    def neighbours(self) -> Iterator[tuple[Rows, Rows]]:
        """Yield pairs of data sets as the unit has them, written out once more here."""
        unit: Unit = self.plan.unit
        zeros = (0,) * self.plan.num_parameters
        zero_out = unit.kind == "patient" and unit.patients_per_row == 1
        for rest in self.others:
            for one in self.own:
                for other in (zeros,) if zero_out else self.own:
                    yield self._rows(one, rest), self._rows(other, rest)

    def _rows(self, own: Vector, rest: Vector) -> Rows:
        """One patient's row, and others of one grid unit each."""
        singles = [
            [math.copysign(1, much) if place == i else 0 for i in range(len(rest))]
            for place, much in enumerate(rest)
            for _ in range(abs(much))
        ]
        return np.array([list(own), *singles], np.float32) * np.float32(2.0**-self.plan.bits)


class Book:
    """The laws of some cases; each is enumerated once."""

    def __init__(self, cases: Sequence[Case], program: Callable[[Any, Rows], Program]) -> None:
        self.cases = cases
        self.known: dict[tuple[int, bytes], Law] = {}
        self._program = program

    def law(self, number: int, rows: Rows) -> Law:
        """The law of what one data set of a case lets out."""
        key = number, rows.tobytes()
        if key not in self.known:
            self.known[key] = law_of(self._program(self.cases[number].plan, rows))
        return self.known[key]

    def judge(
        self,
        name: str,
        measure: Measure,
        claim: Claim,
        *,
        least: float,
    ) -> Finding:
        """Find the neighbours that realise the largest share of the claim."""
        realised, claimed = 0.0, 1.0
        for number, case in enumerate(self.cases):
            most = float(claim(case.plan))
            for rows in case.neighbours():
                p, q = (self.law(number, each) for each in rows)
                found = max(measure(p, q), measure(q, p))
                if found / most >= realised / claimed:
                    realised, claimed = found, most
        share = realised / claimed
        laws = self.known.values()
        consistent = all(law.consistent for law in laws)
        return Finding(
            f"law/{name}",
            f"{_MEASURES[measure]} within the claim, and tested to at least {least:.0%} of it",
            f"{realised:.4g} of {claimed:.4g} ({share:.1%}), {len(laws)} laws by"
            f" {sum(law.replays for law in laws)} replays"
            + ("" if consistent else "; trials contradict themselves"),
            passed=consistent and least <= share <= 1 + _ROUNDING,
        )

    def defined(self, name: str, definition: Callable[[Any, Rows], Program]) -> Finding:
        """Compare with the laws of the definition, on one data set of each case."""
        farthest, excess = 0.0, 0.0
        for number, case in enumerate(self.cases):
            rows, _ = next(case.neighbours())
            p, q = self.law(number, rows), law_of(definition(case.plan, rows))
            for outcome in p.probability.keys() | q.probability.keys():
                gap = abs(p.probability.get(outcome, 0.0) - q.probability.get(outcome, 0.0))
                farthest = max(farthest, gap)
                excess = max(excess, gap - p.missing - q.missing)
        return Finding(
            f"law/{name}/definition",
            "every outcome has the probability that the definition gives it",
            f"farthest apart {farthest:.1g}",
            passed=excess <= _ROUNDING,
        )
