"""Admin socket: latency at rest and in a busy network, a thousand at once, events, commands.

Real daemons of a network of three trainers and a bootstrap peer. Every latency stands beside that
of a bare echo over a Unix socket (trio, its own process), measured in turn with it.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from digits import cast_of, run_of
from rows import Row, parser, show
from startup import command_rows

from p2pfed.demo.federation import Daemon, Federation, wait_for
from p2pfed.errors import P2PFedError, TimedOut
from p2pfed.identity.rules import Outer
from p2pfed.node.eventlog import EventLog
from p2pfed.node.store import KeptEvent, Store

TRAINERS = 3
SIZE = 1_000_000  # parameters
ROUNDS = 5_000  # more than are played
CALLS = 400  # of each kind
AT_ONCE = 1_000
EVENTS = 1_000_000
COMMANDS = {f"command.{verb}": verb for verb in ("status", "peers")}
STARTS = 15
CONSTANTS = {
    **run_of(ROUNDS, share="0.1", outer=Outer("fedadam", 0.01), robust="clip-median"),
    "min_round_interval_s": 0.5,
}

ECHO = """
import sys, trio
async def serve(stream):
    async for data in stream:
        await stream.send_all(b"HTTP/1.1 200 OK\\r\\nContent-Length: 999\\r\\n\\r\\n" + bytes(999))
async def main():
    listening = trio.socket.socket(trio.socket.AF_UNIX)
    await listening.bind(sys.argv[1])
    listening.listen(64)
    print("ready", flush=True)
    await trio.serve_listeners(serve, [trio.SocketListener(listening)])
trio.run(main)
"""


def main() -> int:
    """Measure and print; returns the exit code."""
    args = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="p2pfed-bench-") as name:
        folder = Path(name)
        show(_events(folder), as_json=args.json)
        show(_network(folder), as_json=args.json)
    return 0


# --- a network ---------------------------------------------------------------------------------


def _network(folder: Path) -> list[Row]:
    federation = Federation(folder / "net", cast_of(SIZE, TRAINERS), epsilon="0")
    with federation.running(), _echo(folder / "echo.sock") as echo:
        federation.make_run("bench", CONSTANTS, seed=0)
        federation.write_bootstrap()
        daemons = list(federation.daemons.values())
        roster = federation.stewards.admit([d.member for d in daemons])
        for daemon in daemons:
            federation.start(daemon)
        rows = _latencies("idle", federation.first, echo)
        rows += command_rows(federation.first, COMMANDS, STARTS)
        for daemon in daemons:
            federation.enrol(daemon, roster)
        wait_for(lambda: _round(daemons[-1]) >= 2, 120, "rounds begin")
        rows += _latencies("training", daemons[-1], echo)
        before = _round(daemons[-1])
        rows += _at_once(daemons[-1])
        wait_for(lambda: _round(daemons[-1]) >= before + 2, 60, "rounds go on")
        assert all(daemon.runs for daemon in daemons)
    return rows


@contextmanager
def _echo(path: Path) -> Iterator[Path]:
    process = subprocess.Popen([sys.executable, "-c", ECHO, path], stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield path
        finally:
            process.kill()


def _round(daemon: Daemon) -> int:
    status = daemon.status()
    return status["run"]["round"] if status is not None and status["run"] else -1


def _latencies(when: str, daemon: Daemon, echo: Path) -> list[Row]:
    admin = daemon.sockets / "admin.sock"
    measures: dict[str, Callable[[], float]] = {
        what: lambda what=what: _asked(admin, f"/v1/{what}") for what in ("status", "peers")
    }
    measures["echo"] = lambda: _asked(echo, "/")
    times: dict[str, list[float]] = {what: [] for what in measures}
    for _ in range(CALLS):
        for what, measure in measures.items():
            times[what].append(1000 * measure())
            time.sleep(0.003)  # as a person's or dashboard's calls come: not in one burst
    base = {
        name: kind(times["echo"]) for name, kind in (("median", statistics.median), ("p99", _p99))
    }
    return [
        Row(
            f"{what}.{when}.{name}",
            kind(times[what]),
            "ms",
            f"bare echo's {name}",
            kind(times[what]) / base[name],
            "lower",
        )
        for what in ("status", "peers")
        for name, kind in (("median", statistics.median), ("p99", _p99))
    ]


def _p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


def _asked(path: Path, target: str) -> float:
    """Seconds from the connection to the answer's first piece."""
    began = time.perf_counter()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(os.fspath(path))
        head = f"GET {target} HTTP/1.1\r\nHost: p2pfed\r\nConnection: close\r\n\r\n"
        client.sendall(head.encode())
        answer = client.recv(1 << 16)
    if not answer.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(answer[:80].decode("latin1"))
    return time.perf_counter() - began


def _at_once(daemon: Daemon) -> list[Row]:
    """A thousand clients at the same moment, by the program's own client."""
    outcomes: list[str] = []
    gate = threading.Barrier(AT_ONCE + 1)

    def one() -> None:
        gate.wait()
        try:
            daemon.client.get("/v1/peers")
            outcomes.append("answered")
        except TimedOut:
            outcomes.append("busy")
        except P2PFedError as error:
            outcomes.append(error.what)

    threading.stack_size(256 * 1024)
    threads = [threading.Thread(target=one) for _ in range(AT_ONCE)]
    for thread in threads:
        thread.start()
    gate.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    return [
        Row("at_once.seconds", seconds, f"s for {AT_ONCE} requests while training", better="lower"),
        Row("at_once.answered", outcomes.count("answered"), "requests", better="higher"),
        Row(
            "at_once.refused_as_busy",
            outcomes.count("busy"),
            "requests",
            better="lower",
        ),
    ]


# --- a million events --------------------------------------------------------------------------


def _events(folder: Path) -> list[Row]:
    """Queries among a million events of the kinds and sizes that a run makes."""
    kinds = ["round.started", "round.released", "model.folded", "peer.joined", "peer.away"]
    kinds += ["admin.write", *(f"rare.kind{i}" for i in range(30))]
    store = Store(folder / "events.db")
    data = {"round": 1, "hash": "ab" * 16, "seconds": 1.25, "peer": "12D3KooW" + "x" * 44}
    day = 1_770_000_000_000

    def event(n: int) -> KeptEvent:
        kind = kinds[n % 3] if n % 50 else kinds[n // 50 % len(kinds)]
        text = {"v": 1, "seq": n, "ts": "2026-01-01T00:00:00.000000Z", "type": kind, "data": data}
        return KeptEvent(n, kind, day + 1000 * n, json.dumps(text))

    slowest = 0.0
    for first in range(1, EVENTS + 1, 10_000):
        store.add_events(event(n) for n in range(first, first + 10_000))
    log = EventLog(store, lambda: dt.datetime.now(dt.UTC))
    half = dt.datetime.fromtimestamp((day + 500 * EVENTS) / 1000, dt.UTC)
    queries: dict[str, Callable[[], object]] = {
        "first": lambda: log.find(0, 500),
        "last": lambda: log.find(EVENTS - 500, 500),
        "type_common": lambda: log.find(EVENTS // 2, 500, kind="round.*"),
        "type_rare": lambda: log.find(0, 500, kind="admin.*"),
        "type_many": lambda: log.find(0, 500, kind="rare.*"),
        "type_none": lambda: log.find(0, 500, kind="nothing.*"),
        "time": lambda: log.find(0, 500, after=half),
        "time_and_type": lambda: log.find(0, 500, kind="peer.*", after=half),
        "open": lambda: EventLog(store, lambda: half),
    }
    rows = []
    for name, query in queries.items():
        times = [_milliseconds(query) for _ in range(21)]
        rows.append(Row(f"events.{name}.median", statistics.median(times), "ms", better="lower"))
        slowest = max(slowest, *times)
    rows.append(Row("events.slowest_query", slowest, "ms", better="lower"))
    log.add("kind", {})
    adding = []
    for _ in range(200):  # each drops as many as it adds
        log.add("kind", data)
        adding.append(_milliseconds(log.flush))
    rows.append(Row("events.write_and_trim.p99", _p99(adding), "ms", better="lower"))
    size = (folder / "events.db").stat().st_size
    rows.append(Row("events.bytes", size / EVENTS, "bytes an event", better="lower"))
    store.close()
    return rows


def _milliseconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
