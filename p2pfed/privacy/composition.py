"""The mathematics of composition: four proven ways from what was paid to an epsilon at a delta.

Map: `of_zcdp` (a sum of rho), `of_randomised_response` (k equal pure releases), `of_renyi`
(anything mixed), each an upper bound of the true epsilon; `largest_rho_nano` inverts the first.

Invariant: a result is never below the exact value of its formula. Everything is computed in
`Decimal` with 60 digits, where +, -, *, / , sqrt, exp and ln are correctly rounded, hence equal on
every machine and wrong by less than 1e-59 of the result of each step; at most 10^5 steps meet in
one sum. `_SLACK` (1e-40 of the largest term) is added at the end and covers them all. A search
only *proposes* an order alpha; every order gives a valid bound, so no search can be unsafe.

Sources: Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020
(arXiv:2004.00010), Proposition 12 and Corollary 13. Kairouz, Oh, Viswanath, "The Composition
Theorem for Differential Privacy", ICML 2015 (arXiv:1311.0776), Theorem 3.3. Mironov, "Renyi
Differential Privacy", CSF 2017 (arXiv:1702.07476). Bun, Steinke, TCC 2016 (arXiv:1605.02658).

Not here: what a release costs and which way is the best (`accountant`).
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_FLOOR, Context, Decimal, localcontext
from functools import lru_cache

__all__ = [
    "MOST_RESPONSES",
    "NANO",
    "largest_rho_nano",
    "of_one_order",
    "of_randomised_response",
    "of_renyi",
    "of_zcdp",
]

NANO = 10**9  # units per rho and per pure epsilon
MOST_RESPONSES = 20_000  # `of_randomised_response` takes about a microsecond for each

_EXACT = Context(prec=60)
_SEARCH = Context(prec=30)
_SLACK = Decimal("1e-40")
_STEEPEST = Decimal(50)  # keeps every power of e within the exponents of Decimal
_ORDERS = 330  # of `of_renyi`: alpha - 1 from 0.01 to 10^5 in steps of 5 %


@lru_cache(maxsize=1024)
def of_zcdp(rho_nano: int, delta: float) -> Decimal:
    """Return the epsilon at `delta` of (1e-9 rho_nano)-zCDP; negative where it is 0 with room.

    Formal guarantee: rho-zCDP gives (epsilon, delta)-DP for every alpha > 1 with
    delta = exp((alpha - 1)(alpha rho - epsilon)) / (alpha - 1) * (1 - 1 / alpha)^alpha (Canonne,
    Kamath, Steinke 2020, Proposition 12 / Corollary 13). Solved for epsilon:

        alpha rho + ln(1 - 1 / alpha) + (L - ln alpha) / (alpha - 1),    L = ln(1 / delta).

    Its derivative has the sign of rho x^2 + ln(1 + x) - L with x = alpha - 1, which grows in x:
    one root, the minimum. At x = sqrt(L / rho), the start of the search, the value is
    rho + 2 sqrt(rho L) (Bun, Steinke 2016, Proposition 1.3) plus two terms that are never
    positive, so this bound is never above that one.
    """
    with localcontext(_EXACT):
        rho, log = Decimal(rho_nano) / NANO, -Decimal(delta).ln()
        return _epsilon_at(_best_order(rho, log, delta), rho, log)


@lru_cache(maxsize=1024)
def largest_rho_nano(epsilon: float, delta: float) -> int:
    """Return the largest whole nano-rho for which `of_zcdp` is at most `epsilon`.

    The bound is concave in rho with slope alpha (an infimum of lines), so Newton's steps rise to
    the answer from below; the last step is checked one by one.
    """
    with localcontext(_EXACT):
        target, log = Decimal(epsilon), -Decimal(delta).ln()
        root = target / ((target + log).sqrt() + log.sqrt())  # Bun, Steinke: never too much
        nano = _floor(root * root * NANO)
        while True:
            rho = Decimal(nano) / NANO
            x = _best_order(rho, log, delta)
            step = _floor((target - _epsilon_at(x, rho, log)) / (1 + x) * NANO)
            if step < 1:
                break
            nano += step
    while of_zcdp(nano + 1, delta) <= target:
        nano += 1
    while nano and of_zcdp(nano, delta) > target:
        nano -= 1
    return nano


@lru_cache(maxsize=4096)
def of_randomised_response(pure_nano: int, count: int, delta: float) -> Decimal | None:
    """Return the epsilon at `delta` of `count` releases that are (1e-9 pure_nano)-DP each.

    Formal guarantee: exact and the best possible. Under adaptive composition of k mechanisms that
    are e-DP each, no pair of outcome laws is further apart than k answers of randomised response
    (Kairouz, Oh, Viswanath 2015, Theorem 3.3), for which with l "lies" among k answers

        delta(epsilon) = sum_l C(k, l) max(0, exp((k - l) e) - exp(epsilon + l e)) / (1 + exp e)^k.

    Their theorem lists the corners epsilon = (k - 2 i) e; between two of them exp(epsilon) enters
    linearly, so the equation is solved there exactly. A sum of positive parts is the largest of
    all partial sums A_m - exp(epsilon) B_m, hence exp(epsilon) = max over m of
    (A_m - delta) / B_m; and since the ratio of the added terms falls with m, no later m can pass
    a value that this ratio has fallen below: the loop ends there.

    Returns:
        The epsilon, or None where the answer would take too long or too many digits.
    """
    with localcontext(_EXACT):
        epsilon = Decimal(pure_nano) / NANO
        if count > MOST_RESPONSES or epsilon > _STEEPEST:
            return None
        lie, truth = (-epsilon).exp(), epsilon.exp()
        ratio, step = Decimal(1), lie * lie * (1 + _SLACK)  # of the m-th terms, over the 0-th
        above, below = Decimal(0), Decimal(0)  # A_m and B_m, over their 0-th terms
        above_term, below_term = Decimal(1), Decimal(1)
        share = ((1 + lie).ln() * count).exp() * Decimal(delta) * (1 - _SLACK)
        best = Decimal(0)
        for lies in range((count + 1) // 2):
            if best > 0 and ratio <= best:
                break
            above += above_term
            below += below_term
            best = max(best, (above * (1 + _SLACK) - share) / (below * (1 - _SLACK)))
            choose = Decimal(count - lies) / (lies + 1)
            above_term *= choose * lie
            below_term *= choose * truth
            ratio *= step
        if best <= 0:
            return Decimal(0)
        return max(Decimal(0), count * epsilon + best.ln() + _SLACK * (1 + count * epsilon))


def of_renyi(rho_nano: int, mixed: Mapping[tuple[int, int], int], delta: float) -> Decimal:
    """Return the epsilon at `delta` of zCDP releases together with pure ones.

    Formal guarantee: Renyi divergences of one order add up under adaptive composition (Mironov
    2017, Proposition 1). A release that is rho-zCDP has at most alpha rho; one that is e-DP has at
    most that of randomised response, ln((exp(alpha e) + exp((1 - alpha) e)) / (1 + exp e)) /
    (alpha - 1), for every e-DP pair is a post-processing of it (Kairouz, Oh, Viswanath 2015,
    Theorem 2.3); one that is both has at most the smaller. The conversion is that of `of_zcdp`
    with alpha rho replaced by the sum. The orders are fixed, so this grows with what was paid.

    Args:
        rho_nano: Sum over the releases that are not pure.
        mixed: (rho_nano, pure_nano) of the pure ones -> how many.
        delta: As everywhere.
    """
    with localcontext(_EXACT):
        log = -Decimal(delta).ln()
        sums = [order[0] * rho_nano / NANO for order in _orders()]
        for (each, pure_nano), count in mixed.items():
            for at, curve in enumerate(_pure_curve(each, pure_nano)):
                sums[at] += count * curve
        return min(
            spent + order[2] + (log - order[1]) / (order[0] - 1) + _SLACK * (spent + log + 1000)
            for spent, order in zip(sums, _orders(), strict=True)
        )


def of_one_order(
    costs: Mapping[tuple[int, int | None], int], epsilon: float, delta: float
) -> Decimal:
    """Return the epsilon at `delta` of zCDP and pure releases by one order, fixed by the arguments.

    The order is the best for a budget (epsilon, delta) that is spent as zCDP alone; there this is
    `of_zcdp`. Since it does not depend on the costs, it may stop a process that chooses its costs
    on the way (`accountant.allows`).

    Args:
        costs: (rho_nano, pure_nano or None) -> how many.
        epsilon: Of the budget.
        delta: Of the budget.
    """
    with localcontext(_EXACT):
        order, shift = _fixed_order(epsilon, delta)
        spent = Decimal(0)
        for (rho_nano, pure_nano), count in costs.items():
            each = order * rho_nano / NANO
            if pure_nano is not None:
                each = min(each, _pure_divergence(order, Decimal(pure_nano) / NANO))
            spent += count * each
        return spent + shift + _SLACK * (1 + spent)


@lru_cache(maxsize=64)
def _fixed_order(epsilon: float, delta: float) -> tuple[Decimal, Decimal]:
    """Return alpha and what the conversion adds there."""
    with localcontext(_EXACT):
        log, nothing = -Decimal(delta).ln(), Decimal(0)
        x = _best_order(Decimal(largest_rho_nano(epsilon, delta)) / NANO, log, delta)
        return 1 + x, _epsilon_at(x, nothing, log)


def _pure_divergence(order: Decimal, epsilon: Decimal) -> Decimal:
    """Return the Renyi divergence of randomised response, rounded up."""
    whole = (1 + epsilon.exp()).ln()
    total = order * epsilon + (1 + ((1 - 2 * order) * epsilon).exp()).ln() - whole
    return (total + _SLACK * (1 + order * epsilon)) / (order - 1)


def _best_order(rho: Decimal, log: Decimal, delta: float) -> Decimal:
    """Return alpha - 1 near the root of rho x^2 + ln(1 + x) = log; any answer is safe."""
    with localcontext(_SEARCH):
        low = 2 * log / (1 + (1 + 4 * rho * log).sqrt())  # ln(1 + x) <= x
        high = 1 / Decimal(delta) - 1
        if rho:
            high = min(high, (log / rho).sqrt())
        x = high
        for _ in range(100):
            excess = rho * x * x + (1 + x).ln() - log
            low, high = (low, min(high, x)) if excess > 0 else (max(low, x), high)
            newton = x - excess / (2 * rho * x + 1 / (1 + x))
            following = newton if low < newton < high else (low * high).sqrt()
            if abs(following - x) <= x * Decimal("1e-14"):
                return following
            x = following
        return x


def _epsilon_at(x: Decimal, rho: Decimal, log: Decimal) -> Decimal:
    order = 1 + x
    parts = (order * rho, (x / order).ln(), (log - order.ln()) / x)
    return sum(parts, _SLACK * (1 + order * rho + (log + order.ln()) / x - parts[1]))


@lru_cache(maxsize=1)
def _orders() -> tuple[tuple[Decimal, Decimal, Decimal], ...]:
    """Return (alpha, ln alpha, ln(1 - 1 / alpha)) of the fixed orders."""
    with localcontext(_EXACT):
        xs = [Decimal("0.01") * Decimal("1.05") ** step for step in range(_ORDERS)]
        return tuple((1 + x, (1 + x).ln(), (x / (1 + x)).ln()) for x in xs)


@lru_cache(maxsize=256)
def _pure_curve(rho_nano: int, pure_nano: int) -> tuple[Decimal, ...]:
    """Return the Renyi divergence of one pure release at every fixed order."""
    with localcontext(_EXACT):
        rho, epsilon = Decimal(rho_nano) / NANO, Decimal(pure_nano) / NANO
        curve = [min(order * rho, _pure_divergence(order, epsilon)) for order, _, _ in _orders()]
        return tuple(curve)


def _floor(number: Decimal) -> int:
    return int(number.to_integral_value(ROUND_FLOOR))
