"""The samplers' exact laws, their refinement, and where their randomness comes from.

Every chi-square test has a false-alarm probability of 1e-6.
"""

from __future__ import annotations

import ast
import math
import os
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import binomtest, chi2

from p2pfed.privacy import bernoulli, geometric, noise
from p2pfed.privacy.bernoulli import Trials, bernoulli_exp, exp_bracket, successes
from p2pfed.privacy.geometric import one_sided_geometric
from p2pfed.privacy.keystream import KeyStream
from p2pfed.privacy.noise import discrete_gaussian, discrete_laplace

FALSE_ALARM = 1e-6
ONES = (1 << 64) - 1


class Tape:
    """Words written down beforehand, then real ones."""

    def __init__(self, *words):
        self.left = list(words)
        self.rest = KeyStream()
        self.read = 0

    def words(self, count):
        given_, self.left = self.left[:count], self.left[count:]
        self.read += count
        return np.concatenate([np.array(given_, np.uint64), self.rest.words(count - len(given_))])

    def octets(self, count):
        """Words as above, as many as hold the bytes; the lowest bytes first."""
        return self.words(-(-count // 8)).view(np.uint8)[:count]


def exp_minus(x: Fraction) -> Fraction:
    """exp(-x) for x <= 40 by its series, to more than 500 bits; written apart from the product."""
    term, total, n = 1 << 600, 0, 0
    while term:
        n += 1
        total += term
        term = -(term * x.numerator // (x.denominator * n))
        if n > 40 and abs(term) <= 1:
            break
    return Fraction(total, 1 << 600)


def fits(observed, expected):
    """Chi-square over cells of expected count >= 100, the rest in one cell."""
    observed, expected = np.asarray(observed, float), np.asarray(expected, float)
    assert abs(observed.sum() - expected.sum()) < 1e-3 * expected.sum()
    big = expected >= 100
    rest_o, rest_e = observed[~big].sum(), expected[~big].sum()
    statistic = (np.square(observed - expected)[big] / expected[big]).sum()
    freedom = big.sum() - 1
    if rest_e >= 100:
        statistic, freedom = statistic + (rest_o - rest_e) ** 2 / rest_e, freedom + 1
    return chi2.sf(statistic, freedom) > FALSE_ALARM


def follows(sample, log_weight):
    """Chi-square of integers against weights exp(log_weight(k)) on a wide support."""
    reach = int(np.abs(sample).max()) * 2 + 60
    support = np.arange(-reach, reach + 1)
    log_w = np.array([log_weight(int(k)) for k in support])
    weight = np.exp(log_w - log_w.max())
    return fits(
        np.bincount(sample + reach, minlength=support.size), sample.size * weight / weight.sum()
    )


@pytest.mark.parametrize(
    "scale", [Fraction(1, 5), Fraction(1), Fraction(7, 2), Fraction(40), Fraction(1000, 3)]
)
def test_one_sided_geometric_has_its_exact_law(scale):
    sample = one_sided_geometric(KeyStream(), 40_000, scale)
    assert sample.min() == 0
    assert follows(sample, lambda k: -k / float(scale) if k >= 0 else -math.inf)


def test_a_geometric_far_in_the_tail_is_put_together_from_all_its_digits():
    # Scale 1: one digit below 8 (all ones: 7, of a cell that its last boundary does not touch),
    # then the high part survives twice (16).
    assert one_sided_geometric(Tape(ONES, 0, 0, ONES), 1, Fraction(1)).tolist() == [23]
    assert one_sided_geometric(Tape(0, ONES), 1, Fraction(1)).tolist() == [0]
    # Scale 40 has 320 = 2 * 160 values: the high digit first, below 2, then the low one below 256.
    assert one_sided_geometric(Tape(ONES, ONES, ONES), 1, Fraction(40)).tolist() == [511]
    assert one_sided_geometric(Tape(ONES, 0, ONES), 1, Fraction(40)).tolist() == [256]


@pytest.mark.parametrize("scale", [Fraction(1, 5), Fraction(7, 2), Fraction(40)])
def test_discrete_laplace_has_its_exact_law(scale):
    assert follows(discrete_laplace(KeyStream(), 40_000, scale), lambda k: -abs(k) / float(scale))


@pytest.mark.parametrize(
    "sigma2", [Fraction(1, 3), Fraction(1), Fraction(37, 4), Fraction(1000, 7)]
)
def test_discrete_gaussian_has_its_exact_law(sigma2):
    sample = discrete_gaussian(KeyStream(), 40_000, sigma2)
    assert follows(sample, lambda k: -(k**2) / (2 * float(sigma2)))


def test_the_chi_square_notices_a_wrong_scale():
    assert not follows(
        discrete_gaussian(KeyStream(), 40_000, Fraction(37, 4)), lambda k: -(k**2) / 20
    )
    assert not follows(
        one_sided_geometric(KeyStream(), 40_000, Fraction(7, 2)),
        lambda k: -k / 3.8 if k >= 0 else -math.inf,
    )


def test_a_wide_discrete_gaussian_has_its_variance():
    sample = discrete_gaussian(KeyStream(), 100_000, Fraction(10) ** 12)
    # Var of the mean square is 2 sigma^4 / n: 5 sigma and a bit, false alarm below 1e-6.
    assert abs(np.mean(np.square(sample / 1e6)) - 1) < 5.2 * math.sqrt(2 / 100_000)


def test_bernoulli_exp_hits_with_its_probability():
    exponents = [Fraction(0), Fraction(1, 10**6), Fraction(1, 3), Fraction(2), Fraction(7)]
    x = [exponents[i % 5] for i in range(50_000)]
    hits = bernoulli_exp(KeyStream(), np.array([float(e) for e in x]), x.__getitem__)
    counts = hits.reshape(-1, 5).sum(axis=0)
    assert counts[0] == 10_000  # exp(-0) = 1
    for e, count in zip(exponents[1:], counts[1:], strict=True):
        assert binomtest(int(count), 10_000, math.exp(-e)).pvalue > FALSE_ALARM / 4


@settings(deadline=None, max_examples=40)
@given(st.fractions(Fraction(1, 1000), 40, max_denominator=1000))
def test_a_tie_of_the_first_64_bits_is_decided_by_the_bits_that_follow(x):
    p = exp_minus(x)
    first = math.floor(p * 2**64)
    near = np.array([float(x)])
    second = math.floor((p * 2**64 - first) * 2**64)
    assert bernoulli_exp(Tape(first, 0), near, lambda i: x).all()
    assert not bernoulli_exp(Tape(first, ONES), near, lambda i: x).any()
    assert bernoulli_exp(Tape(first, second, 0), near, lambda i: x).all()
    assert not bernoulli_exp(Tape(first, second, ONES), near, lambda i: x).any()


def test_a_tie_of_the_first_16_bits_is_decided_by_the_bits_that_follow():
    x = Fraction(1, 3)
    p = exp_minus(x) / (1 + exp_minus(x))
    tie = math.floor(p * 2**16)

    def bracket(bits):
        low, high = exp_bracket(x, bits)
        one = 1 << bits  # the probability with odds exp(-x)
        return (low << bits) // (one + low), -((-high << bits) // (one + high))

    every = np.arange(1 << 16, dtype=np.uint16).view(np.uint64)

    def hits(*after):
        tape = Tape(*[int(w) for w in every], *after)
        return bernoulli.bernoulli(tape, 1 << 16, bracket)

    assert hits(0).tolist() == list(range(tie + 1))
    assert hits(ONES).tolist() == list(range(tie))


def test_the_refined_path_decides_as_the_fast_path_on_the_same_bits(monkeypatch):
    x = [Fraction(i % 97, 7) for i in range(1000)]
    near = np.array([float(e) for e in x])
    words = [int(w) for w in KeyStream().words(1000)]
    fast = bernoulli_exp(Tape(*words), near, x.__getitem__)
    asked = []
    monkeypatch.setattr(bernoulli, "_MARGIN", 1.0)  # doubts every entry that might be a hit
    slow = bernoulli_exp(Tape(*words), near, lambda i: asked.append(i) or x[i])
    assert (fast == slow).all()
    assert set(np.flatnonzero(fast)) <= set(asked)


def test_exponents_beyond_the_floating_range_are_exact():
    x = Fraction(89, 2)  # 2^64 exp(-x) = 0.866
    near = np.array([44.5])
    assert bernoulli_exp(Tape(0, 1 << 63), near, lambda i: x).all()
    assert not bernoulli_exp(Tape(0, ONES // 10 * 9), near, lambda i: x).any()
    huge = Fraction(10) ** 30
    tape = Tape(0, 0, 0, 5)
    assert not bernoulli_exp(tape, np.array([1e30]), lambda i: huge).any()
    assert tape.read == 4  # ends with the first word that is not zero


def digit_edges(size, step):
    """P(below b) of a digit, b = 0 .. size, to more than 400 bits."""
    return [(1 - exp_minus(b * step)) / (1 - exp_minus(size * step)) for b in range(size + 1)]


@pytest.mark.parametrize(
    ("size", "step"),
    [(2, Fraction(8)), (8, Fraction(1)), (256, Fraction(1, 17)), (7, Fraction(1, 9))],
)
def test_a_digit_is_decided_by_its_exact_boundaries_on_either_side(size, step):
    digit = geometric._Digit.of(size, step)
    for value, edge in enumerate(digit_edges(size, step)[1:-1]):
        tie = math.floor(edge * 2**64)
        cell, rest = tie >> 48, (tie << 16) % 2**64
        assert digit.table[cell] == -1
        for after, wanted in ((0, value), (ONES, value + 1)):  # the bits after the tie decide
            tape = Tape(cell, rest, after)
            assert digit.draw(tape, 1).tolist() == [wanted]
            assert tape.read == 3


def test_a_digits_table_says_only_what_is_certain():
    for size, step in [
        (2, Fraction(8)),
        (8, Fraction(1)),
        (256, Fraction(1, 17)),
        (64, Fraction(1, 10**9)),
    ]:
        digit = geometric._Digit.of(size, step)
        edges = digit_edges(size, step)
        for cell in range(0, 65536, 7):
            value = digit.table[cell]
            if value >= 0:
                assert edges[value] <= Fraction(cell, 65536)
                assert Fraction(cell + 1, 65536) <= edges[value + 1]


def trials_of(exponents, *, bounded=True):
    near = np.array([float(x) for x in exponents])
    bounds = {"least": near.min(), "most": near.max()} if bounded else {}
    return Trials(near.size, near.__getitem__, lambda i: exponents[i], **bounds)


@pytest.mark.parametrize("bounded", [True, False])
def test_a_row_of_trials_succeeds_with_its_probabilities(bounded):
    exponents = [Fraction(9, 2), Fraction(5), Fraction(6), Fraction(13, 3)] * 20_000
    hits = successes(KeyStream(), trials_of(exponents, bounded=bounded))
    assert (np.diff(hits) > 0).all()
    for place, x in enumerate(exponents[:4]):
        count = int(np.count_nonzero(hits % 4 == place))
        assert binomtest(count, 20_000, math.exp(-x)).pvalue > FALSE_ALARM / 4


def test_a_byte_that_leaves_a_trial_open_is_extended_not_drawn_again():
    x = Fraction(5, 2)
    first = math.floor(exp_minus(x) * 2**64)
    trials = trials_of([x])
    for rest, hit in ((0, True), (ONES, False)):
        tape = Tape(first >> 56, (first << 8) % 2**64, rest)
        assert (successes(tape, trials).size == 1) == hit
        assert tape.read == 3


@pytest.mark.parametrize("x", [Fraction(0), Fraction(1, 10**30), Fraction(10**30)])
def test_trials_that_are_certain_or_all_but_impossible_are_decided_too(x):
    hits = successes(KeyStream(), trials_of([x] * 1000))  # false alarm below 1e-20
    assert hits.size == (1000 if x < 1 else 0)


@settings(deadline=None, max_examples=50)
@given(st.fractions(0, 2000, max_denominator=10**6), st.sampled_from([16, 64, 128, 192]))
def test_the_bracket_of_exp_holds_the_exact_value(x, bits):
    low, high = exp_bracket(x, bits)
    assert 0 <= low <= high <= low + 2
    if x <= 40:
        assert low <= exp_minus(x) * 2**bits <= high
    else:
        assert low <= math.exp(-x) * 2.0**bits * (1 + 1e-9)
        assert high >= math.exp(-x) * 2.0**bits * (1 - 1e-9)


@pytest.mark.parametrize("scale", [Fraction(0), Fraction(-1), Fraction(2**49)])
def test_a_scale_out_of_range_is_refused(scale):
    with pytest.raises(ValueError, match="scale"):
        one_sided_geometric(KeyStream(), 1, scale)
    with pytest.raises(ValueError, match="sigma2"):
        discrete_gaussian(KeyStream(), 1, scale * 2**60)


@pytest.mark.parametrize("sigma2", [0.3, 1.0, 7.5])
@pytest.mark.parametrize("shift", [1, 3])
def test_the_discrete_gaussian_realises_at_most_its_claimed_zcdp(sigma2, shift):
    support = np.arange(-400, 401)
    log_p = -np.square(support) / (2 * sigma2)
    log_p -= np.log(np.exp(log_p).sum())
    log_q = np.roll(log_p, shift)
    log_q[:shift] = log_p[0]
    for alpha in (1.01, 1.5, 2, 8):
        terms = (alpha * log_p + (1 - alpha) * log_q)[50:-50]  # outside, exp gives zero
        divergence = logsumexp(terms) / (alpha - 1)
        assert divergence <= alpha * shift**2 / (2 * sigma2) * (1 + 1e-9)


def test_no_samples_are_no_samples():
    assert discrete_gaussian(KeyStream(), 0, Fraction(1)).size == 0
    assert one_sided_geometric(KeyStream(), 0, Fraction(1)).size == 0
    assert bernoulli_exp(KeyStream(), np.empty(0), lambda i: Fraction(1)).size == 0


def test_long_and_short_reads_are_uniform_bits():
    stream = KeyStream()
    words = np.concatenate([stream.words(n) for n in (1, 3, 8191, 8192, 8193, 60_000)])
    assert np.unique(words).size == words.size  # 64-bit birthday: 2e-10
    ones = int(np.unpackbits(words.view(np.uint8)).sum())
    assert abs(ones - 32 * words.size) < 5.2 * math.sqrt(16 * words.size)  # false alarm 2e-7


def test_seeding_other_generators_changes_nothing():
    def draw():
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        return discrete_gaussian(KeyStream(), 20, Fraction(10**12))

    assert (draw() != draw()).any()


@pytest.mark.slow
def test_seeding_torch_changes_nothing():
    torch = pytest.importorskip("torch")

    def draw():
        torch.manual_seed(0)
        return discrete_gaussian(KeyStream(), 20, Fraction(10**12))

    assert (draw() != draw()).any()


def test_a_forked_child_never_repeats_its_parents_stream():
    stream = KeyStream()
    stream.words(3)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, stream.words(64).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(read, 512), np.uint64)
    os.close(read)
    os.close(write)
    assert theirs.size == 64
    assert not np.isin(theirs, stream.words(4096)).any()


def test_a_forked_child_with_its_parents_number_draws_a_key_of_its_own_too(monkeypatch):
    """Process numbers come again, and every container has its own."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    test_a_forked_child_never_repeats_its_parents_stream()


def test_the_privacy_room_imports_no_other_generator():
    room = Path(noise.__file__).parent
    files = sorted(room.glob("**/*.py"))
    assert len(files) >= 8
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names = [f"{node.value.id}.{node.attr}"]
            for name in names:
                top = name.split(".")[0]
                assert top not in {"random", "torch", "secrets", "pickle"}, (file.name, name)
                assert not name.startswith(("numpy.random", "np.random")), (file.name, name)
