"""Zero-concentrated differential privacy: what a release costs and what a budget allows.

Map: `Budget` (epsilon, delta) -> integer nano-rho it allows; nano-rho spent -> epsilon to tell.

Invariant: amounts are integers of 1e-9 rho; costs are rounded up, budgets down and reported
epsilons up, so no chain of conversions ever gives more than was paid.

Source: Bun, Steinke, "Concentrated Differential Privacy: Simplifications, Extensions, and Lower
Bounds", TCC 2016 (arXiv:1605.02658): Lemma 2.3 (composition adds rho) and Proposition 1.3
(rho-zCDP gives (rho + 2 sqrt(rho ln(1/delta)), delta)-DP).

Not here: where the amounts are kept (`ledger`), what a mechanism costs (its plan).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Context, Decimal, localcontext
from fractions import Fraction

__all__ = ["NANO", "Budget", "epsilon_spent", "rho_nano_allowed", "rho_nano_cost"]

NANO = 10**9  # nano-rho per rho

_PRECISION = 60
_SLACK = Decimal("1e-30")  # far above the rounding of a few operations at 60 digits


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
        if not 0 < self.epsilon <= 1e6:
            raise ValueError(f"epsilon={self.epsilon} must be positive and at most 1e6")
        _check_delta(self.delta)

    @property
    def rho_nano(self) -> int:
        """What the budget allows, in nano-rho, rounded down."""
        return rho_nano_allowed(self.epsilon, self.delta)


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

    (sqrt(epsilon + L) - sqrt(L))^2 with L = ln(1 / delta), the inverse of `epsilon_spent`.

    Raises:
        ValueError: `epsilon` is negative or not finite, or `delta` is not in (0, 1).
    """
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon={epsilon} must be finite and not negative")
    with localcontext(Context(prec=_PRECISION)):
        log = _log_inverse(delta)
        root = Decimal(epsilon) / ((Decimal(epsilon) + log).sqrt() + log.sqrt())  # no cancellation
        nano = root * root * (1 - _SLACK) * NANO
        return int(nano.to_integral_value(ROUND_FLOOR))


def epsilon_spent(rho_nano: int, delta: float) -> float:
    """Return the epsilon at `delta` of `rho_nano`, rounded up: rho + 2 sqrt(rho ln(1 / delta)).

    Raises:
        ValueError: `rho_nano` is negative or `delta` is not in (0, 1).
    """
    if rho_nano < 0:
        raise ValueError(f"rho_nano={rho_nano} must not be negative")
    with localcontext(Context(prec=_PRECISION)):
        rho = Decimal(rho_nano) / NANO
        epsilon = (rho + 2 * (rho * _log_inverse(delta)).sqrt()) * (1 + _SLACK)
        near = float(epsilon)
        return near if Decimal(near) >= epsilon else math.nextafter(near, math.inf)


def _log_inverse(delta: float) -> Decimal:
    _check_delta(delta)
    return -Decimal(delta).ln()


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta} must be strictly between 0 and 1")
