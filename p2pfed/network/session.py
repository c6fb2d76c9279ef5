"""A session: what the node sees of one member, whichever link carries it.

From ``PeerConnected`` to ``PeerDisconnected`` there are two queues and one writing link: short
frames (*urgent*) never wait behind long ones (*bulk*). When both ends dial at once both keep the
link dialled by the greater peer id, and a direct one rather than a circuit. A link that arrives
long after ours was made means that the peer has lost ours: the new one wins.

Invariants: events alternate (connected, frames, disconnected), and a connection which ended before
the node heard of it is never told; the queues are bounded by bytes and by count; frames of a lane
keep their order; a frame leaves its queue only when it has been written whole, so a change of links
may repeat one frame of each.

Not here: reading (``serving``), writing (``speaking``), dialling (``dialling``), connections
(``link``).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import trio

from p2pfed.network.events import (
    NetworkEvent,
    PeerConnected,
    PeerDisconnected,
    PeerStats,
    VersionsDiffer,
)
from p2pfed.network.pace import Pace

if TYPE_CHECKING:
    from p2pfed.network.limits import Limits
    from p2pfed.network.link import Link

__all__ = ["Lane", "Session"]


class Lane(Enum):
    """Which of a peer's two streams a frame takes."""

    URGENT = "urgent"
    BULK = "bulk"


@dataclass(slots=True)
class _Queue:
    frames: deque[bytes] = field(default_factory=deque)
    size: int = 0
    wake: trio.Event = field(default_factory=trio.Event)


class Session:
    """One member; the owner looks at :meth:`claim_news` after each change.

    Attributes:
        link: The link that carries our frames, or None.
        links: Every link to the peer, that one included.
        announced: Set while the node knows that the peer is connected.
        gone: Set when ``link`` became None.
        redial: Set when dialling should not wait any longer.
        reading: How fast the peer's frames are taken, whatever stream they come on.
        has_left: It said goodbye, so it is dialled seldom.
        is_unlike: The last connection showed that the peer speaks no version of ours.
    """

    def __init__(self, peer: str, us: str, limits: Limits) -> None:
        self.peer = peer
        self.link: Link | None = None
        self.links: set[Link] = set()
        self.announced = trio.Event()
        self.gone = trio.Event()
        self.redial = trio.Event()
        self.has_left = False
        self.is_unlike = False
        self._unlike_links = 0
        self.reading = Pace(limits.frames_per_second, credit=1.0)
        self.addresses: tuple[str, ...] = ()
        self.dialling: trio.CancelScope | None = None
        self._us = us
        self._limits = limits
        self._queues = {lane: _Queue() for lane in Lane}
        self._since = 0.0
        self._news: deque[tuple[NetworkEvent, trio.Event | None]] = deque()
        self._telling = False
        self._sent = self._received = self._breaches = 0

    # -- frames --------------------------------------------------------------------------------

    def put(self, frame: bytes) -> bool:
        """Queue a frame; False when not connected or full."""
        lane = Lane.URGENT if len(frame) <= self._limits.urgent_bytes else Lane.BULK
        queue = self._queues[lane]
        if (
            self.link is None
            or len(queue.frames) >= self._limits.queue_frames
            or queue.size + len(frame) > self._limits.queue_bytes
        ):
            return False
        queue.frames.append(frame)
        queue.size += len(frame)
        queue.wake.set()
        return True

    async def next_frame(self, link: Link, lane: Lane) -> bytes | None:
        """Return a lane's oldest frame, which stays queued; None once ``link`` is replaced."""
        queue = self._queues[lane]
        while self.link is link:
            if queue.frames:
                return queue.frames[0]
            queue.wake = trio.Event()
            await queue.wake.wait()
        return None

    def written(self, link: Link, lane: Lane) -> None:
        """Take a lane's oldest frame off, if ``link`` still is the one that writes."""
        if self.link is link:
            queue = self._queues[lane]
            queue.size -= len(queue.frames.popleft())

    # -- links ---------------------------------------------------------------------------------

    def adopt(self, link: Link) -> bool:
        """Make ``link`` carry our frames, unless it is the one that both ends give up."""
        if self._is_doubled(link):
            return False
        before, self.link = self.link, link
        self.has_left = False
        self.is_unlike, self._unlike_links = False, 0
        self._wake_writers()
        if before is not None and before.version != link.version:
            self._part()  # what waits was written for a peer of another version
            before = None
        if before is None:
            self._since = trio.current_time()
            self._news.append((PeerConnected(self.peer, link.version), self.announced))
        return True

    def release(self, link: Link) -> None:
        """Settle what an ended link leaves behind."""
        self.links.discard(link)
        self._sent += link.sent
        self._received += link.received
        self._breaches += link.broke_protocol
        if self.link is not link:
            self._consider_versions(link)
            return
        self.link = None
        self._wake_writers()
        self._part()
        self.gone.set()

    def _consider_versions(self, link: Link) -> None:
        """Whether a link ended because there was no version to talk in.

        A peer of the first release hangs up as soon as its only proposal is refused, often before
        it has refused ours; that may be chance once.
        """
        if link.version or link.heard or not (link.nothing_common or link.proposed):
            return
        self._unlike_links += 1
        if self.link is None and (link.nothing_common or self._unlike_links > 1):
            self.is_unlike = True
            self._news.append((VersionsDiffer(self.peer, tuple(sorted(link.proposed))), None))

    def _part(self) -> None:
        """Forget what waits; the node hears of it unless it has not heard of the connection."""
        for queue in self._queues.values():
            queue.frames.clear()
            queue.size = 0
        if self._news and isinstance(self._news[-1][0], PeerConnected):
            self._news.pop()
        else:
            self._news.append((PeerDisconnected(self.peer), None))
            self.announced = trio.Event()

    def _wake_writers(self) -> None:
        """The former link's writers stop."""
        for queue in self._queues.values():
            queue.wake.set()

    def _is_doubled(self, new: Link) -> bool:
        held = self.link
        if held is None:
            return False
        is_late = new.opened_at - held.opened_at > 2 * self._limits.dial_seconds
        if held.is_relayed != new.is_relayed:
            return new.is_relayed and not is_late
        if held.inbound == new.inbound or is_late:
            return False
        dialler = self.peer if new.inbound else self._us
        return dialler != max(self.peer, self._us)

    # -- telling the node ----------------------------------------------------------------------

    def claim_news(self) -> bool:
        """Say whether there are events to tell; who is told True must run :meth:`tell`."""
        if not self._news or self._telling:
            return False
        self._telling = True
        return True

    async def tell(self, channel: trio.MemorySendChannel[NetworkEvent]) -> None:
        """Send the events in order."""
        while self._news:
            event, announced = self._news.popleft()
            await channel.send(event)
            if announced is not None:
                announced.set()
        self._telling = False

    def stats(self) -> PeerStats:
        """Return the figures up to now."""
        link = self.link
        return PeerStats(
            bytes_sent=self._sent + sum(each.sent for each in self.links),
            bytes_received=self._received + sum(each.received for each in self.links),
            connected_since=None if link is None else self._since,
            direction=None if link is None else "inbound" if link.inbound else "outbound",
            via="" if link is None else link.wire.via,
            rtt=None if link is None else link.rtt,
            breaches=self._breaches,
        )
