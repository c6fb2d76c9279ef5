"""A node's way through the rounds: what it does at the ends of a run."""

from __future__ import annotations

from consortium import Consortium, peer_of
from scenario import World

from p2pfed.gossip.events import FetchCheckpoint, Fold, Folded, Train
from p2pfed.gossip.progress import Phase, Presence, Progress
from p2pfed.wire.messages import CheckpointOffer


def of_type(effects, kind):
    return [effect for effect in effects if isinstance(effect, kind)]


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


def test_a_network_of_one_needs_nobody():
    world = World(1, rounds=3)
    world.add(0)
    world.heap.run_until(60)
    assert world.nodes[0].core.progress.phase is Phase.FINISHED


def test_a_node_whose_own_weight_is_enough_releases_once_two_have_told_what_it_released():
    world = World(3, rounds=3, min_live=0.2)  # each has more than a fifth
    world.add(0, 1)
    world.heap.run_until(30)
    assert not any(node.trained_rounds for node in world.nodes)
    assert "witness" in world.nodes[0].core.why_not_contributing()
    world.add(2)
    world.run_to_the_end()
    assert {node.core.progress.phase for node in world.nodes} == {Phase.FINISHED}
    assert all(node.trained_rounds for node in world.nodes)


def test_a_node_whose_weight_is_not_enough_waits_and_spends_nothing():
    world = World(3, rounds=3)
    world.add(0)
    world.heap.run_until(60)
    assert world.nodes[0].core.progress.phase is Phase.JOINING
    assert not world.nodes[0].trained_rounds


def test_one_who_lost_its_store_never_contradicts_itself():
    world = World(3, rounds=5, min_round_interval_s=8.0, deadline_s=20.0)
    world.add(*range(3))
    node = world.nodes[1]
    while node.trained_rounds != [0, 1]:
        world.heap.run_until(world.heap.now + 0.25)
    world.heap.run_until(world.heap.now + 1)  # its delta of round 1 is with the others
    world.heap.crash(node)
    node.deltas.clear()
    node.checkpoints.held.clear()
    node.ledger_head = b"n" * 32  # what it would release now is not what it released then
    world.heap.start(node)
    world.run_to_the_end()
    assert node.trained_rounds == [0, 1, 2, 3, 4]
    for each in world.nodes:
        assert not [n for n in each.notes if n.type == "peer.equivocated"]
    assert len({n.hash for n in world.nodes}) == 1


def test_a_ledger_older_than_what_was_released_releases_nothing_more():
    world = World(3, rounds=30)
    world.add(*range(3))
    world.heap.run_until(4)
    node = world.nodes[1]
    old = node.disk.ledger.copy()
    world.heap.run_until(7)
    assert len(node.trained_rounds) > len(old.outputs) > 1
    world.heap.crash(node)
    node.disk.ledger = old
    released = len(node.trained_rounds)
    world.heap.start(node)
    world.run_to_the_end()
    assert [n for n in node.notes if n.type == "privacy.rollback"]
    assert "ledger" in node.core.why_not_contributing()
    assert node.core.facts.num_of(node.peer_id) == released
    assert len({n.hash for n in world.nodes}) == 1  # it goes on receiving


def test_one_who_joins_a_running_round_does_not_train_in_it():
    """It may have lost its store, and its own delta of this round be on the way back to it."""
    net = Consortium(3)
    run = net.run(rounds=9, min_live=0.5, deadline_s=20.0, min_round_interval_s=0.0)
    everyone = frozenset(peer_of(i) for i in range(3))
    presence = Presence(everyone, everyone, frozenset(), everyone - {peer_of(0)})
    progress = Progress(net.facts(run), peer_of(0), joining=True, round_=0)

    def advance(now):
        return progress.advance(now, net.roster, presence, contributes=True, ahead={})

    offer = CheckpointOffer(3, b"c" * 32, b"d" * 32, 100)
    for peer in presence.in_run:
        progress.offered(peer, (offer,), 0.0)
    assert of_type(advance(2.0), FetchCheckpoint)
    progress.fetched(offer, ok=True)
    [fold] = of_type(advance(3.0), Fold)
    progress.on_folded(Folded(fold.round, fold.chains[-1], b"m" * 32))
    assert progress.phase is Phase.GATHERING and progress.round == 3
    assert not of_type(advance(4.0), Train)
    [fold] = of_type(advance(30.0), Fold)  # past the deadline: the next round
    progress.on_folded(Folded(fold.round, fold.chains[-1], b"m" * 32))
    assert [train.round for train in of_type(advance(31.0), Train)] == [4]
