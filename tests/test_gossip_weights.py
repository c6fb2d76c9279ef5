"""Weights: exact integers, capped and bounded, against the definition in rational numbers."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from consortium import Consortium, hospital, peer_of
from hypothesis import given
from hypothesis import strategies as st
from reference_fold import weights as reference_weights

from p2pfed.gossip.weights import weight_of, weights_of
from p2pfed.identity.roster import MAX_SAMPLES
from p2pfed.identity.rules import WEIGHT_POWERS, Averaging

SAMPLES = st.integers(1, MAX_SAMPLES)
POWERS = st.sampled_from(WEIGHT_POWERS)
CAPS = st.sampled_from([Fraction(0), Fraction(1, 2), Fraction(1), Fraction("2.5"), Fraction(1000)])


@given(SAMPLES, POWERS)
def test_a_weight_is_the_power_rounded_down_and_within_bounds(samples, power):
    weight = weight_of(samples, 1, Averaging(weight_power=power))
    a, b = power.numerator, power.denominator
    exact = samples**a * MAX_SAMPLES ** (b - a)
    assert weight**b <= exact < (weight + 1) ** b
    assert 1 <= weight <= MAX_SAMPLES


@pytest.mark.parametrize(
    ("power", "samples", "weight"),
    [
        ("1", 37, 37),
        ("1", MAX_SAMPLES, MAX_SAMPLES),
        ("0", 1, MAX_SAMPLES),
        ("0", 999, MAX_SAMPLES),
        ("0.5", 1, 1 << 10),
        ("0.5", 100, 10 << 10),
        ("0.25", 16, 2 << 15),
        ("0.75", 16, 8 << 5),
        ("0.5", 2, 1448),  # 1024 times 1.41421
    ],
)
def test_powers_that_everybody_can_check(power, samples, weight):
    assert weight_of(samples, 1, Averaging(weight_power=Fraction(power))) == weight


@given(SAMPLES, SAMPLES, POWERS)
def test_more_samples_never_weigh_less(one, other, power):
    averaging = Averaging(weight_power=power)
    low, high = sorted((one, other))
    assert weight_of(low, 1, averaging) <= weight_of(high, 1, averaging)


def test_the_cap_counts_a_giant_as_a_multiple_of_the_median():
    net = Consortium(5, samples=[10, 100, 200, 300, 1_000_000])
    found = weights_of(net.roster, Averaging(sample_cap=Fraction(2)))
    assert [found[peer_of(i)] for i in range(5)] == [10, 100, 200, 300, 400]


def test_the_median_is_the_lower_one_of_those_who_train_and_never_makes_a_weight_of_nothing():
    net = Consortium(2, samples=[10, 50])
    net.grow(hospital(2, samples=900, roles=("relay",)), hospital(3, samples=0))
    found = weights_of(net.roster, Averaging(sample_cap=Fraction(1)))
    assert found == {peer_of(0): 10, peer_of(1): 10}
    assert weight_of(7, 1, Averaging(sample_cap=Fraction(1, 100))) == 1


def test_a_roster_without_members_weighs_nothing():
    assert weights_of(Consortium(0).rosters[0], Averaging(sample_cap=Fraction(2))) == {}


@given(st.lists(st.integers(0, MAX_SAMPLES), min_size=1, max_size=6), POWERS, CAPS)
def test_reference_the_weights_of_a_roster_agree_with_plain_numbers(samples, power, cap):
    averaging = Averaging(weight_power=power, sample_cap=cap)
    members = tuple(
        hospital(i, samples=n, roles=("train",) if i % 3 else ("train", "relay"))
        for i, n in enumerate(samples)
    )
    roster = replace(Consortium(1).roster, members=members)
    listed = [
        {"peer_id": m.peer_id, "roles": m.roles, "samples": m.samples} for m in roster.members
    ]
    told = averaging.encode()
    assert weights_of(roster, averaging) == reference_weights(listed, told)
