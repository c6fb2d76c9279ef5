"""Binds the admin socket and serves it: rude clients cost one connection, never the daemon.

Invariants. The socket has its final mode from its first instant; a live daemon's socket is never
taken over, a dead one's is replaced; at exit only our own file is removed. An exception ends one
connection. Every wait for a client has a limit, so a client that stops reading or writing holds a
connection for seconds and is then dropped (followers resume by sequence number).

HTTP itself is hypercorn's. Two habits of it (0.18) are corrected here: `create_sockets` deletes an
existing socket without asking who owns it, so we bind by ourselves; and a write to a client is
shielded from cancellation without a limit, so `_Connection` gives it one. `TCPServer` is not public
API: the dependency is pinned below 0.19. The endpoints are in `app`.
"""

from __future__ import annotations

import errno
import logging
import os
import socket as sockets
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState
from hypercorn.utils import wrap_app

from p2pfed.admin.app import AdminBackend, make_app
from p2pfed.errors import ConfigError, StateInUse

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # the stubs that libp2p installs know no trio.TaskStatus

__all__ = ["SOCKET_PATH_BYTES", "Limits", "bind_socket", "serve_admin"]

SOCKET_PATH_BYTES = 107  # Linux: sizeof(sun_path) - 1
_umask_lock = threading.Lock()
_log = logging.getLogger("p2pfed.admin")


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how much one client may ask for.

    Attributes:
        connections: Connections at a time; further ones are closed at once.
        head_bytes: Request line and headers.
        head_s: Seconds for them to arrive, and for a kept connection to stay idle.
        write_s: Seconds that one write may wait for a client that does not read.
        linger_s: Seconds that an endpoint may go on after its client has gone.
    """

    connections: int = 64
    head_bytes: int = 16 * 1024
    head_s: float = 5.0
    write_s: float = 20.0
    linger_s: float = 30.0


async def serve_admin(
    backend: AdminBackend,
    *,
    socket: Path,
    mode: int,
    limits: Limits = Limits(),
    task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the admin API until cancelled.

    Args:
        backend: The node.
        socket: Path of the Unix socket.
        mode: Its permission bits, 0o600 or 0o660.
        limits: What one client may ask for.
        task_status: Started once clients can connect.

    Raises:
        ConfigError: The path is too long, is something else than a socket, or cannot be bound.
        StateInUse: Another daemon listens there.
    """
    listening = bind_socket(socket, mode=mode)
    identity = _identity(socket)
    try:
        async with trio.open_nursery() as nursery:
            server = _Server(backend, limits)
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
            nursery.start_soon(trio.serve_listeners, server.serve, [listener])
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                server.close()
    finally:
        listening.close()
        _remove(socket, identity)


def bind_socket(path: Path, *, mode: int) -> sockets.socket:
    """Bind and listen at `path` with exactly these permission bits.

    Raises:
        ConfigError: The path is too long, is something else than a socket, or cannot be bound.
        StateInUse: Another daemon listens there.
    """
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_BYTES:
        raise ConfigError(
            f"the socket path {path} has {length} bytes",
            f"a Unix socket path may have {SOCKET_PATH_BYTES}",
            "set admin.socket to a shorter path, e.g. in /run/p2pfed",
        )
    _make_way(path)
    listening = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    try:
        with _umask_lock:
            before = os.umask(0o777 & ~mode)
            try:
                listening.bind(os.fspath(path))
            finally:
                os.umask(before)
        listening.listen(64)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise _in_use(path) from error
        raise ConfigError(
            f"cannot make the socket {path}",
            error.strerror or "",
            "create its folder, owned by the daemon's user, or set admin.socket",
        ) from error
    return listening


def _make_way(path: Path) -> None:
    """Remove the socket of a dead daemon; refuse to touch anything else."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(
                f"{path} is not a socket",
                "it is a file of someone else and is left alone",
                "move it away, or set admin.socket to another path",
            )
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"cannot look at {path}", error.strerror or "") from error
    probe = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    probe.setblocking(False)
    try:
        probe.connect(os.fspath(path))
    except ConnectionRefusedError:
        path.unlink(missing_ok=True)
    except FileNotFoundError:
        return
    except BlockingIOError as error:  # its queue is full: it is alive
        raise _in_use(path) from error
    except OSError as error:
        raise ConfigError(f"cannot ask who owns {path}", error.strerror or "") from error
    else:
        raise _in_use(path)
    finally:
        probe.close()


def _in_use(path: Path) -> StateInUse:
    return StateInUse(
        f"another daemon is listening on {path}",
        "two daemons cannot share one socket",
        "stop the other one, or give this one its own data_dir",
    )


def _remove(path: Path, identity: tuple[int, int] | None) -> None:
    if identity is not None and _identity(path) == identity:  # not if someone replaced it
        path.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


class _Server:
    def __init__(self, backend: AdminBackend, limits: Limits) -> None:
        self._limits = limits
        self._app: AppWrapper = wrap_app(make_app(backend), 0, "asgi")  # type: ignore[arg-type]
        self._config = Config()
        self._config.errorlog = _log
        self._config.accesslog = None
        self._config.include_server_header = False
        self._config.h11_max_incomplete_size = limits.head_bytes
        self._config.keep_alive_timeout = limits.head_s
        self._config.alpn_protocols = ["http/1.1"]
        self._open: set[trio.SocketStream] = set()

    async def serve(self, stream: trio.SocketStream) -> None:
        if len(self._open) >= self._limits.connections:
            return  # serve_listeners closes it
        self._open.add(stream)
        try:
            with trio.CancelScope() as scope:
                context = WorkerContext(None)
                connection = _Connection(stream, self._limits, scope, context)
                await TCPServer(
                    self._app,
                    self._config,
                    context,
                    ConnectionState({}),
                    connection,  # type: ignore[arg-type] # it uses what _Connection has
                )
        except Exception as error:  # noqa: BLE001 - the wrapper: a client never ends the daemon
            _log.debug("a client's connection broke: %r", error)
        finally:
            self._open.discard(stream)

    def close(self) -> None:
        """Cut every connection: a write that waits for its client is shielded from cancelling."""
        for stream in self._open:
            stream.socket.close()


class _Connection:
    """The stream as hypercorn's TCPServer uses it, with a limit on every write."""

    def __init__(
        self,
        stream: trio.SocketStream,
        limits: Limits,
        scope: trio.CancelScope,
        context: WorkerContext,
    ) -> None:
        self._stream = stream
        self._limits = limits
        self._scope = scope
        self._context = context
        self.socket = stream.socket

    async def send_all(self, data: bytes) -> None:
        with trio.move_on_after(self._limits.write_s) as limit:
            await self._stream.send_all(data)
        if limit.cancelled_caught:
            self.socket.close()  # wakes the reader too
            raise trio.BrokenResourceError("the client does not read")

    async def receive_some(self, at_most: int) -> bytes:
        data = await self._stream.receive_some(at_most)
        if not data:
            self._end_soon()
            await self._context.terminated.set()  # else its idle timer holds the connection
        return bytes(data)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        self._end_soon()
        await self._stream.aclose()

    def _end_soon(self) -> None:
        # What still runs for a client that has gone (its endpoint, or a reader stuck in
        # hypercorn's queue) is cancelled after a while, so nothing can pile up.
        self._scope.deadline = min(
            self._scope.deadline, trio.current_time() + self._limits.linger_s
        )
