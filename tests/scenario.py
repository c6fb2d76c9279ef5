"""One simulated federation under chosen misfortunes; prints a digest of its trace when run.

python scenario.py SEED   (used to compare runs under different hash seeds)
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from consortium import Consortium, key_of, peer_of

from p2pfed.gossip.events import Fold, JoinNetwork, LeaveNetwork, RosterOffered
from p2pfed.gossip.fold import model_hash
from p2pfed.gossip.progress import Phase
from p2pfed.gossip.replay import MemoryCheckpoints, Replay
from p2pfed.identity.run import Outer
from p2pfed.simulate.heap import EventHeap, Links, SimulatedNode
from p2pfed.wire.delta import Delta
from p2pfed.wire.payload import Payload, decode_payload

SIZE = 30


def train(peer_id: str, round_: int, _model: Any) -> Payload:
    """A payload that depends on who and when, so that every mistake changes the model."""
    rng = random.Random(f"{peer_id}/{round_}")
    kept = sorted(rng.sample(range(SIZE), 12))
    values = [rng.randint(-1000, 1000) for _ in kept]
    return Payload(np.array(kept), np.array(values, np.int16))


def facts_of(node: SimulatedNode) -> bytes:
    """All that the node believes about the run, as one hash."""
    assert node.core is not None
    assert node.core.facts is not None
    return node.core.facts.chain(node.core.facts.run.rounds)


class World:
    """A heap of n hospitals on one run; `up` are those that were started."""

    def __init__(self, n: int = 5, *, seed: int = 0, loss: float = 0.0, **constants: Any) -> None:
        self.net = Consortium(n)
        defaults = {
            "num_parameters": SIZE,
            "rounds": 10,
            "outer": Outer("fedadam", 0.03),
            "robust": "clip-median",
            "quorum": 0.8,
            "deadline_s": 4.0,
            "min_live": 0.4,
        }
        self.run = self.net.run(**(defaults | constants))
        self.links = Links(loss=loss)
        self.heap = EventHeap(
            self.run, np.zeros(SIZE, np.float32), train=train, seed=seed, links=self.links
        )
        self.models: dict[bytes, bytes] = {}  # chain -> hash of the model, over all nodes
        self.trace = hashlib.blake2b(digest_size=16)
        self.heap.watch = lambda node, _event, _effects: self._record(node)

    def _record(self, node: SimulatedNode) -> None:
        core = node.core
        state = (self.heap.now, node.peer_id, node.bytes_received, node.hash, len(node.deltas))
        progress = core.progress if core is not None else None
        if progress is not None and progress.folded is not None and progress.folded.chain:
            folded = progress.folded
            known = self.models.setdefault(folded.chain, folded.model_hash)
            assert known == folded.model_hash, "equal facts gave unequal models"
        where = (progress.round, progress.phase.value) if progress is not None else ()
        self.trace.update(repr((state, where)).encode())

    def add(self, *hospitals: int) -> list[SimulatedNode]:
        made = [
            SimulatedNode(key_of(i).seed, key_of(i).public_key, self.net.signed[:2])
            for i in hospitals
        ]
        return [self.heap.add(node) for node in made]

    def node(self, i: int) -> SimulatedNode:
        return self.heap.nodes[peer_of(i)]

    @property
    def nodes(self) -> list[SimulatedNode]:
        return [n for n in self.heap.nodes.values() if n.core is not None]

    def cut(self, *island: int) -> None:
        """Separate these hospitals from the others; without any, heal."""
        inside = {peer_of(i) for i in island}
        self.links.cut = lambda a, b: (a in inside) != (b in inside)

    def hand_roster(self, signed: bytes, i: int) -> None:
        """The operator of hospital i gives its node a roster."""
        self.heap.give(self.node(i), RosterOffered(signed))

    def fold_of(self, deltas: Iterable[Delta]) -> bytes:
        """Hash of the model that these deltas make from the genesis on, folded in one go."""
        facts, payloads = self.net.facts(self.run, deltas), {d.fact: d.payload for d in deltas}
        bounds = {"num_parameters": SIZE, "max_released": self.run.max_released}
        replay = Replay(
            self.run,
            lambda: np.zeros(SIZE, np.float32),
            MemoryCheckpoints(),
            lambda fact: decode_payload(payloads[fact], **bounds),
        )
        rounds = self.run.rounds
        chains = tuple(facts.chain(r) for r in range(rounds + 1))
        plan = tuple(facts.counted(r) for r in range(rounds))
        return model_hash(replay.fold(Fold(rounds, chains, plan)))

    def run_until(self, when: float) -> None:
        self.heap.run_until(when)

    def run_to_the_end(self, limit: float = 400.0) -> None:
        """Until all are finished and hold the same facts, at most `limit` seconds."""
        while self.heap.now < limit and not self.is_settled():
            self.run_until(self.heap.now + 5)
        self.run_until(self.heap.now + 5)  # the last folds

    def is_settled(self) -> bool:
        finished = all(
            n.core.progress is not None and n.core.progress.phase is Phase.FINISHED
            for n in self.nodes
        )
        whole = all(n.core.facts.adopted is None for n in self.nodes)
        return finished and whole and len({facts_of(n) for n in self.nodes}) == 1


def misfortune(seed: int, during: Callable[[World], None] | None = None) -> World:
    """Loss, a crash and a restart, a late joiner, a partition that heals, and one who leaves."""
    rng = random.Random(seed)
    world = World(6, seed=seed, loss=rng.choice([0.0, 0.05, 0.2]))
    world.add(*range(5))
    moments = sorted(rng.uniform(2, 14) for _ in range(6))
    crashing, leaving = rng.sample(range(5), 2)
    island = rng.sample(range(6), rng.randint(1, 3))
    for moment, what in zip(moments, rng.sample(range(6), 6), strict=True):
        world.run_until(moment)
        match what:
            case 0 if world.node(crashing).core is not None:
                world.heap.crash(world.node(crashing))
            case 1:
                world.add(5)
            case 2:
                world.cut(*island)
            case 3:
                world.heap.give(world.node(leaving), LeaveNetwork())
            case _:
                pass
        if during is not None:
            during(world)
    world.run_until(18)
    if world.node(crashing).core is None:
        world.heap.start(world.node(crashing))
    world.run_until(20)
    world.cut()
    world.run_until(22)
    world.heap.give(world.node(leaving), JoinNetwork())
    world.run_to_the_end()
    return world


if __name__ == "__main__":
    finished = misfortune(int(sys.argv[1]))
    print(finished.trace.hexdigest(), finished.nodes[0].hash.hex())
