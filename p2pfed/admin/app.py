"""The endpoints under /v1, as an ASGI application over one `AdminBackend`.

Invariants. Nothing a browser page can send is answered: a request with an Origin, a Referer or a
foreign Host is refused before it is looked at (as Tailscale's local API does). Every refusal is a
problem document (RFC 9457) made of a P2PFedError's what, why and do, with the exit code of the
command line. An error in the backend is logged and answered; it never reaches the server.

The socket itself, its rights and its time limits are in `server`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol

import trio
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from p2pfed import __version__
from p2pfed.errors import ConfigError, NotFound, NotPermitted, P2PFedError, TimedOut

__all__ = ["MAX_BODY_BYTES", "AdminBackend", "make_app"]

MAX_BODY_BYTES = 1 << 20
BODY_SECONDS = 10.0
HOSTS = frozenset({"p2pfed", "localhost", ""})
EVENTS_AT_ONCE = 500
_STATUS = {2: 400, 3: 503, 4: 403, 5: 404, 6: 504, 7: 409, 8: 400}  # exit code -> HTTP status

_log = logging.getLogger("p2pfed.admin")


class AdminBackend(Protocol):
    """What the node offers to its operator; every value returned can be written as JSON.

    Any method may raise a P2PFedError, which the caller of the endpoint is told.
    """

    def status(self) -> dict[str, Any]:
        """What `p2pfed status` shows."""

    def peers(self) -> list[dict[str, Any]]:
        """All members that this node knows, with what it has seen of them."""

    def peer(self, peer: str) -> dict[str, Any]:
        """One member by peer id, by a unique beginning of it, or by name; raises NotFound."""

    def privacy(self) -> dict[str, Any]:
        """Mechanism, ceiling and what was spent, as far as the public plane knows it."""

    def roster(self) -> dict[str, Any]:
        """The roster in force; `signed` holds the exact text of the document."""

    def bootstrap(self) -> list[dict[str, Any]]:
        """The peers that are asked first."""

    def runs(self) -> list[dict[str, Any]]:
        """The runs that are known, and whether this hospital accepted them."""

    def events(self, since: int, limit: int) -> tuple[list[dict[str, Any]], int]:
        """Events with seq > since, oldest first, and how many before them are lost."""

    async def next_event(self, since: int) -> None:
        """Return once an event with seq > since exists."""

    async def join(
        self, *, roster: bytes | None, bootstrap: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Join the network, given a signed roster and bootstrap lists (each a parsed file)."""

    async def leave(self) -> dict[str, Any]:
        """Leave the network for good, telling the peers."""

    async def share(self, on: bool) -> dict[str, Any]:
        """Start or stop releasing deltas; receiving goes on."""

    async def block(self, peer: str, on: bool) -> dict[str, Any]:
        """Have no connection with a member, or have one again."""

    async def accept_run(self, signed: bytes, genesis: Path | None) -> dict[str, Any]:
        """Accept a signed run file; `genesis` is a local copy of its first model."""

    async def offer_roster(self, signed: bytes) -> dict[str, Any]:
        """Take a newer signed roster from the operator's hand."""


def make_app(backend: AdminBackend) -> ASGIApp:
    """The ASGI application over `backend`.

    Args:
        backend: The node, or a fake in tests.
    """
    return _Guard(Router([*_reading(backend), *_acting(backend)], redirect_slashes=False))


# --- endpoints ---------------------------------------------------------------------------------


def _reading(backend: AdminBackend) -> list[Route]:
    def show(path: str, answer: Callable[[], Any]) -> Route:
        async def endpoint(_: Request) -> Response:
            return _Json(answer())

        return Route(f"/v1/{path}", endpoint, methods=["GET"])

    async def peer(request: Request) -> Response:
        return _Json(backend.peer(request.path_params["peer"]))

    async def events(request: Request) -> Response:
        since = _integer(request, "since", default=0)
        limit = _integer(request, "limit", default=0)
        follow = request.query_params.get("follow", "") not in {"", "0"}
        backend.events(since, 1)  # a backend that fails does so before the status line
        lines = _event_lines(backend, since=since, limit=limit, follow=follow)
        return _Lines(lines)

    return [
        show("status", backend.status),
        show("peers", backend.peers),
        show("privacy", backend.privacy),
        show("roster", backend.roster),
        show("bootstrap", backend.bootstrap),
        show("runs", backend.runs),
        show("version", lambda: {"version": __version__, "api": 1}),
        Route("/v1/peers/{peer:path}", peer, methods=["GET"]),
        Route("/v1/events", events, methods=["GET"]),
    ]


def _acting(backend: AdminBackend) -> list[Route]:
    async def join(body: dict[str, Any]) -> Any:
        roster = _text(body, "roster", required=False)
        bootstrap = body.pop("bootstrap", [])
        if not isinstance(bootstrap, list) or not all(isinstance(b, dict) for b in bootstrap):
            raise ConfigError("bootstrap must be a list of objects")
        _nothing_else(body)
        return await backend.join(
            roster=None if roster is None else roster.encode(), bootstrap=bootstrap
        )

    async def leave(body: dict[str, Any]) -> Any:
        _nothing_else(body)
        return await backend.leave()

    async def share(body: dict[str, Any]) -> Any:
        on = _flag(body, "on")
        _nothing_else(body)
        return await backend.share(on)

    async def block(body: dict[str, Any]) -> Any:
        peer, on = _text(body, "peer"), _flag(body, "on")
        _nothing_else(body)
        return await backend.block(peer or "", on)

    async def accept(body: dict[str, Any]) -> Any:
        signed = _text(body, "signed")
        genesis = _text(body, "genesis", required=False)
        _nothing_else(body)
        return await backend.accept_run(
            (signed or "").encode(), None if genesis is None else Path(genesis)
        )

    async def offer(body: dict[str, Any]) -> Any:
        signed = _text(body, "signed")
        _nothing_else(body)
        return await backend.offer_roster((signed or "").encode())

    def act(path: str, action: Callable[[dict[str, Any]], Awaitable[Any]]) -> Route:
        async def endpoint(request: Request) -> Response:
            return _Json(await action(await _body(request)))

        return Route(f"/v1/{path}", endpoint, methods=["POST"])

    return [
        act("join", join),
        act("leave", leave),
        act("share", share),
        act("block", block),
        act("runs", accept),
        act("roster", offer),
    ]


async def _event_lines(
    backend: AdminBackend, *, since: int, limit: int, follow: bool
) -> AsyncIterator[bytes]:
    left = limit if limit > 0 else None
    while left is None or left > 0:
        batch = EVENTS_AT_ONCE if left is None else min(left, EVENTS_AT_ONCE)
        found, lost = backend.events(since, batch)
        if lost:
            since += lost
            yield _line({"type": "gap", "lost": lost})
        for event in found:
            yield _line(event)
        if found:
            since = found[-1]["seq"]
            left = None if left is None else left - len(found)
        elif follow:
            await backend.next_event(since)
        else:
            return
        await trio.lowlevel.checkpoint()


# --- requests ----------------------------------------------------------------------------------


def _integer(request: Request, key: str, *, default: int) -> int:
    text = request.query_params.get(key)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise ConfigError(f"{key}={text[:40]!r} is not a number")
    return int(text)


async def _body(request: Request) -> dict[str, Any]:
    read = bytearray()
    with trio.move_on_after(BODY_SECONDS) as deadline:
        async for chunk in request.stream():
            if len(read) <= MAX_BODY_BYTES:  # what is too much is read, but not kept
                read += chunk
    if deadline.cancelled_caught:
        raise TimedOut("the request's body did not arrive", f"{BODY_SECONDS:g} s are allowed")
    if len(read) > MAX_BODY_BYTES:
        raise HTTPException(413, f"a request has at most {MAX_BODY_BYTES} bytes")
    try:
        data = json.loads(bytes(read) or b"{}")
    except (ValueError, RecursionError) as error:
        raise ConfigError("the request's body is not JSON", str(error)[:200]) from error
    if not isinstance(data, dict):
        raise ConfigError("the request's body must be an object")
    return data


def _text(body: dict[str, Any], key: str, *, required: bool = True) -> str | None:
    value = body.pop(key, None)
    if value is None and not required:
        return None
    if not isinstance(value, str):
        raise ConfigError(f"{key} must be a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{key} is not valid text") from error
    return value


def _flag(body: dict[str, Any], key: str) -> bool:
    value = body.pop(key, None)
    if not isinstance(value, bool):
        raise ConfigError(f"{key} must be true or false")
    return value


def _nothing_else(body: dict[str, Any]) -> None:
    if body:
        raise ConfigError(f"unknown key {min(body)[:80]!r} in the request's body")


# --- answers -----------------------------------------------------------------------------------


class _Json(JSONResponse):
    def render(self, content: Any) -> bytes:
        return _line(content)


class _Lines(Response):
    """A stream of lines that ends when its source or its client does.

    Starlette's StreamingResponse cancels its own last send when hypercorn reports the end of the
    exchange as a disconnect; the connection then stays open (seen with 1.10 on 0.18). Here the last
    send lies outside of what a disconnect cancels.
    """

    media_type: str | None = "application/x-ndjson"

    def __init__(self, lines: AsyncIterator[bytes]) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        gone = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_until_gone, receive, nursery.cancel_scope)
            async with aclosing(self._lines):  # type: ignore[type-var] # it is our generator
                async for line in self._lines:
                    await send({"type": "http.response.body", "body": line, "more_body": True})
            gone = False
            nursery.cancel_scope.cancel()
        if not gone:
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_gone(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _line(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode() + b"\n"


def _problem(error: P2PFedError, status: int | None = None) -> Response:
    kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(error).__name__).lower()
    return _Json(
        {
            "type": f"urn:p2pfed:{kind}",
            "title": error.what,
            "status": status or _STATUS.get(error.exit_code, 500),
            "detail": error.why,
            "hint": error.do,
            "exit_code": error.exit_code,
        },
        status_code=status or _STATUS.get(error.exit_code, 500),
        media_type="application/problem+json",
    )


def _answer_to(error: Exception, scope: Scope) -> Response:
    """What the client is told of an error that an endpoint raised."""
    if isinstance(error, P2PFedError):
        return _problem(error)
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)  # nobody is there to read it
    if not isinstance(error, HTTPException):
        _log.error("the endpoint %s failed", scope["path"], exc_info=error)
        return _problem(P2PFedError("the daemon failed to answer", "this is a bug", "see its log"))
    if error.status_code == 404:
        refusal: P2PFedError = NotFound(
            f"no endpoint {scope['path'][:200]}", "", "GET /v1/version names this API's version"
        )
    elif error.status_code == 405:
        refusal = ConfigError(f"{scope['method'][:20]} is not possible here")
    else:
        refusal = ConfigError(error.detail)
    return _problem(refusal, error.status_code)


class _Guard:
    """Refuses browsers, adds the version header, answers what no endpoint foresaw."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [
                    *message["headers"],
                    (b"p2pfed-version", __version__.encode()),
                    (b"cache-control", b"no-store"),
                ]
            await send(message)

        if _is_foreign(scope):
            refusal = NotPermitted(
                "requests of web pages are refused",
                "they carry an Origin, a Referer or a foreign Host",
                "use: curl --unix-socket SOCKET http://p2pfed/v1/status",
            )
            await _problem(refusal)(scope, receive, sending)
            return
        scope["app"] = self  # Router then raises for 404 and 405 instead of answering in text
        try:
            await self._app(scope, receive, sending)
        except Exception as error:  # the wrapper: a bug behind one endpoint is one failed request
            answer = _answer_to(error, scope)
            if started:
                raise  # the server closes the connection, so that the answer looks cut off
            await answer(scope, receive, sending)


def _is_foreign(scope: Scope) -> bool:
    headers = [(name.lower(), value) for name, value in scope["headers"]]
    if any(name in {b"origin", b"referer"} for name, _ in headers):
        return True
    hosts = [value.decode("latin1").lower() for name, value in headers if name == b"host"]
    return any(host not in HOSTS for host in hosts)
