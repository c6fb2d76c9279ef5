"""What happens to the world: the scenario's events, and misfortunes drawn by the seed.

Cuts are kept as islands (a partition: members of different islands do not hear each other) and as
one-way cuts; crashes restart by themselves where a time is given. Invariant: everything is drawn
from one generator in the order of time, so a seed repeats it; after `heal_everything` nothing of it
is left.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import cast

from p2pfed.gossip.core import Core
from p2pfed.gossip.events import JoinNetwork, LeaveNetwork, RosterOffered, SetSharing
from p2pfed.simulate.cast import Cast
from p2pfed.simulate.happenings import Happening
from p2pfed.simulate.heap import EventHeap
from p2pfed.simulate.liars import Liar
from p2pfed.simulate.node import Disk, SimulatedNode
from p2pfed.simulate.scenario import Scenario

__all__ = ["Timeline"]


class Timeline:
    """See the module docstring.

    Args:
        heap: The world.
        cast: The consortium.
        scenario: What happens when.
        seed: Draws the misfortunes.

    Attributes:
        nodes: The nodes that were ever started, by member.
        disturbed_at: When something last happened to connections or processes.
        left: Peers that said goodbye.
    """

    def __init__(self, heap: EventHeap, cast: Cast, scenario: Scenario, seed: int) -> None:
        self.nodes: dict[int, SimulatedNode] = {}
        self.disturbed_at = 0.0
        self.left: set[str] = set()
        self._heap = heap
        self._cast = cast
        self._scenario = scenario
        self._chance = random.Random(f"{seed}/timeline")  # noqa: S311 - a simulation
        self._islands: dict[str, int] = {}
        self._next_island = 0
        self._one_way: dict[tuple[str, str], None] = {}
        self._backups: dict[int, Disk] = {}
        self._over = False
        heap.wrap = self._wrapped

    def schedule(self) -> None:
        """Start the members that start at once, and plan everything else."""
        scenario, heap = self._scenario, self._heap
        later = {*scenario.late, *scenario.unlisted}
        for member in range(scenario.members):
            if member not in later:
                self._start(member, self._chance.uniform(0, scenario.tick_s))
        for event in scenario.events:
            heap.later(event.at_s, self._happens, event)
        churn = scenario.churn
        for every, what in (
            (churn.crash_every_s, self._churn_crash),
            (churn.partition_every_s, self._churn_partition),
            (churn.clog_every_s, self._churn_clog),
            (churn.freeze_every_s, self._churn_freeze),
        ):
            if every:
                self._again(every, what)

    @property
    def up(self) -> int:
        """How many nodes are up."""
        return sum(node.core is not None for node in self.nodes.values())

    def island_of(self, peer: str) -> int:
        """Peers of one island hear each other."""
        return self._islands.get(peer, 0)

    @property
    def is_rough(self) -> bool:
        """Whether something goes on that no bound on progress is claimed for."""
        links = self._heap.links
        return bool(self._one_way or links.clogged or links.loss > 0.3)

    # --- members -------------------------------------------------------------------------------

    def _wrapped(self, node: SimulatedNode, core: Core) -> Core:
        member = self._cast.peers.index(node.peer_id) if self._scenario.lies else -1
        lie = self._scenario.lies.get(member)
        if lie is None:
            return core
        chance = random.Random(f"{node.peer_id}/{node.incarnation}/lies")  # noqa: S311
        return cast(Core, Liar(core, node, self._heap.folds, lie, chance))

    def _start(self, member: int, delay: float = 0.0) -> None:
        node = self.nodes.get(member)
        if node is None:
            made = self._cast
            node = SimulatedNode(
                made.seeds[member], made.public_keys[member], made.signed, f"h{member}"
            )
            self.nodes[member] = node
            self._heap.add(node, delay)
        elif node.core is None:
            self._heap.start(node, delay)
        self._disturb()

    def _crash(self, member: int, down_s: float = 0.0) -> None:
        node = self.nodes.get(member)
        if node is None or node.core is None:
            return
        self._heap.crash(node, lose=True)
        self._disturb()
        if down_s:
            self._heap.later(down_s, self._restart, member)

    def _restart(self, member: int) -> None:
        node = self.nodes.get(member)
        if node is not None and node.core is None:
            self._start(member)

    def _disturb(self) -> None:
        self.disturbed_at = self._heap.now

    # --- the scenario's events -----------------------------------------------------------------

    def _happens(self, event: Happening) -> None:
        members = event.members
        if event.some:
            some = min(event.some, len(self.nodes))
            members = tuple(sorted(self._chance.sample(sorted(self.nodes), some)))
        whole: dict[str, Callable[[Happening, tuple[int, ...]], None]] = {
            "partition": lambda e, m: self._partition(m, silent=e.details["silent"]),
            "one-way": lambda e, m: self._cut_one_way(m, e.to),
            "flap": lambda e, m: self._flap(m, e.details["period_s"], e.details["until_s"]),
            "heal": lambda _e, _m: self._heal(),
            "add": lambda _e, m: self._add(m),
            "revoke": lambda e, m: self._revoke(m, e.details["from_round"]),
            "forget": lambda _e, m: self._revoke(m, 0),
            "weather": lambda e, _m: self._weather(e),
            "clog": lambda e, m: self._clog(m, e.details["until_s"] - self._heap.now),
            "freeze": lambda e, m: self._freeze(m, e.details["for_s"]),
        }
        if event.do in whole:
            whole[event.do](event, members)
            return
        for member in members:
            self._to_one(event, member)

    def _to_one(self, event: Happening, member: int) -> None:
        if event.do in {"start", "restart"}:
            self._start(member)
            return
        node = self.nodes.get(member)
        if node is None:
            return
        match event.do:
            case "crash":
                self._crash_as_told(member, **event.details)
            case "leave":
                self.left.add(node.peer_id)
                self._heap.give(node, LeaveNetwork())
            case "return":
                self._return(node)
            case "share":
                self._heap.give(node, SetSharing(**event.details))
            case "slow":
                node.slowness = event.details["factor"]
            case "clock":
                node.clock.set(self._heap.now, **event.details)
            case "backup":
                self._backups[member] = node.disk.copy()
            case _:
                self._restore(member)

    def _crash_as_told(self, member: int, down_s: float, effects: int) -> None:
        if effects < 0:
            self._crash(member, down_s)
        else:
            self.nodes[member].dies_within = effects
            self._heap.later(down_s or 1.0, self._restart, member)

    def _freeze(self, members: Iterable[int], seconds: float) -> None:
        nodes = (self.nodes.get(member) for member in members)
        for node in [n for n in nodes if n is not None and n.core is not None]:
            self._heap.freeze(node, seconds)
        self._disturb()
        self._heap.later(seconds, self._disturb)

    def _return(self, node: SimulatedNode) -> None:
        self.left.discard(node.peer_id)
        self._heap.give(node, JoinNetwork())
        self._disturb()

    def _restore(self, member: int) -> None:
        """The operator puts an old backup in the place of the state directory."""
        if member in self._backups:
            self._crash(member)
            self.nodes[member].disk = self._backups[member].copy()
            self._start(member)

    # --- connections ---------------------------------------------------------------------------

    def _partition(self, members: Iterable[int], *, silent: bool = False) -> None:
        self._next_island += 1
        for member in members:
            self._islands[self._cast.peers[member]] = self._next_island
        self._cut(silent=silent)

    def _cut_one_way(self, members: Iterable[int], to: Iterable[int]) -> None:
        peers = self._cast.peers
        targets = list(to)
        for one in members:
            self._one_way.update(dict.fromkeys((peers[one], peers[other]) for other in targets))
        self._cut()

    def _cut(self, *, silent: bool = False) -> None:
        """A new function, so that the wires notice; `silent`: nobody is told that it is over."""
        self._heap.links.cut = self._is_cut
        self._heap.links.silent = silent
        self._disturb()

    def _is_cut(self, one: str, other: str) -> bool:
        islands = self._islands
        return islands.get(one, 0) != islands.get(other, 0) or (one, other) in self._one_way

    def _heal(self) -> None:
        self._islands.clear()
        self._one_way.clear()
        self._cut()

    def _flap(self, members: tuple[int, ...], period_s: float, until_s: float) -> None:
        if self._over or self._heap.now >= until_s:
            self._heal()
            return
        if self._islands:
            self._heal()
        else:
            self._partition(members)
        self._heap.later(period_s, self._flap, members, period_s, until_s)

    def _clog(self, members: Iterable[int], seconds: float) -> None:
        if self._over:
            return
        for member in members:
            self._heap.links.clogged.add(self._cast.peers[member])
            self._heap.later(seconds, self._unclog, member)
        self._disturb()

    def _unclog(self, member: int) -> None:
        self._heap.wires.unclog(self._cast.peers[member])
        self._disturb()

    def _weather(self, event: Happening) -> None:
        links, details = self._heap.links, event.details
        links.loss = details.get("loss", links.loss)
        links.spike = details.get("spike", links.spike)
        links.spike_s = details.get("spike_s", links.spike_s)
        usual = (links.low_latency, links.high_latency)
        links.low_latency, links.high_latency = details.get("latency_s", usual)
        self._disturb()

    # --- rosters -------------------------------------------------------------------------------

    def _add(self, members: tuple[int, ...]) -> None:
        self._cast.add(members)
        self._publish()
        for member in members:
            self._start(member)

    def _revoke(self, members: tuple[int, ...], from_round: int) -> None:
        self._cast.revoke(members, from_round)
        self._publish()

    def _publish(self) -> None:
        """A steward hands the new roster to one member that is up; the others hear of it."""
        up = [m for m, node in self.nodes.items() if node.core is not None]
        honest = [m for m in up if m not in self._scenario.lies]
        listed = [m for m in honest if self._cast.rosters[-1].member(self._cast.peers[m])]
        if listed:
            node = self.nodes[self._chance.choice(listed)]
            for document in self._cast.signed:  # versions may have been skipped
                self._heap.give(node, RosterOffered(document))
        self._disturb()

    # --- misfortunes ---------------------------------------------------------------------------

    def _again(self, every: float, what: Callable[[], None]) -> None:
        wait = self._chance.expovariate(1 / every)
        if self._heap.now + wait < self._scenario.churn.until_s:
            self._heap.later(wait, self._strike, every, what)

    def _strike(self, every: float, what: Callable[[], None]) -> None:
        if not self._over:
            what()
            self._again(every, what)

    def _some_up(self) -> int | None:
        up = [m for m, node in self.nodes.items() if node.core is not None]
        return self._chance.choice(up) if up else None

    def _churn_crash(self) -> None:
        member = self._some_up()
        down = self._chance.uniform(*self._scenario.churn.down_s)
        if member is None:
            return
        if self._chance.random() < 0.5:
            self._crash(member, down)
        else:  # in the middle of what it does next
            self.nodes[member].dies_within = self._chance.randrange(4)
            self._heap.later(down, self._restart, member)
            self._disturb()

    def _churn_partition(self) -> None:
        if self._islands:
            return
        members = sorted(self.nodes)
        size = self._chance.randint(1, max(1, len(members) // 2))
        self._partition(self._chance.sample(members, size), silent=self._chance.random() < 0.5)
        self._heap.later(self._chance.uniform(*self._scenario.churn.partition_s), self._heal)

    def _churn_clog(self) -> None:
        """Swizzle-clog: clog some members one after another, unclog them in another order."""
        members = sorted(self.nodes)
        chosen = self._chance.sample(members, self._chance.randint(1, max(1, len(members) // 2)))
        low, high = self._scenario.churn.clog_s
        for member in chosen:
            start = self._chance.uniform(0, low)
            self._heap.later(start, self._clog, (member,), self._chance.uniform(low, high))

    def _churn_freeze(self) -> None:
        member = self._some_up()
        seconds = self._chance.uniform(*self._scenario.churn.freeze_s)
        if member is not None:
            self._freeze((member,), seconds)

    # --- the end -------------------------------------------------------------------------------

    def heal_everything(self) -> None:
        """Everybody is up, back and connected; nobody releases any more."""
        self._over = True
        scenario, links = self._scenario, self._heap.links
        self._heal()
        links.loss, links.spike = scenario.loss, scenario.spike
        links.low_latency, links.high_latency = scenario.latency_s
        for peer in sorted(links.clogged):
            self._heap.wires.unclog(peer)
        for member, node in sorted(self.nodes.items()):
            node.slowness = 1.0
            node.dies_within = None
            if self._heap.now < node.frozen_until:
                self._heap.thaw(node)
            self._start(member)
            self._return(node)
            self._heap.give(node, SetSharing(on=False))
