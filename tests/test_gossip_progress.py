"""A node's way through the rounds: what it does at the ends of a run."""

from __future__ import annotations

from scenario import World

from p2pfed.gossip.progress import Phase


def test_a_node_that_restarts_after_the_run_has_ended_releases_nothing_more():
    world = World(3, rounds=4)
    world.add(*range(3))
    world.run_to_the_end()
    node = world.nodes[1]
    before, model = set(node.deltas), node.hash
    world.heap.crash(node)
    world.heap.run_until(world.heap.now + 5)
    world.heap.start(node)
    world.heap.run_until(world.heap.now + 30)
    assert node.core.progress.phase is Phase.FINISHED
    assert node.core.progress.round == 4
    assert set(node.deltas) == before
    assert node.hash == model


def test_one_who_joins_after_the_end_takes_the_model_and_releases_nothing():
    world = World(4, rounds=4)
    world.add(*range(3))
    world.run_to_the_end()
    world.add(3)
    world.heap.run_until(world.heap.now + 60)
    late = world.nodes[3]
    assert late.core.progress.phase is Phase.FINISHED
    assert late.hash == world.nodes[0].hash
    assert not late.trained_rounds


def test_a_node_whose_own_weight_is_enough_starts_without_the_others():
    world = World(3, rounds=3, min_live=0.2)  # each has more than a fifth
    world.add(0)
    world.heap.run_until(60)
    assert world.nodes[0].core.progress.phase is Phase.FINISHED


def test_a_node_whose_weight_is_not_enough_waits_and_spends_nothing():
    world = World(3, rounds=3)
    world.add(0)
    world.heap.run_until(60)
    assert world.nodes[0].core.progress.phase is Phase.JOINING
    assert not world.nodes[0].trained_rounds
