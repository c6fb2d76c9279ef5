"""Plays seeds of bundled scenarios until enough simulated node-hours are over; see scripts/soak.

One line of JSON per seed goes to the log, which is also what makes it resumable. Ends with 1 at the
first broken invariant and says how to replay it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

# Names and weights: how often a scenario's turn comes.
SCENARIOS = ["soak", "province-30", "crash-storm", "soak", "half-half", "swizzle", "byzantine"]
SCENARIOS += ["partition-long", "rosters", "forget", "loss", "flapping", "leavers", "slow"]
SCENARIOS += ["clocks", "one-way", "equivocator", "far-ahead", "rollback", "partition-short"]


def main() -> int:
    """Play until it is enough; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=10_000, help="node-hours in all")
    parser.add_argument("--log", type=Path, default=Path("soak.jsonl"))
    parser.add_argument("--scenarios", nargs="+", default=SCENARIOS)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    done = _read(args.log)
    hours = sum(entry["node_hours"] for entry in done)
    broken = [entry for entry in done if entry["broken"]]
    played = {(entry["scenario"], entry["seed"]) for entry in done}
    turns = (turn for turn in _turns(args.scenarios) if turn not in played)
    running: set[Future[dict[str, Any]]] = set()
    with ThreadPoolExecutor(args.workers) as pool, args.log.open("a", encoding="utf-8") as log:
        while not broken and (hours < args.hours or running):
            while hours < args.hours and len(running) < args.workers:
                running.add(pool.submit(_play, *next(turns)))
            over, running = wait(running, return_when=FIRST_COMPLETED)
            for entry in (future.result() for future in over):
                log.write(json.dumps(entry) + "\n")
                log.flush()
                done.append(entry)
                hours += entry["node_hours"]
                broken += [entry] if entry["broken"] else []
                print(f"{entry['scenario']} seed {entry['seed']}: {hours:.0f} node-hours in all")
    seeds = len(done)
    for entry in broken:
        print(f"{entry['scenario']} seed {entry['seed']}: {entry['broken']}", file=sys.stderr)
        print(
            f"replay: p2pfed simulate {entry['scenario']} --seed {entry['seed']}", file=sys.stderr
        )
    print(f"{hours:.0f} node-hours, {seeds} seeds, {len(broken)} with a broken invariant")
    return 1 if broken else 0


def _turns(scenarios: list[str]) -> Any:
    """(scenario, seed) without end; a name that stands twice gets two seeds in each lap."""
    seeds = {name: itertools.count() for name in scenarios}
    for name in itertools.cycle(scenarios):
        yield name, next(seeds[name])


def _play(scenario: str, seed: int) -> dict[str, Any]:
    """One seed in a process of its own."""
    began = time.monotonic()
    command = [sys.executable, "-m", "p2pfed", "simulate", scenario, "--seed", str(seed)]
    told = subprocess.run([*command, "--json", "-"], capture_output=True, text=True, check=False)
    try:
        [result] = json.loads(told.stdout)["data"]["seeds"]
    except (ValueError, KeyError) as error:
        raise SystemExit(f"{' '.join(command)} said nothing of use: {told.stderr}") from error
    return {
        "scenario": scenario,
        "seed": seed,
        "node_hours": result["node_hours"],
        "broken": result["broken"],
        "trace": result["trace"],
        "seconds": round(time.monotonic() - began, 1),
    }


def _read(log: Path) -> list[dict[str, Any]]:
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text("utf-8").splitlines() if line.strip()]


if __name__ == "__main__":
    sys.exit(main())
