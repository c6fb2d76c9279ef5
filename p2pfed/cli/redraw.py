"""What `-w` does: draw an answer again and again, until interrupted.

Invariant: a daemon that goes away is waited for. On a terminal the screen is drawn over, elsewhere
the answers follow each other; with --json each is an envelope of one line.
"""

from __future__ import annotations

import sys
import time

from p2pfed.cli.text import columns, cut, duration, envelope, printable
from p2pfed.errors import ConfigError, DaemonNotRunning, TimedOut

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable
    from typing import Any

__all__ = ["redraw"]

_SHORTEST_S = 0.1


def redraw(args: Namespace, look: Callable[[], tuple[Any, list[str]]]) -> None:
    """Show what `look` gives, data and lines, every `args.interval`; never returns."""
    pause = duration(args.interval)
    if pause < _SHORTEST_S:
        raise ConfigError(
            f"--interval {args.interval} is too short",
            "the daemon would be asked more than ten times a second",
            "write e.g. 2 or 0.5",
        )
    terminal = sys.stdout.isatty() and not args.json
    while True:
        try:
            data, lines = look()
        except (DaemonNotRunning, TimedOut) as error:
            data, lines = None, [f"# waiting for the daemon: {error.what}"]
        if args.json and data is not None:
            print(envelope("peers", data), flush=True)
        elif terminal:
            print(_screen([cut(printable(line), columns()) for line in lines]), end="", flush=True)
        elif not args.json:
            print("\n".join(map(printable, lines)), end="\n\n", flush=True)
        time.sleep(pause)


def _screen(lines: list[str]) -> str:
    """From the upper left corner; every line and the screen below is cleared."""
    return "\x1b[H" + "".join(f"{line}\x1b[K\r\n" for line in lines) + "\x1b[J"
