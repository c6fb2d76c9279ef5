"""What the operator sees and may do, and whom the gate lets in."""

from __future__ import annotations

import datetime as dt
import json
import os
import threading
from fractions import Fraction
from pathlib import Path

import pytest
import trio
import trio.testing
from consortium import EXPIRES, Consortium, hospital, peer_of, signed, steward
from node_parts import FakeTrainer, a_node

from p2pfed.errors import ConfigError, NotFound, P2PFedError, PolicyError
from p2pfed.gossip.events import Folded, Received, Tick
from p2pfed.identity.invited import Invited
from p2pfed.identity.roster import Revocation
from p2pfed.network import PeerStats
from p2pfed.node import operator
from p2pfed.node.directory import file_digest
from p2pfed.wire.messages import Witness, encode_message

BOOTSTRAP = {
    "version": 1,
    "network": "n",
    "peer": [{"name": "h1", "addrs": [f"/ip4/127.0.0.1/tcp/4201/p2p/{peer_of(1)}"]}],
}


# --- the view ----------------------------------------------------------------------------------


def everything(view) -> dict:
    shown = {
        name: getattr(view, name)() for name in ("status", "peers", "privacy", "bootstrap", "runs")
    }
    try:
        shown["roster"] = view.roster()
    except NotFound as error:
        shown["roster"] = error.what
    shown["events"] = view.events(0, 100)
    return shown


async def test_all_that_is_shown_can_be_written_as_json_at_every_stage(tmp_path):
    async with a_node(tmp_path, trains=True, config="allow_none = true") as node:
        json.dumps(everything(node.operator), allow_nan=False)
        await node.operator.join(roster=node.consortium.signed[-1], bootstrap=[BOOTSTRAP])
        json.dumps(everything(node.operator), allow_nan=False)
        node.shell.trainer = FakeTrainer(tmp_path)
        await node.with_run()
        node.beat_of(1)
        await node.until(lambda: node.operator.peer("h1")["state"] == "alive")
        shown = json.loads(json.dumps(everything(node.operator), allow_nan=False))
        assert [p["name"] for p in shown["peers"]] == ["h1", "h2"]
        assert shown["status"]["run"]["name"] == "a run"
        assert shown["status"]["peers"]["alive"] == 1
        await node.operator.leave()
        json.dumps(everything(node.operator), allow_nan=False)


async def test_a_peer_is_found_by_name_by_id_and_by_a_unique_beginning(tmp_path):
    async with a_node(tmp_path) as node:
        await node.operator.join(roster=node.consortium.signed[-1], bootstrap=[])
        for text in ("h1", peer_of(1), peer_of(1)[:-5]):
            assert node.operator.peer(text)["peer_id"] == peer_of(1)
        for text in ("h9", "", "12D3", "h", peer_of(0), "\0", "../x"):
            with pytest.raises(NotFound):
                node.operator.peer(text)


async def test_a_node_that_nobody_can_dial_says_so(tmp_path):
    async with a_node(tmp_path) as node:
        await node.operator.join(roster=node.consortium.signed[-1], bootstrap=[])
        assert not any("can dial" in line for line in node.operator.status()["health"])
        node.shell.core.introduction.addresses = ()
        assert any("nobody can dial this" in line for line in node.operator.status()["health"])


async def test_a_peer_with_another_task_or_another_run_is_told_by_its_name(tmp_path):
    async with a_node(tmp_path, config="allow_none = true") as node:
        await node.with_run()
        run = node.shell.run
        node.beat_of(1, task_id=b"\1" * 32)
        node.beat_of(2, task_id=run.task_id, run_id=b"\2" * 32)
        await node.until(lambda: node.operator.status()["peers"]["alive"] == 2)
        told = node.operator.status()["health"]
        assert [line for line in told if "h1" in line] == [
            "h1 has another version of the task installed"
        ]
        assert [line for line in told if "h2" in line] == ["h2 takes part in another run"]
        node.beat_of(1, sequence=2, task_id=run.task_id)
        node.beat_of(2, sequence=2)  # says nothing of its task: it does not train
        await node.until(
            lambda: not [t for t in node.operator.status()["health"] if "h1" in t or "h2" in t]
        )


async def test_a_peer_is_shown_with_the_way_that_leads_to_it(tmp_path):
    async with a_node(tmp_path) as node:
        await node.operator.join(roster=node.consortium.signed[-1], bootstrap=[])
        assert node.operator.peer("h1")["path"] is None
        for peer, via in ((peer_of(1), ""), (peer_of(2), peer_of(1))):
            node.shell.network.figures[peer] = PeerStats(1, 2, 0.0, "outbound", via, 0.012, 0)
        assert node.operator.peer("h1")["path"] == "direct"
        assert node.operator.peer("h1")["path_rtt_ms"] == 12
        assert node.operator.peer("h2")["path"] == "relay h1"


async def test_why_a_node_does_not_contribute_is_said_in_words(tmp_path):
    async with a_node(tmp_path, trains=True) as node:
        node.shell.trainer = FakeTrainer(tmp_path)
        said = lambda: node.operator.status()["contributing"]  # noqa: E731
        assert said() == {"yes": False, "reason": "no run has begun here"}
        node.operator.trainer_ready({"task_id": "00" * 32})
        await node.with_run(**svt(bytes(32)))
        assert said()["reason"].startswith("waiting for witnesses: 2 more")
        for i in (1, 2):
            node.shell.feed(Received(peer_of(i), encode_message(Witness(()))))
        assert said() == {"yes": True, "reason": ""}
        await node.operator.share(False)
        assert said() == {"yes": False, "reason": "sharing is switched off"}
        await node.operator.share(True)
        assert said()["yes"]
        node.shell.trainer.state = "restarting"
        assert said() == {"yes": False, "reason": "the trainer is restarting"}
        node.shell.trainer.state = "ready"
        node.shell.feed(Tick(EXPIRES + dt.timedelta(days=1)))
        node.wall = EXPIRES + dt.timedelta(days=1)
        assert "expired" in said()["reason"]
        assert any("expired" in line for line in node.operator.status()["health"])
        node.operator.trainer_ready({"task_id": "11" * 32})
        node.shell.feed(Tick(EXPIRES - dt.timedelta(days=1)))
        assert "not the one of the run" in said()["reason"]
        node.operator.trainer_ready({"task_id": "00" * 32})
        assert said()["yes"]


# --- actions that are refused ------------------------------------------------------------------


class Refused:
    """Bad requests by name; each is (action, exit code)."""

    def __init__(self, folder: Path) -> None:
        c = Consortium(3)
        foreign = Consortium(3, network="another network")
        later = EXPIRES + dt.timedelta(days=1)
        wrong = folder / "wrong.safetensors"
        wrong.write_bytes(b"wrong")
        pipe = folder / "pipe"
        os.mkfifo(pipe)
        draft = c.roster.next(expires=later)

        def offer(text: bytes):
            return lambda node: node.operator.offer_roster(text)

        def join(roster: bytes | None, *lists: dict):
            return lambda node: node.operator.join(roster=roster, bootstrap=list(lists))

        def run(*by: int, genesis: Path | None = None, **constants):
            return lambda node: node.operator.accept_run(
                node.signed_run(*by, **constants), genesis or node.genesis
            )

        foreign_list = {**BOOTSTRAP, "network_id": "ab" * 32}
        self.of = {
            "roster of garbage": (offer(b"\xff\xfe{"), 7),
            "empty roster": (offer(b""), 7),
            "unsigned roster": (offer(draft.encode()), 7),
            "roster signed by one of two": (offer(signed(draft.encode(), 1)), 7),
            "roster signed by strangers": (offer(signed(draft.encode(), 3, 4)), 7),
            "older roster": (offer(signed(c.rosters[0].next(expires=later).encode())), 7),
            "roster of another network": (offer(foreign.signed[-1]), 7),
            "join with an unsigned roster": (join(draft.encode()), 7),
            "join with a list that is none": (join(None, {"version": 2}), 2),
            "join with a list without identities": (
                join(None, {"version": 1, "peer": [{"addrs": ["/ip4/127.0.0.1/tcp/1"]}]}),
                2,
            ),
            "join with a list of another network": (join(None, BOOTSTRAP, foreign_list), 7),
            "join with a good roster and a foreign list": (
                join(signed(draft.encode()), BOOTSTRAP, foreign_list),
                7,
            ),
            "unsigned run": (
                lambda node: node.operator.accept_run(
                    c.run_draft(genesis=file_digest(node.genesis)).encode(), node.genesis
                ),
                7,
            ),
            "run signed by one of two": (run(0), 7),
            "run of another network": (run(network_id=foreign.rosters[0].hash), 7),
            "run of another task": (run(task_id=b"\x01" * 32), 7),
            "run without privacy": (run(task_id=b"\xab" * 32), 7),
            "another genesis": (run(genesis=wrong, **svt()), 7),
            "a genesis that is not there": (run(genesis=folder / "missing", **svt()), 7),
            "a genesis that is a folder": (run(genesis=folder, **svt()), 7),
            "a genesis that is a pipe": (run(genesis=pipe, **svt()), 7),
            "a genesis without an end": (run(genesis=Path("/dev/zero"), **svt()), 7),
            "a genesis with an impossible name": (run(genesis=Path("a\0b"), **svt()), 7),
            "a genesis of another size": (run(num_parameters=41, **svt()), 7),
        }


def svt(task_id: bytes = b"\xab" * 32) -> dict:
    private = {"mechanism": "svt", "unit": "patient", "epsilon": Fraction(1)}
    share = {"delta": Fraction(1, 100_000), "select_share": Fraction(1, 5)}
    return {"task_id": task_id, **private, **share}


@pytest.mark.parametrize("what", [
    "roster of garbage", "empty roster", "unsigned roster", "roster signed by one of two",
    "roster signed by strangers", "older roster", "roster of another network",
    "join with an unsigned roster", "join with a list that is none",
    "join with a list without identities", "join with a list of another network",
    "join with a good roster and a foreign list", "unsigned run", "run signed by one of two",
    "run of another network", "run of another task", "run without privacy", "another genesis",
    "a genesis that is not there", "a genesis that is a folder", "a genesis that is a pipe",
    "a genesis without an end", "a genesis with an impossible name", "a genesis of another size",
])  # fmt: skip
async def test_what_is_refused_is_refused_with_its_exit_code_and_changes_nothing(tmp_path, what):
    action, code = Refused(tmp_path).of[what]
    async with a_node(tmp_path / "node", trains=True) as node:
        node.shell.trainer = FakeTrainer(tmp_path)
        node.operator.trainer_ready({"task_id": "ab" * 32})
        await node.operator.join(roster=node.consortium.signed[-1], bootstrap=[])
        before = node.public_state()
        with trio.fail_after(30), pytest.raises(P2PFedError) as caught:
            await action(node)
        assert caught.value.exit_code == code
        assert caught.value.what
        assert node.public_state() == before


def test_every_refusal_is_tried(tmp_path):
    tried = test_what_is_refused_is_refused_with_its_exit_code_and_changes_nothing.pytestmark
    (names,) = [mark.args[1] for mark in tried if mark.name == "parametrize"]
    assert set(names) == set(Refused(tmp_path).of)


async def test_without_a_roster_there_is_nothing_to_join_and_no_run_to_accept(tmp_path):
    async with a_node(tmp_path) as node:
        with pytest.raises(PolicyError, match="holds no roster"):
            await node.operator.join(roster=None, bootstrap=[BOOTSTRAP])
        assert node.store.addresses() == {}
        with pytest.raises(PolicyError, match="holds no roster"):
            await node.operator.accept_run(node.signed_run(), node.genesis)
        with pytest.raises(NotFound):
            node.operator.roster()


# --- actions that are taken --------------------------------------------------------------------


async def test_join_believes_the_roster_and_dials_who_is_listed(tmp_path):
    async with a_node(tmp_path) as node:
        told = await node.operator.join(roster=node.consortium.signed[-1], bootstrap=[BOOTSTRAP])
        network = {"network": "test network", "roster_version": 2, "vouched": False}
        network["network_id"] = node.consortium.roster.network_id.hex()
        assert told == {**network, "member": True, "peers": 2, "dialled": 1}
        address = BOOTSTRAP["peer"][0]["addrs"][0]
        assert ("keep", peer_of(1), (address,)) in node.network.asked
        assert node.directory.rosters() == [node.consortium.signed[-1]]


@pytest.mark.parametrize("vouched_by", ["nobody", "an id", "an invite"])
async def test_a_first_roster_that_nothing_vouches_for_is_told_until_its_id_is_pinned(
    tmp_path, vouched_by
):
    def told(node) -> list[str]:
        return [line for line in node.operator.status()["health"] if "vouched" in line]

    c = Consortium(3)
    pinned = f'[network]\nid = "{c.roster.network_id.hex()}"\n'
    if vouched_by == "an invite":
        Invited("test network", c.roster.network_id, steward(0).key).write(tmp_path)
    config = pinned if vouched_by == "an id" else ""
    async with a_node(tmp_path, consortium=c, config=config) as node:
        assert told(node) == []
        answer = await node.operator.join(roster=c.signed[-1], bootstrap=[])
        assert answer["vouched"] == (vouched_by != "nobody")
        assert len(told(node)) == (vouched_by == "nobody")
    async with a_node(tmp_path, consortium=c, config=config) as node:
        assert len(told(node)) == (vouched_by == "nobody")  # and a restart forgets nothing
    if vouched_by == "nobody":
        async with a_node(tmp_path, consortium=c, config=pinned) as node:
            assert told(node) == []


async def test_leave_is_remembered_and_join_takes_it_back(tmp_path):
    async with a_node(tmp_path) as node:
        await node.operator.join(roster=node.consortium.signed[-1], bootstrap=[BOOTSTRAP])
        node.beat_of(1)
        await node.until(lambda: node.operator.peer("h1")["state"] == "alive")
        await node.operator.leave()
        assert node.store.recall("left") is True
        status = node.operator.status()
        assert not status["present"]
        assert status["contributing"] == {"yes": False, "reason": "this node has left the network"}
        assert ("stop", peer_of(1)) in node.network.asked
        asked = len(node.network.asked)
        node.shell.feed(Tick(node.wall))
        assert len(node.network.asked) == asked  # who has left is silent
        await node.operator.join(roster=None, bootstrap=[])
        assert node.store.recall("left") is False
        assert node.operator.status()["present"]
        assert node.network.asked[-1] == ("keep", peer_of(1), (BOOTSTRAP["peer"][0]["addrs"][0],))


async def test_a_blocked_member_is_told_of_until_it_is_not_blocked_any_more(tmp_path):
    async with a_node(tmp_path) as node:
        await node.operator.join(roster=node.consortium.signed[-1], bootstrap=[BOOTSTRAP])
        await node.operator.block("h1", on=True)
        told = "h1 is blocked here; to undo: p2pfed unblock h1"
        assert told in node.operator.status()["health"]
        await node.operator.block("h1", on=False)
        assert told not in node.operator.status()["health"]


def waits_for_a_model(node) -> str:
    """The line of the status that says so."""
    lines = node.operator.status()["health"]
    return next((line for line in lines if "waits for its first model" in line), "")


async def test_a_run_without_its_first_model_waits_and_fetches_it_from_a_peer(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(operator, "GENESIS_RETRY", 0.01)
    async with a_node(tmp_path) as node:
        await node.operator.join(roster=node.consortium.signed[-1], bootstrap=[])
        data, digest = node.genesis.read_bytes(), file_digest(node.genesis)
        await node.operator.accept_run(node.signed_run(), None)
        await node.until(lambda: waits_for_a_model(node))
        node.beat_of(2)
        node.network.files[peer_of(2), digest] = data
        await node.until(lambda: node.shell.run is not None)
        assert node.directory.blob(digest).read_bytes() == data


async def test_the_node_lives_on_while_an_operators_first_model_is_checked_and_copied(
    tmp_path, monkeypatch
):
    lived, real, at_once = threading.Event(), operator.take_genesis, []

    def slowly(*arguments):
        at_once.append("begins")
        assert lived.wait(30), "nothing else went on meanwhile"
        real(*arguments)
        at_once.append("ends")

    monkeypatch.setattr(operator, "take_genesis", slowly)
    async with a_node(tmp_path) as node, trio.open_nursery() as nursery:
        await node.operator.join(roster=node.consortium.signed[-1], bootstrap=[])
        for _ in range(2):
            nursery.start_soon(node.operator.accept_run, node.signed_run(), node.genesis)
        await node.until(lambda: at_once)
        lived.set()
        await node.until(lambda: node.shell.run is not None)
    assert at_once == ["begins", "ends"] * 2  # both write to one place


async def a_kept_genesis(folder):
    """Of a node that has stopped: its first model's hash, the bytes, and where they lie."""
    async with a_node(folder) as node:
        await node.with_run()
        digest = node.shell.run.genesis
        return digest, node.genesis.read_bytes(), folder / "blobs" / digest.hex()


async def test_a_first_model_that_rotted_on_the_disk_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setattr(operator, "GENESIS_RETRY", 0.01)
    digest, data, blob = await a_kept_genesis(tmp_path)
    blob.write_bytes(data[:-1])
    async with a_node(tmp_path) as node:
        node.operator.resume()
        node.network.files[peer_of(1), digest] = data
        node.beat_of(1)
        await node.until(lambda: node.shell.run is not None)
        assert blob.read_bytes() == data


async def test_a_first_model_that_cannot_be_read_is_told_and_ends_no_daemon(tmp_path, monkeypatch):
    monkeypatch.setattr(operator, "GENESIS_RETRY", 0.01)
    digest, data, blob = await a_kept_genesis(tmp_path)
    blob.unlink()
    blob.mkdir()  # what root can read no more than anybody else
    async with a_node(tmp_path) as node:
        node.operator.resume()
        node.network.files[peer_of(1), digest] = data
        node.beat_of(1)
        await node.until(lambda: "cannot be read: Is a directory" in waits_for_a_model(node))
        assert str(blob) in waits_for_a_model(node)
        blob.rmdir()
        await node.until(lambda: node.shell.run is not None)
        assert not waits_for_a_model(node)


@pytest.mark.parametrize("damage", ["empty", "garbage", "unsigned", "missing"])
async def test_a_damaged_run_file_is_an_event_and_the_node_lives(tmp_path, damage):
    async with a_node(tmp_path) as node:
        await node.with_run()
        (path,) = (tmp_path / "runs").iterdir()
    text = path.read_bytes()
    changed = {"empty": b"", "garbage": b"\xff\0", "unsigned": text.partition(b"\n-- ")[0]}
    path.unlink() if damage == "missing" else path.write_bytes(changed[damage])
    async with a_node(tmp_path) as node:
        node.operator.resume()
        assert "run.rejected" in node.kinds()
        assert node.operator.runs() == []
        json.dumps(everything(node.operator), allow_nan=False)
        await node.operator.accept_run(node.signed_run(), node.genesis)
        await node.until(lambda: node.shell.run is not None)


async def test_training_is_paused_and_goes_on_and_both_are_remembered(tmp_path):
    async with a_node(tmp_path, trains=True, config="allow_none = true") as node:
        await node.with_run()
        node.shell.trainer = trainer = FakeTrainer(tmp_path)
        status = node.operator.status
        assert await node.operator.pause(True) == {"paused": True}
        await node.operator.pause(True)
        assert trainer.paused
        assert node.store.recall("paused") is True
        assert status()["contributing"] == {"yes": False, "reason": "training is paused"}
        assert status()["trainer"]["state"] == "paused"
        assert any("p2pfed task resume" in line for line in status()["health"])
        assert await node.operator.pause(False) == {"paused": False}
        assert node.store.recall("paused") is False
        assert status()["trainer"]["state"] == "ready"
        assert "training is paused" not in str(status())
        told = [kind for kind in node.kinds() if kind.startswith("task.")]
        assert told == ["task.paused", "task.resumed"]


async def test_a_node_whose_run_is_finished_says_that_it_releases_nothing_more(
    tmp_path, monkeypatch
):
    async with a_node(tmp_path, trains=True, config="allow_none = true") as node:
        await node.with_run(rounds=1)
        node.shell.trainer = FakeTrainer(tmp_path)
        monkeypatch.setattr(node.core, "why_not_contributing", lambda: "")
        assert node.operator.status()["contributing"] == {"yes": True, "reason": ""}
        node.core.progress._go_to(1)
        told = node.operator.status()["contributing"]
        assert told == {"yes": False, "reason": "the run is finished"}
        (gauge,) = [f for f in node.operator.metrics() if f.name == "p2pfed_contributing"]
        assert list(gauge.samples) == [((), 0)]


async def test_a_node_without_a_trainer_has_nothing_to_pause(tmp_path):
    async with a_node(tmp_path) as node:
        with pytest.raises(PolicyError, match="no training to pause") as caught:
            await node.operator.pause(True)
        assert "train.enabled" in caught.value.do
        assert node.store.recall("paused") is None


async def test_a_node_that_waits_for_a_training_loop_says_so_and_how(tmp_path):
    async with a_node(tmp_path, trains=True) as node:
        node.shell.trainer = trainer = FakeTrainer(tmp_path)
        trainer.state = "waiting for a training loop to join"
        trainer.hint = "start your training loop: p2pfed.join(...), through /run/loop.sock"
        status = node.operator.status()
        assert status["contributing"]["reason"] == trainer.state
        assert status["trainer"]["state"] == trainer.state
        assert trainer.hint in status["health"]


async def test_a_run_that_is_accepted_frees_a_loop_from_the_last_one(tmp_path):
    async with a_node(tmp_path, trains=True, config="allow_none = true") as node:
        node.shell.trainer = trainer = FakeTrainer(tmp_path)
        await node.with_run()
        await node.until(lambda: trainer.left == ["another run was accepted"])


async def test_a_trainer_that_comes_after_the_end_of_a_run_is_shown_its_last_model(tmp_path):
    async with a_node(tmp_path, trains=True, config="allow_none = true") as node:
        await node.with_run(rounds=1)
        node.shell.trainer = trainer = FakeTrainer(tmp_path)
        node.operator.trainer_ready({"task_id": node.shell.run.task_id.hex()})
        await trio.testing.wait_all_tasks_blocked()
        assert trainer.requests == []  # rounds will come
        node.core.progress._go_to(1)
        node.core.progress.folding.folded = Folded(1, bytes(32), bytes(32))
        node.operator.trainer_ready({"task_id": node.shell.run.task_id.hex()})
        await node.until(lambda: trainer.requests)
        asked = trainer.requests[0]
        assert (asked["op"], asked["round"], asked["run"]) == ("evaluate", 1, node.shell.run_text)


async def test_status_tells_how_long_the_last_round_took(tmp_path):
    async with a_node(tmp_path) as node:
        assert node.operator.status()["round_seconds"] is None
        node.shell.clock.note("round.started", {"round": 3}, 10.0)
        node.shell.clock.trained(3, 14.0)
        node.shell.clock.note("round.finished", {"round": 3}, 15.5)
        told = {"round": 3, "seconds": 5.5, "waiting": 1.5}
        assert node.operator.status()["round_seconds"] == told


async def test_another_run_takes_the_place_of_the_first(tmp_path):
    async with a_node(tmp_path) as node:
        await node.with_run()
        await node.operator.accept_run(node.signed_run(name="second"), node.genesis)
        await node.until(lambda: node.shell.run.name == "second")
        active = {run["name"]: run["active"] for run in node.operator.runs()}
        assert active == {"a run": False, "second": True}


async def test_an_accepted_run_goes_on_after_the_stewards_were_replaced(tmp_path):
    consortium = Consortium(3)
    async with a_node(tmp_path, consortium=consortium) as node:
        await node.with_run()
        from consortium import steward

        draft = consortium.roster.next(stewards=[steward(2), steward(3), steward(4)])
        await node.operator.offer_roster(signed(draft.encode(), 0, 1, 2, 3))
    async with a_node(tmp_path, consortium=consortium) as node:
        node.operator.resume()
        await node.until(lambda: node.shell.run is not None)
        assert "run.rejected" not in node.kinds()
        assert [run["name"] for run in node.operator.runs()] == ["a run"]


# --- the gate ----------------------------------------------------------------------------------


async def test_before_a_roster_nobody_is_let_in_and_none_is_learnt_from_strangers(tmp_path):
    async with a_node(tmp_path) as node:
        assert not node.gate.is_member(peer_of(1))
        assert node.gate.current_roster() == b""
        assert not node.gate.consider_roster(peer_of(1), node.consortium.signed[-1])
        assert node.core.book.current is None
        assert node.gate.open_blob(peer_of(1), bytes(32)) is None
        node.gate.shell = None  # as long as the node is not composed
        assert not node.gate.is_member(peer_of(1))
        assert not node.gate.consider_roster(peer_of(1), node.consortium.signed[-1])
        assert node.gate.current_roster() == b""


async def test_members_are_let_in_strangers_and_the_revoked_are_not(tmp_path):
    async with a_node(tmp_path) as node:
        c = node.consortium
        await node.operator.join(roster=c.signed[-1], bootstrap=[])
        assert node.gate.is_member(peer_of(2))
        assert not node.gate.is_member(peer_of(3))
        revoked = c.roster.next(
            members=[hospital(0), hospital(1)],
            revoked=[Revocation(peer_of(2), "left the consortium", 0)],
        )
        await node.operator.offer_roster(c.publish(revoked))
        assert not node.gate.is_member(peer_of(2))
        assert node.gate.is_member(peer_of(1))


async def test_a_stranger_gets_in_by_a_newer_roster_that_verifies_and_lists_it(tmp_path):
    async with a_node(tmp_path) as node:
        c = node.consortium
        await node.operator.join(roster=c.signed[-1], bootstrap=[])
        assert not node.gate.consider_roster(peer_of(3), c.signed[-1])
        draft = c.roster.next(members=[*c.roster.members, hospital(3)])
        assert not node.gate.consider_roster(peer_of(3), signed(draft.encode(), 1))
        assert node.core.book.current.version == 2
        newer = signed(draft.encode())
        assert not node.gate.consider_roster(peer_of(4), newer)  # verifies, does not list it
        assert node.gate.current_roster() == newer
        assert node.gate.consider_roster(peer_of(3), newer)


async def test_after_leave_nobody_is_let_in_whatever_they_bring(tmp_path):
    async with a_node(tmp_path) as node:
        await node.with_run()
        digest = node.shell.run.genesis
        assert node.gate.open_blob(peer_of(1), digest) is not None
        await node.operator.leave()
        newer = node.consortium.grow(hospital(3))
        assert not node.gate.is_member(peer_of(1))
        assert not node.gate.consider_roster(peer_of(3), newer)
        assert node.core.book.current.version == 2
        assert node.gate.open_blob(peer_of(1), digest) is None


async def test_members_get_the_first_model_and_checkpoints_and_no_other_file(tmp_path):
    async with a_node(tmp_path) as node:
        await node.with_run()
        from p2pfed.gossip.fold import genesis_state
        from p2pfed.node.checkpoints import read_genesis

        run = node.shell.run
        state = genesis_state(read_genesis(node.genesis, run), run)
        node.shell.model.checkpoints.save(state, b"\x05" * 32)
        (offer,) = [o for o in node.shell.model.checkpoints.offers() if o.chain == b"\x05" * 32]
        opened = {d: node.gate.open_blob(peer_of(1), d) for d in (run.genesis, offer.digest)}
        assert all(path is not None and file_digest(path) == d for d, path in opened.items())
        (run_file,) = (tmp_path / "runs").iterdir()
        for other in (node.file, run_file, node.directory.store):
            assert node.gate.open_blob(peer_of(1), file_digest(other)) is None
        assert node.gate.open_blob(peer_of(3), run.genesis) is None


def test_config_errors_are_told_apart_from_policy():
    assert (ConfigError.exit_code, PolicyError.exit_code) == (2, 7)
