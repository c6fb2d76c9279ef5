"""What a release costs, what many cost together, and what a budget allows.

Map: a plan's `Cost` -> many of them, a `Spending` -> `how_spent` (the epsilon to tell and by which
route) -> `fits`, `allows` and `forecast` against a `Budget`.

Invariant: amounts are integers of 1e-9; costs are rounded up, budgets down and reported epsilons
up, so no chain of conversions ever gives more than was paid. The epsilon told is the smallest of
several bounds, each valid on its own, and never falls when a cost is added.

Sources: Bun, Steinke, "Concentrated Differential Privacy: Simplifications, Extensions, and Lower
Bounds", TCC 2016 (arXiv:1605.02658): Lemma 2.3 (composition adds rho), Proposition 1.4 (epsilon-DP
is (epsilon^2 / 2)-zCDP). The routes have theirs in `composition`.

Not here: where the amounts are kept (`ledger`), what a mechanism costs (its plan), the formulas
(`composition`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Literal, Self

from p2pfed.privacy.composition import (
    NANO,
    largest_rho_nano,
    of_one_order,
    of_randomised_response,
    of_renyi,
    of_zcdp,
)

__all__ = [
    "NANO",
    "Budget",
    "Cost",
    "Route",
    "Spending",
    "allows",
    "epsilon_spent",
    "fits",
    "forecast",
    "how_spent",
    "pure_nano_allowed",
    "rho_nano_allowed",
    "rho_nano_cost",
]

Route = Literal["pure", "zcdp", "optimal", "renyi"]

_MOST_EPSILON = 10**6


@dataclass(frozen=True, slots=True)
class Budget:
    """A lifetime privacy budget, (epsilon, delta)-differential privacy.

    Attributes:
        epsilon: Positive and finite, at most 10^6.
        delta: Strictly between 0 and 1.

    Raises:
        ValueError: A number is out of range.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= _MOST_EPSILON:
            raise ValueError(f"epsilon={self.epsilon} must be positive and at most 1e6")
        _check_delta(self.delta)

    @property
    def rho_nano(self) -> int:
        """What the budget allows if all of it is spent as zCDP, in nano-rho, rounded down."""
        return rho_nano_allowed(self.epsilon, self.delta)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one release costs, in both currencies.

    Attributes:
        rho_nano: It is rho-zCDP; in 1e-9 rho, rounded up.
        pure_nano: It is also epsilon-DP; in 1e-9 epsilon, rounded up. None where it is not.

    Raises:
        ValueError: A number is out of range, or only one of the two says that it is free.
    """

    rho_nano: int
    pure_nano: int | None

    def __post_init__(self) -> None:
        if self.rho_nano < 0:
            raise ValueError(f"rho_nano={self.rho_nano} must not be negative")
        if self.pure_nano is not None and not 0 <= self.pure_nano <= _MOST_EPSILON * NANO:
            raise ValueError(f"pure_nano={self.pure_nano} must be 0 to 10^15")
        if (self.rho_nano == 0) != (self.pure_nano == 0):
            raise ValueError(f"rho_nano={self.rho_nano} and pure_nano={self.pure_nano} disagree")

    @classmethod
    def zcdp(cls, rho: Fraction) -> Self:
        """Return the cost of a release that is rho-zCDP (discrete Gaussian noise).

        Raises:
            ValueError: `rho` is negative.
        """
        rho_nano = rho_nano_cost(rho)
        return cls(rho_nano, None if rho_nano else 0)

    @classmethod
    def pure(cls, epsilon: Fraction) -> Self:
        """Return the cost of a release that is epsilon-DP (discrete Laplace noise).

        Formal guarantee: it is also (epsilon^2 / 2)-zCDP (Bun, Steinke 2016, Proposition 1.4).

        Raises:
            ValueError: `epsilon` is negative or more than 10^6.
        """
        pure_nano = math.ceil(epsilon * NANO)
        return cls(rho_nano_cost(epsilon * epsilon / 2), pure_nano)

    @classmethod
    def nothing(cls) -> Self:
        """Return the cost of a release that no budget covers: mechanism "none", counted apart."""
        return cls(0, 0)


Spending = Mapping[Cost, int]


def rho_nano_cost(rho: Fraction) -> int:
    """Return the nano-rho to pay for `rho`, rounded up.

    Raises:
        ValueError: `rho` is negative.
    """
    if rho < 0:
        raise ValueError(f"rho={rho} must not be negative")
    return math.ceil(rho * NANO)


def rho_nano_allowed(epsilon: float, delta: float) -> int:
    """Return the largest whole nano-rho whose epsilon at `delta` is at most `epsilon`.

    By `composition.of_zcdp`; the same on every machine, so members agree on it.

    Raises:
        ValueError: `epsilon` is negative or not finite, or `delta` is not in (0, 1).
    """
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon={epsilon} must be finite and not negative")
    _check_delta(delta)
    return largest_rho_nano(epsilon, delta)


@lru_cache(maxsize=256)
def pure_nano_allowed(epsilon: float, delta: float, count: int) -> int:
    """Return the largest pure 1e-9 epsilon of which `count` releases fit into (epsilon, delta).

    The same on every machine.

    Raises:
        ValueError: A number is out of range.
    """
    budget = Budget(epsilon, delta)
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")

    def fitting(pure_nano: int) -> bool:
        return fits(budget, {Cost.pure(Fraction(pure_nano, NANO)): count}, Cost.nothing())

    whole = math.floor(Fraction(epsilon) * NANO)
    return _last(fitting, whole // count, whole)


def epsilon_spent(costs: Spending, delta: float) -> float:
    """Return the epsilon at `delta` of all the costs together, rounded up; see `how_spent`.

    Raises:
        ValueError: A count is negative or `delta` is not in (0, 1).
    """
    return how_spent(costs, delta)[0]


def how_spent(costs: Spending, delta: float) -> tuple[float, Route]:
    """Return the epsilon at `delta` of all the costs together, rounded up, and its route.

    Formal guarantee: releases of these costs, fixed beforehand, each of which may depend on the
    earlier ones, are together (epsilon, delta)-differentially private. (Where somebody who saw
    releases chose the costs of later ones, the lifetime budget holds by `allows`, and this figure
    describes what was chosen.) Each route is a theorem of its own:

    * "pure": the sum of the epsilons, where all are pure.
    * "zcdp": the sum of the rhos (Bun, Steinke 2016, Lemma 2.3), by `composition.of_zcdp`.
    * "optimal": where all are pure, as many as they are, each as costly as the costliest, by
      `composition.of_randomised_response`; the exact value where all are equal.
    * "renyi": the sum of the Renyi curves, by `composition.of_renyi`.

    Which one is told depends on public costs alone, so their minimum holds as well. Every route
    grows with the costs and none appears by adding a cost, so the minimum grows too.

    Raises:
        ValueError: A count is negative or `delta` is not in (0, 1).
    """
    _check_delta(delta)
    if min(costs.values(), default=0) < 0:
        raise ValueError("a count of costs must not be negative")
    return _how_spent(_spent(costs), delta)


def fits(budget: Budget, costs: Spending, next_cost: Cost) -> bool:
    """Whether one more release stays within the budget, by the smallest bound of `how_spent`.

    For costs that were fixed beforehand, as those of one run are by its file; see `allows`.

    Raises:
        ValueError: A count is negative.
    """
    return _fits(budget, costs, next_cost, 1)


def allows(budget: Budget, costs: Spending, next_cost: Cost) -> bool:
    """Whether a lifetime budget allows one more release, whatever led to the costs so far.

    Formal guarantee: if every release is asked for here first, all of them together are (epsilon,
    delta)-differentially private, also where *which* cost comes next was chosen by somebody who
    saw the earlier releases (a privacy filter: Rogers, Roth, Ullman, Vadhan, NeurIPS 2016; Feldman,
    Zrnic, NeurIPS 2021). The smallest of several bounds would not do: each path of choices would
    take its own, and their deltas add up. Allowed are pure costs whose sum is at most epsilon:
    the privacy loss L never passes it. And else costs whose Renyi divergences at *one* order alpha,
    fixed by (epsilon, delta), sum to at most B, what the conversion allows there. On those paths
    exp((alpha - 1) (L - sum)) is a supermartingale, so E[exp((alpha - 1) L)] <= exp((alpha - 1) B),
    and the conversion, a bound of (1 - exp(epsilon - L))+ by exp((alpha - 1) L), holds as before.

    Raises:
        ValueError: A count is negative.
    """
    return _allows(budget, costs, next_cost, 1)


def forecast(budget: Budget, costs: Spending, next_cost: Cost, *, fixed: bool = False) -> int:
    """Return how many more releases at this cost the budget allows.

    Args:
        budget: The ceiling.
        costs: What was spent.
        next_cost: Of each of them.
        fixed: The costs were fixed beforehand, so that `fits` decides; else `allows`.

    Raises:
        ValueError: The release is free, or a count is negative.
    """
    if not next_cost.rho_nano:
        raise ValueError("a free release has no last one")
    holds = _fits if fixed else _allows
    if not holds(budget, costs, next_cost, 1):
        return 0
    return _last(lambda more: holds(budget, costs, next_cost, more), 1, None)


def _allows(budget: Budget, costs: Spending, next_cost: Cost, more: int) -> bool:
    if not _fits(budget, costs, next_cost, more):  # so that what is told never passes the budget
        return False
    spent = _spent({**costs, next_cost: costs.get(next_cost, 0) + more})
    pure = [(cost.pure_nano, count) for cost, count in spent if cost.pure_nano is not None]
    if len(pure) == len(spent):
        nano = sum(each * count for each, count in pure)
        if Decimal(nano).scaleb(-9) <= Decimal(budget.epsilon):
            return True
    both = {(cost.rho_nano, cost.pure_nano): count for cost, count in spent}
    return of_one_order(both, budget.epsilon, budget.delta) <= Decimal(budget.epsilon)


def _fits(budget: Budget, costs: Spending, next_cost: Cost, more: int) -> bool:
    together = {**costs, next_cost: costs.get(next_cost, 0) + more}
    if min(together.values()) < 0:
        raise ValueError("a count of costs must not be negative")
    limit = Decimal(budget.epsilon)
    return any(epsilon <= limit for epsilon, _ in _routes(_spent(together), budget.delta))


def _spent(costs: Spending) -> frozenset[tuple[Cost, int]]:
    return frozenset((cost, count) for cost, count in costs.items() if cost.rho_nano and count)


@lru_cache(maxsize=1024)
def _how_spent(costs: frozenset[tuple[Cost, int]], delta: float) -> tuple[float, Route]:
    epsilon, route = min(_routes(costs, delta), key=lambda found: found[0])
    near = float(epsilon)
    return (near if Decimal(near) >= epsilon else math.nextafter(near, math.inf)), route


def _routes(costs: frozenset[tuple[Cost, int]], delta: float) -> Iterator[tuple[Decimal, Route]]:
    """Yield every bound that applies, the quick ones first."""
    pure = {cost: count for cost, count in costs if cost.pure_nano is not None}
    all_pure = len(pure) == len(costs)
    if all_pure:
        nano = sum(cost.pure_nano * count for cost, count in pure.items() if cost.pure_nano)
        yield Decimal(nano).scaleb(-9), "pure"
    total = sum(cost.rho_nano * count for cost, count in costs)
    yield max(Decimal(0), of_zcdp(total, delta)), "zcdp"
    if not pure:
        return
    if all_pure:
        costliest = max(cost.pure_nano or 0 for cost in pure)
        found = of_randomised_response(costliest, sum(pure.values()), delta)
        if found is not None:
            yield found, "optimal"
    mixed = {(cost.rho_nano, cost.pure_nano or 0): count for cost, count in pure.items()}
    rest = sum(cost.rho_nano * count for cost, count in costs if cost not in pure)
    yield max(Decimal(0), of_renyi(rest, mixed, delta)), "renyi"


def _last(holds: Callable[[int], bool], low: int, high: int | None) -> int:
    """Return the last number from `low` on for which `holds`; it holds at `low`, not far above."""
    step = 1
    while (high is None or low + step <= high) and holds(low + step):
        low, step = low + step, 2 * step
    high = low + step if high is None else min(low + step, high + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta} must be strictly between 0 and 1")
