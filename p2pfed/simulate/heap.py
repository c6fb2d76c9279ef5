"""An event heap that runs many cores at once under latency, loss, cuts, crashes and churn.

Each simulated node is the real `gossip.Core` with a real fold over a small model; only the network,
the clock and the trainer are simulated. Time jumps from event to event. Chance comes from one
seeded generator, so a seed repeats a run bit for bit; what a crash loses is what a real crash loses
(everything but the stored facts).

Frames travel as bytes through the real codec. Bulk transfers (checkpoints) arrive after one
latency.
"""

from __future__ import annotations

import datetime as dt
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

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
    Note,
    Received,
    Released,
    RosterOffered,
    Send,
    SendStored,
    StoreDelta,
    StoreProof,
    Tick,
    Train,
)
from p2pfed.gossip.fold import ModelState, model_hash
from p2pfed.gossip.replay import MemoryCheckpoints, Replay
from p2pfed.identity.book import RosterBook
from p2pfed.identity.keys import peer_id_of
from p2pfed.identity.run import Run
from p2pfed.identity.signing import DELTA, fact_hash, sign
from p2pfed.wire.delta import Delta, Proof
from p2pfed.wire.messages import CheckpointOffer, Facts, encode_message
from p2pfed.wire.payload import Payload, decode_payload, encode_payload

__all__ = ["EventHeap", "Links", "SimulatedNode"]

START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
TICK = 0.25
HANDSHAKES = 3  # latencies until a connection is up

TrainFunction = Callable[[str, int, NDArray[np.int32]], Payload]


@dataclass(slots=True)
class Links:
    """The network: latency in seconds, loss as a probability, who is cut off from whom."""

    low_latency: float = 0.005
    high_latency: float = 0.05
    loss: float = 0.0
    cut: Callable[[str, str], bool] = field(default=lambda _a, _b: False)


class SimulatedNode:
    """One hospital: a core, its stored facts, and whether it is up."""

    def __init__(self, seed: bytes, public_key: bytes, rosters: list[bytes]) -> None:
        self.seed = seed
        self.peer_id = peer_id_of(public_key)
        self.rosters = rosters
        self.deltas: dict[bytes, Delta] = {}  # survives a crash, like the files below it
        self.proofs: list[bytes] = []
        self.checkpoints = MemoryCheckpoints()
        self.offered: dict[bytes, tuple[ModelState, bytes]] = {}
        self.core: Core | None = None
        self.replay: Replay | None = None
        self.model: NDArray[np.int32] = np.zeros(0, np.int32)
        self.incarnation = 0
        self.notes: list[Note] = []
        self.bytes_received = 0
        self.trained_rounds: list[int] = []
        self.ledger_head = bytes(32)

    @property
    def hash(self) -> bytes:
        """Hash of the newest folded model."""
        progress = self.core.progress if self.core is not None else None
        return progress.folded.model_hash if progress is not None and progress.folded else b""


class EventHeap:
    """The world: nodes, links, and what happens next.

    Args:
        run: The run that all nodes take part in.
        genesis: Its first model, shape (P,).
        train: What a node releases: (peer id, round, model) -> payload.
        seed: Repeats the whole run.
        links: The network.
        train_seconds: How long a training takes, by peer id.
    """

    def __init__(
        self,
        run: Run,
        genesis: NDArray[np.float32],
        *,
        train: TrainFunction,
        seed: int = 0,
        links: Links | None = None,
        train_seconds: Callable[[str], float] = lambda _peer: 0.2,
    ) -> None:
        self.run = run
        self.genesis = genesis
        self.links = links or Links()
        self.now = 0.0
        self.nodes: dict[str, SimulatedNode] = {}
        self.after_event: Callable[[SimulatedNode], None] = lambda _node: None
        self._train = train
        self._train_seconds = train_seconds
        self._rng = random.Random(seed)  # noqa: S311 - a simulation, not a secret
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._up: set[frozenset[str]] = set()
        self._last_arrival: dict[tuple[str, str], float] = {}

    # --- the world -----------------------------------------------------------------------------

    def add(self, node: SimulatedNode) -> SimulatedNode:
        """Bring a node up now; it knows all addresses."""
        self.nodes[node.peer_id] = node
        self.start(node)
        return node

    def start(self, node: SimulatedNode) -> None:
        """Start a node from what it has stored."""
        node.incarnation += 1
        book = RosterBook()
        for signed in node.rosters:
            book.add(signed)
        core = Core(
            own_id=node.peer_id,
            sign=lambda data: sign(node.seed, DELTA, data),
            book=book,
            rng=random.Random(f"{node.peer_id}/{node.incarnation}"),  # noqa: S311
        )
        node.core = core
        node.replay = Replay(
            self.run, lambda: self.genesis, node.checkpoints, lambda fact: self._payload(node, fact)
        )
        core.start_run(
            self.run,
            held=[d.signed for d in node.deltas.values()],
            proofs=[Proof.decode(p) for p in node.proofs],
            round_=max(node.checkpoints.chains(), default=0),
        )
        self._tick(node, node.incarnation)

    def crash(self, node: SimulatedNode) -> None:
        """The process is gone; what was stored stays."""
        node.core = None
        node.incarnation += 1
        for pair in self._pairs_of(node):
            self._hang_up(pair)

    def run_until(self, when: float) -> None:
        """Let the world run."""
        while self._heap and self._heap[0][0] <= when:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        self.now = when

    def give(self, node: SimulatedNode, event: Event) -> None:
        """Hand an event to a node now."""
        if node.core is None:
            return
        for effect in node.core.handle(event, self.now):
            self._perform(node, effect)
        self.after_event(node)

    def _later(self, delay: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now + delay, self._count, action))

    def _give_later(self, delay: float, node: SimulatedNode, event: Event) -> None:
        incarnation = node.incarnation

        def deliver() -> None:
            if node.incarnation == incarnation:
                self.give(node, event)

        self._later(delay, deliver)

    def _latency(self) -> float:
        return self._rng.uniform(self.links.low_latency, self.links.high_latency)

    def _tick(self, node: SimulatedNode, incarnation: int) -> None:
        if node.incarnation != incarnation:
            return
        self._connect(node)
        self.give(node, Tick(START + dt.timedelta(seconds=self.now)))
        self._later(TICK, lambda: self._tick(node, incarnation))

    # --- connections ---------------------------------------------------------------------------

    def _connect(self, node: SimulatedNode) -> None:
        for pair in self._pairs_of(node):
            if self.links.cut(*sorted(pair)):
                self._hang_up(pair)
        for other in self.nodes.values():
            pair = frozenset((node.peer_id, other.peer_id))
            if len(pair) == 2 and pair not in self._up and self._can_connect(node, other):
                self._up.add(pair)
                delay = HANDSHAKES * self._latency()
                self._give_later(delay, node, Connected(other.peer_id))
                self._give_later(delay, other, Connected(node.peer_id))
                self._offer_roster(node, other, delay)
                self._offer_roster(other, node, delay)

    def _can_connect(self, node: SimulatedNode, other: SimulatedNode) -> bool:
        if node.core is None or other.core is None or self.links.cut(node.peer_id, other.peer_id):
            return False
        return all(
            n.core is not None
            and n.core.book.current is not None
            and n.core.book.current.member(m.peer_id) is not None
            for n, m in ((node, other), (other, node))
        )

    def _offer_roster(self, node: SimulatedNode, other: SimulatedNode, delay: float) -> None:
        assert node.core is not None
        current = node.core.book.current
        signed = node.core.book.signed(current.hash) if current is not None else None
        if signed is not None:
            self._give_later(delay, other, RosterOffered(signed))

    def _pairs_of(self, node: SimulatedNode) -> list[frozenset[str]]:
        """Its connections, in an order that does not depend on how strings are hashed."""
        return sorted((p for p in self._up if node.peer_id in p), key=sorted)

    def _hang_up(self, pair: frozenset[str]) -> None:
        self._up.discard(pair)
        a, b = sorted(pair)
        self._give_later(0.0, self.nodes[a], Disconnected(b))
        self._give_later(0.0, self.nodes[b], Disconnected(a))

    # --- effects -------------------------------------------------------------------------------

    def _perform(self, node: SimulatedNode, effect: Effect) -> None:  # noqa: C901 - a flat table
        match effect:
            case Send():
                self._deliver(node, effect.peer, effect.frame)
            case SendStored():
                deltas = tuple(node.deltas[f].encode() for f in effect.deltas)
                frame = encode_message(Facts(deltas, effect.rosters, effect.proofs))
                self._deliver(node, effect.peer, frame)
            case StoreDelta():
                node.deltas[effect.delta.fact] = effect.delta
            case StoreProof():
                node.proofs.append(effect.proof)
            case Disconnect():
                pair = frozenset((node.peer_id, effect.peer))
                if pair in self._up:
                    self._hang_up(pair)
            case Fold():
                self._fold(node, effect)
            case Train():
                self._train_later(node, effect)
            case FetchCheckpoint():
                self._fetch(node, effect)
            case Note():
                node.notes.append(effect)
            case _:
                pass  # addresses are known to all here, and rosters are kept by the book

    def _deliver(self, node: SimulatedNode, peer: str, frame: bytes) -> None:
        other = self.nodes[peer]
        if frozenset((node.peer_id, peer)) not in self._up:
            return
        if self.links.cut(node.peer_id, peer) or self._rng.random() < self.links.loss:
            return
        other.bytes_received += len(frame)
        way = (node.peer_id, peer)
        earliest = self._last_arrival.get(way, 0.0) + 1e-6  # a connection keeps its order
        arrival = max(earliest, self.now + self._latency())
        self._last_arrival[way] = arrival
        self._give_later(arrival - self.now, other, Received(node.peer_id, frame))

    def _payload(self, node: SimulatedNode, fact: bytes) -> Payload:
        data = node.deltas[fact].payload
        return decode_payload(
            data, num_parameters=self.run.num_parameters, max_released=self.run.max_released
        )

    def _fold(self, node: SimulatedNode, effect: Fold) -> None:
        assert node.replay is not None
        state = node.replay.fold(effect)
        node.model = state.model.copy()
        folded = Folded(effect.round, node.replay.chain, model_hash(state))
        self._give_later(0.01, node, folded)
        offers = []
        for round_, (held, chain) in node.checkpoints.held.items():
            digest = fact_hash(chain + model_hash(held))
            node.offered[digest] = (held, chain)
            offers.append(CheckpointOffer(round_, chain, digest, 1 + held.model.nbytes))
        self._give_later(0.01, node, CheckpointsChanged(tuple(offers)))

    def _train_later(self, node: SimulatedNode, effect: Train) -> None:
        payload = self._train(node.peer_id, effect.round, node.model)
        node.trained_rounds.append(effect.round)
        released = Released(
            round=effect.round,
            payload=encode_payload(payload),
            num_released=payload.indices.size,
            mechanism=self.run.mechanism,
            spent_nano_rho=len(node.trained_rounds),
            releases=len(node.trained_rounds),
            ledger_head=node.ledger_head,
        )
        self._give_later(self._train_seconds(node.peer_id), node, released)

    def _fetch(self, node: SimulatedNode, effect: FetchCheckpoint) -> None:
        found = next(
            (
                self.nodes[p].offered[effect.offer.digest]
                for p in effect.peers
                if effect.offer.digest in self.nodes[p].offered
            ),
            None,
        )
        if found is not None:
            node.checkpoints.save(*found)
        arrived = CheckpointFetched(effect.offer, ok=found is not None)
        self._give_later(2 * self._latency(), node, arrived)
