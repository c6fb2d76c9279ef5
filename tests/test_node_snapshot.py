"""The model with its facts as one file: of one round, in every mode, with and without a trainer."""

from __future__ import annotations

import json
import resource
import signal
from collections import Counter

import numpy as np
import pytest
import trio
import trio.testing
from consortium import Consortium, hospital, peer_of
from node_parts import a_node, plan
from safetensors.numpy import load

from p2pfed.errors import ConfigError, NotFound
from p2pfed.gossip.events import Fold
from p2pfed.gossip.facts import Counted
from p2pfed.gossip.fold import ModelState, genesis_state, model_hash, view_of
from p2pfed.identity.rules import Averaging, Encoding
from p2pfed.node.snapshot import Snapshot, Tally, write_snapshot


def facts_of(data: bytes) -> dict:
    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["p2pfed"])


async def fetched(node) -> tuple[np.ndarray, dict]:
    with await node.operator.model() as file:
        data = file.read()
    tensors = load(data)
    assert set(tensors) == {"model"}
    return tensors["model"], facts_of(data)


def a_state(round_: int = 4, size: int = 600_000) -> ModelState:
    model = np.arange(size, dtype=np.int32) * 7 - 1_000_000
    return ModelState(round_, model, np.zeros(0), np.zeros(0))


# --- the file ----------------------------------------------------------------------------------


def test_a_snapshot_holds_the_bits_of_the_view_and_has_no_name(tmp_path):
    state = a_state()
    snapshot = Snapshot(state, b"c" * 32, Counter(), 0)
    with write_snapshot(snapshot, tmp_path, grid_bits=11, facts={"name": "Çelik"}) as file:
        data = file.read()
    assert np.array_equal(load(data)["model"], view_of(state, 11))
    assert facts_of(data) == {"name": "Çelik", "model_hash": model_hash(state).hex()}
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_a_snapshot_is_told_and_leaves_nothing(tmp_path):
    snapshot = Snapshot(a_state(size=10), b"", Counter(), 0)
    with pytest.raises(OSError, match="No such file"):
        write_snapshot(snapshot, tmp_path / "nowhere", grid_bits=11, facts={})


@pytest.mark.slow
def test_a_full_disk_is_three_lines(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ConfigError, match="cannot write a copy of the model") as caught:
            write_snapshot(Snapshot(a_state(), b"", Counter(), 0), tmp_path, grid_bits=1, facts={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(str(caught.value).splitlines()) == 3


# --- whose deltas ------------------------------------------------------------------------------


def a_fold(round_: int, first: int, *rounds: str, adopted: int = 0) -> Fold:
    plan = tuple(tuple(Counted(b"", origin, 1) for origin in origins) for origins in rounds)
    return Fold(round_, tuple(bytes(32) for _ in range(first, round_ + 1)), plan, adopted, first)


def test_origins_are_those_of_the_plans_that_were_folded():
    tally = Tally()
    tally.take(a_fold(2, 0, "ab", "a"))
    assert tally.snapshot(a_state(2), b"").origins == {"a": 2, "b": 1}
    tally.take(a_fold(3, 2, "abc"))  # goes on from round 2
    assert tally.snapshot(a_state(3), b"").origins == {"a": 3, "b": 2, "c": 1}
    tally.take(a_fold(3, 1, "ab", "abc"))  # a late delta of b for round 1 counts now
    assert tally.snapshot(a_state(3), b"").origins == {"a": 3, "b": 3, "c": 1}
    tally.take(a_fold(3, 0, "b", "b", "bc"))  # a is taken out
    assert tally.snapshot(a_state(3), b"").origins == {"b": 3, "c": 1}


def test_what_a_believed_checkpoint_holds_is_said_to_be_unknown():
    tally = Tally()
    tally.take(a_fold(3, 0, "", "a", "ab", adopted=2))
    snapshot = tally.snapshot(a_state(3), b"")
    assert (snapshot.origins, snapshot.known_from) == ({"a": 2, "b": 1}, 2)


# --- the node ----------------------------------------------------------------------------------


async def test_without_a_run_there_is_no_model_and_it_says_what_to_do(tmp_path):
    async with a_node(tmp_path) as node:
        with pytest.raises(NotFound, match="no run") as caught:
            await node.operator.model()
        assert "p2pfed run accept" in caught.value.do


async def test_before_the_first_round_there_is_no_model_yet(tmp_path):
    async with a_node(tmp_path) as node:
        await node.with_run()
        with pytest.raises(NotFound, match="no model here yet"):
            await node.operator.model()


async def folded(node, round_: int) -> None:
    await trio.to_thread.run_sync(node.shell.model.fold, plan(node, round_))


def given(node, i: int, round_: int) -> None:
    """A delta of hospital i is held."""
    delta = node.consortium.delta(node.shell.run, round_, i)
    node.store.keep_delta(delta, durable=False)
    node.core.facts.add(delta.signed)


@pytest.mark.parametrize("trains", [True, False])
async def test_the_model_comes_with_facts_of_its_round(tmp_path, trains):
    async with a_node(tmp_path, trains=trains, config="allow_none = true") as node:
        await node.with_run()
        run = node.shell.run
        for i, round_ in ((1, 0), (2, 0), (1, 1)):
            given(node, i, round_)
        await folded(node, 2)
        node.shell.spent = {"spent_epsilon": 1.5, "releases": 7}
        model, facts = await fetched(node)
        state = node.shell.model.newest().state
        assert np.array_equal(model, view_of(state, run.grid_bits))
        assert facts["model_hash"] == model_hash(state).hex()
        assert facts["chain"] == node.core.facts.chain(2).hex()
        assert (facts["round"], facts["deltas"]) == (2, {"h1": 2, "h2": 1})
        assert (facts["run"], facts["run_id"]) == (run.name, run.run_id.hex())
        assert (facts["task"], facts["task_id"]) == (run.task, run.task_id.hex())
        assert (facts["spent_epsilon"], facts["releases"]) == (1.5, 7)
        assert facts["roster_version"] == node.book.current.version
        assert facts["mechanism"] == "none"
        assert facts["v"] == 1
        given(node, 2, 1)  # a delta that comes later changes neither the model nor its facts
        again, later = await fetched(node)
        assert np.array_equal(model, again)
        assert later == facts


async def test_after_a_restart_the_newest_checkpoint_is_given(tmp_path):
    async with a_node(tmp_path) as node:
        await node.with_run()
        given(node, 1, 0)
        await folded(node, 1)
        model, facts = await fetched(node)
        consortium = node.consortium
    async with a_node(tmp_path, consortium=consortium) as node:
        node.operator.resume()
        await node.until(lambda: node.shell.run is not None)
        again, later = await fetched(node)
        assert np.array_equal(model, again)
        assert later == facts
        given(node, 2, 0)  # now the facts tell of another model than the checkpoint's
        again, later = await fetched(node)
        assert np.array_equal(model, again)
        assert later["deltas"] is None


async def test_a_damaged_checkpoint_is_not_given(tmp_path):
    async with a_node(tmp_path) as node:
        await node.with_run()
        await folded(node, 1)
        consortium, run_id = node.consortium, node.shell.run.run_id
    for file in (tmp_path / "checkpoints" / run_id.hex()).glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    async with a_node(tmp_path, consortium=consortium) as node:
        node.operator.resume()
        await node.until(lambda: node.shell.run is not None)
        with pytest.raises(NotFound, match="no model here yet"):
            await node.operator.model()


async def test_a_model_is_not_read_while_it_is_folded(tmp_path):
    async with a_node(tmp_path) as node:
        await node.with_run()
        await folded(node, 0)
        taken = []

        async def take() -> None:
            taken.append(await fetched(node))

        async with trio.open_nursery() as nursery, node.shell.fold_turn:
            nursery.start_soon(take)
            await trio.testing.wait_all_tasks_blocked()
            assert taken == []
        assert len(taken) == 1


async def test_in_pairwise_mode_the_node_gives_its_own_model(tmp_path):
    async with a_node(tmp_path, config="allow_none = true") as node:
        await node.with_run(averaging=Averaging(mode="pairwise"), encoding=Encoding(values="int8"))
        model, facts = await fetched(node)
        state = genesis_state(np.linspace(-1, 1, 40, dtype=np.float32), node.shell.run)
        assert np.array_equal(model, view_of(state, node.shell.run.grid_bits))
        assert (facts["averaging"], facts["round"], facts["deltas"]) == ("pairwise", 0, {})


async def test_a_hospital_with_a_new_key_and_its_old_one_are_told_apart_by_their_ids(tmp_path):
    consortium = Consortium(3)
    async with a_node(tmp_path, consortium=consortium) as node:
        await node.with_run()
        for i in (1, 2):
            given(node, i, 0)
        await folded(node, 1)
        members = [hospital(0), hospital(2), hospital(3, name="h1")]
        draft = consortium.roster.next(members=members)
        await node.operator.offer_roster(consortium.publish(draft))
        given(node, 3, 1)
        await folded(node, 2)
        _, facts = await fetched(node)
        assert facts["deltas"] == {peer_of(1): 1, peer_of(3): 1, "h2": 1}
        assert facts["roster_version"] == 3
