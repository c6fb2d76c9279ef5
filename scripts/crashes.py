"""Counts the crashes that the privacy gate and its ledger survive; see scripts/crashes.

Ends with 1 if one of them makes it release more than was debited, or draw twice on one debit.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from ledger_crashes import KINDS, Survey, kill_everywhere, survey


def main() -> int:
    """Look at all crashes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="look at one crash in so many")
    every = parser.parse_args().every
    losses = {kind: survey(kind, every=every) for kind in KINDS}
    kills = {kind: kill_everywhere(kind, every=every) for kind in KINDS}
    wrong = sum((each.wrong for each in (*losses.values(), *kills.values())), Counter())
    found = ", ".join(f"{count} times: {fault}" for fault, count in wrong.items())
    print(
        f"{_told(losses)} after a power loss, {_told(kills)} after a kill: "
        f"{found or '0 with released > debited, 0 with two draws on one debit, 0 that do not open'}"
    )
    return 1 if wrong else 0


def _told(found: dict[str, Survey]) -> str:
    each = ", ".join(f"{kind} {one.states}" for kind, one in found.items())
    return f"{sum(one.states for one in found.values())} states ({each})"


if __name__ == "__main__":
    sys.exit(main())
