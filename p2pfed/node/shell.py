"""Performs the core's effects and feeds it events; no policy.

`feed` is synchronous and never waits: an event goes in, the effects are performed in order, and
what takes time (folding, training, fetching, hanging up) becomes a task whose end is another event.
So the core sees one event at a time, and everything is on one thread but the fold.

Invariant: a peer can never crash the node. An exception while a peer's frame is handled is a bug of
ours, logged with its traceback, and costs that peer its connection.
"""

from __future__ import annotations

import datetime as dt
import itertools
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, assert_never

import trio

from p2pfed.errors import FactRejected, PeerError, StoreFailed, TrainerError
from p2pfed.gossip.core import Core
from p2pfed.gossip.events import (
    CheckpointFetched,
    CheckpointsChanged,
    Connected,
    Disconnect,
    Disconnected,
    Effect,
    Event,
    FetchCheckpoint,
    Fold,
    Folded,
    Keep,
    Note,
    Received,
    Send,
    SendStored,
    SendWitness,
    StopDialling,
    StoreDelta,
    StoreProof,
    StoreRoster,
    Tick,
    Train,
    TrainingEnded,
    Unlike,
)
from p2pfed.gossip.meeting_events import PairEffect
from p2pfed.gossip.witness import witness_of
from p2pfed.identity.run import Run
from p2pfed.identity.signing import SignedDocument
from p2pfed.network import (
    AddressesChanged,
    FrameReceived,
    PeerConnected,
    PeerDisconnected,
    PeerNetwork,
    VersionsDiffer,
)
from p2pfed.network.blob import drop_partials
from p2pfed.node.directory import DataDirectory
from p2pfed.node.eventlog import EventLog
from p2pfed.node.model import Model
from p2pfed.node.outcome import outcome_of, public_spending
from p2pfed.node.pairing import PairModel
from p2pfed.node.roundclock import RoundClock
from p2pfed.node.store import Store
from p2pfed.node.trainer import Trainer
from p2pfed.wire.codec import MAX_FRAME
from p2pfed.wire.measure import Measure
from p2pfed.wire.messages import Facts, encode_message

__all__ = ["Shell"]

logger = logging.getLogger(__name__)

TICK = 0.25  # seconds; the finest step of deadlines and beats
_FACTS_BYTES = MAX_FRAME - 4096
_VIEW = "view.safetensors"


class Shell:
    """One node's I/O around its core.

    Args:
        core: The state machine.
        directory: Where rosters and runs are kept.
        store: Where deltas are kept.
        log: The event log.
        network: The peers.
        nursery: Where tasks run.
        wall: The calendar time.
    """

    def __init__(
        self,
        core: Core,
        *,
        directory: DataDirectory,
        store: Store,
        log: EventLog,
        network: PeerNetwork,
        nursery: trio.Nursery,
        wall: Callable[[], dt.datetime],
    ) -> None:
        self.core = core
        self.store = store
        self.log = log
        self.network = network
        self.trainer: Trainer | None = None
        self.model: Model | PairModel | None = None
        self.run: Run | None = None
        self.run_text = ""
        self.spent: dict[str, Any] = {}
        self.present = True  # False after `leave`
        self.blocked: frozenset[str] = frozenset(store.recall("blocked", []))
        self.bootstrap: dict[str, tuple[str, ...]] = {}  # whatever others say
        self.clock = RoundClock()
        self.awaited = ""  # what an accepted run still waits for, for people
        self._directory = directory
        self._nursery = nursery
        self.fold_turn = trio.Lock()  # a run accepted again must not meet its own last fold
        self.wall = wall

    def begin(self, task: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Run a task of the node's until it ends."""
        self._nursery.start_soon(task, *args)

    def start_run(self, run: Run, signed: bytes, model: Model | PairModel) -> None:
        """Take part in a run whose genesis is at hand, from what is stored of it."""
        self.model, self.run, self.awaited = model, run, ""
        self.run_text = SignedDocument.parse(signed).payload.decode("utf-8")
        adopted = self.store.recall(f"adopted.{run.run_id.hex()}")
        self.core.start_run(
            run,
            held=self.store.headers(run.run_id),
            proofs=self.store.proofs(run.run_id),
            adopted=None if adopted is None else _read_adopted(adopted),
            round_=max(model.checkpoints.chains(), default=0),
            own=self.store.newest_headers(self.core.own_id),
            paired=model.held() if isinstance(model, PairModel) else None,
        )
        self.log.add("run.started", {"run": run.name, "id": run.run_id.hex()})

    # --- events in -----------------------------------------------------------------------------

    def feed(self, event: Event) -> None:
        """Hand one event to the core and perform what it says."""
        for effect in self.core.handle(event, trio.current_time()):
            self._perform(effect)

    async def tick_for_ever(self) -> None:
        """Let time pass."""
        while True:
            self.feed(Tick(self.wall()))
            self.log.flush()
            await trio.sleep(TICK)

    async def hear_for_ever(self) -> None:
        """Take in what the network reports."""
        async for event in self.network.events:
            match event:
                case PeerConnected():
                    self.feed(Connected(event.peer, event.version))
                case VersionsDiffer():
                    self.feed(Unlike(event.peer, event.theirs))
                case PeerDisconnected():
                    self.feed(Disconnected(event.peer))
                case FrameReceived():
                    self._hear_frame(event)
                case AddressesChanged():
                    self.core.introduction.addresses = event.addresses  # the next beat tells
                    self.log.add("node.addresses", {"addresses": list(event.addresses)})
                case _:
                    assert_never(event)

    def _hear_frame(self, event: FrameReceived) -> None:
        try:
            self.feed(Received(event.peer, event.frame, event.version))
        except (sqlite3.Error, StoreFailed):
            raise  # what is believed must be stored: better stop than go on with a hole
        except Exception:
            logger.exception("bug while handling a frame of %s; hanging up", event.peer)
            self._nursery.start_soon(self.network.disconnect, event.peer)

    # --- effects out ---------------------------------------------------------------------------

    def _perform(self, effect: Effect) -> None:  # noqa: C901, PLR0912 - a flat table
        match effect:
            case Send():
                self.network.send(effect.peer, effect.frame)
            case SendStored():
                self._send_stored(effect)
            case SendWitness():
                shown = witness_of(effect.peer, self.store.newest_headers(effect.peer))
                self.network.send(effect.peer, encode_message(shown))
            case Disconnect():
                if effect.blame:
                    logger.warning("hanging up on %s: %s", effect.peer, effect.reason)
                self._nursery.start_soon(self.network.disconnect, effect.peer)
            case Keep():
                if effect.addresses:
                    self.store.keep_addresses(effect.peer, effect.addresses)
                if self.present:
                    places = (*effect.addresses, *self.bootstrap.get(effect.peer, ()))
                    self.network.keep_connected(
                        effect.peer, tuple(dict.fromkeys(places)), has_left=effect.has_left
                    )
            case StopDialling():
                self.network.stop_dialling(effect.peer)
            case StoreDelta():
                self.store.keep_delta(effect.delta, durable=effect.own)
            case StoreRoster():
                self._directory.keep_roster(effect.version, effect.roster_hash, effect.signed)
                self._nursery.start_soon(self.network.recheck)
            case StoreProof():
                self.store.keep_proof(effect.origin, effect.proof)
            case Fold():
                self._nursery.start_soon(self._fold, effect)
            case Train():
                self._nursery.start_soon(self._train, effect)
            case FetchCheckpoint():
                self._nursery.start_soon(self._fetch_checkpoint, effect)
            case Note():
                self.log.add(effect.type, effect.data)
                self.clock.note(effect.type, effect.data, trio.current_time())
            case _:
                self._nursery.start_soon(self._work_on_model, effect)

    def _send_stored(self, effect: SendStored) -> None:
        deltas = (self.store.delta(fact).encode() for fact in effect.deltas)
        messages = itertools.chain(
            (Facts((), batch, ()) for batch in _in_frames(effect.rosters)),
            (Facts((), (), batch) for batch in _in_frames(effect.proofs)),
            (Facts(batch, (), ()) for batch in _in_frames(deltas)),
        )
        for message in messages:
            if not self.network.send(effect.peer, encode_message(message)):
                return  # its queue is full; it will ask again

    # --- what takes time -----------------------------------------------------------------------

    async def _fold(self, effect: Fold) -> None:
        model = self.model
        if not isinstance(model, Model):
            return  # another run was accepted meanwhile
        async with self.fold_turn:
            folded = await trio.to_thread.run_sync(model.fold, effect)
            offers = await trio.to_thread.run_sync(model.checkpoints.offers)
        if model is not self.model:
            return  # another run was accepted meanwhile
        self._remember_adopted()
        self.feed(CheckpointsChanged(offers))
        self.feed(folded)
        if isinstance(folded, Folded):
            await self.evaluate(folded.round)

    async def _work_on_model(self, effect: PairEffect) -> None:
        model = self.model
        if not isinstance(model, PairModel):
            return  # another run was accepted meanwhile
        event = await trio.to_thread.run_sync(model.perform, effect)
        if model is not self.model or event is None:
            return  # another run was accepted meanwhile, or there is nothing to tell
        self.feed(event)
        if isinstance(event, Folded):
            self.feed(CheckpointsChanged(await trio.to_thread.run_sync(model.checkpoints.offers)))
            await self.evaluate(event.round)

    async def evaluate(self, round_: int) -> None:
        """Let the trainer evaluate a model that it does not train on; the result stays with it."""
        idle = self.core.progress is None or self.core.progress.training is None
        if self.trainer is None or not idle:
            return
        try:
            request = {"op": "evaluate", "view": _VIEW, "round": round_, "run": self.run_text}
            self._take_measure(await self.trainer.ask(request))
        except TrainerError:
            logger.info("round %d is not evaluated locally", round_)

    async def _train(self, effect: Train) -> None:
        if self.trainer is None:
            self.feed(TrainingEnded(effect.round, "failed", "there is no trainer"))
            return
        request = {
            "op": "round",
            "run": self.run_text,
            "round": effect.round,
            "view": _VIEW,
            "samples": effect.samples,
            "scale": effect.scale.numerator,
            "scale_of": effect.scale.denominator,
            "heads": [head.hex() for head in self.core.witnesses.heads],
        }
        run = self.run
        event: Event
        try:
            answer = await self.trainer.ask(request)
            if run is not self.run:
                return  # another run was accepted meanwhile; the release is kept by the ledger
            event = self._outcome(effect.round, answer)
        except (TrainerError, KeyError, TypeError, ValueError, PeerError, OSError) as error:
            event = TrainingEnded(effect.round, "failed", str(error).splitlines()[0])
        if run is not self.run:
            return
        self.clock.trained(effect.round, trio.current_time())
        self.feed(event)

    def _take_measure(self, answer: dict[str, Any]) -> None:
        """What the trainer lets all members know of its newest evaluation; the next beat tells."""
        if "measure" in answer:
            self.core.introduction.measure = Measure.from_json(answer["measure"])

    def _outcome(self, round_: int, answer: dict[str, Any]) -> Event:
        assert self.run is not None
        assert self.trainer is not None
        self._take_measure(answer)
        spent = public_spending(answer)
        if spent:
            if spent.get("releases") != self.spent.get("releases"):
                told = {k: spent.get(k) for k in ("spent_epsilon", "releases")}
                self.log.add("privacy.spent", {"round": round_, **told})
            self.spent = spent
            self.store.remember("spent", spent)
        return outcome_of(answer, self.run, round_, self.trainer.exchange)

    async def _fetch_checkpoint(self, effect: FetchCheckpoint) -> None:
        model = self.model
        assert model is not None
        place = model.checkpoints.place_for(effect.offer)
        fetched = await self.fetch(
            effect.peers, effect.offer.digest, place, max_bytes=effect.offer.size
        )
        if fetched:
            try:
                believe = model.adopt if isinstance(model, PairModel) else model.checkpoints.load
                await trio.to_thread.run_sync(believe, effect.offer.round)
            except FactRejected as error:
                logger.warning("%s", error.what)
                fetched = False
        self.feed(CheckpointFetched(effect.offer, ok=fetched))
        self._remember_adopted()

    async def fetch(
        self, peers: tuple[str, ...], digest: bytes, place: Path, *, max_bytes: int
    ) -> bool:
        """Fetch a file by its digest from the first peer that gives it.

        What came of it stays beside `place` and is gone on with; that of other files is removed.
        """
        drop_partials(place.parent, keep=place)
        for peer in peers:
            try:
                await self.network.fetch(peer, digest, place, max_bytes=max_bytes)
            except PeerError as error:
                logger.info("%s did not give %s: %s", peer, digest.hex()[:16], error.what)
            except OSError as error:
                logger.error("cannot write %s: %s", place, error)  # noqa: TRY400 - told in full
                return False
            else:
                return True
        return False

    def _remember_adopted(self) -> None:
        """Keep which checkpoint is believed until the archive is complete."""
        facts = self.core.facts
        if facts is None:
            return
        adopted = facts.adopted
        value = None if adopted is None else [adopted[0], adopted[1].hex(), facts.adopted_under]
        key = f"adopted.{facts.run.run_id.hex()}"
        if self.store.recall(key) != value:
            self.store.remember(key, value)


def _read_adopted(value: list[Any]) -> tuple[int, bytes, int]:
    round_, chain, under = value
    return round_, bytes.fromhex(chain), under


def _in_frames(facts: Iterable[bytes]) -> Iterator[tuple[bytes, ...]]:
    """Group facts so that each group fits a frame with room to spare for small messages."""
    batch: list[bytes] = []
    for data in facts:
        if batch and sum(map(len, batch)) + len(data) > _FACTS_BYTES // 8:
            yield tuple(batch)
            batch = []
        batch.append(data)
    if batch:
        yield tuple(batch)
