"""How fast the simulator is: node-hours per CPU second and memory, at 50 and 1000 hospitals.

The scenario is `province-30` with another number of members (`network-1000` for 1000): beats every
60 s, a tick every 5 s, rounds of ten minutes, one crash an hour, no training. Signatures are real,
but bytes that N nodes would verify are verified once; one fold in `full_fold_every` is done in
full, the others take the model of the same chain over. Invariants are not checked.
The baseline is a bare heap that pushes and pops as many events in the same process.
"""

from __future__ import annotations

import heapq
import re
import resource
import subprocess
import sys
import time
from importlib.resources import files

from rows import Row, parser, show

from p2pfed.simulate.play import Stage
from p2pfed.simulate.scenario import Scenario, read_scenario

RUNS = {50: ("province-30", 7200.0), 1000: ("network-1000", 900.0)}


def main() -> int:
    """Measure each size in a process of its own, and print."""
    options = parser(__doc__)
    options.add_argument("--sizes", type=int, nargs="+", choices=tuple(RUNS), default=[*RUNS])
    options.add_argument("--one", help="used by the benchmark itself")
    args = options.parse_args()
    if args.one:
        size, traced = args.one.split(",")
        print(*measured(int(size), traced=traced == "traced"))
        return 0
    rows = []
    for size in args.sizes:
        for kind in ("traced", "plain"):
            command = [sys.executable, __file__, "--one", f"{size},{kind}"]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            hours, seconds, events, bare, kilobytes = map(float, told.split())
            name = f"simulate/{size}/{kind}"
            rate, most = hours / seconds, events / bare
            rows += [
                Row(f"{name}/node_hours", rate, "node-hours per CPU second", better="higher"),
                Row(
                    f"{name}/events",
                    events / seconds,
                    "events/s",
                    "bare heap",
                    events / seconds / most,
                    "higher",
                ),
                Row(f"{name}/memory_per_node", kilobytes, "KB", better="lower"),
            ]
    show(rows, as_json=args.json)
    return 0


def scenario_of(size: int) -> tuple[Scenario, float]:
    """The scenario and the simulated seconds that are measured."""
    name, until = RUNS[size]
    text = (files("p2pfed.simulate") / "scenarios" / f"{name}.toml").read_text("utf-8")
    return read_scenario(re.sub(r"(?m)^count = \d+", f"count = {size}", text), name), until


def measured(size: int, *, traced: bool) -> tuple[float, float, int, float, float]:
    """Node-hours, CPU seconds, events, CPU seconds of the bare heap, KB per node."""
    scenario, until = scenario_of(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stage = Stage(scenario, 0, traced=traced, checked=False)
    began = time.process_time()
    stage.run_until(until)
    seconds = time.process_time() - began
    stage.count_hours()
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / size
    events = stage.heap.events
    return stage.node_seconds / 3600, seconds, events, _bare(events, 20 * size), memory


def _bare(events: int, waiting: int) -> float:
    heap = [(i * 0.37 % 5, i) for i in range(waiting)]
    heapq.heapify(heap)
    began = time.process_time()
    for i in range(events):
        now, _ = heapq.heappop(heap)
        heapq.heappush(heap, (now + i * 0.61 % 5, i))
    return time.process_time() - began


if __name__ == "__main__":
    sys.exit(main())
