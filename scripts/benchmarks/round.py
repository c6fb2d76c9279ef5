"""What a round costs beyond local training, and what joins and kills cost: four real daemons."""

from __future__ import annotations

import datetime as dt
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from digits import SIZES, cast_of, run_of
from rows import Row, parser, show

from p2pfed.demo.federation import Daemon, Federation, wait_for

NODES = 4
KINDS = {"dense": "1", "sparse": "0.05"}
ROUNDS = {10_000: 25, 1_000_000: 15, 10_000_000: 12}
WARM_UP = 2  # the first rounds wait for trainers that load
DEADLINE = 900.0


def main() -> int:
    """Measure and print; returns the exit code."""
    options = parser(__doc__)
    options.add_argument("--sizes", type=int, nargs="+", choices=tuple(SIZES), default=[*SIZES])
    options.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=[*KINDS])
    options.add_argument("--no-churn", action="store_true", help="leave joins and kills out")
    args = options.parse_args()
    for size in args.sizes:
        for kind in args.kinds:
            with tempfile.TemporaryDirectory(prefix="p2pfed-bench-") as folder:
                show(steady(Path(folder), size, kind), as_json=args.json)
    if not args.no_churn:
        with tempfile.TemporaryDirectory(prefix="p2pfed-bench-") as folder:
            show(churn(Path(folder)), as_json=args.json)
    return 0


class Net:
    """Daemons on the digits task."""

    def __init__(self, folder: Path, size: int, constants: dict[str, Any]) -> None:
        self.federation = Federation(folder / "net", cast_of(size, NODES), epsilon="0")
        self.daemons = list(self.federation.daemons.values())
        self.federation.make_run("bench", constants, seed=0)
        self.federation.write_bootstrap()
        self.roster = self.federation.stewards.admit([d.member for d in self.daemons])

    def start(self, daemons: list[Daemon]) -> float:
        """Start daemons and wait until their trainers are ready; seconds to the first delta."""
        for daemon in daemons:
            self.federation.start(daemon)
        wait_for(lambda: all(map(_trainer_ready, daemons)), DEADLINE, "the trainers are ready")
        began = time.monotonic()
        for daemon in daemons:
            self.federation.enrol(daemon, self.roster)
        wait_for(lambda: _run(daemons[0]).get("deltas", 0) > 0, DEADLINE, "the first round")
        return time.monotonic() - began


def steady(folder: Path, size: int, kind: str) -> list[Row]:
    """One network through one run."""
    net = Net(folder, size, run_of(ROUNDS[size], share=KINDS[kind]))
    with net.federation.running():
        first = net.start(net.daemons)
        wait_for(lambda: all(map(_finished, net.daemons)), DEADLINE, "the run ends")
        times = _round_times(net.daemons[0])
        training = [_training_times(daemon) for daemon in net.daemons]
        sent = [_status(d)["traffic"]["sent_bytes"] for d in net.daemons]
        accuracy = max(_accuracies(net.daemons[0]))
        hashes = {_run(d)["model_hash"] for d in net.daemons}
    assert len(hashes) == 1, "the daemons end on different models"
    rounds = sorted(times)[WARM_UP:]
    over = [times[r] - max(known.get(r, 0.0) for known in training) for r in rounds]
    name, per = f"{kind}/{_short(size)}", ROUNDS[size] * 1e6
    return [
        Row(f"{name}/round", statistics.median(times[r] for r in rounds), "s", better="lower"),
        Row(f"{name}/beyond_training", statistics.median(over), "s", better="lower"),
        Row(f"{name}/sent_per_node_and_round", statistics.mean(sent) / per, "MB", better="lower"),
        Row(f"{name}/best_accuracy", accuracy, "accuracy", better="higher"),
        Row(f"{name}/ready_to_first_delta", first, "s", better="lower"),
    ]


def churn(folder: Path) -> list[Row]:
    """A late joiner, a SIGKILL of a member and one of the bootstrap node, at ten thousand."""
    net = Net(folder, 10_000, run_of(400, min_round_interval_s=0.5, deadline_s=5.0))
    first, *others, late = net.daemons
    with net.federation.running():
        net.start([first, *others])
        _let_rounds_pass(others[0], 5)
        net.federation.start(late)
        wait_for(lambda: _trainer_ready(late), DEADLINE, "the joiner's trainer is ready")
        began = time.monotonic()
        net.federation.enrol(late, net.roster)
        wait_for(lambda: _run(late).get("own_deltas", 0) > 0, DEADLINE, "the joiner's first delta")
        joined = time.monotonic() - began
        rows = [Row("join_to_first_own_delta", joined, "s", better="lower")]
        for name, victim in (("member", others[1]), ("bootstrap", first)):
            rows += _killed(net, name, victim, watcher=others[0])
    return rows


def _killed(net: Net, name: str, victim: Daemon, *, watcher: Daemon) -> list[Row]:
    _let_rounds_pass(watcher, 8)
    at = _run(watcher)["round"]
    net.federation.kill(victim)
    _let_rounds_pass(watcher, 10)
    times = _round_times(watcher)
    before = statistics.median(times[r] for r in range(at - 6, at - 1))
    worst = max(times[r] for r in range(at - 1, at + 4))
    after = statistics.median(times[r] for r in range(at + 4, at + 9))
    net.federation.start(victim)
    wait_for(lambda: _trainer_ready(victim), DEADLINE, f"the {name} is back")
    return [
        Row(f"kill_{name}/worst_round", worst, "s", "a round before", worst / before, "lower"),
        Row(f"kill_{name}/rounds_after", after, "s", "a round before", after / before, "lower"),
    ]


def _short(size: int) -> str:
    return {10_000: "10k", 1_000_000: "1M", 10_000_000: "10M"}[size]


def _status(daemon: Daemon) -> dict[str, Any]:
    status = daemon.status()
    assert status is not None, f"{daemon.name} does not answer"
    return status


def _run(daemon: Daemon) -> dict[str, Any]:
    return _status(daemon)["run"] or {}


def _trainer_ready(daemon: Daemon) -> bool:
    return _status(daemon)["trainer"]["state"] == "ready"


def _finished(daemon: Daemon) -> bool:
    run = _run(daemon)
    return bool(run) and run["model_round"] == run["rounds"]


def _let_rounds_pass(daemon: Daemon, rounds: int) -> None:
    goal = _run(daemon)["round"] + rounds
    wait_for(lambda: _run(daemon)["round"] >= goal, DEADLINE, "rounds pass")


def _round_times(daemon: Daemon) -> dict[int, float]:
    """Seconds from each round's start to the next one's, by the node's own events."""
    started = {
        event["data"]["round"]: dt.datetime.fromisoformat(event["ts"]).timestamp()
        for event in daemon.client.stream("/v1/events?since=0&limit=20000")
        if event["type"] == "round.started"
    }
    return {r: started[r + 1] - started[r] for r in started if r + 1 in started}


def _training_times(daemon: Daemon) -> dict[int, float]:
    """Seconds of each round that the trainer worked, by the trainer's own private socket."""
    rounds = daemon.private.get("/v1/status")["rounds"]
    return {  # waiting for peers is not on the way from the question to the answer
        entry["round"]: sum(s for kind, s in entry["seconds"].items() if kind != "peers")
        for entry in rounds
    }


def _accuracies(daemon: Daemon) -> list[float]:
    metrics = daemon.private.get("/v1/metrics")["metrics"]
    return [entry["values"]["accuracy"] for entry in metrics]


if __name__ == "__main__":
    sys.exit(main())
