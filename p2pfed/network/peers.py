"""The peer table: who is connected, who is dialled, and the conversation on each link.

A peer counts as connected once it has let us open our gossip stream, which a peer that does not
know us never does. Of two links to one peer, the session picks the one that carries our frames;
the other is read for ``grace_seconds`` more, so that nothing under way is lost.

Invariants: ``send`` never blocks; a full event channel holds back only the streams it is fed by;
``disconnect`` ends whatever the peer does; every stream of a peer asks the gatekeeper again.

Not here: sockets, handshake and gate (``host``), one peer's queue and events (``session``), what
frames mean and when to send them (the node).
"""

from __future__ import annotations

import functools
import logging
import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from p2pfed.errors import ConfigError, P2PFedError, PeerUnreachable, RemoteProtocolError
from p2pfed.network import multistream
from p2pfed.network.blob import BlobServer, receive_blob
from p2pfed.network.events import FrameReceived, NetworkEvent, NetworkTotals, PeerStats
from p2pfed.network.framing import deadline, read_frame, write_frame
from p2pfed.network.host import ROSTER, Host
from p2pfed.network.limits import Limits
from p2pfed.network.session import Session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from p2pfed.network.host import Gatekeeper
    from p2pfed.network.link import Link, Stream

__all__ = ["PeerNetwork", "open_network"]

logger = logging.getLogger(__name__)

GOSSIP = "/p2pfed/gossip/1"
BLOB = "/p2pfed/blob/1"


class PeerNetwork:
    """Members, connected as far as they can be reached; made by :func:`open_network`.

    Attributes:
        peer_id: Our own id, base58.
        events: What happened; bounded. A consumer that stands still holds back the peers' gossip.
    """

    def __init__(
        self, host: Host, gatekeeper: Gatekeeper, limits: Limits, nursery: trio.Nursery
    ) -> None:
        self.peer_id = host.peer_id
        self._host = host
        self._gate = gatekeeper
        self._limits = limits
        self._blobs = BlobServer(stall=limits.stall_seconds)
        self._nursery = nursery
        self._tell, self.events = trio.open_memory_channel[NetworkEvent](limits.events)
        self._sessions: dict[str, Session] = {}
        self._addresses: list[str] = []

    async def listen(self, addresses: Sequence[str], announce: Sequence[str]) -> None:
        """Start listening; called once, by :func:`open_network`.

        Raises:
            ConfigError: An address is wrong or taken.
        """
        bound = await self._host.listen(addresses, self._carry, self._nursery)
        self._addresses = [*announce, *bound]

    def addresses(self) -> list[str]:
        """Return our full addresses, the announced ones first."""
        return [f"{address}/p2p/{self.peer_id}" for address in self._addresses]

    def send(self, peer: str, frame: bytes) -> bool:
        """Queue a frame; never blocks.

        Returns:
            False when the peer is not connected or its queue is full.

        Raises:
            ValueError: The frame is longer than any peer accepts.
        """
        if len(frame) > self._limits.max_frame:
            raise ValueError(f"{len(frame)} bytes in a frame, limit {self._limits.max_frame}")
        session = self._sessions.get(peer)
        return session is not None and session.put(frame)

    def keep_connected(self, peer: str, addresses: Sequence[str]) -> None:
        """Dial ``peer`` whenever it is not connected, until :meth:`stop_dialling`.

        Args:
            peer: A member; while it is not one, nothing is dialled.
            addresses: Tried in order; replaces what was given before and dials at once.
        """
        if peer == self.peer_id:
            return
        session = self._session(peer)
        session.addresses = tuple(addresses)
        session.redial.set()
        if session.dialling is None:
            session.dialling = trio.CancelScope()
            self._nursery.start_soon(self._dial_for_ever, session, session.dialling)

    def stop_dialling(self, peer: str) -> None:
        """Dial ``peer`` no more; a connection there is stays."""
        session = self._sessions.get(peer)
        if session is not None and session.dialling is not None:
            session.dialling.cancel()
            session.dialling = None

    async def disconnect(self, peer: str) -> None:
        """Close every link to ``peer`` now; a peer that is kept connected is dialled again."""
        session = self._sessions.get(peer)
        links = tuple(session.links) if session is not None else ()
        for link in links:
            link.abort()
        with trio.move_on_after(self._limits.close_seconds):
            for link in links:
                await link.done.wait()

    async def recheck(self) -> None:
        """Close the links of every peer that is no longer a member (after a roster change)."""
        linked = [peer for peer, session in self._sessions.items() if session.links]
        async with trio.open_nursery() as nursery:
            for peer in linked:
                if not self._gate.is_member(peer):
                    nursery.start_soon(self.disconnect, peer)

    async def fetch(self, peer: str, digest: bytes, destination: Path, *, max_bytes: int) -> None:
        """Fetch the file named ``digest`` from ``peer``; goes on where an earlier fetch ended.

        Raises:
            PeerUnreachable: Not connected, cut off, stood still, or the peer does not hold it.
            RemoteProtocolError: Longer than ``max_bytes``, or not the file asked for; the peer is
                disconnected.
            OSError: The disk failed, or is full.
        """
        session = self._sessions.get(peer)
        link = session.link if session is not None else None
        if link is None:
            raise PeerUnreachable(f"{peer} is not connected")
        stream = await link.open(BLOB)
        try:
            await receive_blob(
                stream, digest, destination, max_bytes=max_bytes, stall=self._limits.stall_seconds
            )
        except RemoteProtocolError as breach:
            link.accuse(breach)
            raise
        finally:
            stream.discard()

    def stats(self, peer: str) -> PeerStats:
        """Return the figures of ``peer``; zeros for one never met."""
        return (self._sessions.get(peer) or Session(peer, self.peer_id, self._limits)).stats()

    def totals(self) -> NetworkTotals:
        """Return the figures of all members together."""
        every = [session.stats() for session in self._sessions.values()]
        return NetworkTotals(
            bytes_sent=sum(one.bytes_sent for one in every),
            bytes_received=sum(one.bytes_received for one in every),
            connected=sum(one.direction is not None for one in every),
            breaches=sum(one.breaches for one in every),
            refused=self._host.refused,
        )

    def close(self) -> None:
        """End the event channel; called once, by :func:`open_network`."""
        self._tell.close()

    def _session(self, peer: str) -> Session:
        return self._sessions.setdefault(peer, Session(peer, self.peer_id, self._limits))

    # -- links ---------------------------------------------------------------------------------

    async def _carry(self, link: Link) -> None:
        """Run a link from handshake to end and settle what it leaves behind."""
        await link.run(self._converse)
        session = self._sessions.get(link.peer)
        if session is not None and link in session.links:
            session.release(link)
            self._tell_news(session)

    async def _converse(self, link: Link) -> None:
        """Admit, agree, and write frames until the link is replaced or ends."""
        if link.inbound and not await self._host.admit(link):
            return
        session = self._session(link.peer)
        running = sum(len(each.links) for each in self._sessions.values())
        if len(session.links) >= self._limits.links_per_peer or running >= self._limits.links:
            logger.warning("refused one link too many of peer %s", link.peer)
            return
        session.links.add(link)
        link.spawn(functools.partial(self._accept_streams, session, link))
        if not link.inbound:
            await self._offer_roster(link)
        out = await link.open(GOSSIP)
        link.carried = True
        if session.adopt(link):
            self._tell_news(session)
            while (frame := await session.next_frame(link)) is not None:
                await write_frame(out, frame, stall=self._limits.stall_seconds)
                session.written(link)
        await trio.sleep(self._limits.grace_seconds)

    def _tell_news(self, session: Session) -> None:
        """Tell the node from a task that no link's end cancels."""
        if session.claim_news():
            self._nursery.start_soon(session.tell, self._tell)

    async def _offer_roster(self, link: Link) -> None:
        """Send our roster ahead of everything else, so that a peer behind us can let us in."""
        signed = self._gate.current_roster()
        if signed:
            stream = await link.open(ROSTER, one_way=True)
            await write_frame(stream, signed, stall=self._limits.open_seconds)
            link.spawn(functools.partial(stream.finish, self._limits.open_seconds))

    # -- streams a member opens ----------------------------------------------------------------

    async def _accept_streams(self, session: Session, link: Link) -> None:
        while True:
            stream = await link.accept()
            if link.busy >= self._limits.streams_per_peer:
                stream.discard()
                continue
            link.busy += 1
            link.spawn(functools.partial(self._serve, session, link, stream))

    async def _serve(self, session: Session, link: Link, stream: Stream) -> None:
        """Serve one stream of a member."""
        limits = self._limits
        try:
            with deadline(limits.open_seconds, "agreeing on a protocol"):
                protocol = await multistream.accept(
                    stream, (GOSSIP, ROSTER, BLOB), stall=limits.open_seconds
                )
            if not self._gate.is_member(link.peer):
                link.abort()
            elif protocol == GOSSIP:
                await self._read_frames(session, link, stream)
            elif protocol == ROSTER:
                signed = await read_frame(
                    stream, max_bytes=limits.max_roster, stall=limits.open_seconds
                )
                self._gate.consider_roster(link.peer, signed)
            else:
                find = functools.partial(self._gate.open_blob, link.peer)
                await self._blobs.serve(stream, find)
            await stream.finish(limits.open_seconds)
        finally:
            link.busy -= 1
            stream.discard()

    async def _read_frames(self, session: Session, link: Link, stream: Stream) -> None:
        """Hand the peer's frames to the node, as fast as it takes them; end with the link."""
        limits = self._limits
        try:
            while True:
                frame = await read_frame(
                    stream, max_bytes=limits.max_frame, stall=limits.stall_seconds
                )
                while not session.announced.is_set():
                    await session.announced.wait()
                await self._tell.send(FrameReceived(session.peer, frame))
        except PeerUnreachable:
            link.abort()  # a peer that speaks to us no more is not connected
            raise

    # -- dialling ------------------------------------------------------------------------------

    async def _dial_for_ever(self, session: Session, scope: trio.CancelScope) -> None:
        limits = self._limits
        wait = limits.redial_first
        with scope:
            while True:
                session.redial = trio.Event()
                if await self._dial_once(session):
                    wait = limits.redial_first
                while session.link is not None:
                    session.gone = trio.Event()
                    await session.gone.wait()
                    wait = limits.redial_first
                # Jitter, so that two peers which lose each other do not dial in step.
                with trio.move_on_after(wait * random.uniform(0.5, 1.0)):  # noqa: S311
                    await session.redial.wait()
                wait = min(2 * wait, limits.redial_most)

    async def _dial_once(self, session: Session) -> bool:
        """Try the addresses; say whether one led to a link that lasted."""
        for address in session.addresses:
            if session.link is not None or not self._gate.is_member(session.peer):
                return False
            try:
                link = await self._host.dial(session.peer, address)
            except ConfigError as unusable:
                logger.warning("an address of peer %s is skipped: %s", session.peer, unusable)
            except P2PFedError as failed:
                logger.debug("dialling %s failed: %s", session.peer, failed)
            else:
                self._nursery.start_soon(self._carry, link)
                await link.done.wait()
                if link.carried:
                    return trio.current_time() - link.opened_at > self._limits.redial_most
        return False


@asynccontextmanager
async def open_network(
    *,
    seed: bytes,
    listen: Sequence[str],
    gatekeeper: Gatekeeper,
    announce: Sequence[str] = (),
    limits: Limits | None = None,
) -> AsyncIterator[PeerNetwork]:
    """Run our end of the network for as long as the block runs.

    Args:
        seed: The node's 32-byte Ed25519 seed.
        listen: Addresses like ``/ip4/0.0.0.0/tcp/4001``; none for a node that only dials.
        gatekeeper: The node's answers about membership, rosters and files.
        announce: Addresses under which others reach us, when they differ.
        limits: Bounds; the defaults fit hospitals.

    Yields:
        The network, listening.

    Raises:
        ValueError: The seed is not 32 bytes long.
        ConfigError: A listening address is wrong or taken (inside an ``ExceptionGroup``, like
            every exception of the block: a nursery surrounds it).
    """
    if len(seed) != 32:
        raise ValueError(f"the seed has {len(seed)} bytes instead of 32")
    limits = limits or Limits()
    host = Host(seed=seed, gatekeeper=gatekeeper, limits=limits)
    async with trio.open_nursery() as nursery:
        network = PeerNetwork(host, gatekeeper, limits, nursery)
        try:
            await network.listen(listen, announce)
            yield network
        finally:
            nursery.cancel_scope.cancel()
            network.close()
