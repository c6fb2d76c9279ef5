"""Serves the admin socket: rude clients cost one connection, never the daemon.

Invariants. An exception ends one connection. Every wait for a client has a limit, so a client that
stops reading or writing holds a connection for seconds and is then dropped (followers resume by
sequence number). However many come at once, a fixed number holds a file descriptor: some are
served, as many again wait for their turn, the others wait in the kernel's queue. Who waits too
long, and a user with too many connections, is told that the daemon is busy. Root and the daemon's
own user have no such limit, and a few places that nobody else gets, so that readers cannot lock
them out.

Who is at the other end is read here (SO_PEERCRED) and given to the application as
`scope["p2pfed.caller"]`; what they may do is not decided here (`rights`).

HTTP itself is hypercorn's. Two habits of it (0.18) are corrected here: `create_sockets` deletes an
existing socket without asking who owns it, so we bind by ourselves (`binding`); and a write to a
client is shielded from cancellation without a limit, so `_Connection` gives it one. `TCPServer` is
not public API: the dependency is pinned below 0.19. The endpoints are in `app`.
"""

from __future__ import annotations

import logging
import os
import socket as sockets
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app

from p2pfed.admin.answers import problem_bytes
from p2pfed.admin.app import make_app
from p2pfed.admin.backend import AdminBackend
from p2pfed.admin.binding import bound_socket
from p2pfed.admin.rights import NOBODY, Caller
from p2pfed.errors import TimedOut

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send
    from trio_typing import TaskStatus  # the stubs that libp2p installs know no trio.TaskStatus

__all__ = ["Limits", "serve_admin"]

_REFUSED_BYTES = 64 * 1024  # of a request that is refused unread
_log = logging.getLogger("p2pfed.admin")


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how much one client may ask for.

    Attributes:
        connections: Connections that are served at a time.
        waiting: Connections that wait for their turn; further ones stay in the kernel's queue.
        of_one_user: Connections of a user other than root and the daemon's own.
        of_all_others: Connections of all these users together; below `connections`.
        wait_s: Seconds that one waits for its turn.
        head_bytes: Request line and headers.
        head_s: Seconds for them to arrive, and for a kept connection to stay idle.
        write_s: Seconds that one write may wait for a client that does not read.
        linger_s: Seconds that an endpoint may go on after its client has gone.
    """

    connections: int = 64
    waiting: int = 64
    of_one_user: int = 48
    of_all_others: int = 56
    wait_s: float = 8.0
    head_bytes: int = 16 * 1024
    head_s: float = 5.0
    write_s: float = 20.0
    linger_s: float = 30.0


async def serve_admin(
    backend: AdminBackend,
    *,
    socket: Path,
    mode: int,
    group: str = "",
    limits: Limits = Limits(),
    task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the admin API until cancelled.

    Args:
        backend: The node.
        socket: Path of the Unix socket.
        mode: Its permission bits, 0o600 or 0o660.
        group: Whose members may connect with 0o660; empty: the daemon's own.
        limits: What one client may ask for.
        task_status: Started once clients can connect.

    Raises:
        ConfigError: The path is too long, is something else than a socket, or cannot be bound.
        StateInUse: Another daemon listens there.
    """
    with bound_socket(socket, mode=mode, key="admin.socket", group=group) as listening:
        async with trio.open_nursery() as nursery:
            server = _Server(backend, limits)
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
            door = _Door(listener, limits.connections + limits.waiting)

            async def serve(stream: trio.SocketStream) -> None:
                try:
                    await server.serve(stream)
                finally:
                    door.leave()

            nursery.start_soon(trio.serve_listeners, serve, [door])
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                server.close()


class _Door(trio.abc.Listener[trio.SocketStream]):
    """Lets in so many connections at a time; the others wait in the kernel's queue."""

    def __init__(self, inner: trio.SocketListener, places: int) -> None:
        self._inner = inner
        self._places = trio.Semaphore(places)

    async def accept(self) -> trio.SocketStream:
        await self._places.acquire()
        try:
            return await self._inner.accept()
        except BaseException:
            self._places.release()
            raise

    def leave(self) -> None:
        """One connection has ended."""
        self._places.release()

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Server:
    def __init__(self, backend: AdminBackend, limits: Limits) -> None:
        self._limits = limits
        self._app = make_app(backend)
        self._config = Config()
        self._config.errorlog = _log
        self._config.accesslog = None
        self._config.include_server_header = False
        self._config.h11_max_incomplete_size = limits.head_bytes
        self._config.keep_alive_timeout = limits.head_s
        self._config.alpn_protocols = ["http/1.1"]
        self._open: set[trio.SocketStream] = set()
        self._turns = trio.Semaphore(limits.connections)
        self._of_user: Counter[int] = Counter()

    async def serve(self, stream: trio.SocketStream) -> None:
        """Carry one connection to its end; never raises for what a client does."""
        caller = _caller(stream)
        self._open.add(stream)
        self._of_user[caller.uid] += 1
        try:
            await self._serve(stream, caller)
        except Exception as error:  # noqa: BLE001 - the wrapper: a client never ends the daemon
            _log.debug("a client's connection broke: %r", error)
        finally:
            self._open.discard(stream)
            self._of_user[caller.uid] -= 1
            if not self._of_user[caller.uid]:
                del self._of_user[caller.uid]

    async def _serve(self, stream: trio.SocketStream, caller: Caller) -> None:
        limits = self._limits
        if why := self._too_many(caller):
            await _refuse(stream, why, lingers=False)  # or they would hold the places of others
            return
        with trio.move_on_after(limits.wait_s) as waiting:
            await self._turns.acquire()
        if waiting.cancelled_caught:
            await _refuse(stream, f"{limits.connections} connections are open already")
            return
        try:
            await self._converse(stream, caller)
        finally:
            self._turns.release()

    def _too_many(self, caller: Caller) -> str:
        """Why a connection is refused at once; empty if it is not."""
        limits, unlimited = self._limits, {0, os.geteuid()}
        if caller.uid in unlimited:
            return ""
        if self._of_user[caller.uid] > limits.of_one_user:
            return f"a user may have {limits.of_one_user} connections at a time"
        others = sum(n for uid, n in self._of_user.items() if uid not in unlimited)
        if others > limits.of_all_others:
            return f"users may have {limits.of_all_others} connections at a time, all together"
        return ""

    async def _converse(self, stream: trio.SocketStream, caller: Caller) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            scope["p2pfed.caller"] = caller
            await self._app(scope, receive, send)

        with trio.CancelScope() as scope:
            context = WorkerContext(None)
            connection = _Connection(stream, self._limits, scope, context)
            await TCPServer(
                wrap_app(app, 0, "asgi"),  # type: ignore[arg-type] # starlette's types are wider
                self._config,
                context,
                ConnectionState({}),
                connection,  # type: ignore[arg-type] # it uses what _Connection has
            )

    def close(self) -> None:
        """Cut every connection: a write that waits for its client is shielded from cancelling."""
        for stream in self._open:
            stream.socket.close()


def _caller(stream: trio.SocketStream) -> Caller:
    """Who is at the other end, as the kernel says."""
    try:
        told = stream.socket.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, 12)
    except OSError:
        return NOBODY
    pid, uid, _ = struct.unpack("iII", told)
    return Caller(uid, pid)


async def _refuse(stream: trio.SocketStream, why: str, *, lingers: bool = True) -> None:
    """Say that the daemon is busy, without a look at the request.

    Args:
        stream: The client.
        why: What is told.
        lingers: Wait for what the client still writes.
    """
    body = problem_bytes(TimedOut("the daemon is busy", why, "try again in a moment"), 503)
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\n"
        f"Retry-After: 1\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with trio.move_on_after(1.0):
        await stream.send_all(head.encode() + body)
        if not lingers:
            return  # what was written can be read all the same
        await stream.send_eof()
        # A close with unread bytes would look like a break to a client that still writes.
        read = 0
        while read < _REFUSED_BYTES and (piece := await stream.receive_some(4096)):
            read += len(piece)


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
