"""The audit of the law: exact laws by replay, what two laws show, and that the product holds."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from p2pfed.audit import distinguishing, enumeration
from p2pfed.audit.cases import Book, Case
from p2pfed.audit.enumeration import GROUPS
from p2pfed.audit.replay import Law, epsilon, law_of, zcdp
from p2pfed.privacy.gaussian import GaussianPlan
from p2pfed.privacy.noise import Trials
from p2pfed.privacy.units import HOSPITAL, PATIENT


def law(**chance):
    return Law(chance, 0.0, 1, consistent=True)


# -- replay -------------------------------------------------------------------------------------


def test_a_replayed_program_has_its_exact_law():
    """Two geometric numbers and a subset; every probability is known."""

    def program(noise):
        a, b = noise.geometric(2, Fraction(1, 2)).tolist()
        return min(a, 1), min(b, 1), bool(noise.subset(3, 1)[0])

    found = law_of(program, floor=1e-12)
    first = -math.expm1(-2)
    for a, b, kept in itertools.product((0, 1), (0, 1), (False, True)):
        exact = (1 - first if a else first) * (1 - first if b else first) * (1 + (not kept)) / 3
        assert found.probability[a, b, kept] <= exact <= found.at_most((a, b, kept))
    assert found.missing < 1e-9


@pytest.mark.parametrize(
    ("draw", "exact"),
    [
        (lambda noise: noise.geometric(1, Fraction(2)), stats.geom(-math.expm1(-0.5), loc=-1).pmf),
        (lambda noise: noise.laplace(1, Fraction(2)), stats.dlaplace(0.5).pmf),
        (
            lambda noise: noise.gaussian(1, Fraction(2)),
            lambda y: math.exp(-y * y / 4) / sum(math.exp(-k * k / 4) for k in range(-40, 41)),
        ),
    ],
    ids=["geometric", "laplace", "gaussian"],
)
def test_single_numbers_have_their_laws(draw, exact):
    found = law_of(lambda noise: int(draw(noise)[0]), floor=1e-10)
    assert len(found.probability) > 15
    for value, chance in found.probability.items():
        assert chance == pytest.approx(exact(value), rel=1e-9)
    assert sum(found.probability.values()) + found.missing == pytest.approx(1, abs=1e-12)
    assert found.missing < 1e-8


def trials(near, exact, **bounds):
    return Trials(
        count=len(exact),
        near=lambda asked: np.array(near)[asked],
        exact=lambda i: Fraction(exact[i]),
        **bounds,
    )


def test_trials_succeed_with_their_probabilities():
    row = trials([0.0, 1.0, 2000.0], [0, 1, 2000])
    found = law_of(lambda noise: tuple(noise.successes(row).tolist()))
    assert found.probability == pytest.approx({(0, 1): math.exp(-1), (0,): -math.expm1(-1)})
    assert found.consistent


@pytest.mark.parametrize(
    "row",
    [
        trials([1.0 + 1e-9], [1]),
        trials([1.0], [1], least=1.5),
        trials([1.0], [1], most=0.5),
    ],
    ids=["near", "least", "most"],
)
def test_trials_that_contradict_themselves_are_noticed(row):
    assert not law_of(lambda noise: tuple(noise.successes(row).tolist())).consistent


def test_what_is_left_out_is_never_held_against_a_program():
    """A coarse floor leaves much out: what it shows is less, never more."""

    def law_at(shift, floor):
        return law_of(lambda noise: int(noise.geometric(1, Fraction(2))[0]) + shift, floor=floor)

    exact = 0.5  # of a shift by one: P(k) = e^-0.5 P(k - 1)
    shown = [epsilon(law_at(1, floor), law_at(0, floor)) for floor in (1e-2, 1e-4, 1e-9)]
    assert shown == sorted(shown)
    assert 0.9 * exact < shown[-1] <= exact


# -- what two laws show -------------------------------------------------------------------------


def test_epsilon_is_the_largest_log_ratio():
    assert epsilon(law(a=0.75, b=0.25), law(a=0.25, b=0.75)) == pytest.approx(math.log(3))
    assert epsilon(law(a=0.5, b=0.5), law(a=1.0)) == math.inf


def test_zcdp_of_a_shifted_discrete_gaussian_is_what_theory_says():
    """Canonne, Kamath, Steinke: rho = shift^2 / (2 sigma^2), reached at whole alpha."""

    def shifted(by):
        return law_of(lambda noise: int(noise.gaussian(1, Fraction(4))[0]) + by, floor=1e-14)

    assert zcdp(shifted(1), shifted(0)) == pytest.approx(1 / 8, rel=1e-3)
    assert zcdp(law(a=1.0), law(b=1.0)) == math.inf


# -- neighbours ---------------------------------------------------------------------------------


def gaussian_plan(unit, rho=2):
    return GaussianPlan(num_parameters=1, clip=1, bits=0, rho=Fraction(rho), unit=unit)


@pytest.mark.parametrize("unit", [PATIENT, GROUPS, HOSPITAL], ids=["patient", "groups", "hospital"])
def test_neighbours_are_zero_out_for_patients_and_replacement_for_others(unit):
    case = Case(plan=gaussian_plan(unit), others=[(2,)], own=[(1,), (-1,)])
    pairs = [(one.ravel().tolist(), other.ravel().tolist()) for one, other in case.neighbours()]
    if unit == PATIENT:
        assert pairs == [([1, 1, 1], [0, 1, 1]), ([-1, 1, 1], [0, 1, 1])]
    else:
        assert ([1, 1, 1], [-1, 1, 1]) in pairs
        assert len(pairs) == 4


def release(plan, rows):
    return enumeration._release(plan, rows)


def test_a_claim_fails_where_it_is_broken_and_where_it_was_not_tested():
    book = Book([Case(plan=gaussian_plan(PATIENT), others=[(0,)], own=[(1,)])], release)
    assert book.judge("right", zcdp, lambda plan: plan.rho, least=0.9).passed
    assert not book.judge("too little", zcdp, lambda plan: plan.rho / 2, least=0.9).passed
    assert not book.judge("not reached", zcdp, lambda plan: plan.rho * 2, least=0.9).passed


def test_a_definition_of_another_law_is_noticed():
    book = Book([Case(plan=gaussian_plan(PATIENT), others=[(0,)], own=[(1,)])], release)
    assert book.defined("same", release).passed
    assert not book.defined(
        "other", lambda plan, rows: release(gaussian_plan(PATIENT, 3), rows)
    ).passed


# -- the product --------------------------------------------------------------------------------


def test_the_first_claim_of_the_audit_holds():
    finding = next(enumeration.textbook(quick=True))
    assert finding.name == "law/svt-textbook/choice"
    assert finding.passed


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", ["textbook", "segmented", "sequential", "values", "gaussian", "worth"]
)
def test_formal_guarantee_every_mechanism_keeps_its_claim(part):
    """Its own code, exactly; the quick cases are the first of these."""
    found = [*getattr(enumeration, part)(quick=False)]
    assert [finding for finding in found if not finding.passed] == []


@pytest.mark.slow
def test_the_findings_are_those_of_all_parts():
    names = [finding.name for finding in enumeration.findings(quick=True)]
    assert len(set(names)) == len(names)
    assert {name.split("/")[1] for name in names} == {
        "svt-textbook",
        "svt",
        "gaussian",
        "worth-gate",
    }


# -- distinguishing -----------------------------------------------------------------------------


def test_two_laws_that_differ_are_told_apart_within_their_epsilon():
    rng = np.random.default_rng(4)
    inside = (rng.random(4000) < 0.75).tolist()
    outside = (rng.random(4000) < 0.25).tolist()
    assert 0.7 * math.log(3) < distinguishing.shown(inside, outside, 0.0) <= math.log(3)
    assert distinguishing.shown(outside, inside, 0.0) == distinguishing.shown(inside, outside, 0.0)


def test_equal_laws_show_nothing_and_a_large_delta_excuses_all():
    rng = np.random.default_rng(5)
    one, other = rng.integers(0, 9, (2, 4000)).tolist()
    assert distinguishing.shown(one, other, 0.0) == 0
    assert distinguishing.shown([1] * 100, [0] * 100, 1.0) == 0


def test_an_event_is_picked_from_the_first_half_alone():
    """What the first half shows by chance does not count: the second half decides."""
    inside, outside = [*range(1000), *range(2000, 3000)], [*range(1000, 2000), *range(3000, 4000)]
    assert distinguishing.shown(inside, outside, 0.0) == 0


@pytest.mark.slow
def test_no_mechanism_is_told_apart_better_than_it_claims():
    """False-alarm probability 1e-6 in all."""
    found = distinguishing.findings(quick=True)
    assert [finding for finding in found if not finding.passed] == []
    assert len({finding.name for finding in found}) == len(distinguishing._games())
    assert 2 * 2 * len(found) * len(distinguishing._CUTS) <= distinguishing._RATES
