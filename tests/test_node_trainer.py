"""The parent end of the trainer: whatever the child does is one error and one restart."""

from __future__ import annotations

import os
import socket
import stat
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from fair_clock import FairClock

from p2pfed.doctor.left import left_folders
from p2pfed.errors import TrainerError
from p2pfed.node import spawned
from p2pfed.node import trainer as module
from p2pfed.node.spawned import MOST_KILLABLE, Spawned
from p2pfed.node.trainer import Trainer, exchange_folder

TASK_ID = "ab" * 32
PROLOGUE = f"""#!{sys.executable} -IS
import os, socket, sys, time
def send(text): control.sendall(text.encode() if isinstance(text, str) else text)
def ready(): send('{{"event": "ready", "task_id": "{TASK_ID}"}}\\n')
def lives():
    with open(counter, "a") as file: file.write("x")
    return os.path.getsize(counter)
counter = __file__ + ".lives"
control = socket.socket(fileno=int(sys.argv[sys.argv.index("--control-fd") + 1]))
lines = control.makefile("rb")
life = lives()
"""
ANSWER = 'send(\'{"event": "evaluated", "life": %d}\\n\' % life)\n'
OBEY = f"""
for line in lines:
    if b"stop" in line: break
    {ANSWER}
"""


class Told:
    """What the node was told."""

    def __init__(self) -> None:
        self.ready: list[dict] = []
        self.gone = 0
        self.lost = False
        self.news = trio.Event()

    def on_ready(self, hello: dict) -> None:
        self.ready.append(hello)
        self._tell()

    def on_gone(self, lost: bool) -> None:
        self.gone += 1
        self.lost = lost
        self._tell()

    def _tell(self) -> None:
        self.news.set()
        self.news = trio.Event()

    async def until(self, condition) -> None:
        with trio.fail_after(20):
            while not condition():
                await self.news.wait()


def a_trainer(source, exchange: Path, told: Told, **more) -> Trainer:
    more.setdefault("longest_answer", 60.0)
    return Trainer(source, exchange, on_ready=told.on_ready, on_gone=told.on_gone, **more)


@pytest.fixture
def playing(tmp_path, monkeypatch):
    """Run a Trainer whose program is the given Python text."""
    monkeypatch.setattr(module, "FIRST_BACKOFF", 0.02)
    monkeypatch.setattr(spawned, "STOP_DEADLINE", 0.3)

    @asynccontextmanager
    async def play(program: str, **more):
        script = tmp_path / "trainer"
        script.write_text(PROLOGUE + program)
        script.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(script))
        told = Told()
        source = Spawned(tmp_path / "c.toml", tmp_path)
        trainer = a_trainer(source, tmp_path, told, **more)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trainer.run)
            yield trainer, told
            nursery.cancel_scope.cancel()
        assert trainer.pid is None

    return play


async def asked(trainer: Trainer) -> dict:
    with trio.fail_after(20):
        return await trainer.ask({"op": "evaluate"})


async def test_a_trainer_is_the_first_to_go_from_its_first_instant(playing):
    """Until it has read torch it is small, and the kernel might take the daemon for it."""
    async with playing("import time\ntime.sleep(60)\n") as (trainer, _):
        with trio.fail_after(20):
            while trainer.pid is None:  # noqa: ASYNC110 - it has no event
                await trio.sleep(0.01)
        score = await trio.Path(f"/proc/{trainer.pid}/oom_score_adj").read_text()
        assert score.strip() == MOST_KILLABLE


# --- what goes well ----------------------------------------------------------------------------


async def test_requests_get_their_answers_in_turn(playing):
    async with playing("ready()\n" + OBEY) as (trainer, told):
        await told.until(lambda: told.ready)
        assert told.ready == [{"event": "ready", "task_id": TASK_ID}]
        assert (trainer.state, trainer.restarts, trainer.problem) == ("ready", 0, "")
        answers = []

        async def ask() -> None:
            answers.append(await asked(trainer))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
        assert answers == [{"event": "evaluated", "life": 1}] * 5


@pytest.mark.slow
async def test_a_slow_answer_and_one_in_pieces_are_waited_for(playing):
    program = (
        "ready()\nlines.readline()\ntime.sleep(0.3)\n"
        "send('{\"event\": ')\ntime.sleep(0.05)\nsend('\"slow\"}')\ntime.sleep(0.05)\nsend('\\n')\n"
        "lines.readline()\n"
    )
    async with playing(program) as (trainer, told):
        await told.until(lambda: told.ready)
        assert await asked(trainer) == {"event": "slow"}
        assert trainer.restarts == 0


@pytest.mark.slow
async def test_a_trainer_is_told_to_stop_and_killed_if_it_does_not(playing, tmp_path):
    deaf = (
        "import signal\nready()\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)\n"
    )
    async with playing(deaf) as (trainer, told):
        await told.until(lambda: told.ready)
        pid = trainer.pid
        clock = FairClock()
    assert clock.within(5)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# --- what goes wrong ---------------------------------------------------------------------------


BREACHES = {
    "dies": ("os._exit(3)", "died", "exit status 3"),
    "is killed": ("os.kill(os.getpid(), 9)", "died", "exit status -9"),
    "hangs up": ("control.shutdown(2)\ntime.sleep(600)", "died", "exit status -9"),
    "talks garbage": ("send(b'\\xff\\x00 garbage\\n')\ntime.sleep(600)", "not JSON", "not JSON"),
    "sends a list": ("send('[1]\\n')\ntime.sleep(600)", "not an object", "not an object"),
    "nests": ("send('[' * 500_000 + '\\n')\ntime.sleep(600)", "not JSON", "not JSON"),
    "never ends a line": (
        "send('x' * (1 << 21))\ntime.sleep(600)",
        "too long",
        "too long",
    ),
    "says two things": (
        'send(\'{"event": "one"}\\n{"event": "two"}\\n\')\ntime.sleep(600)',
        None,
        "without being asked",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("breach", "error", "problem"), BREACHES.values(), ids=BREACHES)
async def test_a_breach_is_one_error_and_one_restart(playing, breach, error, problem):
    indented = breach.replace("\n", "\n    ")
    program = f"ready()\nif life == 1:\n    lines.readline()\n    {indented}\n" + OBEY
    async with playing(program) as (trainer, told):
        await told.until(lambda: told.ready)
        first = trainer.pid
        if error is None:  # the second answer is seen when the next question is asked
            assert await asked(trainer) == {"event": "one"}
        else:
            with pytest.raises(TrainerError, match=error):
                await asked(trainer)
        with pytest.raises(TrainerError, match=r"not running|without being asked"):
            await asked(trainer)
        await told.until(lambda: told.gone)
        assert problem in trainer.problem
        assert trainer.state == "restarting"
        await told.until(lambda: len(told.ready) == 2)
        assert await asked(trainer) == {"event": "evaluated", "life": 2}
        assert (trainer.state, trainer.problem) == ("ready", "")
        assert (trainer.restarts, told.gone) == (1, 1)
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)


async def test_a_trainer_that_dies_while_a_question_is_on_its_way_is_one_error(playing, tmp_path):
    """The question fills the socket, which a child of the trainer holds open and never reads."""
    dies = (
        "ready()\nif life == 1:\n    if os.fork() == 0: time.sleep(1); os._exit(0)\n"
        "    time.sleep(0.1)\n    os._exit(3)\n" + OBEY
    )
    async with playing(dies) as (trainer, told):
        await told.until(lambda: told.ready)
        with trio.fail_after(20), pytest.raises(TrainerError, match="died"):
            await trainer.ask({"op": "round", "run": "x" * 4_000_000})
        await told.until(lambda: len(told.ready) == 2)
        assert await asked(trainer) == {"event": "evaluated", "life": 2}


BAD_STARTS = {
    "dies": "os._exit(9)",
    "fails with words": 'send(\'{"event": "failed", "what": "no data", "why": ""}\\n\')',
    "talks garbage": "send('garbage\\n')",
    "is ready without a task": 'send(\'{"event": "ready"}\\n\')',
    "is ready with half a task": 'send(\'{"event": "ready", "task_id": "abc"}\\n\')',
    "is ready with a number": 'send(\'{"event": "ready", "task_id": 7}\\n\')',
    "hangs up": "control.close(); lines.close(); time.sleep(600)",
}


@pytest.mark.slow
@pytest.mark.parametrize("start", BAD_STARTS.values(), ids=BAD_STARTS)
async def test_a_start_that_fails_is_tried_again_and_never_asked(playing, start):
    program = f"if life < 3:\n    {start}\n    sys.exit(1)\nready()\n" + OBEY
    async with playing(program) as (trainer, told):
        await told.until(lambda: told.gone)
        assert trainer.problem
        with pytest.raises(TrainerError):
            await asked(trainer)
        await told.until(lambda: told.ready)
        assert told.ready == [{"event": "ready", "task_id": TASK_ID}]
        assert trainer.restarts == 2
        assert await asked(trainer) == {"event": "evaluated", "life": 3}


async def test_why_it_did_not_start_is_told_in_its_own_words(playing):
    words = 'send(\'{"event": "failed", "what": "no data", "why": "none", "do": "look"}\\n\')'
    async with playing(words) as (trainer, told):
        await told.until(lambda: told.gone)
        assert trainer.problem == "no data; none; look"


@pytest.mark.slow
async def test_a_trainer_that_does_not_greet_in_time_is_started_again(playing, monkeypatch):
    monkeypatch.setattr(module, "START_DEADLINE", 0.3)
    program = "if life == 1: time.sleep(600)\nready()\n" + OBEY
    async with playing(program, longest_answer=0.4) as (trainer, told):
        await told.until(lambda: told.gone)
        assert "in time" in trainer.problem


async def test_a_program_that_cannot_be_started_is_tried_again(playing, monkeypatch):
    async with playing(OBEY) as (trainer, told):
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        await told.until(lambda: told.gone >= 2)
        assert "/nowhere/python" in trainer.problem


class Given:
    """A source of trainers that the test plays by hand."""

    awaited, hint, comes_by_itself, is_ours = "awaited", "", True, True

    def __init__(self) -> None:
        self.others: list[socket.socket] = []
        self.lets_in: list[bool] = []

    async def next(self) -> Given:
        ours, theirs = socket.socketpair()
        self.others.append(theirs)
        self.stream, self.pid = trio.SocketStream(trio.socket.from_stdlib_socket(ours)), 1
        theirs.sendall(b'{"event": "ready", "task_id": "%s"}\n' % TASK_ID.encode())
        return self

    async def ended(self) -> None:
        await trio.sleep_forever()

    async def end(self) -> str:
        await trio.aclose_forcefully(self.stream)
        self.others[-1].close()
        return "over"

    def let_in(self, on: bool) -> None:
        self.lets_in.append(on)


async def test_an_answer_that_does_not_come_in_time_is_an_error_and_the_next_one_is_asked(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(module, "FIRST_BACKOFF", 0.01)
    source, told = Given(), Told()
    trainer = a_trainer(source, tmp_path, told, longest_answer=0.05)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trainer.run)
        await told.until(lambda: told.ready)
        with pytest.raises(TrainerError, match="in time") as caught:
            await trainer.ask({"op": "round"})
        assert "train.longest_round" in caught.value.do
        await told.until(lambda: len(told.ready) == 2)
        assert (trainer.state, trainer.restarts, told.gone) == ("ready", 1, 1)
        nursery.cancel_scope.cancel()


async def test_a_trainer_that_goes_while_nobody_asks_is_missed_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "FIRST_BACKOFF", 0.01)
    source, told = Given(), Told()
    trainer = a_trainer(source, tmp_path, told)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trainer.run)
        await told.until(lambda: told.ready)
        source.others[0].close()
        await told.until(lambda: len(told.ready) == 2)
        assert told.gone == 1
        nursery.cancel_scope.cancel()


async def test_restarts_back_off_to_a_minute_and_a_long_life_makes_them_quick_again(
    autojump_clock, tmp_path, monkeypatch
):
    lives = [0.0] * 8 + [61.0] + [0.0] * 3
    began: list[float] = []

    async def one_life(self) -> None:
        began.append(trio.current_time())
        if len(began) > len(lives):
            await trio.sleep_forever()
        await trio.sleep(lives[len(began) - 1])

    monkeypatch.setattr(Trainer, "_one_life", one_life)
    trainer = a_trainer(Given(), tmp_path, Told())
    with trio.move_on_after(10_000):
        await trainer.run()
    waits = [
        round(later - start - life)
        for start, later, life in zip(began[:-1], began[1:], lives, strict=True)
    ]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 1, 2, 4, 8]
    assert trainer.restarts == len(lives)


# --- pause -------------------------------------------------------------------------------------


async def test_a_paused_trainer_is_gone_and_comes_back(playing):
    async with playing("ready()\n" + OBEY) as (trainer, told):
        await told.until(lambda: told.ready)
        pid = trainer.pid
        await trainer.pause()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert (trainer.state, trainer.pid, trainer.problem) == ("paused", None, "")
        assert told.lost  # peers need not wait for this node
        with pytest.raises(TrainerError, match="not running"):
            await asked(trainer)
        await trainer.pause()  # again: nothing happens
        assert (told.gone, len(told.ready)) == (1, 1)
        trainer.resume()
        await told.until(lambda: not told.lost)  # it is awaited: nothing failed again and again
        assert (trainer.state, len(told.ready)) == ("starting", 1)
        await told.until(lambda: len(told.ready) == 2)
        assert await asked(trainer) == {"event": "evaluated", "life": 2}
        assert trainer.state == "ready"


async def test_a_round_under_way_is_lost_by_a_pause_with_its_reason(tmp_path):
    source, told = Given(), Told()
    trainer = a_trainer(source, tmp_path, told)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trainer.run)
        await told.until(lambda: told.ready)

        async def ask() -> None:
            with pytest.raises(TrainerError, match="training was paused"):
                await trainer.ask({"op": "round"})
            nursery.cancel_scope.cancel()

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        await trainer.pause()
        assert source.lets_in == [True, False]
        await trio.sleep_forever()


async def test_a_trainer_that_begins_paused_is_not_started_before_it_is_wanted(playing):
    async with playing("ready()\n" + OBEY, paused=True) as (trainer, told):
        await trainer.pause()
        assert (trainer.state, told.ready, trainer.restarts) == ("paused", [], 0)
        trainer.resume()
        await told.until(lambda: told.ready)
        assert await asked(trainer) == {"event": "evaluated", "life": 1}


async def test_pausing_and_resuming_in_a_hurry_ends_as_the_last_word_says(tmp_path):
    source, told = Given(), Told()
    trainer = a_trainer(source, tmp_path, told)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trainer.run)
        for _ in range(5):
            nursery.start_soon(trainer.pause)
            for _ in range(2):  # it has begun, and has not ended
                await trio.lowlevel.checkpoint()
            trainer.resume()
        await told.until(lambda: trainer.state == "ready")
        assert not trainer.paused
        nursery.cancel_scope.cancel()


# --- the exchange folder -----------------------------------------------------------------------


def test_the_exchange_folder_is_closed_to_others_and_gone_afterwards(tmp_path):
    with exchange_folder(tmp_path) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "view.safetensors").write_text("x")
    assert not folder.exists()


def test_what_a_killed_daemon_left_in_the_exchange_folder_is_not_there_any_more(tmp_path):
    with exchange_folder(tmp_path) as folder:
        pass
    folder.mkdir()
    (folder / "old.payload").write_text("x")
    with exchange_folder(tmp_path) as again:
        assert list(again.iterdir()) == []


def test_where_memory_has_no_room_a_killed_daemons_folder_is_taken_over_too(tmp_path, monkeypatch):
    monkeypatch.setattr("p2pfed.node.trainer._SHARED_MEMORY", tmp_path / "none")
    spare = tmp_path / "spare"
    spare.mkdir()
    with exchange_folder(tmp_path, spare=spare) as folder:
        assert folder.parent == spare
    folder.mkdir()  # as a power cut leaves it
    (folder / "view").write_bytes(b"old")
    with exchange_folder(tmp_path, spare=spare) as again:
        assert again == folder
        assert list(again.iterdir()) == []
    assert list(spare.iterdir()) == []


def test_the_exchange_folder_is_held_as_long_as_its_daemon_lives(tmp_path):
    with exchange_folder(tmp_path) as folder:
        assert folder not in [one.path for one in left_folders(folder.parent)]
    folder.mkdir()  # as after a kill
    try:
        assert folder in [one.path for one in left_folders(folder.parent)]
    finally:
        folder.rmdir()


def test_two_nodes_of_one_machine_have_two_exchange_folders(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    with exchange_folder(one) as first, exchange_folder(other) as second:
        assert first != second


@pytest.mark.parametrize("trap", ["link", "file"])
def test_a_trap_in_the_place_of_the_exchange_folder_is_walked_around(tmp_path, trap):
    with exchange_folder(tmp_path) as usual:
        pass
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("x")
    if trap == "link":
        usual.symlink_to(victim)
    else:
        usual.write_text("a file of somebody else")
    try:
        with exchange_folder(tmp_path) as folder:
            assert folder != usual
            assert folder.parent == tmp_path
            assert list(folder.iterdir()) == []
        assert (victim / "precious").exists()
    finally:
        Path(usual).unlink()


def test_the_exchange_folder_of_two_users_is_their_groups_and_gives_it_on(tmp_path):
    with exchange_folder(tmp_path, group=os.getegid()) as folder:
        found = folder.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o2770, os.getegid())
        (folder / "view").touch()
        assert (folder / "view").stat().st_gid == os.getegid()
    assert not folder.exists()


def test_without_room_in_memory_the_folder_of_two_users_lies_where_both_can_go(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("p2pfed.node.trainer._ROOM", 1 << 62)
    spare = tmp_path / "spare"
    spare.mkdir()
    with exchange_folder(tmp_path, group=os.getegid(), spare=spare) as folder:
        assert folder.parent == spare
