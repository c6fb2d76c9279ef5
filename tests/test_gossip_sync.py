"""Digests and anti-entropy: two peers end equal, and no payload crosses twice."""

from __future__ import annotations

from collections import Counter, deque

import pytest
from consortium import Consortium, hospital, peer_of, some_payload
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfed.gossip.asked import MAX_WANTED, PATIENCE
from p2pfed.gossip.digests import EMPTY, DigestTree
from p2pfed.gossip.events import Send, SendStored
from p2pfed.gossip.facts import RunFacts
from p2pfed.gossip.sync import Sync
from p2pfed.identity.book import RosterBook
from p2pfed.wire.delta import Proof
from p2pfed.wire.messages import (
    DOCUMENTS,
    NAME_BYTES,
    Digest,
    Have,
    Range,
    Want,
    decode_message,
)
from p2pfed.wire.spreading import Held, Wanted

NET = Consortium(4)
RUN = NET.run(rounds=200)
ROUNDS = (*range(9), 15, 16, 31, 63, 64, 130)
ALL = {(r, i): NET.delta(RUN, r, i) for r in ROUNDS for i in range(4)}
VARIANTS = {(r, 0): NET.delta(RUN, r, 0, some_payload(RUN, r, 0, salt=1)) for r in range(9)}
SETS = st.sets(st.sampled_from(sorted(ALL)))


def name(text: str) -> bytes:
    return text.encode().ljust(32, b".")


# --- digests -----------------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 9) | st.integers(0, 127), st.integers(0, 1)),
        st.tuples(st.just("discard"), st.integers(0, 9), st.integers(0, 1)),
        st.tuples(st.just("ask"), st.integers(0, 7), st.integers(0, 2)),
    ),
    max_size=40,
)


@settings(max_examples=200)
@given(STEPS)
def test_digests_are_a_function_of_the_set_whatever_was_asked_before(steps):
    """A peer may ask for ranges far beyond what we hold: what was computed then must not stick."""
    tree, held = DigestTree(), set()
    for kind, a, b in steps:
        if kind == "add":
            tree.add(a, name(f"{a}/{b}"))
            held.add((a, b))
        elif kind == "discard":
            tree.discard(a, name(f"{a}/{b}"))
            held.discard((a, b))
        else:
            tree.digest(b << a, 1 << a)
    fresh = DigestTree()
    for a, b in held:
        fresh.add(a, name(f"{a}/{b}"))
    for level in range(8):
        for start in range(0, 128, 1 << level):
            assert tree.digest(start, 1 << level) == fresh.digest(start, 1 << level)
    assert tree.end == fresh.end


@given(SETS, SETS)
def test_equal_sets_give_equal_digests_and_unequal_ones_unequal(one, other):
    trees = []
    for keys in (one, other):
        tree = DigestTree()
        for key in keys:
            tree.add(key[0], ALL[key].fact)
        trees.append(tree)
    assert (trees[0].digest(0, 256) == trees[1].digest(0, 256)) == (one == other)


@given(st.integers(0, 300))
def test_the_cover_is_aligned_and_has_no_gap(end):
    tree = DigestTree()
    if end:
        tree.add(end - 1, name("x"))
    at = 0
    for part in tree.cover():
        assert part.start == at
        assert part.start % part.length == 0
        at += part.length
    assert at == tree.end == end
    assert len(tree.cover()) <= 9


def test_an_empty_range_has_the_digest_of_zeros():
    tree = DigestTree()
    tree.add(5, name("x"))
    tree.discard(5, name("x"))
    assert tree.digest(0, 8) == EMPTY == DigestTree().digest(0, 1)


def test_digest_queries_of_a_peer_do_not_grow_the_memory():
    tree = DigestTree()
    tree.add(3, name("x"))
    for level in range(32):
        for at in range(50):
            tree.digest(at << level, 1 << level)
    assert len(tree._cache) < 50


# --- two peers ---------------------------------------------------------------------------------


class Peer:
    """One side of anti-entropy, with what it sent and asked for."""

    def __init__(self, keys=(), *, book: RosterBook | None = None, run=RUN, deltas=ALL) -> None:
        self.book = book or NET.book()
        self.facts = RunFacts(run, self.book)
        self.stored = {}
        for key in keys:
            self.take(deltas[key])
        self.sync = Sync(self.book, lambda _name: False)
        self.sync.take_run(self.facts)
        self.sent: Counter[bytes] = Counter()
        self.frames = 0

    def take(self, delta) -> None:
        proof = self.facts.add(delta.signed)
        if proof is not None:
            self.facts.add_proof(proof)
        self.stored[delta.fact] = delta

    @property
    def held(self):
        return {f for r in range(200) for f in self.facts.tree.facts(r)}

    def answer(self, message, now: float):
        match message:
            case Digest():
                return self.sync.on_digest("peer", message)
            case Have():
                effects = self.sync.on_have("peer", message, now)
                held = {f[:NAME_BYTES] for f in self.held} | set(self.sync._documents())
                for effect in effects:
                    asked = decode_message(effect.frame)
                    if isinstance(asked, Want):
                        names = {asked.names[i : i + 16] for i in range(0, len(asked.names), 16)}
                        assert not names & held, "it asked for what it holds"
                return effects
            case Want():
                return self.sync.on_want("peer", message)
            case Held():
                return self.sync.spread.on_held("peer", message, now)
            case Wanted():
                return self.sync.spread.on_wanted("peer", message)
        raise AssertionError(message)

    def receive(self, stored: SendStored, sender: Peer) -> None:
        for data in sorted(stored.rosters, key=lambda d: -len(d)):
            self.book.add(data)
            self.facts.rosters_changed()
        for data in stored.proofs:
            self.facts.add_proof(Proof.decode(data))
        for fact in stored.deltas:
            sender.sent[fact] += 1
            self.sync.arrived(sender.stored[fact].signed)
            self.take(sender.stored[fact])


def exchange(one: Peer, other: Peer, *, now: float = 0.0, limit: int = 3000) -> int:
    """Let both open, and answer until nothing is left to say; returns the number of frames."""
    queue = deque((side, e) for side in (one, other) for e in side.sync.opening("peer"))
    if one.sync.documents_digest() != other.sync.documents_digest():
        queue += [
            (one, one.sync.list_documents("peer")),
            (other, other.sync.list_documents("peer")),
        ]
    count = 0
    while queue:
        sender, effect = queue.popleft()
        receiver = other if sender is one else one
        count += 1
        assert count < limit, "they talk for ever"
        if isinstance(effect, SendStored):
            receiver.receive(effect, sender)
        else:
            assert isinstance(effect, Send)
            message = decode_message(effect.frame)
            queue += [(receiver, e) for e in receiver.answer(message, now)]
    return count


@settings(max_examples=40)
@given(SETS, SETS)
def test_two_peers_with_any_sets_end_equal_and_no_payload_crosses_twice(mine, theirs):
    one, other = Peer(mine), Peer(theirs)
    exchange(one, other)
    union = {ALL[key].fact for key in mine | theirs}
    assert one.held == other.held == union
    assert one.facts.chain(200) == other.facts.chain(200)
    assert set((one.sent + other.sent).values()) <= {1}
    assert one.sent.keys() | other.sent.keys() == {ALL[k].fact for k in mine ^ theirs}
    assert exchange(one, other) == 2  # in step: one digest each, no answer


@settings(max_examples=30)
@given(st.lists(st.tuples(SETS, st.integers(0, 2), st.integers(0, 2)), max_size=5))
def test_peers_that_go_on_learning_between_exchanges_stay_in_step(history):
    peers = [Peer() for _ in range(3)]
    for keys, learner, partner in history:
        for key in sorted(keys):
            peers[learner].take(ALL[key])
        if learner != partner:
            exchange(peers[learner], peers[partner])
    for _ in range(2):
        exchange(peers[0], peers[1])
        exchange(peers[1], peers[2])
        exchange(peers[0], peers[2])
    everything = {ALL[k].fact for keys, _, _ in history for k in keys}
    assert all(p.held == everything for p in peers)
    assert all(count <= 2 for p in peers for count in p.sent.values())


def test_in_a_long_run_one_missing_delta_is_found_in_a_few_messages():
    run = NET.run(rounds=1000)
    deltas = {(r, 0): NET.delta(run, r, 0, some_payload(RUN, 0, 0)) for r in range(300)}
    one = Peer(deltas, run=run, deltas=deltas)
    other = Peer([k for k in deltas if k != (123, 0)], run=run, deltas=deltas)
    assert exchange(one, other) <= 20
    assert one.facts.chain(300) == other.facts.chain(300)


@settings(max_examples=30)
@given(st.sets(st.sampled_from(range(9))), st.sets(st.sampled_from(range(9))), st.booleans())
def test_an_equivocators_two_variants_do_not_loop_for_ever(mine, theirs, known):
    """Each side holds another variant; once both know a proof, both leave the origin out."""
    one, other = Peer([(r, 0) for r in mine]), Peer()
    for r in theirs:
        other.take(VARIANTS[(r, 0)])
    if known:
        both = Proof.of(ALL[0, 0].signed, VARIANTS[0, 0].signed)
        one.facts.add_proof(both)
    for round_ in range(3):
        exchange(one, other, now=100.0 * round_)
    assert one.held == other.held
    assert one.facts.chain(9) == other.facts.chain(9)
    assert exchange(one, other, now=1000.0) == 2
    if mine & theirs:
        assert one.facts.is_banned(peer_of(0), min(mine & theirs))


def test_rosters_and_proofs_are_exchanged_like_deltas():
    net = Consortium(4)
    for i in range(4, 7):
        net.grow(hospital(i))
    one = Peer(book=net.book())
    other = Peer(book=net.book(1, 2))
    one.facts.add_proof(Proof.of(ALL[3, 0].signed, VARIANTS[3, 0].signed))
    assert one.sync.documents_digest() != other.sync.documents_digest()
    for attempt in range(4):
        exchange(one, other, now=100.0 * attempt)
    assert one.book.hashes == other.book.hashes
    assert one.facts.proofs == other.facts.proofs
    assert one.sync.documents_digest() == other.sync.documents_digest()


def test_another_run_is_none_of_our_business():
    peer = Peer([(0, 0)])
    stranger = b"x" * 32
    assert peer.sync.on_digest("p", Digest(stranger, 5, (Range(0, 4, b"d" * 16),))) == []
    assert peer.sync.on_have("p", Have(stranger, 0, True, b"n" * 16), 0.0) == []
    without_run = Sync(NET.book(), lambda _name: False)
    assert without_run.opening("p") == []
    assert without_run.on_digest("p", Digest(RUN.run_id, 1, ())) == []


# --- whom to ask -------------------------------------------------------------------------------


def wanted(effects) -> set[bytes]:
    messages = [decode_message(e.frame) for e in effects if isinstance(e, Send)]
    return {
        m.names[i : i + NAME_BYTES]
        for m in messages
        if isinstance(m, Want)
        for i in range(0, len(m.names), NAME_BYTES)
    }


def offers(round_: int, *names: bytes) -> Have:
    return Have(RUN.run_id, round_, False, b"".join(n[:NAME_BYTES] for n in names))


def test_a_fact_is_asked_of_one_peer_at_a_time():
    sync, fact = Peer().sync, ALL[0, 0].fact
    assert wanted(sync.on_have("a", offers(0, fact), 0.0)) == {fact[:16]}
    assert wanted(sync.on_have("b", offers(0, fact), PATIENCE - 0.1)) == set()
    assert wanted(sync.on_have("b", offers(0, fact), PATIENCE + 0.1)) == {fact[:16]}


def test_a_peer_that_offers_and_never_sends_does_not_keep_a_delta_from_us():
    """It offers again and again, faster than anyone else; the honest peer gets its turn."""
    sync, fact, asked_of = Peer().sync, ALL[0, 0].fact, []
    for tick in range(300):
        now = tick / 10
        sync.asked.forget_stale(now)
        if wanted(sync.on_have("liar", offers(0, fact), now)):
            asked_of.append("liar")
        if tick % 10 == 5 and wanted(sync.on_have("honest", offers(0, fact), now)):
            asked_of.append("honest")
    assert "honest" in asked_of[:3]


def test_what_is_set_aside_is_not_asked_for():
    sync = Sync(NET.book(), lambda name: name == ALL[0, 0].fact[:16])
    sync.take_run(RunFacts(RUN, NET.book()))
    assert wanted(sync.on_have("a", offers(0, ALL[0, 0].fact), 0.0)) == set()


def test_made_up_names_fill_a_bounded_table_and_starve_nobody():
    sync, asked = Peer().sync, 0
    for i in range(200):
        names = [name(f"{i}/{j}")[:16] for j in range(100)]
        asked += len(wanted(sync.on_have("liar", offers(0, *names), 0.1)))
    assert asked <= MAX_WANTED
    fact = ALL[0, 0].fact
    assert wanted(sync.on_have("honest", offers(0, fact), 0.2)) == {fact[:16]}
    sync.asked.forget_stale(100.0)
    assert not sync.asked


def test_a_want_is_answered_with_what_is_held_and_nothing_else():
    peer = Peer([(0, 0)])
    roster = NET.rosters[0].hash
    names = ALL[0, 0].fact[:16] + roster[:16] + b"?" * 16
    [answer] = peer.sync.on_want("p", Want(RUN.run_id, names))
    assert answer == SendStored("p", (ALL[0, 0].fact,), (NET.signed[0],), ())
    assert peer.sync.on_want("p", Want(RUN.run_id, b"?" * 16)) == []


def test_a_list_of_all_names_is_answered_with_those_that_are_missing():
    peer = Peer([(0, 0), (0, 1)])
    have = Have(RUN.run_id, 0, True, ALL[0, 0].fact[:16])
    [answer] = [decode_message(e.frame) for e in peer.sync.on_have("p", have, 0.0)]
    assert answer == Have(RUN.run_id, 0, False, ALL[0, 1].fact[:16])
    everything = Have(RUN.run_id, DOCUMENTS, True, b"".join(sorted(peer.sync._documents())))
    assert peer.sync.on_have("p", everything, 0.0) == []


# --- a joiner's archive ------------------------------------------------------------------------


def joiner(adopted: int = 8, keys=((8, 0), (8, 1))) -> Peer:
    peer = Peer(keys)
    peer.facts.adopt(adopted, b"c" * 32)
    return peer


def show(veteran: Peer, peer: Peer, i: int) -> None:
    [opening] = veteran.sync.opening("p")
    peer.sync.on_digest(peer_of(i), decode_message(opening.frame))


def test_an_archive_is_complete_when_two_members_that_hold_all_agree():
    veteran, peer = Peer([(r, i) for r in range(9) for i in range(2)]), joiner()
    exchange(veteran, peer)
    assert peer.held == veteran.held
    show(veteran, peer, 1)
    show(veteran, peer, 1)
    assert peer.facts.adopted is not None
    show(veteran, peer, 2)
    assert peer.facts.adopted is None


def test_an_archive_is_not_complete_while_anything_is_missing():
    veteran, peer = Peer([(r, i) for r in range(9) for i in range(2)]), joiner()
    show(veteran, peer, 1)
    show(veteran, peer, 2)
    assert peer.facts.adopted is not None


def test_strangers_do_not_confirm_an_archive():
    veteran, peer = Peer([(r, i) for r in range(9) for i in range(2)]), joiner()
    exchange(veteran, peer)
    show(veteran, peer, 77)
    show(veteran, peer, 78)
    assert peer.facts.adopted is not None


@pytest.mark.parametrize(
    "ranges",
    [
        (),
        (Range(8, 8, b"x" * 16),),
        (Range(0, 4, EMPTY),),
        (Range(4, 4, EMPTY), Range(8, 8, EMPTY)),
    ],
)
def test_an_archive_is_not_complete_because_a_peer_says_nothing(ranges):
    """Claiming to hold nothing beyond round 2**31 is no agreement about the rounds before 8."""
    peer = joiner()
    for i in (1, 2):
        peer.sync.on_digest(peer_of(i), Digest(RUN.run_id, 1 << 31, ranges))
    assert peer.facts.adopted is not None


def test_two_joiners_that_lack_the_same_do_not_take_each_other_for_complete():
    one, other = joiner(), joiner()
    exchange(one, other)
    assert one.facts.adopted is not None
    assert other.facts.adopted is not None
