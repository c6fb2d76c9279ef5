"""Streams and links in memory, with windows, half-close, resets and death; time is virtual."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import trio

from p2pfed.errors import PeerError, PeerUnreachable
from p2pfed.identity.keys import peer_id_of

IDS = {name: peer_id_of(name.encode() * 32) for name in "abcdr"}
WINDOW = 256 * 1024


def member(number: int) -> str:
    """The peer id of one of many."""
    return peer_id_of(number.to_bytes(32, "big"))


class _Way:
    """One direction: at most ``window`` bytes wait in it."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.held = bytearray()
        self.taken = 0
        self.ended = False
        self.reset = False
        self._bell = trio.Event()

    def ring(self) -> None:
        self._bell.set()
        self._bell = trio.Event()

    async def change(self) -> None:
        await self._bell.wait()


class FakeStream:
    """One end of a stream, as a link's stream behaves."""

    def __init__(self, incoming: _Way, outgoing: _Way) -> None:
        self._in, self._out = incoming, outgoing
        self.largest_read = 0

    @property
    def unread(self) -> int:
        return len(self._in.held)

    async def read(self, n: int) -> bytes:
        await trio.lowlevel.checkpoint()
        self.largest_read = max(self.largest_read, n)
        while not self._in.held:
            if self._in.reset:
                raise PeerUnreachable("the stream was reset")
            if self._in.ended:
                return b""
            await self._in.change()
        taken = bytes(self._in.held[:n])
        del self._in.held[:n]
        self._in.taken += len(taken)
        self._in.ring()
        return taken

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        view = memoryview(data)
        while view:
            if self._out.reset or self._out.ended:
                raise PeerUnreachable("the stream was reset")
            room = self._out.window - len(self._out.held)
            self._out.held += view[:room]
            view = view[room:]
            self._out.ring()
            if view:
                await self._out.change()

    def end(self) -> None:
        self._out.ended = True
        self._out.ring()

    async def finish(self, seconds: float) -> None:
        self.end()
        with trio.move_on_after(seconds):
            while await self.read(4096):
                pass
        self.discard()

    def discard(self) -> None:
        if self._in.ended and self._out.ended:
            return
        for way in (self._in, self._out):
            way.reset = True
            way.held.clear()
            way.ring()


def stream_pair(window: int = WINDOW) -> tuple[FakeStream, FakeStream]:
    there, back = _Way(window), _Way(window)
    return FakeStream(back, there), FakeStream(there, back)


@dataclass
class FakeWire:
    via: str = ""


class FakeLink:
    """The relay's end of a link; what the relay opens comes out of ``opened``."""

    def __init__(self, peer: str, *, via: str = "", window: int = WINDOW) -> None:
        self.peer = peer
        self.wire = FakeWire(via)
        self.done = trio.Event()
        self.window = window
        self.streams: list[FakeStream] = []
        self.num_opened = 0
        self.is_deaf = False
        self._send, self.opened = trio.open_memory_channel[tuple[str, FakeStream]](100)

    async def open(self, protocol: str) -> FakeStream:
        await trio.lowlevel.checkpoint()
        if self.done.is_set():
            raise PeerUnreachable("the connection ended")
        if self.is_deaf:
            await trio.sleep_forever()
        self.num_opened += 1
        ours = self.stream_to()
        self._send.send_nowait((protocol, self.streams[-1]))
        return ours

    def stream_to(self) -> FakeStream:
        """Make a stream; the far end is the last of ``streams``."""
        ours, theirs = stream_pair(self.window)
        self.streams += [ours, theirs]
        return ours

    def die(self) -> None:
        """What the end of a connection does: its streams are reset."""
        self.done.set()
        for stream in self.streams:
            for way in (stream._in, stream._out):
                way.reset = True
                way.held.clear()
                way.ring()


async def contained(work, *args) -> None:
    """Run a task as a link does: a peer's failure stays within it."""
    with contextlib.suppress(PeerError):
        await work(*args)
