"""The host: listening sockets, the handshake, and the gate.

It is assembled from py-libp2p's parts (Noise XX, keys) and not from its swarm: the swarm
gives an inbound connection's slot back only at shutdown, listens with SO_REUSEPORT, refuses for
60 s to dial a peer that was down, resets streams inside a shield which a frozen peer never ends,
and dies of any handler's exception. Only Noise and yamux over TCP exist here; there is no
plaintext, TLS, mplex, QUIC, DHT, mDNS or UPnP to switch off.

Invariant: a peer that is not a member (a *stranger*) gets the Noise handshake, the choice of yamux
and yamux's own control frames, and no byte of any protocol. It may send one roster, on its first
stream, within ``stranger_seconds``; nobody is dialled who is not a member.

Source: libp2p/specs noise/README.md, connections/README.md.
Not here: streams and deadlines of one connection (``link``), who is dialled and when
(``dialling``).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID

from p2pfed.errors import ConfigError, P2PFedError, PeerUnreachable, RemoteProtocolError
from p2pfed.network import multistream
from p2pfed.network.addresses import parse_direct
from p2pfed.network.framing import deadline, read_frame
from p2pfed.network.link import Link
from p2pfed.network.noise import NOISE, Handshake, keep_freed_memory
from p2pfed.network.pace import Pace
from p2pfed.network.wire import RelayedWire, TcpWire
from p2pfed.network.yamux import YAMUX

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from p2pfed.network.addresses import Direct, Networks
    from p2pfed.network.limits import Limits
    from p2pfed.network.link import Stream
    from p2pfed.network.wire import Wire

__all__ = ["ROSTER", "Gatekeeper", "Host"]

logger = logging.getLogger(__name__)

ROSTER = "/p2pfed/roster/1"


class Gatekeeper(Protocol):
    """What the network asks the node; every method answers at once."""

    def is_member(self, peer: str) -> bool:
        """Say whether the newest verified roster lists ``peer``."""

    def current_roster(self) -> bytes:
        """Return the signed roster offered after dialling (``b""``: none)."""

    def consider_roster(self, peer: str, signed: bytes) -> bool:
        """Verify and adopt a newer roster; say whether the roster now held lists ``peer``."""

    def open_blob(self, peer: str, digest: bytes) -> Path | None:
        """Return the file whose BLAKE2b-256 is ``digest``, or None."""


class Host:
    """Our key, our listening sockets, and the way a connection becomes a member's link.

    Args:
        seed: The node's 32-byte Ed25519 seed.
        gatekeeper: The node's answers about membership.
        limits: Bounds.
        allowed: Networks that others may be in; None or empty: any.
        pace: The upload cap; None: no cap.

    Attributes:
        peer_id: Our own id, base58.
        refused: Inbound connections that did not become a member's link.
        pace: The upload cap.
    """

    def __init__(
        self,
        *,
        seed: bytes,
        gatekeeper: Gatekeeper,
        limits: Limits,
        allowed: Networks | None = None,
        pace: Pace | None = None,
    ) -> None:
        # The library logs ordinary churn as errors; what matters is logged here, once.
        for name in ("libp2p", "multiaddr"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        keep_freed_memory()
        keys = create_new_key_pair(seed)
        self.peer_id = str(ID.from_pubkey(keys.public_key))
        self.refused = 0
        self._handshake = Handshake(keys)
        self._allowed = allowed
        self.pace = pace or Pace()
        self._gate = gatekeeper
        self._limits = limits
        self._half_open: dict[Wire, None] = {}

    async def listen(
        self,
        addresses: Sequence[str],
        serve: Callable[[Link], Awaitable[None]],
        nursery: trio.Nursery,
    ) -> list[str]:
        """Listen on ``/ip4|ip6/…/tcp/PORT``; call ``serve`` with every inbound link.

        Returns:
            The addresses bound, with real port numbers.

        Raises:
            ConfigError: An address does not parse or cannot be bound.
        """
        bound = []
        for address in addresses:
            where = parse_direct(address)
            try:
                listeners = await trio.open_tcp_listeners(where.port, host=where.host)
            except OSError as error:
                raise ConfigError(f"cannot listen on {address}", str(error)) from error

            async def receive(tcp: trio.SocketStream) -> None:
                wire = TcpWire(tcp, self._limits.stranger_bytes)
                if self._may_talk_to(wire.remote_host):
                    await self._receive(wire, serve)
                else:
                    self.refused += 1
                    wire.abort()

            nursery.start_soon(trio.serve_listeners, receive, listeners)
            for listener in listeners:
                name = listener.socket.getsockname()
                bound.append(f"/ip{6 if ':' in name[0] else 4}/{name[0]}/tcp/{name[1]}")
        return bound

    async def dial(self, peer: str, address: Direct | str) -> Link:
        """Connect to a member.

        Raises:
            PeerUnreachable: Nobody answered within ``dial_seconds``, or ``peer`` is no member, or
                the address is outside the allowed networks.
            RemoteProtocolError: Somebody else answered.
            ConfigError: The address does not parse or names another peer.
        """
        if not self._gate.is_member(peer):
            raise PeerUnreachable(f"{peer} is not on the roster")
        where = parse_direct(address, peer) if isinstance(address, str) else address
        with deadline(self._limits.dial_seconds, f"dialling {where}"):
            try:
                tcp = await trio.open_tcp_stream(await self._allowed_host(where), where.port)
            except OSError as error:
                raise PeerUnreachable(f"cannot reach {where}", str(error)) from error
            wire = TcpWire(tcp)
            try:
                return await self._upgrade(wire, peer)
            except BaseException:
                wire.abort()
                raise

    async def dial_through(self, circuit: Stream, peer: str, relay: str) -> Link:
        """Shake hands with a member at the other end of a circuit, which is ours from here on.

        Raises:
            PeerUnreachable: Nobody answered in time.
            RemoteProtocolError: Somebody else answered.
        """
        wire = RelayedWire(circuit, via=relay)
        try:
            return await self._upgrade(wire, peer)
        except BaseException:
            wire.abort()
            raise

    async def receive_through(
        self, circuit: Stream, relay: str, serve: Callable[[Link], Awaitable[None]]
    ) -> None:
        """Carry an inbound connection over a circuit, to its end."""
        allowance = self._limits.stranger_bytes
        await self._receive(RelayedWire(circuit, via=relay, allowance=allowance), serve)

    async def admit(self, link: Link) -> bool:
        """Let a member pass, and a stranger whose roster the gatekeeper accepts."""
        if not self._gate.is_member(link.peer):
            try:
                with deadline(self._limits.stranger_seconds, "waiting for a roster"):
                    admitted = await self._hear_stranger(link)
            except P2PFedError as why:
                logger.debug("stranger %s: %s", link.peer, why)
                admitted = False
            if not admitted:
                self.refused += 1
                return False
        link.wire.allowance = None
        self._half_open.pop(link.wire, None)
        return True

    def allow(self, networks: Networks) -> None:
        """Have others in these networks only from now on; none: anywhere."""
        self._allowed = networks

    def may_carry(self, link: Link) -> bool:
        """Whether a link that there is leads to where others may be; a circuit's relay decides."""
        host = link.wire.remote_host
        return not host or self._may_talk_to(host)

    def _may_talk_to(self, host: str) -> bool:
        return not self._allowed or self._allowed.contains(host)

    async def _allowed_host(self, where: Direct) -> str:
        """What to connect to; where there is a fence, what a name stands for is looked up first.

        Raises:
            PeerUnreachable: It is outside the allowed networks.
            OSError: There is no such name.
        """
        if not self._allowed:
            return where.host
        if where.kind in {"ip4", "ip6"}:
            hosts = [where.host]
        else:
            found = await trio.socket.getaddrinfo(
                where.host, where.port, type=trio.socket.SOCK_STREAM
            )
            hosts = [str(address[0]) for *_, address in found]
        for host in hosts:
            if self._may_talk_to(host):
                return host
        raise PeerUnreachable(f"{where} is outside the allowed networks")

    async def _receive(self, wire: Wire, serve: Callable[[Link], Awaitable[None]]) -> None:
        """Carry one inbound connection from accept to its end."""
        self._half_open[wire] = None
        if len(self._half_open) > self._limits.half_open:
            oldest = next(iter(self._half_open))
            del self._half_open[oldest]
            oldest.abort()
        try:
            await serve(await self._upgrade(wire, None))
        except P2PFedError as refused:
            self.refused += 1
            logger.debug("an inbound connection was refused: %s", refused)
        except Exception:  # one connection's fault is not the node's
            logger.exception("an inbound connection failed")
        finally:
            self._half_open.pop(wire, None)
            wire.abort()

    async def _upgrade(self, wire: Wire, peer: str | None) -> Link:
        """Make a socket a link: Noise, then yamux; ``peer`` is who we dialled, None inbound."""
        seconds = self._limits.upgrade_seconds
        with deadline(seconds, "shaking hands"):
            try:
                if peer is None:
                    await multistream.accept(wire, (NOISE,), stall=seconds)
                    channel = await self._handshake.agree(wire, None)
                    await multistream.accept(channel, (YAMUX,), stall=seconds)
                else:
                    await multistream.propose(wire, NOISE, stall=seconds)
                    channel = await self._handshake.agree(wire, peer)
                    await multistream.propose(channel, YAMUX, stall=seconds)
            except P2PFedError:
                raise
            except Exception as broken:  # arbitrary bytes make the library raise anything
                raise RemoteProtocolError(f"the handshake failed: {broken!r}") from broken
        # The bytes of a circuit are paid for by the link that carries it.
        pace = Pace() if wire.via else self.pace
        link = Link(channel, inbound=peer is None, limits=self._limits, pace=pace)
        if link.peer == self.peer_id or (peer is not None and link.peer != peer):
            raise RemoteProtocolError(f"{link.peer} answered in the place of {peer}")
        return link

    async def _hear_stranger(self, link: Link) -> bool:
        """Read the one roster a stranger may send; nothing is written on its stream."""
        stall = self._limits.stranger_seconds
        stream = await link.accept()
        await multistream.accept(stream, (ROSTER,), stall=stall, silent=True)
        signed = await read_frame(stream, max_bytes=self._limits.max_roster, stall=stall)
        admitted = self._gate.consider_roster(link.peer, signed) and self._gate.is_member(link.peer)
        if admitted:
            link.spawn(lambda: stream.finish(stall))
        return admitted
