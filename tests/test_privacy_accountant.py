"""Conversions never give more than was paid, and agree with an independent accountant."""

from __future__ import annotations

import math
from collections import Counter
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, pld
from dp_accounting.pld import privacy_loss_distribution as losses
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm

from p2pfed.privacy.accountant import (
    NANO,
    Budget,
    Cost,
    allows,
    epsilon_spent,
    fits,
    forecast,
    how_spent,
    pure_nano_allowed,
    rho_nano_allowed,
    rho_nano_cost,
)
from p2pfed.privacy.composition import of_randomised_response, of_zcdp

EPSILON = st.floats(1e-6, 1e6)
DELTA = st.floats(1e-300, 0.999)


def zcdp(rho_nano):
    """One release that is (1e-9 rho_nano)-zCDP."""
    return {Cost(rho_nano, None): 1} if rho_nano else {}


def pure(epsilon, count=1):
    return {Cost.pure(Fraction(epsilon)): count}


# -- budgets and costs ---------------------------------------------------------------------------


@pytest.mark.slow
@settings(deadline=None)
@given(EPSILON, DELTA)
def test_formal_guarantee_spending_the_whole_budget_never_passes_its_epsilon(epsilon, delta):
    assert epsilon_spent(zcdp(rho_nano_allowed(epsilon, delta)), delta) <= epsilon


@pytest.mark.slow
@settings(deadline=None)
@given(EPSILON, DELTA)
def test_the_budget_wastes_less_than_one_nano_rho(epsilon, delta):
    assert epsilon_spent(zcdp(rho_nano_allowed(epsilon, delta) + 1), delta) >= epsilon


@pytest.mark.slow
@settings(deadline=None)
@given(st.integers(0, 10**15), DELTA)
def test_the_epsilon_told_covers_what_was_spent(rho_nano, delta):
    # Told epsilon, read back as a budget, is worth at least the nano-rho that were spent.
    assert rho_nano_allowed(epsilon_spent(zcdp(rho_nano), delta), delta) >= rho_nano - 1


@settings(deadline=None)
@given(st.fractions(0, 100))
def test_costs_are_rounded_up(rho):
    assert rho * NANO <= rho_nano_cost(rho) < rho * NANO + 1


COSTS = st.one_of(
    st.integers(1, 10**10).map(lambda nano: Cost(nano, None)),
    st.fractions(Fraction(1, 1000), 3).map(Cost.pure),
)


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(COSTS, st.integers(1, 9)), min_size=1, max_size=4), DELTA)
def test_formal_guarantee_epsilon_never_falls_when_a_cost_is_added(spent, delta):
    told, together = [epsilon_spent({}, delta)], Counter()
    for cost, count in spent:
        together[cost] += count
        told.append(epsilon_spent(together, delta))
    assert told[0] == 0
    assert told == sorted(told)


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(st.dictionaries(COSTS, st.integers(1, 9), max_size=3), COSTS, st.floats(0.1, 50))
def test_the_forecast_is_the_last_release_that_fits(spent, cost, epsilon):
    budget = Budget(epsilon, 1e-5)
    for fixed, holds in ((True, fits), (False, allows)):
        more = forecast(budget, spent, cost, fixed=fixed)
        together = {**spent, cost: spent.get(cost, 0) + more}
        assert more == 0 or epsilon_spent(together, 1e-5) <= epsilon
        assert not holds(budget, together, cost)


def test_a_refusal_and_the_told_epsilon_agree():
    budget, cost = Budget(3.0, 1e-5), Cost.zcdp(Fraction(1, 20))
    left = forecast(budget, {}, cost, fixed=True)
    assert epsilon_spent({cost: left}, 1e-5) <= 3 < epsilon_spent({cost: left + 1}, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 7, 300])
@pytest.mark.parametrize("epsilon", [0.5, 3.0, 30.0])
def test_the_largest_pure_share_fits_and_one_more_nano_does_not(epsilon, count):
    nano = pure_nano_allowed(epsilon, 1e-5, count)
    assert nano >= math.floor(Fraction(epsilon) * NANO) // count  # never worse than the plain sum
    for more, within in ((0, True), (1, False)):
        costs = {Cost.pure(Fraction(nano + more, NANO)): count}
        assert (epsilon_spent(costs, 1e-5) <= epsilon) == within


# -- costs that somebody chooses who has seen the earlier releases ---------------------------------


def answers(number, e, epsilon):
    """E[(1 - exp(epsilon - L))+] for so many answers of randomised response."""
    loss = (2 * np.arange(number + 1) - number) * e
    chance = binom.pmf(np.arange(number + 1), number, 1 / (1 + math.exp(-e)))
    return float((chance * np.maximum(0, -np.expm1(np.minimum(epsilon - loss, 0)))).sum())


def gaussian(rho, epsilon):
    """The same for one Gaussian release: Balle, Wang 2018, Theorem 8."""
    mu = math.sqrt(2 * rho)
    high, low = (sign * mu / 2 - epsilon / mu for sign in (1, -1))
    return norm.cdf(high) - math.exp(epsilon) * norm.cdf(low)


def delta_of_the_one_who_chooses(budget, first, holds):
    """After `first` answers: more of them, or what a Gaussian release may cost, as the loss stands.

    Exact, with the true laws of the releases; `first` of 10 that would fit if all were answers.
    """
    cost = Cost.pure(Fraction(pure_nano_allowed(budget.epsilon, budget.delta, 10), NANO))
    e, spent = cost.pure_nano / NANO, {cost: first}
    more = 0
    while holds(budget, {cost: first + more}, cost):
        more += 1
    nano = 0
    for step in (10**8, 10**7, 10**6):
        while holds(budget, spent, Cost(nano + step, None)):
            nano += step
    total = 0.0
    for lies in range(first + 1):
        left = budget.epsilon - (2 * lies - first) * e
        chance = binom.pmf(lies, first, 1 / (1 + math.exp(-e)))
        total += chance * max(answers(more, e, left), gaussian(nano / NANO, left))
    return total


@pytest.mark.slow
@pytest.mark.parametrize(("epsilon", "delta"), [(3.0, 1e-3), (1.0, 1e-5)])
def test_formal_guarantee_a_lifetime_budget_holds_whoever_chooses_the_next_cost(epsilon, delta):
    """The smallest of several bounds is none where costs are chosen on the way; one order is."""
    budget = Budget(epsilon, delta)
    assert delta_of_the_one_who_chooses(budget, 5, fits) > 1.005 * delta
    assert delta_of_the_one_who_chooses(budget, 5, allows) <= delta


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(st.dictionaries(COSTS, st.integers(1, 9), max_size=3), COSTS, st.floats(0.1, 50))
def test_what_is_allowed_is_never_told_above_the_budget(spent, cost, epsilon):
    budget = Budget(epsilon, 1e-5)
    if allows(budget, spent, cost):
        assert epsilon_spent({**spent, cost: spent.get(cost, 0) + 1}, 1e-5) <= epsilon


def test_a_budget_spent_as_zcdp_alone_is_spent_to_the_last_nano():
    for epsilon in (0.3, 3.0, 30.0):
        budget = Budget(epsilon, 1e-5)
        assert allows(budget, {}, Cost(budget.rho_nano, None))
        assert not allows(budget, {}, Cost(budget.rho_nano + 1, None))


# -- the routes, by their published values -------------------------------------------------------


def test_the_told_route_is_never_above_the_textbook_conversion():
    log = math.log(1e5)
    for rho in (0.01, 0.3, 1.0, 4.0):
        told = epsilon_spent({Cost.zcdp(Fraction(rho)): 1}, 1e-5)
        assert told <= rho + 2 * math.sqrt(rho * log)
    simple = (math.sqrt(10 + log) - math.sqrt(log)) ** 2
    assert rho_nano_allowed(10, 1e-5) > simple * NANO
    assert epsilon_spent({}, 1e-5) == 0
    assert Budget(10, 1e-5).rho_nano == rho_nano_allowed(10, 1e-5)


def exact_delta(epsilon, e, k):
    """Kairouz, Oh, Viswanath 2015: the delta of k answers of randomised response, in floats."""
    terms = (
        math.comb(k, lies) * max(0.0, math.exp((k - lies) * e) - math.exp(epsilon + lies * e))
        for lies in range(k + 1)
    )
    return math.fsum(terms) / (1 + math.exp(e)) ** k


@pytest.mark.parametrize(("e", "k"), [(0.1, 100), (0.5, 10), (1.0, 30), (0.05, 300), (1.0, 1)])
@pytest.mark.parametrize("delta", [1e-9, 1e-6, 1e-2])
def test_formal_guarantee_the_optimal_composition_has_exactly_its_delta(e, k, delta):
    epsilon = float(of_randomised_response(round(e * NANO), k, delta))
    if epsilon > 0:
        assert exact_delta(epsilon, e, k) == pytest.approx(delta, rel=1e-6)


@pytest.mark.parametrize(
    ("costs", "route"),
    [
        (pure("1/2"), "optimal"),
        (pure(10), "optimal"),
        (pure("1/10", 300), "optimal"),
        (zcdp(10**8), "zcdp"),
        ({**pure("1/10", 5), **pure(1), **zcdp(10**7)}, "renyi"),
    ],
    ids=["one", "one large", "many equal", "gaussian", "mixed"],
)
def test_the_smallest_route_is_told_by_name(costs, route):
    assert how_spent(costs, 1e-6)[1] == route


# -- against an independent accountant -----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.001, 0.05, 0.5, 3.0])
@pytest.mark.parametrize("delta", [1e-8, 1e-5, 1e-2])
def test_the_zcdp_route_is_what_an_independent_renyi_accountant_says(rho, delta):
    """dp-accounting searches a grid of orders, so it can only be above ours; by little."""
    orders = [1 + 10 ** (exponent / 100) for exponent in range(-300, 401)]
    other = RdpAccountant(orders)
    other.compose(GaussianDpEvent(math.sqrt(1 / (2 * rho))))  # sensitivity 1
    theirs = other.get_epsilon(delta)
    ours = float(of_zcdp(round(rho * NANO), delta))
    assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-6)
    assert ours <= theirs * (1 + 1e-9) + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(("e", "k"), [(0.1, 50), (0.5, 20), (1.0, 8), (2.0, 3)])
def test_the_optimal_route_is_what_independent_loss_distributions_say(e, k):
    """Randomised response of two answers as a loss distribution, composed with itself."""
    response = losses.from_randomized_response(
        2 / (1 + math.exp(e)), 2, value_discretization_interval=1e-4
    )
    theirs = response.self_compose(k).get_epsilon_for_delta(1e-5)
    ours = float(of_randomised_response(round(e * NANO), k, 1e-5))
    assert ours == pytest.approx(theirs, rel=1e-3, abs=k * 1e-4)


@pytest.mark.slow
def test_formal_guarantee_no_route_is_below_what_the_true_mechanisms_need():
    """Gaussian and Laplace rounds together: their true loss distribution needs no more."""
    sigma, scale, delta = 4.0, 2.0, 1e-5  # for sensitivity 1
    true = losses.from_gaussian_mechanism(sigma, value_discretization_interval=1e-3)
    true = true.self_compose(6)
    laplace = losses.from_laplace_mechanism(scale, value_discretization_interval=1e-3)
    true = true.compose(laplace.self_compose(5))
    needed = true.get_epsilon_for_delta(delta)
    costs = {
        Cost.zcdp(Fraction(1) / (2 * Fraction(sigma) ** 2)): 6,
        Cost.pure(Fraction(1) / Fraction(scale)): 5,
    }
    told = epsilon_spent(costs, delta)
    assert needed <= told <= 1.5 * needed
    assert isinstance(true, pld.privacy_loss_distribution.PrivacyLossDistribution)


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epsilon", "delta"),
    [
        (0, 0.1),
        (-1, 0.1),
        (math.inf, 0.1),
        (math.nan, 0.1),
        (1e7, 0.1),
        (1, 0),
        (1, 1),
        (1, math.nan),
    ],
)
def test_a_meaningless_budget_is_refused(epsilon, delta):
    with pytest.raises(ValueError, match=r"epsilon|delta"):
        Budget(epsilon, delta)


def test_negative_amounts_are_refused():
    with pytest.raises(ValueError, match="rho"):
        rho_nano_cost(Fraction(-1))
    with pytest.raises(ValueError, match="rho_nano"):
        Cost(-1, None)
    with pytest.raises(ValueError, match="count"):
        epsilon_spent({Cost(1, None): -1}, 0.5)
    with pytest.raises(ValueError, match="epsilon"):
        rho_nano_allowed(-1.0, 0.5)
    with pytest.raises(ValueError, match="free"):
        forecast(Budget(1, 1e-5), {}, Cost.nothing())


def test_a_bound_below_zero_is_told_as_zero():
    assert of_zcdp(1, 0.5) < Decimal(0)
    assert epsilon_spent(zcdp(1), 0.5) == 0
