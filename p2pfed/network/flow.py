"""A flow: one yamux stream's state, its two windows and what waits on either side. No I/O.

Invariants: ``window + awaited + held <= share``; what came is held in memory of at most a small
factor of its bytes, however small the pieces are; nothing is emitted beyond the peer's window.

Not here: frames, numbers and the bounds of the whole connection (``yamux``), waiting (``link``).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2pfed.network.wire import Buffer

__all__ = ["INITIAL_WINDOW", "Flow"]

INITIAL_WINDOW = 256 * 1024  # both sides start a stream with it; fixed by the protocol
_SMALL = 4096  # shorter pieces are copied together rather than kept one by one
_JOINED = 16 * 1024  # ... up to this length
_NOTHING = memoryview(b"")


@dataclass(slots=True, eq=False)
class Flow:
    """See the module docstring; only the muxer changes it.

    Attributes:
        id: Its number.
        urgent: Whether it goes before the others.
        inbox: What came and was not taken, in pieces.
        held: Bytes in ``inbox``.
        outbox: What was pushed and not yet emitted.
        begun: Some of what was pushed has been emitted.
        share: Our window with all that counts against it: ``window``, ``awaited``, ``held``, and
            what was taken and not granted again.
        window: Bytes that the peer may still send.
        awaited: Bytes of a frame whose header has come and which have not.
        credit: Bytes that we may still send.
        is_ending: We send nothing after ``outbox`` but FIN.
        sent_fin: That is sent.
        is_finished: The peer will send no more.
        is_reset: Ended by either side before its time.
        owner: Whoever waits for it; not looked at here.
    """

    id: int
    urgent: bool = False
    inbox: deque[Buffer] = field(default_factory=deque)
    held: int = 0
    outbox: memoryview = _NOTHING
    begun: bool = False
    share: int = INITIAL_WINDOW
    window: int = INITIAL_WINDOW
    awaited: int = 0
    credit: int = INITIAL_WINDOW
    is_ending: bool = False
    sent_fin: bool = False
    is_finished: bool = False
    is_reset: bool = False
    owner: Any = None

    @property
    def may_send(self) -> bool:
        """Whether :meth:`emit` or the FIN is due."""
        if self.outbox:
            return self.credit > 0
        return self.is_ending and not (self.sent_fin or self.is_reset)

    @property
    def is_over(self) -> bool:
        """Whether both sides have ended and nothing waits to be read."""
        return self.is_finished and self.sent_fin and not self.held

    def push(self, data: Buffer) -> None:
        """Have ``data`` emitted; it must not change meanwhile."""
        assert not self.outbox
        self.outbox, self.begun = memoryview(data), False

    def emit(self, most: int) -> memoryview:
        """Take up to ``most`` of the bytes to be sent."""
        data = self.outbox[: min(self.credit, most)]
        self.credit -= len(data)
        self.outbox, self.begun = self.outbox[len(data) :], True
        return data

    def withdraw(self) -> None:
        """Emit nothing more of what was pushed."""
        self.outbox = _NOTHING

    def expect(self, count: int) -> None:
        """A frame of so many bytes begins."""
        self.window -= count
        self.awaited += count

    def keep(self, piece: memoryview, record: int) -> None:
        """Take in what came of it, a part of a record of so many bytes."""
        self.awaited -= len(piece)
        self.held += len(piece)
        last = self.inbox[-1] if self.inbox else None
        if len(piece) >= _SMALL and 2 * len(piece) >= record:
            self.inbox.append(piece)  # keeps the record alive, which is at most twice as long
        elif isinstance(last, bytearray) and len(last) < _JOINED:
            last += piece
        else:
            self.inbox.append(bytearray(piece))

    def take(self, n: int) -> Buffer:
        """Hand out 1 to ``n`` of the ``held`` bytes."""
        first = self.inbox[0]
        if len(first) <= n:
            taken: Buffer = self.inbox.popleft()
        else:
            view = memoryview(first)
            taken, self.inbox[0] = view[:n], view[n:]
        self.held -= len(taken)
        return taken

    def grant(self, largest: int, free: int) -> tuple[int, int]:
        """Let the peer send more once half the share was taken, and more at a time from then on.

        Args:
            largest: The share never grows beyond it.
            free: By so much it may grow.

        Returns:
            By how much the share grew, and the window; (0, 0) while it is too early.
        """
        taken = self.share - self.window - self.awaited - self.held
        if 2 * taken < self.share or self.is_finished or self.is_reset:
            return 0, 0
        growth = max(0, min(self.share, largest - self.share, free))
        self.share += growth
        self.window += taken + growth
        return growth, taken + growth

    def drop(self) -> None:
        """Reset: nothing is emitted or handed out any more."""
        self.is_reset = True
        self.inbox.clear()
        self.held, self.outbox = 0, _NOTHING
