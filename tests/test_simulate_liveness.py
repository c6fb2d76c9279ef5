"""Who is seen silent how soon, and who is never called away: the real core in a simulated network.

A peer is *seen* when it is no longer alive to the others; it is *called away* when it is given up.
"""

from __future__ import annotations

import random

import pytest
from consortium import peer_of
from scenario import World

from p2pfed.gossip.membership import State
from p2pfed.simulate.heap import SimulatedNode

LAN = (0.001, 0.001, 0.0)  # least and greatest latency, seconds; share of frames lost
WAN = (0.1, 0.2, 0.02)
SEEN_LAN, SEEN_WAN = 3.0, 15.0  # seconds; the goals
WARM_UP = 20.0


def network(n: int = 5, where: tuple[float, float, float] = LAN, seed: int = 0) -> World:
    """All up and known to each other; nothing is trained."""
    world = World(n, seed=seed, min_round_interval_s=3600.0)
    world.links.low_latency, world.links.high_latency, world.links.loss = where
    world.heap.watch = lambda _node, _event, _effects: None
    world.add(*range(n))
    world.run_until(WARM_UP + random.Random(seed).random())
    for node in world.nodes:
        node.notes.clear()
    return world


def state(world: World, observer: int, of: int) -> State:
    return world.node(observer).core.membership.get(peer_of(of)).state


def said(nodes: list[SimulatedNode], what: str) -> int:
    return sum(note.type == what for node in nodes for note in node.notes)


def seconds_until(world: World, done, limit: float) -> float:
    """Until something is so; infinite if it is not in time."""
    began = world.heap.now
    while world.heap.now < began + limit:
        if done():
            return world.heap.now - began
        world.run_until(world.heap.now + 0.05)
    return float("inf")


def everyone_sees(world: World, gone: set[int], states: set[State]) -> bool:
    n = len(world.nodes)
    return all(
        state(world, i, of) in states for i in range(n) if i not in gone for of in sorted(gone)
    )


GIVEN_UP = {State.SUSPECT, State.AWAY}


@pytest.mark.slow
@pytest.mark.parametrize(("where", "bound"), [(LAN, SEEN_LAN), (WAN, SEEN_WAN)], ids=["lan", "wan"])
@pytest.mark.parametrize("seed", range(5))
def test_a_frozen_peer_is_seen_by_all_in_time_and_alive_again_when_it_goes_on(where, bound, seed):
    world = network(where=where, seed=seed)
    world.heap.freeze(world.node(2), 40.0)
    assert seconds_until(world, lambda: everyone_sees(world, {2}, GIVEN_UP), 20) <= bound
    assert seconds_until(world, lambda: everyone_sees(world, {2}, {State.AWAY}), 20) <= 15
    world.run_until(world.node(2).frozen_until)
    assert seconds_until(world, lambda: everyone_sees(world, {2}, {State.ALIVE}), 20) <= 3


def test_two_that_are_frozen_at_once_are_seen_by_their_only_witness():
    world = network(3)
    for i in (1, 2):
        world.heap.freeze(world.node(i), 60.0)
    assert seconds_until(world, lambda: everyone_sees(world, {1, 2}, GIVEN_UP), 20) <= SEEN_LAN
    assert seconds_until(world, lambda: everyone_sees(world, {1, 2}, {State.AWAY}), 20) <= 15


@pytest.mark.slow
@pytest.mark.parametrize("where", [LAN, WAN], ids=["lan", "wan"])
def test_nodes_that_each_stall_for_two_seconds_now_and_then_are_never_called_away(where):
    """0 of 2.5 node-hours here, in which each stalls about every 30 s."""
    world, rng = network(where=where), random.Random(7)
    hours, last = 0.5, world.heap.now
    while world.heap.now < last + hours * 3600:
        world.run_until(world.heap.now + rng.expovariate(1 / 6))
        world.heap.freeze(rng.choice(world.nodes), 2.0)
    assert said(world.nodes, "peer.away") == 0
    assert said(world.nodes, "node.stood-still") > 200  # it did happen


@pytest.mark.parametrize("seed", range(6))
def test_an_observer_that_stood_still_calls_nobody_away(seed):
    world = network(seed=seed)
    observer = world.node(0)
    world.heap.freeze(observer, 30.0)
    world.run_until(world.heap.now + 60)
    assert said([observer], "node.stood-still") == 1
    assert said([observer], "peer.away") == 0
    assert all(state(world, 0, i) is State.ALIVE for i in range(1, 5))


@pytest.mark.parametrize("seed", range(4))
def test_all_of_a_network_stand_still_and_nobody_is_called_away(seed):
    """A cluster of virtual machines that is paused as a whole."""
    world = network(seed=seed)
    for node in world.nodes:
        world.heap.freeze(node, 30.0)
    world.run_until(world.heap.now + 60)
    assert said(world.nodes, "peer.away") == 0


@pytest.mark.slow
@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize("where", [LAN, WAN], ids=["lan", "wan"])
@pytest.mark.parametrize(("n", "half"), [(2, 1), (3, 1), (6, 3), (20, 10)])
def test_the_other_half_is_away_in_15_s_and_alive_10_s_after_healing(n, half, where, silent):
    world = network(n, where)
    world.links.silent = silent
    world.cut(*range(half))

    def halves(states: set[State]) -> bool:
        return all(
            state(world, i, of) in states
            for i in range(n)
            for of in range(n)
            if (i < half) != (of < half)
        )

    assert seconds_until(world, lambda: halves(GIVEN_UP), 20) <= (
        SEEN_LAN if where is LAN else SEEN_WAN
    )
    assert seconds_until(world, lambda: halves({State.AWAY}), 20) <= 15
    world.run_until(world.heap.now + 60)
    inside = [(i, of) for i in range(n) for of in range(n) if i != of and (i < half) == (of < half)]
    assert all(state(world, i, of) is State.ALIVE for i, of in inside)
    world.links.silent = False
    world.cut()
    assert seconds_until(world, lambda: halves({State.ALIVE}), 20) <= 10


def test_a_path_that_is_cut_one_way_is_seen_and_dialled_anew_and_nobody_is_called_away():
    world = network()
    world.links.silent = True
    world.links.cut = lambda a, b: (a, b) == (peer_of(1), peer_of(0))
    assert seconds_until(world, lambda: state(world, 0, 1) in GIVEN_UP, 20) <= SEEN_LAN
    assert seconds_until(world, lambda: peer_of(1) not in world.node(0).up, 10) <= 5
    world.run_until(world.heap.now + 120)
    assert state(world, 0, 1) is state(world, 1, 0) is State.SUSPECT  # others hear both
    assert said(world.nodes, "peer.away") == 0
    assert said([world.node(0)], "peer.unheard") == 1
    world.links.silent = False
    world.cut()
    world.run_until(world.heap.now + 3)
    assert state(world, 0, 1) is state(world, 1, 0) is State.ALIVE


def test_a_peer_that_dies_while_only_others_heard_it_is_away_after_all():
    world = network()
    world.links.silent = True
    world.links.cut = lambda a, b: (a, b) == (peer_of(1), peer_of(0))
    world.run_until(world.heap.now + 40)
    world.heap.freeze(world.node(1), 600.0)
    assert seconds_until(world, lambda: everyone_sees(world, {1}, {State.AWAY}), 30) <= 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_node_a_hundred_times_slower_is_not_called_away_and_soon_not_suspect_either(seed):
    world = network(where=(0.005, 0.05, 0.0), seed=seed)
    world.node(3).slowness = 100.0
    world.run_until(world.heap.now + 60)
    assert said(world.nodes, "peer.away") == 0
    for node in world.nodes:
        node.notes.clear()
    world.run_until(world.heap.now + 600)
    assert said(world.nodes, "peer.away") == 0
    assert said(world.nodes, "peer.suspect") <= 12  # one a minute and node would be 48


@pytest.mark.slow
def test_in_a_crowd_the_next_ones_on_the_ring_see_it_in_time_and_everybody_hears_of_it():
    world = World(40, min_round_interval_s=3600.0)
    world.heap.contacts = (peer_of(0), peer_of(1))
    world.heap.watch = lambda _node, _event, _effects: None
    world.links.low_latency = world.links.high_latency = 0.001
    world.add(*range(40))
    world.run_until(60)
    world.heap.freeze(world.node(7), 60.0)
    others = [i for i in range(40) if i != 7]

    def first() -> bool:
        return any(state(world, i, 7) in GIVEN_UP for i in others)

    assert seconds_until(world, first, 20) <= SEEN_LAN
    assert seconds_until(world, lambda: everyone_sees(world, {7}, GIVEN_UP), 20) <= SEEN_WAN
    assert said([world.node(i) for i in others], "peer.suspect") == 39  # of h7 alone
