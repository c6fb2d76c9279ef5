"""What the network is worth: the demo's accuracies, together against alone, mean of seeds."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rows import Row, parser, show

WAYS = {"together_none": "no_privacy", "together_gate": "with_gate", "pooled": "pooled"}
TESTS = {"own": "own_tests", "everyone": "all_tests"}


def main() -> int:
    """Measure and print; returns the exit code."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--data", metavar="DIR", help="heart disease instead of breast cancer")
    args = options.parse_args()
    compared = [entry for seed in args.seeds for entry in _demo(seed, args.data)]
    rows = []
    for tests, told in TESTS.items():
        alone = statistics.mean(entry["alone"][tests] for entry in compared)
        rows.append(Row(f"{told}.alone", alone, "accuracy"))
        for way, name in WAYS.items():
            value = statistics.mean(entry[way][tests] for entry in compared)
            ratio = value / alone
            rows += [
                Row(f"{told}.{name}", value, "accuracy", f"{told}.alone", ratio, "higher"),
                Row(f"{told}.{name}_minus_alone", value - alone, "accuracy", better="higher"),
            ]
    show(rows, as_json=args.json)
    return 0


def _demo(seed: int, data: str | None) -> list[dict[str, Any]]:
    """The comparison of one demo, one entry per hospital."""
    with tempfile.TemporaryDirectory(prefix="p2pfed-bench-") as folder:
        command = [sys.executable, "-m", "p2pfed", "demo", "--json", "--seed", str(seed)]
        command += ["--out", str(Path(folder) / "demo")]
        command += ["--data", data] if data else []
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    comparison: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["data"][
        "comparison"
    ]
    return comparison


if __name__ == "__main__":
    sys.exit(main())
