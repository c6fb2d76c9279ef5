"""A link: one authenticated connection, its streams, and the guarantee that it can end.

A link is one nursery. One task reads and one writes, so nobody else's cancellation touches the
connection: a write that is given up before any of it was sent never was, else its stream is reset.
Ending a link cancels its tasks and closes its wire, neither of which can block, and nothing that
happens in it leaves it.

Invariants: every batch has a deadline; bytes that nobody reads are bounded (``yamux``); an urgent
message waits for at most one batch, which is short where the connection is slow; a silent peer is
found out, and its round-trip time is known.

Not here: the handshake and who may have a link (``host``), what is said over it (``peers``).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from p2pfed.errors import P2PFedError, PeerUnreachable, RemoteProtocolError
from p2pfed.network import multistream
from p2pfed.network.framing import deadline
from p2pfed.network.noise import MAX_PLAINTEXT
from p2pfed.network.yamux import Bounds, Muxer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from p2pfed.network.flow import Flow
    from p2pfed.network.limits import Limits
    from p2pfed.network.noise import Channel
    from p2pfed.network.pace import Pace
    from p2pfed.network.wire import Buffer

__all__ = ["Link", "Stream"]

logger = logging.getLogger(__name__)

_RECORDS = 8  # in one write to the socket, at most: 512 KiB
_SLOW = 0.05  # seconds; a connection that takes longer for a write gets shorter ones


class _Bell:
    """Wakes who waits, and is remembered while nobody does."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def ring(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()
        self._event = trio.Event()


class Stream:
    """One stream of a link; one reader and one writer at a time.

    Attributes:
        link: What it is part of.
    """

    def __init__(self, flow: Flow, link: Link, muxer: Muxer) -> None:
        self.link = link
        self.changed = _Bell()
        self.drained = _Bell()
        self._flow = flow
        self._muxer = muxer

    async def read(self, n: int) -> Buffer:
        """Return 1 to ``n`` bytes, or ``b""`` once the peer has ended the stream.

        Raises:
            PeerUnreachable: The stream was reset, or the connection is gone.
        """
        flow = self._flow
        await trio.lowlevel.checkpoint_if_cancelled()  # before anything is taken
        while not flow.held:
            self._check()
            if flow.is_finished:
                return b""
            await self.changed.wait()
        taken = self._muxer.take(flow, n)
        self.link.flush()
        return taken

    async def write(self, data: Buffer) -> None:
        """Write all of ``data``; if that is cancelled half-way, the stream is reset.

        Raises:
            PeerUnreachable: The stream was reset, or the connection is gone.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check()
        self._muxer.push(self._flow, data)
        self.link.flush()
        try:
            while self._flow.outbox:
                await self.drained.wait()
                self._check()
        finally:
            self._muxer.withdraw(self._flow)
            self.link.flush()

    def end(self) -> None:
        """End our side; what the peer sends can still be read."""
        self._muxer.end(self._flow)
        self.link.flush()

    async def finish(self, seconds: float) -> None:
        """End our side, wait for the peer's end, and forget the stream."""
        try:
            self.end()
            with trio.move_on_after(seconds):
                while await self.read(4096):
                    pass
                while not (self._flow.sent_fin or self._flow.is_reset or self.link.is_over):
                    await self.drained.wait()
        finally:
            self.discard()

    def discard(self) -> None:
        """Reset the stream unless it is over; never blocks."""
        self._muxer.reset(self._flow)
        self.link.flush()

    def _check(self) -> None:
        if self._flow.is_reset:
            raise PeerUnreachable(f"the stream to {self.link.peer} was reset")
        if self.link.is_over:
            raise PeerUnreachable(f"the connection to {self.link.peer} ended")


class Link:
    """One authenticated, multiplexed connection; lives while :meth:`run` runs.

    Attributes:
        peer: Who is at the other end, base58.
        inbound: Whether the peer dialled.
        wire: What it runs over; ``wire.via`` is the relay in between, "" for none.
        opened_at: When, trio's clock.
        rtt: Round-trip time of the last ping, seconds; None before the first.
        settled: Set once it is decided what the link is for, or it has ended.
        unspoken: Protocols that the peer has said it does not speak.
        version: Of the frames that we send; 0 until it is agreed on.
        heard: Of the frames that the peer sends; likewise.
        proposed: Versions that the peer has proposed and we do not speak.
        nothing_common: The peer speaks none of the versions that we have proposed.
        broke_protocol: Whether that is why it ended.
        is_over: Nothing can be read or written any more.
        done: Set then.
    """

    def __init__(self, channel: Channel, *, inbound: bool, limits: Limits, pace: Pace) -> None:
        self.peer = channel.peer
        self.inbound = inbound
        self.opened_at = trio.current_time()
        self.rtt: float | None = None
        self.settled = trio.Event()
        self.unspoken: set[str] = set()
        self.version = self.heard = 0
        self.proposed: set[int] = set()
        self.nothing_common = False
        self.broke_protocol = False
        self.is_over = False
        self.done = trio.Event()
        self._limits = limits
        self._channel = channel
        self.wire = channel.wire
        self._pace = pace
        bounds = Bounds(streams=limits.streams, window=limits.window, memory=limits.unread_bytes)
        self._muxer = Muxer(initiator=not inbound, bounds=bounds)
        self._arrival = _Bell()
        self._output = _Bell()
        self._ping = -1  # the number of the last one
        self._pinged_at: float | None = None  # None once it is answered
        self._nursery: trio.Nursery | None = None

    @property
    def is_relayed(self) -> bool:
        """Whether it runs through a relay."""
        return bool(self.wire.via)

    @property
    def sent(self) -> int:
        """Bytes written to the socket, encryption and handshake included."""
        return self.wire.sent

    @property
    def received(self) -> int:
        """Bytes read from the socket, encryption and handshake included."""
        return self.wire.received

    async def run(self, converse: Callable[[Link], Awaitable[None]]) -> None:
        """Keep the connection up while ``converse`` talks over it; returns when either ends."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for task in (self._read, self._write, self._watch):
                    nursery.start_soon(self._guarded, task, True)
                try:
                    await self._guarded(lambda: converse(self), True)
                finally:
                    self.abort()
        finally:
            self._nursery = None
            self.is_over = True
            self.wire.abort()
            self._arrival.ring()
            for flow in self._muxer.flows:
                _wake(flow)
            self.settled.set()
            self.done.set()

    def spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run ``work`` until it or the link ends; a failure stays within the link."""
        if self._nursery is not None:
            self._nursery.start_soon(self._guarded, work, False)

    def abort(self) -> None:
        """End the connection now; never blocks, whatever the peer does."""
        self.wire.abort()
        nursery, self._nursery = self._nursery, None  # it may close before `run` is back
        if nursery is not None:
            nursery.cancel_scope.cancel()

    def accuse(self, breach: RemoteProtocolError) -> None:
        """Log and count what the peer did, and end the connection."""
        logger.warning("peer %s broke the protocol: %s", self.peer, breach)
        self.broke_protocol = True
        self.abort()

    def flush(self) -> None:
        """There may be something to send."""
        if self._muxer.has_output:
            self._output.ring()

    async def accept(self) -> Stream:
        """Wait for the peer to open a stream.

        Raises:
            PeerUnreachable: The connection ended.
        """
        while not self._muxer.opened:
            if self.is_over:
                raise PeerUnreachable(f"the connection to {self.peer} ended")
            await self._arrival.wait()
        return self._stream(self._muxer.opened.popleft())

    async def open(self, protocol: str, *, one_way: bool = False, urgent: bool = False) -> Stream:
        """Open a stream and, unless ``one_way``, wait for the peer's consent.

        Args:
            protocol: What it is for.
            one_way: Do not wait.
            urgent: What we write goes before everything else on this connection.

        Raises:
            PeerUnreachable: No answer within ``open_seconds``; a peer that does not know us
                gives none.
            RemoteProtocolError: The peer does not speak ``protocol``.
        """
        stream, _ = await self.open_first((protocol,), one_way=one_way, urgent=urgent)
        return stream

    async def open_first(
        self, protocols: Sequence[str], *, one_way: bool = False, urgent: bool = False
    ) -> tuple[Stream, str]:
        """Open a stream for the first of ``protocols`` that the peer speaks; as :meth:`open`.

        Raises:
            PeerUnreachable: No answer within ``open_seconds``.
            NoCommonProtocol: The peer speaks none of them.
        """
        if self.is_over:
            raise PeerUnreachable(f"the connection to {self.peer} ended")
        seconds, agreed = self._limits.open_seconds, protocols[0]
        stream = self._stream(self._muxer.open(urgent=urgent))
        try:
            with deadline(seconds, f"opening {agreed}"):
                if one_way:
                    await multistream.announce(stream, agreed)
                else:
                    agreed = await multistream.propose(stream, *protocols, stall=seconds)
        except BaseException as failed:
            if isinstance(failed, RemoteProtocolError):
                self.unspoken.update(protocols)
            stream.discard()
            raise
        return stream, agreed

    # -- the tasks of the connection -------------------------------------------------------------

    async def _read(self) -> None:
        while records := await self._channel.receive():
            for record in records:
                for flow in self._muxer.receive(record):
                    _wake(flow)
            if self._muxer.opened:
                self._arrival.ring()
            if self._pinged_at is not None and self._muxer.pong == self._ping:
                self.rtt, self._pinged_at = trio.current_time() - self._pinged_at, None
            if self._muxer.is_parting:
                return
            self.flush()

    async def _write(self) -> None:
        records = 1
        while True:
            began = trio.current_time()
            delay = self._pace.delay(began)
            most = max(min(records, self._pace.burst // MAX_PLAINTEXT), 1)
            pieces, drained = self._muxer.batch(int(most), urgent_only=delay > 0)
            if not pieces:
                self._channel.rest()
                with trio.move_on_after(delay or float("inf")):
                    await self._output.wait()
                continue
            sealed = self._channel.seal(pieces)
            for flow in drained:
                flow.owner.drained.ring()
            self._pace.spend(len(sealed), began)
            with deadline(self._limits.stall_seconds, "writing"):
                await self.wire.write(sealed)
            if trio.current_time() - began > _SLOW:
                records = max(records // 2, 1)
            elif len(sealed) > MAX_PLAINTEXT:  # a short write says nothing of the connection
                records = min(2 * records, _RECORDS)

    async def _watch(self) -> None:
        """Ping; end when nothing was heard for ``idle_seconds``."""
        idle = self._limits.idle_seconds
        while trio.current_time() <= self.wire.heard_at + idle:
            if self._pinged_at is None:
                self._pinged_at = trio.current_time()
                self._ping = (self._ping + 1) % 2**32
                self._muxer.ping(self._ping)
                self.flush()
            now = trio.current_time()
            await trio.sleep_until(
                min(now + self._limits.ping_seconds, self.wire.heard_at + idle + 1e-3)
            )
        raise PeerUnreachable(f"nothing heard from the peer for {idle:g} s")

    def _stream(self, flow: Flow) -> Stream:
        flow.owner = stream = Stream(flow, self, self._muxer)
        return stream

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


def _wake(flow: Flow) -> None:
    if flow.owner is not None:
        flow.owner.changed.ring()
        flow.owner.drained.ring()
