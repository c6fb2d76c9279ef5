"""What the demo shows while it runs: a live table on a terminal, plain lines elsewhere.

Both say the same: events as they happen, and where every hospital is. Everything goes to standard
error when standard output carries JSON.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

__all__ = ["Screen"]

PLAIN_EVERY = 5.0  # seconds between plain status lines


class Screen:
    """Shows the demo.

    Args:
        quiet: Standard output belongs to JSON; show everything on standard error.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=quiet, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._last_plain = float("-inf")
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        """One line of the story."""
        seconds = time.monotonic() - self._started
        self._console.print(f"[dim]{seconds:6.1f} s[/dim]  {text}")
        self._flush()

    def head(self, text: str) -> None:
        """A line that stands out."""
        self._console.print(f"[bold]{text}[/bold]")
        self._flush()

    def table(self, table: Table) -> None:
        """A finished table."""
        self._console.print(table)
        self._flush()

    def _flush(self) -> None:
        (sys.stderr if self._console.stderr else sys.stdout).flush()

    @contextmanager
    def live(self) -> Iterator[None]:
        """While this lasts, `show` draws in place."""
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, refresh_per_second=4, transient=True) as self._live:
            yield
        self._live = None

    def show(self, statuses: Mapping[str, dict[str, Any] | None]) -> None:
        """Where every hospital is; `None` is a node that is not running."""
        if self._live is not None:
            self._live.update(_state_table(statuses))
        elif time.monotonic() - self._last_plain >= PLAIN_EVERY:
            self._last_plain = time.monotonic()
            self.say("   ".join(_short(name, status) for name, status in statuses.items()))


def _short(name: str, status: dict[str, Any] | None) -> str:
    if status is None:
        return f"{name}: down"
    run = status["run"]
    return f"{name}: not in the run" if run is None else f"{name}: round {run['round']}"


def _state_table(statuses: Mapping[str, dict[str, Any] | None]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("hospital", "round", "phase", "model", "peers", "ε spent", "released", "sent"):
        right = column in {"round", "peers", "ε spent", "released", "sent"}
        table.add_column(column, justify="right" if right else "left")
    for name, status in statuses.items():
        if status is None:
            table.add_row(name, "-", "down", *["-"] * 5)
            continue
        run, spent = status["run"], status["privacy"]
        table.add_row(
            name,
            f"{run['round']}/{run['rounds']}" if run else "-",
            run["phase"] if run else "not joined",
            run["model_hash"][:12] if run else "-",
            str(status["peers"]["alive"]),
            f"{spent['spent_epsilon']:.2f}",
            str(spent["releases"]),
            f"{status['traffic']['sent_bytes'] / 1000:.0f} kB",
        )
    return table
