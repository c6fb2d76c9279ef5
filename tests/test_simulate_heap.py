"""The real core under loss, crashes, churn, partitions and liars; a seed repeats a run."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from consortium import hospital, key_of, peer_of, some_payload
from scenario import World, facts_of, misfortune

from p2pfed.gossip.aside import EACH
from p2pfed.gossip.events import (
    JoinNetwork,
    LeaveNetwork,
    Note,
    RosterOffered,
    Send,
    SetSharing,
    Tick,
)
from p2pfed.gossip.membership import State
from p2pfed.wire.delta import Delta
from p2pfed.wire.messages import (
    Beat,
    CheckpointOffer,
    Checkpoints,
    Digest,
    Facts,
    Have,
    Leave,
    Want,
    encode_message,
)

TESTS = Path(__file__).parent


def assert_agreement(world: World) -> None:
    """All believe the same facts, have folded all of them, and have the same model."""
    assert world.is_settled(), [n.core.progress.round for n in world.nodes]
    assert len({n.hash for n in world.nodes}) == 1
    assert all(n.core.facts.adopted is None for n in world.nodes)
    assert all(n.core.progress.folded.chain == facts_of(n) for n in world.nodes)


def notes(node, prefix: str) -> list[Note]:
    return [n for n in node.notes if n.type.startswith(prefix)]


def test_without_misfortune_everyone_trains_every_round():
    world = World(4, rounds=6)
    world.add(*range(4))
    world.run_to_the_end()
    assert_agreement(world)
    assert all(n.trained_rounds == list(range(6)) for n in world.nodes)
    assert all(len(n.deltas) == 24 for n in world.nodes)
    assert not any(notes(n, "peer.blamed") for n in world.nodes)


def test_without_loss_a_payload_is_sent_to_each_node_about_once():
    world = World(4, rounds=6)
    world.add(*range(4))
    world.run_to_the_end()
    size = len(next(iter(world.nodes[0].deltas.values())).encode())
    control = 60 * world.heap.now * 3  # beats, answers and digests of three peers
    for node in world.nodes:
        assert node.bytes_received < 18 * 1.5 * size + 10 * control


@pytest.mark.parametrize("seed", range(3))
def test_all_nodes_agree_in_the_end_whatever_happened(seed):
    world = misfortune(seed)
    assert_agreement(world)
    assert len({frozenset(n.deltas) for n in world.nodes}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 40))
def test_all_nodes_agree_in_the_end_whatever_happened_many_seeds(seed):
    assert_agreement(misfortune(seed))


def test_a_seed_repeats_a_run_bit_for_bit_and_another_does_not():
    traces = []
    for seed in (7, 7, 8):
        world = World(3, seed=seed, loss=0.1, rounds=4)
        world.add(0, 1, 2)
        world.run_until(12)
        traces.append(world.trace.hexdigest())
    assert traces[0] == traces[1] != traces[2]


@pytest.mark.slow
def test_a_seed_repeats_a_run_in_other_processes_with_other_hash_seeds():
    said = set()
    for hash_seed in ("0", "1", "77"):
        result = subprocess.run(
            [sys.executable, str(TESTS / "scenario.py"), "3"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(TESTS.parent)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        said.add(result.stdout)
    assert len(said) == 1


def test_a_partition_merges_exactly_when_it_heals():
    world = World(5, rounds=8, min_live=0.1)
    world.add(*range(5))
    world.run_until(3)
    world.cut(0, 1)
    world.run_until(30)
    islands = [{n.hash for n in world.nodes[:2]}, {n.hash for n in world.nodes[2:]}]
    assert islands[0] != islands[1]  # they went on apart
    world.cut()
    world.run_to_the_end()
    assert_agreement(world)


def test_below_min_live_an_island_waits_and_spends_nothing():
    world = World(5, rounds=8, min_live=0.6)
    world.add(*range(5))
    world.run_until(3)
    world.cut(0)
    world.run_until(16)  # until the silence is noticed
    before = len(world.node(0).trained_rounds)
    world.run_until(60)
    assert len(world.node(0).trained_rounds) <= before + 1
    world.cut()
    world.run_to_the_end()
    assert_agreement(world)


def test_after_a_crash_a_node_goes_on_from_what_it_stored_and_never_contradicts_itself():
    world = World(4, rounds=10)
    world.add(*range(4))
    for moment in (3, 6, 9):
        world.run_until(moment)
        world.heap.crash(world.node(1))
        world.run_until(moment + 1.5)
        world.heap.start(world.node(1))
    world.run_to_the_end()
    assert_agreement(world)
    assert not any(notes(n, "peer.equivocated") for n in world.nodes)
    assert len(world.node(1).trained_rounds) == len(set(world.node(1).trained_rounds))


def test_a_late_joiner_takes_a_checkpoint_and_ends_with_the_same_model():
    world = World(5, rounds=25)
    world.add(*range(4))
    world.run_until(12)
    [late] = world.add(4)
    world.run_until(20)
    assert notes(late, "join.checkpoint")
    world.run_to_the_end()
    assert_agreement(world)
    assert min(late.trained_rounds) > 3


def test_who_leaves_is_not_waited_for_and_not_counted_as_failed():
    world = World(4, rounds=12)
    world.add(*range(4))
    world.run_until(4)
    world.heap.give(world.node(3), LeaveNetwork())
    trained = list(world.node(3).trained_rounds)
    world.run_until(40)
    others = [world.node(i) for i in range(3)]
    assert all(n.core.progress.round == 12 for n in others)
    assert all(n.core.membership.get(peer_of(3)).state is State.LEFT for n in others)
    assert not any(n.data["peer"] == peer_of(3) for o in others for n in notes(o, "peer.suspect"))
    assert len(world.node(3).trained_rounds) <= len(trained) + 1
    assert [n.data["missing"] for n in notes(others[0], "round.finished")][-1] == []
    world.heap.give(world.node(3), JoinNetwork())
    world.run_to_the_end()
    assert_agreement(world)


def test_one_who_does_not_share_receives_everything_and_gives_nothing():
    world = World(4, rounds=6)
    world.add(*range(4))
    world.heap.give(world.node(2), SetSharing(on=False))
    world.run_to_the_end()
    assert_agreement(world)
    assert world.node(2).trained_rounds == []
    assert len(world.node(2).deltas) == 18
    last = notes(world.node(0), "round.finished")[-1]
    assert last.data["missing"] == []


def test_a_round_in_which_every_trainer_fails_does_not_stop_the_run():
    world = World(3, rounds=6)
    world.heap._train_later, ask = None, world.heap._train_later
    from p2pfed.gossip.events import TrainingEnded

    def sometimes(node, effect):
        if effect.round == 2:
            world.heap.give(node, TrainingEnded(2, "failed", "out of memory"))
        else:
            ask(node, effect)

    world.heap._train_later = sometimes
    world.add(0, 1, 2)
    world.run_to_the_end(100)
    assert_agreement(world)
    assert world.nodes[0].trained_rounds == [0, 1, 3, 4, 5]


def test_a_revocation_in_the_middle_is_folded_alike_by_all():
    world = World(5, rounds=10)
    world.add(*range(5))
    world.run_until(5)
    signed = world.net.publish(world.net.roster.revoke(peer_of(4), reason="x", from_round=2))
    world.heap.give(world.node(0), RosterOffered(signed))
    world.run_until(40)
    rest = [world.node(i) for i in range(4)]
    assert all(n.core.book.current.version == 3 for n in rest)
    assert len({n.hash for n in rest}) == 1
    counted = [c.origin for r in range(2, 10) for c in rest[0].core.facts.counted(r)]
    assert peer_of(4) not in counted


def test_a_new_member_signed_in_the_middle_joins_and_counts():
    world = World(4, rounds=20)
    world.add(*range(4))
    world.run_until(4)
    signed = world.net.grow(hospital(4))
    world.heap.give(world.node(0), RosterOffered(signed))
    world.run_until(6)
    [new] = world.add(4)
    assert new.core.book.current.version == 2
    world.heap.give(new, RosterOffered(signed))
    world.run_to_the_end()
    assert_agreement(world)
    assert new.trained_rounds
    assert any(c.origin == peer_of(4) for r in range(20) for c in new.core.facts.counted(r))


# --- liars ----------------------------------------------------------------------------------------


class Liar:
    """A member that takes part as usual, and besides sends whatever may do harm."""

    def __init__(self, core, world: World, i: int, seed: int) -> None:
        self.core, self.world, self.i = core, world, i
        self.rng = random.Random(seed)
        self.heard: list[bytes] = []

    def __getattr__(self, name):
        return getattr(self.core, name)

    def handle(self, event, now):
        effects = self.core.handle(event, now)
        if hasattr(event, "frame"):
            self.heard = [*self.heard[-50:], event.frame]
        if isinstance(event, Tick) and now < 40:
            peers = [p.peer_id for p in self.core.membership.peers.values() if p.connected]
            effects += [Send(peer, self.harm()) for peer in peers for _ in range(2)]
        return effects

    def delta(self, round_: int, salt: int, **changes) -> Delta:
        run, net = self.world.run, self.world.net
        payload = some_payload(run, round_, self.i, salt)
        return net.delta(run, round_, self.i, payload, roster=net.rosters[1], **changes)

    def harm(self) -> bytes:
        rng, run, book = self.rng, self.world.run, self.core.book
        round_, salt = rng.randrange(run.rounds), rng.randrange(1000)
        stranger = self.world.net.delta(run, round_, rng.randrange(50, 90))
        copied = bytearray(rng.choice(self.heard or [b"x"]))
        copied[rng.randrange(len(copied))] ^= 1 << rng.randrange(8)
        made = rng.choice(
            [
                lambda: rng.randbytes(rng.randrange(200)),
                lambda: bytes(copied),
                lambda: rng.choice(self.heard or [b"x"]),  # an old frame once more
                lambda: Facts((self.delta(round_, salt).encode(),), (), ()),
                lambda: Facts((self.delta(run.rounds - 1, 0).encode(),), (), ()),
                lambda: Facts((self.delta(round_, salt, origin=peer_of(0)).encode(),), (), ()),
                lambda: Facts((stranger.encode(), b"x"), (), ()),
                lambda: Facts((stranger.encode(),), (b"no roster",), ()),
                lambda: Facts((self.delta(1, 0, roster_hash=rng.randbytes(32)).encode(),), (), ()),
                lambda: Have(run.run_id, round_, True, rng.randbytes(16 * 20)),
                lambda: Want(run.run_id, b"".join(sorted(self.core.book.hashes))[: 16 * 2]),
                lambda: Digest(run.run_id, 1 << 31, ()),
                lambda: Checkpoints(
                    run.run_id, (CheckpointOffer(run.rounds, bytes(32), bytes(32), 99),)
                ),
                lambda: Beat(
                    1,
                    rng.choice([book.network_id, bytes(32)]),
                    run.run_id,
                    b"",
                    1 << 31,
                    True,
                    1 << 31,
                    bytes(32),
                    bytes(16),
                    ("/ip4/6.6.6.6/tcp/1",),
                ),
                Leave,
            ]
        )()
        return made if isinstance(made, bytes) else encode_message(made)


def with_a_liar(seed: int, n: int = 5, **constants) -> World:
    world = World(n, seed=seed, rounds=12, **constants)
    world.add(*range(n))
    liar = world.node(n - 1)
    liar.core = Liar(liar.core, world, n - 1, seed)
    world.run_until(45)
    return world


def check_the_honest(world: World, n: int = 5) -> None:
    honest = [world.node(i) for i in range(n - 1)]
    world.heap.crash(world.node(n - 1))
    world.run_to_the_end(200)
    assert_agreement(world)
    for node in honest:
        assert node.trained_rounds == sorted(set(node.trained_rounds))
        assert node.core.why_not_contributing() == ""  # no proof could be made against it
        assert len(node.core._intake._aside) <= EACH
        assert len(node.deltas) <= n * world.run.rounds
        assert len(node.core.facts.proofs) <= 1
        assert len(node.core.book.hashes) == 2
        assert len(node.core._sync.asked) <= 1024 * n
    assert any(notes(node, "peer.blamed") for node in honest)
    assert any(notes(node, "peer.equivocated") for node in honest)
    assert {note.data["peer"] for node in honest for note in notes(node, "peer.blamed")} == {
        peer_of(n - 1)
    }


@pytest.mark.slow
def test_a_garbage_sending_and_lying_peer_crashes_nobody_and_drags_nobody():
    check_the_honest(with_a_liar(0, n=4), n=4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(25))
def test_a_garbage_sending_and_lying_peer_crashes_nobody_and_drags_nobody_many_seeds(seed):
    check_the_honest(with_a_liar(seed))


def test_a_liar_under_a_third_does_not_pull_the_others_to_the_last_round():
    world = World(5, rounds=50)
    world.add(*range(5))
    liar = world.node(4)
    liar.core = Liar(liar.core, world, 4, 1)
    liar.core.harm = lambda: encode_message(Facts((liar.core.delta(49, 0).encode(),), (), ()))
    world.run_until(10)
    honest = [world.node(i) for i in range(4)]
    assert max(n.core.progress.round for n in honest) <= 20
    assert all(n.trained_rounds == list(range(len(n.trained_rounds))) for n in honest)
    assert key_of(4).peer_id == peer_of(4)
