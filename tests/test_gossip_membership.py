"""Who is there: the table of states, told as tables."""

from __future__ import annotations

import pytest
from consortium import Consortium, hospital, peer_of

from p2pfed.gossip.membership import Liveness, Membership, State

NET = Consortium(3)
U, A, S, W, L, R = (
    State.UNKNOWN,
    State.ALIVE,
    State.SUSPECT,
    State.AWAY,
    State.LEFT,
    State.REVOKED,
)


def table(state: State = U, heard: float = 0.0) -> tuple[Membership, object]:
    membership = Membership(peer_of(0), Liveness(suspect_after=4.0, away_after=10.0))
    membership.adopt(NET.roster)
    peer = membership.get(peer_of(1))
    peer.state, peer.last_heard = state, heard
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
