"""Presence in a crowd: tells what was heard of others, and believes what is told (`claims`).

News goes out with each contact until it has been told often enough. A comparison of all that was
heard costs one digest where two agree; where they do not, the whole tables are exchanged.

Invariant: in a network of at most `full_mesh` members nothing is said or believed here.
"""

from __future__ import annotations

from p2pfed.gossip.claims import Hearsay, Kind
from p2pfed.gossip.events import Disconnect, Effect, Note, Send, StopDialling
from p2pfed.gossip.membership import Membership, Peer, State
from p2pfed.gossip.seating import Seating
from p2pfed.wire.messages import encode_message
from p2pfed.wire.spreading import PREFIX_BYTES, Claims

__all__ = ["Rumours"]

OPENING_INTERVAL = 5.0  # when a whole network starts, everybody meets everybody
TABLE_INTERVAL = 3.0  # whole tables are several kilobytes


class Rumours:
    """See the module docstring.

    Args:
        membership: The table of peers.
        seating: The seats of the believed rosters.
    """

    def __init__(self, membership: Membership, seating: Seating) -> None:
        self._membership = membership
        self._seating = seating
        self._roster = b""
        self._next_comparison = self._next_opening = self._next_table = float("-inf")
        self.hearsay = Hearsay(membership.own_id)

    # --- telling ---------------------------------------------------------------------------------

    def speak(self, *, contributes: bool, run_id: bytes) -> None:
        """Say of ourselves that we are here."""
        kind = Kind.CONTRIBUTES if contributes else Kind.IDLE
        if self._membership.is_crowd:
            self.hearsay.speak(kind, run_id[:PREFIX_BYTES])

    def judged(self, peer: Peer) -> None:
        """We found a peer silent, or it said goodbye to us."""
        if self._membership.is_crowd and peer.state in {State.SUSPECT, State.LEFT}:
            kind = Kind.LEFT if peer.state is State.LEFT else Kind.SILENT
            self.hearsay.accuse(peer.peer_id, kind)

    def contact(self, peer: str, now: float) -> list[Effect]:
        """Tell a neighbour the news, or ask whether it has heard what we have."""
        plan = self._seating.current()
        if not self._membership.is_crowd or plan is None:
            return []
        if plan.prefix != self._roster:
            self._roster = plan.prefix
            self.hearsay.forget_strangers(plan.members)
        if now >= self._next_comparison:
            self._next_comparison = now + self._membership.liveness.compare_interval
            return [self._send(peer, self.hearsay.question(plan))]
        return [self._send(peer, self.hearsay.news(plan))] if self.hearsay.has_news else []

    def opening(self, peer: str, now: float) -> list[Effect]:
        """A connection is up: compare what was heard, unless that was done just now."""
        plan = self._seating.current()
        if not self._membership.is_crowd or plan is None or now < self._next_opening:
            return []
        self._next_opening = now + OPENING_INTERVAL
        return [self._send(peer, self.hearsay.question(plan))]

    # --- listening -------------------------------------------------------------------------------

    def on_claims(self, sender: Peer, message: Claims, now: float) -> list[Effect]:
        """Believe what is news, and answer a comparison.

        Raises:
            RemoteProtocolError: The claims are not about seats of that roster.
        """
        plan = self._seating.of(message.roster)
        if not self._membership.is_crowd or plan is None:
            return []
        effects: list[Effect] = []
        for peer_id, claim in self.hearsay.read(message, plan):
            if self.hearsay.knows_better(peer_id, claim):
                continue
            peer = self._membership.get(peer_id)
            if peer is not None and claim.kind >= Kind.SILENT and self._membership.hears(peer):
                effects.append(self._send(peer_id, self.hearsay.about(plan, peer_id, claim)))
                self._membership.probe(peer, now)
                continue
            self.hearsay.hear(peer_id, claim)
            if peer is not None and self._membership.claimed(peer, claim, now):
                effects += self._noted(peer)
                effects += self._renewed(peer)
        current = self._seating.current()
        if current is None or now < self._next_table:
            return effects
        if message.digest not in {b"", self.hearsay.digest()}:
            self._next_table = now + TABLE_INTERVAL
            everything = self.hearsay.everything(current, compare=not message.groups)
            effects.append(self._send(sender.peer_id, everything))
        return effects

    @staticmethod
    def _renewed(peer: Peer) -> list[Effect]:
        """Hang up on one that speaks to others and is silent to us: our connection is broken."""
        if not peer.connected or peer.state is not State.ALIVE or peer.watched:
            return []
        return [Disconnect(peer.peer_id, "silent to us, while others hear it", blame=False)]

    def _noted(self, peer: Peer) -> list[Effect]:
        note = Note(f"peer.{peer.state.value}", {"peer": peer.peer_id, "name": peer.name})
        return [note, StopDialling(peer.peer_id)] if peer.state is State.LEFT else [note]

    def _send(self, peer: str, message: Claims) -> Send:
        return Send(peer, encode_message(message))
