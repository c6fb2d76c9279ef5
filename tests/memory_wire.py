"""Two ends of a connection in memory: for links and records without a socket, on a virtual clock.

`wires` makes the two ends; what one writes the other reads, in order, in pieces of at most `piece`
bytes, and no more than `room` bytes are under way, as with a socket's buffers. `channels` puts the
record layer over it, with keys that nobody had to agree on.
"""

from __future__ import annotations

import trio

from p2pfed.errors import PeerUnreachable
from p2pfed.network.noise import Channel, Opener, Sealer
from p2pfed.network.wire import Wire

KEYS = (b"k" * 32, b"l" * 32)
NAMES = ("dialler", "listener")
_STEP = 8192  # bytes that arrive together


class _Way:
    """One direction."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.held = bytearray()
        self.ended = False
        self._event = trio.Event()

    def ring(self) -> None:
        self._event.set()
        self._event = trio.Event()

    async def change(self) -> None:
        await self._event.wait()


class MemoryWire(Wire):
    """One end.

    Attributes:
        piece: Most bytes that one read brings.
        is_stuck: The other end takes nothing off any more, as one whose process is frozen.
        rate: Bytes a second that a write takes; 0: it takes no time.
        writes: The lengths of what was written.
    """

    def __init__(self, incoming: _Way, outgoing: _Way) -> None:
        super().__init__()
        self.piece = 1 << 30
        self.is_stuck = False
        self.rate = 0.0
        self.writes: list[int] = []
        self._in, self._out = incoming, outgoing

    def abort(self) -> None:
        for way in (self._in, self._out):
            way.ended = True
            way.ring()

    async def _receive(self, room: memoryview) -> int:
        await trio.lowlevel.checkpoint()
        while not self._in.held:
            if self._in.ended:
                return 0
            await self._in.change()
        count = min(len(room), self.piece, len(self._in.held))
        room[:count] = self._in.held[:count]
        del self._in.held[:count]
        self._in.ring()
        return count

    async def _send(self, data) -> None:
        self.writes.append(len(data))
        view = memoryview(bytes(data))  # the sealer's buffer is used again
        await trio.lowlevel.checkpoint()
        for start in range(0, len(view), _STEP):
            step = view[start : start + _STEP]
            if self.rate:
                await trio.sleep(len(step) / self.rate)
            await self._put(step)

    async def _put(self, view: memoryview) -> None:
        while view:
            if self._out.ended:
                raise PeerUnreachable("the connection broke")
            room = 0 if self.is_stuck else self._out.room - len(self._out.held)
            self._out.held += view[:room]
            view = view[room:]
            self._out.ring()
            if view:
                await self._out.change()


def wires(room: int = 1 << 30) -> tuple[MemoryWire, MemoryWire]:
    """Make the two ends of one connection."""
    there, back = _Way(room), _Way(room)
    return MemoryWire(back, there), MemoryWire(there, back)


def channels(room: int = 1 << 30) -> tuple[Channel, Channel]:
    """Make both ends of one encrypted connection, the dialler's first."""
    one, other = wires(room)
    return (
        Channel(one, NAMES[1], Sealer(KEYS[0]), Opener(KEYS[1])),
        Channel(other, NAMES[0], Sealer(KEYS[1]), Opener(KEYS[0])),
    )
