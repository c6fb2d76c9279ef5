"""The peer table: which members are connected, and over which links.

A peer counts as connected once it has let us open our gossip stream, which a peer that does not
know us never does. Of two links to one peer, the session picks the one that carries our frames;
the other is read for ``grace_seconds`` more, so that nothing under way is lost.

Invariants: ``send`` never blocks; ``disconnect`` ends whatever the peer does.

Not here: sockets, handshake and gate (``host``), one peer's queues and events (``session``), who is
dialled and how (``dialling``), what is said on a link (``speaking``), what peers ask of us
(``serving``), our addresses (``reach``), what frames mean and when to send them (the node).
"""

from __future__ import annotations

import functools
import logging
import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from p2pfed.errors import PeerUnreachable, RemoteProtocolError
from p2pfed.network.addresses import Networks
from p2pfed.network.blob import receive_blob
from p2pfed.network.dialling import Dialling
from p2pfed.network.events import NetworkEvent, NetworkTotals, PeerStats, Reached
from p2pfed.network.framing import CHUNK
from p2pfed.network.host import Host
from p2pfed.network.limits import Limits
from p2pfed.network.pace import Pace
from p2pfed.network.reach import Reach
from p2pfed.network.relay import RelayService
from p2pfed.network.serving import BLOB, Serving
from p2pfed.network.session import Session
from p2pfed.network.speaking import Speaking
from p2pfed.wire.versions import VERSIONS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from p2pfed.network.host import Gatekeeper
    from p2pfed.network.link import Link
    from p2pfed.network.reservations import Mode

__all__ = ["PeerNetwork", "open_network"]

logger = logging.getLogger(__name__)


class PeerNetwork:
    """Members, connected as far as they can be reached; made by :func:`open_network`.

    Attributes:
        peer_id: Our own id, base58.
        events: What happened; bounded. A consumer that stands still holds back the peers' gossip.
    """

    def __init__(
        self,
        host: Host,
        gatekeeper: Gatekeeper,
        limits: Limits,
        nursery: trio.Nursery,
        *,
        announce: Sequence[str],
        reach: Mode,
        is_relay: bool,
        versions: Sequence[int],
    ) -> None:
        self.peer_id = host.peer_id
        self._host = host
        self._gate = gatekeeper
        self._limits = limits
        self._nursery = nursery
        self._tell, self.events = trio.open_memory_channel[NetworkEvent](limits.events)
        self._sessions: dict[str, Session] = {}
        rng = random.Random()  # noqa: S311 - whom to ask and when, not a secret
        self._reach = Reach(
            host.peer_id,
            announce=announce,
            mode=reach,
            links=self._carrying,
            limits=limits,
            rng=rng,
        )
        self._relay = (
            RelayService(
                host.peer_id,
                is_member=gatekeeper.is_member,
                addresses=self._reach.own_addresses,
            )
            if is_relay
            else None
        )
        bulk_stall = _bulk_stall(host, limits)
        self._speaking = Speaking(gatekeeper, limits, bulk_stall=bulk_stall, versions=versions)
        self._serving = Serving(
            host,
            gatekeeper,
            limits,
            tell=self._tell,
            carry=self._carry,
            reach=self._reach,
            relay=self._relay,
            bulk_stall=bulk_stall,
            versions=versions,
        )
        self._dialling = Dialling(
            host,
            gatekeeper,
            limits,
            begin=functools.partial(nursery.start_soon, self._carry),
            link_to=self._direct_link_to,
            linked=self._reach.possible_relays,
            rng=rng,
        )

    async def start(self, listen: Sequence[str]) -> None:
        """Start listening; called once, by :func:`open_network`.

        Raises:
            ConfigError: An address is wrong or taken.
        """
        self._reach.bind(await self._host.listen(listen, self._carry, self._nursery))
        self._nursery.start_soon(self._reach.keep, self._tell)

    def limit_upload(self, bytes_per_second: float | None) -> None:
        """Cap bulk, all peers together, from now on; None: no cap."""
        self._host.pace.change(bytes_per_second)
        seconds = _bulk_stall(self._host, self._limits)
        self._speaking.allow_stall(seconds)
        self._serving.allow_stall(seconds)

    def allow(self, networks: Sequence[str]) -> None:
        """Have peers in these networks (CIDR) only, or anywhere if there are none.

        Connections with others end.

        Raises:
            ConfigError: One is no network; nothing has changed.
        """
        self._host.allow(Networks(networks))
        for session in self._sessions.values():
            for link in tuple(session.links):
                if not self._host.may_carry(link):
                    link.abort()

    def addresses(self) -> list[str]:
        """Return our full addresses, the announced ones first; they may change."""
        return list(self._reach.addresses())

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

    def keep_connected(
        self, peer: str, addresses: Sequence[str], *, has_left: bool = False
    ) -> None:
        """Dial ``peer`` whenever it is not connected, until :meth:`stop_dialling`.

        Args:
            peer: A member; while it is not one, nothing is dialled.
            addresses: Tried in order; replaces what was given before and dials at once.
            has_left: It goes, and may come back: it is dialled later, and ever more seldom.
        """
        if peer == self.peer_id:
            return
        session = self._session(peer)
        session.addresses, session.has_left = tuple(addresses), has_left
        if not has_left:
            session.redial.set()
        if session.dialling is None:
            session.dialling = trio.CancelScope()
            self._nursery.start_soon(self._dialling.keep, session, session.dialling)

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
        if self._relay is not None:
            self._relay.recheck()
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
        relay = None if self._relay is None else self._relay.stats()
        return NetworkTotals(
            bytes_sent=sum(one.bytes_sent for one in every),
            bytes_received=sum(one.bytes_received for one in every),
            connected=sum(one.direction is not None for one in every),
            breaches=sum(one.breaches for one in every),
            refused=self._host.refused,
            relayed_bytes=0 if relay is None else relay.relayed,
            circuits=0 if relay is None else len(relay.circuits),
        )

    def reached(self) -> Reached:
        """Return how others reach us, as far as we have seen."""
        return self._reach.seen()

    def close(self) -> None:
        """End the event channel; called once, by :func:`open_network`."""
        self._tell.close()

    def _session(self, peer: str) -> Session:
        return self._sessions.setdefault(peer, Session(peer, self.peer_id, self._limits))

    def _carrying(self) -> list[Link]:
        """The links that carry frames."""
        sessions = self._sessions.values()
        return [session.link for session in sessions if session.link is not None]

    def _direct_link_to(self, peer: str) -> Link | None:
        link = self._sessions[peer].link if peer in self._sessions else None
        return None if link is None or link.is_relayed else link

    # -- links ---------------------------------------------------------------------------------

    async def _carry(self, link: Link) -> None:
        """Run a link from handshake to end and settle what it leaves behind."""
        try:
            await link.run(self._converse)
        finally:  # a circuit is cancelled when the link that carries it ends
            session = self._sessions.get(link.peer)
            if session is not None and link in session.links:
                session.release(link)
                self._reach.look()
                self._tell_news(session)

    async def _converse(self, link: Link) -> None:
        """Admit, begin, and speak until the link is replaced or ends."""
        if link.inbound and not await self._host.admit(link):
            return
        if not self._gate.is_member(link.peer):  # no more, since we began to dial it
            return
        session = self._session(link.peer)
        running = sum(len(each.links) for each in self._sessions.values())
        if len(session.links) >= self._limits.links_per_peer or running >= self._limits.links:
            logger.warning("refused one link too many of peer %s", link.peer)
            return
        session.links.add(link)
        link.spawn(functools.partial(self._serving.accept_streams, session, link))
        out = await self._speaking.begin(link)
        if out is None:
            return
        is_ours = session.adopt(link)
        self._reach.look()
        link.settled.set()
        if is_ours:
            self._tell_news(session)
            await self._speaking.write(session, link, out)
        await trio.sleep(self._limits.grace_seconds)

    def _tell_news(self, session: Session) -> None:
        """Tell the node from a task that no link's end cancels."""
        if session.claim_news():
            self._nursery.start_soon(session.tell, self._tell)


def _bulk_stall(host: Host, limits: Limits) -> float:
    """Our own cap, which all peers share, is not a peer that takes nothing."""
    return limits.stall_seconds + host.pace.seconds(limits.links * CHUNK)


@asynccontextmanager
async def open_network(
    *,
    seed: bytes,
    listen: Sequence[str],
    gatekeeper: Gatekeeper,
    announce: Sequence[str] = (),
    reach: Mode = "auto",
    relay: bool = False,
    allowed_networks: Sequence[str] = (),
    upload_bytes_per_second: float | None = None,
    limits: Limits | None = None,
    versions: Sequence[int] = VERSIONS,
) -> AsyncIterator[PeerNetwork]:
    """Run our end of the network for as long as the block runs.

    Args:
        seed: The node's 32-byte Ed25519 seed.
        listen: Addresses like ``/ip4/0.0.0.0/tcp/4001``; none for a node that only dials.
        gatekeeper: The node's answers about membership, rosters and files.
        announce: Addresses under which others reach us, when they differ.
        reach: When to be reached through relays too: ``auto`` while nobody has reached us directly.
        relay: Whether to lead members to those that can only dial out.
        allowed_networks: Networks (CIDR) that others may be in; empty: any.
        upload_bytes_per_second: A cap on bulk, all peers together.
        limits: Bounds; the defaults fit hospitals.
        versions: Of the wire, that are spoken; fewer than all of this release for tests only.

    Yields:
        The network, listening.

    Raises:
        ValueError: The seed is not 32 bytes long.
        ConfigError: A network or a listening address is wrong, or one is taken (the latter inside
            an ``ExceptionGroup``, like every exception of the block: a nursery surrounds it).
    """
    if len(seed) != 32:
        raise ValueError(f"the seed has {len(seed)} bytes instead of 32")
    limits = limits or Limits()
    host = Host(
        seed=seed,
        gatekeeper=gatekeeper,
        limits=limits,
        allowed=Networks(allowed_networks),
        pace=Pace(upload_bytes_per_second),
    )
    async with trio.open_nursery() as nursery:
        network = PeerNetwork(
            host,
            gatekeeper,
            limits,
            nursery,
            announce=announce,
            reach=reach,
            is_relay=relay,
            versions=versions,
        )
        try:
            await network.start(listen)
            yield network
        finally:
            nursery.cancel_scope.cancel()
            network.close()
