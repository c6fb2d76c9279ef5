"""events, monitor, wait, peers -w, whoami, help: what they ask, print and refuse."""

from __future__ import annotations

import datetime as dt
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import admin_fakes as fakes
import pytest

from p2pfed.cli.main import main
from p2pfed.cli.monitor import log_lines
from p2pfed.cli.text import duration
from p2pfed.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(monkeypatch):
    with fakes.empty_home(monkeypatch) as path:
        yield path


class Asked:
    """In place of the socket: answers by path, and remembers what was asked."""

    def __init__(self) -> None:
        self.streams: list[str] = []
        self.lines: list[dict[str, Any]] = []
        self.answers: dict[str, Any] = {}

    def stream(self, path: str) -> Any:
        self.streams.append(path)
        yield from self.lines

    def get(self, path: str) -> Any:
        return self.answers[path]


@pytest.fixture
def daemon(monkeypatch):
    asked = Asked()
    asked.answers["/v1/status"] = fakes.FakeBackend().status()
    asked.answers["/v1/version"] = {"version": "0.1.0", "api": 1}
    asked.answers["/v1/peers"] = [fakes.PEER]
    for module in ("watch", "monitor", "observe", "whoami"):
        monkeypatch.setattr(f"p2pfed.cli.{module}.admin_client", lambda *_, **__: asked)
    monkeypatch.setattr("p2pfed.cli.observe.private_data", lambda *_, **__: None)
    return asked


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([*map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


def event(seq: int, ts: str, kind: str = "peer.alive") -> dict[str, Any]:
    return {"v": 1, "seq": seq, "ts": ts, "type": kind, "data": {}}


# --- events ------------------------------------------------------------------------------------


def asked_of(daemon: Asked) -> dict[str, list[str]]:
    address = urlsplit(daemon.streams[-1])
    assert address.path == "/v1/events"
    return parse_qs(address.query)


def test_what_was_asked_for_reaches_the_daemon(capsys, daemon):
    run(capsys, "events", "-f", "--since", "7", "--type", "peer.*", "-n", "3")
    asked = asked_of(daemon)
    assert asked == {"since": ["7"], "type": ["peer.*"], "limit": ["3"], "follow": ["1"]}
    run(capsys, "events")
    assert asked_of(daemon) == {"since": ["0"]}
    run(capsys, "events", "-n", "3")
    assert asked_of(daemon) == {"since": ["0"], "last": ["3"]}


@pytest.mark.parametrize("knows", [True, False])
def test_a_number_alone_means_the_newest_as_in_journalctl(capsys, daemon, knows):
    """Also where the daemon is of the version before, and gives all."""
    lines = [event(number, f"2026-06-01T00:00:0{number}Z") for number in range(1, 6)]
    daemon.lines = lines[3:] if knows else lines
    out = run(capsys, "events", "-n", "2", "--json")[1]
    assert [json.loads(line)["seq"] for line in out.splitlines()] == [4, 5]
    out = run(capsys, "events", "-n", "1", "--since", "0", "--json")[1]
    assert [json.loads(line)["seq"] for line in out.splitlines()] == [daemon.lines[0]["seq"]]


@pytest.mark.parametrize(("text", "seconds"), [("10m", 600), ("2h", 7200), ("3d", 259200)])
def test_a_while_ago_is_a_time_in_utc(capsys, daemon, text, seconds):
    run(capsys, "events", "--since", text)
    [after] = asked_of(daemon)["after"]
    ago = dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(after)
    assert abs(ago.total_seconds() - seconds) < 30


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2026-06-01", "2026-06-01T00:00:00.000000Z"),
        ("2026-06-01T12:30", "2026-06-01T12:30:00.000000Z"),
        ("2026-06-01T12:30:05+02:00", "2026-06-01T10:30:05.000000Z"),
    ],
)
def test_a_time_is_utc_unless_it_says_otherwise(capsys, daemon, text, utc):
    run(capsys, "events", "--since", text)
    assert asked_of(daemon)["after"] == [utc]


def test_a_daemon_that_ignores_the_words_gives_the_same_lines(capsys, daemon):
    daemon.lines = [
        {"type": "gap", "lost": 5},
        event(6, "2026-05-31T23:59:59.9Z"),
        event(7, "2026-06-01T00:00:00.5Z"),
        event(8, "2026-06-01T00:00:01.5Z", "round.started"),
        event(9, "2026-06-01T00:00:02.5Z"),
        event(10, "2026-06-01T00:00:03.5Z"),
    ]
    words = ("--since", "2026-06-01", "--type", "peer.*", "-n", "2", "--json")
    out = run(capsys, "events", *words)[1]
    assert [json.loads(line).get("seq") for line in out.splitlines()] == [None, 7, 9]


@pytest.mark.parametrize(
    "words",
    [
        ("--since", "yesterday"),
        ("--since", "10 m"),
        ("--since", "1e3"),
        ("--since", ""),
        ("--since", "99999999999d"),
        ("--limit", "x"),
        ("--limit", "-1"),
        ("-n", "1.5"),
    ],
)
def test_what_is_no_time_or_number_is_refused(capsys, daemon, words):
    code, out, err = run(capsys, "events", *words)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 3
    assert daemon.streams == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 5), ("2.5s", 2.5), ("3m", 180), ("3min", 180), ("1h", 3600), ("2d", 172800), ("0", 0)],
)
def test_a_duration_is_a_number_with_a_unit(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "s", "-1s", "nan", "inf", "1e3", "1w", "1 h", "1..2s", "9" * 20]
)
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ConfigError, match="is not a time"):
        duration(text)


# --- monitor -----------------------------------------------------------------------------------


def test_the_log_is_asked_for_at_a_level(capsys, daemon):
    line = {"ts": "2026-06-01T00:00:00Z", "level": "debug", "logger": "p2pfed.x", "message": "hi"}
    daemon.lines = [line, {"type": "gap", "lost": 4}]
    code, out, _ = run(capsys, "monitor", "--level", "debug")
    assert code == 0
    assert daemon.streams == ["/v1/logs?level=debug&follow=1"]
    assert out.splitlines() == [
        "2026-06-01T00:00:00Z  debug    p2pfed.x  hi",
        "… 4 lines were lost: this reader is too slow",
    ]
    out = run(capsys, "monitor", "--json")[1]
    assert json.loads(out.splitlines()[0]) == line
    assert run(capsys, "monitor", "--level", "loud")[0] == 2


def test_a_line_break_in_a_message_makes_no_line_of_its_own():
    told = list(log_lines({"ts": "T", "level": "error", "logger": "x", "message": "a\nb\nc"}))
    assert told == ["T  error    x  a", "    b", "    c"]
    assert list(log_lines({})) == ["None           None  "]


# --- wait --------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", ["peers=1", "round=42", "model=41", "health=ok"])
def test_conditions_that_hold(capsys, daemon, condition):
    assert run(capsys, "wait", "--for", condition, "--timeout", "0")[0] == 0


@pytest.mark.parametrize(
    ("condition", "stands"),
    [
        ("peers=2", "peers=1"),
        ("model=42", "model=41"),
        ("run=finished", "run=training"),
        ("task=ready", "task=running"),
    ],
)
def test_conditions_that_do_not_hold_exit_6_and_say_how_it_stands(
    capsys, daemon, condition, stands
):
    code, out, err = run(capsys, "wait", "--for", "peers=1", "--for", condition, "--timeout", "0")
    assert (code, out) == (6, "")
    assert stands in err


def test_words_are_reached_too(capsys, daemon):
    status = daemon.answers["/v1/status"]
    status["run"]["phase"], status["trainer"]["state"] = "finished", "ready"
    words = ("--for", "run=finished", "--for", "task=ready", "--timeout", "0")
    envelope = json.loads(run(capsys, "wait", *words, "--json")[1])
    assert envelope["schema"] == "p2pfed.wait/1"
    assert envelope["data"]["task"] == "ready"
    status["health"] = ["a", "b"]
    code, _, err = run(capsys, "wait", "--for", "health=ok", "--timeout", "0")
    assert code == 6
    assert "2 warnings" in err


def test_without_a_run_nothing_is_reached(capsys, daemon):
    daemon.answers["/v1/status"]["run"] = None
    assert run(capsys, "wait", "--for", "round=1", "--timeout", "0")[0] == 6
    assert run(capsys, "wait", "--for", "model=1", "--timeout", "0")[0] == 6
    assert run(capsys, "wait", "--for", "run=finished", "--timeout", "0")[0] == 6


@pytest.mark.parametrize("text", ["peers", "peers=", "peers=-1", "run=7", "health=", "=3", "x=ok"])
def test_unknown_conditions_are_refused(capsys, daemon, text):
    code, _, err = run(capsys, "wait", f"--for={text}")
    assert code == 2
    assert "known: peers=N" in err


# --- peers and status --------------------------------------------------------------------------


def ten(**changed: Any) -> list[dict[str, Any]]:
    return [
        {**fakes.PEER, "name": f"University Hospital {n}", "peer_id": str(n), **changed}
        for n in range(10)
    ]


def test_ten_peers_fit_eighty_columns_and_the_names_give_way(capsys, daemon, monkeypatch):
    monkeypatch.setattr("p2pfed.cli.observe.columns", lambda: 80)
    measure = {"name": "val_dice", "round": 41, "value": 0.87654}
    daemon.answers["/v1/peers"] = ten(
        measure=measure, rtt_ms=248.4, seen_s=190.0, path="relay Oslo"
    )
    out = run(capsys, "peers")[1].splitlines()
    assert len(out) == 11
    assert all(len(line) <= 80 for line in out)
    assert out[0].split()[-2:] == ["VAL_DICE", "SEEN"]
    assert "0.8765" in out[1] and "relay " in out[1] and "3 min" in out[1]
    monkeypatch.setattr("p2pfed.cli.observe.columns", lambda: 1000)
    assert "University Hospital 9" in run(capsys, "peers")[1]  # into a pipe, whole


def test_a_model_that_differs_at_the_same_round_is_marked(capsys, daemon):
    run_line = daemon.answers["/v1/status"]["run"]
    ours, round_ = run_line["model_hash"], run_line["model_round"]
    daemon.answers["/v1/peers"] = [
        {**fakes.PEER, "name": "Same", "model_hash": ours, "model_round": round_},
        {**fakes.PEER, "name": "Other", "model_hash": "bb" * 32, "model_round": round_},
        {**fakes.PEER, "name": "Late", "model_hash": "cc" * 32, "model_round": 7},
        {**fakes.PEER, "name": "None", "model_hash": "", "model_round": 0},
    ]
    head, *rows = run(capsys, "peers")[1].splitlines()
    place = slice(head.index("MODEL"), head.index("METRIC"))
    assert [row[place].strip() for row in rows] == ["same", "≠bbbbbb", "of 7", "-"]
    status = run(capsys, "status")[1]
    assert "1 of 2 peers at this round hold the same; NOT: Other" in status
    data = json.loads(run(capsys, "status", "--json")[1])["data"]
    assert data["agreement"] == {"same": ["Same"], "differ": ["Other"]}


def test_peers_of_one_state_alone(capsys, daemon):
    daemon.answers["/v1/peers"] = [*ten()[:2], {**fakes.PEER, "name": "Gone", "state": "left"}]
    out = run(capsys, "peers", "--state", "left", "--json")[1]
    assert [peer["name"] for peer in json.loads(out)["data"]] == ["Gone"]
    assert run(capsys, "peers", "--state", "asleep")[0] == 2


def test_status_fits_eighty_columns(capsys, daemon):
    assert all(len(line) <= 80 for line in run(capsys, "status")[1].splitlines())


def test_status_of_a_node_that_has_left_exits_1(capsys, daemon):
    daemon.answers["/v1/status"]["present"] = False
    assert run(capsys, "status")[0] == 1
    assert run(capsys, "status", "--json")[0] == 1


@pytest.mark.slow
def test_watching_peers_goes_on_when_the_daemon_goes(folder):
    socket = str(folder / "admin.sock")
    command = [
        sys.executable,
        "-m",
        "p2pfed",
        "--socket",
        socket,
        "peers",
        "-w",
        "--interval",
        "0.1",
    ]
    with fakes.daemon(fakes.FakeBackend(), folder / "admin.sock"):
        watching = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert watching.stdout is not None and watching.stderr is not None
        assert watching.stdout.readline().startswith("NAME")
        assert watching.stdout.readline().startswith("Oslo")
    while "waiting for the daemon" not in watching.stdout.readline():
        assert watching.poll() is None
    watching.send_signal(signal.SIGINT)
    watching.communicate(timeout=10)
    assert watching.returncode == 130


def test_an_interval_that_would_never_rest_is_refused(capsys, daemon):
    assert run(capsys, "peers", "-w", "--interval", "0")[0] == 2


# --- whoami, id, help, options before the command ----------------------------------------------


def test_whoami_tells_of_the_node_and_of_the_caller(capsys, daemon):
    out = run(capsys, "whoami")[1]
    assert "peer_id     12D3KooWAbcdefghijklmnop" in out and "you" not in out
    daemon.answers["/v1/version"]["you"] = {"uid": 1000, "name": "alice", "may": "read"}
    assert "you         alice (1000), may read" in run(capsys, "whoami")[1]
    assert json.loads(run(capsys, "--json", "whoami")[1])["data"]["you"]["may"] == "read"


def test_id_fills_in_what_was_asked(capsys, daemon):
    assert run(capsys, "id")[1] == "12D3KooWAbcdefghijklmnop\n"
    assert run(capsys, "id", "-f", r"{name}\nv{roster} {addresses}")[1] == "St Mary\nv7 -\n"
    code, _, err = run(capsys, "id", "-f", "{name.__class__}")
    assert code == 2
    assert "{peer_id}" in err


def test_a_name_with_braces_is_filled_in_as_it_is(capsys, daemon):
    daemon.answers["/v1/status"]["name"] = "{version} \x1b[2J"
    assert run(capsys, "id", "-f", "{name}")[1] == "{version} \N{REPLACEMENT CHARACTER}[2J\n"


def test_help_is_the_same_as_h(capsys):
    assert run(capsys, "help", "peers")[:2] == run(capsys, "peers", "-h")[:2]
    assert run(capsys, "help", "task", "new")[1] == run(capsys, "task", "new", "-h")[1]
    assert run(capsys, "help")[:2] == run(capsys, "-h")[:2]
    assert run(capsys, "help", "nope")[0] == 2


def test_options_may_stand_on_both_sides(capsys, daemon, monkeypatch):
    before = run(capsys, "--json", "status")
    assert before == run(capsys, "status", "--json")
    monkeypatch.setenv("NO_COLOR", "")
    import os

    for words in (("--no-color", "status"), ("status", "--no-color")):
        monkeypatch.setenv("NO_COLOR", "")
        assert run(capsys, *words)[0] == 0
        assert os.environ["NO_COLOR"] == "1"
