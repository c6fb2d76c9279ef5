"""Start and size: `p2pfed status` against bare Python, CPU and memory of a daemon."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from digits import cast_of, run_of
from rows import Row, parser, show

from p2pfed.demo.federation import Daemon, Federation, wait_for
from p2pfed.demo.plan import Cast, Hospital
from p2pfed.identity.rules import Outer

SIZES = (1_000_000, 10_000_000)
STARTS = 5
CALLS = 21
TRAINERS = 3
ROUNDS = 4
CONSTANTS = run_of(ROUNDS, share="0.1", outer=Outer("fedadam", 0.01), robust="clip-median")
DEADLINE = 600.0
TICKS = os.sysconf("SC_CLK_TCK")


def main() -> int:
    """Measure and print; returns the exit code."""
    args = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="p2pfed-bench-") as folder:
        rows, idle = _idle(Path(folder))
        show(rows, as_json=args.json)
    for size in SIZES:
        with tempfile.TemporaryDirectory(prefix="p2pfed-bench-") as folder:
            show([_peak(Path(folder), size, idle)], as_json=args.json)
    return 0


def _idle(folder: Path) -> tuple[list[Row], float]:
    """A bootstrap-only daemon: how it starts, what it holds, how fast it answers."""
    node = Hospital("Bootstrap", 0)
    federation = Federation(folder / "net", Cast("", None, (node,), "", "", ""), epsilon="0")
    federation.write_bootstrap()
    daemon = federation.first
    with federation.running():
        cpu, resident = [], []
        for _ in range(STARTS):
            federation.start(daemon)
            cpu.append(_cpu_seconds(daemon))
            if len(cpu) == 1:
                roster = federation.stewards.admit([daemon.member])
                daemon.client.post("/v1/join", {"roster": roster.decode()})
            time.sleep(2)  # beats and ticks have run
            resident.append(_memory(daemon, "VmRSS"))
            if len(cpu) < STARTS:
                federation.stop(daemon)
        commands = command_rows(daemon, {"status_command": "status"}, CALLS)
    idle = statistics.median(resident)
    return [
        *commands,
        Row("daemon_cpu_until_ready", statistics.median(cpu), "s", better="lower"),
        Row("network_process_memory", idle / 1e6, "MB", better="lower"),
    ], idle


def _peak(folder: Path, size: int, idle: float) -> Row:
    """The largest network process of a network that trains a model of this size."""
    federation = Federation(folder / "net", cast_of(size, TRAINERS), epsilon="0")
    with federation.running():
        federation.make_run("bench", CONSTANTS, seed=0)
        federation.write_bootstrap()
        daemons = list(federation.daemons.values())
        federation.start_all()
        wait_for(lambda: all(map(_finished, daemons)), DEADLINE, "the run ends")
        peak = max(_memory(daemon, "VmHWM") for daemon in daemons)
    name = f"network_process_memory.{size / 1e6:g}M_parameters.peak_above_idle"
    return Row(name, (peak - idle) / size, "bytes per parameter", better="lower")


def command_rows(daemon: Daemon, verbs: Mapping[str, str], times: int) -> list[Row]:
    """How long commands against a daemon take, each measured in turn with bare Python.

    Each is run in both ways in which a daemon is found: its socket is named, or the configuration
    that names it, as it is found by itself in /etc/p2pfed.

    Args:
        daemon: Answers them.
        verbs: The verb of each command, by the name of its row.
        times: How often each runs.
    """
    script = Path(sys.executable).with_name("p2pfed")
    program = [str(script)] if script.exists() else [sys.executable, "-m", "p2pfed"]
    ways = {
        "": ["--socket", str(daemon.sockets / "admin.sock")],
        ".by_configuration": ["-c", str(daemon.folder / "p2pfed.toml")],
    }
    commands = {
        name + way: [*program, *found_by, verb]
        for name, verb in verbs.items()
        for way, found_by in ways.items()
    }
    for command in commands.values():
        _timed(command)  # compiles
    commands["bare"] = [sys.executable, "-c", "pass"]
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(times):
        for name, command in commands.items():
            took[name].append(_timed(command))
    medians = {
        name: [statistics.median(of) for of in zip(*t, strict=True)] for name, t in took.items()
    }
    bare = medians.pop("bare")
    return [
        Row(name + kind, value, "s", f"python -c pass{kind}", value / base, "lower")
        for name, values in medians.items()
        for kind, value, base in zip(("", ".cpu"), values, bare, strict=True)
    ]


def _timed(command: list[str]) -> tuple[float, float]:
    """Seconds on the clock, and of the processor's time."""
    # Its modules may be kept compiled, like those of an installed program.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _finished(daemon: Daemon) -> bool:
    status = daemon.status()
    run = status["run"] if status is not None else None
    return run is not None and run["model_round"] == run["rounds"]


def _memory(daemon: Daemon, field: str) -> float:
    assert daemon.process is not None
    text = Path(f"/proc/{daemon.process.pid}/status").read_text()
    line = next(line for line in text.splitlines() if line.startswith(f"{field}:"))
    return 1024.0 * int(line.split()[1])


def _cpu_seconds(daemon: Daemon) -> float:
    """User and system time of the daemon, without its children."""
    assert daemon.process is not None
    fields = Path(f"/proc/{daemon.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


if __name__ == "__main__":
    sys.exit(main())
