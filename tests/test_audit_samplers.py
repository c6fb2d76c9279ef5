"""The audit of the samplers: its bound, its exact laws, and what it notices."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from p2pfed.audit import samplers
from p2pfed.audit.samplers import FALSE_ALARM, fits, reach


@pytest.mark.slow
def test_every_sampler_follows_its_law_and_draws_noise_of_its_own():
    found = samplers.findings(quick=False)
    assert [finding for finding in found if not finding.passed] == []
    assert len(found) <= samplers._TESTS
    assert len({finding.name for finding in found}) == len(found)


def test_the_quick_audit_asks_the_same_questions():
    found = samplers.findings(quick=True)
    assert all(finding.passed for finding in found)
    laws = {finding.name.split("/")[1] for finding in found}
    assert laws == {"geometric", "laplace", "gaussian", "pairs", "trials", "subset", "own noise"}


def test_the_bound_is_the_one_of_dvoretzky_kiefer_and_wolfowitz():
    """2 exp(-2 n t^2) for each of the tests adds up to the false-alarm probability."""
    for count in (100, 10**6):
        alarm = 2 * np.exp(-2 * count * reach(count) ** 2)
        assert alarm * samplers._TESTS == pytest.approx(FALSE_ALARM)


def test_the_bound_is_no_smaller_than_the_exact_law_of_the_distance_needs():
    """scipy's exact law of the distance for continuous laws, which are the worst ones."""
    alarm = stats.kstwo.sf(reach(1000), 1000)
    assert 0 < alarm <= FALSE_ALARM / samplers._TESTS


POINTS = np.arange(-3000, 3001)


@pytest.mark.parametrize("scale", [Fraction(3), Fraction(40), Fraction(1000)])
def test_the_geometric_and_laplace_laws_are_those_of_scipy(scale):
    step = 1 / float(scale)
    geometric = stats.geom(-np.expm1(-step), loc=-1).cdf(POINTS[3000:])
    assert np.allclose(samplers._geometric(scale)(POINTS[3000:]), geometric, atol=1e-12)
    laplace = stats.dlaplace(step).cdf(POINTS)
    assert np.allclose(samplers._laplace(scale)(POINTS), laplace, atol=1e-12)


@pytest.mark.parametrize("scale", [Fraction(3), Fraction(1000), Fraction(10**6)])
def test_the_low_digit_is_a_geometric_number_of_which_only_the_rest_is_kept(scale):
    step = 1 / float(scale)
    weight = np.exp(-np.arange(256) * step)
    assert np.allclose(samplers._low_digit(scale)(np.arange(256)), np.cumsum(weight) / weight.sum())


def test_a_wide_gaussian_is_told_by_the_normal_law_as_well_as_by_its_weights():
    sigma2, points = Fraction(1990**2), np.arange(-6000, 6001, 37)
    normal = stats.norm(scale=1990).cdf(points + 0.5)
    assert np.abs(samplers._gaussian(sigma2)(points) - normal).max() < 1e-7
    wide = samplers._gaussian(Fraction(10**12))(np.array([-(10**6), 0, 10**6]))
    assert np.allclose(wide, stats.norm.cdf([-1, 0, 1]), atol=1e-6)


def test_a_sample_of_another_law_is_noticed():
    numbers = stats.geom(0.28, loc=-1).rvs(20_000, random_state=1)  # scale 3.04
    assert fits("right", numbers, lambda k: 1 - 0.72 ** (k + 1.0)).passed
    assert not fits("wrong", numbers, samplers._geometric(Fraction(7, 2))).passed


def test_pairs_that_depend_on_each_other_are_noticed():
    numbers = stats.geom(-np.expm1(-1 / 3), loc=-1).rvs(40_000, random_state=2)
    assert samplers._neighbours("free", numbers).passed
    assert not samplers._neighbours("bound", np.repeat(numbers, 2)).passed


def test_the_audit_leaves_other_generators_as_they_were():
    random.seed(3)
    torch.manual_seed(3)
    state = random.getstate(), torch.get_rng_state(), np.random.mtrand._rand.get_state()[1].copy()
    samplers._after_seeds()
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert np.array_equal(np.random.mtrand._rand.get_state()[1], state[2])


def test_numbers_that_are_missing_are_not_taken_for_different_ones():
    empty = np.empty(0, np.int64)
    assert not samplers._differ("a", "b", empty, empty).passed
    assert not samplers._differ("a", "b", np.arange(3), empty).passed
    assert not samplers._differ("a", "b", np.arange(3), np.array([7, 1, 9])).passed
    assert samplers._differ("a", "b", np.arange(3), np.arange(1, 4)).passed
