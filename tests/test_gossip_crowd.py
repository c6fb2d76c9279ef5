"""Networks in which nobody is connected to everybody, with the real core: they agree all the same.

A dozen members make a crowd here, because the full mesh is said to end at four.
"""

from __future__ import annotations

import pytest
from consortium import peer_of
from scenario import World, facts_of

from p2pfed.gossip.attendance import Attendance
from p2pfed.gossip.events import JoinNetwork, LeaveNetwork
from p2pfed.gossip.membership import Liveness, State
from p2pfed.simulate.heap import Timers

CROWD = Liveness(full_mesh=4, neighbours=3, crowded=6)


def crowd(n: int = 12, *, seed: int = 0, live: Liveness = CROWD, **constants) -> World:
    """A world whose members know two addresses at the start."""
    world = World(n, seed=seed, **constants)
    world.heap.contacts = (peer_of(0), peer_of(1))
    world.heap._timers = Timers(liveness=live)
    return world


def assert_agreement(world: World) -> None:
    assert world.is_settled(), [n.core.progress.round for n in world.nodes]
    assert len({n.hash for n in world.nodes}) == 1
    assert len({facts_of(n) for n in world.nodes}) == 1
    assert not any(n.type == "peer.blamed" for node in world.nodes for n in node.notes)


def states(world: World, of: int) -> set[State]:
    """What the others think of one."""
    own = peer_of(of)
    return {n.core.membership.get(own).state for n in world.nodes if n.peer_id != own}


def test_a_crowd_trains_together_with_few_connections_each():
    world = crowd(10, rounds=2)
    world.add(*range(10))
    world.run_until(10)
    assert max(len(node.up) for node in world.nodes) < 9
    world.run_to_the_end()
    assert_agreement(world)
    trained = [len(node.trained_rounds) for node in world.nodes]
    assert min(trained) >= 1


@pytest.mark.slow
def test_everybody_is_waited_for_whether_neighbour_or_not():
    world = crowd(rounds=12, quorum=1.0, deadline_s=60.0, min_live=0.9)
    world.add(*range(12))
    world.run_until(20)
    presences = [
        Attendance(n.core.membership).of(world.run.run_id, 0, contributes=True) for n in world.nodes
    ]
    assert all(len(p.contributing) == 12 for p in presences)
    assert all(p.in_run < p.alive for p in presences)


@pytest.mark.slow
def test_who_leaves_is_not_waited_for_by_those_that_were_not_its_neighbours():
    world = crowd(rounds=200, min_round_interval_s=2.0)
    world.add(*range(12))
    world.run_until(15)
    world.heap.give(world.node(7), LeaveNetwork())
    world.run_until(25)
    assert states(world, 7) == {State.LEFT}
    world.heap.give(world.node(7), JoinNetwork())
    world.run_until(45)
    assert states(world, 7) == {State.ALIVE}


@pytest.mark.slow
def test_who_is_killed_is_suspected_by_all_within_seconds_and_comes_back():
    world = crowd(rounds=200, min_round_interval_s=2.0)
    world.add(*range(12))
    world.run_until(15)
    world.heap.crash(world.node(7))
    world.run_until(15 + CROWD.suspect_after + 6)
    assert states(world, 7) <= {State.SUSPECT, State.AWAY}
    world.run_until(40)
    assert states(world, 7) == {State.AWAY}
    world.heap.start(world.node(7))
    world.run_until(60)
    assert states(world, 7) == {State.ALIVE}


@pytest.mark.slow
def test_nobody_is_suspected_who_is_there():
    world = crowd(rounds=200, min_round_interval_s=2.0)
    world.add(*range(12))
    world.run_until(20)
    for node in world.nodes:
        node.notes.clear()
    world.run_until(80)
    assert not [n for node in world.nodes for n in node.notes if n.type == "peer.suspect"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_a_crowd_agrees_after_loss_crash_partition_and_goodbye(seed):
    world = crowd(seed=seed, loss=0.1, rounds=10, min_round_interval_s=2.0)
    world.add(*range(11))
    world.run_until(10)
    world.heap.crash(world.node(3))
    world.cut(0, 1, 2, 5, 8)
    world.run_until(60)
    world.add(11)
    world.heap.give(world.node(6), LeaveNetwork())
    world.cut()
    world.heap.start(world.node(3))
    world.run_until(80)
    world.heap.give(world.node(6), JoinNetwork())
    world.run_to_the_end()
    assert_agreement(world)


@pytest.mark.slow
def test_forty_hospitals_with_the_timers_of_a_daemon_agree():
    world = crowd(40, live=Liveness(), rounds=4)
    world.add(*range(40))
    world.run_to_the_end()
    assert_agreement(world)
    assert max(len(node.up) for node in world.nodes) < 39
