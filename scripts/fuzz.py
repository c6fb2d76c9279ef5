"""Feeds each layer with so many hostile frames and counts what came out; see scripts/fuzz.

The frames are dealt in shards, each with a seed of its own made from `--seed` and its number, so a
run is the same on any number of cores. Ends with 1 if anything but a deliberate error came out, a
frame took more than a second of processor time, or memory grew; the input is then in a file, which
belongs into tests/data/fuzz once the fault is mended.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from fuzzing import LAYERS, Tally, play, replay

SHARD = 20_000  # frames


def main() -> int:
    """Play; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000, help="for each layer")
    parser.add_argument("--layer", choices=LAYERS, action="append", help="all, if none is named")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--failures", type=Path, default=Path(), help="folder for failing inputs")
    parser.add_argument("--replay", type=Path, help="feed this file, named LAYER-...hex, and end")
    args = parser.parse_args()
    if args.replay is not None:
        name = args.replay.name.partition("-")[0]
        data = bytes.fromhex(args.replay.read_text("ascii"))
        return _report(name, replay(name, data), None)
    print(f"{'layer':<12}{'frames':>11}{'accepted':>11}{'rejected':>11}{'unexpected':>12}", end="")
    print(f"{'worst ms':>10}{'growth MiB':>12}")
    found = 0
    for name in args.layer or LAYERS:
        total = _total(name, args.frames, args.seed, args.workers)
        found += _report(name, total, args.failures / f"{name}-{args.seed}.hex")
    return 1 if found else 0


def _total(name: str, frames: int, seed: str, workers: int) -> Tally:
    """All shards of a layer, or those up to the first failure."""
    total, shards = Tally(), -(-frames // SHARD)
    # Fresh processes: what one layer left in memory does not hide what the next one takes.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, shards), mp_context=context) as pool:
        runs = [
            pool.submit(play, name, min(SHARD, frames - i * SHARD), f"{seed}/{i}")
            for i in range(shards)
        ]
        for run in runs:
            one = run.result()
            total.accepted += one.accepted
            total.rejected += one.rejected
            total.worst = max(total.worst, one.worst)
            total.growth = max(total.growth, one.growth)
            if one.failure is not None:
                total.failure = one.failure
                pool.shutdown(cancel_futures=True)
                break
    return total


def _report(name: str, total: Tally, kept: Path | None) -> int:
    """Print one line, and the failure if there is one; returns how many."""
    failures = int(total.failure is not None)
    print(
        f"{name:<12}{total.frames:>11,}{total.accepted:>11,}{total.rejected:>11,}{failures:>12}"
        f"{1000 * total.worst:>10.1f}{total.growth / 2**20:>12.1f}",
        flush=True,
    )
    if total.failure is not None:
        data = total.failure.data.hex()
        print(f"{total.failure.what}\ninput: {data[:2000]}")
        if kept is not None:
            kept.write_text(data + "\n", "ascii")
            print(f"kept in {kept}; again: scripts/fuzz --replay {kept}")
    return failures


if __name__ == "__main__":
    sys.exit(main())
