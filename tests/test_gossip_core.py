"""The node without I/O, one event at a time: what it says, what it believes, what it refuses."""

from __future__ import annotations

import datetime as dt
import random
from dataclasses import replace

import pytest
from consortium import (
    EXPIRES,
    Consortium,
    hospital,
    key_of,
    peer_of,
    some_payload,
    steward,
)

from p2pfed.gossip.aside import EACH
from p2pfed.gossip.core import Core
from p2pfed.gossip.events import (
    CheckpointsChanged,
    Connected,
    Disconnect,
    Disconnected,
    Fold,
    Folded,
    JoinNetwork,
    Keep,
    LeaveNetwork,
    Note,
    Received,
    Released,
    RosterOffered,
    Send,
    SendStored,
    SetSharing,
    StopDialling,
    StoreDelta,
    StoreProof,
    StoreRoster,
    Tick,
    Train,
    TrainerChanged,
    TrainingEnded,
)
from p2pfed.gossip.intake import TOLD
from p2pfed.gossip.progress import JOIN_PATIENCE, Phase
from p2pfed.gossip.rounds import AHEAD
from p2pfed.identity.signing import DELTA, sign
from p2pfed.wire.delta import Proof
from p2pfed.wire.messages import (
    Ack,
    Addresses,
    AskCheckpoints,
    Beat,
    CheckpointOffer,
    Checkpoints,
    Digest,
    Facts,
    Have,
    Leave,
    Want,
    Witness,
    decode_message,
    encode_message,
)
from p2pfed.wire.payload import count_released, encode_payload
from p2pfed.wire.spreading import Held, Ping

DAY = dt.datetime(2026, 6, 1, tzinfo=dt.UTC)


class Lab:
    """A core of h0, its clock, and its (imaginary) connections to the others."""

    def __init__(self, n: int = 4, *, net: Consortium | None = None, versions=(), **constants):
        self.net = net or Consortium(n, samples=[10] * n)
        self.run = self.net.run(**constants)
        self.now = 0.0
        self.wall = DAY
        self.core = Core(
            own_id=peer_of(0),
            sign=lambda data: sign(key_of(0).seed, DELTA, data),
            book=self.net.book(*versions),
            rng=random.Random(1),
            addresses=("/ip4/10.0.0.1/tcp/1",),
        )
        self.effects: list = []

    # --- events in -----------------------------------------------------------------------------

    def give(self, event) -> list:
        effects = self.core.handle(event, self.now)
        for effect in effects:  # everything that is sent must be readable by the others
            if isinstance(effect, Send):
                decode_message(effect.frame)
        self.effects += effects
        return effects

    def hear(self, i: int, message) -> list:
        return self.give(Received(peer_of(i), encode_message(message)))

    def pass_time(self, seconds: float, step: float = 0.25) -> list:
        effects = []
        for _ in range(max(1, round(seconds / step))):
            self.now += step
            effects += self.give(Tick(self.wall))
        return effects

    def beat(self, i: int, **changes) -> Beat:
        book = self.core.book
        defaults = {
            "sequence": 1,
            "network_id": book.network_id,
            "run_id": self.run.run_id,
            "task_id": b"",
            "round": 0,
            "contributes": True,
            "model_round": 0,
            "model_hash": b"",
            "documents": self.core._sync.documents_digest(),
            "addresses": (f"/ip4/10.0.0.{i + 1}/tcp/1",),
        }
        return Beat(**(defaults | changes))

    def meet(self, *peers: int) -> None:
        for i in peers or range(1, 4):
            self.give(Connected(peer_of(i)))
            self.hear(i, self.beat(i))
            self.hear(i, Witness(()))

    def started(self, **how) -> Lab:
        """In round 0, with the trainer at work and all others there."""
        self.core.start_run(self.run, **how)
        self.meet()
        self.pass_time(JOIN_PATIENCE + 1)
        self.fold()
        for i in (1, 2, 3):
            self.hear(i, self.beat(i))
        return self

    def fold(self) -> list:
        done, [*folds] = [], [e for e in self.effects if isinstance(e, Fold)]
        return done + self.give(Folded(folds[-1].round, folds[-1].chains[-1], b"m" * 32))

    # --- what came out -------------------------------------------------------------------------

    def deltas(self, *deltas) -> Facts:
        return Facts(tuple(d.encode() for d in deltas), (), ())

    def delta(self, round_: int, i: int, salt: int = 0, **changes):
        return self.net.delta(
            self.run, round_, i, some_payload(self.run, round_, i, salt), **changes
        )

    @property
    def held(self) -> int:
        return self.core.facts.num_deltas


def of_type(effects, kind) -> list:
    return [e for e in effects if isinstance(e, kind)]


def notes(effects, prefix: str = "") -> list[str]:
    return [e.type for e in effects if isinstance(e, Note) and e.type.startswith(prefix)]


def messages(effects, kind, to: int | None = None) -> list:
    sent = [
        decode_message(e.frame)
        for e in effects
        if isinstance(e, Send) and (to is None or e.peer == peer_of(to))
    ]
    return [m for m in sent if isinstance(m, kind)]


def blamed(effects) -> bool:
    return any(e.blame for e in of_type(effects, Disconnect))


# --- presence ------------------------------------------------------------------------------------


def test_a_connection_begins_with_a_beat_and_a_digest():
    lab = Lab()
    lab.core.start_run(lab.run)
    effects = lab.give(Connected(peer_of(1)))
    assert len(messages(effects, Beat, to=1)) == 1
    assert len(messages(effects, Digest, to=1)) == 1


def test_a_beat_is_answered_and_its_answer_gives_the_round_trip_time():
    lab = Lab()
    [ours] = messages(lab.give(Connected(peer_of(1))), Beat)
    assert messages(lab.hear(1, lab.beat(1, sequence=77)), Ack) == [Ack(77)]
    lab.now += 0.125
    lab.hear(1, Ack(ours.sequence))
    lab.now += 9
    lab.hear(1, Ack(ours.sequence))  # a second answer to one beat says nothing
    assert lab.core.membership.get(peer_of(1)).rtt == 0.125


def test_where_a_beat_would_say_nothing_new_a_ping_does():
    lab = Lab()
    lab.core.start_run(lab.run)
    lab.meet(1)
    effects = lab.pass_time(9)
    for _ in range(8):
        lab.hear(1, Ping(3))  # it goes on being heard
    assert len(messages(effects, Beat)) == 1  # that the run has begun
    [*pings] = messages(effects, Ping)
    assert 7 <= len(pings) <= 9
    assert messages(lab.hear(1, Ping(77)), Ack) == [Ack(77)]
    later = messages(lab.pass_time(1), Ping)[-1]
    lab.now += 0.5
    lab.hear(1, Ack(later.sequence))
    assert lab.core.membership.get(peer_of(1)).rtt >= 0.5
    lab.core.introduction.task_id = b"t" * 32
    assert messages(lab.pass_time(1), Beat)


def test_who_begins_a_run_hears_at_once_who_is_in_it():
    lab = Lab()
    lab.core.start_run(lab.run)
    lab.give(Connected(peer_of(1)))
    assert messages(lab.hear(1, lab.beat(1, run_id=b"")), Beat) == []
    [told] = messages(lab.hear(1, lab.beat(1)), Beat)
    assert told.run_id == lab.run.run_id
    assert messages(lab.hear(1, lab.beat(1)), Beat) == []


@pytest.mark.parametrize("who", [8, 0])
def test_who_is_not_on_the_roster_is_hung_up_on(who):
    lab = Lab()
    assert of_type(lab.give(Connected(peer_of(who))), Disconnect)
    effects = lab.hear(who, Ack(1))
    assert [type(e) for e in effects] == [Disconnect]


def test_silence_makes_suspect_then_away_then_closes_the_connection():
    lab = Lab()
    lab.meet(1)
    effects = lab.pass_time(15)
    assert notes(effects, "peer.") == ["peer.suspect", "peer.away"]
    assert of_type(effects, Disconnect) == [
        Disconnect(peer_of(1), "silent for too long", blame=False)
    ]
    assert of_type(effects, StopDialling) == []  # a failed peer is dialled for ever


def test_left_is_not_failed_it_is_dialled_seldom_and_comes_back_when_heard():
    lab = Lab()
    lab.meet(1)
    effects = lab.hear(1, Leave())
    assert notes(effects) == ["peer.left"]
    assert of_type(effects, StopDialling) == []  # it may have been started anew, and find nobody
    assert of_type(effects, Keep) == [Keep(peer_of(1), ("/ip4/10.0.0.2/tcp/1",), has_left=True)]
    assert lab.hear(1, Leave()) == []
    lab.give(Disconnected(peer_of(1)))
    effects = lab.pass_time(30)
    hearsay = Addresses(((peer_of(1), ("/ip4/1.2.3.4/tcp/1",)),))
    lab.meet(2)
    effects += lab.hear(2, hearsay)
    assert [k for k in of_type(effects, Keep) if k.peer == peer_of(1)] == []
    assert notes(effects, "peer.suspect") + notes(effects, "peer.away") == []
    lab.give(Connected(peer_of(1)))
    effects = lab.hear(1, lab.beat(1))
    assert notes(effects) == ["peer.alive"]
    assert [(k.peer, k.has_left) for k in of_type(effects, Keep)] == [(peer_of(1), False)]


def test_hearsay_gives_an_address_only_where_there_is_none():
    lab = Lab()
    lab.meet(1)
    own, other = ("/ip4/10.0.0.2/tcp/1",), ("/ip4/6.6.6.6/tcp/1",)
    told = Addresses(((peer_of(1), other), (peer_of(2), other), (peer_of(9), other), ("x", other)))
    assert of_type(lab.hear(1, told), Keep) == [Keep(peer_of(2), other)]
    assert lab.core.membership.get(peer_of(1)).addresses == own


def test_a_peer_of_another_network_is_blamed():
    lab = Lab()
    lab.give(Connected(peer_of(1)))
    assert blamed(lab.hear(1, lab.beat(1, network_id=b"x" * 32)))


@pytest.mark.parametrize(
    ("changes", "differs"),
    [({"run_id": b"x" * 32}, "run"), ({"task_id": b"x" * 32}, "task"), ({"run_id": b""}, None)],
)
def test_a_peer_with_another_run_or_task_is_named_once(changes, differs):
    lab = Lab()
    lab.core.start_run(lab.run)
    lab.give(Connected(peer_of(1)))
    effects = [*lab.hear(1, lab.beat(1, **changes)), *lab.hear(1, lab.beat(1, **changes))]
    told = [e.data["differs"] for e in of_type(effects, Note) if e.type == "peer.differs"]
    assert told == ([differs] if differs else [])
    assert not blamed(effects)


def test_a_peer_that_changes_its_run_with_every_beat_is_named_once_a_minute():
    lab = Lab()
    lab.core.start_run(lab.run)
    lab.give(Connected(peer_of(1)))
    effects = [e for i in range(100) for e in lab.hear(1, lab.beat(1, run_id=bytes([i + 1]) * 32))]
    assert len([e for e in of_type(effects, Note) if e.type == "peer.differs"]) == 1


def test_who_has_said_goodbye_says_nothing_more_until_it_comes_back():
    lab = Lab().started()
    effects = lab.give(LeaveNetwork())
    assert len(messages(effects, Leave)) == 3
    silent = [
        *lab.pass_time(10),
        *lab.hear(1, lab.beat(1)),
        *lab.hear(1, lab.deltas(lab.delta(0, 1))),
    ]
    assert of_type(silent, Send) + of_type(silent, SendStored) + of_type(silent, Keep) == []
    assert of_type(silent, Train) == []
    lab.give(JoinNetwork())
    assert messages(lab.pass_time(2), Beat)


# --- garbage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"garbage", bytes(100), b"\x91" * 5000])
def test_garbage_costs_its_sender_the_connection_and_changes_nothing(frame):
    lab = Lab().started()
    before = lab.core.facts.chain(20), lab.held
    effects = lab.give(Received(peer_of(1), frame))
    assert blamed(effects)
    assert notes(effects) == ["peer.blamed"]
    assert (lab.core.facts.chain(20), lab.held) == before


def forgeries(lab: Lab) -> dict[str, bytes]:
    payload = some_payload(lab.run, 0, 1)
    good = lab.delta(0, 1)
    other_run = lab.net.run(name="another run")
    return {
        "by another key": lab.delta(0, 1, origin=peer_of(2)).encode(),
        "beyond the last round": lab.delta(lab.run.rounds, 1).encode(),
        "another mechanism": lab.delta(0, 1, mechanism="svt").encode(),
        "miscounted": lab.delta(0, 1, num_released=3).encode(),
        "cut short": good.encode()[:-1],
        "altered": good.encode()[:-1] + b"\x7f",
        "too many parameters": lab.net.delta(
            replace(lab.run, num_parameters=80),
            0,
            1,
            type(payload)(payload.indices + 40, payload.values),
        ).encode(),
        "no delta": b"x",
        "of a stranger": lab.net.delta(lab.run, 0, 50).encode(),
        "of a stranger under a roster that nobody has": lab.net.delta(
            lab.run, 0, 50, roster_hash=b"?" * 32
        ).encode(),
        "of another run": lab.net.delta(other_run, 0, 1).encode(),
    }


HARMLESS = {
    "of a stranger",  # it may be a member of a roster that is still on its way
    "of a stranger under a roster that nobody has",
    "of another run",  # asked for before another run was accepted here
}


@pytest.mark.parametrize("which", list(forgeries(Lab())))
def test_a_broken_delta_is_refused_and_changes_nothing(which):
    lab = Lab().started()
    effects = lab.hear(1, Facts((forgeries(lab)[which],), (), ()))
    assert lab.held == 0
    assert of_type(effects, StoreDelta) == []
    assert blamed(effects) == (which not in HARMLESS)


@pytest.mark.parametrize("which", list(forgeries(Lab())))
def test_a_good_delta_beside_a_broken_one_is_stored_or_not_believed(which):
    """Believed and not stored would be a hole: the next fold would not find its payload."""
    lab = Lab().started()
    good = lab.delta(0, 2)
    effects = lab.hear(1, Facts((good.encode(), forgeries(lab)[which]), (), ()))
    assert [e.delta.fact for e in of_type(effects, StoreDelta)] == [good.fact] * lab.held


def test_a_good_roster_and_proof_beside_garbage_are_stored_or_not_believed():
    lab = Lab().started()
    newer = lab.net.grow(hospital(7))
    proof = Proof.of(lab.delta(0, 1).signed, lab.delta(0, 1, salt=1).signed)
    effects = lab.hear(1, Facts((b"x",), (newer,), (proof.encode(),)))
    assert blamed(effects)
    assert len(of_type(effects, StoreRoster)) == (lab.core.book.current.version == 3)
    assert len(of_type(effects, StoreProof)) == len(lab.core.facts.proofs)


def test_spam_fills_bounded_tables_only():
    """Made-up origins, made-up rosters, far rounds, variants without end, from one member."""
    lab = Lab().started()
    for i in range(100, 160):
        lab.hear(1, lab.deltas(lab.net.delta(lab.run, 0, i)))
        lab.hear(1, lab.deltas(lab.net.delta(lab.run, 9, i, roster_hash=b"?" * 32)))
        one, other = (lab.net.delta(lab.run, 0, i, releases=n).signed for n in (1, 2))
        lab.hear(1, Facts((), (), (Proof.of(one, other).encode(),)))
    for salt in range(60):
        lab.hear(1, lab.deltas(lab.delta(15, 1, salt)))
        lab.hear(1, lab.deltas(lab.delta(1, 1, salt)))
        lab.hear(1, Have(lab.run.run_id, 0, False, bytes([salt]) * 16 * 64))
    assert lab.held <= 1
    assert len(lab.core._intake._aside) <= EACH
    assert len(lab.core.facts.proofs) == 1
    assert len(lab.core._sync.asked) <= 1024
    assert len(lab.core.membership.peers) == 3
    for _ in range(100):
        lab.give(Connected(peer_of(1)))
    assert len(lab.core.membership.get(peer_of(1)).sent_at) <= 16


def test_every_message_of_a_stranger_or_before_a_run_is_survived():
    lab = Lab()
    run_id = lab.run.run_id
    lab.meet(1)
    for message in (
        Digest(run_id, 5, ()),
        Have(run_id, 0, True, b"x" * 16),
        Want(run_id, b"x" * 16),
        Facts((b"x",), (b"x",), (b"x",)),
        AskCheckpoints(run_id),
        Checkpoints(run_id, ()),
        lab.beat(1),
    ):
        assert not blamed(lab.hear(1, message))
    lab.give(Folded(3, b"c" * 32, b"m" * 32))
    lab.give(TrainingEnded(3, "failed", "x"))
    lab.give(Released(3, b"", 0, "none", 0, 0, bytes(32)))


# --- facts ----------------------------------------------------------------------------------------


def test_a_new_delta_is_stored_once_and_announced_to_a_few():
    lab = Lab().started()
    delta = lab.delta(0, 1)
    effects = lab.hear(1, lab.deltas(delta))
    assert of_type(effects, StoreDelta) == [StoreDelta(delta, own=False)]
    assert messages(effects, Held) == []  # its origin tells all that are connected to it
    told = messages(lab.pass_time(1), Held)
    assert 1 <= len(told) <= TOLD + 1  # who did not hear of it is told by somebody
    assert all([p.round for p in held.portions] == [0] for held in told)
    again = lab.hear(2, lab.deltas(delta))
    assert of_type(again, StoreDelta) == []
    assert len(messages(lab.pass_time(4), Held)) <= 4  # once a second, as ever


def test_two_variants_give_a_proof_that_is_stored_and_spread():
    lab = Lab().started()
    lab.hear(1, lab.deltas(lab.delta(0, 1)))
    effects = lab.hear(2, lab.deltas(lab.delta(0, 1, salt=1)))
    assert len(of_type(effects, StoreProof)) == 1
    assert notes(effects) == ["peer.equivocated"]
    assert lab.core.facts.is_out(peer_of(1), 0)
    assert of_type(lab.hear(3, lab.deltas(lab.delta(0, 1, salt=1))), StoreProof) == []
    listed = lab.hear(2, lab.beat(2, documents=b"other" + bytes(11)))
    [have] = messages(listed, Have)
    stored = lab.hear(2, Want(bytes(32), have.names))
    assert len(of_type(stored, SendStored)[0].proofs) == 1


def test_an_own_second_variant_takes_this_node_out_too():
    """Two copies of one key: the others would refuse it, so it does not go on by itself."""
    lab = Lab().started()
    lab.hear(1, lab.deltas(lab.delta(0, 0)))
    lab.hear(1, lab.deltas(lab.delta(0, 0, salt=1)))
    assert "two deltas" in lab.core.why_not_contributing()


def test_a_delta_under_a_roster_that_is_on_its_way_counts_once_the_roster_is_there():
    net = Consortium(4, samples=[10] * 4)
    net.grow(hospital(5, 10))
    lab = Lab(net=net, versions=(1, 2)).started()
    late = lab.delta(0, 1)  # signed under v3
    early = lab.net.delta(lab.run, 0, 5)  # by a member of v3
    lab.hear(1, lab.deltas(late))
    lab.hear(1, lab.deltas(early))
    assert lab.core.facts.counted(0) == ()
    effects = lab.hear(1, Facts((), (net.signed[2],), ()))
    assert notes(effects, "roster") == ["roster.updated"]
    lab.hear(1, lab.deltas(early))
    assert {c.origin for c in lab.core.facts.counted(0)} == {peer_of(1), peer_of(5)}


@pytest.mark.parametrize("order", [(1, 2, 3, 4), (4, 3, 2, 1), (2, 4, 1, 3)])
@pytest.mark.parametrize("held", [1, 5])
def test_all_rosters_of_one_message_are_believed_in_whatever_order_they_stand(held, order):
    """Newer ones need the step between (a rotation), older ones the one that names them."""
    net = Consortium(4)
    net.grow(hospital(5))
    net.publish(net.roster.next(stewards=[steward(i) for i in (2, 3, 4)]), 0, 1, 3, 4)
    net.publish(net.roster.next(members=net.roster.members[:3]), 3, 4)
    lab = Lab(net=net, versions=(held,))
    others = [v for v in range(1, 6) if v != held]
    sent = tuple(net.signed[others[at - 1] - 1] for at in order)
    effects = lab.give(Received(peer_of(1), encode_message(Facts((), sent, ()))))
    if held == 1:  # v1 lists no members: it comes with the connection instead
        for signed in sent * 4:
            effects += lab.give(RosterOffered(signed))
    assert lab.core.book.hashes == {r.hash for r in net.rosters}
    assert len(of_type(effects, StoreRoster)) == 4


def test_a_revoked_peer_is_hung_up_on_and_not_dialled():
    lab = Lab().started()
    signed = lab.net.publish(lab.net.roster.revoke(peer_of(2), reason="x", from_round=0))
    effects = lab.give(RosterOffered(signed))
    assert notes(effects, "peer") == ["peer.revoked"]
    assert of_type(effects, StopDialling) == [StopDialling(peer_of(2))]
    assert [d.peer for d in of_type(effects, Disconnect)] == [peer_of(2)]
    assert of_type(lab.hear(2, lab.beat(2)), Disconnect)


def test_a_forged_roster_changes_nothing():
    lab = Lab()
    forged = lab.net.roster.next(members=[hospital(9)]).encode()
    for signed in (forged, b"", b"garbage"):
        assert notes(lab.give(RosterOffered(signed))) == ["roster.rejected"]
    assert lab.core.book.current == lab.net.roster


# --- far ahead ------------------------------------------------------------------------------------


def test_deltas_far_ahead_are_set_aside_and_admitted_when_the_node_comes_near():
    lab = Lab().started()
    far = lab.delta(AHEAD + 5, 1)
    effects = lab.hear(1, lab.deltas(far))
    assert of_type(effects, StoreDelta) == []
    assert (lab.held, lab.core.progress.round) == (0, 0)
    assert messages(lab.hear(2, Have(lab.run.run_id, 7, False, far.fact[:16])), Want) == []
    lab.hear(2, lab.deltas(lab.delta(AHEAD + 5, 2)))
    effects = lab.pass_time(0.5)
    assert lab.core.progress.round == AHEAD + 5
    assert {e.delta.fact for e in of_type(effects, StoreDelta)} >= {far.fact}
    assert len(lab.core._intake._aside) == 0


def test_no_single_member_drags_the_others_ahead():
    lab = Lab().started()
    for round_ in range(3, lab.run.rounds):
        lab.hear(1, lab.deltas(lab.delta(round_, 1)))
    lab.pass_time(2)
    assert lab.core.progress.round == 0
    assert lab.core.why_not_contributing() == ""


def test_a_node_that_was_away_long_catches_up_without_fetching_all_again_and_again():
    """It is far behind: what it drops because it is too far ahead must stay little."""
    lab = Lab(rounds=80).started()
    deltas = {(r, i): lab.delta(r, i) for r in range(60) for i in (1, 2, 3)}
    by_name = {d.fact[:16]: d for d in deltas.values()}
    received = 0
    for _ in range(20):
        missing = [d for d in deltas.values() if lab.core.facts.named(d.fact[:16]) is None]
        if not missing:
            break
        asked = []
        for (r, i), delta in deltas.items():
            have = Have(lab.run.run_id, r, False, delta.fact[:16])
            asked += messages(lab.hear(i, have), Want)
        for want in asked:
            names = [want.names[at : at + 16] for at in range(0, len(want.names), 16)]
            received += len(names)
            lab.hear(1, lab.deltas(*(by_name[n] for n in names)))
        for _ in range(4):
            lab.pass_time(0.25)
            if lab.core.progress.phase is Phase.FOLDING:
                lab.fold()
    assert lab.held == len(deltas)
    assert received <= 2 * len(deltas)


# --- training -------------------------------------------------------------------------------------


def release(lab: Lab, round_: int = 0) -> list:
    payload = encode_payload(
        some_payload(lab.run, round_, 0), num_parameters=lab.run.num_parameters
    )
    return lab.give(Released(round_, payload, count_released(payload), "none", 5, 1, b"l" * 32))


def test_a_release_is_signed_stored_durably_and_then_announced():
    lab = Lab().started()
    assert [e.round for e in of_type(lab.effects, Train)] == [0]
    effects = release(lab)
    [stored] = of_type(effects, StoreDelta)
    assert stored.own
    header = stored.delta.header
    assert (header.round, header.origin, header.view_hash) == (0, peer_of(0), b"m" * 32)
    assert header.roster_hash == lab.net.roster.hash
    first_send = next(i for i, e in enumerate(effects) if isinstance(e, Send))
    assert effects.index(stored) < first_send
    assert len(messages(effects, Held)) == 3  # few members: all are told at once


def test_a_release_that_nobody_asked_for_is_not_signed():
    lab = Lab().started()
    release(lab)
    assert of_type(release(lab), StoreDelta) == []
    assert of_type(release(lab, 7), StoreDelta) == []
    assert lab.held == 1


def test_sharing_off_releases_nothing_and_receives_on():
    lab = Lab().started()
    assert notes(lab.give(SetSharing(on=False))) == ["sharing.off"]
    effects = release(lab)
    assert of_type(effects, StoreDelta) == []
    assert "release.withheld" in notes(effects)
    lab.hear(1, lab.deltas(lab.delta(0, 1), lab.delta(0, 2), lab.delta(0, 3)))
    effects = lab.pass_time(3)
    lab.fold()
    effects += lab.pass_time(3)
    assert lab.core.progress.round == 1
    assert of_type(effects, Train) == []
    beats = messages(effects, Beat)
    assert beats
    assert not beats[-1].contributes
    lab.give(SetSharing(on=True))
    assert lab.core.why_not_contributing() == ""
    assert [e.round for e in of_type(lab.effects, Train)] == [0, 1]


def test_on_an_expired_roster_a_node_receives_but_releases_nothing():
    lab = Lab().started()
    lab.wall = EXPIRES
    lab.pass_time(1)
    assert "expired" in lab.core.why_not_contributing()
    assert of_type(release(lab), StoreDelta) == []
    assert len(of_type(lab.hear(1, lab.deltas(lab.delta(0, 1))), StoreDelta)) == 1
    lab.hear(1, lab.deltas(lab.delta(0, 2), lab.delta(0, 3)))
    lab.pass_time(3)
    lab.fold()
    assert lab.core.progress.round == 1
    assert [e.round for e in of_type(lab.effects, Train)] == [0]


@pytest.mark.parametrize(
    ("outcome", "note", "goes_on"),
    [
        ("skipped", "training.skipped", True),
        ("failed", "training.failed", True),
        ("exhausted", "privacy.exhausted", False),
        ("refused", "training.refused", False),
    ],
)
def test_a_trainer_that_gives_nothing_is_asked_again_or_not(outcome, note, goes_on):
    lab = Lab().started()
    assert note in notes(lab.give(TrainingEnded(0, outcome, "because")))
    assert lab.core.why_not_contributing() == ("" if goes_on else "because")
    lab.hear(1, lab.deltas(lab.delta(0, 1), lab.delta(0, 2), lab.delta(0, 3)))
    effects = lab.pass_time(6)
    lab.fold()
    assert lab.core.progress.round == 1
    assert [e.round for e in of_type(lab.effects, Train)] == ([0, 1] if goes_on else [0])
    assert messages(effects, Beat)[-1].contributes == goes_on


def test_after_a_crash_a_node_never_signs_a_second_delta_for_a_round():
    lab = Lab().started()
    [stored] = of_type(release(lab), StoreDelta)
    again = Lab().started(held=[stored.delta.signed])
    assert 0 not in [e.round for e in of_type(again.effects, Train)]
    assert of_type(release(again), StoreDelta) == []


def test_a_bootstrap_node_trains_nothing_and_says_so():
    net = Consortium(4)
    core = Core(
        own_id=peer_of(0),
        sign=lambda _data: bytes(64),
        book=net.book(),
        rng=random.Random(1),
        has_trainer=False,
    )
    assert core.why_not_contributing() == "this node has no trainer"


# --- checkpoints ----------------------------------------------------------------------------------


def test_checkpoints_are_told_to_members_of_the_same_run():
    lab = Lab().started()
    offer = CheckpointOffer(3, b"c" * 32, b"d" * 32, 99)
    lab.give(CheckpointsChanged((offer,)))
    run_id = lab.run.run_id
    assert messages(lab.hear(1, AskCheckpoints(run_id)), Checkpoints) == [
        Checkpoints(run_id, (offer,))
    ]
    assert messages(lab.hear(1, AskCheckpoints(b"x" * 32)), Checkpoints) == []


def test_a_joiner_asks_everyone_once_and_stops_when_they_answered():
    lab = Lab()
    lab.core.start_run(lab.run)
    lab.give(Connected(peer_of(1)))
    assert len(messages(lab.hear(1, lab.beat(1)), AskCheckpoints)) == 1
    lab.hear(1, Checkpoints(lab.run.run_id, ()))
    assert messages(lab.hear(1, lab.beat(1)), AskCheckpoints) == []
    assert lab.core.progress.phase is Phase.JOINING


def test_a_node_with_stored_facts_does_not_join_again():
    lab = Lab()
    lab.core.start_run(lab.run, held=[lab.delta(4, 0).signed])
    assert lab.core.progress.phase is Phase.WAITING
    assert lab.core.progress.round == 4


def test_handle_gives_the_same_effects_for_the_same_events():
    one, other = Lab().started(), Lab().started()
    for lab in (one, other):
        release(lab)
        lab.hear(1, lab.deltas(lab.delta(0, 1), lab.delta(0, 2), lab.delta(0, 3)))
        lab.pass_time(5)
    assert one.effects == other.effects


def test_nobody_is_asked_to_wait_for_a_node_whose_trainer_fails_again_and_again():
    lab = Lab().started()
    lab.give(TrainerChanged(up=False))
    assert not lab.core.why_not_contributing()  # it may be back in a moment
    lab.give(TrainerChanged(up=False, lost=True))
    assert "trainer" in lab.core.why_not_contributing()
    [*beats] = messages(lab.pass_time(2), Beat)
    assert beats and not beats[-1].contributes
    lab.give(TrainerChanged(up=True))
    assert not lab.core.why_not_contributing()
