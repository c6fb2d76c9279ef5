"""The talk that keeps membership going: beats, answers, goodbyes, addresses.

A beat says who one is and what one holds; its answer gives the round-trip time. Addresses of others
are hearsay: what a peer announced itself comes first, and the handshake decides in the end.

Invariant: a peer that left is not dialled until it is heard again; one that is silent is dialled
for ever.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from p2pfed.errors import RemoteProtocolError
from p2pfed.gossip.events import Disconnect, Effect, Keep, Note, Send, StopDialling
from p2pfed.gossip.membership import Liveness, Membership, Peer, State
from p2pfed.gossip.sync import Sync
from p2pfed.wire.messages import Ack, Addresses, Beat, Message, encode_message

__all__ = ["Heartbeat", "send"]

GOSSIP_INTERVAL = 1.0  # seconds between digests to a random peer; log2(N) of them reach everyone
ADDRESS_INTERVAL = 10.0
MAX_UNANSWERED = 16


def send(peer_id: str, message: Message) -> Send:
    """The effect that sends one message."""
    return Send(peer_id, encode_message(message))


def _named(peer: Peer) -> dict[str, str]:
    return {"peer": peer.peer_id, "name": peer.name}


class Heartbeat:
    """See the module docstring.

    Args:
        membership: The table of peers.
        sync: Gives the digest of documents, and opens anti-entropy.
        liveness: How often to beat.
        rng: Chance for choosing a peer.
        compose: Makes the beat with a sequence number.
    """

    def __init__(
        self,
        membership: Membership,
        sync: Sync,
        liveness: Liveness,
        rng: random.Random,
        compose: Callable[[int], Beat],
    ) -> None:
        self._membership = membership
        self._sync = sync
        self._liveness = liveness
        self._rng = rng
        self._compose = compose
        self._sequence = 0
        self._next_beat = self._next_gossip = self._next_addresses = float("-inf")

    # --- time and connections ------------------------------------------------------------------

    def tick(self, now: float) -> list[Effect]:
        """Let time pass: verdicts on silent peers, beats, gossip with a random peer."""
        effects: list[Effect] = []
        for peer in self._membership.tick(now):
            effects.append(Note(f"peer.{peer.state.value}", _named(peer)))
            if peer.state is State.AWAY and peer.connected:
                effects.append(Disconnect(peer.peer_id, "silent for too long", blame=False))
        if now >= self._next_beat:
            self._next_beat = now + self._liveness.beat_interval
            connected = [p for p in self._membership.peers.values() if p.connected]
            effects += [self._beat(peer, now) for peer in connected]
        present = sorted(p.peer_id for p in self._membership.present())
        if now >= self._next_gossip and present:
            self._next_gossip = now + GOSSIP_INTERVAL
            self._sync.forget_stale(now)
            effects += self._sync.opening(self._rng.choice(present))
        if now >= self._next_addresses and present:
            self._next_addresses = now + ADDRESS_INTERVAL
            effects.append(self._known_addresses(self._rng.choice(present)))
        return effects

    def connected(self, peer_id: str, now: float) -> list[Effect]:
        """A connection is up: introduce ourselves."""
        peer = self._membership.get(peer_id)
        if peer is None or peer.state is State.REVOKED:
            return [Disconnect(peer_id, "not on the roster", blame=False)]
        peer.connected = True
        effects: list[Effect] = [self._beat(peer, now), self._known_addresses(peer_id)]
        return [*effects, *self._sync.opening(peer_id)]

    def disconnected(self, peer_id: str) -> list[Effect]:
        """A connection is gone; the verdict on the peer comes with time."""
        peer = self._membership.get(peer_id)
        if peer is not None:
            peer.connected = False
            peer.sent_at.clear()
        return []

    def _beat(self, peer: Peer, now: float) -> Send:
        self._sequence += 1
        peer.sent_at[self._sequence] = now
        while len(peer.sent_at) > MAX_UNANSWERED:
            del peer.sent_at[next(iter(peer.sent_at))]
        return send(peer.peer_id, self._compose(self._sequence))

    def _known_addresses(self, peer_id: str) -> Send:
        known = [(p.peer_id, p.addresses) for p in self._membership.peers.values() if p.addresses]
        return send(peer_id, Addresses(tuple(known[:256])))

    # --- messages ------------------------------------------------------------------------------

    def heard(self, peer: Peer, now: float) -> list[Effect]:
        """A member said anything but goodbye."""
        if not self._membership.heard(peer, now):
            return []
        effects: list[Effect] = [Note("peer.alive", _named(peer))]
        return [*effects, Keep(peer.peer_id, peer.addresses)] if peer.addresses else effects

    def on_beat(self, peer: Peer, beat: Beat, network_id: bytes | None) -> list[Effect]:
        """Answer a beat; list our documents if the peer holds others.

        Raises:
            RemoteProtocolError: The peer belongs to another network.
        """
        if network_id is not None and beat.network_id != network_id:
            raise RemoteProtocolError("the peer belongs to another network")
        peer.beat = beat
        effects: list[Effect] = [send(peer.peer_id, Ack(beat.sequence))]
        if beat.addresses and beat.addresses != peer.addresses:
            peer.addresses = beat.addresses
            effects.append(Keep(peer.peer_id, beat.addresses))
        if beat.documents != self._sync.documents_digest():
            effects.append(self._sync.list_documents(peer.peer_id))
        return effects

    def on_ack(self, peer: Peer, ack: Ack, now: float) -> list[Effect]:
        """The answer to one of our beats."""
        sent = peer.sent_at.pop(ack.sequence, None)
        if sent is not None:
            peer.rtt = now - sent
        return []

    def on_leave(self, peer: Peer) -> list[Effect]:
        """A member goes on purpose."""
        if not self._membership.left(peer):
            return []
        return [Note("peer.left", _named(peer)), StopDialling(peer.peer_id)]

    def on_addresses(self, message: Addresses) -> list[Effect]:
        """Hearsay about where others are; used for members that we have no address of."""
        effects: list[Effect] = []
        for peer_id, addresses in message.peers:
            peer = self._membership.get(peer_id)
            if peer is None or not addresses or peer.addresses or peer.connected:
                continue
            if peer.state not in {State.LEFT, State.REVOKED}:
                peer.addresses = addresses
                effects.append(Keep(peer_id, addresses))
        return effects
