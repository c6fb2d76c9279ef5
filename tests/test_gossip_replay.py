"""Replay: whenever a fact arrives, the model is as if it had been there on time."""

from __future__ import annotations

import numpy as np
import pytest
from consortium import Consortium, peer_of, some_payload
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfed.gossip.events import Fold
from p2pfed.gossip.facts import RunFacts
from p2pfed.gossip.fold import genesis_state, model_hash
from p2pfed.gossip.joining import (
    VOUCHERS,
    checkpoint_interval,
    kept_rounds,
    trusted_checkpoint,
)
from p2pfed.gossip.replay import MemoryCheckpoints, Replay
from p2pfed.identity.run import Outer
from p2pfed.wire.delta import Proof
from p2pfed.wire.messages import CheckpointOffer
from p2pfed.wire.payload import decode_payload

NET = Consortium(3)
RUN = NET.run(outer=Outer("fedadam", 0.03), robust="clip-median", rounds=40)
ROUNDS = 24
ALL = [NET.delta(RUN, r, i) for r in range(ROUNDS) for i in range(3)]
GENESIS = np.linspace(-1, 1, 40, dtype=np.float32)


class Counting(Replay):
    """Also says which payloads were read."""

    def __init__(self, checkpoints: MemoryCheckpoints, deltas=ALL) -> None:
        self.reads: set[bytes] = set()
        self.payloads = {d.fact: d.payload for d in deltas}
        super().__init__(RUN, lambda: GENESIS, checkpoints, self._read)

    def _read(self, fact: bytes):
        self.reads.add(fact)
        return decode_payload(self.payloads[fact], num_parameters=40, max_released=40)


def wanted(facts: RunFacts, round_: int) -> Fold:
    return Fold(
        round_,
        tuple(facts.chain(r) for r in range(round_ + 1)),
        tuple(facts.counted(r) for r in range(round_)),
        facts.adopted_round,
    )


def fresh_hash(facts: RunFacts, round_: int) -> bytes:
    return model_hash(Counting(MemoryCheckpoints()).fold(wanted(facts, round_)))


ON_TIME = NET.facts(RUN, ALL)
ON_TIME_HASH = fresh_hash(ON_TIME, ROUNDS)


@pytest.mark.parametrize("late", [0, 1, 2, 7, 8, 15, 16, 22, 23])
@pytest.mark.parametrize("restart", [False, True])
def test_a_late_delta_of_any_age_folds_exactly_as_if_it_had_been_on_time(late, restart):
    straggler = ALL[3 * late + 1]
    facts = NET.facts(RUN, [d for d in ALL if d is not straggler])
    checkpoints = MemoryCheckpoints()
    replay = Counting(checkpoints)
    for r in range(1, ROUNDS):
        replay.fold(wanted(facts, r))
    assert model_hash(replay.fold(wanted(facts, ROUNDS))) != ON_TIME_HASH
    facts.add(straggler.signed)
    replay = Counting(checkpoints) if restart else replay
    replay.reads.clear()
    assert model_hash(replay.fold(wanted(facts, ROUNDS))) == ON_TIME_HASH
    oldest = max(r for r in kept_rounds(ROUNDS, 1) if r <= late)
    assert len(replay.reads) == 3 * (ROUNDS - oldest)


@settings(max_examples=15)
@given(st.permutations(ALL), st.lists(st.integers(0, len(ALL)), min_size=3, max_size=6))
def test_deltas_in_any_order_with_folds_in_between_give_the_same_model(order, folds):
    facts = NET.facts(RUN)
    replay = Counting(MemoryCheckpoints())
    for at, delta in enumerate(order):
        if at in folds:
            replay.fold(wanted(facts, 1 + at % ROUNDS))
        facts.add(delta.signed)
    assert model_hash(replay.fold(wanted(facts, ROUNDS))) == ON_TIME_HASH


@pytest.mark.parametrize("from_round", [0, 5, 23])
def test_a_revoked_member_is_removed_exactly(from_round):
    net = Consortium(3)
    book = net.book()
    facts = net.facts(RUN, ALL, book)
    replay = Counting(MemoryCheckpoints())
    assert model_hash(replay.fold(wanted(facts, ROUNDS))) == ON_TIME_HASH
    book.add(net.publish(net.roster.revoke(peer_of(2), reason="test", from_round=from_round)))
    facts.rosters_changed()
    never = [d for d in ALL if d.header.origin != peer_of(2) or d.header.round < from_round]
    expected = fresh_hash(NET.facts(RUN, never), ROUNDS)
    assert model_hash(replay.fold(wanted(facts, ROUNDS))) == expected != ON_TIME_HASH


@pytest.mark.parametrize("proven", [0, 5, 23])
def test_an_equivocator_is_removed_exactly(proven):
    facts = NET.facts(RUN, ALL)
    replay = Counting(MemoryCheckpoints())
    replay.fold(wanted(facts, ROUNDS))
    held = next(d for d in ALL if (d.header.round, d.header.origin) == (proven, peer_of(1)))
    other = NET.delta(RUN, proven, 1, some_payload(RUN, proven, 1, salt=1))
    facts.add_proof(Proof.of(held.signed, other.signed))
    never = [d for d in ALL if d.header.origin != peer_of(1) or d.header.round < proven]
    expected = fresh_hash(NET.facts(RUN, never), ROUNDS)
    assert model_hash(replay.fold(wanted(facts, ROUNDS))) == expected


def test_going_back_to_an_earlier_round_gives_the_earlier_model():
    replay = Counting(MemoryCheckpoints())
    replay.fold(wanted(ON_TIME, ROUNDS))
    assert model_hash(replay.fold(wanted(ON_TIME, 11))) == fresh_hash(ON_TIME, 11)
    assert model_hash(replay.fold(wanted(ON_TIME, 0))) == model_hash(genesis_state(GENESIS, RUN))


def test_what_changes_nothing_costs_nothing():
    replay = Counting(MemoryCheckpoints())
    replay.fold(wanted(ON_TIME, ROUNDS))
    replay.reads.clear()
    replay.fold(wanted(ON_TIME, ROUNDS))
    assert not replay.reads


def test_a_checkpoint_of_other_facts_is_never_continued():
    """One round more or less, another chain: it does not stand for what is wanted."""
    checkpoints = MemoryCheckpoints()
    wrong = genesis_state(GENESIS, RUN)
    wrong.round, wrong.model[0] = 12, 12345
    checkpoints.save(wrong, b"x" * 32)
    replay = Counting(checkpoints)
    assert model_hash(replay.fold(wanted(ON_TIME, ROUNDS))) == ON_TIME_HASH


# --- a joiner ----------------------------------------------------------------------------------


def adopted_at(round_: int, *, keep_file: bool = True):
    """A joiner that adopted the checkpoint of a round, and holds the deltas since."""
    veteran = MemoryCheckpoints()
    replay = Counting(veteran)
    state = replay.fold(wanted(ON_TIME, round_))
    checkpoints = MemoryCheckpoints()
    if keep_file:
        checkpoints.save(state, ON_TIME.chain(round_))
    facts = NET.facts(RUN, [d for d in ALL if d.header.round >= round_])
    facts.adopt(round_, ON_TIME.chain(round_))
    return facts, checkpoints


@pytest.mark.parametrize("round_", [1, 8, 16, 24])
def test_a_joiners_adopted_checkpoint_gives_the_same_hash_as_a_full_replay(round_):
    facts, checkpoints = adopted_at(round_)
    replay = Counting(checkpoints)
    assert model_hash(replay.fold(wanted(facts, ROUNDS))) == ON_TIME_HASH
    assert len(replay.reads) == 3 * (ROUNDS - round_)
    for delta in ALL:
        facts.add(delta.signed)
    facts.archive_complete()
    assert model_hash(replay.fold(wanted(facts, ROUNDS))) == ON_TIME_HASH
    assert model_hash(Counting(MemoryCheckpoints()).fold(wanted(facts, ROUNDS))) == ON_TIME_HASH


def test_the_adopted_checkpoint_is_kept_until_the_archive_is_complete():
    """A late delta of the round after it must find it, though it is no round that is kept."""
    facts, checkpoints = adopted_at(5)
    late = next(d for d in ALL if d.header.round == 6)
    facts = NET.facts(RUN, [d for d in ALL if d.header.round >= 5 and d is not late])
    facts.adopt(5, ON_TIME.chain(5))
    replay = Counting(checkpoints)
    replay.fold(wanted(facts, ROUNDS))
    assert 5 not in kept_rounds(ROUNDS, 1)
    facts.add(late.signed)
    assert model_hash(replay.fold(wanted(facts, ROUNDS))) == ON_TIME_HASH


def test_a_fold_of_half_an_archive_never_passes_for_the_adopted_checkpoint():
    """Its file is lost: what is folded in its place stands for nothing, and is replaced."""
    facts, checkpoints = adopted_at(8, keep_file=False)
    replay = Counting(checkpoints)
    wrong = model_hash(replay.fold(wanted(facts, ROUNDS)))
    assert wrong != ON_TIME_HASH
    assert replay.chain != facts.chain(ROUNDS)
    assert not any(c == facts.chain(r) for r, c in checkpoints.chains().items() if r >= 8)
    for delta in ALL:
        facts.add(delta.signed)
    facts.archive_complete()
    assert facts.chain(8) == ON_TIME.chain(8)  # the very chain that was believed
    assert model_hash(replay.fold(wanted(facts, ROUNDS))) == ON_TIME_HASH
    assert replay.chain == facts.chain(ROUNDS)


# --- which checkpoint to believe -----------------------------------------------------------------


def offer(round_: int, tag: bytes = b"h") -> CheckpointOffer:
    return CheckpointOffer(round_, tag * 32, tag * 32, 100)


@pytest.mark.parametrize(
    ("offers", "believed"),
    [
        ({}, None),
        ({"a": []}, None),
        ({"a": [offer(0)]}, None),
        ({"a": [offer(8)]}, None),
        ({"a": [offer(8)], "b": []}, None),
        ({"a": [offer(8)], "b": [offer(8)]}, None),
        ({"a": [offer(9), offer(8)], "b": [offer(8)], "c": [offer(8)]}, (8, "abc")),
        ({"a": [offer(8, b"x")], "b": [offer(8)]}, None),
        ({"a": [offer(8)], "b": [offer(8)], "c": [offer(9)]}, None),
        ({p: [offer(8)] for p in "abc"} | {"d": [offer(9, b"x")]}, (8, "abc")),
        ({p: [offer(8), offer(4)] for p in "abcd"}, (8, "abcd")),
        (
            {"a": [offer(9, b"x")] * 5, "b": [offer(4)], "c": [offer(4)], "d": [offer(4)]},
            (4, "bcd"),
        ),
    ],
)
def test_a_checkpoint_is_believed_when_enough_peers_vouch_for_every_bit_of_it(offers, believed):
    trusted = trusted_checkpoint(offers)
    assert (trusted and (trusted[0].round, "".join(trusted[1]))) == believed


def test_in_a_network_of_three_the_two_others_are_enough():
    assert trusted_checkpoint({"a": [offer(8)]}, needed=2) is None
    assert trusted_checkpoint({"a": [offer(8)], "b": [offer(8)]}, needed=2) is not None
    assert trusted_checkpoint({}, needed=0) is None


@pytest.mark.parametrize("changed", ["chain", "digest", "size"])
def test_offers_that_differ_in_anything_vouch_for_different_things(changed):
    other = {"chain": b"x" * 32, "digest": b"x" * 32, "size": 101}[changed]
    parts = {"round": 8, "chain": b"h" * 32, "digest": b"h" * 32, "size": 100}
    offers = {p: [offer(8)] for p in "ab"} | {"c": [CheckpointOffer(**(parts | {changed: other}))]}
    assert trusted_checkpoint(offers) is None
    assert VOUCHERS == 3


@given(st.integers(0, 5000), st.sampled_from([1, 2, 3, 8]))
def test_kept_rounds_are_geometric(newest, every):
    kept = sorted(kept_rounds(newest, every))
    assert kept[0] == 0
    assert kept[-1] <= newest
    assert newest - kept[-1] < every
    assert len(kept) <= 3 + 2 * (newest // every + 1).bit_length()
    for age in range(every, newest + 1, max(1, newest // 7)):
        older = [r for r in kept if r <= newest - age]
        assert older[-1] >= newest - max(4 * age, 2 * every)


@given(st.integers(8, 5000), st.integers(0, 3))
def test_kept_rounds_are_shared_by_peers_a_few_rounds_apart(newest, apart):
    shared = kept_rounds(newest, 1) & kept_rounds(newest + apart, 1)
    assert max(shared) >= newest - 8


@pytest.mark.parametrize(("size", "every"), [(1, 1), (1 << 20, 1), (5 << 20, 5)])
def test_large_models_are_checkpointed_less_often(size, every):
    assert checkpoint_interval(size) == every
