"""Robust rules and the sums below them: exact, order-free, and against exact rational numbers."""

from __future__ import annotations

import importlib
import math
import statistics
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from consortium import Consortium, sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_fold import clip_factors

from p2pfed.gossip import sums as sums_module
from p2pfed.gossip.fold import Weighted, fold_round, genesis_state
from p2pfed.gossip.robust import UNCLIPPED, median_factors, mix
from p2pfed.gossip.sums import EXACT, MAX_COEFFICIENTS, Payloads
from p2pfed.identity.roster import MAX_MEMBERS, MAX_SAMPLES
from p2pfed.identity.rules import ROBUST
from p2pfed.wire.payload import Payload

SIZE = 40
NET = Consortium(3)
VALUES = st.integers(-(1 << 15), (1 << 15) - 1)
PAYLOADS = st.one_of(
    st.dictionaries(st.integers(0, SIZE - 1), VALUES).map(sparse),
    st.lists(VALUES, min_size=SIZE, max_size=SIZE).map(
        lambda values: Payload.dense(np.array(values, np.int16))
    ),
)
DELTAS = st.lists(
    st.builds(Weighted, PAYLOADS, st.integers(1, MAX_SAMPLES)), min_size=1, max_size=7
)


def vector_of(payload: Payload) -> list[int]:
    vector = [0] * SIZE
    for i, value in zip(payload.indices.tolist(), payload.values.tolist(), strict=True):
        vector[i] = value
    return vector


def mean_of(deltas: list[Weighted], rule: str) -> list[Fraction]:
    """The mean as the rule's coefficients give it, exact."""
    payloads = Payloads(deltas, SIZE)
    mixture = mix(payloads, [d.weight for d in deltas], rule, SIZE)
    mean = [Fraction(0)] * SIZE
    for i, coefficient in enumerate(mixture.coefficients):
        for k, value in enumerate(vector_of(payloads[i])):
            mean[k] += Fraction(coefficient * value, mixture.total)
    return mean


def close(one: list[Fraction], other: list[Fraction], within: float) -> bool:
    return max(abs(float(a - b)) for a, b in zip(one, other, strict=True)) <= within


def square(vector) -> Fraction:
    return sum((x * x for x in vector), Fraction(0))


# --- sums --------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(DELTAS, st.integers(3, 50), st.sampled_from([0, 200, 1 << 20]), st.data())
def test_sums_are_the_sums_of_integers_wherever_pieces_begin_and_payloads_lie(
    deltas, chunk, kept, data
):
    coefficients = [data.draw(st.integers(0, MAX_COEFFICIENTS // 7)) for _ in deltas]
    vectors = [vector_of(d.payload) for d in deltas]
    centre = np.array(vectors[0], np.int16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums_module, "CHUNK", chunk)
        patch.setattr(sums_module, "KEPT_BYTES", kept)
        patch.setattr(sums_module, "GROUP", 2)
        payloads = Payloads(deltas, SIZE)
        found = np.zeros(SIZE, np.int64)
        for part, sums in payloads.weighted(coefficients):
            found[part] = sums
        squares, products = payloads.squares(), payloads.products(centre)
        gram = payloads.gram()
    columns = zip(*vectors, strict=True)
    assert found.tolist() == [
        sum(c * v for c, v in zip(coefficients, column, strict=True)) for column in columns
    ]
    inner = [[sum(map(int.__mul__, a, b)) for b in vectors] for a in vectors]
    assert gram.tolist() == inner
    assert squares == [inner[i][i] for i in range(len(deltas))]
    assert products == [row[0] for row in inner]


@pytest.mark.parametrize("total", [EXACT, EXACT + 1, MAX_COEFFICIENTS])
def test_sums_at_the_bounds_are_exact(total):
    low = Payload.dense(np.full(SIZE, -(1 << 15), np.int16))
    [(_, sums)] = Payloads([Weighted(low, 1)] * 3, SIZE).weighted([total - 2, 1, 1])
    assert [int(value) for value in sums] == [-(total << 15)] * SIZE


@pytest.mark.parametrize("coefficients", [[MAX_COEFFICIENTS, 1], [1, -1], [1]])
def test_sums_beyond_the_bounds_are_refused(coefficients):
    deltas = [Weighted(sparse({0: 1}), 1)] * 2
    with pytest.raises(ValueError, match=r"coefficient"):
        list(Payloads(deltas, SIZE).weighted(coefficients))


def test_payloads_that_do_not_fit_are_read_again_and_the_others_once(monkeypatch):
    read: list[int] = []

    class Stored:
        weight = 1

        def __init__(self, i: int) -> None:
            self.i = i

        @property
        def payload(self) -> Payload:
            read.append(self.i)
            return sparse({self.i: 5, 20: 1})

    monkeypatch.setattr(sums_module, "KEPT_BYTES", 50)  # two payloads of 20 bytes
    payloads = Payloads([Stored(i) for i in range(3)], SIZE)
    payloads.squares()
    list(payloads.weighted([1, 1, 1]))
    assert read == [0, 1, 2, 2]


# --- clipping to the median ---------------------------------------------------------------------


@given(st.lists(st.integers(0, 1 << 60), min_size=1, max_size=9))
def test_factors_are_the_largest_that_keep_every_norm_below_the_median(squares):
    factors = median_factors(squares)
    assert factors == clip_factors(squares)
    assert factors == median_factors(squares[::-1])[::-1]
    heard = sorted(s for s in squares if s)
    for factor, norm in zip(factors, squares, strict=True):
        if heard:
            assert factor**2 * norm <= UNCLIPPED**2 * heard[(len(heard) - 1) // 2]


def test_the_median_is_the_lower_one():
    assert median_factors([100, 400, 1600, 6400]) == [UNCLIPPED, UNCLIPPED, 1 << 15, 1 << 14]


def test_deltas_without_content_have_no_part_in_the_median():
    assert median_factors([0, 0, 0, 0, 9, 9, 36]) == [UNCLIPPED] * 6 + [1 << 15]
    assert median_factors([0, 0, 0]) == [UNCLIPPED] * 3


def test_those_who_do_not_speak_are_clipped_but_not_heard():
    assert median_factors([400, 100, 100], [True, False, False]) == [UNCLIPPED] * 3
    assert median_factors([400, 100, 100], [False, True, True])[0] == 1 << 15


@settings(max_examples=25)
@given(DELTAS)
def test_clipping_to_the_median_scales_whole_deltas(deltas):
    vectors = [vector_of(d.payload) for d in deltas]
    factors = clip_factors([int(square(v)) for v in vectors])
    total = UNCLIPPED * sum(d.weight for d in deltas)
    expected = [
        Fraction(
            sum(d.weight * f * x for d, f, x in zip(deltas, factors, column, strict=True)), total
        )
        for column in zip(*vectors, strict=True)
    ]
    assert mean_of(deltas, "clip-median") == expected


# --- centred clipping ---------------------------------------------------------------------------


@settings(max_examples=25)
@given(DELTAS)
def test_centred_clipping_is_the_centre_plus_clipped_differences(deltas):
    clipped = [
        Fraction(float(x)) for x in mean_of(deltas, "clip-median")
    ]  # as the fold divides them
    centre = [round(x) for x in clipped]
    apart = [[x - c for x, c in zip(vector_of(d.payload), centre, strict=True)] for d in deltas]
    speaks = [any(vector_of(d.payload)) for d in deltas]
    factors = median_factors([int(square(a)) for a in apart], speaks)
    whole = UNCLIPPED * sum(d.weight for d in deltas)
    expected = [
        c
        + Fraction(
            sum(d.weight * f * a[k] for d, f, a in zip(deltas, factors, apart, strict=True)), whole
        )
        for k, c in enumerate(centre)
    ]
    assert mean_of(deltas, "centred-clipping") == expected


def test_centred_clipping_of_equal_deltas_is_that_delta():
    deltas = [Weighted(sparse({1: 700, 5: -3}), w) for w in (1, 30, 5)]
    expected = [Fraction(x) for x in vector_of(deltas[0].payload)]
    assert mean_of(deltas, "centred-clipping") == expected


# --- nearest neighbour mixing -------------------------------------------------------------------


@settings(max_examples=25)
@given(DELTAS)
def test_mixing_is_the_clipped_mean_of_means_of_neighbours(deltas):
    vectors = [[Fraction(x) for x in vector_of(d.payload)] for d in deltas]
    n = len(vectors)
    kept = n - (n - 1) // 4
    means = []
    for x in vectors:
        apart = [square([a - b for a, b in zip(x, y, strict=True)]) for y in vectors]
        near = [y for y, far in zip(vectors, apart, strict=True) if far <= sorted(apart)[kept - 1]]
        means.append([sum(column) / len(near) for column in zip(*near, strict=True)])
    factors = median_factors([square(y) for y in means])
    total = UNCLIPPED * sum(d.weight for d in deltas)
    expected = [
        sum(d.weight * f * y[k] for d, f, y in zip(deltas, factors, means, strict=True)) / total
        for k in range(SIZE)
    ]
    # What each delta gives to each neighbour is rounded down to parts of 2**38.
    assert close(mean_of(deltas, "nearest-neighbour-mixing"), expected, n * n * 2**15 * 2.0**-38)


def test_mixing_leaves_a_lonely_liar_no_say_of_its_own():
    honest = [Weighted(sparse({0: 1000 + i, 1: 500}), 10) for i in range(13)]
    liars = [Weighted(sparse({0: -30_000, 1: 30_000, 2: 30_000}), 10) for _ in range(3)]
    truth = [sum(vector_of(d.payload)[k] for d in honest) / 13 for k in range(SIZE)]
    mixed = mean_of([*honest, *liars], "nearest-neighbour-mixing")
    away = math.sqrt(sum((float(m) - t) ** 2 for m, t in zip(mixed, truth, strict=True)))
    assert away <= 0.5 * math.sqrt(sum(t * t for t in truth))


# --- all rules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ROBUST)
@settings(max_examples=25)
@given(deltas=DELTAS, rng=st.randoms(use_true_random=False))
def test_order_free_the_mean_of_a_rule_does_not_depend_on_the_order(rule, deltas, rng):
    assert mean_of(deltas, rule) == mean_of(rng.sample(deltas, len(deltas)), rule)


@pytest.mark.parametrize("rule", ROBUST)
def test_rounds_in_which_nobody_released_anything_have_the_mean_zero(rule):
    deltas = [Weighted(sparse({}), 3), Weighted(sparse({4: 0}), 5)]
    assert mean_of(deltas, rule) == [0] * SIZE


@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_agreement_of_few_is_left_as_it_is(rule, n):
    deltas = [Weighted(sparse({7: -41}), 10 * i + 1) for i in range(n)]
    expected = [Fraction(x) for x in vector_of(deltas[0].payload)]
    assert close(mean_of(deltas, rule), expected, 1e-6)


@pytest.mark.parametrize("rule", ROBUST)
def test_bounds_all_members_at_all_bounds_overflow_nothing(rule):
    low = Payload.dense(np.full(2, -(1 << 15), np.int16))
    small = Payload.dense(np.array([-1, -(1 << 14)], np.int16))
    deltas = [Weighted(low, MAX_SAMPLES)] * (MAX_MEMBERS - 1) + [Weighted(small, 1)]
    run = NET.run(num_parameters=2, grid_bits=4, robust=rule)
    state = genesis_state(np.zeros(2, np.float32), run)
    fold_round(state, deltas, run)
    assert state.model.tolist() == [-(1 << 15), -(1 << 15)]


@pytest.mark.parametrize("rule", sorted(set(ROBUST) - {"none"}))
def test_one_liar_moves_the_model_no_more_than_a_typical_member_could(rule):
    honest = [Weighted(sparse({i: 100}), 1) for i in range(8)]
    with_liar = [*honest, Weighted(sparse(dict.fromkeys(range(SIZE), -32768)), 1)]
    quiet = [*honest, Weighted(sparse({}), 1)]
    one, other = mean_of(with_liar, rule), mean_of(quiet, rule)
    assert math.sqrt(square([a - b for a, b in zip(one, other, strict=True)])) <= 2 * 100 / 9


def test_the_mean_of_the_round_is_told_to_who_asks():
    run = NET.run(grid_bits=12)
    state = genesis_state(np.zeros(SIZE, np.float32), run)
    mean = np.full(SIZE, 9, np.float32)
    fold_round(state, [Weighted(sparse({3: 4096}), 1), Weighted(sparse({3: 0}), 3)], run, mean=mean)
    assert mean.tolist() == [0.25 if i == 3 else 0 for i in range(SIZE)]
    fold_round(state, [], run, mean=mean)
    assert not mean.any()


@pytest.mark.slow
def test_a_fifth_of_liars_ruins_the_plain_mean_and_no_robust_rule(monkeypatch):
    """Digits, 3 of 16 hospitals send -4 times their update; a fixed function of the seeds."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "scripts" / "benchmarks")
    bench = importlib.import_module("robust")

    def median(rule: str, *, attacked: bool) -> float:
        seeds = range(9)
        runs = [bench.accuracy_of(rule, s, attacked=attacked) for s in seeds]
        return statistics.median(run.honest for run in runs)

    clean = median("none", attacked=False)
    assert clean > 0.9
    assert median("none", attacked=True) < 0.5
    assert median("clip-median", attacked=True) >= clean - 0.1
    assert median("nearest-neighbour-mixing", attacked=True) >= clean - 0.03
