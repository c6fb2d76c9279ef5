"""The sparse vector technique: its guarantee by exact enumeration, its law, its plan.

The reference law of AboveThreshold is written here apart from the product: exact rational
arithmetic for the range, floating sums of positive terms for zCDP. The same audit is run on
mechanisms known to be broken and must object.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chi2

from p2pfed.privacy.mechanism import Release
from p2pfed.privacy.noise import ExactNoise
from p2pfed.privacy.schedules import _floor_norms, public_positions
from p2pfed.privacy.svt import SvtPlan, next_threshold, select
from p2pfed.privacy.units import PatientRows

ALPHAS = (1.01, 1.5, 2, 4, 8, 16, 32)


# -- the exact law in rational arithmetic -------------------------------------------------------


def exact_law(queries, threshold, y, z):
    """P(first accepted) for Geo ratios y = exp(-1/l1), z = exp(-1/l2), all rational.

    Sums the threshold noise r term by term until every query is below the threshold; from there
    on each term is a polynomial in z^m times y^m, a geometric series.
    """
    law = [Fraction(0)] * (len(queries) + 1)
    turn = max(0, max(queries) - threshold)
    for r in range(turn):
        left = (1 - y) * y**r
        for k, q in enumerate(queries):
            tail = z ** max(0, threshold + r - q)
            law[k] += left * tail
            left *= 1 - tail
        law[-1] += left
    below = [Fraction(1)]  # coefficients of prod (1 - c_i z^m) in powers of z^m
    first = (1 - y) * y**turn
    for k, q in enumerate(queries):
        c = z ** (threshold + turn - q)
        law[k] += first * c * sum(b / (1 - y * z ** (j + 1)) for j, b in enumerate(below))
        below = [
            a - c * b for a, b in zip([*below, Fraction(0)], [Fraction(0), *below], strict=True)
        ]
    law[-1] += first * sum(b / (1 - y * z**j) for j, b in enumerate(below))
    return law


def widths(q, q2):
    delta = [a - b for a, b in zip(q, q2, strict=True)]
    return max(0, *delta) + max(0, *(-d for d in delta))


def range_over_claim(q, q2, threshold, y, z):
    """exp(realised range) / exp(W a), exactly: at most 1 when Lemma 1 holds."""
    p, p2 = exact_law(q, threshold, y, z), exact_law(q2, threshold, y, z)
    ratio = [a / b for a, b in zip(p, p2, strict=True)]
    w = widths(q, q2)
    return max(ratio) / min(ratio) * y**w * z ** (2 * w)


def test_the_exact_law_adds_up_to_one():
    for q in itertools.product(range(3), repeat=3):
        assert sum(exact_law(q, 1, Fraction(1, 2), Fraction(2, 3))) == 1


def test_formal_guarantee_lemma_1_by_exact_enumeration():
    worst = Fraction(0)
    ratios = [(Fraction(1, 2), Fraction(2, 3)), (Fraction(1, 5), Fraction(19, 20))]
    steps = list(itertools.product((-2, -1, 0, 1, 2), repeat=2))
    for y, z in ratios:
        for threshold in (0, 2):
            for q in itertools.product((2, 4), repeat=2):
                for step in steps:
                    q2 = tuple(a - b for a, b in zip(q, step, strict=True))
                    worst = max(worst, range_over_claim(q, q2, threshold, y, z))
    assert worst <= 1
    assert worst > Fraction(1, 2)  # the enumeration reaches the neighbourhood of the bound


@pytest.mark.slow
def test_formal_guarantee_lemma_1_on_random_rational_cases():
    rng = random.Random(7)
    worst = Fraction(0)
    for _ in range(4000):
        n = rng.randint(1, 5)
        q = [rng.randint(0, 12) for _ in range(n)]
        q2 = [max(0, v - rng.choice((-3, -2, -1, 0, 1, 2, 3))) for v in q]
        y, z = Fraction(rng.randint(1, 19), 20), Fraction(rng.randint(1, 19), 20)
        worst = max(worst, range_over_claim(q, q2, rng.randint(0, 10), y, z))
    assert Fraction(9, 10) < worst <= 1


# -- realised zCDP of whole plans, and of broken ones -------------------------------------------


def float_law(queries, threshold, l1, l2, *, query_noise=True):
    """The same law for any scales, summed over the threshold noise: positive terms only."""
    r = np.arange(math.ceil(60 * l1) + 60)
    left = np.exp(-r / l1) * -math.expm1(-1 / l1)
    law = []
    for q in queries:
        gap = threshold + r - q
        log_tail = -np.maximum(gap, 0) / l2
        tail = np.exp(log_tail) if query_noise else (gap <= 0).astype(float)
        law.append((left * tail).sum())
        left = left * (-np.expm1(log_tail) if query_noise else 1 - tail)
    return np.array([*law, left.sum()])


def shared_law(queries, others, threshold, l1, l2):
    """Broken: one threshold for this segment and `others` = (number, query, tests each).

    Law of this segment's outcome together with how many others accept: merging outcomes only
    hides differences, so what shows here is really there.
    """
    number, other, tests = others
    r = np.arange(math.ceil(60 * l1) + 60)
    weight = np.exp(-r / l1) * -math.expm1(-1 / l1)
    one_fails = -np.expm1(-np.maximum(threshold + r - other, 0) / l2)
    accepts = binom.pmf(np.arange(number + 1)[:, None], number, 1 - one_fails**tests)
    law = []
    left = weight
    for q in queries:
        tail = np.exp(-np.maximum(threshold + r - q, 0) / l2)
        law.append(accepts @ (left * tail))
        left = left * (1 - tail)
    return np.concatenate([*law, accepts @ left])


def divergences(p, p2):
    """The Renyi divergence for each of ALPHAS; outcomes impossible in both do not count."""
    seen = (p > 0) | (p2 > 0)
    p, p2 = p[seen], p2[seen]
    if (p2 == 0).any() or (p == 0).any():
        return np.full(len(ALPHAS), math.inf)
    p, p2 = np.log(p), np.log(p2)
    found = []
    for alpha in ALPHAS:
        z = alpha * p + (1 - alpha) * p2
        found.append((z.max() + math.log(np.exp(z - z.max()).sum())) / (alpha - 1))
    return np.array(found)


def vectors(length, reach):
    """All integer vectors of L2 norm at most `reach`."""
    values = range(-reach, reach + 1)
    return [
        x for x in itertools.product(values, repeat=length) if sum(v * v for v in x) <= reach**2
    ]


def norms(s, block):
    return tuple(math.isqrt(sum(v * v for v in s[i : i + block])) for i in range(0, len(s), block))


def realised_over_claimed(plan, scales=None, top=3, law=float_law):
    """max over neighbours and alphas of realised / claimed zCDP, for any number of segments.

    Enumerates every sum with entries 0..top and every contribution of a patient in one segment;
    divergences of independent segments add, and the contribution's squared length is shared out
    among the segments in the worst way.
    """
    l1, l2 = (float(v) for v in scales or plan.scales)
    size = plan.segment_blocks * plan.block_size
    cases = {}  # (queries, queries') -> least squared length that makes them neighbours
    for s in itertools.product(range(top + 1), repeat=size):
        for x in vectors(size, plan.limit):
            without = tuple(a - b for a, b in zip(s, x, strict=True))
            pair = norms(s, plan.block_size), norms(without, plan.block_size)
            length = sum(v * v for v in x)
            cases[pair] = min(length, cases.get(pair, length))
    known = cache(lambda q: law(q, plan.threshold, l1, l2))
    best = np.zeros((plan.limit**2 + 1, len(ALPHAS)))
    for (q, q2), length in cases.items():
        if q != q2:
            both = divergences(known(q), known(q2)), divergences(known(q2), known(q))
            best[length] = np.maximum(best[length], np.maximum(*both))
    total = np.zeros_like(best)  # by squared length used so far
    for _ in range(plan.num_segments):
        total = np.array(
            [
                np.max([total[length - n] + best[n] for n in range(length + 1)], axis=0)
                for length in range(len(best))
            ]
        )
    return float(np.max(total[-1] / (np.array(ALPHAS) * float(plan.rho_select))))


def tiny_plan(**changes):
    plan = SvtPlan(
        num_parameters=8,
        clip=2,
        bits=0,
        rho_select=Fraction(2),
        rho_values=Fraction(1),
        shuffle_seed=b"",
        block_size=1,
        segment_blocks=2,
        threshold=1,
        schedule="segmented",
    )
    return dataclasses.replace(plan, **changes)


PLANS = [
    tiny_plan(threshold=threshold, rho_select=rho, **shape)
    for threshold in (0, 3)
    for rho in (Fraction(1, 2), Fraction(8), Fraction(60))
    for shape in (
        {},
        {"segment_blocks": 1},
        {"segment_blocks": 3, "num_parameters": 6},
        {"block_size": 2},
        {"clip": 3},
    )
]


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_formal_guarantee_selection_realises_at_most_the_claimed_zcdp(plan):
    realised = realised_over_claimed(plan)
    assert 0.01 < realised <= 1


def test_formal_guarantee_holds_for_a_small_plan():
    assert 0.1 < realised_over_claimed(tiny_plan(), top=2) <= 1


def test_the_audit_objects_when_the_queries_get_no_noise():
    def law(queries, threshold, l1, l2):
        return float_law(queries, threshold, l1, l2, query_noise=False)

    assert realised_over_claimed(tiny_plan(), top=2, law=law) > 1


def test_the_audit_objects_when_the_noise_is_not_scaled_with_the_clip():
    plan = tiny_plan(clip=3, num_parameters=4)
    assert realised_over_claimed(plan, top=2) <= 1
    unscaled = dataclasses.replace(plan, clip=1).scales
    assert realised_over_claimed(plan, unscaled, top=2) > 1


def test_the_audit_objects_when_the_query_noise_is_halved():
    # The range of a single segment is tight, so the missing factor two of l2 shows there.
    y, z = Fraction(9, 10), Fraction(2, 3)
    cases = [((3, 0), (2, 1)), ((0, 3), (1, 2)), ((8, 1), (7, 2)), ((1, 8), (2, 7))]
    for threshold in (0, 4, 8):
        assert all(range_over_claim(q, q2, threshold, y, z) <= 1 for q, q2 in cases)
    # Drawn with ratio z^2, claimed for z: the claimed range is half of what l2 costs.
    worst = max(
        range_over_claim(q, q2, threshold, y, z**2) * z ** (-2 * widths(q, q2))
        for q, q2 in cases
        for threshold in (0, 4, 8)
    )
    assert worst > 1


@pytest.mark.parametrize("segment", [1, 2])
def test_the_audit_objects_when_the_threshold_is_not_refreshed(segment):
    """With segments of one test this is also the variant without a cut-off."""
    plan = tiny_plan(
        clip=1,
        segment_blocks=segment,
        rho_select=Fraction(2),
        threshold=4,
        num_parameters=81 * segment,
    )
    l1, l2 = (float(v) for v in plan.scales)
    one, two = (4,) * segment, (5,) + (4,) * (segment - 1)  # zero-out moves one query by one
    claimed = np.array(ALPHAS) * float(plan.rho_select)
    sound = [float_law(q, plan.threshold, l1, l2) for q in (one, two)]
    assert (divergences(*sound) <= claimed).all()
    others = (80, 5, segment)
    broken = [shared_law(q, others, plan.threshold, l1, l2) for q in (one, two)]
    assert np.allclose([law.sum() for law in broken], 1)
    assert (divergences(*broken) > claimed).any()


# -- the sampler follows the law it is audited by -----------------------------------------------


@pytest.mark.parametrize(("block", "threshold"), [(1, 2), (2, 5)])
def test_select_follows_the_audited_law(block, threshold):
    """Many equal segments in one call; chi-square with false-alarm probability 1e-6."""
    segments, queries = 20_000, (3, 0, 4)
    plan = tiny_plan(
        num_parameters=3 * block * segments,
        block_size=block,
        segment_blocks=3,
        clip=60,
        rho_select=Fraction(500),
        threshold=threshold,
    )
    place_of = public_positions(plan.shuffle_seed, np.arange(plan.num_blocks), plan.num_blocks)
    sums = np.zeros((plan.num_blocks, block), np.int64)
    sums[:, 0] = np.tile(queries, segments)[place_of]
    chosen = select(plan, sums.ravel(), ExactNoise())
    assert (np.diff(chosen) > 0).all()
    blocks = np.unique(chosen // block)
    assert blocks.size * block == chosen.size
    place = place_of[blocks]
    assert np.unique(place // 3).size == place.size  # at most one of each segment
    observed = np.bincount(place % 3, minlength=4)
    observed[3] = segments - place.size
    l1, l2 = (float(v) for v in plan.scales)
    expected = float_law(queries, threshold, l1, l2) * segments
    assert (expected > 100).all()
    assert chi2.sf((np.square(observed - expected) / expected).sum(), 3) > 1e-6


def test_formal_guarantee_values_are_the_re_clipped_sum_plus_the_paid_noise():
    plan = tiny_plan(
        num_parameters=40_000, clip=1000, rho_values=Fraction(3), rho_select=Fraction(1)
    )
    rows = np.zeros((2, 40_000), np.float32)
    rows[0, :10_000] = 1e6  # far above the clip
    rows[1, 3] = 5
    chosen = np.arange(10_000)
    release = plan.values(PatientRows(rows), chosen, ExactNoise())
    limit = plan.values_limit(10_000)
    assert limit == 500  # C sqrt(1/4)
    expected = np.full(10_000, limit / 100)  # 500 shared by 10,000 equal coordinates
    expected[3] += 5
    noise = release.values - expected
    variance = limit**2 / (2 * 3)
    # Both at 5.2 standard errors: false alarm 4e-7.
    assert abs(noise.mean()) < 5.2 * math.sqrt(variance / 10_000)
    assert abs(np.square(noise).mean() / variance - 1) < 5.2 * math.sqrt(2 / 10_000)


@settings(deadline=None)
@given(st.integers(1, 10**6), st.data(), st.integers(1, 2**26))
def test_the_values_limit_is_the_clip_times_the_root_of_the_share(parameters, data, limit):
    released = data.draw(st.integers(0, parameters))
    plan = tiny_plan(num_parameters=parameters, clip=limit)
    bound = plan.values_limit(released)
    assert bound == 1 or bound**2 * parameters <= limit**2 * released
    assert bound <= limit


# -- the plan, the threshold, the other mechanisms -----------------------------------------------


@settings(deadline=None, max_examples=50)
@given(
    st.fractions(Fraction(1, 1000), 100, max_denominator=10**6),
    st.integers(1, 10**7),
    st.integers(1, 64),
    st.integers(1, 16),
    st.fractions(Fraction(1, 100), 100, max_denominator=1000),
)
def test_formal_guarantee_the_noise_scales_always_cover_the_claim(
    rho, parameters, block, segment, clip
):
    plan = SvtPlan.for_budget(
        rho,
        num_parameters=parameters,
        clip=clip,
        bits=16,
        shuffle_seed=b"s",
        block_size=block,
        segment_blocks=segment,
        schedule="segmented",
    )
    l1, l2 = plan.scales
    a2 = (1 / l1 + 2 / l2) ** 2
    m, slack = min(2, segment), 0 if block == 1 else min(2, segment)
    # a^2 (sqrt(m) C + slack sqrt(n))^2 <= 8 rho_select, squared out: A + B sqrt(mn) <= rhs.
    left = a2 * (m * plan.limit**2 + slack**2 * plan.num_segments)
    cross = 2 * a2 * plan.limit * slack
    room = 8 * plan.rho_select - left
    assert room >= 0
    assert cross**2 * m * plan.num_segments <= room**2
    wasted = room - cross * Fraction(math.isqrt(m * plan.num_segments) + 1)
    assert wasted < 8 * plan.rho_select / 1000  # and little is given away
    assert plan.cost.rho_nano >= (plan.rho_select + plan.rho_values) * 10**9
    assert plan.rho_select + plan.rho_values == rho
    assert plan.threshold == math.floor(l2 / 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_parameters": 0},
        {"block_size": 0},
        {"segment_blocks": 0},
        {"rho_select": Fraction(0)},
        {"rho_values": Fraction(-1)},
        {"threshold": -1},
        {"clip": 0},
        {"bits": 40},
    ],
    ids=str,
)
def test_a_meaningless_plan_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("bits", "clip")):
        tiny_plan(**wrong)


def test_the_public_order_is_a_permutation_that_the_seed_decides():
    one, same, other = (
        public_positions(seed, np.arange(1000), 1000) for seed in (b"a", b"a", b"b")
    )
    assert (one == same).all()
    assert (one != other).any()
    assert sorted(one) == list(range(1000))


def test_the_threshold_follows_the_public_share_of_accepting_segments():
    plan = tiny_plan(num_parameters=200, threshold=50)
    every = Release(np.arange(0, 200, 2), np.zeros(100, np.int64))
    half = Release(np.arange(0, 100, 2), np.zeros(50, np.int64))
    nobody = Release(np.arange(0), np.arange(0))
    taus = [next_threshold(plan, release) for release in (nobody, half, every)]
    assert 0 <= taus[0] < taus[1] < 50 <= taus[2]
    assert next_threshold(tiny_plan(threshold=0), nobody) == 0


def test_a_last_short_block_and_segment_stay_inside_the_update():
    plan = tiny_plan(num_parameters=7, block_size=3, segment_blocks=2)
    for seed in range(30):
        plan = dataclasses.replace(plan, shuffle_seed=bytes([seed]))
        chosen = select(plan, np.full(7, 10**6, np.int32), ExactNoise())
        assert set(chosen) <= set(range(7))
        assert chosen.size in {4, 6, 1 + 3}  # two segments, both accept


def test_block_norms_are_floored_exactly_where_floats_round_up():
    for c in (1, 3, 1000, 29_999, 30_000):
        sums = np.array([2 * c * c, 2 * c, 2 * c * c + 1, 0])  # m^2 - 1 and m^2, m = 2 c^2 + 1
        assert _floor_norms(sums, 2).tolist() == [2 * c * c, 2 * c * c + 1]
        assert _floor_norms(-sums, 1).tolist() == sums.tolist()


def test_nothing_selected_releases_nothing():
    plan = tiny_plan(threshold=10**9)
    rows = PatientRows(np.zeros((3, 8), np.float32))
    release = plan.draw(plan.total(rows), rows, ExactNoise())
    assert release.indices.size == release.values.size == 0


def test_a_release_holds_indices_and_values_and_nothing_else():
    assert [field.name for field in dataclasses.fields(Release)] == ["indices", "values"]


def test_the_second_reading_is_clipped_on_its_own():
    class Fickle(PatientRows):
        seen = 0

        def chunks(self):
            type(self).seen += 1
            yield self.rows * (1 if self.seen == 1 else 1e9)

    plan = tiny_plan(
        num_parameters=4, clip=1000, rho_values=Fraction(10**6), rho_select=Fraction(10**6)
    )
    rows = Fickle(np.ones((1, 4), np.float32))
    release = plan.draw(plan.total(rows), rows, ExactNoise())
    assert Fickle.seen == 2
    # sigma < 1; 20 of it on top of the limit.
    assert (
        np.square(release.values.astype(float)).sum()
        <= (plan.values_limit(release.indices.size) + 40) ** 2
    )
