"""What the operator sees and may do, and whom the gate lets in."""

from __future__ import annotations

import datetime as dt
import json
import os
from fractions import Fraction
from pathlib import Path

import pytest
import trio
from consortium import EXPIRES, Consortium, hospital, peer_of, signed
from node_parts import FakeTrainer, a_node

from p2pfed.errors import ConfigError, NotFound, P2PFedError, PolicyError
from p2pfed.gossip.events import Received, Tick
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
        node.shell.core.addresses = ()
        assert any("nobody can dial this" in line for line in node.operator.status()["health"])


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


@pytest.mark.timeout(20)
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
        with trio.fail_after(5), pytest.raises(P2PFedError) as caught:
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
        assert told == {"network": "test network", "roster_version": 2, "member": True, "peers": 2}
        address = BOOTSTRAP["peer"][0]["addrs"][0]
        assert ("keep", peer_of(1), (address,)) in node.network.asked
        assert node.directory.rosters() == [node.consortium.signed[-1]]


async def test_leave_is_remembered_and_join_takes_it_back(tmp_path):
    async with a_node(tmp_path) as node:
        await node.operator.join(roster=node.consortium.signed[-1], bootstrap=[BOOTSTRAP])
        node.beat_of(1)
        await node.until(lambda: node.operator.peer("h1")["state"] == "alive")
        await node.operator.leave()
        assert node.store.recall("left") is True
        assert not node.operator.status()["present"]
        assert ("stop", peer_of(1)) in node.network.asked
        asked = len(node.network.asked)
        node.shell.feed(Tick(node.wall))
        assert len(node.network.asked) == asked  # who has left is silent
        await node.operator.join(roster=None, bootstrap=[])
        assert node.store.recall("left") is False
        assert node.operator.status()["present"]
        assert node.network.asked[-1] == ("keep", peer_of(1), (BOOTSTRAP["peer"][0]["addrs"][0],))


async def test_a_run_without_its_first_model_waits_and_fetches_it_from_a_peer(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(operator, "GENESIS_RETRY", 0.01)
    async with a_node(tmp_path) as node:
        await node.operator.join(roster=node.consortium.signed[-1], bootstrap=[])
        data, digest = node.genesis.read_bytes(), file_digest(node.genesis)
        await node.operator.accept_run(node.signed_run(), None)
        await node.until(lambda: node.operator.status()["health"])
        assert "waits for its first model" in " ".join(node.operator.status()["health"])
        node.beat_of(2)
        node.network.files[peer_of(2), digest] = data
        await node.until(lambda: node.shell.run is not None)
        assert node.directory.blob(digest).read_bytes() == data


async def test_a_first_model_that_rotted_on_the_disk_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setattr(operator, "GENESIS_RETRY", 0.01)
    async with a_node(tmp_path) as node:
        await node.with_run()
        digest = node.shell.run.genesis
        data = node.genesis.read_bytes()
    blob = tmp_path / "blobs" / digest.hex()
    blob.write_bytes(data[:-1])
    async with a_node(tmp_path) as node:
        node.operator.resume()
        node.network.files[peer_of(1), digest] = data
        node.beat_of(1)
        await node.until(lambda: node.shell.run is not None)
        assert blob.read_bytes() == data


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
