"""Who counts as there in a run, from beats, claims and deltas.

A connected peer speaks for itself by its beats. In a crowd the others count by what is claimed of
them, and, whatever is claimed, if their delta of the current round is here.

Invariant: the answer is recomputed only when something that matters to it has changed, in a crowd
once a tick at most: a thousand members that come at once would cost a million looks each.
"""

from __future__ import annotations

from p2pfed.gossip.claims import Kind
from p2pfed.gossip.membership import Membership, State
from p2pfed.gossip.progress import Presence
from p2pfed.wire.spreading import PREFIX_BYTES

__all__ = ["Attendance"]


class Attendance:
    """See the module docstring.

    Args:
        membership: The table of peers.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._at: tuple[int, bytes, int, bool] | None = None
        self._presence: Presence | None = None
        self._ticked = True

    def of(self, run_id: bytes, round_: int, *, contributes: bool) -> Presence:
        """Who is there for this round of this run.

        Args:
            run_id: The run.
            round_: The round that this node is in.
            contributes: Whether this node does.
        """
        at = (self._membership.version, run_id, round_, contributes)
        if at == self._at and self._presence is not None:
            return self._presence
        may_wait = self._membership.is_crowd and not self._ticked
        if self._presence is None or self._at is None or at[1:] != self._at[1:] or not may_wait:
            self._at, self._presence = at, self._compute(run_id, round_, contributes=contributes)
            self._ticked = False
        return self._presence

    def tick(self) -> None:
        """Time passed."""
        self._ticked = True

    def _compute(self, run_id: bytes, round_: int, *, contributes: bool) -> Presence:
        membership = self._membership
        own = membership.own_id
        beats = [(p.peer_id, p.beat) for p in membership.present() if p.beat is not None]
        in_run = {peer for peer, beat in beats if beat.run_id == run_id}
        alive = in_run | {own}
        contributing = {peer for peer, beat in beats if beat.contributes and peer in in_run}
        contributing |= {own} if contributes else set()
        left = {p.peer_id for p in membership.peers.values() if p.state is State.LEFT}
        if membership.is_crowd:
            vouched, claimed, willing = self._by_hearsay(run_id[:PREFIX_BYTES], round_)
            alive |= vouched | claimed
            contributing |= vouched | willing
            left -= vouched
        return Presence(
            alive=frozenset(alive),
            contributing=frozenset(contributing),
            left=frozenset(left),
            in_run=frozenset(in_run),
        )

    def _by_hearsay(self, run: bytes, round_: int) -> tuple[set[str], set[str], set[str]]:
        """Those without a connection to us: with a delta, said to be there, said to contribute."""
        vouched, claimed, willing = set(), set(), set()
        for peer_id, peer in self._membership.peers.items():
            if peer.connected:
                continue
            if peer.vouched >= round_ and peer.state is not State.REVOKED:
                vouched.add(peer_id)
            claim = peer.claim
            if claim is not None and claim.run == run and peer.is_present:
                claimed.add(peer_id)
                if claim.kind is Kind.CONTRIBUTES:
                    willing.add(peer_id)
        return vouched, claimed, willing
