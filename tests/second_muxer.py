"""The second implementation, 2: yamux, and `dial` and `listen`, which give connections for streams.

Written from section 5 of `docs/protocol.md` and the specification of yamux; nothing of p2pfed or
libp2p is imported.

Invariant: after `dial` the other side holds the key of the peer id that was dialled.

Not here: circuits, who may connect, and what is said on the streams (`second_peer.py`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio
from cryptography.exceptions import InvalidTag
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey
from second_transport import (
    MULTISTREAM,
    NOISE,
    YAMUX,
    Ended,
    Noise,
    Pipe,
    Plain,
    Wrong,
    consent,
    line,
    noise_as_dialler,
    noise_as_listener,
    propose,
)

DATA, WINDOW, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
FIRST_WINDOW = 256 << 10


class Stream(Pipe):
    """One stream of a connection."""

    def __init__(self, connection: Connection, number: int) -> None:
        super().__init__()
        self._connection, self._number = connection, number
        self._window = FIRST_WINDOW  # how much may be sent yet
        self._wider = trio.Event()
        self.tell, self._pieces = trio.open_memory_channel[bytes](math.inf)

    async def some(self) -> bytes:
        try:
            piece = await self._pieces.receive()
        except trio.EndOfChannel:
            return b""
        await self._connection.send(WINDOW, 0, self._number, len(piece))  # it may send as much
        return piece

    async def write(self, data: bytes) -> None:
        while data:
            while not self._window:
                self._wider = trio.Event()
                await self._wider.wait()
            piece, data = data[: self._window], data[self._window :]
            self._window -= len(piece)
            await self._connection.send(DATA, 0, self._number, len(piece), piece)

    async def finish(self) -> None:
        """Say that nothing more is written."""
        await self._connection.send(DATA, FIN, self._number, 0)

    def widen(self, more: int) -> None:
        self._window += more
        self._wider.set()


class Connection:
    """Streams over a Noise channel.

    Attributes:
        peer: Who the other side is.
        dialled: Whether this side dialled.
        opened: Streams that the other side opened, not agreed on a protocol yet.
    """

    def __init__(self, channel: Noise, peer: str, *, dialled: bool) -> None:
        self.peer, self.dialled, self._channel = peer, dialled, channel
        self._streams: dict[int, Stream] = {}
        self._next = 1 if dialled else 2  # a dialler's streams have odd numbers
        self._tell, self.opened = trio.open_memory_channel[Stream](math.inf)

    async def send(self, kind: int, flags: int, stream: int, n: int, data: bytes = b"") -> None:
        await self._channel.write(struct.pack(">BBHII", 0, kind, flags, stream, n) + data)

    async def open(self, *protocols: str, at_once: bytes = b"") -> tuple[Stream, str]:
        """A new stream and the protocol agreed on; `at_once` goes before consent to the first."""
        stream = self._streams[self._next] = Stream(self, self._next)
        self._next += 2
        await self.send(WINDOW, SYN, stream._number, 0)
        if not at_once:
            return stream, await propose(stream, protocols)
        await stream.write(line(MULTISTREAM) + line(protocols[0]) + at_once)
        return stream, protocols[0]

    async def run(self) -> None:
        """Take what comes, until the end of the connection."""
        try:
            while True:
                head = await self._channel.read(12)
                version, kind, flags, number, n = struct.unpack(">BBHII", head)
                if version:
                    raise Wrong("a version of yamux that is none")
                await self._take(kind, flags, number, n)
        except Ended:
            return
        finally:
            self._tell.close()
            for stream in self._streams.values():
                stream.tell.close()

    async def _take(self, kind: int, flags: int, number: int, n: int) -> None:
        if kind == PING:
            if flags & SYN:
                await self.send(PING, ACK, 0, n)
            return
        if kind == GO_AWAY:
            raise Ended
        if flags & SYN:
            self._streams[number] = Stream(self, number)
            self._tell.send_nowait(self._streams[number])
            await self.send(WINDOW, ACK, number, 0)
        stream = self._streams[number]
        if kind == WINDOW:
            stream.widen(n)
        elif n:
            stream.tell.send_nowait(await self._channel.read(n))
        if flags & (FIN | RST):
            stream.tell.close()


@asynccontextmanager
async def dial(host: str, port: int, peer: str, seed: bytes) -> AsyncIterator[Connection]:
    """A connection to a peer, which ends with the block.

    Raises:
        Wrong: Somebody else answers there.
    """
    async with await trio.open_tcp_stream(host, port) as socket:
        plain = Plain(socket)
        await propose(plain, [NOISE])
        channel, other = await noise_as_dialler(plain, SigningKey(seed))
        if other != peer:
            raise Wrong(f"{other} answers for {peer}")
        await propose(channel, [YAMUX])
        connection = Connection(channel, other, dialled=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            try:
                yield connection
            finally:
                nursery.cancel_scope.cancel()


async def listen(
    seed: bytes,
    take: Callable[[Connection], Awaitable[None]],
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Listen on loopback and tell the port; each connection ends when `take` is done with it."""

    async def serve(socket: trio.SocketStream) -> None:
        plain = Plain(socket)
        try:
            await consent(plain, [NOISE])
            channel, other = await noise_as_listener(plain, SigningKey(seed))
            await consent(channel, [YAMUX])
        except (Wrong, Ended, InvalidTag, BadSignatureError):
            return  # whoever that was: it loses the connection, and nobody else anything
        connection = Connection(channel, other, dialled=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            await take(connection)
            nursery.cancel_scope.cancel()

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        task_status.started(listeners[0].socket.getsockname()[1])
