"""An event heap that runs many cores at once under latency, loss, cuts, crashes and churn.

Each simulated node is the real `gossip.Core` with a real fold over a small model; only the network,
the clocks, the disks and the trainer are simulated. Time jumps from event to event. Chance comes
from one seeded generator, so a seed repeats a run bit for bit: `trace` is a hash over every event
that any core was given.

Frames travel as bytes through the real codec. Signatures are real; what each of N nodes would
decode and verify for itself, the very same bytes, is decoded and verified once (`Shared`). Bulk
transfers (checkpoints) arrive after one latency.
"""

from __future__ import annotations

import hashlib
import heapq
import random
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfed.gossip.core import Core
from p2pfed.gossip.events import (
    CheckpointFetched,
    CheckpointsChanged,
    Disconnect,
    Effect,
    Event,
    FetchCheckpoint,
    Fold,
    Folded,
    FoldFellShort,
    Keep,
    Note,
    Received,
    Released,
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
)
from p2pfed.gossip.witness import witness_of
from p2pfed.identity.book import RosterBook
from p2pfed.identity.roster import Roster
from p2pfed.identity.run import Run
from p2pfed.identity.signing import DELTA, fact_hash, sign
from p2pfed.simulate.folds import Folds
from p2pfed.simulate.node import SimulatedNode
from p2pfed.simulate.wires import Links, Timers, Wires
from p2pfed.wire.delta import Delta, Proof
from p2pfed.wire.messages import CheckpointOffer, Facts, encode_message
from p2pfed.wire.payload import Payload

__all__ = ["EventHeap", "Links", "SimulatedNode", "Timers"]

DISK_SECONDS = 0.01  # a fold, a debit, an output

TrainFunction = Callable[[str, int, NDArray[np.int32]], Payload]
_EVENT = struct.Struct("<dI")


class EventHeap:
    """The world: nodes, links, and what happens next.

    Args:
        run: The run that all nodes take part in.
        genesis: Its first model, shape (P,).
        train: What a node releases: (peer id, round, model) -> payload.
        seed: Repeats the whole run.
        links: The network.
        timers: The nodes' clocks.
        train_seconds: How long a training takes, by peer id.
        contacts: Peers that everybody dials from the start; the others are found by what members
            tell of each other. None: all addresses are known to all.
        full_fold_every: One in how many folds is done in full, see `Folds`.
        traced: Whether to hash every event.
    """

    def __init__(
        self,
        run: Run,
        genesis: NDArray[np.float32],
        *,
        train: TrainFunction,
        seed: int = 0,
        links: Links | None = None,
        timers: Timers | None = None,
        train_seconds: Callable[[str], float] = lambda _peer: 0.2,
        contacts: tuple[str, ...] | None = None,
        full_fold_every: int = 1,
        traced: bool = False,
    ) -> None:
        self.run = run
        self.genesis = genesis
        self.links = links or Links()
        self.now = 0.0
        self.events = 0
        self.nodes: dict[str, SimulatedNode] = {}
        self.folds = Folds(run, genesis, full_every=full_fold_every)
        self.watch: Callable[[SimulatedNode, Event, list[Effect]], None] = lambda _n, _e, _f: None
        self.wrap: Callable[[SimulatedNode, Core], Core] = lambda _node, core: core
        self.rng = random.Random(seed)  # noqa: S311 - a simulation, not a secret
        self._seed = seed
        self._train = train
        self._train_seconds = train_seconds
        self._timers = timers or Timers()
        self.contacts = contacts
        self._trace = hashlib.blake2b(digest_size=16) if traced else None
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self.wires = Wires(self)
        self._read_delta = lru_cache(maxsize=1 << 14)(Delta.decode)
        self._read_roster: Callable[[bytes], Roster] = lru_cache(maxsize=64)(Roster.decode)

    # --- the world -----------------------------------------------------------------------------

    @property
    def trace(self) -> str:
        """Hash over every event so far, hex; empty if not traced."""
        return self._trace.hexdigest() if self._trace is not None else ""

    def add(self, node: SimulatedNode, delay: float = 0.0) -> SimulatedNode:
        """Bring a node up, its first tick after `delay`."""
        node.index, node.born_at = len(self.nodes), self.now
        self.nodes[node.peer_id] = node
        self.start(node, delay)
        return node

    def start(self, node: SimulatedNode, delay: float = 0.0) -> None:
        """Start a node from what it has stored."""
        node.incarnation += 1
        node.started_at = self.now
        node.dies_within = None
        node.frozen_until, node.unseen = 0.0, []
        book = RosterBook(read=self._read_roster)
        for signed in node.disk.rosters:
            book.restore(signed)
        chance = f"{self._seed}/{node.peer_id}/{node.incarnation}"
        core = Core(
            own_id=node.peer_id,
            sign=lambda data: sign(node.seed, DELTA, data),
            book=book,
            rng=random.Random(chance),  # noqa: S311
            addresses=(f"/sim/{node.index}",),
            liveness=self._timers.liveness,
            read_delta=self._read_delta,
            recall=lambda fact: node.disk.deltas[fact].signed,
        )
        node.core = self.wrap(node, core)
        node.wanted |= dict.fromkeys(p for p in self.contacts or () if p != node.peer_id)
        node.offered.clear()
        self.folds.start(node)
        core.start_run(
            self.run,
            held=[d.signed for d in node.disk.deltas.values()],
            proofs=[Proof.decode(p) for p in node.disk.proofs],
            adopted=node.disk.adopted,
            round_=max(node.disk.checkpoints.chains(), default=0),
        )
        self.later(delay, self._tick, node, node.incarnation)
        self.later(delay, self._sync, node, node.incarnation)

    def freeze(self, node: SimulatedNode, seconds: float) -> None:
        """Stop a node's process; what reaches its machine meanwhile waits."""
        node.frozen_until = max(node.frozen_until, self.now + seconds)
        self.later(seconds, self._thaw, node, node.incarnation)

    def _thaw(self, node: SimulatedNode, incarnation: int) -> None:
        if node.incarnation == incarnation and self.now >= node.frozen_until:
            self.thaw(node)

    def thaw(self, node: SimulatedNode) -> None:
        """It goes on: with all that waits, or with what its clock says first, as chance has it."""
        node.frozen_until = self.now
        if self.rng.random() < 0.5:
            self.give(node, Tick(node.clock.wall(self.now)))
        unseen, node.unseen = node.unseen, []
        incarnation = node.incarnation
        for event in unseen:
            self._deliver_event(node, incarnation, event)

    def crash(self, node: SimulatedNode, *, lose: bool = False) -> None:
        """The process is gone; what was stored stays, but for what was not synced if `lose`."""
        node.core = None
        node.incarnation += 1
        if lose:
            node.disk.lose(self.rng)
        node.disk.unsynced.clear()
        for peer in list(node.up):
            self.wires.hang_up(node, self.nodes[peer])

    def run_until(self, when: float) -> None:
        """Let the world run."""
        heap = self._heap
        while heap and heap[0][0] <= when:
            self.now, _, action, arguments = heapq.heappop(heap)
            action(*arguments)
        self.now = when

    def later(self, delay: float, action: Callable[..., None], *arguments: Any) -> None:
        """Do something after a while."""
        self._count += 1
        heapq.heappush(self._heap, (self.now + delay, self._count, action, arguments))

    def give(self, node: SimulatedNode, event: Event) -> None:
        """Hand an event to a node now."""
        if node.core is None:
            return
        if self.now < node.frozen_until:
            node.unseen.append(event)
            return
        self.events += 1
        if self._trace is not None:
            self._write_trace(node, event)
        effects = node.core.handle(event, node.clock.read(self.now))
        dies = node.dies_within is not None and bool(effects)
        if dies:
            effects = effects[: node.dies_within]
        for effect in effects:
            self._perform(node, effect)
        self.watch(node, event, effects)
        if dies:
            self.crash(node, lose=True)

    def _write_trace(self, node: SimulatedNode, event: Event) -> None:
        trace = self._trace
        assert trace is not None
        trace.update(_EVENT.pack(self.now, node.index))
        if isinstance(event, Received):
            trace.update(event.frame)
        else:
            trace.update(type(event).__name__.encode())

    def give_later(self, delay: float, node: SimulatedNode, event: Event) -> None:
        """Hand an event to a node after a while, unless its process is another one by then."""
        self.later(delay, self._deliver_event, node, node.incarnation, event)

    def _deliver_event(self, node: SimulatedNode, incarnation: int, event: Event) -> None:
        if node.incarnation == incarnation:
            self.give(node, event)

    def _tick(self, node: SimulatedNode, incarnation: int) -> None:
        if node.incarnation != incarnation:
            return
        if self.now >= node.frozen_until:
            self.wires.connect(node)
            self.give(node, Tick(node.clock.wall(self.now)))
        self.later(self._timers.tick_s / node.clock.rate, self._tick, node, incarnation)

    def _sync(self, node: SimulatedNode, incarnation: int) -> None:
        if node.incarnation == incarnation:
            node.disk.unsynced.clear()
            self.later(self._timers.sync_s, self._sync, node, incarnation)

    # --- effects -------------------------------------------------------------------------------

    def _perform(self, node: SimulatedNode, effect: Effect) -> None:  # noqa: C901, PLR0912 - a flat table
        match effect:
            case Send():
                self.wires.send(node, effect.peer, effect.frame)
            case SendStored():
                deltas = tuple(node.disk.deltas[f].encode() for f in effect.deltas)
                frame = encode_message(Facts(deltas, effect.rosters, effect.proofs))
                sent = self.wires.send(node, effect.peer, frame)
                self.nodes[effect.peer].fact_bytes_received += sent
            case SendWitness():
                shown = witness_of(effect.peer, (d.signed for d in node.disk.deltas.values()))
                self.wires.send(node, effect.peer, encode_message(shown))
            case Keep(has_left=False):
                node.wanted[effect.peer] = None
            case Keep():  # who comes back dials the others itself here
                node.wanted.pop(effect.peer, None)
            case StopDialling():
                node.wanted.pop(effect.peer, None)
            case StoreDelta():
                node.disk.keep(effect.delta, durable=effect.own)
            case StoreProof():
                node.disk.keep_proof(effect.proof)
            case StoreRoster():
                node.disk.rosters.append(effect.signed)
            case Disconnect():
                if effect.peer in node.up:
                    self.wires.hang_up(node, self.nodes[effect.peer])
            case Fold():
                self._fold(node, effect)
            case Train():
                self._train_later(node, effect)
            case FetchCheckpoint():
                self._fetch(node, effect)
            case Note():
                node.notes.append(effect)
            case _:
                pass

    def _fold(self, node: SimulatedNode, effect: Fold) -> None:
        found = self.folds.fold(node, effect)
        if found is None:
            self.give_later(DISK_SECONDS, node, FoldFellShort())
            return
        state, chain = found
        node.model = state.model.copy()
        folded = Folded(effect.round, chain, self.folds.hash_of(chain, state))
        self.give_later(DISK_SECONDS, node, folded)
        offers = []
        for round_, (held, stands_for) in node.disk.checkpoints.held.items():
            digest = fact_hash(stands_for + self.folds.hash_of(stands_for, held))
            node.offered[digest] = (held, stands_for)
            offers.append(CheckpointOffer(round_, stands_for, digest, 1 + held.model.nbytes))
        held_now = {offer.digest for offer in offers}
        node.offered = {d: kept for d, kept in node.offered.items() if d in held_now}
        self.give_later(DISK_SECONDS, node, CheckpointsChanged(tuple(offers)))
        facts = node.core.facts if node.core is not None else None
        if facts is not None:
            adopted = facts.adopted
            node.disk.adopted = adopted and (*adopted, facts.adopted_under)

    # --- training: debit, draw, output, release --------------------------------------------------

    def _train_later(self, node: SimulatedNode, effect: Train) -> None:
        seconds = self._train_seconds(node.peer_id) * node.slowness
        heads = node.core.witnesses.heads if node.core is not None else ()
        if not set(heads) <= node.disk.ledger.known:
            refused = TrainingEnded(effect.round, "rolled-back", "the ledger is an older copy")
            self.give_later(seconds, node, refused)
            return
        kept = effect.round in node.disk.ledger.outputs
        step = self._release if kept else self._debit
        self.later(seconds, step, node, node.incarnation, effect, node.model)

    def _debit(
        self, node: SimulatedNode, incarnation: int, effect: Train, model: NDArray[np.int32]
    ) -> None:
        if node.incarnation == incarnation:
            node.disk.ledger.debit(effect.round)
            node.trained_rounds.append(effect.round)
            self.later(DISK_SECONDS, self._draw, node, incarnation, effect, model)

    def _draw(
        self, node: SimulatedNode, incarnation: int, effect: Train, model: NDArray[np.int32]
    ) -> None:
        if node.incarnation == incarnation:
            payload = self.folds.encode(self._train(node.peer_id, effect.round, model))
            node.disk.ledger.keep(effect.round, payload)
            self.later(DISK_SECONDS, self._release, node, incarnation, effect, model)

    def _release(
        self, node: SimulatedNode, incarnation: int, effect: Train, _model: NDArray[np.int32]
    ) -> None:
        payload, debits, head = node.disk.ledger.outputs[effect.round]
        released = Released(
            round=effect.round,
            payload=payload,
            num_released=self.folds.decode(payload).values.size,
            mechanism=self.run.mechanism,
            spent_nano_rho=debits,
            releases=debits,
            ledger_head=head,
        )
        self._deliver_event(node, incarnation, released)

    def _fetch(self, node: SimulatedNode, effect: FetchCheckpoint) -> None:
        digest = effect.offer.digest
        holders = (self.nodes[p] for p in effect.peers if p in self.nodes)
        found = next((n.offered[digest] for n in holders if digest in n.offered), None)
        if found is not None:
            node.disk.checkpoints.save(*found)
        delay = 2 * self.wires.latency(node, node)
        self.give_later(delay, node, CheckpointFetched(effect.offer, ok=found is not None))
