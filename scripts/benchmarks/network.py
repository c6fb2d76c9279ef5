"""Our links against bare TCP, libsodium, TLS 1.3 and stock libp2p; lag, memory, soak.

`network/WAY/SIZE` is what one stream between two processes carries, and `/cpu` what all processes
of that way spend together. One run takes all ways in turn, up and down; a value is the median over
all rounds and both directions, a ratio is between medians of the same run. Wall time depends on
what else the machine does; the CPU rows and the ratios are what to compare. The ways are described
in `network_baselines.py` and `network_ways.py`, the rows of `network/lag`, `network/memory` and
`network/soak` in `network_crowd.py`.

A row that has a goal says after the table whether it was met, and carries it with --json.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import network_crowd
import network_ways
from goals import Goal, tell
from network_processes import Child, Failed
from network_ways import CHECKED, MIB, WAYS, Setting
from rows import Row, parser

PARTS = ("throughput", "lag", "memory")
SIZES = (64, 256)
QUICK_SIZES = (16,)
START_SECONDS = 60.0
SLOWEST = 2 * MIB  # bytes a second; what is slower stands still
GIB = 1 << 30
# What is compared with what, and the goals: times as fast (at least), times the CPU (at most).
COMPARED = {
    ("ours", "raw+libsodium"): (1.5, 1 / 1.5),
    ("ours", "stock"): (4.0, 1 / 4.0),
    ("ours", "raw-tcp"): (None, None),
    ("ours", "tls13"): (None, None),
    ("relay", "ours"): (0.12, 4.0),
}


class Running:
    """The processes of one way.

    Args:
        name: The way.
        setting: What both ends are told.
        stack: Ends the processes.
    """

    def __init__(self, name: str, setting: Setting, stack: ExitStack) -> None:
        self.name = name
        self._processes: list[Child] = []
        if WAYS[name].relay is not None:
            between = Child(f"the relay of {name}", network_ways.relay, name)
            self._processes.append(stack.enter_context(between))
            setting = replace(setting, via=between.hear(START_SECONDS))
        server = Child(f"the server of {name}", network_ways.server, name, setting)
        self._processes.append(stack.enter_context(server))
        address = server.hear(START_SECONDS)
        self._client = Child(f"the client of {name}", network_ways.client, name, setting, address)
        self._processes.append(stack.enter_context(self._client))

    def transfer(self, *, up: bool, size: int) -> tuple[float, float]:
        """Seconds on the wall, and of CPU in all processes."""
        before = sum(process.cpu_seconds() for process in self._processes)
        wall = self._client.ask((up, size), START_SECONDS + size / SLOWEST)
        return wall, sum(process.cpu_seconds() for process in self._processes) - before


def throughput(names: Sequence[str], sizes: Sequence[int], rounds: int) -> list[Row]:
    """Every way, every size (MiB)."""
    found = []
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="p2pfed-bench-"))
        setting = Setting(Path(folder), tuple(size * MIB for size in sizes))
        running = [Running(name, setting, stack) for name in names]
        for size in setting.sizes:
            wall, cpu = defaultdict(list), defaultdict(list)
            for way in running:
                way.transfer(up=True, size=CHECKED)
                way.transfer(up=False, size=CHECKED)
                way.transfer(up=False, size=size)
            for _ in range(rounds):
                for up in (True, False):
                    for way in running:
                        took = way.transfer(up=up, size=size)
                        wall[way.name].append(took[0])
                        cpu[way.name].append(took[1])
            found += _compared(
                size,
                {name: statistics.median(each) for name, each in wall.items()},
                {name: statistics.median(each) for name, each in cpu.items()},
            )
    return found


def _compared(size: int, wall: dict[str, float], cpu: dict[str, float]) -> list[Row]:
    """All rows of one size: bare figures, then each comparison whose two ways were run."""
    found: list[Row] = []
    for name, seconds in wall.items():
        at = f"network/{name}/{size // MIB}MiB"
        found.append(Row(at, size / seconds / 1e6, "MB/s", better="higher"))
        found.append(Row(f"{at}/cpu", cpu[name] * GIB / size, "s/GiB", better="lower"))
    for (name, base), (faster, cheaper) in COMPARED.items():
        if name not in wall or base not in wall:
            continue
        at, speed = f"network/{name}/{size // MIB}MiB", size / wall[name] / 1e6
        cost, share = cpu[name] * GIB / size, cpu[name] / cpu[base]
        found += [
            Goal(at, speed, "MB/s", base, wall[base] / wall[name], "higher", faster),
            Goal(f"{at}/cpu", cost, "s/GiB", base, share, "lower", cheaper),
        ]
    return found


def main() -> int:
    """Measure and print; returns the exit code."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    options.add_argument("--sizes", type=int, nargs="+", metavar="MIB", default=list(SIZES))
    options.add_argument("--rounds", type=int, default=5, help="how often each way is taken")
    options.add_argument("--quick", action="store_true", help="16 MiB, and no crowd of peers")
    options.add_argument("--soak", type=float, metavar="MINUTES", help="only this, for so long")
    args = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # files and processes are cleaned up
    try:
        _measure(args)
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _measure(args: argparse.Namespace) -> None:
    if args.soak is not None:
        tell(network_crowd.soak(args.soak), as_json=args.json)
        return
    if "throughput" in args.parts:
        sizes = QUICK_SIZES if args.quick else args.sizes
        tell(throughput(args.ways, sizes, args.rounds), as_json=args.json)
    if args.quick:
        return
    if "lag" in args.parts or "memory" in args.parts:
        tell(network_crowd.crowd(args.parts), as_json=args.json)
    if "memory" in args.parts:
        tell(network_crowd.busy(), as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
