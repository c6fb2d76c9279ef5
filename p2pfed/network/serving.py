"""What members may open on a link, and how each of it is served.

Gossip (frames for the node), rosters and files are ours; identify and ping are there for standard
clients; *hop* is served where this node is a relay, *stop* where it is reached through one.

Invariants: every stream asks the gatekeeper again; a peer has at most `_MOST` streams of a kind on
a link, so that it cannot have more frames under way than the bounds say; its frames are taken at a
bounded rate, and a full event channel holds back only the streams it is fed by.

Not here: what frames mean (the node), who is admitted (``host``), what we open ourselves
(``speaking``, ``reach``, ``dialling``).
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import TYPE_CHECKING

import trio

from p2pfed.errors import PeerUnreachable
from p2pfed.network import multistream
from p2pfed.network.blob import BlobServer
from p2pfed.network.circuit import HOP, STOP, accept_stop
from p2pfed.network.events import FrameReceived
from p2pfed.network.framing import deadline, read_frame
from p2pfed.network.host import ROSTER
from p2pfed.network.identify import IDENTIFY, identify_message, serve_identify
from p2pfed.network.ping import PING, serve_ping
from p2pfed.wire.versions import VERSIONS, gossip_protocol, version_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from p2pfed.network.events import NetworkEvent
    from p2pfed.network.host import Gatekeeper, Host
    from p2pfed.network.limits import Limits
    from p2pfed.network.link import Link, Stream
    from p2pfed.network.reach import Reach
    from p2pfed.network.relay import RelayService
    from p2pfed.network.session import Session

__all__ = ["BLOB", "Serving"]

GOSSIP = "gossip"  # of whatever version
BLOB = "/p2pfed/blob/1"
# Streams of a kind on one link. Gossip: urgent and bulk. Files: a fetch that was given up is
# noticed with the next write. Circuits: see RelayLimits.
_MOST = {GOSSIP: 2, ROSTER: 1, BLOB: 16, IDENTIFY: 2, PING: 2, HOP: 32, STOP: 32}


class Serving:
    """See the module docstring.

    Args:
        host: Shakes hands on circuits that reach us.
        gatekeeper: The node's answers about members, rosters and files.
        limits: Bounds.
        tell: Where the node hears of frames.
        carry: Runs a link that came through a circuit.
        reach: Knows which relays may bring us circuits.
        relay: Serves hops; None where this node is no relay.
        bulk_stall: Seconds that a step of a file may take; None: ``stall_seconds``.
        versions: Of the gossip, that we speak.

    Attributes:
        protocols: What members may open here.
    """

    def __init__(
        self,
        host: Host,
        gatekeeper: Gatekeeper,
        limits: Limits,
        *,
        tell: trio.MemorySendChannel[NetworkEvent],
        carry: Callable[[Link], Awaitable[None]],
        reach: Reach,
        relay: RelayService | None,
        bulk_stall: float | None = None,
        versions: Sequence[int] = VERSIONS,
    ) -> None:
        self._host = host
        self._gate = gatekeeper
        self._limits = limits
        self._tell = tell
        self._carry = carry
        self._reach = reach
        self._relay = relay
        self._blobs = BlobServer(stall=bulk_stall or limits.stall_seconds)
        self.protocols = [gossip_protocol(version) for version in versions]
        self.protocols += [k for k in _MOST if k != GOSSIP and (k != HOP or relay is not None)]

    def allow_stall(self, seconds: float) -> None:
        """Have a step of a file take so long at most, from the next file on."""
        self._blobs.stall = seconds

    async def accept_streams(self, session: Session, link: Link) -> None:
        """Serve whatever the member opens, until the link ends."""
        kinds: Counter[str] = Counter()
        while True:
            stream = await link.accept()
            link.spawn(functools.partial(self._serve, session, link, stream, kinds))

    async def _serve(
        self, session: Session, link: Link, stream: Stream, kinds: Counter[str]
    ) -> None:
        seconds = self._limits.open_seconds
        try:
            with deadline(seconds, "agreeing on a protocol"):
                protocol = await multistream.accept(
                    stream,
                    self.protocols,
                    stall=seconds,
                    refused=functools.partial(_remember_version, link),
                )
            version = version_of(protocol)
            kind = protocol if version is None else GOSSIP
            if not self._gate.is_member(link.peer):
                link.abort()
            elif kinds[kind] < _MOST[kind]:
                kinds[kind] += 1
                try:
                    if version is not None:
                        link.heard = version
                        await self._read_frames(session, link, stream, version)
                    else:
                        await self._serve_kind(kind, link, stream)
                    await stream.finish(seconds)
                finally:
                    kinds[kind] -= 1
        finally:
            stream.discard()

    async def _serve_kind(self, kind: str, link: Link, stream: Stream) -> None:
        limits = self._limits
        if kind == ROSTER:
            signed = await read_frame(
                stream, max_bytes=limits.max_roster, stall=limits.open_seconds
            )
            self._gate.consider_roster(link.peer, signed)
        elif kind == BLOB:
            find = functools.partial(self._gate.open_blob, link.peer)
            await self._blobs.serve(stream, find)
        elif kind == IDENTIFY:
            answer = identify_message(
                self._host.peer_id,
                listen=self._reach.addresses(),
                protocols=self.protocols,
                observed=link.wire.remote,
            )
            await serve_identify(stream, answer, stall=limits.open_seconds)
        elif kind == PING:
            await serve_ping(stream, stall=limits.stall_seconds)
        elif kind == HOP and self._relay is not None:
            await self._relay.serve_hop(link, stream)
        elif kind == STOP:
            await self._serve_stop(link, stream)

    async def _serve_stop(self, link: Link, stream: Stream) -> None:
        """A relay brings a circuit; it is a connection like any other from here on."""
        if link.is_relayed:
            raise PeerUnreachable(f"{link.peer} brings a circuit inside a circuit")
        if not self._reach.holds(link.peer):
            raise PeerUnreachable(f"{link.peer} brings a circuit and is no relay of ours")
        await accept_stop(stream, admits=self._gate.is_member, seconds=self._limits.open_seconds)
        await self._host.receive_through(stream, link.peer, self._carry)

    async def _read_frames(
        self, session: Session, link: Link, stream: Stream, version: int
    ) -> None:
        """Hand the peer's frames to the node, as fast as it takes them; end with the link."""
        limits = self._limits
        try:
            while True:
                frame = await read_frame(
                    stream, max_bytes=limits.max_frame, stall=limits.stall_seconds
                )
                while not session.announced.is_set():
                    await session.announced.wait()
                await self._tell.send(FrameReceived(session.peer, frame, version))
                now = trio.current_time()
                session.reading.spend(1, now)  # who sends faster is read more slowly
                await trio.sleep(session.reading.delay(now))
        except PeerUnreachable:
            link.abort()  # a peer that speaks to us no more is not connected
            raise


def _remember_version(link: Link, protocol: str) -> None:
    """What the peer proposes and we refuse tells which versions it speaks."""
    version = version_of(protocol)
    if version is not None and len(link.proposed) < multistream.MAX_PROPOSALS:
        link.proposed.add(version)
