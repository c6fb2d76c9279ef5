"""Reading the configuration again: what changes at once, what waits, what is refused whole."""

from __future__ import annotations

import logging
import os
import threading

import pytest
import trio
from consortium import peer_of
from node_parts import a_node

from p2pfed.config import Settings, load_settings
from p2pfed.errors import ConfigError
from p2pfed.node import reload
from p2pfed.node.logs import LogHandler, begin_logging
from p2pfed.node.reload import LIVE, OF_TRAINER, changes

PLAIN = '[node]\nname = "h0"\ndata_dir = "."\n'
UNTRAINED = "[train]\nenabled = false\n"


def test_every_key_that_is_named_here_exists_and_has_one_fate():
    known = {
        f"{section}.{key}"
        for section, field in Settings.model_fields.items()
        for key in field.annotation.model_fields
    }
    assert known >= LIVE | OF_TRAINER
    assert not LIVE & OF_TRAINER
    assert {key for key in known if key.startswith("privacy.")} <= OF_TRAINER


async def test_nothing_has_changed_where_the_file_is_the_same(tmp_path):
    async with a_node(tmp_path) as node:
        assert await node.operator.reload() == {
            "applied": [],
            "restart_trainer": [],
            "restart_daemon": [],
        }
        assert node.kinds() == ["config.reloaded"]
        assert not any("configuration" in line for line in node.operator.status()["health"])


async def test_what_can_change_at_once_does_and_the_rest_is_named(tmp_path):
    async with a_node(tmp_path) as node:
        node.file.write_text(
            PLAIN.replace("h0", "h1")
            + UNTRAINED
            + '[admin]\noperators = ["4001"]\n'
            + "[network]\nupload_limit_mbit = 8\nallowed_networks = ['192.0.2.0/24']\n"
            + '[privacy]\nepsilon = "11"\n'
        )
        assert await node.operator.reload() == {
            "applied": [
                "admin.operators",
                "network.allowed_networks",
                "network.upload_limit_mbit",
            ],
            "restart_trainer": ["privacy.epsilon"],
            "restart_daemon": ["node.name"],
        }
        assert node.operator.operators == {4001}
        assert node.network.of("limit_upload") == [(1_000_000,)]
        assert node.network.of("allow") == [(("192.0.2.0/24",),)]
        status = node.operator.status()
        assert status["name"] == "h0"
        assert any(
            "restart the daemon" in line and "node.name" in line for line in status["health"]
        )
        assert (await node.operator.reload())["applied"] == []


async def test_a_budget_in_the_file_counts_from_the_trainers_next_start(tmp_path):
    async with a_node(tmp_path, trains=True) as node:
        text = node.file.read_text()
        node.file.write_text(text.replace('epsilon = "10"', 'epsilon = "12"'))
        assert (await node.operator.reload())["restart_trainer"] == ["privacy.epsilon"]
        assert node.operator.privacy()["epsilon"] == 10
        node.operator.trainer_ready({"task_id": "00" * 32})
        assert node.operator.privacy()["epsilon"] == 12


WRONG = {
    "no TOML": "[node\n",
    "an unknown key": PLAIN + UNTRAINED + "[admin]\nopperators = []\n",
    "an unknown user": PLAIN + UNTRAINED + '[admin]\noperators = ["no-such-user-at-all"]\n',
    "a list that is not there": PLAIN + UNTRAINED + "[network]\nbootstrap = ['nowhere.toml']\n",
    "a list that is none": PLAIN + UNTRAINED + "[network]\nbootstrap = ['p2pfed.toml']\n",
    "nothing": None,
    "no text": b"\xff\xfe",
}


@pytest.mark.parametrize("what", WRONG)
async def test_a_wrong_file_changes_nothing_and_is_told_until_a_good_reload(tmp_path, what):
    async with a_node(tmp_path) as node:
        good, bad = node.file.read_text(), WRONG[what]
        before = node.operator.status()["health"]
        node.file.unlink()
        if bad is not None:
            node.file.write_bytes(bad if isinstance(bad, bytes) else bad.encode())
        with pytest.raises(ConfigError) as told:
            await node.operator.reload()
        assert "nothing was changed" in told.value.what
        assert told.value.do
        assert node.operator.operators == frozenset()
        assert not node.network.of("limit_upload")
        added = [line for line in node.operator.status()["health"] if line not in before]
        assert len(added) == 1
        assert "was not read again" in added[0]
        assert node.kinds() == ["config.refused"]
        node.file.write_text(good)
        await node.operator.reload()
        assert node.operator.status()["health"] == before


@pytest.mark.parametrize("what", ["the file", "a list"])
async def test_a_pipe_is_refused_and_the_next_reload_reads_again(tmp_path, what):
    async with a_node(tmp_path) as node:
        good = node.file.read_text()
        pipe = node.file if what == "the file" else tmp_path / "list.toml"
        if what == "the file":
            node.file.unlink()
        else:
            node.file.write_text(good + "[network]\nbootstrap = ['list.toml']\n")
        os.mkfifo(pipe)
        with pytest.raises(ConfigError, match=f"{pipe}: nothing was changed") as told:
            await node.operator.reload()
        assert "no regular file" in told.value.why
        pipe.unlink()
        node.file.write_text(good)
        assert (await node.operator.reload())["applied"] == []


async def test_a_file_that_does_not_answer_is_given_up_in_time(tmp_path, monkeypatch):
    answers = threading.Event()
    read = reload.read_anew
    monkeypatch.setattr(reload, "READ_SECONDS", 0.05)
    try:
        async with a_node(tmp_path) as node:
            monkeypatch.setattr(reload, "read_anew", lambda _: answers.wait(60))
            with pytest.raises(ConfigError, match="could not be read within") as told:
                await node.operator.reload()
            assert told.value.why and told.value.do
            monkeypatch.setattr(reload, "read_anew", read)
            monkeypatch.setattr(reload, "READ_SECONDS", 30.0)
            assert (await node.operator.reload())["applied"] == []  # the turn was given back
    finally:
        answers.set()


async def test_whoever_waits_for_a_file_can_be_cancelled(tmp_path, monkeypatch):
    """Else a daemon would not hear a SIGTERM."""
    answers = threading.Event()
    try:
        async with a_node(tmp_path) as node:
            monkeypatch.setattr(reload, "read_anew", lambda _: answers.wait(60))
            with trio.move_on_after(0.05) as scope:
                await node.operator.reload()
            assert scope.cancelled_caught
    finally:
        answers.set()


async def test_a_flag_of_the_start_still_holds_after_a_reload(tmp_path, monkeypatch):
    async with a_node(tmp_path) as node:
        settings = reload.read_anew(node.operator._settings).settings
        monkeypatch.setenv("P2PFED_LOG__LEVEL", "debug")
        flagged = type(settings).read_again(settings)
        assert changes(settings, flagged).live == ("log.level",)
        begun = load_settings(node.file, flags={"admin.socket": str(tmp_path / "x.sock")})
        assert begun.read_again().admin_socket == tmp_path / "x.sock"


async def test_the_level_of_the_log_changes_at_once(tmp_path):
    async with a_node(tmp_path) as node:
        begin_logging(node.operator._settings)
        node.file.write_text(node.file.read_text() + '\n[log]\nlevel = "error"\n')
        assert (await node.operator.reload())["applied"] == ["log.level"]
        own = [h for h in logging.getLogger().handlers if isinstance(h, LogHandler)]
        assert [h.level for h in own] == [logging.ERROR]


async def test_a_list_of_peers_is_dialled_at_once(tmp_path):
    async with a_node(tmp_path) as node:
        await node.operator.join(roster=node.consortium.signed[-1], bootstrap=[])
        (tmp_path / "list.toml").write_text(
            f'version = 1\nnetwork = "n"\n[[peer]]\nname = "h1"\n'
            f'addrs = ["/ip4/127.0.0.1/tcp/4201/p2p/{peer_of(1)}"]\n'
        )
        text = node.file.read_text()
        node.file.write_text(text + "\n[network]\nbootstrap = ['list.toml']\n")
        assert (await node.operator.reload())["applied"] == ["network.bootstrap"]
        assert [p["name"] for p in node.operator.bootstrap()] == ["h1"]
        assert peer_of(1) in {peer for peer, _ in node.network.of("keep")}


async def test_a_write_is_on_the_disk_before_it_is_answered(tmp_path):
    async with a_node(tmp_path) as node:
        node.operator.note_write(1000, "alice", "POST /v1/share", "done")
        (event,) = [e for e in node.store.events(0, 10) if "admin.write" in e]
        for word in ('"uid": 1000', '"user": "alice"', '"outcome": "done"'):
            assert word in event
