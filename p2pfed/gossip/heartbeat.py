"""The talk that keeps membership going: beats, answers, goodbyes, addresses, and whom to talk to.

A beat says who one is and what one holds; where that is nothing new a `Ping` does. The answer gives
the round-trip time. Up to `full_mesh` members everybody beats everybody; in a crowd a node beats
its neighbours when others must know of it, and pings those that have been quiet, the next ones on
the ring with every beat. Who is silent is asked for (`probing`). One neighbour at a
time is shown what is held (`spread`, `sync`) and told what was heard of others (`rumours`).
Addresses of others are hearsay: what a peer announced itself comes first, but it may have moved;
the handshake decides in the end.

Invariant: a peer that is silent is dialled for ever (in a crowd, again and again); one that left
too, but seldom: it may have been started anew and be unable to dial us. (In a crowd it is dialled
when others say that it is back.)
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from p2pfed.errors import RemoteProtocolError
from p2pfed.gossip.events import Disconnect, Effect, Keep, Note, Send, StopDialling
from p2pfed.gossip.membership import Membership, Peer, State
from p2pfed.gossip.neighbours import Neighbours
from p2pfed.gossip.probing import Probing
from p2pfed.gossip.rumours import Rumours
from p2pfed.gossip.sync import Sync
from p2pfed.wire.beat import MAX_ADDRESSES, Beat
from p2pfed.wire.messages import Ack, Addresses, Message, encode_message
from p2pfed.wire.spreading import (
    AskHeard,
    Claims,
    Crowded,
    Doubted,
    Heard,
    Held,
    Ping,
    SpreadingMessage,
    Wanted,
)
from p2pfed.wire.versions import VERSIONS

__all__ = ["Heartbeat", "send"]

MAX_UNANSWERED = 16
LEAST_TIMEOUT = 0.5  # seconds; two ticks of the other side: an answer in this time is never late
ADDRESSES_AT_ONCE = 16
ADDRESSES_AT_FIRST = 16  # told to a new neighbour
TELLINGS = 3  # how often an address is told on that its owner told us


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
        rng: Chance for choosing a peer.
        compose: Makes the beat with a sequence number.

    Attributes:
        tells_rounds: Whether others must know at once in which round we are.
    """

    def __init__(
        self,
        membership: Membership,
        sync: Sync,
        rng: random.Random,
        compose: Callable[[int], Beat],
    ) -> None:
        self._membership = membership
        self._sync = sync
        self._liveness = membership.liveness
        self._rng = rng
        self._compose = compose
        self._sequence = 0
        self._neighbours = Neighbours(membership, sync.seating, rng)
        self._rumours = Rumours(membership, sync.seating)
        self._probing = Probing(membership, rng)
        self._untold: dict[str, int] = {}  # peer -> how often its addresses are still to be told
        self.tells_rounds = False
        self._said: Beat | None = None
        self._said_at = float("-inf")
        self._next_beat = self._next_gossip = self._next_addresses = float("-inf")
        self._next_digest = self._next_introduction = float("-inf")

    # --- time and connections ------------------------------------------------------------------

    def tick(self, now: float) -> list[Effect]:
        """Let time pass: verdicts on silent peers, beats, gossip with a random peer."""
        effects: list[Effect] = []
        slept = self._membership.health.tick(now)
        if slept:
            self._membership.slept(slept, now)
            effects.append(Note("node.stood-still", {"seconds": round(slept, 1)}))
        for peer in self._membership.tick(now):
            self._rumours.judged(peer)
            effects.append(Note(f"peer.{peer.state.value}", _named(peer)))
            if peer.state is State.AWAY and peer.connected:
                effects.append(Disconnect(peer.peer_id, "silent for too long", blame=False))
        effects += self._probing.tick(now)
        effects += self._neighbours.tick(now)
        if now >= self._next_beat:
            self._next_beat = now + self._liveness.beat_interval
            effects += self._beats(now)
        if now >= self._next_gossip or self._sync.spread.is_due(now):
            effects += self._gossip(now)
        if now >= self._next_addresses and self._untold:
            self._next_addresses = now + self._liveness.address_interval
            effects += self._address_news()
        return effects

    def hasten(self) -> None:
        """What the beat says has changed: send the next one at the next tick."""
        self._next_beat = float("-inf")

    def introduce(self) -> None:
        """Nobody has heard us for a while: say all that there is to say."""
        self._said = None
        self.hasten()

    def connected(self, peer_id: str, version: int, now: float) -> list[Effect]:
        """A connection is up, on which a version is spoken: introduce ourselves."""
        peer = self._membership.get(peer_id)
        if peer is None or peer.state is State.REVOKED:
            return [Disconnect(peer_id, "not on the roster", blame=False)]
        self._membership.link(peer, now)
        peer.version, peer.speaks = version, None
        effects: list[Effect] = [self._beat(peer, self._compose(0), now)]
        effects += self._known_addresses(peer_id)
        return [*effects, *self._sync.opening(peer_id), *self._rumours.opening(peer_id, now)]

    def unlike(self, peer_id: str, versions: tuple[int, ...]) -> list[Effect]:
        """A member speaks no version that we speak; told once."""
        peer = self._membership.get(peer_id)
        if peer is None or peer.connected or peer.speaks == versions:
            return []
        peer.speaks = versions
        told = {"speaks": list(versions), "we_speak": list(VERSIONS)}
        return [Note("peer.version-differs", {**_named(peer), **told})]

    def disconnected(self, peer_id: str, now: float) -> list[Effect]:
        """A connection is gone; the verdict on the peer comes with time."""
        peer = self._membership.get(peer_id)
        if peer is not None:
            self._membership.unlink(peer, now)
            self._sync.asked.gone(peer_id)
        return []

    def _gossip(self, now: float) -> list[Effect]:
        """Talk to one neighbour."""
        partner = self._neighbours.partner()
        if partner is None:
            return []
        live, spread = self._liveness, self._sync.spread
        if now < self._next_gossip:
            return spread.contact(partner, now, brisk=live.brisk_interval)
        self._next_gossip = now + live.gossip_interval
        self._sync.asked.forget_stale(now)
        effects = self._rumours.contact(partner, now)
        if now >= self._next_digest:
            self._next_digest = now + live.digest_interval
            return effects + self._sync.opening(partner)
        return effects + spread.contact(partner, now, brisk=live.brisk_interval)

    # --- beats -----------------------------------------------------------------------------------

    def _beats(self, now: float) -> list[Effect]:
        beat, said = self._compose(0), self._said
        linked = self._membership.linked()
        self._rumours.speak(contributes=beat.contributes, run_id=beat.run_id)
        crowd = self._membership.is_crowd
        if said is None or self._matters(beat) != self._matters(said):
            self._said, self._said_at = beat, now
            return [self._beat(peer, beat, now) for peer in linked]
        told: list[Peer] = []
        if now >= self._said_at + self._liveness.introduce_interval:
            self._said, self._said_at = beat, now
            partner = self._membership.get(self._neighbours.partner() or "")
            told = linked if not crowd else [partner] if partner is not None else []
        quiet_after = self._liveness.quiet_after
        quiet = [
            p for p in linked if not self._membership.rests(p) or p.silent_from + quiet_after < now
        ]
        effects: list[Effect] = [self._beat(peer, beat, now) for peer in told]
        return effects + [
            send(p.peer_id, Ping(self._count(p, now))) for p in quiet if p not in told
        ]

    def _matters(self, beat: Beat) -> tuple[object, ...]:
        """What all neighbours must know at once; the rest is for people."""
        round_ = beat.round if self.tells_rounds else 0
        return beat.contributes, beat.run_id, beat.task_id, beat.documents, beat.addresses, round_

    def _beat(self, peer: Peer, beat: Beat, now: float) -> Send:
        beat = replace(beat, sequence=self._count(peer, now))
        return Send(peer.peer_id, encode_message(beat, peer.version))

    def _count(self, peer: Peer, now: float) -> int:
        self._sequence += 1
        peer.sent_at[self._sequence] = now
        while len(peer.sent_at) > MAX_UNANSWERED:
            del peer.sent_at[next(iter(peer.sent_at))]
        return self._sequence

    # --- addresses -------------------------------------------------------------------------------

    def _known_addresses(self, peer_id: str) -> list[Effect]:
        """Some of those that are there, for a peer that has just come."""
        known = list(self._membership.peers.values())
        if len(known) > 2 * ADDRESSES_AT_FIRST:
            known = self._rng.sample(known, 2 * ADDRESSES_AT_FIRST)
        known = sorted((p for p in known if p.ways), key=lambda peer: not peer.is_present)
        known = known[:ADDRESSES_AT_FIRST]
        told = tuple((p.peer_id, p.ways[:MAX_ADDRESSES]) for p in known if p.peer_id != peer_id)
        return [send(peer_id, Addresses(told))] if told else []

    def _address_news(self) -> list[Effect]:
        """Addresses that a neighbour may not have heard of."""
        partner = self._neighbours.partner()
        if partner is None:
            return []
        told = []
        for peer_id in list(self._untold)[:ADDRESSES_AT_ONCE]:
            peer = self._membership.get(peer_id)
            left = self._untold.pop(peer_id) - 1
            if left:
                self._untold[peer_id] = left  # behind the others
            if peer is not None and peer.addresses and peer_id != partner:
                told.append((peer_id, peer.addresses))
        return [send(partner, Addresses(tuple(told)))] if told else []

    # --- messages ------------------------------------------------------------------------------

    def heard(self, peer: Peer, now: float) -> list[Effect]:
        """A member said anything but goodbye."""
        if not self._membership.heard(peer, now):
            return []
        return [Note("peer.alive", _named(peer)), *self._neighbours.located(peer)]

    def on_beat(self, peer: Peer, beat: Beat, network_id: bytes | None, now: float) -> list[Effect]:
        """Answer a beat; list our documents if the peer holds others.

        Who has just begun another run wants to know at once who else is in it.

        Raises:
            RemoteProtocolError: The peer belongs to another network.
        """
        if network_id is not None and beat.network_id != network_id:
            raise RemoteProtocolError("the peer belongs to another network")
        begins = peer.beat is not None and peer.beat.run_id != beat.run_id
        self._membership.beat(peer, beat)
        effects: list[Effect] = [send(peer.peer_id, Ack(beat.sequence))]
        effects += [self._beat(peer, self._compose(0), now)] if begins else []
        if beat.addresses and beat.addresses != peer.addresses:
            self._untold[peer.peer_id] = TELLINGS
            peer.addresses = beat.addresses
            effects += self._neighbours.located(peer)
        if not self._sync.documents_agree(beat):
            effects.append(self._sync.list_documents(peer.peer_id))
        return effects

    def on_ack(self, peer: Peer, ack: Ack, now: float) -> list[Effect]:
        """The answer to one of our beats."""
        sent = peer.sent_at.pop(ack.sequence, None)
        # What was asked before an outage and is answered after it measures the outage and not the
        # path (Karn's algorithm; RFC 6298, section 3).
        if sent is not None and sent >= peer.back_at:
            peer.rtt = now - sent
            in_time = not peer.path.smoothed or peer.rtt <= max(peer.path.timeout, LEAST_TIMEOUT)
            self._membership.health.answered(peer.peer_id, in_time=in_time)
            peer.path.measure(peer.rtt)
        return []

    def on_leave(self, peer: Peer) -> list[Effect]:
        """A member goes on purpose."""
        if not self._membership.left(peer):
            return []
        self._rumours.judged(peer)
        note = Note("peer.left", _named(peer))
        if self._membership.is_crowd:
            return [note, StopDialling(peer.peer_id)]
        return [note, Keep(peer.peer_id, peer.ways, has_left=True)]

    def on_addresses(self, message: Addresses) -> list[Effect]:
        """Hearsay about where others are, which may have moved since we heard them.

        It is tried besides what is known already, so that a liar can hide nobody.
        """
        effects: list[Effect] = []
        for peer_id, addresses in message.peers:
            peer = self._membership.get(peer_id)
            if peer is None or peer.connected or peer.state in {State.LEFT, State.REVOKED}:
                continue
            if set(addresses) <= set(peer.ways):
                continue
            peer.hearsay = tuple(dict.fromkeys((*addresses, *peer.hearsay)))[:MAX_ADDRESSES]
            effects += self._neighbours.located(peer)
        return effects

    def on_spreading(self, peer: Peer, message: SpreadingMessage, now: float) -> list[Effect]:
        """One of the messages that go by seat.

        Raises:
            RemoteProtocolError: It names seats that there are not.
        """
        match message:
            case Held():
                return self._sync.spread.on_held(peer.peer_id, message, now)
            case Wanted():
                return self._sync.spread.on_wanted(peer.peer_id, message)
            case Claims():
                return self._rumours.on_claims(peer, message, now)
            case Crowded():
                return self._neighbours.on_crowded(peer, now)
            case Ping():
                return [send(peer.peer_id, Ack(message.sequence))]
            case AskHeard():
                return self._probing.on_question(peer, message, now)
            case Heard():
                return self._probing.on_answer(peer, message, now)
            case Doubted():
                speaks_up = self._probing.is_doubted(peer, message, now)
                beat, linked = self._compose(0), self._membership.linked()
                return [self._beat(p, beat, now) for p in linked] if speaks_up else []
