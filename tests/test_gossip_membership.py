"""Who is there: the table of states, told as tables."""

from __future__ import annotations

import pytest
from consortium import Consortium, hospital, peer_of

from p2pfed.gossip.claims import Claim, Kind
from p2pfed.gossip.membership import Liveness, Membership, Peer, State
from p2pfed.gossip.silence import Doubt

NET = Consortium(3)
U, A, S, W, L, R = (
    State.UNKNOWN,
    State.ALIVE,
    State.SUSPECT,
    State.AWAY,
    State.LEFT,
    State.REVOKED,
)


LIVE = Liveness(suspect_after=4.0, away_after=10.0)


def table(state: State = U, heard: float = 0.0, live: Liveness = LIVE) -> tuple[Membership, Peer]:
    membership = Membership(peer_of(0), live)
    membership.adopt(NET.roster)
    peer = membership.get(peer_of(1))
    peer.state, peer.last_heard, peer.silent_from = state, heard, heard
    peer.doubt = Doubt(heard) if state is S else None
    membership._retime()
    return membership, peer


@pytest.mark.parametrize(
    ("before", "event", "after", "changed"),
    [
        (U, "heard", A, True),
        (A, "heard", A, False),
        (S, "heard", A, True),
        (W, "heard", A, True),
        (L, "heard", A, True),  # it comes back
        (R, "heard", R, False),
        (U, "left", L, True),
        (A, "left", L, True),
        (S, "left", L, True),
        (W, "left", L, True),
        (L, "left", L, False),
        (R, "left", R, False),
    ],
)
def test_what_a_peer_says_changes_its_state(before, event, after, changed):
    membership, peer = table(before)
    happened = membership.heard(peer, 50.0) if event == "heard" else membership.left(peer)
    assert (peer.state, happened) == (after, changed)
    assert peer.last_heard == (50.0 if event == "heard" else 0.0)


@pytest.mark.parametrize(
    ("before", "silence", "after"),
    [
        (A, 4.0, A),
        (A, 4.1, S),
        (A, 10.1, W),
        (S, 10.0, S),
        (S, 10.1, W),
        (W, 1e9, W),
        (U, 1e9, U),
        (L, 1e9, L),  # left is not failed
        (R, 1e9, R),
    ],
)
def test_what_silence_does_to_a_state(before, silence, after):
    membership, peer = table(before)
    changed = membership.tick(silence)
    assert peer.state is after
    assert (peer in changed) == (before is not after)
    assert membership.tick(silence) == []


def test_who_is_slow_itself_bears_silence_for_longer():
    membership, peer = table(A)
    membership.health.factor = 2
    membership.tick(8.0)
    assert peer.state is A
    membership.health.factor = 1  # well again: what is due is due at once
    membership.tick(8.1)
    assert peer.state is S


def test_the_time_that_we_stood_still_is_nobodys_silence():
    membership, peer = table(A)
    peer.sent_at[5] = 0.5
    membership.slept(30.0, 31.0)
    assert (peer.silent_from, peer.last_heard, peer.sent_at) == (30.0, 0.0, {})
    membership.tick(34.0)
    assert peer.state is A
    membership.tick(34.1)  # of what came before, nothing is forgotten
    assert peer.state is S
    membership.slept(30.0, 65.0)
    assert (peer.silent_from, peer.doubt.since) == (60.0, 64.1)
    membership.heard(peer, 70.0)
    membership.slept(5.0, 70.5)
    assert peer.silent_from == 70.5  # never in the future


def test_a_doubt_lasts_as_long_as_the_suspicion():
    membership, peer = table(A)
    membership.tick(4.1)
    peer.doubt.unheard_by.add(peer_of(2))
    assert membership.suspects() == [peer]
    membership.heard(peer, 5.0)
    assert (peer.doubt, membership.suspects()) == (None, [])
    membership.tick(9.1)
    assert peer.doubt == Doubt(9.1)


def test_the_word_that_somebody_else_had_defers_the_verdict_and_not_the_doubt():
    membership, peer = table(A)
    membership.tick(4.1)
    peer.doubt.heard_at = 8.0
    membership.tick(18.0)
    assert peer.state is S
    membership.tick(18.1)
    assert peer.state is W


CROWD = Liveness(full_mesh=2, suspect_after=4.0, away_after=10.0, quiet_after=20.0)


def neighbour(heard: float = 0.0) -> tuple[Membership, Peer]:
    membership, peer = table(U, live=CROWD)
    membership.link(peer, heard)
    membership.heard(peer, heard)
    return membership, peer


def test_in_a_crowd_a_neighbour_may_rest_and_the_next_on_the_ring_may_not():
    membership, peer = neighbour()
    assert membership.rests(peer)
    membership.tick(15.0)
    assert peer.state is A
    membership.watch_closely([peer.peer_id], 15.0)  # its rest until now is no silence
    assert not membership.rests(peer)
    membership.tick(19.0)
    assert peer.state is A
    membership.tick(19.1)
    assert peer.state is S
    membership.watch_closely([], 19.1)
    assert not peer.close


def test_in_a_crowd_a_neighbour_that_others_find_silent_is_asked_to_speak():
    membership, peer = neighbour()
    membership.probe(peer, 3.0)  # it spoke just now
    assert membership.rests(peer)
    membership.probe(peer, 10.0)
    membership.probe(peer, 12.0)  # saying so again does not give it more time
    assert not membership.rests(peer)
    membership.tick(14.1)
    assert peer.state is S
    membership.heard(peer, 15.0)
    assert (peer.state, membership.rests(peer)) == (A, True)


def test_in_a_crowd_who_speaks_up_after_a_claim_of_silence_is_alive_again():
    membership, peer = table(A, live=CROWD)
    membership.claimed(peer, Claim(4 * 1 + Kind.SILENT), 50.0)
    assert (peer.state, peer.doubt) == (S, Doubt(50.0))
    membership.tick(56.0)
    assert peer.state is S
    membership.claimed(peer, Claim(4 * 2 + Kind.CONTRIBUTES), 56.0)
    assert (peer.state, peer.doubt) == (A, None)


@pytest.mark.parametrize(
    ("state", "connected", "present"),
    [(A, True, True), (S, True, True), (A, False, False)]
    + [(state, True, False) for state in (U, W, L, R)],
)
def test_only_connected_peers_that_are_alive_or_suspect_are_present(state, connected, present):
    membership, peer = table(state)
    if connected:
        membership.link(peer)
    assert (peer in membership.present()) == present


def test_a_roster_brings_members_in_and_takes_them_out():
    net = Consortium(3)
    membership = Membership(peer_of(0), Liveness())
    assert membership.adopt(net.roster) == []
    assert set(membership.peers) == {peer_of(1), peer_of(2)}  # not itself
    net.publish(net.roster.revoke(peer_of(1), reason="x", from_round=0))
    assert [p.peer_id for p in membership.adopt(net.roster)] == [peer_of(1)]
    assert membership.get(peer_of(1)).state is R
    assert membership.adopt(net.roster) == []
    net.publish(net.roster.next(revoked=[], members=[hospital(1, name="new name")]))
    assert {p.peer_id for p in membership.adopt(net.roster)} == {peer_of(1), peer_of(2)}
    assert membership.get(peer_of(1)).state is U
    assert membership.get(peer_of(1)).name == "new name"
    assert membership.get(peer_of(2)).state is R  # no longer listed
    assert membership.get(peer_of(9)) is None
