"""A TCP proxy with faults: latency, jitter, rate, black holes, stalls, resets, bit flips. No root.

Map: `open_proxy` listens and carries every connection to the target through two `Way`s, one for
each direction, which a test changes while bytes are on their way; `TcpProxy.reset` ends all
connections by RST. A `Way` carries between any two trio streams, so that a virtual clock and
streams in memory do as well.

Invariants: bytes keep their order and none is lost, as with TCP: what a black hole holds back
arrives after it has healed, unless the connection ended before. A way reads at most `WINDOW` pieces
ahead; then the sender feels it. Chance comes from a seed.

Not here: the proxy ends TCP on both sides, so a lost segment, retransmission and the kernel's
timers can only be had with `netlab`.
"""

from __future__ import annotations

import math
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

__all__ = ["TcpProxy", "Way", "open_proxy"]

WINDOW = 256  # pieces under way; a sender that is further ahead has to wait
PIECE = 16_384  # bytes at most
_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


class Way:
    """One direction; every attribute may be changed at any time.

    Args:
        seed: Fixes the jitter and the flipped bits.

    Attributes:
        latency: Seconds from one side to the other.
        jitter: Up to so many seconds more, evenly.
        rate: Bytes a second; None: no limit.
        flips: Share of the bytes of which one bit is flipped.
        carried: Bytes that came out at the other side.
    """

    def __init__(self, seed: int = 0) -> None:
        self.latency = 0.0
        self.jitter = 0.0
        self.rate: float | None = None
        self.flips = 0.0
        self.carried = 0
        self._rng = random.Random(seed)
        self._shut_until = float("-inf")
        self._healed = trio.Event()

    def black_hole(self) -> None:
        """Deliver nothing more, and tell nobody, until `heal`."""
        self._shut(float("inf"))

    def stall(self, seconds: float) -> None:
        """Deliver nothing for so long, as while a lost segment is sent again."""
        self._shut(trio.current_time() + seconds)

    def _shut(self, until: float) -> None:
        self._shut_until = max(self._shut_until, until)
        if self._healed.is_set():
            self._healed = trio.Event()

    def heal(self) -> None:
        """Deliver again, beginning with what was held back."""
        self._shut_until = float("-inf")
        self._healed.set()

    async def carry(
        self, source: trio.abc.ReceiveStream, sink: trio.abc.HalfCloseableStream
    ) -> None:
        """Carry all bytes and then the end from one stream to the other.

        Raises:
            trio.BrokenResourceError: Either side is gone.
        """
        arrivals, departures = trio.open_memory_channel[tuple[float, bytes]](WINDOW)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take, source, arrivals)
            nursery.start_soon(self._deliver, departures, sink)

    async def _take(
        self, source: trio.abc.ReceiveStream, arrivals: trio.MemorySendChannel[tuple[float, bytes]]
    ) -> None:
        sent = due = trio.current_time()
        async with arrivals:
            while piece := await source.receive_some(PIECE):
                sent = max(sent, trio.current_time())
                if self.rate is not None:
                    sent += len(piece) / self.rate
                due = max(due, sent + self.latency + self.jitter * self._rng.random())
                await arrivals.send((due, piece))

    async def _deliver(
        self,
        departures: trio.MemoryReceiveChannel[tuple[float, bytes]],
        sink: trio.abc.HalfCloseableStream,
    ) -> None:
        async for due, piece in departures:
            await trio.sleep_until(due)
            await self._passable()
            self.carried += len(piece)
            await sink.send_all(self._flipped(piece))
        await trio.sleep(self.latency)  # the end takes as long as a byte
        await self._passable()
        await sink.send_eof()

    async def _passable(self) -> None:
        while trio.current_time() < self._shut_until:
            with trio.move_on_at(self._shut_until):
                await self._healed.wait()

    def _flipped(self, piece: bytes) -> bytes:
        if not self.flips:
            return piece
        changed, at = bytearray(piece), self._gap()
        while at < len(changed):
            changed[at] ^= 1 << self._rng.randrange(8)
            at += 1 + self._gap()
        return bytes(changed)

    def _gap(self) -> int:
        """How many bytes stay whole before the next that does not: geometric."""
        if self.flips >= 1:
            return 0
        return int(math.log1p(-self._rng.random()) / math.log1p(-self.flips))


class TcpProxy:
    """One listening port before one target; made by `open_proxy`.

    Attributes:
        port: Where it listens, on 127.0.0.1.
        up: The way to the target.
        down: The way back.
    """

    def __init__(self, port: int, seed: int) -> None:
        self.port = port
        self.up, self.down = Way(2 * seed), Way(2 * seed + 1)
        self._connections: dict[trio.CancelScope, tuple[trio.SocketStream, trio.SocketStream]] = {}

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._connections)

    def black_hole(self) -> None:
        """Deliver nothing either way, also on new connections, which are accepted."""
        self.up.black_hole()
        self.down.black_hole()

    def heal(self) -> None:
        """Deliver again."""
        self.up.heal()
        self.down.heal()

    def reset(self) -> None:
        """End all connections by RST to both sides; new ones are served."""
        for scope, ends in self._connections.items():
            for end in ends:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            scope.cancel()

    async def serve(self, near: trio.SocketStream, host: str, port: int) -> None:
        """Carry one connection until both of its ways have ended, or one is broken."""
        async with near:
            try:
                far = await trio.open_tcp_stream(host, port)
            except OSError:
                return  # the target does not listen
            with trio.CancelScope() as scope:
                self._connections[scope] = near, far
                try:
                    async with far, trio.open_nursery() as nursery:
                        nursery.start_soon(self.up.carry, near, far)
                        nursery.start_soon(self.down.carry, far, near)
                finally:
                    del self._connections[scope]


@asynccontextmanager
async def open_proxy(host: str, port: int, *, seed: int = 0) -> AsyncIterator[TcpProxy]:
    """Listen on a free port of 127.0.0.1 and carry everything to a target.

    Args:
        host: The target.
        port: The target's port.
        seed: Fixes jitter and flipped bits.
    """
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    proxy = TcpProxy(listener.socket.getsockname()[1], seed)

    async def serve(near: trio.SocketStream) -> None:
        try:
            await proxy.serve(near, host, port)
        except* _GONE:
            pass  # as a cable, a proxy does not mind who hangs up

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        try:
            yield proxy
        finally:
            nursery.cancel_scope.cancel()
