"""`p2pfed demo`: a short one from end to end, one that is interrupted, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fair_clock import FairClock

from p2pfed.cli.main import main
from p2pfed.demo import federation as module
from p2pfed.demo.federation import Federation
from p2pfed.demo.plan import Cast, Hospital

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

ROUNDS = 12


@pytest.fixture
def out() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="p2pfed-test-demo-"))
    yield folder / "out"
    shutil.rmtree(folder)


def processes_of(out: Path) -> list[int]:
    """Processes whose command line names the demo's folder: its daemons and their trainers."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.fsencode(out) in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def demo(out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "p2pfed", "demo", "--out", str(out), *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


# --- from end to end ---------------------------------------------------------------------------


def test_a_short_demo_succeeds_tells_everything_as_json_and_leaves_nothing_running(out):
    process = demo(out, "--json", "--rounds", str(ROUNDS))
    told, said = process.communicate(timeout=400)
    assert process.returncode == 0, said
    (line,) = told.splitlines()
    envelope = json.loads(line)
    assert envelope["ok"] is True
    assert envelope["schema"] == "p2pfed.demo/1"
    data = envelope["data"]
    assert data["failures"] == []
    gate = data["gate"]
    assert set(gate) == {"Ashford", "Birchwood", "Cedar Hill", "Elmsley"}  # Dunmore left
    assert len({s["run"]["model_hash"] for s in gate.values()}) == 1
    assert {s["run"]["model_round"] for s in gate.values()} == {ROUNDS}
    assert all(0 < s["privacy"]["spent_epsilon"] <= 10 for s in gate.values())
    assert all(s["traffic"]["sent_bytes"] > 0 for s in gate.values())
    assert gate["Elmsley"]["run"]["own_deltas"] < gate["Ashford"]["run"]["own_deltas"]
    assert len({s["run"]["model_hash"] for s in data["none"].values()}) == 1
    for one in data["comparison"]:
        for part in ("alone", "together_gate", "together_none", "pooled"):
            assert 0.5 <= one[part]["everyone"] <= 1
    written = json.loads((out / "report.json").read_text("utf-8"))
    assert written["comparison"] == data["comparison"]
    lines = [text for text in said.splitlines() if text.strip()]
    for text in (lines[0], lines[-1]):  # the terms of privacy frame everything
        assert "mechanism svt" in text
        assert "ε = 10" in text
        assert "δ = 1e-5" in text
        assert "patient" in text
    for chapter in ("SIGKILL to Birchwood", "restarting Birchwood", "joins late", "leaves for"):
        assert chapter in said
    assert processes_of(out) == []


@pytest.mark.parametrize(
    ("number", "times", "code"), [(signal.SIGINT, 1, 130), (signal.SIGTERM, 3, 143)]
)
def test_an_interrupt_in_the_middle_leaves_no_process_behind(out, number, times, code):
    process = demo(out, "--rounds", str(ROUNDS))
    try:
        deadline = time.monotonic() + 60
        while len(processes_of(out)) < 4:  # the demo itself, a daemon, its trainer, one more
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for _ in range(times):  # impatience does not help
            process.send_signal(number)
            time.sleep(0.2)
        _, said = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, said
    assert "Traceback" not in said
    deadline = time.monotonic() + 3  # a killed process is in the table until it is collected
    while processes_of(out) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(out) == []


# --- the moments in which an interrupt could leave something behind -----------------------------


@pytest.fixture
def network(tmp_path, monkeypatch):
    """A federation whose only daemon is a long sleep."""
    made: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def sleeper(*_args, **options):
        made.append(real(["sleep", "600"], start_new_session=options["start_new_session"]))
        return made[-1]

    monkeypatch.setattr(module.subprocess, "Popen", sleeper)
    cast = Cast("breast-cancer", None, (Hospital("Gate", 0),), "", "", "")
    yield Federation(tmp_path / "nodes", cast, epsilon="10"), made
    for process in made:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_a_daemon_starts_does_not_lose_the_daemon(network, monkeypatch, number):
    federation, made = network
    sleeper = module.subprocess.Popen

    def interrupted(*args, **options):
        process = sleeper(*args, **options)
        signal.raise_signal(number)  # the process is there and nobody has seen it yet
        return process

    def stop(_number, _frame):
        raise SystemExit(143)

    monkeypatch.setattr(module.subprocess, "Popen", interrupted)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)), federation.running():
            federation.start(federation.first)
    finally:
        signal.signal(signal.SIGTERM, before)
    (process,) = made
    assert process.poll() is not None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_while_the_daemons_are_stopped_does_not_stop_the_stopping(
    network, monkeypatch, number
):
    federation, made = network
    stop_all = federation.stop_all

    def interrupted() -> None:
        signal.raise_signal(number)
        stop_all()

    monkeypatch.setattr(federation, "stop_all", interrupted)
    handler = signal.getsignal(number)
    with federation.running():
        federation.first.process = module.subprocess.Popen(start_new_session=True)
    (process,) = made
    assert process.poll() is not None
    assert signal.getsignal(number) is handler


# --- what it refuses ---------------------------------------------------------------------------


def test_a_missing_data_folder_is_told_at_once(out, capsys):
    clock = FairClock()
    assert main(["demo", "--data", str(out / "nothing"), "--out", str(out)]) == 2
    assert clock.within(10)
    assert f"{out / 'nothing'} is not a folder" in capsys.readouterr().err
    assert processes_of(out) == []


def test_a_folder_that_is_not_a_demos_is_refused_and_untouched(out, capsys):
    out.mkdir()
    (out / "thesis.txt").write_text("the only copy")
    assert main(["demo", "--out", str(out)]) == 2
    told = capsys.readouterr()
    assert str(out) in told.err
    assert "--out" in told.err
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    assert (out / "thesis.txt").read_text() == "the only copy"


@pytest.mark.parametrize("epsilon", ["0", "-1", "nan", "inf", "ten", "1e9"])
def test_a_budget_that_is_none_is_refused(out, capsys, epsilon):
    assert main(["demo", "--out", str(out), f"--epsilon={epsilon}"]) == 2
    assert "--epsilon" in capsys.readouterr().err
