"""The hospital's own window into its trainer: read-only HTTP over a Unix socket, mode 0600.

`GET /v1/status`, `/v1/metrics` and `/v1/ledger` give JSON; anything else is 404 or 405. What is
shown here (metrics, times, the ledger's entries) must never reach the network process: command
line, dashboard and report read this socket themselves.

Invariant: a client can neither change anything nor stop the trainer; a stale socket file is
replaced and a live one refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

from p2pfed.config import SOCKET_PATH_BYTES
from p2pfed.errors import ConfigError, StateInUse

__all__ = ["Views", "serve_private_socket"]

Views = Mapping[str, Callable[[], Mapping[str, Any]]]

_PATIENCE_S = 5.0


@contextlib.contextmanager
def serve_private_socket(path: Path, views: Views) -> Iterator[None]:
    """Serve `views` at `path` from a thread while the context is open.

    Args:
        path: Where the socket file is made.
        views: Per URL path the function that gives its JSON object; called from server threads.

    Raises:
        ConfigError: The path is too long or cannot be made.
        StateInUse: Another live process serves it.
    """
    _make_room(path)

    class Requests(_Requests):
        shown = views

    try:
        server = _UnixServer(str(path), Requests)
    except OSError as error:
        raise ConfigError(f"cannot make the socket {path}", str(error)) from error
    thread = threading.Thread(  # a daemon: a hospital's own script may just end
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        path.unlink(missing_ok=True)


def _make_room(path: Path) -> None:
    size = len(os.fsencode(path))
    if size > SOCKET_PATH_BYTES:
        raise ConfigError(
            f"the socket path {path} has {size} bytes",
            f"a Unix socket path may have {SOCKET_PATH_BYTES}",
            "set train.socket to a shorter one",
        )
    if not path.is_socket():
        if path.exists():
            raise ConfigError(f"{path} exists and is no socket", "it is not ours to remove")
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PATIENCE_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)  # left behind by a process that was killed
            return
        except OSError as error:
            raise StateInUse(f"cannot tell whether {path} is in use", str(error)) from error
    raise StateInUse(
        f"another trainer serves {path}", "two would share one budget", "stop the other one first"
    )


class _UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    block_on_close = False

    def server_bind(self) -> None:
        """Bind with mode 0600 from the first moment, whatever other threads do meanwhile."""
        os.fchmod(self.socket.fileno(), 0o600)  # on Linux the file takes over the socket's mode
        super().server_bind()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away or sent garbage is not worth a line."""


class _Requests(BaseHTTPRequestHandler):
    shown: ClassVar[Views] = {}
    timeout: ClassVar[float | None] = _PATIENCE_S
    server_version = "p2pfed-trainer"
    sys_version = ""

    def do_GET(self) -> None:
        view = self.shown.get(self.path)
        if view is None:
            self._answer(HTTPStatus.NOT_FOUND, {"error": "no such page", "pages": list(self.shown)})
        else:
            self._answer(HTTPStatus.OK, view())

    def _refuse(self) -> None:
        self._answer(HTTPStatus.METHOD_NOT_ALLOWED, {"error": "this socket is read-only"})

    do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = _refuse  # noqa: N815

    def _answer(self, status: HTTPStatus, body: Mapping[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def address_string(self) -> str:
        """A Unix socket's peer has no address."""
        return "local"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Requests are not logged."""
