"""events and wait: what happened, and waiting until something has.

Both are plain reads. The daemon chooses the events (`after`, `last`, `type`, `limit`); they are
looked at here once more, so that a daemon of the version before, which does not know these words,
gives the same lines.
"""

from __future__ import annotations

import json
import time
from collections import deque

from p2pfed.cli.locate import admin_client
from p2pfed.cli.options import describe, with_socket
from p2pfed.cli.text import as_json, duration, printable
from p2pfed.errors import ConfigError, DaemonNotRunning, TimedOut

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Iterator
    from typing import Any

__all__ = ["CONDITIONS", "event_line", "events", "wait"]

WAIT_STEP_S = 0.25
CONDITIONS = {
    "peers": "N",
    "round": "N",
    "model": "N",
    "run": "finished",
    "task": "ready",
    "health": "ok",
}


# --- events ------------------------------------------------------------------------------------


def events(parser: ArgumentParser) -> None:
    """Fill in the command `events`."""
    describe(
        parser,
        "What happened, oldest first; with -n the newest so many. Each event has a number.\n"
        "--since goes on after a number (8123), or begins a while ago (10m, 2h, 3d) or at a time\n"
        "(2026-06-01T12:00, in UTC); with it, or with -f, -n ends after so many.",
        endpoint="GET /v1/events?since=SEQ&after=TIME&type=GLOB&last=N&limit=N&follow=1",
    )
    parser.add_argument("-f", "--follow", action="store_true", help="go on until interrupted")
    parser.add_argument("--since", metavar="SEQ|TIME", help="after this number, or from then on")
    parser.add_argument("--type", metavar="GLOB", help="only such events, e.g. 'peer.*'")
    parser.add_argument(
        "-n",
        "--limit",
        default="0",
        metavar="N",
        help="the newest so many; with --since or -f: end after so many (0: no limit)",
    )
    with_socket(parser)
    parser.set_defaults(run=_events)


def _events(args: Namespace) -> None:
    since, after = _beginning("0" if args.since is None else args.since)
    limit, kind = _whole("--limit", args.limit), args.type or ""
    newest = 0 if args.follow or args.since is not None else limit
    query = _query(since, after, kind, limit, newest=newest, follow=args.follow)
    stream = admin_client(args).stream(f"/v1/events?{query}")
    events = _chosen(stream, after, kind, 0 if newest else limit)
    for event in deque(events, maxlen=newest) if newest else events:
        line = as_json(event) if args.json else printable(event_line(event))
        print(line, flush=args.follow)


def _query(since: int, after: str, kind: str, limit: int, *, newest: int, follow: bool) -> str:
    from urllib.parse import quote

    words = [f"since={since}"]
    words += [f"after={quote(after)}"] if after else []
    words += [f"type={quote(kind)}"] if kind else []
    words += [f"last={newest}"] if newest else [f"limit={limit}"] if limit else []
    return "&".join([*words, *(["follow=1"] if follow else [])])


def _chosen(
    stream: Iterator[dict[str, Any]], after: str, kind: str, limit: int
) -> Iterator[dict[str, Any]]:
    """The events that were asked for; a gap is always told, and is none."""
    import fnmatch

    count = 0
    for event in stream:
        name = str(event.get("type", ""))
        if name != "gap":
            if kind and not fnmatch.fnmatchcase(name, kind):
                continue
            if after and str(event.get("ts", "")) < after:  # both are ISO 8601 in UTC
                continue
            count += 1
        yield event
        if limit and count >= limit:
            return


def _beginning(text: str) -> tuple[int, str]:
    """What --since means: a number, or a time as ISO 8601 in UTC."""
    if text.isdecimal() and len(text) < 16:
        return int(text), ""
    import datetime as dt

    try:
        when = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=duration(text))
    except (ConfigError, OverflowError):
        try:
            when = dt.datetime.fromisoformat(text)
        except ValueError as error:
            raise ConfigError(
                f"--since {text} is neither the number of an event nor a time",
                "it is a number, how long ago, or a time as ISO 8601",
                "write e.g. 8123, 10m, 2h or 2026-06-01T12:00",
            ) from error
        when = when.replace(tzinfo=when.tzinfo or dt.UTC).astimezone(dt.UTC)
    return 0, when.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _whole(option: str, text: str) -> int:
    if not text.isdecimal() or len(text) > 15:
        raise ConfigError(
            f"{option} {text} is not a number",
            "it is a whole number of at most 15 digits; 0 is no limit",
            f"write e.g. {option} 10",
        )
    return int(text)


def event_line(event: dict[str, Any]) -> str:
    """One event or gap, for people."""
    if event.get("type") == "gap":
        return f"… {event.get('lost')} older events are no longer held"
    data = event.get("data") or {}
    told = "  ".join(
        f"{key}={value if isinstance(value, str | int | float) else json.dumps(value)}"
        for key, value in data.items()
    )
    return f"{event.get('seq'):>6}  {event.get('ts')}  {event.get('type')}  {told}".rstrip()


# --- wait --------------------------------------------------------------------------------------


def wait(parser: ArgumentParser) -> None:
    """Fill in the command `wait`."""
    known = [f"{what}={value}" for what, value in CONDITIONS.items()]
    describe(
        parser,
        "Wait until all conditions hold: peers=N (N alive), round=N (round N has begun), model=N\n"
        "(the common model after round N is here), run=finished, task=ready (the trainer is),\n"
        "health=ok (no warning). A daemon that is not up yet is waited for as well. Exit 6 when\n"
        "the time is over, 3 if there is no daemon then.",
        endpoint="GET /v1/status",
    )
    parser.add_argument(
        "--for",
        dest="conditions",
        action="append",
        required=True,
        metavar="|".join(known),
        help="what to wait for; can be repeated",
    )
    parser.add_argument("--timeout", default="60s", metavar="TIME", help="e.g. 60s, 5min, 2h")
    with_socket(parser)
    parser.set_defaults(run=_wait)


def _wait(args: Namespace) -> None:
    wanted = [_condition(text) for text in args.conditions]
    seconds = duration(args.timeout)
    end = time.monotonic() + seconds
    client = admin_client(args, timeout=max(0.1, min(10.0, seconds)))
    while True:
        absent: DaemonNotRunning | None = None
        now: dict[str, Any] = {}
        try:
            now = _reached(client.get("/v1/status"))
        except DaemonNotRunning as error:
            absent = error
        if absent is None and all(_holds(now[what], value) for what, value in wanted):
            if args.json:
                from p2pfed.cli.text import envelope

                print(envelope("wait", now))
            return
        if time.monotonic() >= end:
            if absent is not None:
                raise absent
            stands = ", ".join(f"{what}={now[what]}" for what in dict(wanted))
            raise TimedOut(
                f"{', '.join(args.conditions)} was not reached within {args.timeout}",
                f"it stands at {stands}",
                "see: p2pfed status, p2pfed peers",
            )
        time.sleep(min(WAIT_STEP_S, max(0.0, end - time.monotonic())))


def _reached(status: dict[str, Any]) -> dict[str, Any]:
    """What every condition is compared with; keys as in `CONDITIONS`."""
    run, warnings = status.get("run"), len(status.get("health") or ())
    return {
        "peers": status["peers"]["alive"],
        "round": run["round"] if run else 0,
        "model": run["model_round"] if run and run["model_hash"] else 0,
        "run": run["phase"] if run else "none",
        "task": status["trainer"]["state"],
        "health": f"{warnings} warnings" if warnings else "ok",
    }


def _holds(now: Any, wanted: int | str) -> bool:
    return bool(now >= wanted) if isinstance(wanted, int) else now == wanted


def _condition(text: str) -> tuple[str, int | str]:
    what, _, value = text.partition("=")
    kind = CONDITIONS.get(what)
    if kind == "N" and value.isdecimal() and len(value) < 16:
        return what, int(value)
    if kind is None or value != kind:
        known = ", ".join(f"{what}={value}" for what, value in CONDITIONS.items())
        raise ConfigError(f"cannot wait for {text!r}", f"known: {known}", "e.g. peers=3")
    return what, value
