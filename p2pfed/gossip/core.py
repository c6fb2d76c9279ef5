"""The node without I/O: one state machine, `handle(event, now) -> [effect]`.

Composes membership, anti-entropy and the progress through rounds; holds the believed facts. Time and calendar
come with the events, chance from the generator given, signatures from the function given: the same
events give the same effects, which is what the simulator and the tests rely on.

Invariants: whatever a peer sends, `handle` returns (a broken message costs the sender its connection and
changes nothing); facts are checked before they are believed; this node signs one delta per round.
"""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Callable, Iterable
from typing import assert_never

from p2pfed.errors import FactRejected, RemoteProtocolError
from p2pfed.gossip.events import (
    CheckpointFetched,
    CheckpointsChanged,
    Connected,
    Disconnect,
    Disconnected,
    Effect,
    Event,
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
    TrainerChanged,
    TrainingEnded,
)
from p2pfed.gossip.facts import RunFacts
from p2pfed.gossip.membership import Liveness, Membership, Peer, State
from p2pfed.gossip.progress import Phase, Presence, Progress
from p2pfed.gossip.rounds import AHEAD, weights_of
from p2pfed.gossip.sync import Sync
from p2pfed.identity.book import RosterBook
from p2pfed.identity.run import Run
from p2pfed.identity.signing import fact_hash
from p2pfed.wire.delta import Delta, Header, Proof, SignedHeader
from p2pfed.wire.messages import (
    NAME_BYTES,
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
    Message,
    Want,
    decode_message,
    encode_message,
)
from p2pfed.wire.payload import decode_payload

__all__ = ["Core"]

GOSSIP_INTERVAL = 1.0  # seconds between digests to a random peer; log2(N) of them reach everyone
ADDRESS_INTERVAL = 10.0
FANOUT = 6  # peers told at once of a new own delta; the rest hear of it from them
FORWARD = 2
SET_ASIDE = 8  # deltas per origin that wait for a third of the weight to get there


class Core:
    """See the module docstring.

    Args:
        own_id: Peer id of this node.
        sign: Signs a header with this node's key.
        book: The believed rosters; the core adds to it.
        rng: Chance for choosing peers; not for privacy.
        addresses: Where this node can be dialled.
        liveness: How long silence may last.
        has_trainer: False for a bootstrap-only node.
    """

    def __init__(
        self,
        *,
        own_id: str,
        sign: Callable[[bytes], bytes],
        book: RosterBook,
        rng: random.Random,
        addresses: tuple[str, ...] = (),
        liveness: Liveness | None = None,
        has_trainer: bool = True,
    ) -> None:
        self.own_id = own_id
        self.book = book
        self.addresses = addresses
        self.membership = Membership(own_id, liveness or Liveness())
        self.progress: Progress | None = None
        self.sharing = True
        self.verdict = ""  # why the trainer contributes nothing any more; empty while it does
        self.task_id = b""
        self._sign = sign
        self._rng = rng
        self._liveness = liveness or Liveness()
        self._has_trainer = has_trainer
        self._trainer_up = has_trainer
        self._absent = False
        self._aside: dict[bytes, Delta] = {}
        self._sync = Sync(book, self._aside.__contains__)
        self._offers: tuple[CheckpointOffer, ...] = ()
        self._beats = 0
        self._next_beat = self._next_gossip = self._next_addresses = float("-inf")
        self._wall = dt.datetime.min.replace(tzinfo=dt.UTC)
        if book.current is not None:
            self.membership.adopt(book.current)

    # --- what the shell asks and sets ----------------------------------------------------------

    @property
    def facts(self) -> RunFacts | None:
        """The facts of the run, if there is one."""
        return self.progress.facts if self.progress is not None else None

    def start_run(
        self,
        run: Run,
        *,
        held: Iterable[SignedHeader] = (),
        proofs: Iterable[Proof] = (),
        adopted: tuple[int, bytes] | None = None,
        round_: int = 0,
    ) -> None:
        """Take part in a run.

        Args:
            run: The accepted run.
            held: Headers of stored deltas, verified when they were stored.
            proofs: Stored proofs.
            adopted: A checkpoint believed earlier whose archive was not complete.
            round_: The round of the newest checkpoint on disk.
        """
        facts = RunFacts(run, self.book)
        for signed in held:
            facts.add(signed)
        for proof in proofs:
            facts.add_proof(proof)
        if adopted is not None:
            facts.adopt(*adopted)
        newest = facts.newest_rounds().get(self.own_id, 0)
        fresh = facts.num_deltas == 0 and round_ == 0
        self.verdict = ""
        self.progress = Progress(
            facts, self.own_id, joining=fresh, round_=min(max(newest, round_), run.rounds)
        )
        self._sync.take_run(facts)
        self._aside.clear()

    def why_not_contributing(self) -> str:
        """Empty if this node contributes; else the reason, for people."""
        roster = self.book.current
        if not self._has_trainer:
            return "this node has no trainer"
        if roster is None or self.progress is None:
            return "no run is accepted"
        member = roster.member(self.own_id)
        if member is None or not member.trains:
            return "the roster does not list this node as a training member"
        if roster.is_expired(self._wall):
            return f"roster v{roster.version} has expired"
        if self.progress.facts.is_out(self.own_id, self.progress.round):
            return "this node is revoked or was proven to sign two deltas for one round"
        if not self.sharing:
            return "sharing is switched off"
        return self.verdict

    # --- the one entry -------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event at time `now` (seconds, never going back) and say what to do."""
        effects = self._on_event(event, now)
        if self._absent:  # who has said goodbye says nothing more
            return [e for e in effects if not isinstance(e, Send | SendStored | Keep)]
        if isinstance(event, LeaveNetwork):
            self._absent = True
            return effects
        if self.progress is not None:
            effects += self._admit_set_aside()
        if self.progress is not None and self.book.current is not None:
            effects += self.progress.advance(
                now,
                self.book.current,
                self._presence(),
                contributes=self._trainer_up and not self.why_not_contributing(),
                ahead=self._aside_rounds(),
            )
        return effects

    def _on_event(self, event: Event, now: float) -> list[Effect]:  # noqa: C901 - a flat table
        match event:
            case Tick():
                self._wall = event.wall
                return self._on_tick(now)
            case Connected():
                return self._on_connected(event.peer, now)
            case Disconnected():
                return self._on_disconnected(event.peer)
            case Received():
                return self._on_frame(event.peer, event.frame, now)
            case RosterOffered():
                return self._believe_rosters([event.signed])
            case Released():
                return self._on_released(event)
            case TrainingEnded():
                return self._on_training_ended(event)
            case Folded():
                return self._on_folded(event)
            case CheckpointsChanged():
                self._offers = event.offers
                return []
            case CheckpointFetched():
                assert self.progress is not None
                return self.progress.fetched(event.offer, ok=event.ok)
            case SetSharing():
                self.sharing = event.on
                return [Note("sharing.on" if event.on else "sharing.off", {})]
            case TrainerChanged():
                self._trainer_up = event.up
                return []
            case LeaveNetwork():
                return [] if self._absent else self._to_all(Leave())
            case JoinNetwork():
                self._absent = False
                return []
            case _:
                assert_never(event)

    # --- time and connections ------------------------------------------------------------------

    def _on_tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for peer in self.membership.tick(now):
            effects.append(
                Note(f"peer.{peer.state.value}", {"peer": peer.peer_id, "name": peer.name})
            )
            if peer.state is State.AWAY and peer.connected:
                effects.append(Disconnect(peer.peer_id, "silent for too long", blame=False))
        if now >= self._next_beat:
            self._next_beat = now + self._liveness.beat_interval
            for peer in self.membership.peers.values():
                if peer.connected:
                    effects.append(self._beat(peer, now))
        present = sorted(p.peer_id for p in self.membership.present())
        if now >= self._next_gossip and present:
            self._next_gossip = now + GOSSIP_INTERVAL
            self._sync.forget_stale(now)
            effects += self._sync.opening(self._rng.choice(present))
        if now >= self._next_addresses and present:
            self._next_addresses = now + ADDRESS_INTERVAL
            effects.append(self._known_addresses(self._rng.choice(present)))
        return effects

    def _on_connected(self, peer_id: str, now: float) -> list[Effect]:
        peer = self.membership.get(peer_id)
        if peer is None or peer.state is State.REVOKED:
            return [Disconnect(peer_id, "not on the roster", blame=False)]
        peer.connected = True
        effects: list[Effect] = [self._beat(peer, now), self._known_addresses(peer_id)]
        return [*effects, *self._sync.opening(peer_id)]

    def _on_disconnected(self, peer_id: str) -> list[Effect]:
        peer = self.membership.get(peer_id)
        if peer is not None:
            peer.connected = False
            peer.sent_at.clear()
        return []

    def _beat(self, peer: Peer, now: float) -> Send:
        self._beats += 1
        peer.sent_at[self._beats] = now
        while len(peer.sent_at) > 16:
            del peer.sent_at[next(iter(peer.sent_at))]
        progress = self.progress
        folded = progress.folded if progress is not None else None
        return self._send(
            peer.peer_id,
            Beat(
                sequence=self._beats,
                network_id=self.book.network_id or bytes(32),
                run_id=progress.facts.run.run_id if progress is not None else b"",
                task_id=self.task_id,
                round=progress.round if progress is not None else 0,
                contributes=not self.why_not_contributing(),
                model_round=folded.round if folded is not None else 0,
                model_hash=folded.model_hash if folded is not None else b"",
                documents=self._sync.documents_digest(),
                addresses=self.addresses[:16],
            ),
        )

    def _known_addresses(self, peer_id: str) -> Send:
        known = [
            (p.peer_id, p.addresses[:16]) for p in self.membership.peers.values() if p.addresses
        ]
        return self._send(peer_id, Addresses(tuple(known[:256])))

    # --- messages ------------------------------------------------------------------------------

    def _on_frame(self, peer_id: str, frame: bytes, now: float) -> list[Effect]:
        peer = self.membership.get(peer_id)
        if peer is None or peer.state is State.REVOKED:
            return [Disconnect(peer_id, "not on the roster", blame=False)]
        try:
            message = decode_message(frame)
            effects = self._on_message(peer, message, now)
        except RemoteProtocolError as error:
            return [
                Note("peer.blamed", {"peer": peer_id, "name": peer.name, "reason": error.what}),
                Disconnect(peer_id, error.what, blame=True),
            ]
        if not isinstance(message, Leave) and self.membership.heard(peer, now):
            effects.append(Note("peer.alive", {"peer": peer_id, "name": peer.name}))
        return effects

    def _on_message(self, peer: Peer, message: Message, now: float) -> list[Effect]:  # noqa: C901, PLR0911 - a flat table
        match message:
            case Beat():
                return self._on_beat(peer, message, now)
            case Ack():
                sent = peer.sent_at.pop(message.sequence, None)
                peer.rtt = peer.rtt if sent is None else now - sent
                return []
            case Leave():
                if not self.membership.left(peer):
                    return []
                note = Note("peer.left", {"peer": peer.peer_id, "name": peer.name})
                return [note, StopDialling(peer.peer_id)]
            case Addresses():
                return self._on_addresses(message)
            case Digest():
                return self._sync.on_digest(peer.peer_id, message)
            case Have():
                return self._sync.on_have(peer.peer_id, message, now)
            case Want():
                return self._sync.on_want(peer.peer_id, message)
            case Facts():
                return self._on_facts(peer, message)
            case AskCheckpoints():
                mine = self.facts is not None and message.run_id == self.facts.run.run_id
                return (
                    [self._send(peer.peer_id, Checkpoints(message.run_id, self._offers))]
                    if mine
                    else []
                )
            case Checkpoints():
                if self.progress is not None and message.run_id == self.progress.facts.run.run_id:
                    self.progress.offered(peer.peer_id, message.offers, now)
                return []
            case _:
                assert_never(message)

    def _on_beat(self, peer: Peer, beat: Beat, now: float) -> list[Effect]:
        if self.book.network_id is not None and beat.network_id != self.book.network_id:
            raise RemoteProtocolError("the peer belongs to another network")
        first = peer.beat is None or peer.beat.run_id != beat.run_id
        peer.beat = beat
        effects: list[Effect] = [self._send(peer.peer_id, Ack(beat.sequence))]
        if beat.addresses and beat.addresses != peer.addresses:
            peer.addresses = beat.addresses
            effects.append(Keep(peer.peer_id, beat.addresses))
        if beat.documents != self._sync.documents_digest():
            effects.append(self._sync.list_documents(peer.peer_id))
        progress = self.progress
        if progress is None or not beat.run_id:
            return effects
        if beat.run_id != progress.facts.run.run_id:
            return [*effects, *self._differs(peer, first, "run")]
        if beat.task_id and beat.task_id != progress.facts.run.task_id:
            return [*effects, *self._differs(peer, first, "task")]
        if progress.phase is Phase.JOINING and peer.peer_id not in progress.answered:
            effects.append(self._send(peer.peer_id, AskCheckpoints(beat.run_id)))
        return effects

    def _differs(self, peer: Peer, first: bool, what: str) -> list[Effect]:
        data = {"peer": peer.peer_id, "name": peer.name, "differs": what}
        return [Note("peer.differs", data)] if first else []

    def _on_addresses(self, message: Addresses) -> list[Effect]:
        effects: list[Effect] = []
        for peer_id, addresses in message.peers:
            peer = self.membership.get(peer_id)
            if peer is None or not addresses or peer.addresses or peer.connected:
                continue  # what the peer itself announced beats hearsay
            if peer.state not in {State.LEFT, State.REVOKED}:
                peer.addresses = addresses
                effects.append(Keep(peer_id, addresses))
        return effects

    # --- facts ---------------------------------------------------------------------------------

    def _on_facts(self, peer: Peer, message: Facts) -> list[Effect]:
        effects = self._believe_rosters(message.rosters)
        if self.progress is None:
            return effects
        for data in message.proofs:
            effects += self._believe_proof(Proof.decode(data))
        for data in message.deltas:
            effects += self._take_delta(Delta.decode(data), peer)
        return effects

    def _believe_rosters(self, signed: Iterable[bytes]) -> list[Effect]:
        effects: list[Effect] = []
        before = self.book.current
        for data in sorted(signed, key=len):
            try:
                roster = self.book.add(data)
            except FactRejected as error:
                effects.append(Note("roster.rejected", {"reason": error.what}))
                continue
            if roster is not None:
                effects.append(StoreRoster(roster.version, roster.hash, data))
        if not any(isinstance(e, StoreRoster) for e in effects):
            return effects
        if self.facts is not None:
            self.facts.rosters_changed()
        current = self.book.current
        if current is not None and current is not before:
            effects.append(Note("roster.updated", {"version": current.version}))
            for peer in self.membership.adopt(current):
                if peer.state is State.REVOKED:
                    effects += [
                        Note("peer.revoked", {"peer": peer.peer_id, "name": peer.name}),
                        StopDialling(peer.peer_id),
                        Disconnect(peer.peer_id, "revoked", blame=False),
                    ]
        return effects

    def _believe_proof(self, proof: Proof) -> list[Effect]:
        facts = self.facts
        header = proof.first.header
        if facts is None or header.run_id != facts.run.run_id or not facts.add_proof(proof):
            return []
        return [
            StoreProof(header.origin, proof.encode()),
            Note("peer.equivocated", {"peer": header.origin, "round": header.round}),
        ]

    def _take_delta(self, delta: Delta, peer: Peer) -> list[Effect]:
        assert self.progress is not None
        facts, header = self.progress.facts, delta.header
        run = facts.run
        self._sync.arrived(delta.fact[:NAME_BYTES])
        if header.run_id != run.run_id or header.round >= run.rounds:
            raise RemoteProtocolError("a delta of another run, or beyond its last round")
        if header.mechanism != run.mechanism:
            raise RemoteProtocolError(f"a delta made with mechanism {header.mechanism!r}")
        payload = decode_payload(
            delta.payload, num_parameters=run.num_parameters, max_released=run.max_released
        )
        if payload.indices.size != header.num_released:
            raise RemoteProtocolError("a delta whose header miscounts its payload")
        if self._is_too_far_ahead(header):
            self._set_aside(delta)
            return []
        return self._add_delta(delta, from_peer=peer.peer_id)

    def _add_delta(self, delta: Delta, *, from_peer: str) -> list[Effect]:
        assert self.progress is not None
        facts = self.progress.facts
        known = facts.num_deltas
        proof = facts.add(delta.signed)
        if proof is not None:
            return self._believe_proof(proof)
        if facts.num_deltas == known:
            return []
        own = delta.header.origin == self.own_id
        others = sorted(
            p.peer_id
            for p in self.membership.present()
            if p.peer_id not in {from_peer, delta.header.origin}
        )
        told = self._rng.sample(others, min(len(others), FANOUT if not from_peer else FORWARD))
        return [
            StoreDelta(delta, own=own and not from_peer),
            *self._sync.announce(told, delta.header.round, delta.fact),
        ]

    def _is_too_far_ahead(self, header: Header) -> bool:
        assert self.progress is not None
        return header.round > self.progress.round + AHEAD

    def _set_aside(self, delta: Delta) -> None:
        origin = delta.header.origin
        of_origin = [d for d in self._aside.values() if d.header.origin == origin]
        if len(of_origin) < SET_ASIDE:
            self._aside[delta.fact[:NAME_BYTES]] = delta

    def _aside_rounds(self) -> dict[str, int]:
        newest: dict[str, int] = {}
        for delta in self._aside.values():
            header = delta.header
            newest[header.origin] = max(header.round, newest.get(header.origin, 0))
        return newest

    def _admit_set_aside(self) -> list[Effect]:
        effects: list[Effect] = []
        for name, delta in list(self._aside.items()):
            if not self._is_too_far_ahead(delta.header):
                del self._aside[name]
                effects += self._add_delta(delta, from_peer=delta.header.origin)
        return effects

    # --- training and folding ------------------------------------------------------------------

    def _on_released(self, event: Released) -> list[Effect]:
        progress, roster = self.progress, self.book.current
        trained = progress.trained(event.round) if progress is not None else None
        if progress is None or trained is None or roster is None:
            return []
        if not self.sharing or roster.is_expired(self._wall):
            return [Note("release.withheld", {"round": event.round})]
        if progress.facts.header(event.round, self.own_id) is not None:
            return []
        header = Header(
            run_id=progress.facts.run.run_id,
            round=event.round,
            origin=self.own_id,
            roster_hash=trained.roster_hash,
            view_hash=trained.view_hash,
            mechanism=event.mechanism,
            spent_nano_rho=event.spent_nano_rho,
            releases=event.releases,
            ledger_head=event.ledger_head,
            payload_hash=fact_hash(event.payload),
            num_released=event.num_released,
        )
        delta = Delta.make(header, event.payload, self._sign)
        note = Note(
            "delta.released",
            {"round": event.round, "bytes": len(event.payload), "releases": event.releases},
        )
        return [*self._add_delta(delta, from_peer=""), note]

    def _on_training_ended(self, event: TrainingEnded) -> list[Effect]:
        if self.progress is None or self.progress.trained(event.round) is None:
            return []
        if event.outcome in {"exhausted", "refused"}:
            self.verdict = event.reason
        kind = "privacy.exhausted" if event.outcome == "exhausted" else f"training.{event.outcome}"
        return [Note(kind, {"round": event.round, "reason": event.reason})]

    def _on_folded(self, event: Folded) -> list[Effect]:
        if self.progress is None:
            return []
        self.progress.on_folded(event)
        return [Note("model.folded", {"round": event.round, "hash": event.model_hash.hex()})]

    # --- small things --------------------------------------------------------------------------

    def _presence(self) -> Presence:
        assert self.progress is not None
        run_id = self.progress.facts.run.run_id
        present = [p for p in self.membership.present() if p.beat is not None]
        in_run = {p.peer_id for p in present if p.beat is not None and p.beat.run_id == run_id}
        contributing = {p.peer_id for p in present if p.beat is not None and p.beat.contributes}
        own = set() if self.why_not_contributing() else {self.own_id}
        return Presence(
            alive=frozenset(in_run | {self.own_id}),
            contributing=frozenset((contributing & in_run) | own),
            left=frozenset(
                p.peer_id for p in self.membership.peers.values() if p.state is State.LEFT
            ),
            in_run=frozenset(in_run),
        )

    def _send(self, peer_id: str, message: Message) -> Send:
        return Send(peer_id, encode_message(message))

    def _to_all(self, message: Message) -> list[Effect]:
        connected = [p.peer_id for p in self.membership.peers.values() if p.connected]
        return [self._send(peer_id, message) for peer_id in connected]

    def weight_alive(self) -> tuple[int, int]:
        """Weight that is alive, and all of it; for people."""
        if self.book.current is None or self.progress is None:
            return 0, 0
        weights = weights_of(self.book.current)
        alive = sum(weights.get(p, 0) for p in self._presence().alive)
        return alive, sum(weights.values())
