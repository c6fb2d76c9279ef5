"""events and wait: what happened, and waiting until something has."""

from __future__ import annotations

import json
import time

from p2pfed.cli.locate import admin_client
from p2pfed.cli.options import describe, with_socket
from p2pfed.cli.text import printable
from p2pfed.errors import ConfigError, DaemonNotRunning, TimedOut

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from typing import Any

__all__ = ["events", "wait"]

WAIT_STEP_S = 0.25
CONDITIONS = ("peers", "round")


def events(parser: ArgumentParser) -> None:
    """Fill in the command `events`."""
    describe(
        parser,
        "What happened, oldest first. Each event has a number; --since goes on after one.",
        endpoint="GET /v1/events?since=SEQ&follow=1",
    )
    parser.add_argument("-f", "--follow", action="store_true", help="go on until interrupted")
    parser.add_argument("--since", type=int, default=0, metavar="SEQ", help="after this number")
    parser.add_argument("--type", metavar="GLOB", help="only such events, e.g. 'peer.*'")
    with_socket(parser)
    parser.set_defaults(run=_events)


def _events(args: Namespace) -> None:
    import fnmatch

    if args.since < 0:
        raise ConfigError(f"--since {args.since} is not the number of an event")
    follow = "&follow=1" if args.follow else ""
    for event in admin_client(args).stream(f"/v1/events?since={args.since}{follow}"):
        kind = str(event.get("type", ""))
        if args.type and kind != "gap" and not fnmatch.fnmatchcase(kind, args.type):
            continue
        line = json.dumps(event, ensure_ascii=False) if args.json else _event_line(event)
        print(printable(line), flush=args.follow)


def _event_line(event: dict[str, Any]) -> str:
    if event.get("type") == "gap":
        return f"… {event.get('lost')} older events are no longer held"
    data = event.get("data") or {}
    told = "  ".join(
        f"{key}={value if isinstance(value, str | int | float) else json.dumps(value)}"
        for key, value in data.items()
    )
    return f"{event.get('seq'):>6}  {event.get('ts')}  {event.get('type')}  {told}".rstrip()


def wait(parser: ArgumentParser) -> None:
    """Fill in the command `wait`."""
    describe(
        parser,
        "Wait until all conditions hold: peers=N (N alive) or round=N (round N has begun). A\n"
        "daemon that is not up yet is waited for as well. Exit 6 when the time is over.",
        endpoint="GET /v1/status",
    )
    parser.add_argument(
        "--for",
        dest="conditions",
        action="append",
        required=True,
        metavar="peers=N|round=N",
        help="what to wait for; can be repeated",
    )
    parser.add_argument("--timeout", default="60s", metavar="TIME", help="e.g. 60s, 5min")
    with_socket(parser)
    parser.set_defaults(run=_wait)


def _wait(args: Namespace) -> None:
    wanted = [_condition(text) for text in args.conditions]
    seconds = _seconds(args.timeout)
    end = time.monotonic() + seconds
    client = admin_client(args, timeout=max(0.1, min(10.0, seconds)))
    while True:
        absent: DaemonNotRunning | None = None
        now: dict[str, int] = {}
        try:
            now = _reached(client.get("/v1/status"))
        except DaemonNotRunning as error:
            absent = error
        if absent is None and all(now[what] >= least for what, least in wanted):
            return
        if time.monotonic() >= end:
            if absent is not None:
                raise absent
            raise TimedOut(
                f"{', '.join(args.conditions)} was not reached within {args.timeout}",
                f"it stands at peers={now['peers']}, round={now['round']}",
                "see: p2pfed status, p2pfed peers",
            )
        time.sleep(min(WAIT_STEP_S, max(0.0, end - time.monotonic())))


def _reached(status: dict[str, Any]) -> dict[str, int]:
    run = status.get("run")
    return {"peers": status["peers"]["alive"], "round": run["round"] if run else 0}


def _condition(text: str) -> tuple[str, int]:
    what, _, value = text.partition("=")
    if what not in CONDITIONS or not value.isdecimal():
        raise ConfigError(f"cannot wait for {text!r}", "known: peers=N, round=N", "e.g. peers=3")
    return what, int(value)


def _seconds(text: str) -> float:
    for unit, factor in (("min", 60.0), ("s", 1.0), ("h", 3600.0), ("", 1.0)):
        if text.endswith(unit):
            try:
                value = float(text.removesuffix(unit)) * factor
            except ValueError:
                break
            if 0 <= value < 1e9:
                return value
    raise ConfigError(f"{text!r} is not a time", "", "write e.g. 30s, 5min or 2h")
