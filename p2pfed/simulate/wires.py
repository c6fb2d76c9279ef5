"""The wires between simulated nodes: who dials whom, how long a frame takes, and what is lost.

A connection keeps the order of its frames. One that is cut vanishes with the next tick of either
end; one that is clogged stalls, and lets everything go when it is unclogged. A node dials whom its
core wants to be connected to, nobody else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from p2pfed.gossip.events import Connected, Disconnected, Received, RosterOffered
from p2pfed.gossip.membership import Liveness

if TYPE_CHECKING:
    from p2pfed.simulate.heap import EventHeap
    from p2pfed.simulate.node import SimulatedNode

__all__ = ["Links", "Timers", "Wires"]

HANDSHAKES = 3  # latencies until a connection is up
STALLED = 256  # frames that wait in a clogged connection; later ones are lost


@dataclass(slots=True)
class Links:
    """The network: latency in seconds, chances per frame, who is cut off from whom.

    Attributes:
        low_latency: Least latency.
        high_latency: Greatest latency of a usual frame.
        loss: Chance that a frame is lost.
        spike: Chance that a frame takes `spike_s` longer, and holds up those behind it.
        spike_s: How long.
        cut: Whether frames from one to the other vanish; a new function is noticed by identity.
        silent: Whether a cut is noticed by silence only: nobody is told that a connection ended.
        clogged: Peers whose frames stall, in and out, until they are unclogged.
    """

    low_latency: float = 0.005
    high_latency: float = 0.05
    loss: float = 0.0
    spike: float = 0.0
    spike_s: float = 2.0
    cut: Callable[[str, str], bool] = field(default=lambda _a, _b: False)
    silent: bool = False
    clogged: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Timers:
    """What a node does by the clock.

    Attributes:
        tick_s: Time between ticks of the core.
        sync_s: Time until a stored foreign delta survives a crash.
        liveness: When the core beats, and how long it bears silence.
    """

    tick_s: float = 0.25
    sync_s: float = 1.0
    liveness: Liveness = field(default_factory=Liveness)


class Wires:
    """All connections of one world."""

    def __init__(self, world: EventHeap) -> None:
        self._world = world
        self._last_arrival: dict[tuple[str, str], float] = {}
        self._stalled: dict[tuple[str, str], list[bytes]] = {}
        self._cut_seen: dict[str, object] = {}

    def connect(self, node: SimulatedNode) -> None:
        """Notice what is cut, and dial whom the node wants and has not."""
        cut = self._world.links.cut
        if self._cut_seen.get(node.peer_id) is not cut and not self._world.links.silent:
            self._cut_seen[node.peer_id] = cut
            for peer in list(node.up):
                if cut(node.peer_id, peer) or cut(peer, node.peer_id):
                    self.hang_up(node, self._world.nodes[peer])
        wanted = self._world.nodes if self._world.contacts is None else node.wanted
        if len(node.up) < len(wanted):
            for peer in list(wanted):
                if peer not in node.up and peer in self._world.nodes and peer != node.peer_id:
                    self._dial(node, self._world.nodes[peer])

    def _dial(self, node: SimulatedNode, other: SimulatedNode) -> None:
        """Connect; who does not list the other is shown the newer roster, and may be asked again.

        A node that is not on one's roster may do one thing: send a newer one.
        """
        cut = self._world.links.cut
        ids = (node.peer_id, other.peer_id)
        if node.core is None or other.core is None or cut(*ids) or cut(*reversed(ids)):
            return
        if self._world.now < other.frozen_until:
            return  # nobody there to shake hands with
        one, two = node.core.book.current, other.core.book.current
        if one is None or two is None:
            return
        delay = HANDSHAKES * self.latency(node, other)
        if one.member(other.peer_id) is not None and two.member(node.peer_id) is not None:
            node.up[other.peer_id] = None
            other.up[node.peer_id] = None
            version = min(node.version, other.version)
            self._world.give_later(delay, node, Connected(other.peer_id, version))
            self._world.give_later(delay, other, Connected(node.peer_id, version))
            if one is two:
                return
        for giver, newer, taker, older in ((node, one, other, two), (other, two, node, one)):
            signed = giver.core.book.signed(newer.hash) if giver.core is not None else None
            if newer.version >= older.version and newer is not older and signed is not None:
                self._world.give_later(delay, taker, RosterOffered(signed))

    def hang_up(self, node: SimulatedNode, other: SimulatedNode) -> None:
        """End a connection; both ends hear of it."""
        node.up.pop(other.peer_id, None)
        if other.up.pop(node.peer_id, 0) == 0:
            return
        for way in ((node.peer_id, other.peer_id), (other.peer_id, node.peer_id)):
            self._last_arrival.pop(way, None)
            self._stalled.pop(way, None)
        self._world.give_later(0.0, node, Disconnected(other.peer_id))
        self._world.give_later(0.0, other, Disconnected(node.peer_id))

    def latency(self, node: SimulatedNode, other: SimulatedNode) -> float:
        """How long the next frame takes, seconds."""
        links = self._world.links
        latency = self._world.rng.uniform(links.low_latency, links.high_latency)
        if links.spike and self._world.rng.random() < links.spike:
            latency += links.spike_s
        return latency * node.slowness * other.slowness

    def send(self, node: SimulatedNode, peer: str, frame: bytes) -> int:
        """Put a frame on its way; returns the bytes that will arrive."""
        if peer not in node.up:
            return 0
        links = self._world.links
        if links.cut(node.peer_id, peer) or (links.loss and self._world.rng.random() < links.loss):
            return 0
        way = (node.peer_id, peer)
        if node.peer_id in links.clogged or peer in links.clogged:
            waiting = self._stalled.setdefault(way, [])
            if len(waiting) < STALLED:
                waiting.append(frame)
            return 0
        other = self._world.nodes[peer]
        earliest = self._last_arrival.get(way, 0.0) + 1e-6  # a connection keeps its order
        arrival = max(earliest, self._world.now + self.latency(node, other))
        self._last_arrival[way] = arrival
        other.bytes_received += len(frame)
        heard = Received(node.peer_id, frame, min(node.version, other.version))
        self._world.give_later(arrival - self._world.now, other, heard)
        return len(frame)

    def unclog(self, peer: str) -> None:
        """Let a peer's stalled frames go."""
        self._world.links.clogged.discard(peer)
        for way in [
            w for w in self._stalled if peer in w and not self._world.links.clogged & set(w)
        ]:
            for frame in self._stalled.pop(way):
                self.send(self._world.nodes[way[0]], way[1], frame)
