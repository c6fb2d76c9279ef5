"""Hearsay about presence: claims merge in any order, subjects have the last word, liars little."""

from __future__ import annotations

import random

import pytest
from consortium import Consortium, peer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfed.errors import RemoteProtocolError
from p2pfed.gossip.attendance import Attendance
from p2pfed.gossip.claims import MAX_STAMP, Claim, Hearsay, Kind
from p2pfed.gossip.membership import Liveness, Membership, State
from p2pfed.gossip.rumours import OPENING_INTERVAL, Rumours
from p2pfed.gossip.seating import Seating
from p2pfed.wire.messages import decode_message
from p2pfed.wire.spreading import Claims

SIZE = 6
NET = Consortium(SIZE)
PLAN = Seating(NET.book()).current()
CROWD = Liveness(full_mesh=2)
RUN = b"r" * 32
CLAIMS = st.tuples(
    st.integers(1, SIZE - 1), st.builds(Claim, st.integers(0, 40), st.sampled_from([b"", RUN[:4]]))
)


# --- the table -----------------------------------------------------------------------------------


@given(st.lists(CLAIMS, max_size=12), st.randoms(use_true_random=False))
def test_claims_merge_alike_in_whatever_order_and_however_often_they_come(claims, rng):
    tables = []
    for _ in range(2):
        hearsay = Hearsay(peer_of(0))
        for i, claim in rng.sample(claims, len(claims)) + claims:
            if not hearsay.knows_better(peer_of(i), claim):
                hearsay.hear(peer_of(i), claim)
        tables.append(hearsay)
    assert tables[0].table == tables[1].table
    assert tables[0].digest() == tables[1].digest()


@given(st.dictionaries(st.integers(0, SIZE - 1), st.integers(0, MAX_STAMP - 1)))
def test_what_is_read_is_what_was_told(stamps):
    hearsay = Hearsay(peer_of(0))
    hearsay.table = {peer_of(i): Claim(stamp, RUN[:4]) for i, stamp in stamps.items()}
    told = hearsay.everything(PLAN, compare=True)
    assert dict(Hearsay.read(told, PLAN)) == hearsay.table
    assert told.digest == hearsay.digest()


@pytest.mark.parametrize("data", [b"\x80", b"\x01", b"\xff" * 10 + b"\x00\x00", b"\x06\x04"])
def test_records_that_are_cut_short_or_beyond_the_roster_are_refused(data):
    with pytest.raises(RemoteProtocolError):
        Hearsay.read(Claims(PLAN.prefix, b"", ((RUN[:4], data),)), PLAN)


@given(st.binary(max_size=60))
def test_random_records_are_claims_about_members_or_refused(data):
    try:
        read = Hearsay.read(Claims(PLAN.prefix, b"", ((b"", data),)), PLAN)
    except RemoteProtocolError:
        return
    assert all(peer in PLAN.seat and 0 <= claim.stamp < MAX_STAMP for peer, claim in read)


def test_who_hears_that_it_is_gone_says_louder_that_it_is_not():
    hearsay = Hearsay(peer_of(0))
    hearsay.speak(Kind.CONTRIBUTES, RUN[:4])
    own = hearsay.table[peer_of(0)]
    hearsay.hear(peer_of(0), own.of_kind(Kind.LEFT))
    assert hearsay.table[peer_of(0)].kind is Kind.CONTRIBUTES
    assert hearsay.table[peer_of(0)].count == own.count + 1
    hearsay.speak(Kind.CONTRIBUTES, RUN[:4])  # nothing new
    assert hearsay.table[peer_of(0)].count == own.count + 1


def test_news_is_told_a_few_times_and_then_no_more():
    hearsay = Hearsay(peer_of(0))
    hearsay.speak(Kind.IDLE, b"")
    told = 0
    while hearsay.has_news:
        assert Hearsay.read(hearsay.news(PLAN), PLAN)
        told += 1
    assert 1 < told < 10


# --- between nodes -------------------------------------------------------------------------------


class Node:
    """One member of a crowd, without its connections."""

    def __init__(self, i: int) -> None:
        self.id = peer_of(i)
        self.membership = Membership(self.id, CROWD)
        self.membership.adopt(NET.roster)
        self.rumours = Rumours(self.membership, Seating(NET.book()))
        self.attendance = Attendance(self.membership)

    def state(self, i: int) -> State:
        return self.membership.get(peer_of(i)).state

    def hear(self, sender: int, effects, now: float) -> list:
        """What was sent to this node; returns its answers."""
        peer = self.membership.get(peer_of(sender))
        return [
            answer
            for effect in effects
            if effect.peer == self.id
            for answer in self.rumours.on_claims(peer, decode_message(effect.frame), now)
        ]

    def presence(self, round_: int = 0):
        self.attendance.tick()
        return self.attendance.of(RUN, round_, contributes=True)


def speaking(n: int = SIZE) -> list[Node]:
    nodes = [Node(i) for i in range(n)]
    for node in nodes:
        node.rumours.speak(contributes=True, run_id=RUN)
    return nodes


def mingle(nodes: list[Node], now: float, rng: random.Random, contacts: int = 12) -> None:
    """Everybody talks to random others; answers are delivered too."""
    for _ in range(contacts):
        for i, node in enumerate(nodes):
            j = rng.choice([j for j in range(len(nodes)) if j != i])
            said = node.rumours.contact(nodes[j].id, now)
            back = [e for e in nodes[j].hear(i, said, now) if hasattr(e, "frame")]
            again = [e for e in node.hear(j, back, now) if hasattr(e, "frame")]
            nodes[j].hear(i, again, now)
        now += 0.5


def test_everyone_learns_who_is_there_and_what_it_gives():
    nodes = speaking()
    nodes[3].rumours.speak(contributes=False, run_id=RUN)
    nodes[4].rumours.speak(contributes=True, run_id=b"x" * 32)
    mingle(nodes, 0.0, random.Random(1))
    presence = nodes[0].presence()
    assert presence.alive == {peer_of(i) for i in (0, 1, 2, 3, 5)}
    assert presence.contributing == {peer_of(i) for i in (0, 1, 2, 5)}
    assert presence.in_run == frozenset()  # nobody is connected here


def test_a_goodbye_to_one_reaches_all_and_a_return_too():
    nodes, rng = speaking(), random.Random(2)
    mingle(nodes, 0.0, rng)
    gone = nodes[1].membership.get(peer_of(5))
    nodes[1].membership.left(gone)
    nodes[1].rumours.judged(gone)
    mingle(nodes[:5], 50.0, rng)
    assert all(node.state(5) is State.LEFT for node in nodes[:5])
    assert nodes[0].presence().left == {peer_of(5)}
    mingle(nodes, 100.0, rng)
    assert all(node.state(5) is State.ALIVE for node in nodes[:5])


@pytest.mark.parametrize(("is_there", "verdict"), [(False, State.AWAY), (True, State.ALIVE)])
def test_silence_is_suspect_then_away_unless_the_silent_one_speaks_up(is_there, verdict):
    nodes, rng = speaking(), random.Random(3)
    mingle(nodes, 0.0, rng)
    watcher, silent = nodes[1], nodes[1].membership.get(peer_of(5))
    watcher.membership.link(silent)
    watcher.membership.heard(silent, 40.0)
    watcher.membership.unlink(silent, 41.0)
    [judged] = watcher.membership.tick(41.0 + CROWD.suspect_after + 0.1)
    assert judged.state is State.SUSPECT
    watcher.rumours.judged(judged)
    mingle(nodes if is_there else nodes[:5], 46.0, rng)
    for node in nodes[:5]:
        node.membership.tick(46.0 + 10 + CROWD.away_after)
        assert node.state(5) is verdict


def test_a_claim_against_one_that_speaks_to_us_goes_to_that_one_alone():
    nodes = speaking(3)
    heard = nodes[0].membership.get(peer_of(2))
    nodes[0].membership.link(heard)
    nodes[0].membership.heard(heard, 0.0)
    lie = Hearsay(peer_of(1))
    lie.table[peer_of(2)] = Claim(4 * 9 + Kind.LEFT)
    sender = nodes[0].membership.get(peer_of(1))
    message = lie.everything(PLAN, compare=False)
    [warning] = nodes[0].rumours.on_claims(sender, message, 1.0)
    assert warning.peer == peer_of(2)
    assert nodes[0].state(2) is State.ALIVE
    nodes[2].hear(0, [warning], 1.0)
    assert nodes[2].rumours.hearsay.table[peer_of(2)].count == 10
    assert nodes[2].rumours.hearsay.table[peer_of(2)].kind is Kind.CONTRIBUTES


def test_who_is_slandered_counts_again_with_its_next_delta():
    """A stamp so high that its subject cannot outbid it; deltas are signed, claims are not."""
    node = speaking(1)[0]
    node.membership.claimed(node.membership.get(peer_of(1)), Claim(MAX_STAMP - 1, RUN[:4]), 0.0)
    assert peer_of(1) in node.presence(7).left
    node.membership.vouch(peer_of(1), 7)
    assert peer_of(1) in node.presence(7).contributing
    assert peer_of(1) not in node.presence(7).left
    assert peer_of(1) in node.presence(8).left


def test_two_that_agree_say_one_short_message_and_no_more():
    nodes, rng = speaking(2), random.Random(4)
    mingle(nodes, 0.0, rng)
    [question] = nodes[0].rumours.opening(nodes[1].id, 500.0)
    assert len(question.frame) < 40
    assert nodes[1].hear(0, [question], 500.0) == []
    assert nodes[0].rumours.opening(nodes[1].id, 500.0 + OPENING_INTERVAL / 2) == []


@settings(max_examples=20)
@given(st.lists(st.sampled_from(["on", "off"]), min_size=1, max_size=6), st.integers(0, 99))
def test_after_any_changes_all_tables_end_equal(changes, seed):
    nodes, rng = speaking(4), random.Random(seed)
    now = 0.0
    for change in changes:
        rng.choice(nodes).rumours.speak(contributes=change == "on", run_id=RUN)
        mingle(nodes, now, rng, contacts=2)
        now += 40.0
    mingle(nodes, now, rng, contacts=8)
    mingle(nodes, now + 60, rng, contacts=8)
    assert len({node.rumours.hearsay.digest() for node in nodes}) == 1


def test_in_a_small_network_nothing_is_said_or_believed():
    membership = Membership(peer_of(0), Liveness())
    membership.adopt(NET.roster)
    rumours = Rumours(membership, Seating(NET.book()))
    rumours.speak(contributes=True, run_id=RUN)
    assert rumours.contact(peer_of(1), 0.0) == rumours.opening(peer_of(1), 0.0) == []
    lie = Hearsay(peer_of(1))
    lie.table[peer_of(2)] = Claim(4 * 9 + Kind.LEFT)
    peer = membership.get(peer_of(1))
    assert rumours.on_claims(peer, lie.everything(PLAN, compare=True), 0.0) == []
    assert membership.get(peer_of(2)).state is State.UNKNOWN
