"""monitor: the daemon's log as it is written, at a level of the reader's choice.

The daemon's own log keeps its level; this one may be more verbose. What happened to the network is
in `p2pfed events`; the log is for whoever looks for a fault.
"""

from __future__ import annotations

from p2pfed.cli.locate import admin_client
from p2pfed.cli.options import describe, with_socket
from p2pfed.cli.text import as_json, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Iterator
    from typing import Any

__all__ = ["LEVELS", "monitor"]

LEVELS = ("debug", "info", "warning", "error")


def monitor(parser: ArgumentParser) -> None:
    """Fill in the command `monitor`."""
    describe(
        parser,
        "Follow the daemon's log until interrupted, at a level of your choice; the level of the\n"
        "log that the daemon writes stays as it is.",
        endpoint="GET /v1/logs?level=LEVEL&follow=1",
    )
    parser.add_argument("--level", choices=LEVELS, default="info", help="default: info")
    with_socket(parser)
    parser.set_defaults(run=_monitor)


def _monitor(args: Namespace) -> None:
    for line in admin_client(args).stream(f"/v1/logs?level={args.level}&follow=1"):
        told = [as_json(line)] if args.json else map(printable, log_lines(line))
        print("\n".join(told), flush=True)


def log_lines(line: dict[str, Any]) -> Iterator[str]:
    """One line of the log or gap, for people; what follows a line break is indented."""
    if line.get("type") == "gap":
        yield f"… {line.get('lost')} lines were lost: this reader is too slow"
        return
    first, *more = str(line.get("message", "")).splitlines() or [""]
    yield f"{line.get('ts')}  {line.get('level', ''):<7}  {line.get('logger')}  {first}"
    yield from (f"    {text}" for text in more)
