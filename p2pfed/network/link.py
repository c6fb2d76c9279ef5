"""A link: one authenticated connection, its yamux streams, and the guarantee that it can end.

A link is one nursery. Ending it cancels its tasks and closes its socket, neither of which can
block, and nothing that happens in it leaves it. This is the one module that reaches into
py-libp2p 0.8.1's internals (yamux's frame writer, stream table and events).

Invariants: every write has a deadline, and a write is never cancelled (half a Noise record would
ruin the connection): it ends, or its socket is closed. Bytes that nobody reads are bounded, also
when the peer ignores flow control, which stock yamux only logs. A silent peer is found out.

Source: hashicorp/yamux spec.md.
Not here: the handshake and who may have a link (``host``), what is said over it (``peers``).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.stream_muxer.exceptions import MuxedStreamEOF
from libp2p.stream_muxer.yamux.yamux import Yamux

from p2pfed.errors import P2PFedError, PeerUnreachable, RemoteProtocolError
from p2pfed.network import multistream
from p2pfed.network.framing import deadline

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from libp2p.abc import ISecureConn
    from libp2p.stream_muxer.yamux.yamux import YamuxStream

    from p2pfed.network.limits import Limits

__all__ = ["Link", "Stream", "Wire"]

logger = logging.getLogger(__name__)


class Wire(TrioTCPStream):
    """The socket: counted, bounded before admission, and closed without waiting."""

    def __init__(self, stream: trio.SocketStream, allowance: int | None) -> None:
        super().__init__(stream)
        self.allowance = allowance
        self.unread: Callable[[], int] | None = None
        self.unread_limit = 0
        self.sent = 0
        self.received = 0
        self.heard_at = trio.current_time()

    async def write(self, data: bytes) -> None:
        """Write all of ``data``."""
        await super().write(data)
        self.sent += len(data)

    async def read(self, n: int | None = None) -> bytes:
        """Read all ``n`` bytes (the library's own loop gives up after 100 small segments)."""
        held = bytearray()
        while not held or (n is not None and len(held) < n):
            piece = await super().read(None if n is None else n - len(held))
            if not piece:
                break
            held += piece
            self.received += len(piece)
            self.heard_at = trio.current_time()
        if self.allowance is not None and self.received > self.allowance:
            raise ConnectionClosedError("a stranger sent more than it may")
        if self.unread is not None and self.unread() > self.unread_limit:
            raise ConnectionClosedError("the peer ignores flow control")
        return bytes(held)

    def abort(self) -> None:
        """Close the socket now; whoever reads or writes is woken."""
        self.stream.socket.close()


class _SteadyYamux(Yamux):
    """Stock yamux whose every frame is written whole, or ends the connection."""

    wire: Wire
    stall: float

    async def _write_frame(self, data: bytes) -> None:
        with trio.move_on_after(self.stall) as scope:
            scope.shield = True
            await super()._write_frame(data)
        if scope.cancelled_caught:
            self.wire.abort()
            raise ConnectionClosedError(f"no byte was taken for {self.stall:g} s")

    def end_streams(self) -> None:
        """Wake whoever still reads or writes; the library does so only after a broken read."""
        self.event_shutting_down.set()
        for stream in self.streams.values():
            stream.closed = stream.send_closed = stream.recv_closed = True
        for event in self.stream_events.values():
            event.set()


class Stream:
    """One stream of a link; every failure of the library becomes :class:`PeerUnreachable`."""

    def __init__(self, raw: YamuxStream, link: Link) -> None:
        self._raw = raw
        self._link = link

    async def read(self, n: int) -> bytes:
        """Return 1 to ``n`` bytes, or ``b""`` at the end (which proves nothing)."""
        try:
            return await self._raw.read(n)
        except MuxedStreamEOF:
            return b""
        except Exception as broken:  # the library raises whatever it happens to meet
            raise PeerUnreachable(f"reading from {self._link.peer} failed") from broken

    async def write(self, data: bytes) -> None:
        """Write all of ``data``."""
        try:
            await self._raw.write(data)
        except Exception as broken:  # as above
            raise PeerUnreachable(f"writing to {self._link.peer} failed") from broken

    async def finish(self, seconds: float) -> None:
        """End our side, wait for the peer's end, and forget the stream."""
        try:
            await self._raw.close()
            with trio.move_on_after(seconds):
                while await self.read(4096):
                    pass
        finally:
            self.discard()

    async def refuse(self) -> None:
        """Reset the stream before anybody has looked at it."""
        await self._raw.reset()

    def discard(self) -> None:
        """Reset the stream in the background."""
        if not self._raw.closed:
            self._link.spawn(self._raw.reset)


class Link:
    """One authenticated, multiplexed connection; lives while :meth:`run` runs."""

    def __init__(self, wire: Wire, secure: ISecureConn, *, inbound: bool, limits: Limits) -> None:
        self.peer = str(secure.get_remote_peer())
        self.inbound = inbound
        self.opened_at = trio.current_time()
        self.carried = False  # set once the peer has let us open a stream
        self.broke_protocol = False
        self.busy = 0  # streams being served
        self.done = trio.Event()
        self._limits = limits
        self._wire = wire
        self._nursery: trio.Nursery | None = None
        self._yamux = _SteadyYamux(secure, secure.get_remote_peer(), is_initiator=not inbound)
        self._yamux.wire = wire
        self._yamux.stall = limits.stall_seconds
        wire.unread = lambda: sum(map(len, self._yamux.stream_buffers.values()))
        wire.unread_limit = limits.unread_bytes

    @property
    def sent(self) -> int:
        """Bytes written to the socket, encryption and handshake included."""
        return self._wire.sent

    @property
    def received(self) -> int:
        """Bytes read from the socket, encryption and handshake included."""
        return self._wire.received

    async def run(self, converse: Callable[[Link], Awaitable[None]]) -> None:
        """Keep the connection up while ``converse`` talks over it; returns when either ends."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._guarded, self._yamux.start, True)
                nursery.start_soon(self._guarded, self._watch_silence, True)
                try:
                    await self._yamux.event_started.wait()
                    await self._guarded(lambda: converse(self), True)
                finally:
                    self.abort()
        finally:
            self._nursery = None
            self._yamux.end_streams()
            self.done.set()

    def spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run ``work`` until it or the link ends; a failure stays within the link."""
        if self._nursery is not None:
            self._nursery.start_soon(self._guarded, work, False)

    def abort(self) -> None:
        """End the connection now; never blocks, whatever the peer does."""
        self._wire.abort()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    def accuse(self, breach: RemoteProtocolError) -> None:
        """Log and count what the peer did, and end the connection."""
        logger.warning("peer %s broke the protocol: %s", self.peer, breach)
        self.broke_protocol = True
        self.abort()

    def admit(self) -> Wire:
        """Lift the bound on what a stranger may send; returns the socket it was set on."""
        self._wire.allowance = None
        return self._wire

    async def accept(self) -> Stream:
        """Wait for the peer to open a stream."""
        try:
            raw = await self._yamux.accept_stream()
        except Exception as broken:  # as in Stream.read
            raise PeerUnreachable(f"the connection to {self.peer} ended") from broken
        return Stream(raw, self)  # type: ignore[arg-type]  # yamux makes no other streams

    async def open(self, protocol: str, *, one_way: bool = False) -> Stream:
        """Open a stream and, unless ``one_way``, wait for the peer's consent.

        Raises:
            PeerUnreachable: No answer within ``open_seconds``; a peer that does not know us
                gives none.
            RemoteProtocolError: The peer does not speak ``protocol``.
        """
        with deadline(self._limits.open_seconds, f"opening {protocol}"):
            try:
                raw = await self._yamux.open_stream()
            except Exception as broken:  # as in Stream.read
                raise PeerUnreachable(f"no stream to {self.peer}") from broken
            stream = Stream(raw, self)
            try:
                if one_way:
                    await multistream.announce(stream, protocol)
                else:
                    await multistream.propose(stream, protocol, stall=self._limits.open_seconds)
            except BaseException:
                stream.discard()
                raise
        return stream

    async def _watch_silence(self) -> None:
        """End when nothing was heard for ``idle_seconds``; a live peer's yamux pings."""
        idle = self._limits.idle_seconds
        while trio.current_time() < self._wire.heard_at + idle:  # noqa: ASYNC110  # re-armed
            await trio.sleep_until(self._wire.heard_at + idle)
        raise PeerUnreachable(f"nothing heard from the peer for {idle:g} s")

    async def _guarded(self, work: Callable[[], Awaitable[None]], vital: bool) -> None:
        """Contain a task of this link: whatever it raises ends at most the link, never the node."""
        try:
            await work()
        except RemoteProtocolError as breach:
            self.accuse(breach)
        except P2PFedError as ended:
            logger.debug("peer %s: %s", self.peer, ended)
        except Exception:
            vital = True
            logger.exception("a task of the link to %s failed", self.peer)
        if vital:
            self.abort()
