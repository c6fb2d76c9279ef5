"""The node without I/O: one state machine, `handle(event, now) -> [effect]`.

Composes membership, anti-entropy and the progress through rounds; holds the believed facts. Time
and calendar come with the events, chance from the generator given, signatures from the function
given: the same events give the same effects, which is what the simulator and the tests rely on.

Invariants: whatever a peer sends, `handle` returns (a broken message costs the sender its
connection and changes nothing); facts are checked before they are believed; this node signs one
delta per round.
"""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Callable, Iterable
from typing import assert_never

from p2pfed.errors import RemoteProtocolError
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
    Tick,
    TrainerChanged,
    TrainingEnded,
)
from p2pfed.gossip.facts import RunFacts
from p2pfed.gossip.heartbeat import Heartbeat, send
from p2pfed.gossip.intake import Intake
from p2pfed.gossip.membership import Liveness, Membership, Peer, State
from p2pfed.gossip.progress import Phase, Presence, Progress
from p2pfed.gossip.rounds import weights_of
from p2pfed.identity.book import RosterBook
from p2pfed.identity.run import Run
from p2pfed.identity.signing import fact_hash
from p2pfed.wire.delta import Delta, Header, Proof, SignedHeader
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
    Message,
    Want,
    decode_message,
)

__all__ = ["Core"]


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
        self._has_trainer = has_trainer
        self._trainer_up = has_trainer
        self._trainer_lost = False
        self._absent = False
        self._intake = Intake(own_id=own_id, book=book, membership=self.membership, rng=rng)
        self._sync = self._intake.sync
        self._heartbeat = Heartbeat(
            self.membership, self._sync, liveness or Liveness(), rng, self._compose_beat
        )
        self._offers: tuple[CheckpointOffer, ...] = ()
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
        self._intake.take_run(self.progress)

    def why_not_contributing(self) -> str:
        """Empty if this node contributes; else the reason, for people."""
        roster = self.book.current
        if not self._has_trainer:
            return "this node has no trainer"
        if self._trainer_lost:
            return "the trainer fails again and again"
        if roster is None or self.progress is None:
            return "no run has begun here"
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
            effects += self._intake.admit()
        if self.progress is not None and self.book.current is not None:
            effects += self.progress.advance(
                now,
                self.book.current,
                self._presence(),
                contributes=self._trainer_up and not self.why_not_contributing(),
                ahead=self._intake.newest_set_aside(),
            )
        return effects

    def _on_event(self, event: Event, now: float) -> list[Effect]:  # noqa: C901, PLR0911, PLR0912 - a flat table
        match event:
            case Tick():
                self._wall = event.wall
                return self._heartbeat.tick(now)
            case Connected():
                return self._heartbeat.connected(event.peer, now)
            case Disconnected():
                return self._heartbeat.disconnected(event.peer)
            case Received():
                return self._on_frame(event.peer, event.frame, now)
            case RosterOffered():
                return self._intake.rosters([event.signed])
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
                self._trainer_up, self._trainer_lost = event.up, event.lost
                return []
            case LeaveNetwork():
                return [] if self._absent else self._to_all(Leave())
            case JoinNetwork():
                self._absent = False
                return []
            case _:
                assert_never(event)

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
        if isinstance(message, Leave):
            return effects
        return [*effects, *self._heartbeat.heard(peer, now)]

    def _on_message(self, peer: Peer, message: Message, now: float) -> list[Effect]:  # noqa: C901, PLR0911 - a flat table
        match message:
            case Beat():
                return self._on_beat(peer, message)
            case Ack():
                return self._heartbeat.on_ack(peer, message, now)
            case Leave():
                return self._heartbeat.on_leave(peer)
            case Addresses():
                return self._heartbeat.on_addresses(message)
            case Digest():
                return self._sync.on_digest(peer.peer_id, message)
            case Have():
                return self._sync.on_have(peer.peer_id, message, now)
            case Want():
                return self._sync.on_want(peer.peer_id, message)
            case Facts():
                return self._intake.facts(message, peer.peer_id)
            case AskCheckpoints():
                mine = self.facts is not None and message.run_id == self.facts.run.run_id
                answer = Checkpoints(message.run_id, self._offers)
                return [send(peer.peer_id, answer)] if mine else []
            case Checkpoints():
                if self.progress is not None and message.run_id == self.progress.facts.run.run_id:
                    self.progress.offered(peer.peer_id, message.offers, now)
                return []
            case _:
                assert_never(message)

    def _on_beat(self, peer: Peer, beat: Beat) -> list[Effect]:
        new_to_us = peer.beat is None or peer.beat.run_id != beat.run_id
        effects = self._heartbeat.on_beat(peer, beat, self.book.network_id)
        progress = self.progress
        if progress is None or not beat.run_id:
            return effects
        run = progress.facts.run
        same_run = beat.run_id == run.run_id
        if not same_run or beat.task_id not in {b"", run.task_id}:
            differs = "task" if same_run else "run"
            data = {"peer": peer.peer_id, "name": peer.name, "differs": differs}
            return [*effects, Note("peer.differs", data)] if new_to_us else effects
        if progress.phase is Phase.JOINING and peer.peer_id not in progress.answered:
            effects.append(send(peer.peer_id, AskCheckpoints(beat.run_id)))
        return effects

    def _compose_beat(self, sequence: int) -> Beat:
        progress = self.progress
        folded = progress.folded if progress is not None else None
        return Beat(
            sequence=sequence,
            network_id=self.book.network_id or bytes(32),
            run_id=progress.facts.run.run_id if progress is not None else b"",
            task_id=self.task_id,
            round=progress.round if progress is not None else 0,
            contributes=not self.why_not_contributing(),
            model_round=folded.round if folded is not None else 0,
            model_hash=folded.model_hash if folded is not None else b"",
            documents=self._sync.documents_digest(),
            addresses=self.addresses[:16],
        )

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
        facts = progress.facts
        if facts.has_later_ledger(self.own_id, event.releases, event.ledger_head):
            self.verdict = "the ledger is older than what this node has released (a restored copy?)"
            return [Note("privacy.rollback", {"round": event.round, "releases": event.releases})]
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
        return [*self._intake.delta(delta), note]

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

    def _to_all(self, message: Message) -> list[Effect]:
        connected = [p.peer_id for p in self.membership.peers.values() if p.connected]
        return [send(peer_id, message) for peer_id in connected]

    def weight_alive(self) -> tuple[int, int]:
        """Weight that is alive, and all of it; for people."""
        if self.book.current is None or self.progress is None:
            return 0, 0
        weights = weights_of(self.book.current)
        alive = sum(weights.get(p, 0) for p in self._presence().alive)
        return alive, sum(weights.values())
