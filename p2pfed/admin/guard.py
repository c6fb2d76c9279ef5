"""What every request passes: who may, who wrote, what is answered when something fails.

Invariants. Nothing a browser page can send is answered: a request with an Origin, a Referer or a
foreign Host is refused before it is looked at (as Tailscale's local API does). Who may only read
cannot write (the rule is in `rights`). Whoever writes is in the event log, with the outcome, before
the answer is sent. An error in the backend is logged and answered; it never reaches the server.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import trio
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from p2pfed import __version__
from p2pfed.admin.answers import kind_of, problem
from p2pfed.admin.backend import AdminBackend
from p2pfed.admin.rights import NOBODY, Caller, Right, may, refusal, right_of, user_name
from p2pfed.errors import ConfigError, NotFound, NotPermitted, P2PFedError

__all__ = ["Guard", "caller_of", "name_of", "right_in"]

HOSTS = frozenset({"p2pfed", "localhost", ""})
NAME_SECONDS = 1.0  # for the name of a user
NAME_THREADS = 4  # that may wait for one; the node's own work has its threads apart from them
REFUSED_AGAIN = 60.0  # seconds until a refused user is noted in the event log again

_log = logging.getLogger("p2pfed.admin")
_names: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("names")


class Guard:
    """See the module docstring.

    Args:
        app: The endpoints.
        backend: Knows the operators, and keeps what was written.
    """

    def __init__(self, app: ASGIApp, backend: AdminBackend) -> None:
        self._app = app
        self._backend = backend
        self._refused: dict[tuple[int, str], float] = {}  # when a refusal was last noted, by user

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as an ASGI application."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        answer = _Answer(send)
        scope["app"] = self  # Router then raises for 404 and 405 instead of answering in text
        caller = caller_of(scope)
        try:
            await self._no_web_page(caller, scope)
            if may(Right.READ, scope["method"]):
                await self._app(scope, receive, answer.send)
                return
            user = await name_of(caller.uid)
            await self._permitted(caller, user, scope)
            await self._write(scope, receive, answer, user)
        except Exception as error:  # the wrapper: a bug behind one endpoint is one failed request
            response = _answer_to(error, scope)
            if answer.started:
                raise  # the server closes the connection, so that the answer looks cut off
            await response(scope, receive, answer.send)

    async def _write(self, scope: Scope, receive: Receive, answer: _Answer, user: str) -> None:
        """Have a write done, and noted before it is answered."""

        def note(outcome: str) -> None:
            uid = caller_of(scope).uid
            self._backend.note_write(uid, user, _endpoint(scope), outcome)

        answer.before = lambda: note("done")
        try:
            await self._app(scope, receive, answer.send)
        except BaseException as error:  # cancelled, too: its client went, and it took too long
            answer.before = None
            if not answer.started:
                note(kind_of(error))
            raise

    async def _permitted(self, caller: Caller, user: str, scope: Scope) -> None:
        """Raise NotPermitted for who may only read.

        It is noted once a minute: they must not push out of the event log what others did.
        """
        if may(right_in(caller, self._backend), scope["method"]):
            return
        self._note_refusal(caller, user, scope, "not-permitted")
        owner = await name_of(os.geteuid())
        raise refusal(user, caller.uid, _endpoint(scope), owner=owner)

    async def _no_web_page(self, caller: Caller, scope: Scope) -> None:
        """Raise NotPermitted for what a browser's page can send; a write is noted as refused."""
        if not _is_foreign(scope):
            return
        if not may(Right.READ, scope["method"]):
            self._note_refusal(caller, await name_of(caller.uid), scope, "web-page")
        raise NotPermitted(
            "requests of web pages are refused",
            "they carry an Origin, a Referer or a foreign Host",
            "use: curl --unix-socket SOCKET http://p2pfed/v1/status",
        )

    def _note_refusal(self, caller: Caller, user: str, scope: Scope, outcome: str) -> None:
        """At most once a minute for each user and outcome."""
        now, key = trio.current_time(), (caller.uid, outcome)
        if now - self._refused.get(key, float("-inf")) >= REFUSED_AGAIN:
            self._refused[key] = now
            self._backend.note_write(caller.uid, user, _endpoint(scope), outcome)


class _Answer:
    """The way out of one answer: adds the headers that all have, tells when it begins."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self.before: Callable[[], None] | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self.before is not None:
                self.before()
            self.started = True
            message["headers"] = [
                *message["headers"],
                (b"p2pfed-version", __version__.encode()),
                (b"cache-control", b"no-store"),
            ]
        await self._send(message)


def caller_of(scope: Scope) -> Caller:
    """Who sent a request; nobody where the server did not say."""
    caller: Caller = scope.get("p2pfed.caller", NOBODY)
    return caller


def right_in(caller: Caller, backend: AdminBackend) -> Right:
    """What a caller may do at this node."""
    return right_of(caller.uid, owner=os.geteuid(), operators=backend.operators)


async def name_of(uid: int) -> str:
    """A user's name; a directory service that does not answer holds up nobody.

    A thread that waits for one cannot be ended. There are only so many of them: who finds none is
    called by number.
    """
    name = str(uid)
    with trio.move_on_after(NAME_SECONDS):
        name = await trio.to_thread.run_sync(
            user_name,
            uid,
            abandon_on_cancel=True,  # type: ignore[call-arg] # the stubs are older
            limiter=_few(),
        )
    return name[:64]


def _few() -> trio.CapacityLimiter:
    try:
        return _names.get()
    except LookupError:
        _names.set(trio.CapacityLimiter(NAME_THREADS))
        return _names.get()


def _endpoint(scope: Scope) -> str:
    path = "".join(c if c.isprintable() else "?" for c in scope["path"][:80])
    return f"{scope['method'][:16]} {path}"


def _is_foreign(scope: Scope) -> bool:
    headers = [(name.lower(), value) for name, value in scope["headers"]]
    if any(name in {b"origin", b"referer"} for name, _ in headers):
        return True
    hosts = [value.decode("latin1").lower() for name, value in headers if name == b"host"]
    return any(host not in HOSTS for host in hosts)


def _answer_to(error: Exception, scope: Scope) -> Response:
    """What the client is told of an error that an endpoint raised."""
    if isinstance(error, P2PFedError):
        return problem(error)
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)  # nobody is there to read it
    if not isinstance(error, HTTPException):
        _log.error("the endpoint %s failed", scope["path"], exc_info=error)
        return problem(P2PFedError("the daemon failed to answer", "this is a bug", "see its log"))
    if error.status_code == 404:
        refusal: P2PFedError = NotFound(
            f"no endpoint {scope['path'][:200]}",
            "this daemon offers nothing under that name",
            "GET /v1/version names this API's version",
        )
    elif error.status_code == 405:
        refusal = ConfigError(
            f"{scope['method'][:20]} is not possible here",
            "reading is GET, changing is POST, and hardly an endpoint has both",
            "see docs/operations.md for the endpoints",
        )
    else:
        refusal = ConfigError(
            error.detail,
            f"the request was refused with HTTP status {error.status_code}",
            "see docs/operations.md for the endpoints",
        )
    return problem(refusal, error.status_code)
