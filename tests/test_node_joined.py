"""A training loop that joins through a socket: one at a time, and nothing it does ends the node."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from admin_fakes import short_folder

from p2pfed.errors import ConfigError, StateInUse, TrainerError
from p2pfed.node import joined as module
from p2pfed.node import trainer as trainers
from p2pfed.node.conversation import MAX_LINE
from p2pfed.node.joined import Joined
from p2pfed.node.trainer import Trainer

TASK_ID = "cd" * 32
READY = {"event": "ready", "task_id": TASK_ID}


@pytest.fixture
def folder():
    with short_folder() as path:
        yield path


class Node:
    """A trainer that is joined, and what the node was told of it."""

    def __init__(self, path, **more) -> None:
        self.path = path
        self.ready: list[dict] = []
        self.gone: list[bool] = []
        self.source = Joined(path, {"exchange": "/exchange", "node": "h"})
        more.setdefault("longest_answer", 60.0)
        self.trainer = Trainer(
            self.source,
            path.parent,
            on_ready=self.ready.append,
            on_gone=self.gone.append,
            **more,
        )

    async def until(self, condition) -> None:
        with trio.fail_after(20):
            while not condition():  # noqa: ASYNC110 - of sockets nobody is told
                await trio.sleep(0.002)

    @asynccontextmanager
    async def loop(self, *, greets: bool = True):
        """A training loop that has been welcomed."""
        async with Loop(await trio.open_unix_socket(str(self.path))) as loop:
            assert await loop.read() == {"op": "welcome", "exchange": "/exchange", "node": "h"}
            if greets:
                before = len(self.ready)
                await loop.send(READY)
                await self.until(lambda: len(self.ready) > before)
            yield loop

    async def turned_away(self) -> dict:
        async with Loop(await trio.open_unix_socket(str(self.path))) as loop:
            told = await loop.read()
            assert await loop.stream.receive_some(1) == b""
            return told


class Loop:
    """The other end."""

    def __init__(self, stream) -> None:
        self.stream = stream
        self._rest = b""

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await trio.aclose_forcefully(self.stream)

    async def read(self) -> dict:
        with trio.fail_after(20):
            while b"\n" not in self._rest:
                piece = await self.stream.receive_some()
                assert piece, "the stream ended"
                self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    async def send(self, message: dict) -> None:
        await self.stream.send_all(json.dumps(message).encode() + b"\n")

    async def until_sent_away(self) -> list[bytes]:
        """All that comes before the end of the stream."""
        with trio.fail_after(20):
            rest = self._rest
            with contextlib.suppress(trio.BrokenResourceError):
                async for piece in self.stream:
                    rest += piece
        return rest.splitlines()


@asynccontextmanager
async def a_node(folder, **more):
    async with trio.open_nursery() as nursery:
        node = Node(folder / "loop.sock", **more)
        await nursery.start(node.source.listen)
        nursery.start_soon(node.trainer.run)
        yield node
        nursery.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(trainers, "FIRST_BACKOFF", 0.01)


# --- what goes well ----------------------------------------------------------------------------


async def test_a_loop_is_welcomed_greets_and_is_asked(folder):
    async with a_node(folder) as node:
        assert node.trainer.state == "waiting for a training loop to join"
        assert str(node.path) in node.trainer.hint
        assert stat.S_IMODE(node.path.stat().st_mode) == 0o600
        async with node.loop() as loop:
            assert node.ready == [READY]
            assert (node.trainer.state, node.trainer.hint) == ("ready", "")
            assert node.trainer.pid == os.getpid()

            async def answer() -> None:
                assert await loop.read() == {"op": "round", "round": 3}
                await loop.send({"event": "skipped"})

            async with trio.open_nursery() as nursery:
                nursery.start_soon(answer)
                told = await node.trainer.ask({"op": "round", "round": 3})
            assert told == {"event": "skipped"}


async def test_a_loop_that_goes_loses_its_round_and_the_next_one_joins(folder):
    async with a_node(folder) as node:
        async with node.loop() as loop, trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(TrainerError, match="died"):
                    await node.trainer.ask({"op": "round"})

            nursery.start_soon(ask)
            await loop.read()
            await trio.aclose_forcefully(loop.stream)
        await node.until(lambda: node.gone)
        assert node.gone == [True]  # peers need not wait until somebody starts the next
        assert node.trainer.problem == "the training loop has left"
        async with node.loop():
            assert len(node.ready) == 2


async def test_a_loop_that_was_killed_can_be_started_again_at_once(folder):
    async with a_node(folder) as node:
        for _ in range(10):
            async with await trio.open_unix_socket(str(node.path)):
                pass  # its connection ends with it; nobody has noticed yet
            async with node.loop():
                assert node.trainer.state == "ready"


async def test_a_loop_is_told_to_stop_when_the_daemon_ends(folder):
    async with trio.open_nursery() as outer:
        async with a_node(folder) as node:
            loop = Loop(await trio.open_unix_socket(str(node.path)))
            await loop.read()
            await loop.send(READY)
            await node.until(lambda: node.ready)
        assert [json.loads(line) for line in await loop.until_sent_away()] in (
            [{"op": "stop"}],
            [],
        )
        await trio.aclose_forcefully(loop.stream)
        outer.cancel_scope.cancel()
    assert not node.path.exists()


async def test_a_loop_that_trains_for_a_run_that_is_over_is_let_go(folder):
    async with a_node(folder) as node, node.loop() as loop:
        node.trainer.leave_round("another run was accepted")  # nothing is asked of it
        await trio.testing.wait_all_tasks_blocked()
        assert node.trainer.state == "ready"
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(TrainerError, match="another run"):
                    await node.trainer.ask({"op": "round"})

            nursery.start_soon(ask)
            await loop.read()
            node.trainer.leave_round("another run was accepted")
        assert [json.loads(line) for line in await loop.until_sent_away()] == [{"op": "stop"}]


# --- who is not taken --------------------------------------------------------------------------


async def test_a_second_loop_is_told_that_there_is_one(folder):
    async with a_node(folder) as node, node.loop():
        told = await node.turned_away()
        assert told["op"] == "busy"
        assert str(os.getpid()) in told["why"]
        assert told["what"] and told["do"]
        assert node.trainer.state == "ready"


@pytest.mark.parametrize(("user", "let_in"), [(0, True), (54_321, False)])
async def test_only_the_daemons_user_and_root_are_let_in(folder, monkeypatch, user, let_in):
    monkeypatch.setattr(module, "credentials", lambda _socket: (1, user))
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    async with a_node(folder) as node:
        if let_in:
            async with node.loop():
                assert node.ready == [READY]
        else:
            told = await node.turned_away()
            assert told["op"] == "refused"
            assert "54321" in told["why"]
            assert node.trainer.state == "waiting for a training loop to join"


async def test_nobody_is_taken_while_training_is_paused(folder):
    async with a_node(folder) as node:
        async with node.loop() as loop:
            await node.trainer.pause()
            assert [json.loads(line) for line in await loop.until_sent_away()] == [{"op": "stop"}]
        told = await node.turned_away()
        assert told["op"] == "refused"
        assert "p2pfed task resume" in told["do"]
        assert (node.trainer.state, node.trainer.hint) == ("paused", "")
        node.trainer.resume()
        async with node.loop():
            assert node.trainer.state == "ready"


async def test_one_that_came_in_just_before_a_pause_is_sent_away(folder, monkeypatch):
    monkeypatch.setattr(trainers, "FIRST_BACKOFF", 60.0)  # nobody fetches the second one
    async with a_node(folder) as node:
        async with node.loop():
            pass
        await node.until(lambda: node.gone)
        async with node.loop(greets=False) as loop:
            await node.trainer.pause()
            assert await loop.until_sent_away() == []


# --- rude ones ---------------------------------------------------------------------------------


RUDE = {
    "garbage": b"\xff\x00\n",
    "half a line": b'{"event": "rea',
    "two mebibytes in a line": b"x" * (2 * MAX_LINE),
    "a list": b"[1]\n",
    "no task": b'{"event": "ready"}\n',
    "a refusal": b'{"event": "failed", "what": "no", "why": "data", "do": "look"}\n',
    "a browser": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "nothing": b"",
}


@pytest.mark.parametrize("text", RUDE.values(), ids=RUDE)
async def test_a_rude_process_ends_its_own_connection_and_the_next_one_joins(folder, text):
    async with a_node(folder) as node:
        async with node.loop(greets=False) as loop:
            with contextlib.suppress(trio.BrokenResourceError):
                await loop.stream.send_all(text)
                if not text.endswith(b"\n"):
                    await loop.stream.send_eof()
            await loop.until_sent_away()
        await node.until(lambda: node.gone)
        assert node.ready == []
        assert node.trainer.problem
        async with node.loop():
            assert node.trainer.state == "ready"


async def test_a_silent_process_loses_its_place_in_the_end(folder, monkeypatch):
    monkeypatch.setattr(trainers, "START_DEADLINE", 0.05)
    async with a_node(folder) as node:
        async with node.loop(greets=False) as loop:
            await loop.until_sent_away()
        await node.until(lambda: node.gone)
        assert node.trainer.problem == "it did not start in time"


async def test_an_answer_of_two_mebibytes_is_the_end_of_that_loop_alone(folder):
    async with a_node(folder) as node:
        async with node.loop() as loop, trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(TrainerError, match="too long"):
                    await node.trainer.ask({"op": "round"})

            nursery.start_soon(ask)
            await loop.read()
            with contextlib.suppress(trio.BrokenResourceError):
                await loop.stream.send_all(b"x" * (2 * MAX_LINE))
        async with node.loop():
            assert len(node.ready) == 2


async def test_a_loop_that_reads_nothing_can_be_paused(folder, monkeypatch):
    monkeypatch.setattr(module, "WRITE_DEADLINE", 0.05)
    async with a_node(folder) as node, node.loop(), trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(TrainerError, match="paused"):
                await node.trainer.ask({"op": "round", "run": "x" * 4_000_000})

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(30):
            await node.trainer.pause()


async def test_a_hundred_that_come_and_go_leave_nothing_behind(folder):
    async with a_node(folder) as node:
        for _ in range(100):
            async with await trio.open_unix_socket(str(node.path)):
                pass
        await node.until(lambda: node.source._loop is None)
        async with node.loop():
            assert node.trainer.state == "ready"


# --- the socket --------------------------------------------------------------------------------


async def test_the_socket_of_a_living_daemon_is_refused_and_a_stale_one_replaced(folder):
    path = folder / "loop.sock"
    with trio.socket.socket(trio.socket.AF_UNIX) as stale:
        await stale.bind(str(path))
    async with a_node(folder) as node:
        with pytest.raises(StateInUse):
            await Joined(path, {}).listen()
        async with node.loop():
            assert node.trainer.state == "ready"


async def test_a_file_in_the_place_of_the_socket_is_told_by_its_key(folder):
    (folder / "loop.sock").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        await Joined(folder / "loop.sock", {}).listen()
    assert "train.loop_socket" in caught.value.do
    assert (folder / "loop.sock").read_text() == "mine"


# --- a trainer of another user -----------------------------------------------------------------


class Service(Node):
    """A node whose trainer is a service of user `account`."""

    def __init__(self, path, account) -> None:
        super().__init__(path)
        self.source = Joined(path, {"exchange": "/exchange"}, account=account, service=True)
        self.trainer._source = self.source


async def test_the_socket_of_a_trainers_user_is_given_to_its_group(folder):
    node = Service(folder / "loop.sock", (os.geteuid() + 1, os.getegid()))
    async with trio.open_nursery() as nursery:
        await nursery.start(node.source.listen)
        found = node.path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, os.getegid())
        nursery.cancel_scope.cancel()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may give a file to any group")
async def test_a_group_that_is_not_ours_to_give_is_told_with_the_cure(folder):
    with pytest.raises(ConfigError, match="usermod"):
        await Service(folder / "loop.sock", (1, 1)).source.listen()


@pytest.mark.parametrize(
    ("user", "is_let_in"), [(41, True), (0, True), (os.geteuid(), True), (42, False)]
)
async def test_only_root_the_daemons_user_and_the_trainers_may_join(
    folder, monkeypatch, user, is_let_in
):
    monkeypatch.setattr(module, "credentials", lambda _: (7, user))
    node = Service(folder / "loop.sock", (41, os.getegid()))
    async with trio.open_nursery() as nursery:
        await nursery.start(node.source.listen)
        async with Loop(await trio.open_unix_socket(str(node.path))) as loop:
            told = await loop.read()
        assert told["op"] == ("welcome" if is_let_in else "refused")
        if not is_let_in:
            assert "user 42" in told["why"]
            assert "train.user is 41" in told["why"]
        nursery.cancel_scope.cancel()


def test_status_names_the_service_that_is_missing(folder):
    source = Joined(folder / "loop.sock", {}, account=(41, 41), service=True)
    assert source.awaited == "waiting for the trainer to join"
    assert "systemctl start p2pfed-trainer" in source.hint
    assert source.is_ours


async def test_a_service_that_asks_again_and_again_is_logged_once(folder, caplog):
    node = Service(folder / "loop.sock", (os.geteuid(), os.getegid()))
    node.source.let_in(False)
    async with trio.open_nursery() as nursery:
        await nursery.start(node.source.listen)
        for _ in range(3):
            assert (await node.turned_away())["what"] == "training is paused at this node"
        nursery.cancel_scope.cancel()
    assert [r.levelname for r in caplog.records].count("WARNING") == 1
