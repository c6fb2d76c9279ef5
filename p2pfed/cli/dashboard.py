"""dashboard: one page on loopback that shows what `top` shows, and draws it.

It runs in the client's process: the daemon serves no page. It joins the admin socket with the
trainer's private one where the caller may read that, and changes nothing at either.

The page is `report/board`, the door `loopback`, what is shown `board_data`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from p2pfed.cli.files import read_text
from p2pfed.cli.locate import admin_client, private_data
from p2pfed.cli.options import describe, with_socket
from p2pfed.cli.text import emit
from p2pfed.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Callable, Iterator
    from typing import Any

    from p2pfed.cli.board_data import Board, Feed
    from p2pfed.cli.loopback import Loopback

__all__ = ["FILES", "board_file", "board_of", "dashboard", "serve"]

FILES = {
    "index.html": "text/html; charset=utf-8",
    "board.css": "text/css; charset=utf-8",
    "draw.js": "text/javascript; charset=utf-8",
    "panels.js": "text/javascript; charset=utf-8",
    "planes.js": "text/javascript; charset=utf-8",
    "board.js": "text/javascript; charset=utf-8",
}
LONGEST_PICTURES_S = 600.0  # the trainer goes over its test patients first
_BEAT_S = 5.0  # so that a browser that went away is noticed, and a page knows that we are there


def dashboard(parser: ArgumentParser) -> None:
    """Fill in the command `dashboard`."""
    describe(
        parser,
        "Show this node's state as a live page in a browser on this machine. The address that is\n"
        "printed opens it once. The page only reads. Measures and pictures of this hospital's\n"
        "patients appear where you may read the trainer's private socket, and go nowhere else.\n"
        "From afar: ssh -L PORT:127.0.0.1:PORT HOST, with one --port PORT on both sides.",
        endpoint="GET /v1/status, GET /v1/peers, GET /v1/history, GET /v1/events, and of the\n"
        "  private socket GET /v1/metrics, GET /v1/status, GET /v1/ledger, GET /v1/pictures",
    )
    parser.add_argument("--port", default="0", metavar="N", help="default: a free one")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    with_evaluation(parser)
    with_socket(parser)
    parser.set_defaults(run=_dashboard)


def with_evaluation(parser: ArgumentParser) -> None:
    """Offer --evaluation, from which the "alone" line is drawn."""
    parser.add_argument(
        "--evaluation",
        metavar="FILE",
        help="what `p2pfed model evaluate --against-alone --json` printed: draws the alone line",
    )


def _dashboard(args: Namespace) -> None:
    from p2pfed.cli.board_data import Feed

    if not args.port.isdecimal() or int(args.port) > 65535:
        raise ConfigError(
            f"--port {args.port} is not a port",
            "ports are the whole numbers from 1 to 65535, and 0 takes a free one",
            "write e.g. 8600, or leave it away",
        )
    board = board_of(args)
    board.snapshot(fresh=True)  # says in three lines what is wrong with the socket
    feed = Feed(admin_client(args))
    feed.start()
    pictures = lambda: shown_pictures(args)  # noqa: E731
    with serve(int(args.port), board, feed, pictures) as server:
        lines = [server.address, "It opens once, in one browser. Ctrl-C ends it."]
        emit(args, "dashboard", {"url": server.address, "port": server.server_port}, lines)
        import sys

        sys.stdout.flush()
        if not args.no_browser:
            _open(server.address)
        server.serve_forever(poll_interval=0.2)


def board_of(args: Namespace) -> Board:
    """The board of the daemon that the arguments name."""
    from p2pfed.cli.board_data import Board

    alone = _alone(args.evaluation) if args.evaluation else None
    return Board(admin_client(args), lambda name: private_data(args, name), alone=alone)


def serve(port: int, board: Board, feed: Feed, pictures: Callable[[], dict[str, Any]]) -> Loopback:
    """The server of the page, not serving yet.

    Args:
        port: 0 takes a free one.
        board: What is shown.
        feed: The events.
        pictures: Gives the three planes; called when somebody asks for them.
    """
    from p2pfed.cli.loopback import Loopback

    def asset(name: str) -> Callable[[], tuple[str, bytes]]:
        kind, body = FILES[name], board_file(name)
        return lambda: (kind, body)

    def shown(give: Callable[[], Any]) -> Callable[[], tuple[str, bytes]]:
        return lambda: ("application/json", _encoded(give()))

    pages = {f"/{name}": asset(name) for name in FILES}
    pages["/"] = pages.pop("/index.html")
    pages["/api/snapshot"] = shown(lambda: {**board.snapshot(), "events": feed.recent()})
    pages["/api/pictures"] = shown(pictures)
    return Loopback(port, pages, {"/api/events": lambda since: _event_lines(feed, since)})


def _event_lines(feed: Feed, since: int) -> Iterator[bytes]:
    while True:
        found, live = feed.after(since, _BEAT_S)
        for event in found:
            since = max(since, event["seq"])
            yield _encoded({"kind": "event", "event": event})
        yield _encoded({"kind": "beat", "live": live})


def board_file(name: str) -> bytes:
    """One file of the page."""
    return (Path(__file__).parent.parent / "report" / "board" / name).read_bytes()


def shown_pictures(args: Namespace) -> dict[str, Any]:
    """The three planes of best, median and worst case as PNG, or `trouble` in words."""
    from p2pfed.cli.planes import as_png

    told = private_data(args, "pictures", timeout=LONGEST_PICTURES_S)
    if not isinstance(told, dict):
        return {"trouble": "The trainer's private socket cannot be read by you, or no trainer runs"}
    if not told.get("pictures"):
        return {"trouble": str(told.get("problem") or "The task shows no pictures, or none yet")}
    return {"round": told.get("round"), "cases": as_png(told["pictures"])}


def _encoded(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _alone(path: str) -> dict[str, float]:
    """The measures of the row `alone` of an evaluation, by name."""
    try:
        rows = json.loads(read_text(path))["data"]["rows"]
        row = next(row for row in rows if str(row["model"]).startswith("alone"))
        return {str(name): float(value) for name, value in row["metrics"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ConfigError(
            f"{path} tells no measures of a model that was trained alone",
            "it is not what `model evaluate --against-alone --json` prints",
            f"make it: p2pfed model evaluate --against-alone --json > {path}",
        ) from error


def _open(address: str) -> None:
    """Open a browser where there is a screen; a text browser would take the terminal."""
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        import webbrowser

        webbrowser.open(address)
