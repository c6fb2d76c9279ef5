"""A world of real cores in pairwise mode on an event heap: loss, doubles, disorder, crashes, churn.

Every frame travels on its own, so that later ones overtake earlier ones. What a node's model is
survives a crash, as a database would; the rest of the process does not. Seeded throughout.
"""

from __future__ import annotations

import datetime as dt
import heapq
import random
from collections.abc import Callable
from typing import Any

import numpy as np
from consortium import Consortium, key_of, peer_of

from p2pfed.gossip.core import Core
from p2pfed.gossip.events import (
    CheckpointFetched,
    CheckpointsChanged,
    Connected,
    Disconnect,
    Disconnected,
    FetchCheckpoint,
    Folded,
    Note,
    Received,
    Released,
    Send,
    SendWitness,
    Tick,
    Train,
)
from p2pfed.gossip.meeting_events import (
    CloseMeeting,
    Learn,
    Learnt,
    MakeStep,
    Meeting,
    Quote,
    Quoted,
    SendStep,
    StepMade,
    StepTaken,
    Survived,
    TakeStep,
    TakeStock,
)
from p2pfed.gossip.pairwise import (
    add_change,
    from_grid,
    make_step,
    move,
    quote,
    shares,
    to_grid,
)
from p2pfed.gossip.witness import witness_of
from p2pfed.identity.rules import Averaging, Encoding
from p2pfed.identity.signing import DELTA, fact_hash, sign
from p2pfed.wire.messages import CheckpointOffer, decode_message, encode_message
from p2pfed.wire.payload import Payload, decode_payload, encode_payload, least_exponent

START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
TICK = 0.25
SIZE = 40


class MemoryModel:
    """What `node.pairing.PairModel` does, without a disk; outlives the node's process."""

    def __init__(self, run: Any, seed: int) -> None:
        self.run = run
        self.genesis = from_grid(np.zeros(run.num_parameters, np.int32))
        self.x = self.genesis.copy()
        self.rng = np.random.default_rng(seed)
        self.given: dict[bytes, Meeting] = {}
        self.made: dict[bytes, tuple[Meeting, bytes]] = {}
        self.round, self.learnt, self.fresh = 0, -1, True
        self.half = 0

    def held(self) -> Survived:
        made = tuple(m for m, _ in self.made.values())
        return Survived(self.round, self.learnt, self.fresh, tuple(self.given.values()), made)

    def perform(self, effect: Any) -> Any:
        values = self.run.encoding.values
        match effect:
            case Quote(meeting):
                self.given[meeting.ticket] = meeting
                return Quoted(meeting.ticket, quote(self.x, self.genesis, values, self.rng.bytes))
            case MakeStep(m, quoted):
                a, b = shares(m.initiator, m.answerer)
                step = make_step(
                    self.x, self.genesis, quoted, (a, b), values=values, chance=self.rng.bytes
                )
                assert m.ticket not in self.made
                self.made[m.ticket] = m, step
                move(self.x, step, -a, values)
                return StepMade(m.ticket, step)
            case SendStep(ticket):
                return StepMade(ticket, self.made[ticket][1]) if ticket in self.made else None
            case TakeStep(m, step):
                if self.given.pop(m.ticket, None) is not None:
                    move(self.x, step, shares(m.initiator, m.answerer)[1], values)
                return StepTaken(m.ticket)
            case CloseMeeting(ticket):
                self.given.pop(ticket, None)
                self.made.pop(ticket, None)
            case Learn(round_, payload):
                if round_ > self.learnt:
                    self.learnt, self.fresh = round_, False
                    change = decode_payload(
                        payload,
                        num_parameters=self.run.num_parameters,
                        max_released=self.run.max_released,
                        width=values,
                    )
                    add_change(self.x, change.indices, change.values)
                return Learnt(round_)
            case TakeStock(round_):
                self.round = round_
                return Folded(round_, self.run.run_id, fact_hash(to_grid(self.x).tobytes()))
        return None


class PairNode:
    def __init__(self, i: int, run: Any) -> None:
        self.i, self.peer_id = i, peer_of(i)
        self.model = MemoryModel(run, i)
        self.core: Core | None = None
        self.incarnation = 0
        self.notes: list[Note] = []
        self.copies: dict[bytes, tuple[int, Any]] = {}
        self.view = to_grid(self.model.x)
        self.trained: list[int] = []


class PairWorld:
    """`n` hospitals with targets of their own; the sample-weighted mean of those is the optimum.

    Attributes:
        loses: (sender, receiver, message) -> whether it is lost; on top of `loss`.
    """

    def __init__(
        self,
        n: int = 4,
        *,
        samples: tuple[int, ...] = (),
        seed: int = 0,
        loss: float = 0.0,
        doubled: float = 0.0,
        values: str = "int16",
        exchanges: int = 4,
        pull: float = 0.3,
        **constants: Any,
    ) -> None:
        self.net = Consortium(n, samples=samples)
        defaults = {
            "num_parameters": SIZE,
            "rounds": 20,
            "min_live": 0.1,
            "deadline_s": 30.0,
            "averaging": Averaging(mode="pairwise", exchanges=exchanges),
            "encoding": Encoding(values=values),
        }
        self.run = self.net.run(**(defaults | constants))
        self.loss, self.doubled, self.pull = loss, doubled, pull
        self.loses: Callable[[str, str, Any], bool] = lambda _a, _b, _m: False
        self.now = 0.0
        self.rng = random.Random(seed)
        self.nodes: dict[str, PairNode] = {}
        self.weights = {m.peer_id: m.samples for m in self.net.roster.members}
        targets = np.random.default_rng(seed + 1)
        self.targets = {peer_of(i): targets.integers(-8000, 8000, SIZE) for i in range(n)}
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._up: set[frozenset[str]] = set()
        self.sent: list[Any] = []

    # --- what tests ask ------------------------------------------------------------------------

    def optimum(self, *hospitals: int) -> np.ndarray:
        """In grid units; of all hospitals if none is named."""
        peers = [peer_of(i) for i in hospitals] or list(self.targets)
        n = np.array([self.weights[p] for p in peers], float)
        return n @ np.array([self.targets[p] for p in peers]) / n.sum()

    def mean(self) -> np.ndarray:
        """The sample-weighted mean of the models of the nodes that are up, in grid units."""
        up = [node for node in self.nodes.values() if node.core is not None]
        n = np.array([self.weights[node.peer_id] for node in up], float)
        return n @ np.array([node.model.x for node in up]) / n.sum() / 2**24

    def bias(self, *hospitals: int) -> float:
        """Distance of the mean to the optimum; 1 is that of the unweighted optimum."""
        peers = [peer_of(i) for i in hospitals] or list(self.targets)
        plain = np.mean([self.targets[p] for p in peers], axis=0)
        right = self.optimum(*hospitals)
        return float(np.linalg.norm(self.mean() - right) / np.linalg.norm(plain - right))

    def weighted_sum(self) -> list[int]:
        """sum n x over all nodes, exact."""
        vectors = [n.model.x.astype(object) * self.weights[p] for p, n in self.nodes.items()]
        return list(sum(vectors[1:], vectors[0]))

    def spread(self) -> float:
        """Root mean square distance of the models to their mean, grid units."""
        models = np.array([n.model.x for n in self.nodes.values() if n.core is not None]) / 2**24
        return float(np.sqrt(((models - models.mean(axis=0)) ** 2).mean()))

    def notes(self, kind: str) -> list[Note]:
        return [n for node in self.nodes.values() for n in node.notes if n.type == kind]

    def open(self) -> int:
        return sum(len(n.model.given) + len(n.model.made) for n in self.nodes.values())

    # --- the world -----------------------------------------------------------------------------

    def add(self, *hospitals: int) -> list[PairNode]:
        nodes = [PairNode(i, self.run) for i in hospitals]
        for node in nodes:
            self.nodes[node.peer_id] = node
            self.start(node)
        return nodes

    def start(self, node: PairNode) -> None:
        node.incarnation += 1
        seed = key_of(node.i).seed
        node.core = Core(
            own_id=node.peer_id,
            sign=lambda data: sign(seed, DELTA, data),
            book=self.net.book(),
            rng=random.Random(f"{node.peer_id}/{node.incarnation}"),
        )
        node.core.start_run(self.run, paired=node.model.held())
        self._tick(node, node.incarnation)

    def crash(self, node: PairNode) -> None:
        node.core = None
        node.incarnation += 1
        for pair in [p for p in self._up if node.peer_id in p]:
            self._up.discard(pair)
            (other,) = pair - {node.peer_id}
            self.later(0.0, self.nodes[other], Disconnected(node.peer_id))

    def until(self, when: float) -> None:
        while self._heap and self._heap[0][0] <= when:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        self.now = when

    def until_round(self, round_: int, limit: float = 600.0) -> None:
        """Until every node that is up has reached a round."""

        def behind() -> bool:
            up = [n.core for n in self.nodes.values() if n.core is not None]
            return any(core.progress.round < round_ for core in up)

        while behind():
            assert self.now < limit, "no progress"
            self.until(self.now + 0.5)

    def give(self, node: PairNode, event: Any) -> None:
        if node.core is None:
            return
        for effect in node.core.handle(event, self.now):
            self._perform(node, effect)

    def later(self, delay: float, node: PairNode, event: Any) -> None:
        incarnation = node.incarnation

        def deliver() -> None:
            if node.incarnation == incarnation:
                self.give(node, event)

        self._push(delay, deliver)

    def _push(self, delay: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now + delay, self._count, action))

    def _tick(self, node: PairNode, incarnation: int) -> None:
        if node.incarnation != incarnation:
            return
        for other in self.nodes.values():
            pair = frozenset((node.peer_id, other.peer_id))
            if len(pair) == 2 and pair not in self._up and other.core and node.core:
                self._up.add(pair)
                self.later(0.01, node, Connected(other.peer_id))
                self.later(0.01, other, Connected(node.peer_id))
        self.give(node, Tick(START + dt.timedelta(seconds=self.now)))
        self._push(TICK, lambda: self._tick(node, incarnation))

    # --- effects -------------------------------------------------------------------------------

    def _perform(self, node: PairNode, effect: Any) -> None:
        match effect:
            case Send(peer, frame):
                self._deliver(node.peer_id, peer, frame)
            case SendWitness(peer):
                self._deliver(node.peer_id, peer, encode_message(witness_of(peer, [])))
            case Disconnect():
                self._up.discard(frozenset((node.peer_id, effect.peer)))
                self.later(0.0, node, Disconnected(effect.peer))
            case Note():
                node.notes.append(effect)
            case Train():
                self._train(node, effect)
            case FetchCheckpoint(offer, (peer,)):
                self._fetch(node, offer, peer)
            case Quote() | MakeStep() | SendStep() | TakeStep() | CloseMeeting() | Learn():
                self._work(node, effect)
            case TakeStock():
                self._work(node, effect)
                node.view = to_grid(node.model.x)
                digest = fact_hash(node.view.tobytes() + bytes([effect.round % 256]))
                node.copies[digest] = effect.round, node.view
                offer = CheckpointOffer(effect.round, self.run.run_id, digest, 4 * SIZE)
                self.later(0.01, node, CheckpointsChanged((offer,)))

    def _work(self, node: PairNode, effect: Any) -> None:
        event = node.model.perform(effect)
        if event is not None:
            self.later(self.rng.uniform(0.001, 0.01), node, event)

    def _deliver(self, source: str, target: str, frame: bytes) -> None:
        if frozenset((source, target)) not in self._up:
            return
        message = decode_message(frame)
        self.sent.append(message)
        for _ in range(1 + (self.rng.random() < self.doubled)):
            if self.rng.random() < self.loss or self.loses(source, target, message):
                continue
            delay = self.rng.uniform(0.005, 0.05)
            self.later(delay, self.nodes[target], Received(source, frame))

    def _train(self, node: PairNode, effect: Train) -> None:
        node.trained.append(effect.round)
        change = np.rint(self.pull * (self.targets[node.peer_id] - node.view))
        width = self.run.encoding.values
        if width == "int8":  # as the trainer does it: eight bits and one exponent
            step = 2.0 ** least_exponent(float(np.abs(change).max()))
            change = step * np.rint(change / step)
        payload = Payload.dense(change.astype(np.int16))
        data = encode_payload(payload, num_parameters=SIZE, width=width)
        released = Released(
            round=effect.round,
            payload=data,
            num_released=SIZE,
            mechanism="none",
            spent_nano_rho=0,
            releases=len(node.trained),
            ledger_head=bytes(32),
        )
        self.later(self.rng.uniform(0.05, 0.3), node, released)

    def _fetch(self, node: PairNode, offer: CheckpointOffer, peer: str) -> None:
        found = self.nodes[peer].copies.get(offer.digest)
        if found is not None:
            node.model.x = from_grid(found[1])
            node.model.round, node.model.fresh = offer.round, False
        self.later(0.05, node, CheckpointFetched(offer, ok=found is not None))
