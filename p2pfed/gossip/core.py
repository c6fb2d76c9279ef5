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

from p2pfed.errors import RemoteProtocolError
from p2pfed.gossip.attendance import Attendance
from p2pfed.gossip.events import (
    CheckpointFetched,
    CheckpointsChanged,
    Connected,
    Disconnected,
    Effect,
    Event,
    Folded,
    FoldFellShort,
    JoinNetwork,
    Keep,
    LeaveNetwork,
    Note,
    Received,
    Released,
    RosterOffered,
    Send,
    SendStored,
    SendWitness,
    SetSharing,
    Tick,
    TrainerChanged,
    TrainingEnded,
    Unlike,
)
from p2pfed.gossip.facts import RunFacts
from p2pfed.gossip.guard import Guard
from p2pfed.gossip.heartbeat import Heartbeat, send
from p2pfed.gossip.intake import Intake
from p2pfed.gossip.introduction import Introduction
from p2pfed.gossip.local_rounds import LocalRounds
from p2pfed.gossip.meeting_events import Survived
from p2pfed.gossip.membership import Liveness, Membership, Peer
from p2pfed.gossip.progress import Presence, Progress
from p2pfed.gossip.release import Releasing
from p2pfed.gossip.witness import Witnesses
from p2pfed.identity.book import RosterBook
from p2pfed.identity.run import Run
from p2pfed.wire.delta import Delta, Proof, SignedHeader
from p2pfed.wire.messages import (
    Ack,
    Addresses,
    AskCheckpoints,
    AskWitness,
    Beat,
    CheckpointOffer,
    Checkpoints,
    Digest,
    Facts,
    Have,
    Leave,
    Message,
    Want,
    Witness,
    decode_message,
)
from p2pfed.wire.spreading import Held, SpreadingMessage, Wanted

__all__ = ["Core"]

# Messages after which nothing has to be thought over that cannot wait for the next tick.
_TALK = Ack | Addresses | Digest | Have | Want | Held | Wanted | AskCheckpoints | AskWitness


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
        read_delta: Decodes and verifies a delta.
        recall: Reads a stored header by its full name, so that not all have to be in memory.
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
        read_delta: Callable[[bytes], Delta] = Delta.decode,
        recall: Callable[[bytes], SignedHeader | None] | None = None,
    ) -> None:
        self.own_id, self._recall = own_id, recall
        self.book = book
        self.membership = Membership(own_id, liveness or Liveness())
        self.progress: Progress | None = None
        self._rng, self._absent, self._contributed, self._only_talk = rng, False, False, False
        self._intake = Intake(
            own_id=own_id,
            book=book,
            membership=self.membership,
            rng=rng,
            read_delta=read_delta,
        )
        self._sync = self._intake.sync
        self.witnesses = Witnesses(own_id, sign, book, self.membership)
        self._guard = Guard(self.membership)
        self._releasing = Releasing(
            own_id=own_id,
            sign=sign,
            book=book,
            intake=self._intake,
            witnesses=self.witnesses,
            has_trainer=has_trainer,
        )
        self.introduction = Introduction(
            book,
            self._sync,
            self._guard,
            contributes=lambda: not self.why_not_contributing(),
            addresses=addresses,
        )
        self._heartbeat = Heartbeat(self.membership, self._sync, rng, self.introduction.compose)
        self._attendance = Attendance(self.membership)
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
        adopted: tuple[int, bytes, int] | None = None,
        round_: int = 0,
        own: Iterable[SignedHeader] = (),
        paired: Survived | None = None,
    ) -> None:
        """Take part in a run.

        Args:
            run: The accepted run.
            held: Headers of stored deltas, verified when they were stored.
            proofs: Stored proofs.
            adopted: A checkpoint believed earlier whose archive was not complete: its round and
                chain, and the version of the newest roster then.
            round_: The round of the newest checkpoint on disk.
            own: The newest stored header of this node's, of every other run.
            paired: What survived of this node's own model, in pairwise mode.
        """
        facts = RunFacts(run, self.book, self._recall)
        for signed in held:
            facts.add(signed)
            self.witnesses.remember([signed])
            facts.cool(signed.header.round)  # they come by round
        for proof in proofs:
            facts.add_proof(proof)
        if adopted is not None:
            facts.adopt(*adopted[:2], under=adopted[2])
        newest = facts.newest_rounds().get(self.own_id, 0)
        fresh = facts.num_deltas == 0  # its store may be lost, whatever checkpoints there are
        self.progress = Progress(
            facts, self.own_id, joining=fresh, round_=min(max(newest, round_), run.rounds)
        )
        if run.averaging.mode == "pairwise":
            show = self._releasing.may_show
            self.progress = LocalRounds(
                facts, self.membership, paired, rng=self._rng, willing=lambda: show(self._wall)
            )
        self._heartbeat.tells_rounds = isinstance(self.progress, LocalRounds)
        self.introduction.take_run(self.progress)
        self._intake.take_run(self.progress)
        self._releasing.take_run(self.progress)
        self.witnesses.remember(own)

    @property
    def sharing(self) -> bool:
        """Whether the operator lets this node release."""
        return self._releasing.sharing

    @sharing.setter
    def sharing(self, on: bool) -> None:
        self._releasing.sharing = on

    @property
    def verdict(self) -> str:
        """Why the trainer contributes nothing any more; empty while it does."""
        return self._releasing.verdict

    @verdict.setter
    def verdict(self, reason: str) -> None:
        self._releasing.verdict = reason

    def why_not_contributing(self) -> str:
        """Empty if this node contributes; else the reason, for people."""
        return self._releasing.why_not(self._wall)

    # --- the one entry -------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event at time `now` (seconds, never going back) and say what to do."""
        self._only_talk = False
        effects = self._on_event(event, now)
        if self._only_talk:
            return effects
        if self._absent:  # who has said goodbye says nothing more
            return [e for e in effects if not isinstance(e, Send | SendStored | SendWitness | Keep)]
        if isinstance(event, LeaveNetwork):
            self._absent = True
            return effects
        if self.progress is not None:
            effects += self._intake.admit()
        contributes = not self.why_not_contributing()
        if contributes != self._contributed:
            self._contributed = contributes
            self._heartbeat.hasten()  # whom others wait for should be known at once
        if self.progress is not None and self.book.current is not None:
            effects += self.progress.advance(
                now,
                self.book.current,
                self._presence(contributes=contributes),
                contributes=self._releasing.trainer_up and contributes,
                ahead=self._intake.newest_set_aside(),
            )
        return effects

    def _on_event(self, event: Event, now: float) -> list[Effect]:  # noqa: C901, PLR0911, PLR0912 - a flat table
        match event:
            case Tick():
                self._wall = event.wall
                self._attendance.tick()
                return self._heartbeat.tick(now) + self.witnesses.tick(now) + self._guard.tick(now)
            case Connected():
                if (refusal := self._guard.turned_away(event.peer, now)) is not None:
                    return [refusal]
                effects = self._heartbeat.connected(event.peer, event.version, now)
                return effects + self.witnesses.connected(event.peer)
            case Disconnected():
                return self._heartbeat.disconnected(event.peer, now)
            case Received():
                return self._on_frame(event, now)
            case Unlike():
                return self._heartbeat.unlike(event.peer, event.versions)
            case RosterOffered():
                return self._intake.rosters([event.signed])
            case Released():
                return self._releasing.on_released(event, self._wall)
            case TrainingEnded():
                return self._releasing.on_training_ended(event)
            case Folded():
                return self._on_folded(event)
            case CheckpointsChanged():
                self._offers = event.offers
                if self.progress is not None:
                    self.progress.checkpoints_changed({o.round: o.chain for o in event.offers})
                return []
            case FoldFellShort():
                if self.progress is not None:
                    self.progress.fold_fell_short()
                return []
            case CheckpointFetched():
                assert self.progress is not None
                return self.progress.fetched(event.offer, ok=event.ok)
            case SetSharing():
                return self._releasing.on_sharing(event)
            case TrainerChanged():
                return self._releasing.on_trainer(event)
            case LeaveNetwork():
                return [] if self._absent else self._to_all(Leave())
            case JoinNetwork():
                self._absent = False
                self._heartbeat.introduce()
                return []
            case _:
                assert isinstance(self.progress, LocalRounds)
                return self.progress.on_pair_event(event, now)

    # --- messages ------------------------------------------------------------------------------

    def _on_frame(self, event: Received, now: float) -> list[Effect]:
        if (refusal := self._guard.turned_away(event.peer, now)) is not None:
            return [refusal]
        peer = self.membership.peers[event.peer]
        try:
            message = decode_message(event.frame, event.version)
            self._only_talk = isinstance(message, _TALK) and not self._absent
            limited = self._guard.weigh(peer, message, now)
            effects = self._on_message(peer, message, now) if limited is None else limited
        except RemoteProtocolError as error:
            return self._guard.blame(peer, error.what, now)
        if isinstance(message, Leave):
            return effects
        return [*effects, *self._heartbeat.heard(peer, now)]

    def _on_message(self, peer: Peer, message: Message, now: float) -> list[Effect]:  # noqa: C901, PLR0911, PLR0912 - a flat table
        match message:
            case Beat():
                return self._on_beat(peer, message, now)
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
            case _ if isinstance(message, SpreadingMessage):
                return self._heartbeat.on_spreading(peer, message, now)
            case Facts():
                effects = self._intake.facts(message, peer.peer_id)
                return self._guard.sparing(peer, effects, now)
            case AskCheckpoints():
                mine = self.facts is not None and message.run_id == self.facts.run.run_id
                answer = Checkpoints(message.run_id, self._offers)
                return [send(peer.peer_id, answer)] if mine else []
            case Checkpoints():
                if self.progress is not None and message.run_id == self.progress.facts.run.run_id:
                    self.progress.offered(peer.peer_id, message.offers, now)
                return []
            case AskWitness() | Witness():
                return self.witnesses.hear(peer.peer_id, message)
            case _:
                if isinstance(self.progress, LocalRounds):
                    return self.progress.hear(peer.peer_id, message, now)
                return []

    def _on_beat(self, peer: Peer, beat: Beat, now: float) -> list[Effect]:
        before = peer.beat
        effects = self._heartbeat.on_beat(peer, beat, self.book.network_id, now)
        return effects + self.introduction.heard(peer, beat, before, now)

    # --- small things --------------------------------------------------------------------------

    def _on_folded(self, event: Folded) -> list[Effect]:
        if self.progress is None:
            return []
        self.progress.on_folded(event)
        return [Note("model.folded", {"round": event.round, "hash": event.model_hash.hex()})]

    def _presence(self, *, contributes: bool) -> Presence:
        assert self.progress is not None
        run_id, round_ = self.progress.facts.run.run_id, self.progress.round
        return self._attendance.of(run_id, round_, contributes=contributes)

    def _to_all(self, message: Message) -> list[Effect]:
        return [send(peer.peer_id, message) for peer in self.membership.linked()]

    def waiting(self) -> dict[str, int]:
        """How much is kept because of others, by kind; each is bounded."""
        return self._intake.waiting()

    def weight_alive(self) -> tuple[int, int]:
        """Weight that is alive, and all of it; for people."""
        if self.book.current is None or self.progress is None:
            return 0, 0
        weights = self.progress.facts.weights(self.book.current.hash)
        there = self._presence(contributes=self._contributed).alive
        alive = sum(weights.get(p, 0) for p in there)
        return alive, sum(weights.values())
