"""yamux as a state machine without I/O: records in, records out, and every bound held.

The library's own muxer was not kept: it polls a closed window, gives a write up after 5 s, takes
the death of a peer for a clean end, only logs a breach of flow control, and bounds no memory. This
one speaks the same ``/yamux/1.0.0``. `Link` moves the bytes and waits; nothing waits here.

Invariants:
* Bytes received and not yet read, and bytes that the peer may still send, are together at most
  ``Bounds.memory`` for the whole connection, whatever the peer does, and so is (up to a small
  factor) the memory that holds them: small pieces are copied together.
* A stream ends cleanly only by the peer's FIN; everything else is a reset.
* Frames are no longer than the window, stream ids have the opener's parity and only grow, and what
  comes on a stream that we reset is counted against what was still under way. A breach ends the
  connection.
* Our urgent streams go first; the others take turns, one record each.
* What we must answer is bounded: who asks and does not read is cut off.

Source: hashicorp/yamux spec.md; libp2p/specs yamux/README.md.
Not here: one stream's windows (``flow``), encryption (``noise``), tasks and deadlines (``link``).
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2pfed.errors import PeerUnreachable, RemoteProtocolError
from p2pfed.network.flow import INITIAL_WINDOW, Flow
from p2pfed.network.noise import MAX_PLAINTEXT

if TYPE_CHECKING:
    from p2pfed.network.wire import Buffer

__all__ = ["YAMUX", "Bounds", "Muxer"]

YAMUX = "/yamux/1.0.0"
_HEADER = struct.Struct("!BBHII")
_DATA, _WINDOW, _PING, _GO_AWAY = range(4)
_SYN, _ACK, _FIN, _RST = 1, 2, 4, 8
_MAX_CREDIT = 2**32 - 1
_MAX_ID = 2**32 - 1
# A frame fills a Noise record exactly, so that no record holds a stray tail.
_MAX_BODY = MAX_PLAINTEXT - _HEADER.size


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one connection may hold.

    Attributes:
        streams: Open at a time, of each side.
        window: A stream's largest receive window, bytes; it grows to it while its reader keeps up.
        memory: All windows together, bytes; ``2 * streams * 256 KiB``, which are kept for streams
            not opened yet, and what windows may grow by.
        answers: Frames that wait to be sent because the peer asked for something.
    """

    streams: int = 24
    window: int = 4 * 1024 * 1024
    memory: int = 24 * 1024 * 1024
    answers: int = 512

    def __post_init__(self) -> None:
        if self.memory < 2 * self.streams * INITIAL_WINDOW:
            raise ValueError(f"{self.memory} bytes are too few for {self.streams} streams each way")


class Muxer:
    """One connection's streams.

    Args:
        initiator: Whether we dialled; the dialler's streams have odd numbers.
        bounds: What it may hold.

    Attributes:
        opened: Streams that the peer opened and nobody has fetched.
        is_parting: The peer has said that it goes.
        pong: The number of the last ping that was answered.
    """

    def __init__(self, *, initiator: bool, bounds: Bounds | None = None) -> None:
        self.opened: deque[Flow] = deque()
        self.is_parting = False
        self.pong = -1
        self._bounds = bounds or Bounds()
        self._flows: dict[int, Flow] = {}
        self._next_id = 1 if initiator else 2
        self._last_id = 0 if initiator else -1  # the peer's newest: even ids if we dialled
        self._num_theirs = 0
        held = self._bounds
        self._free = held.memory - 2 * held.streams * INITIAL_WINDOW  # by so much windows may grow
        self._stray = 0  # bytes that may still come on streams that we reset
        self._control: deque[bytes] = deque()
        self._answers = 0  # of those, how many the peer made us send
        self._ready: tuple[deque[Flow], deque[Flow]] = (deque(), deque())  # urgent, others
        self._head = bytearray()  # of a header that came in part
        self._left = 0  # of a body that came in part
        self._reading: Flow | None = None  # whose body that is
        self._fin_follows = False  # the stream ends with that body

    # -- our side --------------------------------------------------------------------------------

    @property
    def has_output(self) -> bool:
        """Whether :meth:`batch` would return something."""
        return self.has_urgent or bool(self._ready[1])

    @property
    def has_urgent(self) -> bool:
        """Whether it would, of what goes first."""
        return bool(self._control or self._ready[0])

    @property
    def flows(self) -> list[Flow]:
        """Streams that are open."""
        return list(self._flows.values())

    def open(self, *, urgent: bool = False) -> Flow:
        """Open a stream.

        Raises:
            PeerUnreachable: There are too many, or the peer is going.
        """
        ours = len(self._flows) - self._num_theirs
        if self.is_parting or ours >= self._bounds.streams or self._next_id > _MAX_ID:
            raise PeerUnreachable("no further stream can be opened on this connection")
        flow = Flow(self._next_id, urgent=urgent)
        self._next_id += 2
        self._add(flow)
        self._say(_WINDOW, _SYN, flow.id, 0)
        return flow

    def push(self, flow: Flow, data: Buffer) -> None:
        """Send ``data``, which must not change while it is in ``flow.outbox``; one at a time.

        Raises:
            PeerUnreachable: The stream has ended.
        """
        if flow.is_reset or flow.is_ending:
            raise PeerUnreachable("the stream has ended")
        flow.push(data)
        self._enlist(flow)

    def withdraw(self, flow: Flow) -> None:
        """A push is given up: as if it had never been if none of it was sent, else a reset."""
        if flow.outbox and flow.begun:
            self.reset(flow)
        flow.withdraw()
        self._enlist(flow)  # its end may be due now

    def take(self, flow: Flow, n: int) -> Buffer:
        """Take 1 to ``n`` of the ``held`` bytes; lets the peer send more when it is time to."""
        taken = flow.take(n)
        growth, window = flow.grant(self._bounds.window, self._free)
        self._free -= growth
        if window:
            self._say(_WINDOW, 0, flow.id, window)
        self._forget_if_over(flow)
        return taken

    def end(self, flow: Flow) -> None:
        """Say FIN once everything pushed is sent."""
        if not (flow.is_reset or flow.is_ending):
            flow.is_ending = True
            self._enlist(flow)

    def reset(self, flow: Flow) -> None:
        """End a stream at once; what waits in either direction is dropped."""
        if self._flows.get(flow.id) is flow:
            self._stray += flow.window
            self._say(_WINDOW, _RST, flow.id, 0)
            self._drop(flow)

    def ping(self, number: int) -> None:
        """Ask the peer to answer; ``pong`` will be the number."""
        self._say(_PING, _SYN, 0, number)

    def part(self) -> None:
        """Say that we go."""
        self._say(_GO_AWAY, 0, 0, 0)

    def batch(
        self, records: int, *, urgent_only: bool = False
    ) -> tuple[list[tuple[bytes, Buffer]], list[Flow]]:
        """Take what is to be sent next.

        Args:
            records: At most so many records.
            urgent_only: Nothing of the other streams.

        Returns:
            (head, body) of each record, and the streams whose ``outbox`` became empty; both empty
            when there is nothing to send.
        """
        pieces: list[tuple[bytes, Buffer]] = []
        drained: list[Flow] = []
        if self._control:
            most = MAX_PLAINTEXT // _HEADER.size
            count = min(len(self._control), most)
            pieces.append((b"".join(self._control.popleft() for _ in range(count)), b""))
            self._answers = min(self._answers, len(self._control))
        for ready in self._ready[:1] if urgent_only else self._ready:
            while ready and len(pieces) < records:
                flow = ready.popleft()
                if not flow.may_send:
                    continue  # what it had to send was withdrawn
                pieces.append(self._emit(flow))
                if flow.may_send:
                    ready.append(flow)
                if not flow.outbox:
                    drained.append(flow)
        return pieces, drained

    # -- their side ------------------------------------------------------------------------------

    def receive(self, record: bytearray) -> list[Flow]:
        """Take in what came.

        Args:
            record: Decrypted bytes, whole frames or not; must not change afterwards.

        Returns:
            The streams of which something changed: bytes, an end, a reset, leave to send.

        Raises:
            RemoteProtocolError: The peer broke the protocol; the connection has to end.
        """
        changed: list[Flow] = []
        view, position, end = memoryview(record), 0, len(record)
        while position < end:
            if self._left:
                piece = view[position : position + self._left]
                position += len(piece)
                self._left -= len(piece)
                self._keep(piece, end, changed)
            elif self._head or end - position < _HEADER.size:
                missing = _HEADER.size - len(self._head)
                self._head += view[position : position + missing]
                position += missing
                if len(self._head) == _HEADER.size:
                    header = bytes(self._head)
                    self._head.clear()
                    self._frame(header, 0, changed)
            else:
                self._frame(view, position, changed)
                position += _HEADER.size
        return changed

    def _frame(self, data: Buffer, position: int, changed: list[Flow]) -> None:
        version, kind, flags, number, length = _HEADER.unpack_from(data, position)
        if version or kind > _GO_AWAY or flags > (_SYN | _ACK | _FIN | _RST):
            raise RemoteProtocolError(f"a yamux header of version {version}, type {kind}")
        if (kind <= _WINDOW) != (number != 0):
            raise RemoteProtocolError(f"yamux type {kind} on stream {number}")
        if kind == _PING:
            self._pinged(flags, length)
        elif kind == _GO_AWAY:
            self.is_parting = True
        else:
            self._stream_frame(kind, flags, number, length, changed)

    def _pinged(self, flags: int, number: int) -> None:
        if flags & _SYN:
            self._answer(_PING, _ACK, 0, number)
        elif flags & _ACK:
            self.pong = number

    def _stream_frame(
        self, kind: int, flags: int, number: int, length: int, changed: list[Flow]
    ) -> None:
        flow = self._flows.get(number)
        if flags & _SYN:
            flow = self._opened_by_peer(number)
        if kind == _DATA:
            self._begin_body(flow, number, length)
        elif flow is None:
            self._check_past(number)
        elif length:
            flow.credit += length
            if flow.credit > _MAX_CREDIT:
                raise RemoteProtocolError(f"stream {number}: a window of more than 4 GiB")
            self._enlist(flow)
            changed.append(flow)
        if flow is None:
            return
        if flags & _RST:
            self._drop(flow)
            changed.append(flow)
        elif flags & _FIN:
            self._fin_follows = self._left > 0
            if not self._fin_follows:
                self._finish(flow, changed)

    def _opened_by_peer(self, number: int) -> Flow | None:
        if number % 2 == self._next_id % 2 or number <= self._last_id:
            raise RemoteProtocolError(f"the peer opened stream {number} out of turn")
        self._last_id = number
        if self._num_theirs >= self._bounds.streams or self.is_parting:
            self._stray += INITIAL_WINDOW
            self._answer(_WINDOW, _RST, number, 0)
            return None
        flow = Flow(number, urgent=False)
        self._num_theirs += 1
        self._add(flow)
        self.opened.append(flow)
        self._answer(_WINDOW, _ACK, number, 0)
        return flow

    def _begin_body(self, flow: Flow | None, number: int, length: int) -> None:
        if flow is None:
            self._check_past(number)
            self._stray -= length
            if self._stray < 0:
                raise RemoteProtocolError("data on a stream that is over")
        else:
            flow.expect(length)
            if flow.window < 0 or (flow.is_finished and length):
                raise RemoteProtocolError(f"stream {number}: data beyond the window or the end")
        self._left, self._reading, self._fin_follows = length, flow, False

    def _keep(self, piece: memoryview, record: int, changed: list[Flow]) -> None:
        flow = self._reading
        if flow is None or flow.is_reset:
            return  # what came was counted with the header
        flow.keep(piece, record)
        changed.append(flow)
        if self._fin_follows and not self._left:
            self._fin_follows = False
            self._finish(flow, changed)

    def _finish(self, flow: Flow, changed: list[Flow]) -> None:
        flow.is_finished = True
        self._forget_if_over(flow)
        changed.append(flow)

    def _check_past(self, number: int) -> None:
        newest = self._next_id - 2 if number % 2 == self._next_id % 2 else self._last_id
        if number > newest:
            raise RemoteProtocolError(f"a frame of stream {number}, which was never opened")

    # -- both ------------------------------------------------------------------------------------

    def _enlist(self, flow: Flow) -> None:
        ready = self._ready[0 if flow.urgent else 1]
        if flow.may_send and flow not in ready:
            ready.append(flow)

    def _emit(self, flow: Flow) -> tuple[bytes, Buffer]:
        """One record of this stream's data, or its FIN."""
        if flow.outbox:
            data = flow.emit(_MAX_BODY)
            return _HEADER.pack(0, _DATA, 0, flow.id, len(data)), data
        flow.sent_fin = True
        self._forget_if_over(flow)
        return _HEADER.pack(0, _WINDOW, _FIN, flow.id, 0), b""

    def _add(self, flow: Flow) -> None:
        self._flows[flow.id] = flow

    def _drop(self, flow: Flow) -> None:
        flow.drop()
        # Whoever opens and resets, again and again, must not fill `opened`.
        for waiting in (*self._ready, self.opened):
            if flow in waiting:
                waiting.remove(flow)
        self._forget(flow)

    def _forget_if_over(self, flow: Flow) -> None:
        if flow.is_over:
            self._forget(flow)

    def _forget(self, flow: Flow) -> None:
        if self._flows.pop(flow.id, None) is not None:
            self._free += flow.share - INITIAL_WINDOW
            if flow.id % 2 != self._next_id % 2:
                self._num_theirs -= 1

    def _say(self, kind: int, flags: int, number: int, length: int) -> None:
        self._control.append(_HEADER.pack(0, kind, flags, number, length))

    def _answer(self, kind: int, flags: int, number: int, length: int) -> None:
        self._answers += 1
        if self._answers > self._bounds.answers:
            raise RemoteProtocolError("the peer asks on and on and reads no answer")
        self._say(kind, flags, number, length)
