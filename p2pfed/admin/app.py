"""The endpoints under /v1, as an ASGI application over one `AdminBackend`.

`GET /v1/events` takes `since` (a number: after it), `after` (a time, ISO 8601, in UTC where it says
nothing else, as 2026-01-01T00:00:00Z: from the first event of then on), `last` (only the newest so
many), `type` (a pattern such as `peer.*`), `limit` and `follow`. `GET /v1/logs` takes `level` and
goes on until the client ends it.

The socket itself, its rights and its time limits are in `server`; answers that are sent piece by
piece in `streams`.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import trio
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from p2pfed import __version__
from p2pfed.admin.answers import Json, json_line
from p2pfed.admin.backend import AdminBackend
from p2pfed.admin.guard import Guard, caller_of, name_of, right_in
from p2pfed.admin.history import history_routes
from p2pfed.admin.prometheus import metrics_route
from p2pfed.admin.query import integer, moment, pattern
from p2pfed.admin.reachability import reachability_route
from p2pfed.admin.rights import Right
from p2pfed.admin.streams import Download, Lines
from p2pfed.errors import ConfigError, TimedOut

__all__ = ["MAX_BODY_BYTES", "make_app"]

MAX_BODY_BYTES = 1 << 20
BODY_SECONDS = 10.0
EVENTS_AT_ONCE = 500
_BODY = "see docs/commands.md for the command that sends such a request"
COPIES_OF_READERS = 2  # each takes the model's size on the disk, and no round ends while it is made


def make_app(backend: AdminBackend) -> ASGIApp:
    """The ASGI application over `backend`.

    Args:
        backend: The node, or a fake in tests.
    """
    routes = [*_reading(backend), *_about_membership(backend), *_about_training(backend)]
    routes += history_routes(backend)
    return Guard(Router(routes, redirect_slashes=False), backend)


# --- endpoints ---------------------------------------------------------------------------------


def _reading(backend: AdminBackend) -> list[Route]:
    def show(path: str, answer: Callable[[], Any]) -> Route:
        async def endpoint(_: Request) -> Response:
            return Json(answer())

        return Route(f"/v1/{path}", endpoint, methods=["GET"])

    async def peer(request: Request) -> Response:
        return Json(backend.peer(request.path_params["peer"]))

    async def events(request: Request) -> Response:
        since = integer(request, "since", default=0)
        limit = integer(request, "limit", default=0)
        follow = request.query_params.get("follow", "") not in {"", "0"}
        kind, after = pattern(request, "type"), moment(request, "after")
        last = integer(request, "last", default=0)
        if last:
            since = max(since, backend.before_newest(last, kind))
        backend.events(since, 1)  # a backend that fails does so before the status line
        lines = _event_lines(
            backend, since=since, limit=limit, follow=follow, kind=kind, after=after
        )
        return Lines(lines)

    async def logs(request: Request) -> Response:
        return Lines(_log_lines(backend.logs(request.query_params.get("level", "info"))))

    async def version(request: Request) -> Response:
        caller = caller_of(request.scope)
        you = {
            "uid": caller.uid,
            "name": await name_of(caller.uid),
            "may": right_in(caller, backend).value,
        }
        return Json({"version": __version__, "api": 1, "you": you})

    return [
        show("status", backend.status),
        show("peers", backend.peers),
        show("privacy", backend.privacy),
        show("roster", backend.roster),
        show("bootstrap", backend.bootstrap),
        show("runs", backend.runs),
        Route("/v1/peers/{peer:path}", peer, methods=["GET"]),
        Route("/v1/version", version, methods=["GET"]),
        Route("/v1/events", events, methods=["GET"]),
        Route("/v1/logs", logs, methods=["GET"]),
        _model(backend),
        metrics_route(backend),
        reachability_route(backend),
    ]


def _model(backend: AdminBackend) -> Route:
    copies = trio.Semaphore(COPIES_OF_READERS)

    async def model(request: Request) -> Response:
        if right_in(caller_of(request.scope), backend) is not Right.READ:
            return Download(await backend.model())
        try:
            copies.acquire_nowait()
        except trio.WouldBlock as error:
            raise TimedOut(
                "the daemon is busy",
                f"{COPIES_OF_READERS} who may only read are fetching the model already",
                "try again in a moment",
            ) from error
        try:
            return Download(await backend.model(), sent=copies.release)
        except BaseException:
            copies.release()
            raise

    return Route("/v1/model", model, methods=["GET"])


def _about_membership(backend: AdminBackend) -> list[Route]:
    async def join(body: dict[str, Any]) -> Any:
        roster = _text(body, "roster", required=False)
        bootstrap = body.pop("bootstrap", [])
        if not isinstance(bootstrap, list) or not all(isinstance(b, dict) for b in bootstrap):
            raise ConfigError(
                "bootstrap must be a list of objects",
                "each is a bootstrap list, as its TOML file says it",
                'e.g. {"roster": "...", "bootstrap": []}',
            )
        _nothing_else(body)
        return await backend.join(
            roster=None if roster is None else roster.encode(), bootstrap=bootstrap
        )

    async def leave(body: dict[str, Any]) -> Any:
        _nothing_else(body)
        return await backend.leave()

    async def block(body: dict[str, Any]) -> Any:
        peer, on = _text(body, "peer"), _flag(body, "on")
        _nothing_else(body)
        return await backend.block(peer or "", on)

    async def offer(body: dict[str, Any]) -> Any:
        signed = _text(body, "signed")
        _nothing_else(body)
        return await backend.offer_roster((signed or "").encode())

    return [_act("join", join), _act("leave", leave), _act("block", block), _act("roster", offer)]


def _about_training(backend: AdminBackend) -> list[Route]:
    async def accept(body: dict[str, Any]) -> Any:
        signed = _text(body, "signed")
        genesis = _text(body, "genesis", required=False)
        _nothing_else(body)
        return await backend.accept_run(
            (signed or "").encode(), None if genesis is None else Path(genesis)
        )

    async def share(body: dict[str, Any]) -> Any:
        on = _flag(body, "on")
        _nothing_else(body)
        return await backend.share(on)

    async def task(body: dict[str, Any]) -> Any:
        paused = _flag(body, "paused")
        _nothing_else(body)
        return await backend.pause(paused)

    async def reload(body: dict[str, Any]) -> Any:
        _nothing_else(body)
        return await backend.reload()

    return [
        _act("runs", accept),
        _act("share", share),
        _act("task", task),
        _act("reload", reload),
    ]


def _act(path: str, action: Callable[[dict[str, Any]], Awaitable[Any]]) -> Route:
    async def endpoint(request: Request) -> Response:
        return Json(await action(await _body(request)))

    return Route(f"/v1/{path}", endpoint, methods=["POST"])


async def _event_lines(
    backend: AdminBackend,
    *,
    since: int,
    limit: int,
    follow: bool,
    kind: str,
    after: dt.datetime | None,
) -> AsyncIterator[bytes]:
    left = limit if limit > 0 else None
    while left is None or left > 0:
        batch = EVENTS_AT_ONCE if left is None else min(left, EVENTS_AT_ONCE)
        found, lost, since = backend.events(since, batch, kind=kind, after=after)
        after = None  # it names the beginning
        if lost:
            yield json_line({"type": "gap", "lost": lost})
        for event in found:
            yield json_line(event)
        left = None if left is None else left - len(found)
        if not found and follow:
            await backend.next_event(since)
        elif not found:
            return
        await trio.lowlevel.checkpoint()


async def _log_lines(records: AsyncGenerator[dict[str, Any], None]) -> AsyncIterator[bytes]:
    async with aclosing(records):
        async for record in records:
            yield json_line(record)


# --- requests ----------------------------------------------------------------------------------


async def _body(request: Request) -> dict[str, Any]:
    read = bytearray()
    with trio.move_on_after(BODY_SECONDS) as deadline:
        async for chunk in request.stream():
            if len(read) <= MAX_BODY_BYTES:  # what is too much is read, but not kept
                read += chunk
    if deadline.cancelled_caught:
        raise TimedOut(
            "the request's body did not arrive",
            f"{BODY_SECONDS:g} s are allowed",
            "send it at once, with the length that Content-Length says",
        )
    if len(read) > MAX_BODY_BYTES:
        raise HTTPException(413, f"a request has at most {MAX_BODY_BYTES} bytes")
    try:
        data = json.loads(bytes(read) or b"{}")
    except (ValueError, RecursionError) as error:
        raise ConfigError("the request's body is not JSON", str(error)[:200], _BODY) from error
    if not isinstance(data, dict):
        raise ConfigError("the request's body must be an object", "it is other JSON", _BODY)
    return data


def _text(body: dict[str, Any], key: str, *, required: bool = True) -> str | None:
    value = body.pop(key, None)
    if value is None and not required:
        return None
    if not isinstance(value, str):
        raise _unfit(key, "must be a text", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{key} is not valid text", "it holds half of a pair of surrogates", _BODY
        ) from error
    return value


def _flag(body: dict[str, Any], key: str) -> bool:
    value = body.pop(key, None)
    if not isinstance(value, bool):
        raise _unfit(key, "must be true or false", value)
    return value


def _unfit(key: str, must: str, value: object) -> ConfigError:
    kind = "there is none" if value is None else f"it is of another kind: {type(value).__name__}"
    return ConfigError(f"{key} {must}", kind, _BODY)


def _nothing_else(body: dict[str, Any]) -> None:
    if body:
        raise ConfigError(
            f"unknown key {min(body)[:80]!r} in the request's body",
            "a key that is not understood could be one that was meant to change something",
            _BODY,
        )
