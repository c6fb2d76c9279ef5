"""The contract of every mechanism, and each one's own promise, on the product's own samplers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import chi2

from p2pfed.errors import UpdateRejected
from p2pfed.privacy.accountant import Cost
from p2pfed.privacy.gaussian import GaussianPlan, top_k
from p2pfed.privacy.keystream import KeyStream
from p2pfed.privacy.mechanism import add_noise
from p2pfed.privacy.mechanisms import MECHANISMS, make_plan
from p2pfed.privacy.noise import ExactNoise, uniform_subset
from p2pfed.privacy.plain import PlainPlan
from p2pfed.privacy.schedules import public_positions
from p2pfed.privacy.svt import SvtPlan, next_threshold, select
from p2pfed.privacy.textbook import TextbookPlan
from p2pfed.privacy.units import HOSPITAL, PatientRows, Unit

NOISY = [name for name in MECHANISMS if name != "none"]
SHAPE = {"num_parameters": 5, "clip": 1, "bits": 8, "shuffle_seed": b""}


def plan_of(name, **changes):
    more = {"cutoff": 2} if name == "svt-textbook" else {}
    return make_plan(name, **{**SHAPE, "budget": Fraction(1), **more, **changes})


# -- the contract -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_plan_is_chosen_by_name_and_says_what_it_costs(name):
    plan = plan_of(name)
    assert plan.name == name
    assert plan.num_parameters == 5
    assert plan.cost == {
        "none": Cost.nothing(),
        "svt-textbook": Cost.pure(Fraction(1)),
    }.get(name, Cost.zcdp(Fraction(1)))


def test_an_unknown_mechanism_is_refused():
    with pytest.raises(ValueError, match="laplace"):
        make_plan("laplace", **SHAPE, budget=Fraction(1))


@pytest.mark.parametrize("name", MECHANISMS)
def test_contributions_to_another_model_are_refused(name):
    with pytest.raises(UpdateRejected, match="parameters"):
        plan_of(name).total(PatientRows(np.zeros((2, 6), np.float32)))


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_before_anything_is_drawn(name, bad):
    rows = np.zeros((2, 5), np.float32)
    rows[1, 3] = bad
    with pytest.raises(UpdateRejected, match="NaN"):
        plan_of(name).total(PatientRows(rows))


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_release_has_increasing_indices_within_the_update_and_no_more_than_announced(name):
    plan = plan_of(name, num_parameters=300, **({"cutoff": 40} if "text" in name else {}))
    rows = PatientRows(np.ones((3, 300), np.float32))
    release = plan.draw(plan.total(rows), rows, ExactNoise())
    assert release.indices.size == release.values.size <= plan.outlook().released
    assert (np.diff(release.indices) > 0).all()
    assert release.indices.size == 0 or 0 <= release.indices[0] <= release.indices[-1] < 300


@pytest.mark.parametrize("name", NOISY)
def test_the_noise_doubles_where_a_row_may_be_replaced(name):
    alone, grouped = plan_of(name), plan_of(name, unit=Unit("patient", 3))
    hospital = plan_of(name, unit=HOSPITAL)
    assert grouped.cost == hospital.cost == alone.cost
    noise = alone.outlook().value_noise
    for plan in (grouped, hospital):
        assert plan.outlook().value_noise == pytest.approx(2 * noise, rel=0.02)
        query = alone.outlook().query_noise
        assert plan.outlook().query_noise == pytest.approx(2 * query, rel=0.02)


@pytest.mark.parametrize("name", NOISY)
def test_the_outlook_is_the_noise_that_comes(name):
    """Standard deviation of 4000 values within 10 %: 9 standard errors at least, below 1e-12."""
    d = 4000
    more = {"cutoff": d} if name == "svt-textbook" else {}
    plan = plan_of(name, num_parameters=d, budget=Fraction(10**6 if more else 10), **more)
    if isinstance(plan, SvtPlan):
        plan = dataclasses.replace(plan, segment_blocks=1, threshold=0)
    rows = PatientRows(np.zeros((2, d), np.float32))
    release = plan.draw(plan.total(rows), rows, ExactNoise())
    assert release.values.size > d / 2
    spread = plan.outlook().value_noise * 2**8
    if isinstance(plan, SvtPlan):  # it is for all that may be released; fewer get less noise
        assert plan.sigma2(d) == Fraction(spread**2)
        spread = math.sqrt(plan.sigma2(release.values.size))
    if spread > 1:  # below a grid unit the discrete laws are narrower than their parameter
        assert release.values.astype(float).std() == pytest.approx(spread, rel=0.1)


def test_a_noise_beyond_32_bits_is_not_cut_off():
    def huge(count):
        return np.full(count, 1 << 40, np.int64)

    noisy = add_noise(np.array([5, -7], np.int32), huge)
    assert noisy.tolist() == [(1 << 40) + 5, (1 << 40) - 7]


# -- gaussian, none -----------------------------------------------------------------------------


def test_formal_guarantee_the_dense_gaussian_adds_the_paid_noise_everywhere():
    plan = GaussianPlan(num_parameters=20_000, clip=1, bits=10, rho=Fraction(1, 2))
    rows = PatientRows(np.zeros((3, 20_000), np.float32))
    release = plan.draw(plan.total(rows), rows, ExactNoise())
    assert (release.indices == np.arange(20_000)).all()
    variance = plan.limit**2  # limit^2 / (2 rho)
    # 5.2 standard errors: false alarm 2e-7.
    assert abs(np.square(release.values.astype(float)).mean() / variance - 1) < 5.2 * math.sqrt(
        2 / 20_000
    )


def test_top_k_keeps_the_largest():
    release = top_k(np.array([3, -9, 0, 5, -4]), Fraction(1, 2))
    assert release.indices.tolist() == [1, 3, 4]
    assert release.values.tolist() == [-9, 5, -4]


def test_the_gaussian_sends_the_largest_noisy_values_only():
    plan = plan_of("gaussian", num_parameters=100, fraction=Fraction(1, 4))
    rows = PatientRows(np.zeros((1, 100), np.float32))
    assert plan.draw(plan.total(rows), rows, ExactNoise()).indices.size == 25


def test_no_privacy_sends_the_true_sum_on_the_grid():
    plan = plan_of("none", num_parameters=3, bits=4)
    rows = PatientRows(np.array([[1.5, 100, -2], [1, 0, 0]], np.float32))
    release = plan.draw(plan.total(rows), rows, ExactNoise())
    assert release.values.tolist() == [40, 1600, -32]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_no_privacy_refuses_numbers_that_fit_no_grid(bad):
    with pytest.raises(UpdateRejected, match="NaN"):
        PlainPlan(num_parameters=2, bits=8).total(PatientRows(np.array([[0, bad]], np.float32)))


# -- svt, sequential ----------------------------------------------------------------------------


def sequential_plan(**changes):
    plan = SvtPlan(
        num_parameters=6,
        clip=12,
        bits=0,
        rho_select=Fraction(40),
        rho_values=Fraction(1),
        shuffle_seed=b"s",
        segment_blocks=3,
        schedule="sequential",
        threshold=4,
    )
    return dataclasses.replace(plan, **changes)


def walked(queries, threshold, l1, l2, cutoff):
    """The law of the accepted set by the book: block by block, threshold noise summed over."""
    r = np.arange(math.ceil(50 * l1) + 50)
    weight = np.exp(-r / l1) * -math.expm1(-1 / l1)
    law = {}

    def walk(place, accepted, chance):
        """From `place` with a fresh threshold; `chance` of having come here."""
        if len(accepted) == cutoff or place == len(queries):
            law[accepted] = law.get(accepted, 0.0) + chance
            return
        left = weight
        for k in range(place, len(queries)):
            tail = np.exp(-np.maximum(threshold + r - queries[k], 0) / l2)
            walk(k + 1, (*accepted, k), chance * float((left * tail).sum()))
            left = left * (1 - tail)
        law[accepted] = law.get(accepted, 0.0) + chance * float(left.sum())

    walk(0, (), 1.0)
    return law


@pytest.mark.slow
def test_the_sequential_schedule_follows_the_law_of_going_block_by_block():
    """4000 draws, chi-square over all accepted sets; false-alarm probability 1e-6."""
    plan = sequential_plan()
    queries = (3, 0, 6, 5, 1, 4)
    place_of = public_positions(plan.shuffle_seed, np.arange(6), 6)
    total = np.array(queries, np.int32)[place_of]  # the block at place p has query p
    l1, l2 = map(float, plan.scales)
    law = walked(queries, plan.threshold, l1, l2, plan.cutoff)
    assert sum(law.values()) == pytest.approx(1)
    seen = dict.fromkeys(law, 0)
    for _ in range(4000):
        chosen = select(plan, total, ExactNoise())
        seen[tuple(sorted(place_of[chosen].tolist()))] += 1
    pairs = [(seen[case], 4000 * chance) for case, chance in law.items()]
    rare = [pair for pair in pairs if pair[1] < 8]
    pairs = [pair for pair in pairs if pair[1] >= 8] + [tuple(map(sum, zip(*rare, strict=True)))]
    statistic = sum((found - wanted) ** 2 / wanted for found, wanted in pairs)
    assert chi2.sf(statistic, len(pairs) - 1) > 1e-6


def divergence(p, q, alpha):
    return math.log(sum(p[case] ** alpha * q[case] ** (1 - alpha) for case in p)) / (alpha - 1)


@pytest.mark.parametrize("cutoff", [1, 2, 4])
@pytest.mark.parametrize("threshold", [0, 3])
def test_formal_guarantee_the_sequential_schedule_realises_at_most_the_claimed_zcdp(
    cutoff, threshold
):
    """All sums with entries 0..3 in four blocks of one number, all moves by a clipped row."""
    plan = sequential_plan(
        num_parameters=4,
        clip=2,
        block_reach=Fraction(1),  # g = 1
        segment_blocks=-(-4 // cutoff),
        threshold=threshold,
        rho_select=Fraction(3),
    )
    assert plan.cutoff == cutoff
    l1, l2 = map(float, plan.scales)
    laws = {
        queries: walked(queries, threshold, l1, l2, cutoff)
        for queries in itertools.product(range(4), repeat=4)
    }
    worst = 0.0
    for queries, law in laws.items():
        for move in itertools.product((-1, 0, 1), repeat=4):
            other = laws.get(tuple(abs(q + m) for q, m in zip(queries, move, strict=True)))
            if other is None or not any(move):
                continue
            for alpha in (1.01, 2.0, 8.0, 32.0):
                worst = max(worst, divergence(law, other, alpha) / alpha)
    assert 0.1 < worst / float(plan.rho_select) <= 1


def test_auto_takes_the_cheaper_schedule():
    few = sequential_plan(num_parameters=1000, clip=1000, segment_blocks=20, schedule="auto")
    many = dataclasses.replace(few, segment_blocks=2)
    assert few.is_sequential
    assert not many.is_sequential
    for plan in (few, many):
        costlier = dataclasses.replace(
            plan, schedule="segmented" if plan.is_sequential else "sequential"
        )
        assert plan.scales[1] < costlier.scales[1]


def test_the_sequential_threshold_follows_where_the_cut_off_was_reached():
    plan = sequential_plan(num_parameters=600, segment_blocks=10, threshold=50)
    place_of = public_positions(plan.shuffle_seed, np.arange(600), 600)
    block_at = np.argsort(place_of)

    def after(places):
        indices = np.sort(block_at[np.array(places, int)])
        return next_threshold(plan, dataclasses.replace(EMPTY, indices=indices))

    early, late, few = after(range(60)), after(range(480, 540)), after(range(0, 600, 20))
    assert few < late == 50 < early


EMPTY = top_k(np.zeros(1, np.int32), 1)


# -- svt-textbook --------------------------------------------------------------------------------


def textbook_plan(**changes):
    plan = TextbookPlan(num_parameters=4, clip=1, bits=0, epsilon=Fraction(2), cutoff=2)
    return dataclasses.replace(plan, **changes)


def textbook_law(sums, plan):
    """The law of the released set: independent acceptances given T, then a random subset."""
    l1, l2, _ = map(float, plan.scales)
    r = np.arange(math.ceil(50 * l1) + 50)
    weight = np.exp(-r / l1) * -math.expm1(-1 / l1)
    tails = [np.exp(-np.maximum(plan.threshold + r - abs(s), 0) / l2) for s in sums]
    law = {}
    for hits in itertools.product((0, 1), repeat=len(sums)):
        chance = weight
        for hit, tail in zip(hits, tails, strict=True):
            chance = chance * (tail if hit else 1 - tail)
        accepted = [i for i, hit in enumerate(hits) if hit]
        kept = min(len(accepted), plan.cutoff)
        for subset in itertools.combinations(accepted, kept):
            share = float(chance.sum()) / math.comb(len(accepted), kept)
            law[subset] = law.get(subset, 0.0) + share
    return law


@pytest.mark.parametrize("cutoff", [1, 2, 4])
@pytest.mark.parametrize("epsilon", [Fraction(1, 2), Fraction(2), Fraction(8)])
def test_formal_guarantee_the_textbook_form_realises_at_most_the_claimed_epsilon(cutoff, epsilon):
    """All sums with entries -1..2 and all moves of a patient; the values cost the other half."""
    plan = textbook_plan(cutoff=cutoff, epsilon=epsilon)
    laws = {s: textbook_law(s, plan) for s in itertools.product(range(-1, 3), repeat=4)}
    assert all(sum(law.values()) == pytest.approx(1) for law in laws.values())
    worst = 0.0
    for sums, law in laws.items():
        for move in itertools.product((-1, 0, 1), repeat=4):
            other = laws.get(tuple(s + m for s, m in zip(sums, move, strict=True)))
            if other is not None:
                worst = max(worst, *(math.log(law[case] / other[case]) for case in law))
    assert 0.2 < worst / float(epsilon * plan.select_share) <= 1


@pytest.mark.slow
def test_the_textbook_form_follows_the_law_that_is_enumerated():
    """4000 draws, chi-square over all released sets; false-alarm probability 1e-6."""
    plan = textbook_plan(epsilon=Fraction(6))
    sums = (2, -1, 0, 1)
    law = textbook_law(sums, plan)
    seen = dict.fromkeys(law, 0)
    for _ in range(4000):
        seen[tuple(plan.select(np.array(sums, np.int32), ExactNoise()).tolist())] += 1
    statistic = sum((seen[case] - 4000 * p) ** 2 / (4000 * p) for case, p in law.items())
    assert min(4000 * p for p in law.values()) > 8
    assert chi2.sf(statistic, len(law) - 1) > 1e-6


def test_formal_guarantee_the_textbook_scales_spend_exactly_the_epsilon():
    plan = textbook_plan(cutoff=3, epsilon=Fraction(7, 3), select_share=Fraction(1, 3), clip=5)
    l1, l2, l3 = plan.scales
    moved = 5
    assert moved / l1 + 2 * plan.cutoff * moved / l2 + plan.cutoff * moved / l3 == plan.epsilon


def test_every_subset_is_as_likely_as_another():
    """6000 subsets of 2 of 4; chi-square with false-alarm probability 1e-6."""
    seen = dict.fromkeys(itertools.combinations(range(4), 2), 0)
    stream = KeyStream()
    for _ in range(6000):
        seen[tuple(np.flatnonzero(uniform_subset(stream, 4, 2)).tolist())] += 1
    assert chi2.sf(sum((found - 1000) ** 2 / 1000 for found in seen.values()), 5) > 1e-6


def test_words_beyond_whole_rounds_are_drawn_again():
    given = [2**64 - 1, 7]  # 2^64 = 1 (mod 3): the last word is one too many

    class Words:
        def words(self, count):
            return np.array([given.pop(0) for _ in range(count)], np.uint64)

    assert uniform_subset(Words(), 3, 1).tolist() == [False, True, False]


def test_noise_that_could_not_be_drawn_is_refused_with_the_plan():
    with pytest.raises(ValueError, match="noise scale"):
        textbook_plan(bits=26, epsilon=Fraction(1, 10**8), num_parameters=10**5, cutoff=10**4)
    with pytest.raises(ValueError, match="noise scale"):
        sequential_plan(
            clip=1,
            bits=26,
            rho_select=Fraction(1, 10**9),
            num_parameters=10**9,
            segment_blocks=2,
            block_reach=Fraction(10**6),
        )


@pytest.mark.parametrize(
    "wrong",
    [{"epsilon": Fraction(0)}, {"cutoff": 0}, {"cutoff": 5}, {"select_share": Fraction(1)}],
    ids=str,
)
def test_a_meaningless_textbook_plan_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        textbook_plan(**wrong)


@pytest.mark.parametrize(("count", "cut"), [(640, 10), (1000, 4), (12, 2), (7, 7), (1, 1)])
def test_the_public_order_is_a_permutation_that_deals_residue_classes_out(count, cut):
    """Segments once began with blocks of one class where `cut` and `count` share a factor."""
    firsts = set()
    for seed in range(20):
        place_of = public_positions(bytes([seed]), np.arange(count), count)
        assert sorted(place_of.tolist()) == list(range(count))
        first_blocks = np.argsort(place_of)[::cut]
        firsts.add(len(set((first_blocks % cut).tolist())))
    assert min(firsts) >= (1 if count < 100 else cut)  # all classes, for each of these seeds
