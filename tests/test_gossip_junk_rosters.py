"""What strangers and members can make a node do with rosters and goodbyes: nearly nothing.

Counted, not timed: how many documents are read, and how many signatures are checked.
"""

from __future__ import annotations

import json
import random

import pytest
from consortium import Consortium, hospital, key_of, peer_of, steward
from node_parts import a_node

from p2pfed.errors import FactRejected, RemoteProtocolError
from p2pfed.gossip.core import Core
from p2pfed.gossip.events import Connected, Note, Received
from p2pfed.gossip.guard import NOTE_EVERY, Guard
from p2pfed.gossip.membership import Liveness, Membership
from p2pfed.identity import signing
from p2pfed.identity.book import RosterBook
from p2pfed.identity.roster import Roster
from p2pfed.identity.signing import DELTA, MAX_SIGNED_BYTES, ROSTER, SignedDocument, sign
from p2pfed.wire.messages import Ack, Facts, Leave, encode_message


class Read(list):
    """Which payloads were read."""

    def __call__(self, payload: bytes) -> Roster:
        self.append(payload)
        return Roster.decode(payload)


@pytest.fixture
def checks(monkeypatch):
    """The keys against which signatures were checked."""
    asked, real = [], signing._signs
    monkeypatch.setattr(signing, "_signs", lambda key, *rest: asked.append(key) or real(key, *rest))
    return asked


def junk(net: Consortium, version: int = 9) -> bytes:
    """A roster that its own made-up stewards signed."""
    said = json.loads(net.roster.next().encode())
    made_up = [{"name": str(i), "key": key_of(20 + i).public_key.hex()} for i in range(8)]
    said |= {"version": version, "stewards": made_up, "threshold": 8}
    document = SignedDocument(json.dumps(said).encode())
    for i in range(8):
        document = document.signed_by(key_of(20 + i).seed, ROSTER)
    return document.encode()


# --- what a roster costs that nobody vouches for -------------------------------------------------


def test_a_roster_that_no_held_steward_signed_is_refused_unread(checks):
    net, read = Consortium(3), Read()
    book = RosterBook(read=read)
    book.add(net.signed[-1])
    read.clear()
    checks.clear()
    with pytest.raises(FactRejected, match="not signed by 2 of roster v2's stewards"):
        book.check(junk(net))
    assert (read, checks) == ([], [])
    with pytest.raises(FactRejected, match="roster v9 is not signed by 2 of roster v2's stewards"):
        book.check(junk(net), explain=True)  # a person handed it over
    assert len(read) == 1


def test_what_is_held_already_is_known_by_its_hash_alone(checks):
    net, read = Consortium(3), Read()
    book = RosterBook(read=read)
    for document in net.signed:
        book.add(document)
    read.clear()
    checks.clear()
    assert [book.check(document) for document in net.signed] == [None, None]
    assert (read, checks) == ([], [])


def test_one_signature_is_checked_for_each_steward_that_is_known(checks):
    net = Consortium(3)
    book = net.book()
    checks.clear()
    forged = SignedDocument(
        junk(net).partition(b"\n-- ")[0],
        tuple((steward(i % 3).key, bytes(64)) for i in range(64)),
    )
    with pytest.raises(FactRejected, match="not signed by 2"):
        book.check(forged.encode())
    assert sorted(checks) == sorted(steward(i).key for i in range(3))


def test_a_node_several_versions_behind_a_rotation_follows_the_chain_and_backfills_it():
    """The cheap question refuses nothing that was believed before it was asked."""
    net = Consortium(2)
    net.grow(hospital(5))
    net.publish(net.roster.next(stewards=[steward(i) for i in (2, 3, 4)]), 0, 1, 3, 4)
    net.publish(net.roster.next(), 3, 4)
    book = net.book(2)
    for version in (4, 5, 3, 1):  # v4 skips v3; v5 is signed by the new stewards; the rest by hash
        assert book.add(net.signed[version - 1]) is not None
    assert book.hashes == {r.hash for r in net.rosters}


def test_a_document_with_thousands_of_signature_lines_is_refused_by_their_number():
    with pytest.raises(FactRejected, match="more than 64 signatures"):
        SignedDocument.parse(b"{}\n-- p2pfed signatures --\n" + b"no signature\n" * 1000)


async def test_a_stranger_has_no_roster_read_at_the_gate(tmp_path):
    async with a_node(tmp_path) as node:
        await node.operator.join(roster=node.consortium.signed[-1], bootstrap=[])
        node.core.book._read = read = Read()
        for version in range(9, 20):
            assert not node.gate.consider_roster(peer_of(9), junk(node.consortium, version))
        assert read == []


# --- what a member may send ----------------------------------------------------------------------


def core_of(net: Consortium) -> Core:
    core = Core(
        own_id=peer_of(0),
        sign=lambda data: sign(key_of(0).seed, DELTA, data),
        book=net.book(),
        rng=random.Random(1),
    )
    core.handle(Connected(peer_of(1)), 0.0)
    core.handle(Connected(peer_of(2)), 0.0)
    return core


def notes(effects: list, kind: str) -> int:
    return sum(isinstance(effect, Note) and effect.type == kind for effect in effects)


def hear(core: Core, i: int, message, now: float) -> list:
    return core.handle(Received(peer_of(i), encode_message(message)), now)


def test_a_members_frame_full_of_junk_rosters_has_none_read():
    net = Consortium(3)
    core = core_of(net)
    core.book._read = read = Read()
    effects = hear(core, 1, Facts((), tuple(junk(net, 9 + i) for i in range(64)), ()), 1.0)
    assert read == []
    assert notes(effects, "roster.rejected") == 1


def test_refused_rosters_of_one_member_are_noted_once_a_minute_and_of_each_member():
    core = core_of(Consortium(3))
    effects = []
    for k in range(2000):
        effects += hear(core, 1, Facts((), (b"x",), ()), 1.0 + k / 2000)
    assert notes(effects, "roster.rejected") == 1
    assert notes(effects, "peer.blamed") == 0  # honest peers send them, after a mistake of stewards
    assert notes(hear(core, 2, Facts((), (b"x",), ()), 2.0), "roster.rejected") == 1
    assert notes(hear(core, 1, Facts((), (b"x",), ()), 2.0 + NOTE_EVERY), "roster.rejected") == 1


def test_who_goes_and_comes_all_the_time_is_not_noted_each_time():
    core = core_of(Consortium(3))
    effects = []
    for k in range(300):
        effects += hear(core, 1, Leave(), 1.0 + k / 100)
        effects += hear(core, 1, Ack(1), 1.0 + k / 100)
    assert 1 <= notes(effects, "peer.left") <= 20
    assert 1 <= notes(effects, "peer.alive") <= 20
    assert notes(effects, "peer.blamed") >= 1


def test_a_member_that_is_started_anew_once_a_minute_is_always_believed_to_have_left():
    core = core_of(Consortium(3))
    for k in range(100):
        assert notes(hear(core, 1, Leave(), 60.0 * k), "peer.left") == 1
        hear(core, 1, Ack(1), 60.0 * k + 1)


def test_rosters_are_paid_for_by_their_bytes_too():
    net = Consortium(3)
    membership = Membership(peer_of(0), Liveness())
    membership.adopt(net.roster)
    guard, peer = Guard(membership), membership.peers[peer_of(1)]
    frame = Facts((), (bytes(MAX_SIGNED_BYTES),) * 60, ())
    assert all(guard.weigh(peer, frame, 0.0) is None for _ in range(4))  # 60 MB at once
    assert guard.weigh(peer, frame, 0.0) is not None
    with pytest.raises(RemoteProtocolError, match="too many"):
        [guard.weigh(peer, frame, 0.0) for _ in range(8)]
    small = Facts((), (bytes(1000),) * 60, ())
    assert all(guard.weigh(membership.peers[peer_of(2)], small, 0.0) is None for _ in range(200))
