"""The fold: against the reference told apart from it, and its invariants as properties."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import random
import sqlite3
from fractions import Fraction

import numpy as np
import pytest
from consortium import Consortium, hospital, peer_of, some_payload, sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_fold import model_name, reference_fold, reference_hash
from safetensors.numpy import save_file

from p2pfed.gossip import fold as fold_module
from p2pfed.gossip import sums as sums_module
from p2pfed.gossip.fold import (
    CHUNK,
    MAX_DELTAS,
    MAX_WEIGHT,
    ModelState,
    Weighted,
    fold_round,
    genesis_state,
    model_hash,
    view_of,
)
from p2pfed.gossip.robust import UNCLIPPED
from p2pfed.gossip.sums import MAX_COEFFICIENTS
from p2pfed.identity.roster import MAX_MEMBERS, MAX_SAMPLES
from p2pfed.identity.rules import ROBUST
from p2pfed.identity.run import Outer
from p2pfed.node.directory import DataDirectory, file_digest
from p2pfed.node.store import Store
from p2pfed.wire.delta import Proof
from p2pfed.wire.payload import Payload, decode_payload

NET = Consortium(4)
OUTERS = {
    "fedavg": Outer("fedavg", 1.0),
    "fedavg .3": Outer("fedavg", 0.3),
    "fedadam": Outer("fedadam", 0.03),
    "fedadam without memory": Outer("fedadam", 0.5, beta1=0.0, beta2=0.0),
    "fedadam as published": Outer("fedadam", 0.01, beta2=0.999, bias_correction=False),
    "fedyogi": Outer("fedyogi", 0.03),
    "fedyogi as published": Outer("fedyogi", 0.01, beta2=0.999, bias_correction=False),
    "fedadagrad": Outer("fedadagrad", 0.3),
}
GENESIS = np.linspace(-2, 2, 40, dtype=np.float32)


def genesis_for(run):
    return genesis_state(GENESIS[: run.num_parameters], run)


def fold_all(run, rounds: list[list[Weighted]], genesis=None) -> ModelState:
    state = genesis_state(GENESIS if genesis is None else genesis, run)
    for deltas in rounds:
        fold_round(state, deltas, run)
    return state


def folded_by_the_product(run, facts, deltas, genesis) -> str:
    by_name = {d.fact: d.payload for d in deltas}
    bounds = {"num_parameters": run.num_parameters, "max_released": run.max_released}
    rounds = [
        [Weighted(decode_payload(by_name[c.fact], **bounds), c.weight) for c in facts.counted(r)]
        for r in range(run.rounds)
    ]
    return model_hash(fold_all(run, rounds, genesis)).hex()


# --- the reference -----------------------------------------------------------------------------


def stored(tmp_path, outer: str, robust: str) -> str:
    """Leave on disk what a daemon leaves: several rosters, a revocation, a proof, gaps, fillers.

    Returns:
        The product's hash of the model.
    """
    net = Consortium(4)
    net.grow(hospital(4, samples=1 << 20), hospital(5, roles=("relay",)))
    net.publish(net.roster.revoke(peer_of(3), reason="test", from_round=4))
    directory = DataDirectory(tmp_path)
    size, rng = 66_000, np.random.default_rng(5)
    genesis = (rng.standard_normal(size) * 3).astype(np.float32)
    save_file({"model": genesis}, tmp_path / "genesis")
    digest = file_digest(tmp_path / "genesis")
    (tmp_path / "genesis").rename(directory.blob(digest))
    constants = {
        "num_parameters": size,
        "genesis": digest,
        "outer": OUTERS[outer],
        "robust": robust,
        "rounds": 8,
        "grid_bits": 14,
        "top_fraction": Fraction("0.01"),
    }
    run = net.run(**constants)

    def payload(i: int, scale: int) -> Payload:
        indices = np.unique(rng.integers(0, size, 300)) if i else np.array([0, size - 1])
        return Payload(indices, rng.integers(-scale, scale, indices.size).astype(np.int16))

    deltas = [
        net.delta(run, r, i, payload(i, 50 * 4**i), roster=net.rosters[1 if i < 4 else 2])
        for r in (0, 1, 2, 4, 5, 7)
        for i in range(6)
        if (r, i) != (1, 2)
    ]
    other = net.delta(run, 5, 1, some_payload(NET.run(), 5, 0))
    directory.keep_run(run.run_id, net.signed_run(**constants))
    for roster, signed in zip(net.rosters, net.signed, strict=True):
        directory.keep_roster(roster.version, roster.hash, signed)
    store = Store(directory.store)
    for delta in deltas:
        store.keep_delta(delta, durable=False)
    proof = Proof.of(
        next(d for d in deltas if d.header.round == 5 and d.header.origin == peer_of(1)).signed,
        other.signed,
    )
    store.keep_proof(peer_of(1), proof.encode())
    facts = net.facts(run, [])
    for signed in store.headers(run.run_id):
        facts.add(signed)
    for kept in store.proofs(run.run_id):
        facts.add_proof(kept)
    store.close()
    assert len(facts.counted(4)) == 4  # h3 is revoked, h5 does not train
    assert len(facts.counted(7)) == 3  # and h1 is proven to equivocate
    return folded_by_the_product(run, facts, deltas, genesis)


@pytest.mark.parametrize("robust", ["none", "clip-median"])
@pytest.mark.parametrize("outer", ["fedavg .3", "fedadam"])
def test_the_product_agrees_with_the_reference_bit_for_bit(tmp_path, outer, robust):
    assert stored(tmp_path, outer, robust) == reference_hash(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM proofs",
        "DELETE FROM deltas WHERE round = 7",
        "UPDATE deltas SET payload = CAST(substr(payload, 1, length(payload) - 2) || x'0100' "
        "AS BLOB)",
    ],
)
def test_the_reference_notices_when_a_fact_is_gone_or_altered(tmp_path, damage):
    product = stored(tmp_path, "fedavg", "none")
    with contextlib.closing(sqlite3.connect(tmp_path / "store.db")) as db:
        db.execute(damage)
        db.commit()
    assert reference_hash(tmp_path) != product


# --- properties --------------------------------------------------------------------------------

PAYLOADS = st.dictionaries(st.integers(0, 39), st.integers(-(1 << 15), (1 << 15) - 1)).map(sparse)
DELTAS = st.lists(st.builds(Weighted, PAYLOADS, st.integers(1, MAX_WEIGHT)), max_size=6)
RUNS = st.sampled_from([(o, r) for o in OUTERS.values() for r in ROBUST]).map(
    lambda pair: NET.run(outer=pair[0], robust=pair[1])
)
PLAIN_RUNS = st.sampled_from(
    [(o, r) for o in OUTERS.values() for r in ("none", "clip-median")]
).map(lambda pair: NET.run(outer=pair[0], robust=pair[1]))


@settings(max_examples=30, deadline=None)
@given(PLAIN_RUNS, st.lists(DELTAS, max_size=4))
def test_reference_the_product_agrees_with_plain_numbers(run, rounds):
    told = [
        [(d.weight, list(zip(*map(np.ndarray.tolist, _parts(d)), strict=True))) for d in deltas]
        for deltas in rounds
    ]
    expected = reference_fold(GENESIS.tolist(), told, json.loads(run.encode()))
    state = fold_all(run, rounds)
    assert state.model.tolist() == expected
    assert model_hash(state).hex() == model_name(expected)


def _parts(delta):
    return delta.payload.indices, delta.payload.values


@settings(max_examples=30)
@given(RUNS, st.lists(DELTAS, max_size=4), st.randoms(use_true_random=False))
def test_order_free_the_order_of_deltas_does_not_matter(run, rounds, rng):
    shuffled = [rng.sample(deltas, len(deltas)) for deltas in rounds]
    one, other = fold_all(run, rounds), fold_all(run, shuffled)
    assert model_hash(one) == model_hash(other)
    assert one.first.tobytes() == other.first.tobytes()
    assert one.second.tobytes() == other.second.tobytes()


@settings(max_examples=30)
@given(RUNS, st.lists(DELTAS, max_size=3))
def test_a_round_without_deltas_changes_nothing(run, rounds):
    without = [deltas for deltas in rounds if deltas]
    with_gaps = [part for deltas in without for part in ([], deltas, [])]
    one, other = fold_all(run, without), fold_all(run, with_gaps)
    assert model_hash(one) == model_hash(other)
    assert other.first.tobytes() == one.first.tobytes()
    assert (one.beta1_power, one.beta2_power) == (other.beta1_power, other.beta2_power)
    assert other.round == len(with_gaps)


def test_one_huge_delta_moves_the_model_no_more_than_a_typical_one():
    run = NET.run(robust="clip-median")
    honest = [Weighted(sparse({i: 100}), 1) for i in range(4)]
    attacker = Weighted(sparse(dict.fromkeys(range(40), -32768)), 1)
    moved = fold_all(run, [[*honest, attacker]]).model - genesis_for(run).model
    assert np.linalg.norm(moved[4:].astype(float)) <= (100 + np.sqrt(40)) / 5 + np.sqrt(40) / 2


# --- exactness ---------------------------------------------------------------------------------


def test_exactness_the_bounds_of_roster_and_fold_are_the_same():
    assert MAX_WEIGHT == MAX_SAMPLES
    assert MAX_DELTAS == MAX_MEMBERS
    assert MAX_WEIGHT * MAX_DELTAS * UNCLIPPED <= MAX_COEFFICIENTS
    assert 15 + math.log2(MAX_COEFFICIENTS) <= 62  # log2 of the largest sum


def test_exactness_the_largest_possible_sum_is_exact():
    """All members, all weights and all values at their bounds: nothing overflows or rounds."""
    run = NET.run(num_parameters=2, grid_bits=4)
    low = Payload(np.arange(2), np.array([-(1 << 15), (1 << 15) - 1], np.int16))
    state = genesis_state(np.zeros(2, np.float32), run)
    fold_round(state, [Weighted(low, MAX_WEIGHT)] * MAX_DELTAS, run)
    assert state.model.tolist() == [-(1 << 15), (1 << 15) - 1]


def test_exactness_the_sum_is_the_sum_of_integers():
    """Weights that differ by one in a million still count: the mean is correctly rounded."""
    run = NET.run(num_parameters=1, grid_bits=24, outer=Outer("fedavg", 1000.0))
    deltas = [
        Weighted(sparse({0: 32767}), MAX_WEIGHT),
        Weighted(sparse({0: -32768}), MAX_WEIGHT - 1),
    ]
    exact = Fraction(32767 * MAX_WEIGHT - 32768 * (MAX_WEIGHT - 1), 2 * MAX_WEIGHT - 1) * 1000
    state = genesis_state(np.zeros(1, np.float32), run)
    fold_round(state, deltas, run)
    assert state.model[0] == round(exact)


@pytest.mark.parametrize(
    "deltas",
    [
        [Weighted(sparse({0: 1}), MAX_WEIGHT + 1)],
        [Weighted(sparse({0: 1}), 0)],
        [Weighted(sparse({0: 1}), 1)] * (MAX_DELTAS + 1),
    ],
)
def test_exactness_more_than_the_exact_sum_allows_is_refused(deltas):
    with pytest.raises(ValueError, match="exact sum"):
        fold_all(NET.run(), [deltas])


@pytest.mark.parametrize("outer", OUTERS.values(), ids=OUTERS)
def test_chunks_where_a_chunk_ends_does_not_matter(outer, monkeypatch):
    size = 2 * CHUNK + 5
    run = NET.run(num_parameters=size, outer=outer)
    rng = np.random.default_rng(7)
    genesis = rng.standard_normal(size).astype(np.float32)
    edges = np.array([0, CHUNK - 1, CHUNK, 2 * CHUNK - 1, 2 * CHUNK, size - 1])
    rounds = [
        [
            Weighted(Payload(edges, rng.integers(-99, 99, 6).astype(np.int16)), 3),
            Weighted(Payload(np.arange(size), rng.integers(-99, 99, size).astype(np.int16)), 5),
        ]
        for _ in range(2)
    ]
    whole = model_hash(fold_all(run, rounds, genesis))
    for chunk in (4096, 70_001):
        monkeypatch.setattr(fold_module, "CHUNK", chunk)
        monkeypatch.setattr(sums_module, "CHUNK", chunk)
        assert model_hash(fold_all(run, rounds, genesis)) == whole


@pytest.mark.parametrize("sign", [1, -1])
def test_saturation_a_value_stops_at_the_bounds_of_int32(sign):
    run = NET.run(num_parameters=2, grid_bits=24, outer=Outer("fedavg", 1000.0))
    state = genesis_state(np.zeros(2, np.float32), run)
    deltas = [Weighted(sparse({0: sign * 32767}), 1)]
    for _ in range(70):
        fold_round(state, deltas, run)
    assert state.model.tolist() == [2**31 - 1 if sign > 0 else -(2**31), 0]
    fold_round(state, [Weighted(sparse({0: -sign}), 1)], run)
    assert state.model[0] != (2**31 - 1 if sign > 0 else -(2**31))


def test_an_idle_coordinate_of_fedadam_stays_where_it_is():
    run = NET.run(outer=Outer("fedadam", 1000.0, epsilon=1e-12))
    state = fold_all(run, [[Weighted(sparse({3: 7}), 1)]] * 5)
    idle = np.arange(40) != 3
    assert np.array_equal(state.model[idle], genesis_for(run).model[idle])


# --- genesis and view --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "genesis",
    [
        np.zeros(39, np.float32),
        np.zeros((1, 40), np.float32),
        np.full(40, np.nan, np.float32),
        np.full(40, np.inf, np.float32),
        np.full(40, 2.0**19, np.float32),
    ],
)
def test_a_genesis_that_does_not_fit_the_run_is_refused(genesis):
    with pytest.raises(ValueError, match="genesis"):
        genesis_state(genesis, NET.run())


def test_the_view_is_the_model_in_float32():
    run = NET.run(grid_bits=12)
    view = view_of(genesis_for(run), 12)
    assert view.dtype == np.float32
    assert np.array_equal(view, np.rint(GENESIS.astype(np.float64) * 4096) / 4096)
    assert np.array_equal(genesis_state(view, run).model, genesis_for(run).model)


def test_the_hash_is_of_the_model_alone():
    state = genesis_for(NET.run(outer=OUTERS["fedadam"]))
    other = state.copy()
    other.first += 1
    assert model_hash(other) == model_hash(state)
    other.model[0] += 1
    assert model_hash(other) != model_hash(state)


def test_a_copy_is_independent():
    run = NET.run(outer=OUTERS["fedadam"])
    state = genesis_for(run)
    before = model_hash(state)
    fold_round(state.copy(), [Weighted(sparse({0: 99}), 1)], run)
    assert model_hash(state) == before
    assert not state.first.any()


def test_the_fold_is_the_same_on_every_machine():
    """Fixed runs of twenty rounds, one per optimiser and rule, have a fixed hash everywhere."""
    digest = hashlib.blake2b(digest_size=32)
    for outer, robust in itertools.product(OUTERS.values(), ROBUST):
        run = NET.run(outer=outer, robust=robust)
        rng = random.Random(11)
        rounds = [
            [Weighted(some_payload(run, r, i), rng.randint(1, MAX_WEIGHT)) for i in range(5)]
            for r in range(20)
        ]
        state = fold_all(run, rounds)
        digest.update(model_hash(state) + state.first.tobytes() + state.second.tobytes())
    assert digest.hexdigest() == "9354e4766ac2ab808cbeb78767076d89175fe03b50adecf2b12e00fc23822a9d"
