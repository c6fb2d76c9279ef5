"""What benchmarks print: a table for people, or one JSON object per line with --json.

A row has name, value and unit; where it is a comparison also baseline (what it is compared with),
ratio (value / the baseline's value in the same unit) and better (higher or lower).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

__all__ = ["Row", "interleaved", "parser", "show"]


@dataclass(frozen=True, slots=True)
class Row:
    """One measured number."""

    name: str
    value: float
    unit: str
    baseline: str = ""
    ratio: float | None = None
    better: str = ""


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that knows --json."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", action="store_true", help="one JSON object per line")
    return made


def show(rows: Sequence[Row], *, as_json: bool) -> None:
    """Print the rows."""
    if as_json:
        for row in rows:
            print(json.dumps({k: v for k, v in asdict(row).items() if v not in {"", None}}))
        return
    wide = max(len(row.name) for row in rows)
    for row in rows:
        line = f"{row.name:<{wide}}  {row.value:>12.4g} {row.unit}"
        if row.ratio is not None:
            line += f"   {row.ratio:.3g} x {row.baseline} ({row.better} is better)"
        print(line)
    sys.stdout.flush()


def interleaved(measures: Sequence[Callable[[], float]], times: int) -> list[float]:
    """Call the measures in turn, `times` times each; returns the median of each."""
    results: list[list[float]] = [[] for _ in measures]
    for _ in range(times):
        for result, measure in zip(results, measures, strict=True):
            result.append(measure())
    return [statistics.median(result) for result in results]
