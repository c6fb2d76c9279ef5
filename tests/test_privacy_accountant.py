"""Conversions between epsilon, delta and nano-rho never give more than was paid."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfed.privacy.accountant import (
    NANO,
    Budget,
    epsilon_spent,
    rho_nano_allowed,
    rho_nano_cost,
)

EPSILON = st.floats(1e-6, 1e6)
DELTA = st.floats(1e-300, 0.999)


@settings(deadline=None)
@given(EPSILON, DELTA)
def test_spending_the_whole_budget_never_passes_its_epsilon(epsilon, delta):
    assert epsilon_spent(rho_nano_allowed(epsilon, delta), delta) <= epsilon


@settings(deadline=None)
@given(EPSILON, DELTA)
def test_the_budget_wastes_less_than_one_nano_rho(epsilon, delta):
    assert epsilon_spent(rho_nano_allowed(epsilon, delta) + 1, delta) >= epsilon


@settings(deadline=None)
@given(st.integers(0, 10**15), DELTA)
def test_the_epsilon_told_covers_what_was_spent(rho_nano, delta):
    # Told epsilon, read back as a budget, is worth at least the nano-rho that were spent.
    assert rho_nano_allowed(epsilon_spent(rho_nano, delta), delta) >= rho_nano - 1


@settings(deadline=None)
@given(st.fractions(0, 100))
def test_costs_are_rounded_up(rho):
    assert rho * NANO <= rho_nano_cost(rho) < rho * NANO + 1


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**10), min_size=2, max_size=5), DELTA)
def test_epsilon_grows_with_what_is_spent(amounts, delta):
    told = [epsilon_spent(amount, delta) for amount in sorted(amounts)]
    assert told == sorted(told)


def test_the_formulas_have_their_published_values():
    log = math.log(1e5)
    rho = (math.sqrt(10 + log) - math.sqrt(log)) ** 2
    assert rho_nano_allowed(10, 1e-5) == math.floor(rho * NANO)
    assert epsilon_spent(NANO, 1e-5) == pytest.approx(1 + 2 * math.sqrt(log), abs=1e-12)
    assert epsilon_spent(0, 1e-5) == 0
    assert Budget(10, 1e-5).rho_nano == rho_nano_allowed(10, 1e-5)


@pytest.mark.parametrize(
    ("epsilon", "delta"),
    [(0, 0.1), (-1, 0.1), (math.inf, 0.1), (math.nan, 0.1), (1, 0), (1, 1), (1, math.nan)],
)
def test_a_meaningless_budget_is_refused(epsilon, delta):
    with pytest.raises(ValueError, match=r"epsilon|delta"):
        Budget(epsilon, delta)


def test_negative_amounts_are_refused():
    with pytest.raises(ValueError, match="rho"):
        rho_nano_cost(Fraction(-1))
    with pytest.raises(ValueError, match="rho_nano"):
        epsilon_spent(-1, 0.5)
    with pytest.raises(ValueError, match="epsilon"):
        rho_nano_allowed(-1.0, 0.5)
