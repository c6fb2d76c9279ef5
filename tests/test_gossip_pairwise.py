"""Pairwise mode: the average of two models, exact in integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfed.errors import RemoteProtocolError
from p2pfed.gossip.pairwise import (
    BLOCK,
    CHUNK,
    FINE_BITS,
    LIMIT,
    add_change,
    apart,
    check_vector,
    exchange,
    from_grid,
    make_step,
    move,
    quote,
    shares,
    to_grid,
    vector_bytes,
)

WEIGHTS = st.integers(1, 1 << 20)
VALUES = st.sampled_from(["int8", "int16"])
SEEDS = st.integers(0, 1 << 32)


def models(seed: int, size: int, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A genesis and two models around it, up to 2**bits grid units away, in fine units."""
    rng = np.random.default_rng(seed)
    genesis = from_grid(rng.integers(-(2**20), 2**20, size).astype(np.int32))
    top = 1 << (bits + FINE_BITS)
    return genesis, *(genesis + rng.integers(-top, top, size) for _ in range(2))


# --- the arithmetic ----------------------------------------------------------------------------


@settings(max_examples=60)
@given(SEEDS, WEIGHTS, WEIGHTS, VALUES, st.integers(1, 600), st.integers(0, 29))
def test_the_weighted_sum_is_conserved_by_every_committed_exchange(
    seed, n_i, n_j, values, size, bits
):
    genesis, x_i, x_j = models(seed, size, bits)
    rng = np.random.default_rng(seed)
    y_i, y_j = exchange(x_i, x_j, n_i, n_j, genesis=genesis, values=values, chance=rng.bytes)
    exact = [v.astype(object) for v in (x_i, x_j, y_i, y_j)]
    assert (n_i * exact[0] + n_j * exact[1] == n_i * exact[2] + n_j * exact[3]).all()


@settings(max_examples=60)
@given(SEEDS, WEIGHTS, WEIGHTS, VALUES, st.integers(0, 29))
def test_it_is_conserved_whatever_was_trained_and_exchanged_between_quote_and_step(
    seed, n_i, n_j, values, bits
):
    genesis, x_i, x_j = models(seed, 300, bits)
    rng = np.random.default_rng(seed)
    quoted = quote(x_j, genesis, values, rng.bytes)
    a, b = shares(n_i, n_j)
    between = rng.integers(-100, 100, 300).astype(np.int16)
    add_change(x_i, slice(None), between)
    step = make_step(x_i, genesis, quoted, (a, b), values=values, chance=rng.bytes)
    add_change(x_j, np.arange(300), between)
    before = n_i * x_i.astype(object) + n_j * x_j.astype(object)
    move(x_i, step, -a, values)
    add_change(x_i, slice(None), -between)
    move(x_j, step, b, values)
    add_change(x_j, slice(None), -between)
    drift = (n_i + n_j) * (between.astype(object) << FINE_BITS)
    assert (n_i * x_i.astype(object) + n_j * x_j.astype(object) == before - drift).all()


@settings(max_examples=60)
@given(SEEDS, WEIGHTS, WEIGHTS, VALUES, st.integers(0, 29))
def test_afterwards_the_two_differ_by_no_more_than_the_encoding_says(seed, n_i, n_j, values, bits):
    genesis, x_i, x_j = models(seed, BLOCK, bits)
    rng = np.random.default_rng(seed)
    y_i, y_j = exchange(x_i, x_j, n_i, n_j, genesis=genesis, values=values, chance=rng.bytes)
    part = {"int8": 63, "int16": 16383}[values]
    from_genesis = int(np.abs(x_j - genesis).max())
    apart = int(np.abs(x_i - x_j).max()) + from_genesis // part
    bound = from_genesis // part + apart // part + (n_i + n_j) + 2
    assert int(np.abs(y_i - y_j).max()) <= bound


@pytest.mark.parametrize("values", ["int8", "int16"])
def test_the_error_of_an_exchange_has_no_bias(values):
    """Mean of 1500 exchanges against the exact average: 6 standard errors, alarm 2e-9 each."""
    genesis, x_i, x_j = models(3, 8, 12)
    rng = np.random.default_rng(5)
    n_i, n_j = 37, 101
    met = np.array(
        [
            exchange(x_i, x_j, n_i, n_j, genesis=genesis, values=values, chance=rng.bytes)[0]
            for _ in range(1500)
        ],
        float,
    )
    right = (n_i * x_i.astype(float) + n_j * x_j) / (n_i + n_j)
    deviation = met.std(axis=0)
    assert (deviation > 0).any()  # chance is at work, or nothing is shown
    assert (np.abs(met.mean(axis=0) - right) <= 6 * deviation / 1500**0.5 + n_i + n_j).all()


def test_equal_models_stay_equal_to_the_last_bit_of_the_grid():
    genesis, x, _ = models(1, 1000, 3)
    rng = np.random.default_rng(0)
    y_i, y_j = exchange(genesis, genesis, 3, 5, genesis=genesis, values="int8", chance=rng.bytes)
    assert (y_i == genesis).all()
    assert (y_j == genesis).all()
    z_i, z_j = exchange(x, x, 3, 5, genesis=genesis, values="int16", chance=rng.bytes)
    assert np.abs(to_grid(z_i) - to_grid(z_j)).max() <= 1


def test_a_model_of_several_chunks_is_averaged_like_its_parts():
    size = CHUNK + BLOCK + 7
    genesis, x_i, x_j = models(2, size, 10)
    y_i, y_j = exchange(
        x_i, x_j, 2, 3, genesis=genesis, values="int16", chance=np.random.default_rng(1).bytes
    )
    right = (2 * x_i + 3 * x_j) / 5
    assert np.abs(y_i - right).max() < np.abs(x_i - x_j).max() / 1000
    assert np.abs(y_j - right).max() < np.abs(x_i - x_j).max() / 1000


def test_a_step_tells_how_far_the_two_models_were_from_each_other():
    chance = np.random.default_rng(5)
    start = np.zeros(70_000, np.int64)
    x_i, x_j = (chance.integers(-(2**30), 2**30, start.size) for _ in range(2))
    for n_i, n_j in ((1, 1), (300, 7)):
        moves = shares(n_i, n_j)
        quoted = quote(x_j, start, "int16", chance.bytes)
        step = make_step(x_i, start, quoted, moves, values="int16", chance=chance.bytes)
        real = float(np.linalg.norm((x_i - x_j) / 2.0 ** (10 + FINE_BITS)))
        assert apart(step, start.size, moves, "int16", 10) == pytest.approx(real, rel=1e-3)


def test_the_grid_is_kept_and_rounded_half_up():
    on_grid = np.array([-(2**31) + 1, -3, 0, 5, 2**31 - 1], np.int32)
    assert (to_grid(from_grid(on_grid)) == on_grid).all()
    half = 1 << (FINE_BITS - 1)
    assert to_grid(np.array([half, half - 1, -half, -half - 1, LIMIT])).tolist() == [
        1,
        0,
        0,
        -1,
        2**31 - 1,
    ]


def test_a_model_never_leaves_the_range_of_the_grid():
    x = from_grid(np.array([2**31 - 1, -(2**31) + 1], np.int32))
    add_change(x, slice(None), np.array([32767, -32768], np.int16))
    assert x.tolist() == [LIMIT, -LIMIT]
    top = bytes([50]) + bytes([127, 129])
    check_vector(top, 2, "int8")
    move(x, top, 7, "int8")
    assert x.tolist() == [LIMIT, -LIMIT]


@pytest.mark.parametrize(
    ("values", "data", "times"),
    [
        ("int8", bytes(300 + 1), 1),  # one exponent too few
        ("int8", bytes(300 + 3), 1),
        ("int16", bytes(300 + 2), 1),
        ("int8", b"", 1),
        ("int8", bytes([53, 0]) + bytes(300), 1),
        ("int8", bytes([0, 53]) + bytes(300), 1),
        ("int8", bytes([0, 255]) + bytes(300), 1),
        ("int8", bytes([40, 0]) + bytes(300), 1 << 20),
        ("int16", bytes([45, 0]) + bytes(600), 1),
    ],
)
def test_a_vector_of_another_size_or_beyond_every_model_is_refused(values, data, times):
    with pytest.raises(RemoteProtocolError):
        check_vector(data, 300, values, times=times)


@settings(max_examples=60)
@given(SEEDS, VALUES, WEIGHTS, WEIGHTS, st.integers(0, 55))
def test_what_an_honest_node_sends_is_never_refused_and_nothing_overflows(
    seed, values, n_i, n_j, bits
):
    rng = np.random.default_rng(seed)
    top = min(LIMIT, 1 << bits)
    genesis, x_i, x_j = (rng.integers(-top, top + 1, 300) for _ in range(3))
    moves = shares(n_i, n_j)
    quoted = quote(x_j, genesis, values, rng.bytes)
    check_vector(quoted, 300, values)
    step = make_step(x_i, genesis, quoted, moves, values=values, chance=rng.bytes)
    check_vector(step, 300, values, times=max(moves))
    move(x_i, step, -moves[0], values)
    move(x_j, step, moves[1], values)
    assert max(np.abs(x_i).max(), np.abs(x_j).max()) <= LIMIT


@given(SEEDS, VALUES)
def test_any_vector_that_passes_the_check_moves_a_model_within_its_range(seed, values):
    rng = np.random.default_rng(seed)
    data = bytearray(rng.bytes(vector_bytes(300, values)))
    data[0], data[1] = rng.integers(0, 60, 2)
    try:
        check_vector(bytes(data), 300, values, times=5)
    except RemoteProtocolError:
        return
    x = rng.integers(-LIMIT, LIMIT, 300)
    genesis = np.zeros(300, np.int64)
    step = make_step(x, genesis, bytes(data), (2, 5), values=values, chance=rng.bytes)
    check_vector(step, 300, values, times=5)
    move(x, bytes(data), 5, values)
    assert np.abs(x).max() <= LIMIT


def test_shares_are_in_lowest_terms_and_weights_have_bounds():
    assert shares(6, 4) == (2, 3)
    assert shares(1 << 20, 1 << 20) == (1, 1)
    for bad in [(0, 1), (1, 0), (1, (1 << 20) + 1)]:
        with pytest.raises(ValueError, match="weights"):
            shares(*bad)
