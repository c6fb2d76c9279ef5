"""The live screen: what is drawn of which film, and a real terminal around the real loop."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any, Self

import admin_fakes as fakes
import pytest
from rich.console import Console
from rich.text import Text

from p2pfed.cli.film import SORTS, Film, Snapshot, frame, spark
from p2pfed.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("Oslo", "Kyoto", "Porto")
TRAINER = {
    "rounds": [{"round": 3, "seconds": {"data": 1, "compute": 6, "peers": 3}}],
    "progress": {"step": "local steps", "done": 37, "of": 100, "seconds": 5},
}


def peer(number: int, **changed: Any) -> dict[str, Any]:
    name = NAMES[number] if number < len(NAMES) else f"Peer {number}"
    return {**fakes.PEER, "name": name, "peer_id": str(number), "rtt_ms": 10.0 + number, **changed}


def status(**changed: Any) -> dict[str, Any]:
    last = {"round": 41, "seconds": 12.5, "waiting": 3.0}
    return {**fakes.FakeBackend().status(), "round_seconds": last, **changed}


def film_of(*shots: Snapshot, events: int = 0) -> Film:
    film = Film()
    happened = [
        {"seq": n, "ts": "2026-01-02T03:04:05.1Z", "type": "round.started", "data": {"round": n}}
        for n in range(1, events + 1)
    ]
    for shot in shots:
        film.add(shot, happened)
        happened = []
    return film


def usual(events: int = 0, peers: int = 3, **changed: Any) -> Film:
    """Two looks, a second apart: peer k sends k kB/s and receives 2k kB/s."""
    shots = [
        Snapshot(
            float(at),
            status(**changed),
            [peer(n, sent_bytes=1000 * n * at, received_bytes=2000 * n * at) for n in range(peers)],
            {"metrics": [{"round": r, "values": {"accuracy": r / 10}} for r in range(1, 9)]},
            TRAINER,
        )
        for at in (1, 2)
    ]
    return film_of(*shots, events=events)


def drawn(film: Film, width: int = 80, height: int = 24, **options: Any) -> list[str]:
    lines = frame(film, width, height, **options)
    assert len(lines) == height
    assert all(line.cell_len <= width for line in lines)
    return [line.plain.rstrip() for line in lines]


# --- drawing -----------------------------------------------------------------------------------


def test_the_screen_says_what_status_says():
    assert drawn(usual(events=2, health=["clock differs by 4 s"])) == [
        "St Mary  12D3KooW…mnop   cardio-eu  roster v7   1 alive · 1 away · 1 left",
        "run      heart-1    ████░░░░░░ 42/100 training   model 3f3f3f of 41",
        "privacy  svt        ████░░░░░░ ε 3.2 of 8   41 releases   stops at ≈ 260",
        "private  accuracy 0.8 ▁▂▃▄▅▆▇█   round 12 s ▁",
        "time     compute 60%  peers 30%  data 10%   of 10 s, round 3",
        "trainer  running local steps 37/100   contributing   ↑1.2 GB ↓1.1 GB   up 3d 4h",
        "# clock differs by 4 s",
        "NAME           STATE   ROUND RTT     PATH   ↑/s     ↓/s     MODEL   METRIC SEEN",
        "Kyoto          alive   42    11 ms   direct 1 kB    2 kB    abababa -      2 s",
        "Oslo           alive   42    10 ms   direct 0 B     0 B     abababa -      2 s",
        "Porto          alive   42    12 ms   direct 2 kB    4 kB    abababa -      2 s",
        "",
        "03:04:05  round.started  round=1",
        "03:04:05  round.started  round=2",
        *[""] * 9,
        "q quit   p sort peers: name",
    ]


def test_a_recorded_console_shows_the_lines_as_they_are():
    console = Console(file=io.StringIO(), record=True, width=80, height=24, color_system=None)
    console.print(Text("\n").join(frame(usual(), 80, 24)))
    assert console.export_text().splitlines()[0].startswith("St Mary  12D3KooW…mnop")


@pytest.mark.parametrize(("width", "height"), [(80, 24), (20, 8), (200, 60), (40, 10), (120, 12)])
@pytest.mark.parametrize("peers", [0, 3, 40])
def test_every_size_is_filled_exactly(width, height, peers):
    lines = drawn(usual(events=100, peers=peers), width, height)
    assert lines[-1].startswith("q quit")


def test_many_peers_leave_room_for_events_and_say_how_many_are_hidden():
    lines = drawn(usual(events=100, peers=40))
    assert "… 29 more peers" in lines
    assert sum("round.started" in line for line in lines) == 3


def test_a_wide_screen_has_totals_too():
    head = next(line for line in drawn(usual(), 130) if line.startswith("NAME"))
    assert head.split()[-3:] == ["SENT", "RECV", "SAMPLES"]


def test_peers_are_sorted_by_what_was_asked():
    def order(sort: str) -> list[str]:
        return [line.split()[0] for line in drawn(usual(), sort=sort) if line[:5].strip() in NAMES]

    assert order("name") == ["Kyoto", "Oslo", "Porto"]
    assert order("rtt") == ["Oslo", "Kyoto", "Porto"]
    assert order("traffic") == ["Porto", "Kyoto", "Oslo"]
    assert all(order(sort) for sort in SORTS)


def test_rates_need_two_looks_at_the_same_daemon():
    one = film_of(Snapshot(1.0, status(), [peer(0, sent_bytes=5000)]))
    assert one.rates("0") is None
    one.add(Snapshot(2.0, status(), [peer(0, sent_bytes=9000)]), [])
    assert one.rates("0") == (4000.0, 0.0)
    assert one.rates("unknown") is None
    one.add(Snapshot(3.0, status(pid=2), [peer(0, sent_bytes=10)]), [])  # it began anew
    assert one.rates("0") is None


def test_rates_are_over_the_last_seconds_alone():
    shots = [
        Snapshot(float(at), status(), [peer(0, sent_bytes=max(0, at - 90))]) for at in range(99)
    ]
    assert film_of(*shots).rates("0") == (1.0, 0.0)


def test_a_peer_that_is_behind_is_compared_with_what_was_held_then():
    run = fakes.FakeBackend().status()["run"]
    before = status(run={**run, "model_round": 40, "model_hash": "aa" * 32})
    behind = peer(0, model_round=40, model_hash="aa" * 32)
    at_par = peer(1, model_round=41, model_hash="3f" * 32)
    other = peer(2, model_round=41, model_hash="bb" * 32)
    film = film_of(Snapshot(1.0, before), Snapshot(2.0, status(), [behind, at_par, other]))
    assert [film.model_word(p) for p in (behind, at_par, other)] == ["same", "same", "≠bbbbbb"]
    lost = {**behind, "model_round": 39}
    assert film.model_word(lost) == "of 39"
    lines = frame(film, 130, 24)
    assert "1 DIFFER   model 3f3f3f of 41, 2 same" in lines[1].plain
    assert "1 DIFFER" in frame(film, 80, 24)[1].plain
    [marked] = [line for line in lines if "≠bbbbbb" in line.plain]
    assert any("red" in str(span.style) for span in marked.spans)


def test_a_daemon_that_is_gone_leaves_the_last_picture_and_a_line():
    film = usual()
    film.add(Snapshot(3.0, None, problem="cannot reach the daemon"), [])
    lines = drawn(film)
    assert lines[0].startswith("St Mary")
    assert lines[-2] == "waiting for the daemon: cannot reach the daemon"


def test_a_daemon_that_never_was_is_waited_for():
    lines = drawn(Film())
    assert lines[0] == "p2pfed top"
    assert lines[-2].startswith("waiting for the daemon")


def test_nothing_protects_the_updates_is_red():
    film = usual(privacy={"mechanism": "none"})
    [line] = [line for line in frame(film, 80, 24) if "UNPROTECTED" in line.plain]
    assert "bold red" in {str(span.style) for span in line.spans}


def test_a_node_that_knows_nothing_yet_is_drawn():
    film = film_of(
        Snapshot(
            1.0,
            status(
                network=None,
                roster=None,
                run=None,
                round_seconds=None,
                sharing=False,
                contributing={"yes": False, "reason": ""},
                privacy={"mechanism": None},
            ),
        )
    )
    text = "\n".join(drawn(film))
    assert "no network" in text and "p2pfed run list" in text and "sharing is off" in text


def test_another_version_of_the_daemon_is_a_warning():
    assert any("the daemon is 9.9" in line for line in drawn(usual(version="9.9")))


def test_no_name_moves_the_cursor():
    film = film_of(Snapshot(1.0, status(name="evil\x1b[2J"), [peer(0, name="a\x1b[Hb\nc")]))
    assert "\x1b" not in "".join(drawn(film))
    assert "\n" not in "".join(drawn(film))


def test_a_sparkline_is_between_the_least_and_the_greatest():
    assert spark([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert spark([3.0, 3.0]) == "▁▁"
    assert spark([1.0, float("nan"), 2.0]) == "▁ █"
    assert spark([float("inf")]) == spark([]) == ""


# --- the loop ----------------------------------------------------------------------------------


@pytest.fixture
def folder(monkeypatch):
    with fakes.empty_home(monkeypatch) as path:
        yield path


def test_without_a_terminal_it_says_what_to_use_instead(capsys, folder):
    assert main(["--socket", "x.sock", "top"]) == 2
    assert "p2pfed status --json" in capsys.readouterr().err
    assert main(["--socket", "x.sock", "top", "--interval", "0"]) == 2


class Terminal:
    """`p2pfed top` on a pseudo-terminal of 24 lines."""

    def __init__(self, socket: str, **environment: str) -> None:
        self.master, self._slave = pty.openpty()
        self.resize(24, 80)
        self.before = termios.tcgetattr(self._slave)
        inherited = {k: v for k, v in os.environ.items() if k not in {"COLUMNS", "LINES"}}
        env = {**inherited, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **environment}
        command = [sys.executable, "-m", "p2pfed", "--socket", socket, "top", "--interval", "0.2"]
        self.process = subprocess.Popen(
            command, stdin=self._slave, stdout=self._slave, stderr=self._slave, env=env
        )
        self.seen = ""

    def resize(self, lines: int, columns: int) -> None:
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def until(self, text: str) -> None:
        self.seen = ""
        deadline = time.monotonic() + 20
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen[-3000:]
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536).decode("utf-8", "replace")

    def press(self, key: str) -> None:
        os.write(self.master, key.encode())

    def end(self) -> int:
        """The exit code; the terminal is as it was."""
        code = None
        deadline = time.monotonic() + 20
        while code is None:
            assert time.monotonic() < deadline
            if select.select([self.master], [], [], 0.05)[0]:
                self.seen += os.read(self.master, 65536).decode("utf-8", "replace")
            code = self.process.poll()
        while select.select([self.master], [], [], 0)[0]:
            self.seen += os.read(self.master, 65536).decode("utf-8", "replace")
        assert termios.tcgetattr(self._slave) == self.before
        assert self.seen.rfind("\x1b[?1049l") > self.seen.rfind("\x1b[?1049h")  # the old screen
        assert self.seen.rfind("\x1b[?25h") > self.seen.rfind("\x1b[?25l")  # the cursor is shown
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self._slave)


@pytest.mark.slow
def test_keys_sort_and_quit_and_the_terminal_is_put_back(folder):
    with (
        fakes.daemon(fakes.FakeBackend(), folder / "admin.sock"),
        Terminal(str(folder / "admin.sock")) as terminal,
    ):
        terminal.until("sort peers: name")
        assert "\x1b[32m" in terminal.seen  # green
        terminal.press("p")
        terminal.until("sort peers: state")
        terminal.resize(24, 130)
        terminal.until("SAMPLES")
        terminal.press("q")
        assert terminal.end() == 0


@pytest.mark.slow
def test_a_daemon_that_comes_is_found_and_one_that_goes_is_waited_for(folder):
    socket = folder / "admin.sock"
    with Terminal(str(socket), NO_COLOR="1") as terminal:
        terminal.until("waiting for the daemon")
        with fakes.daemon(fakes.FakeBackend(), socket):
            terminal.until("St Mary")
            assert "\x1b[32m" not in terminal.seen
        terminal.until("waiting for the daemon")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end() == 128 + signal.SIGTERM


@pytest.mark.slow
def test_ctrl_c_puts_the_terminal_back_too(folder):
    with Terminal(str(folder / "admin.sock")) as terminal:
        terminal.until("waiting for the daemon")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 130
