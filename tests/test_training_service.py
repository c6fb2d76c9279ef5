"""`p2pfed trainer`: waits for a daemon, starts a trainer on the connection, and joins again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from admin_fakes import short_folder

from p2pfed.errors import ConfigError, TrainerError
from p2pfed.training import service
from p2pfed.training.loop_link import Link
from p2pfed.training.service import attend

# In the place of `python -P -m p2pfed.training serve`: greets, and ends as it is told.
TRAINER = """
import socket, sys
given = dict(zip(sys.argv[-6::2], sys.argv[-5::2]))
control = socket.socket(fileno=int(given["--control-fd"]))
control.sendall(given["--exchange"].encode() + b"\\n")
sys.exit(int(control.makefile().readline() or 0))
"""


class Enough(BaseException):
    """The test has seen what it wanted."""


class Daemon:
    """The daemon's end, and what the service does in between."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "loop.sock"
        self.config = folder / "p2pfed.toml"
        self.config.write_text(
            '[node]\nname = "h"\ndata_dir = "."\n'
            f'[train]\ntask = "marked"\nuser = "{os.geteuid()}"\n'
            '[privacy]\nepsilon = 1\nledger = "ledger.db"\n'
        )
        self.rests: list[float] = []

    def resting(self, number: int) -> Callable[[float], None]:
        """Does not wait, and ends the test with rest number `number`."""

        def rest(seconds: float) -> None:
            self.rests.append(seconds)
            if len(self.rests) == number:
                raise Enough

        return rest

    @contextmanager
    def playing(self, script: Callable[[socket.socket], None]) -> Iterator[None]:
        """Listen, and play a script in a thread; it has ended after the block."""
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(self.path))
            listening.listen()
            listening.settimeout(30)
            thread = threading.Thread(target=script, args=(listening,), daemon=True)
            thread.start()
            yield
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture
def daemon():
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with short_folder() as folder:
        yield Daemon(folder)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_service_that_nobody_configured_says_so(daemon):
    text = daemon.config.read_text()
    daemon.config.write_text(text.replace(f'user = "{os.geteuid()}"\n', ""))
    with pytest.raises(ConfigError, match="the daemon starts the trainer itself"):
        attend(daemon.config)


def test_a_node_without_training_has_no_trainer(daemon):
    text = daemon.config.read_text()
    daemon.config.write_text(text.replace("[train]\n", "[train]\nenabled = false\n"))
    with pytest.raises(ConfigError, match="trains nothing"):
        attend(daemon.config)


def test_without_a_daemon_it_waits_and_says_it_once(daemon, capsys):
    def rest(seconds: float) -> None:
        daemon.rests.append(seconds)
        if len(daemon.rests) == 3:
            os.kill(os.getpid(), signal.SIGTERM)  # a service manager's word

    assert attend(daemon.config, rest=rest) == 0
    assert daemon.rests == [service.AGAIN_S] * 3
    assert capsys.readouterr().err.count("no daemon takes training loops") == 1


@pytest.mark.slow
def test_it_starts_a_trainer_on_the_connection_and_rests_longer_after_each_failure(
    daemon, monkeypatch
):
    """Two trainers fail at once, one ends as it should; then the rest is short again."""
    real = subprocess.Popen

    def popen(command, **options):
        assert command[:5] == [sys.executable, "-P", "-m", "p2pfed.training", "serve"]
        return real([sys.executable, "-c", TRAINER, *command[5:]], **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    codes, greeted = [3, 3, 0, 3], []

    def play(listening: socket.socket) -> None:
        for code in codes:
            connected, _ = listening.accept()
            with connected, connected.makefile() as lines:
                welcome = {"op": "welcome", "exchange": str(daemon.path.parent)}
                connected.sendall(json.dumps(welcome).encode() + b"\n")
                greeted.append(lines.readline().strip())
                connected.sendall(f"{code}\n".encode())
                lines.readline()

    with daemon.playing(play), pytest.raises(Enough):
        attend(daemon.config, rest=daemon.resting(3))
    assert greeted == [str(daemon.path.parent)] * 4
    assert daemon.rests == [1.0, 2.0, 1.0]


def test_a_daemon_that_takes_nobody_is_asked_again_until_it_does(daemon, capsys):
    said = {"op": "refused", "what": "training is paused at this node", "why": "", "do": ""}

    def play(listening: socket.socket) -> None:
        for _ in range(2):
            connected, _ = listening.accept()
            with connected:
                connected.sendall(json.dumps(said).encode() + b"\n")

    with daemon.playing(play), pytest.raises(Enough):
        attend(daemon.config, rest=daemon.resting(2))
    assert capsys.readouterr().err == "trainer: waiting: training is paused at this node\n"


@pytest.mark.parametrize("what", ["none", "a file", "a link", "another user's"])
def test_a_folder_that_is_not_the_daemons_own_is_not_taken(daemon, monkeypatch, what):
    # It could be that of the patients: the trainer reads there what the daemon names.
    folder = daemon.path.parent
    place = folder / "exchange"
    if what == "a file":
        place.touch()
    elif what == "a link":
        place.symlink_to(folder)
    elif what == "another user's":
        place.mkdir()
        real = Path.lstat

        def lstat(path: Path) -> os.stat_result:
            found = real(path)
            return os.stat_result((*found[:4], found.st_uid + 1, *found[5:]))

        monkeypatch.setattr(Path, "lstat", lstat)

    def play(listening: socket.socket) -> None:
        connected, _ = listening.accept()
        with connected:
            welcome = {"op": "welcome", "exchange": str(place)}
            connected.sendall(json.dumps(welcome).encode() + b"\n")

    with daemon.playing(play), pytest.raises(TrainerError, match="none of its own"):
        Link(daemon.path, wait=0.0).connect()


@pytest.mark.slow
def test_waiting_needs_no_torch():
    code = "import sys, p2pfed.training.service; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
