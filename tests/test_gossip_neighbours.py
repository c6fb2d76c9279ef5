"""With whom a node of a crowd is connected: few, and yet everybody is reached."""

from __future__ import annotations

import random
from collections import deque

import pytest
from consortium import Consortium, peer_of

from p2pfed.gossip.events import Disconnect, Keep, Send, StopDialling
from p2pfed.gossip.membership import Liveness, Membership, State
from p2pfed.gossip.neighbours import Neighbours
from p2pfed.gossip.seating import Seating
from p2pfed.wire.messages import decode_message
from p2pfed.wire.spreading import Crowded

SIZE = 24
NET = Consortium(SIZE)
LIVE = Liveness(full_mesh=4, neighbours=4, crowded=9)


class Node:
    """A member with its connections; nothing is said over them but `Crowded`."""

    def __init__(self, i: int, live: Liveness = LIVE) -> None:
        self.id = peer_of(i)
        self.membership = Membership(self.id, live)
        self.membership.adopt(NET.roster)
        self.neighbours = Neighbours(self.membership, Seating(NET.book()), random.Random(i))
        self.dialled: dict[str, None] = {}
        self.up = True

    @property
    def links(self) -> set[str]:
        return {p.peer_id for p in self.membership.linked()}


class Town:
    """All of them; what one wants to dial is connected, if it is there and not cut off."""

    def __init__(self, live: Liveness = LIVE, known: int = SIZE) -> None:
        self.nodes = {peer_of(i): Node(i, live) for i in range(SIZE)}
        self.cut: set[str] = set()
        self.now = 0.0
        for node in self.nodes.values():
            for i in range(known):
                if peer_of(i) != node.id:
                    node.membership.get(peer_of(i)).addresses = (f"/at/{i}",)

    def can_meet(self, one: Node, other: Node) -> bool:
        return one.up and other.up and (one.id in self.cut) == (other.id in self.cut)

    def connect(self, one: Node, other: Node) -> None:
        for node, peer in ((one, other), (other, one)):
            node.membership.link(node.membership.get(peer.id))
            node.membership.heard(node.membership.get(peer.id), self.now)
            node.membership.get(peer.id).addresses = (f"/at/{peer.id}",)

    def hang_up(self, one: Node, other: Node) -> None:
        for node, peer in ((one, other), (other, one)):
            if peer.id in node.links:
                node.membership.unlink(node.membership.get(peer.id), self.now)

    def perform(self, node: Node, effects) -> None:
        for effect in effects:
            other = self.nodes[effect.peer]
            match effect:
                case Keep():
                    node.dialled[effect.peer] = None
                case StopDialling():
                    node.dialled.pop(effect.peer, None)
                case Disconnect():
                    self.hang_up(node, other)
                case Send():
                    assert isinstance(decode_message(effect.frame), Crowded)
                    peer = other.membership.get(node.id)
                    self.perform(other, other.neighbours.on_crowded(peer, self.now))

    def pass_time(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1.0
            for node in self.nodes.values():
                for other in [self.nodes[p] for p in node.links]:
                    if not self.can_meet(node, other):
                        self.hang_up(node, other)
                if node.up:
                    for peer in node.links:  # somebody always says something
                        node.membership.heard(node.membership.get(peer), self.now)
                    node.membership.tick(self.now)
                    self.perform(node, node.neighbours.tick(self.now))
                for peer in [p for p in node.dialled if p not in node.links]:
                    if self.can_meet(node, self.nodes[peer]):
                        self.connect(node, self.nodes[peer])

    def reached(self, start: str) -> set[str]:
        """Everybody who can be reached over connections."""
        found, queue = {start}, deque([start])
        while queue:
            for peer in self.nodes[queue.popleft()].links - found:
                found.add(peer)
                queue.append(peer)
        return found

    @property
    def here(self) -> list[Node]:
        return [n for n in self.nodes.values() if n.up]


def test_everybody_is_reached_with_a_few_connections_each():
    town = Town()
    town.pass_time(20)
    assert town.reached(peer_of(0)) == set(town.nodes)
    degrees = [len(n.links) for n in town.nodes.values()]
    assert max(degrees) <= 2 * LIVE.crowded
    assert sum(degrees) / SIZE <= 3 * LIVE.neighbours
    assert all(len(n.dialled) <= LIVE.neighbours + 1 for n in town.nodes.values())


def test_from_one_known_address_each_finds_its_place():
    """Everybody begins at h0, which gets rid of most of them."""
    town = Town(known=1)
    for node in town.nodes.values():
        if node.id != peer_of(0):
            town.connect(node, town.nodes[peer_of(0)])
            for peer in town.nodes:  # what h0 tells of the others
                if peer != node.id:
                    node.membership.get(peer).addresses = (f"/at/{peer}",)
    town.pass_time(60)
    assert town.reached(peer_of(0)) == set(town.nodes)
    assert len(town.nodes[peer_of(0)].links) <= 2 * LIVE.crowded


def test_who_fails_is_replaced():
    town = Town()
    town.pass_time(20)
    for i in range(0, SIZE, 3):
        town.nodes[peer_of(i)].up = False
    town.pass_time(60)
    assert town.reached(town.here[0].id) == {n.id for n in town.here}
    assert all(len(n.links) >= 2 for n in town.here)


def test_two_halves_that_lost_each_other_for_long_meet_again():
    town = Town()
    town.pass_time(20)
    town.cut = {peer_of(i) for i in range(SIZE // 2)}
    town.pass_time(120)
    assert town.reached(peer_of(0)) == town.cut
    town.cut = set()
    town.pass_time(60)
    assert town.reached(peer_of(0)) == set(town.nodes)


def test_who_said_goodbye_is_not_dialled():
    town = Town()
    gone = town.nodes[peer_of(5)]
    for node in town.nodes.values():
        if node is not gone:
            node.membership.left(node.membership.get(gone.id))
    gone.up = False
    town.pass_time(60)
    assert not any(gone.id in node.dialled for node in town.nodes.values())


def test_neighbours_are_talked_to_in_turn():
    town = Town()
    town.pass_time(20)
    node = town.nodes[peer_of(3)]
    partners = [node.neighbours.partner() for _ in range(len(node.links))]
    assert set(partners) == node.links


def test_a_node_without_neighbours_talks_to_nobody():
    assert Node(0).neighbours.partner() is None
    assert Node(0, Liveness()).neighbours.partner() is None


def test_who_is_asked_to_go_goes_unless_it_would_be_alone():
    town = Town()
    town.pass_time(20)
    node = town.nodes[peer_of(3)]
    first = node.membership.linked()[0]
    effects = node.neighbours.on_crowded(first, town.now)
    assert StopDialling(first.peer_id) in effects
    assert [e.peer for e in effects if isinstance(e, Disconnect)] == [first.peer_id]
    town.perform(node, effects)
    node.membership.tick(town.now + 1000)
    assert first.state is State.ALIVE  # we hung up: its silence means nothing
    alone = Node(4)
    town.connect(alone, town.nodes[peer_of(5)])
    only = alone.membership.get(peer_of(5))
    assert alone.neighbours.on_crowded(only, 0.0) == []


@pytest.mark.parametrize("size", [3, 5])
def test_a_network_that_shrinks_to_a_few_is_a_full_mesh_again(size):
    net = Consortium(6)
    membership = Membership(peer_of(0), LIVE)
    membership.adopt(net.roster)
    neighbours = Neighbours(membership, Seating(net.book()), random.Random(1))
    for i in range(1, 6):
        membership.get(peer_of(i)).addresses = (f"/at/{i}",)
    assert len(neighbours.tick(0.0)) >= LIVE.neighbours
    gone = [peer_of(i) for i in range(size, 6)]
    for peer in gone:
        net.publish(net.roster.revoke(peer, reason="x", from_round=0))
    membership.adopt(net.roster)
    kept = {e.peer for e in neighbours.tick(5.0) if isinstance(e, Keep)}
    if size <= LIVE.full_mesh:
        assert kept == {peer_of(i) for i in range(1, size)}
    assert not kept & set(gone)
