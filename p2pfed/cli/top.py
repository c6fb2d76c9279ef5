"""top: all that `status`, `peers` and `events` tell, on one live screen.

What is drawn is in `film`; the loop here only looks, draws and reads keys.

Invariants: the terminal is as before whatever the end is (q, Ctrl-C, SIGTERM, a bug). A daemon that
goes away is waited for. Measures of the local model and the time split come from the trainer's
private socket, where the caller may read it.
"""

from __future__ import annotations

import signal
import sys
import time
from contextlib import contextmanager

from p2pfed.cli.film import SORTS, Film, Snapshot, frame
from p2pfed.cli.locate import admin_client, private_data
from p2pfed.cli.options import describe, with_socket
from p2pfed.cli.text import duration
from p2pfed.errors import AdminError, ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Callable, Iterator
    from types import FrameType
    from typing import Any

    from rich.console import RenderableType

    from p2pfed.admin.client import Client

__all__ = ["look", "top"]

PATIENCE_S = 2.0  # for one answer; a key is read when it is over


def top(parser: ArgumentParser) -> None:
    """Fill in the command `top`."""
    describe(
        parser,
        "All of it on one live screen. Keys: q quits, p sorts the peers by the next column.\n"
        "Measures of the local model appear where you may read the trainer's private socket.",
        endpoint="GET /v1/status, GET /v1/peers, GET /v1/events?since=SEQ, and of the private\n"
        "  socket GET /v1/metrics, GET /v1/status",
    )
    parser.add_argument("--interval", default="1", metavar="TIME", help="between looks; default: 1")
    with_socket(parser)
    parser.set_defaults(run=_top)


def _top(args: Namespace) -> int:
    pause = duration(args.interval)
    if pause < 0.1:
        raise ConfigError(
            f"--interval {args.interval} is too short",
            "the daemon would be asked more than ten times a second",
            "write e.g. 1 or 0.5",
        )
    if args.json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(
            "top draws on a terminal, and this is none",
            "it moves the cursor and reads single keys, which a file or a pipe cannot give",
            "for programs: p2pfed status --json, p2pfed peers --json, p2pfed events -f --json",
        )
    client, film = admin_client(args, timeout=PATIENCE_S), Film()

    def terminated(_: int, __: FrameType | None) -> None:
        raise SystemExit(128 + signal.SIGTERM)  # so that the terminal is put back on the way

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        _loop(args, client, film, pause)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _loop(args: Namespace, client: Client, film: Film, pause: float) -> None:
    from rich.console import Console
    from rich.live import Live

    console, order = Console(highlight=False), 0
    with _keys() as key, Live(console=console, screen=True, auto_refresh=False) as live:
        due = 0.0
        while True:
            if time.monotonic() >= due:
                due = time.monotonic() + pause
                shot = look(args, client, time.monotonic())
                film.add(shot, [] if shot.status is None else _news(client, film.since))
            drawn = console.size
            live.update(_drawn(film, drawn.width, drawn.height, SORTS[order]), refresh=True)
            while time.monotonic() < due and console.size == drawn:
                pressed = key(min(0.25, max(0.0, due - time.monotonic())))
                if pressed in {"q", "Q", "\x04"}:
                    return
                if pressed == "p":
                    order = (order + 1) % len(SORTS)
                    break


def look(args: Namespace, client: Client, now: float) -> Snapshot:
    """Ask the sockets once; a daemon that does not answer is a snapshot without a status."""
    try:
        status, found = client.get("/v1/status"), client.get("/v1/peers")
    except AdminError as error:
        return Snapshot(now, None, problem=error.what)
    metrics, trainer = (private_data(args, name, timeout=PATIENCE_S) for name in _PRIVATE)
    return Snapshot(now, status, found, metrics, trainer)


_PRIVATE = ("metrics", "status")


def _news(client: Client, since: int) -> list[dict[str, Any]]:
    try:
        return list(client.stream(f"/v1/events?since={since}"))
    except AdminError:
        return []


def _drawn(film: Film, width: int, height: int, sort: str) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    return Group(Text("\n").join(frame(film, width, height, sort=sort)))


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits so many seconds for a key; the terminal is put back at the end."""
    import os
    import select
    import termios
    import tty

    before = termios.tcgetattr(0)

    def key(seconds: float) -> str:
        ready, _, _ = select.select([0], [], [], seconds)
        return (os.read(0, 1).decode("latin1") or "q") if ready else ""  # q: it is gone

    tty.setcbreak(0)
    try:
        yield key
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
