"""A wire: what a connection runs over, a TCP socket or a stream that a relay passes on.

Invariants: bytes are counted here and nowhere else; what a stranger may send is bounded before a
byte of it is looked at; ``abort`` never waits and wakes whoever reads or writes.

Not here: encryption (``noise``), deadlines (``link``), the relay (``relay``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

import trio

from p2pfed.errors import PeerUnreachable, RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Buffer", "RelayedWire", "TcpWire", "Wire"]

Buffer = bytes | bytearray | memoryview


class _Duplex(Protocol):
    """What a relayed wire needs of the stream that the relay passes on."""

    async def read(self, n: int) -> Buffer: ...

    async def write(self, data: Buffer) -> None: ...

    def discard(self) -> None: ...


class Wire(ABC):
    """Counts and bounds; the two kinds below move the bytes.

    Attributes:
        via: The peer id of the relay; "" for a direct connection.
        allowance: How many bytes may come in all; None once a member is admitted.
        sent: Bytes written, handshake and encryption included.
        received: Bytes read, likewise.
        heard_at: When the last byte came, trio's clock.
    """

    def __init__(self, *, via: str = "", allowance: int | None = None) -> None:
        self.via = via
        self.allowance = allowance
        self.sent = 0
        self.received = 0
        self.heard_at = trio.current_time()

    @property
    def local_host(self) -> str:
        """Our IP address on this connection; "" for a circuit, and once it is gone."""
        return ""

    @property
    def remote_host(self) -> str:
        """The peer's IP address on this connection; "" likewise."""
        return ""

    @property
    def remote(self) -> str:
        """The peer's address, ``/ip4|ip6/HOST/tcp/PORT``; "" likewise."""
        return ""

    async def read(self, n: int) -> bytes:
        """Read exactly ``n`` bytes, fewer only at the end of the connection."""
        held = memoryview(bytearray(n))
        position = 0
        while position < n and (count := await self.read_into(held[position:])):
            position += count
        return bytes(held[:position])

    async def read_into(self, room: memoryview) -> int:
        """Read some bytes into ``room``; 0 at the end of the connection.

        Raises:
            PeerUnreachable: The connection broke.
            RemoteProtocolError: A stranger sent more than it may.
        """
        count = await self._receive(room)
        self.received += count
        self.heard_at = trio.current_time()
        if self.allowance is not None and self.received > self.allowance:
            raise RemoteProtocolError("a stranger sent more than it may")
        return count

    async def write(self, data: Buffer) -> None:
        """Write all of ``data``; if it is cancelled, the connection has to end.

        Raises:
            PeerUnreachable: The connection broke.
        """
        await self._send(data)
        self.sent += len(data)

    @abstractmethod
    def abort(self) -> None:
        """End the connection now."""

    @abstractmethod
    async def _receive(self, room: memoryview) -> int:
        """Wait for some bytes."""

    @abstractmethod
    async def _send(self, data: Buffer) -> None:
        """Write all of them."""


class TcpWire(Wire):
    """A TCP connection; trio keeps what waits in the kernel unsent under 16 KiB."""

    def __init__(self, stream: trio.SocketStream, allowance: int | None = None) -> None:
        super().__init__(allowance=allowance)
        self._stream = stream

    @property
    def local_host(self) -> str:
        """Our IP address on this connection; "" once it is gone."""
        return _end_of(self._stream.socket.getsockname)[0]

    @property
    def remote_host(self) -> str:
        """The peer's IP address on this connection; "" once it is gone."""
        return _end_of(self._stream.socket.getpeername)[0]

    @property
    def remote(self) -> str:
        """The peer's address; "" once it is gone."""
        host, port = _end_of(self._stream.socket.getpeername)
        return f"/ip{6 if ':' in host else 4}/{host}/tcp/{port}" if host else ""

    def abort(self) -> None:
        """Close the socket; whoever reads or writes is woken."""
        self._stream.socket.close()

    async def _receive(self, room: memoryview) -> int:
        try:
            return await self._stream.socket.recv_into(room)
        except (OSError, trio.ClosedResourceError) as broken:
            raise PeerUnreachable("the connection broke", str(broken)) from broken

    async def _send(self, data: Buffer) -> None:
        try:
            await self._stream.send_all(memoryview(data))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as broken:
            raise PeerUnreachable("the connection broke", str(broken)) from broken


class RelayedWire(Wire):
    """A circuit: a stream of our link to a relay, which passes the bytes on."""

    def __init__(self, stream: _Duplex, *, via: str, allowance: int | None = None) -> None:
        super().__init__(via=via, allowance=allowance)
        self._stream = stream
        self._held: Buffer = b""

    def abort(self) -> None:
        """Reset the stream."""
        self._stream.discard()

    async def _receive(self, room: memoryview) -> int:
        if not self._held:
            self._held = await self._stream.read(len(room))
        count = min(len(room), len(self._held))
        room[:count] = self._held[:count]
        self._held = memoryview(self._held)[count:]
        return count

    async def _send(self, data: Buffer) -> None:
        await self._stream.write(data)


def _end_of(name: Callable[[], tuple[Any, ...]]) -> tuple[str, int]:
    try:
        host, port = name()[:2]
    except (OSError, trio.ClosedResourceError):
        return "", 0
    return str(host).removeprefix("::ffff:"), int(port)  # IPv4 on a socket for both families
