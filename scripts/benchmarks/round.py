"""What a round costs beyond local training: five real daemons, 0.1, 1 and 10 million parameters."""

from __future__ import annotations

import datetime as dt
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dense import cast_of, run_of
from rows import Row, parser, show

from p2pfed.demo.federation import Daemon, Federation, wait_for

NODES = 5
ROUNDS = {100_000: 12, 1_000_000: 10, 10_000_000: 6}
WARM_UP = 1  # the first round waits for five trainers to import torch
DEADLINE = 900.0


def main() -> int:
    """Measure and print; returns the exit code."""
    options = parser(__doc__)
    options.add_argument("--sizes", type=int, nargs="+", choices=tuple(ROUNDS), default=[*ROUNDS])
    args = options.parse_args()
    for size in args.sizes:
        with tempfile.TemporaryDirectory(prefix="p2pfed-bench-") as folder:
            show(measured(Path(folder), size), as_json=args.json)
    return 0


def measured(folder: Path, size: int) -> list[Row]:
    """One network of daemons through one run."""
    federation = Federation(folder / "net", cast_of(size, NODES), epsilon="0")
    with federation.running():
        federation.make_run("bench", run_of(ROUNDS[size]), seed=0)
        federation.write_bootstrap()
        roster = federation.stewards.admit([d.member for d in federation.daemons.values()])
        daemons = list(federation.daemons.values())
        for daemon in daemons:
            federation.start(daemon)
        began = time.monotonic()
        for daemon in daemons:
            federation.enrol(daemon, roster)
        wait_for(lambda: _has_delta(daemons[0]), DEADLINE, "the first round")
        first = time.monotonic() - began
        wait_for(lambda: all(map(_finished, daemons)), DEADLINE, "the run ends")
        whole = _round_times(daemons[0])
        training = [_training_times(daemon) for daemon in daemons]
        sent = [_status(d)["traffic"]["sent_bytes"] for d in daemons]
    rounds = sorted(whole)[WARM_UP:]
    over = [whole[r] - max(times.get(r, 0.0) for times in training) for r in rounds]
    name = f"{size / 1e6:g}M"
    return [
        Row(f"{name}.round", statistics.median(whole[r] for r in rounds), "s", better="lower"),
        Row(f"{name}.round_beyond_training", statistics.median(over), "s", better="lower"),
        Row(
            f"{name}.sent_per_node_and_round",
            statistics.mean(sent) / ROUNDS[size] / 1e6,
            "MB",
            better="lower",
        ),
        Row(f"{name}.accept_to_first_delta", first, "s", better="lower"),
    ]


def _status(daemon: Daemon) -> dict[str, Any]:
    status = daemon.status()
    assert status is not None, f"{daemon.name} does not answer"
    return status


def _has_delta(daemon: Daemon) -> bool:
    run = _status(daemon)["run"]
    return run is not None and run["deltas"] > 0


def _finished(daemon: Daemon) -> bool:
    run = _status(daemon)["run"]
    return run is not None and run["model_round"] == run["rounds"]


def _round_times(daemon: Daemon) -> dict[int, float]:
    """Seconds from each round's start to its end, by the node's own events."""
    started: dict[int, float] = {}
    lasted: dict[int, float] = {}
    for event in daemon.client.stream("/v1/events?since=0"):
        at = dt.datetime.fromisoformat(event["ts"]).timestamp()
        if event["type"] == "round.started":
            started[event["data"]["round"]] = at
        elif event["type"] == "round.finished":
            lasted[event["data"]["round"]] = at - started[event["data"]["round"]]
    return lasted


def _training_times(daemon: Daemon) -> dict[int, float]:
    """Seconds of each round that the trainer worked, by its own private socket."""
    rounds = daemon.private.get("/v1/status")["rounds"]
    return {entry["round"]: sum(entry["seconds"].values()) for entry in rounds}


if __name__ == "__main__":
    sys.exit(main())
