"""Every listed fault, planted into the product, is caught by the audit that ships with it.

Each test runs the audit on the untouched product first (it holds), then on the product with one
fault (it does not). A ledger that is written after the release is planted and caught in
test_privacy_crashes.py (`test_a_ledger_written_after_the_release_is_caught`).

The broken variants of Lyu, Su and Li ("Understanding the Sparse Vector Technique for Differential
Privacy", VLDB 2017, figure 1): Algorithm 3 (the true value of an accepted query goes out), 4
(unscaled query noise), 5 (no query noise, no cut-off), 6 (no cut-off). An order statistic of the
private queries as threshold (a median, say) is not among the faults: it moves by no more than the
queries do, so Lemma 1 still holds; a threshold that moves further than any query breaks it.
"""

from __future__ import annotations

import os
import re
from fractions import Fraction
from functools import cache

import numpy as np
import pytest

from p2pfed.audit import distinguishing, enumeration, samplers
from p2pfed.privacy import clipping, keystream, noise, svt
from p2pfed.privacy.accountant import Budget
from p2pfed.privacy.clipping import clipped_sum
from p2pfed.privacy.gate import release_round
from p2pfed.privacy.gaussian import GaussianPlan
from p2pfed.privacy.ledger import Ledger, ReleaseKey
from p2pfed.privacy.mechanism import Release
from p2pfed.privacy.noise import ExactNoise
from p2pfed.privacy.svt import SvtPlan
from p2pfed.privacy.textbook import TextbookPlan
from p2pfed.privacy.units import PatientRows, Unit
from p2pfed.privacy.worth import WORTH, WorthGate, WorthPlan

pytestmark = pytest.mark.slow


def failed(part):
    return {finding.name for finding in part(quick=True) if is_broken(finding)}


def is_broken(finding):
    """Not passed, and not because too little of the claim was tested."""
    share = re.search(r"\(([\d.]+|inf)%\)", finding.found)
    return not finding.passed and (share is None or float(share[1]) > 100)


@cache
def untouched(part):
    """What the audit objects to in the product as it is; asked before any fault is planted."""
    return {finding.name for finding in part(quick=True) if not finding.passed}


@pytest.fixture
def caught(monkeypatch):
    """Plant a fault, and return what the parts of the audit object to; without it they do not."""

    def find(parts, owner, name, fault):
        parts = parts if isinstance(parts, tuple) else (parts,)
        assert not any(untouched(part) for part in parts)
        monkeypatch.setattr(owner, name, fault)
        return set().union(*map(failed, parts))

    return find


def scaled(owner, factors):
    """The property `scales`, with each scale multiplied; a factor may depend on the plan."""
    honest = owner.scales.fget

    def scales(self):
        return tuple(
            scale * (factor(self) if callable(factor) else factor)
            for scale, factor in zip(honest(self), factors, strict=True)
        )

    return property(scales)


TINY = Fraction(1, 10**6)  # a scale whose noise is 0 for all that an audit could see
PLANS = pytest.mark.parametrize(
    ("part", "owner"),
    [
        (enumeration.textbook, TextbookPlan),
        (enumeration.segmented, SvtPlan),
        (enumeration.sequential, SvtPlan),
    ],
    ids=["textbook", "segmented", "sequential"],
)


def all_scales(owner, l1=1, l2=1, l3=1):
    return scaled(owner, (l1, l2, l3)[: 3 if owner is TextbookPlan else 2])


# -- the noise of the choice --------------------------------------------------------------------


@PLANS
def test_no_query_noise_is_caught(caught, part, owner):
    found = caught(part, owner, "scales", all_scales(owner, l2=TINY))
    assert any("choice" in name or "log-ratio" in name for name in found)


@PLANS
def test_no_threshold_noise_is_caught(caught, part, owner):
    found = caught(part, owner, "scales", all_scales(owner, l1=TINY))
    assert any("choice" in name or "log-ratio" in name for name in found)


@PLANS
def test_query_noise_scaled_with_one_instead_of_two_is_caught(caught, part, owner):
    found = caught(part, owner, "scales", all_scales(owner, l2=Fraction(1, 2)))
    assert any("choice" in name or "log-ratio" in name for name in found)


def test_textbook_query_noise_that_is_not_scaled_with_the_cut_off_is_caught(caught):
    fault = all_scales(TextbookPlan, l2=lambda plan: Fraction(1, plan.cutoff))
    assert "law/svt-textbook/choice" in caught(enumeration.textbook, TextbookPlan, "scales", fault)


def test_textbook_value_noise_that_is_not_scaled_with_the_cut_off_is_caught(caught):
    fault = all_scales(TextbookPlan, l3=lambda plan: Fraction(1, plan.cutoff))
    assert caught(enumeration.textbook, TextbookPlan, "scales", fault) == {
        "law/svt-textbook/release"
    }


@pytest.mark.parametrize("part", [enumeration.segmented, enumeration.sequential])
def test_noise_that_is_not_scaled_with_the_clip_is_caught(caught, part):
    fault = all_scales(SvtPlan, *[lambda plan: Fraction(1, plan.limit)] * 2)
    assert any("log-ratio" in name for name in caught(part, SvtPlan, "scales", fault))


# -- the cut-off and the threshold --------------------------------------------------------------


def test_the_textbook_form_without_a_cut_off_is_caught(caught):
    honest = TextbookPlan.select

    def select(self, *terms, **more):
        """All that pass; with the noise of the cut-off that the plan has."""
        return honest(Endless(self), *terms, **more)

    class Endless:
        def __init__(self, plan):
            self.scales, self.threshold, self.cutoff = plan.scales, plan.threshold, 1 << 30

    found = caught(enumeration.textbook, TextbookPlan, "select", select)
    assert {"law/svt-textbook/choice", "law/svt-textbook/definition"} <= found


def test_a_pass_without_a_cut_off_is_caught(caught):
    honest = svt.sequential

    def sequential(found, *, cutoff, **terms):
        return honest(found, cutoff=found.blocks.size, **terms)

    found = caught(enumeration.sequential, svt, "sequential", sequential)
    assert {"law/svt/sequential/log-ratio", "law/svt/sequential/definition"} <= found


def test_a_segment_that_does_not_stop_is_caught(caught):
    def segmented(found, *, segment_blocks, scale, noise, **terms):
        segment = terms["position_C"] // segment_blocks
        threshold = dict.fromkeys(sorted(set(segment.tolist())))
        drawn = noise.geometric(len(threshold), scale)
        threshold = dict(zip(threshold, drawn.tolist(), strict=True))
        bound = np.array([threshold[s] for s in segment.tolist()], np.int64)
        return found.blocks[found.excess >= bound]

    found = caught(enumeration.segmented, svt, "segmented", segmented)
    assert {"law/svt/segmented/log-ratio", "law/svt/segmented/definition"} <= found


def test_a_threshold_that_is_not_drawn_again_after_an_acceptance_is_caught(caught):
    """By the definition: with so few acceptances the claim itself is not broken yet."""
    honest = svt.sequential

    def sequential(found, *, noise, **terms):
        class Same:
            def geometric(self, count, scale):
                return np.repeat(noise.geometric(1, scale), count)

        return honest(found, noise=Same(), **terms)

    found = caught(enumeration.sequential, svt, "sequential", sequential)
    assert "law/svt/sequential/definition" in found


@pytest.mark.parametrize("part", [enumeration.segmented, enumeration.sequential])
def test_a_threshold_from_private_data_is_caught(caught, part):
    """Three times the largest private query: it moves further than any query does."""
    honest = svt.select

    def select(plan, total, source):
        return honest(plan.at_threshold(3 * int(np.abs(total).max())), total, source)

    assert any("log-ratio" in name for name in caught(part, svt, "select", select))


# -- the noise of the values --------------------------------------------------------------------


def test_the_true_value_of_what_is_accepted_is_caught(caught):
    """Algorithm 3 of Lyu, Su and Li."""
    fault = all_scales(TextbookPlan, l3=TINY)
    assert "law/svt-textbook/release" in caught(enumeration.textbook, TextbookPlan, "scales", fault)


@pytest.mark.parametrize("factor", [Fraction(1, 10**6), Fraction(1, 4)], ids=["missing", "half"])
def test_value_noise_that_is_missing_or_of_half_the_scale_is_caught(caught, factor):
    honest = SvtPlan.sigma2

    def sigma2(self, released):
        return honest(self, released) * factor

    found = caught(enumeration.values, SvtPlan, "sigma2", sigma2)
    assert {"law/svt/values/(0,)", "law/svt/values/(1,)", "law/svt/values/(0, 1)"} <= found


@pytest.mark.parametrize("factor", [Fraction(1, 10**6), Fraction(1, 4)], ids=["missing", "half"])
def test_gaussian_noise_that_is_missing_or_of_half_the_scale_is_caught(caught, factor):
    honest = GaussianPlan.sigma2.fget
    fault = property(lambda self: honest(self) * factor)
    assert caught(enumeration.gaussian, GaussianPlan, "sigma2", fault)


def test_value_noise_that_is_missing_is_caught_by_the_real_draws(caught):
    def values(self, contributions, chosen, source):
        bound = clipping.Ball(self.values_limit(chosen.size))
        return Release(
            chosen, clipped_sum(contributions, bound=bound, bits=self.bits, chosen_K=chosen)
        )

    assert caught(distinguishing_part, SvtPlan, "values", values)


def distinguishing_part(*, quick):
    return distinguishing.findings(quick)


def samplers_part(*, quick):
    return samplers.findings(quick)


# -- clipping -----------------------------------------------------------------------------------


def test_values_that_are_clipped_after_the_noise_are_caught(caught):
    def values(self, contributions, chosen, source):
        total = sum(rows[:, chosen].sum(axis=0) for rows in contributions.chunks())
        total = np.rint(total * 2.0**self.bits).astype(np.int64)
        noisy = total + source.gaussian(total.size, self.sigma2(chosen.size))
        most = contributions.num_patients * self.values_limit(chosen.size)
        length = max(1.0, float(np.linalg.norm(noisy)))
        return Release(chosen, np.trunc(noisy * min(1.0, most / length)).astype(np.int64))

    assert caught(enumeration.values, SvtPlan, "values", values)


def test_values_that_are_not_clipped_again_are_caught(caught):
    """Cut to C as a whole, while the noise is that of C_A."""

    def values(self, contributions, chosen, source):
        bound = clipping.Ball(self.limit)
        total = clipped_sum(contributions, bound=bound, bits=self.bits, chosen_K=chosen)
        return Release(chosen, total + source.gaussian(total.size, self.sigma2(chosen.size)))

    found = caught(enumeration.values, SvtPlan, "values", values)
    assert {"law/svt/values/(0,)", "law/svt/values/(1,)"} <= found


@pytest.mark.parametrize(
    ("part", "owner"),
    [
        (enumeration.textbook, TextbookPlan),
        (enumeration.segmented, SvtPlan),
        (enumeration.sequential, SvtPlan),
        (enumeration.gaussian, GaussianPlan),
    ],
)
def test_rows_that_are_not_clipped_at_all_are_caught(caught, part, owner):
    def total(self, contributions):
        rows = np.concatenate(list(contributions.chunks()))
        return np.rint(rows.sum(axis=0) * 2.0**self.bits).astype(np.int32)

    assert caught(part, owner, "total", total)


def test_a_block_that_is_not_clipped_is_caught(caught):
    """The sequential schedule's noise is that of the block clip; the rows are cut to C alone."""

    def total(self, contributions):
        return clipped_sum(contributions, bound=clipping.Ball(self.limit), bits=self.bits)

    assert caught(enumeration.sequential, SvtPlan, "total", total)


@pytest.mark.parametrize("part", [enumeration.textbook, enumeration.values, enumeration.gaussian])
def test_a_replaced_row_that_counts_once_is_caught(caught, part):
    assert caught(part, Unit, "moves", property(lambda self: 1))


# -- where the noise comes from -----------------------------------------------------------------


def test_one_noise_for_several_queries_is_caught(caught):
    """The same number for all candidates."""
    honest = svt.candidates

    def candidates(total, *, noise, **terms):
        class Same:
            successes = staticmethod(noise.successes)

            def geometric(self, count, scale):
                return np.repeat(noise.geometric(1, scale), count)

        return honest(total, noise=Same(), **terms)

    assert "law/svt/segmented/definition" in caught(
        enumeration.segmented, svt, "candidates", candidates
    )


def test_one_key_for_two_releases_is_caught(caught):
    real = os.urandom

    class Fixed:
        urandom = staticmethod(bytes)
        getpid = staticmethod(os.getpid)

    assert real(8) != real(8)
    found = caught(samplers_part, keystream, "os", Fixed)
    assert {"samplers/own noise/two releases", "samplers/pairs/two sources"} <= found


def test_a_child_that_goes_on_with_its_parents_stream_is_caught(caught, monkeypatch):
    class Blind:
        urandom = staticmethod(os.urandom)
        getpid = staticmethod(lambda: 1)

    monkeypatch.setattr(keystream, "_forks", ())  # the hook counts in the list of before
    assert caught(samplers_part, keystream, "os", Blind) == {"samplers/own noise/fork"}


def test_a_seeded_generator_is_caught(caught):
    """Noise from numpy with a seed; the imports are forbidden in test_privacy_noise.py."""

    class Seeded:
        def __init__(self):
            self._numbers = np.random.default_rng(5)

        def words(self, count):
            return self._numbers.integers(0, 1 << 64, count, np.uint64)

        def octets(self, count):
            return self._numbers.integers(0, 256, count, np.uint8)

    found = caught(samplers_part, noise, "KeyStream", Seeded)
    assert {"samplers/own noise/two releases", "samplers/own noise/seeds"} <= found


def test_noise_from_a_global_generator_that_anyone_may_seed_is_caught(caught):
    chance = np.random.mtrand._rand  # what numpy.random.seed seeds

    class Global:
        def words(self, count):
            return np.frombuffer(chance.bytes(8 * count), np.uint64).copy()

        def octets(self, count):
            return np.frombuffer(chance.bytes(count), np.uint8).copy()

    found = caught(samplers_part, noise, "KeyStream", Global)
    assert "samplers/own noise/seeds" in found
    assert "samplers/pairs/geometric" not in found  # its law is fine; only its source is not


@pytest.mark.parametrize("law", ["geometric", "laplace", "gaussian"])
def test_a_sampler_of_a_wrong_scale_is_caught(caught, law):
    honest = getattr(ExactNoise, law)

    def wrong(self, count, scale):
        return honest(self, count, scale * Fraction(9, 10) ** (2 if law == "gaussian" else 1))

    assert any(f"/{law}/" in name for name in caught(samplers_part, ExactNoise, law, wrong))


# -- the worth gate -----------------------------------------------------------------------------


def test_a_worth_gate_that_draws_its_threshold_again_at_each_ask_is_caught(caught):
    """By the definition: it takes about six answers to break the claim itself."""

    honest = WorthGate.ask

    def ask(self, mechanism, total, source):
        self.open(mechanism, source)
        return honest(self, mechanism, total, source)

    assert "law/worth-gate/definition" in caught(enumeration.worth, WorthGate, "ask", ask)


@pytest.mark.parametrize("factors", [(1, TINY), (TINY, 1), (1, Fraction(1, 2))])
def test_a_worth_gate_with_too_little_noise_is_caught(caught, factors):
    honest = WorthPlan.scales

    def scales(self, plan):
        return tuple(s * factor for s, factor in zip(honest(self, plan), factors, strict=True))

    assert "law/worth-gate" in caught(enumeration.worth, WorthPlan, "scales", scales)


PLAN = GaussianPlan(num_parameters=2, clip=1, bits=8, rho=Fraction(1, 10))


def asked_and_paid(path):
    """Whether an answer of a worth gate, "no", was paid for."""
    with Ledger.open(path) as ledger:
        dataset = ledger.register("heart", [b"a patient"])
        release_round(
            PatientRows(np.zeros((1, 2), np.float32)),
            plan=PLAN,
            ledger=ledger,
            dataset=dataset,
            key=ReleaseKey(b"run", 1),
            budget=Budget(epsilon=10.0, delta=1e-5),
            worth=WorthGate(WorthPlan(epsilon=Fraction(1), ratio=Fraction(100))),
        )
        debits = [entry.detail for entry in ledger.entries() if entry.kind == "debit"]
        return [debit["mechanism"] for debit in debits] == [WORTH]


def test_a_worth_gate_that_answers_without_a_debit_is_caught(tmp_path, monkeypatch):
    """Opened, with its noise drawn, before the budget was asked."""
    assert asked_and_paid(tmp_path / "honest")
    honest = WorthGate.__init__

    def opened(self, plan):
        honest(self, plan)
        self.open(PLAN, ExactNoise())

    monkeypatch.setattr(WorthGate, "__init__", opened)
    assert not asked_and_paid(tmp_path / "free")
