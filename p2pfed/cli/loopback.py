"""One page for one browser, on 127.0.0.1 only: the door, the headers, the answers.

Invariants. Who has no cookie gets nothing; the cookie is given once, for the token that stands in
the printed address, which is then worth nothing. A request with a foreign Host (DNS rebinding) or
Origin, or that another site's page made, is refused before it is looked at; other users of this
machine are not let in. There is GET and nothing else: a page cannot change anything. Every answer
has the strict content policy.

What is behind a path is given by `dashboard`.
"""

from __future__ import annotations

import hmac
import os
import secrets
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from p2pfed.errors import ConfigError
from p2pfed.tcp_table import ESTABLISHED, sockets

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from email.message import Message
    from typing import Any, ClassVar

    Answer = tuple[str, bytes]
    Pieces = Callable[[int], Iterator[bytes]]

__all__ = ["POLICY", "Door", "Loopback", "uid_of"]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_SHUT = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_PATIENCE_S = 30.0
_MOST_AT_ONCE = 64
_PAGE = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">{head}'
    "<title>p2pfed</title></head><body><h1>p2pfed</h1><p>{text}</p></body></html>"
)
_ENTER = _PAGE.format(
    head='<meta http-equiv="refresh" content="0; url=/">',
    text='Opening the dashboard. <a href="/">Go on</a> if nothing happens.',
)
_CLOSED = _PAGE.format(
    head="",
    text="This address was used already, or it is not complete. "
    "It opens the dashboard once, in one browser: run p2pfed dashboard again for a new one.",
)


class Door:
    """Who may come in: whoever brings the token first, and then the cookie.

    Args:
        port: Where the page is served; cookies do not tell ports apart, so its name does.
    """

    def __init__(self, port: int) -> None:
        self.token = secrets.token_urlsafe(32)
        self.cookie_name = f"p2pfed-{port}"
        self._hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        self._session = secrets.token_urlsafe(32)
        self._lock = threading.Lock()
        self._used = False

    def exchange(self, token: str) -> str | None:
        """The cookie for the token; None where it is wrong or was used already."""
        with self._lock:
            right = hmac.compare_digest(token.encode(), self.token.encode())
            if not right or self._used:
                return None
            self._used = True
            return f"{self.cookie_name}={self._session}; HttpOnly; SameSite=Strict; Path=/"

    def knows(self, cookies: str) -> bool:
        """Whether a Cookie header holds the session."""
        for part in cookies.split(";"):
            name, _, value = part.strip().partition("=")
            if name == self.cookie_name:
                return hmac.compare_digest(value.encode(), self._session.encode())
        return False

    def is_foreign(self, path: str, headers: Message[str, str]) -> bool:
        """Whether a request comes from another site, or under a name that is not ours."""
        origin = headers.get("Origin")
        if headers.get("Host", "").lower() not in self._hosts:
            return True
        if origin is not None and origin.removeprefix("http://").lower() not in self._hosts:
            return True
        site = headers.get("Sec-Fetch-Site", "none")  # only the first page may be linked to
        return path != "/" and site not in {"none", "same-origin"}


def uid_of(client: tuple[str, int], port: int) -> int | None:
    """Whose the client's end of a loopback connection is; None if the kernel does not say.

    Of an end that its owner has closed it says nothing: it shows them all as root's.

    The token stands in the browser's command line, which every user of the machine may read.

    Args:
        client: Its address, IPv4.
        port: Ours.
    """
    ends = [f"0100007F:{client[1]:04X}", f"0100007F:{port:04X}"]
    return next((s.user for s in sockets(ESTABLISHED) if [s.local, s.remote] == ends), None)


class Loopback(ThreadingHTTPServer):
    """The server.

    Args:
        port: 0 takes a free one.
        pages: Path -> what gives the content type and the bytes.
        streams: Path -> what gives the pieces of a stream of lines, from an event's number on.

    Raises:
        ConfigError: The port is taken.
    """

    daemon_threads = True

    def __init__(
        self, port: int, pages: Mapping[str, Callable[[], Answer]], streams: Mapping[str, Pieces]
    ) -> None:
        try:
            super().__init__(("127.0.0.1", port), _Requests)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"cannot listen on 127.0.0.1:{port}",
                getattr(error, "strerror", None) or str(error),
                "leave out --port: a free one is taken",
            ) from error
        self.pages = pages
        self.streams = streams
        self.door = Door(self.server_port)
        self._room = threading.Semaphore(_MOST_AT_ONCE)

    @property
    def address(self) -> str:
        """What opens the page, once."""
        return f"http://127.0.0.1:{self.server_port}/?token={self.door.token}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for each connection of this user's, but not for any number of them."""
        if uid_of(client_address, self.server_port) != os.geteuid():
            self.shutdown_request(request)
        elif self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and make room again."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away, or garbage, is not worth a line."""


class _Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "p2pfed"
    sys_version = ""
    timeout: ClassVar[float | None] = _PATIENCE_S

    @property
    def _host(self) -> Loopback:
        assert isinstance(self.server, Loopback)
        return self.server

    def do_GET(self) -> None:
        door, parts = self._host.door, urlsplit(self.path)
        if door.is_foreign(parts.path, self.headers):
            self._text(HTTPStatus.FORBIDDEN, "requests of other sites are refused\n")
            return
        query = parse_qs(parts.query)
        if parts.path == "/" and "token" in query:
            self._exchange(query["token"][0])
        elif not door.knows(self.headers.get("Cookie", "")):
            self._send(HTTPStatus.FORBIDDEN, "text/html; charset=utf-8", _CLOSED.encode(), _SHUT)
        elif parts.path in self._host.pages:
            self._page(self._host.pages[parts.path])
        elif parts.path in self._host.streams:
            self._stream(self._host.streams[parts.path], query.get("since", ["0"])[0])
        else:
            self._text(HTTPStatus.NOT_FOUND, "there is no such page\n")

    def _refuse(self) -> None:
        self.close_connection = True  # its body is not read
        self._text(HTTPStatus.METHOD_NOT_ALLOWED, "this page only reads\n")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = _refuse  # noqa: N815

    def _exchange(self, token: str) -> None:
        cookie = self._host.door.exchange(token)
        if cookie is None:
            self._send(HTTPStatus.FORBIDDEN, "text/html; charset=utf-8", _CLOSED.encode(), _SHUT)
            return
        # Not a redirect: after a click elsewhere a browser would not send the strict cookie along.
        body = _ENTER.encode()
        self._send(HTTPStatus.OK, "text/html; charset=utf-8", body, _SHUT, {"Set-Cookie": cookie})

    def _page(self, page: Callable[[], Answer]) -> None:
        kind, body = page()
        self._send(HTTPStatus.OK, kind, body, POLICY)

    def _stream(self, pieces: Pieces, since: str) -> None:
        if not since.isdecimal() or len(since) > 15:
            self._text(HTTPStatus.BAD_REQUEST, "since is no number\n")
            return
        self.close_connection = True  # the end of the connection is the end of the stream
        self._head(HTTPStatus.OK, "application/x-ndjson", POLICY, {"Connection": "close"})
        for piece in pieces(int(since)):
            self.wfile.write(piece)

    def _text(self, status: HTTPStatus, text: str) -> None:
        self._send(status, "text/plain; charset=utf-8", text.encode(), _SHUT)

    def _send(
        self,
        status: HTTPStatus,
        kind: str,
        body: bytes,
        policy: str,
        more: Mapping[str, str] | None = None,
    ) -> None:
        self._head(status, kind, policy, {"Content-Length": str(len(body)), **(more or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: HTTPStatus, kind: str, policy: str, more: Mapping[str, str]) -> None:
        self.send_response(status)
        told = {"Content-Type": kind, "Content-Security-Policy": policy, **_HEADERS, **more}
        for name, value in told.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Requests are not logged: the first one's address holds the token."""
