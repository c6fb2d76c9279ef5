"""Witnesses: what a node must hear of its own past before it releases; and what peers may ask."""

from __future__ import annotations

import random

import pytest
from consortium import Consortium, hospital, key_of, peer_of, sparse
from scenario import World

from p2pfed.errors import RemoteProtocolError
from p2pfed.gossip.aside import EACH, MAX_BYTES, Aside
from p2pfed.gossip.events import Disconnect, Keep, Note, Send, SendWitness, StopDialling
from p2pfed.gossip.guard import BLOBS, FIRST, LONGEST, MEMORY, STRIKES, Bucket, Guard
from p2pfed.gossip.membership import Liveness, Membership
from p2pfed.gossip.sync import Sync
from p2pfed.gossip.witness import ASK_AGAIN, ENOUGH, Witnesses, witness_of
from p2pfed.identity.signing import DELTA, sign
from p2pfed.wire.delta import Proof
from p2pfed.wire.messages import (
    AskCheckpoints,
    AskWitness,
    Beat,
    Digest,
    Range,
    Want,
    Witness,
    decode_message,
    encode_message,
)

NET = Consortium(5)
RUN = NET.run()
EARLIER = NET.run(name="an earlier run")


def witnesses(n: int = 5, net: Consortium | None = None) -> Witnesses:
    net = net or Consortium(n)
    membership = Membership(peer_of(0), Liveness())
    membership.adopt(net.roster)
    return Witnesses(
        peer_of(0), lambda data: sign(key_of(0).seed, DELTA, data), net.book(), membership
    )


def shown(*deltas) -> Witness:
    return Witness(tuple((d.signed.header_bytes, d.signed.signature) for d in deltas))


def asked(effects) -> list[str]:
    return [
        e.peer
        for e in effects
        if isinstance(e, Send) and isinstance(decode_message(e.frame), AskWitness)
    ]


# --- how many answers ----------------------------------------------------------------------------


@pytest.mark.parametrize(("members", "needed"), [(1, 0), (2, 1), (3, 2), (4, 2), (50, 2)])
def test_two_others_must_answer_or_all_of_them_where_there_are_fewer(members, needed):
    assert witnesses(members).missing == needed


def test_each_member_counts_once_and_a_stranger_or_one_that_does_not_train_not_at_all():
    net = Consortium(2)
    net.grow(hospital(2, 10), hospital(7, 0, roles=("relay",)))
    w = witnesses(net=net)
    for who in (peer_of(1), peer_of(1), peer_of(7), peer_of(9), peer_of(0)):
        w.hear(who, Witness(()))
    assert w.missing == 1
    w.hear(peer_of(2), Witness(()))
    assert w.missing == 0


def test_a_member_is_asked_when_it_connects_and_again_until_enough_have_answered():
    w = witnesses()
    assert asked(w.connected(peer_of(1))) == [peer_of(1)]
    assert asked(w.connected(peer_of(9))) == []  # not a member
    for i in (1, 2, 3):
        peer = w._membership.peers[peer_of(i)]
        w._membership.link(peer)
        w._membership.heard(peer, 0.0)
    everyone = sorted(peer_of(i) for i in (1, 2, 3))
    assert asked(w.tick(0.0)) == everyone
    assert asked(w.tick(ASK_AGAIN - 0.1)) == []
    w.hear(peer_of(1), Witness(()))
    assert asked(w.tick(ASK_AGAIN)) == sorted(set(everyone) - {peer_of(1)})
    w.hear(peer_of(2), Witness(()))
    assert asked(w.tick(3 * ASK_AGAIN)) == []
    assert asked(w.connected(peer_of(2))) == []
    assert asked(w.connected(peer_of(4))) == [peer_of(4)]  # who is reached later may know more


def test_a_question_is_answered_from_the_store():
    assert witnesses().hear(peer_of(3), AskWitness()) == [SendWitness(peer_of(3))]


# --- what the answers say ------------------------------------------------------------------------


def test_a_witness_shows_the_newest_header_of_every_run_and_only_the_askers():
    held = [NET.delta(RUN, r, 0) for r in (0, 4, 2)] + [NET.delta(EARLIER, 7, 0)]
    others = [NET.delta(RUN, 9, i) for i in (1, 2)]
    answer = witness_of(peer_of(0), [d.signed for d in [*held, *others]])
    assert sorted(answer.headers) == sorted(shown(held[1], held[3]).headers)
    assert decode_message(encode_message(answer)) == answer
    assert witness_of(peer_of(4), [d.signed for d in held]) == Witness(())


def test_every_head_that_was_ever_shown_must_be_known_to_the_ledger_over_all_runs():
    w = witnesses()
    w.hear(peer_of(1), shown(NET.delta(RUN, 1, 0, ledger_head=b"b" * 32)))
    w.hear(peer_of(2), shown(NET.delta(EARLIER, 8, 0, ledger_head=b"a" * 32)))
    assert w.heads == (b"a" * 32, b"b" * 32)
    w.hear(peer_of(3), shown(NET.delta(RUN, 5, 0, ledger_head=b"c" * 32)))
    w.hear(peer_of(4), shown(NET.delta(RUN, 2, 0, ledger_head=b"d" * 32)))  # knows less
    assert w.heads == (b"a" * 32, b"c" * 32)
    assert (w.closed_round(RUN.run_id), w.closed_round(EARLIER.run_id)) == (5, 8)
    assert w.closed_round(bytes(32)) == -1


def test_what_the_node_lacks_it_asks_for_by_name_and_what_it_holds_it_does_not():
    w = witnesses()
    w.remember([NET.delta(RUN, 3, 0).signed])
    assert w.hear(peer_of(1), shown(NET.delta(RUN, 3, 0))) == []
    later = NET.delta(RUN, 4, 0)
    [want, note] = w.hear(peer_of(1), shown(later))
    assert decode_message(want.frame) == Want(RUN.run_id, later.fact[:16])
    assert (note.type, note.data["round"]) == ("witness.later", 4)


@pytest.mark.parametrize(
    "forged",
    [
        shown(NET.delta(RUN, 1, 1)),  # somebody else's, well signed
        Witness(((NET.delta(RUN, 1, 0).signed.header_bytes, bytes(64)),)),
        Witness(((b"x", sign(key_of(0).seed, DELTA, b"x")),)),  # no header at all
        Witness((shown(NET.delta(RUN, 1, 0)).headers[0], (b"", bytes(64)))),
    ],
)
def test_a_past_cannot_be_invented(forged):
    w = witnesses()
    with pytest.raises(RemoteProtocolError):
        w.hear(peer_of(1), forged)
    assert (w.missing, w.heads) == (ENOUGH, ())


# --- a whole network -----------------------------------------------------------------------------


def test_a_node_that_lost_all_but_its_key_signs_no_round_twice_and_spends_nothing_more():
    world = World(4, rounds=20)
    world.add(*range(4))
    world.heap.run_until(5)
    node = world.nodes[2]
    told = set().union(*(n.disk.deltas for n in world.nodes if n is not node))
    released = {
        f for f in told & set(node.disk.deltas) if node.disk.deltas[f].header.origin == node.peer_id
    }
    assert len(released) > 1
    world.heap.crash(node)
    node.disk.deltas.clear()
    node.disk.checkpoints.held.clear()
    node.disk.ledger = type(node.disk.ledger)()
    before = len(node.trained_rounds)
    world.heap.start(node)
    world.run_to_the_end()
    assert len(node.trained_rounds) == before  # nothing was debited
    assert [n for n in node.notes if n.type == "privacy.rollback"]
    own = {f for f, d in node.disk.deltas.items() if d.header.origin == node.peer_id}
    assert own == released  # it took its own deltas back
    for each in world.nodes:
        assert not [n for n in each.notes if n.type == "peer.equivocated"]


def test_a_node_cut_off_from_its_witnesses_receives_nothing_and_spends_nothing():
    world = World(4, rounds=30, min_live=0.1)
    world.add(*range(4))
    world.heap.run_until(3)
    node = world.nodes[0]
    world.heap.crash(node)
    world.cut(0, 1)
    before = len(node.trained_rounds)
    world.heap.start(node)
    world.heap.run_until(8)  # one witness is reached, two are needed
    assert len(node.trained_rounds) == before
    assert node.core.progress.round > 0
    assert "waiting for witnesses: 1 more" in node.core.why_not_contributing()
    world.cut()
    world.run_to_the_end()
    assert len(node.trained_rounds) > before


# --- what peers may ask --------------------------------------------------------------------------


def guarded() -> tuple[Guard, Membership]:
    membership = Membership(peer_of(0), Liveness())
    membership.adopt(NET.roster)
    return Guard(membership), membership


def test_a_bucket_holds_a_burst_and_fills_at_its_rate():
    bucket = Bucket.full(BLOBS, 0.0)
    assert all(bucket.take(1, 0.0) for _ in range(60))
    assert not bucket.take(1, 0.0)
    assert not bucket.take(1, 0.4)
    assert bucket.take(1, 2.0)
    assert not bucket.is_overdrawn
    bucket.take(200, 2.0)
    assert bucket.is_overdrawn


@pytest.mark.parametrize(
    "question",
    [
        Want(RUN.run_id, bytes(16 * 1024)),
        Digest(RUN.run_id, 0, tuple(Range(r, 1, bytes(16)) for r in range(256))),
        AskCheckpoints(RUN.run_id),
        AskWitness(),
    ],
)
def test_who_asks_too_much_is_not_answered_then_blamed_then_answered_again(question):
    guard, membership = guarded()
    peer = membership.peers[peer_of(1)]
    answered = 0
    while (limited := guard.weigh(peer, question, 0.0)) is None:
        answered += 1
    assert answered >= 32
    assert [e.type for e in limited] == ["peer.limited"]
    assert guard.weigh(peer, question, 0.0) == []  # noted once
    for _ in range(answered - 2):
        assert guard.weigh(peer, question, 0.0) == []
    with pytest.raises(RemoteProtocolError, match="too many"):
        list(iter(lambda: guard.weigh(peer, question, 0.0), None))
    assert guard.weigh(peer, question, 60.0) is None
    assert guard.weigh(membership.peers[peer_of(2)], question, 0.0) is None  # others are free


def test_an_honest_joiner_of_a_large_archive_meets_no_limit():
    """It verifies at most some 5000 deltas a second, and asks for no more than it can take."""
    guard, membership = guarded()
    peer, now = membership.peers[peer_of(1)], 0.0
    for _ in range(2000):
        assert guard.weigh(peer, Want(RUN.run_id, bytes(16 * 1024)), now) is None
        now += 1024 / 5000


def test_after_three_strikes_in_a_minute_a_peer_is_refused_twice_as_long_each_time():
    guard, membership = guarded()
    peer, now = membership.peers[peer_of(1)], 0.0
    peer.addresses = ("/ip4/10.0.0.1/tcp/1",)
    lengths = []
    for _ in range(12):
        for _ in range(STRIKES - 1):
            assert guard.turned_away(peer.peer_id, now) is None
            assert not [e for e in guard.blame(peer, "x", now) if isinstance(e, StopDialling)]
        effects = guard.blame(peer, "x", now)
        assert StopDialling(peer.peer_id) in effects
        [seconds] = [e.data["seconds"] for e in effects if getattr(e, "type", "") == "peer.refused"]
        lengths.append(seconds)
        assert isinstance(guard.turned_away(peer.peer_id, now + seconds - 0.1), Disconnect)
        assert guard.tick(now + seconds - 0.1) == []
        now += seconds
        assert guard.turned_away(peer.peer_id, now) is None
        assert guard.tick(now) == [Keep(peer.peer_id, peer.addresses)]  # dialled again, once
        assert guard.tick(now) == []
    assert lengths[:3] == [FIRST, 2 * FIRST, 4 * FIRST]
    assert max(lengths) == lengths[-1] == LONGEST
    now += LONGEST + 1
    for _ in range(STRIKES):
        effects = guard.blame(peer, "x", now)
    assert [e.data["seconds"] for e in effects if isinstance(e, Note) and "seconds" in e.data] == [
        FIRST
    ]


def test_strikes_far_apart_are_forgiven():
    guard, membership = guarded()
    peer = membership.peers[peer_of(1)]
    for n in range(10):
        effects = guard.blame(peer, "x", n * MEMORY / (STRIKES - 1) + n)
        assert not [e for e in effects if isinstance(e, StopDialling)]


def test_the_guards_table_holds_members_only():
    guard, _ = guarded()
    for i in range(9, 200):
        assert guard.turned_away(peer_of(i), 0.0) is not None
    assert guard._records == {}


# --- deltas set aside ----------------------------------------------------------------------------


def test_memory_of_what_is_set_aside_is_bounded_whatever_is_sent():
    """Property: at most EACH per origin and MAX_BYTES of payloads; names count like payloads."""
    rng, aside = random.Random(1), Aside()
    made = [NET.delta(RUN, r, i) for r in range(20) for i in range(5)]
    size = len(made[0].payload)
    for _ in range(500):
        delta = rng.choice(made)
        aside.add(delta)
        assert (delta.header.round, delta.header.origin) in aside or len(aside) >= EACH
        assert len(aside) <= EACH * 5
        assert aside.num_bytes <= min(MAX_BYTES, EACH * 5 * 2 * size)
        if rng.random() < 0.02:
            aside.take(rng.randrange(20))
    assert aside.newest == {
        o: max(r for r, origin in aside._held if origin == o) for _, o in aside._held
    }
    aside.clear()
    assert (len(aside), aside.num_bytes, aside.newest) == (0, 0, {})


def test_a_payload_beyond_the_bytes_is_dropped_and_its_name_kept(monkeypatch):
    first, second = NET.delta(RUN, 10, 1), NET.delta(RUN, 10, 2)
    monkeypatch.setattr("p2pfed.gossip.aside.MAX_BYTES", len(first.payload))
    aside = Aside()
    aside.add(first)
    aside.add(second)
    assert second.fact[:16] in aside  # it is not asked for again before its time
    assert aside.newest == {peer_of(1): 10, peer_of(2): 10}
    assert aside.take(9) == []
    assert aside.take(10) == [first]
    assert second.fact[:16] not in aside


# --- documents between runs ----------------------------------------------------------------------


def test_peers_in_different_runs_compare_rosters_only():
    """Proofs belong to a run; else two nodes in different runs would list all, beat for beat."""
    book = NET.book()
    one, other = Sync(book, lambda _: False), Sync(NET.book(), lambda _: False)
    here, there = NET.facts(RUN, book=book), NET.facts(EARLIER)
    one.take_run(here)
    other.take_run(there)
    first, second = NET.delta(RUN, 0, 1), NET.delta(RUN, 0, 1, sparse({1: 1}))
    here.add_proof(Proof.of(first.signed, second.signed))
    assert one.documents_digest() != other.documents_digest()
    assert one.documents_agree(beat_of(other, EARLIER))
    assert other.documents_agree(beat_of(one, RUN))
    same = Sync(NET.book(), lambda _: False)
    same.take_run(NET.facts(RUN))
    assert not same.documents_agree(beat_of(one, RUN))  # it lacks the proof
    behind = Sync(NET.book(1), lambda _: False)
    behind.take_run(there)
    assert not behind.documents_agree(beat_of(one, RUN))  # it lacks a roster


def beat_of(sync: Sync, run) -> Beat:
    return Beat(1, bytes(32), run.run_id, b"", 0, True, 0, b"", sync.documents_digest(), ())
