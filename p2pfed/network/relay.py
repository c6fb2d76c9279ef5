"""The relay: a member that leads others to members which can only dial out. Runs where configured.

A reservation is a member's leave to be reached over the link it was asked on, and lives as long as
that link, at most an hour. A circuit is two streams, one on each end's link, and two pumps between
them; the ends shake hands through it, so what passes is ciphertext.

Invariants: both ends are members, at every moment; a circuit never runs over a link that is itself
one. A direction holds at most ``CHUNK`` bytes and reads no more before they are taken: who is slow
holds back who sends, not our memory. Every count is bounded by :class:`RelayLimits`, and a place is
taken before the first wait. A circuit ends with either link, with ``idle_seconds`` without a byte
(a live one is never that silent: the ends' own pings pass through it), and with ``recheck``.

Source: libp2p/specs relay/circuit-v2.md. An end that closes its side only (half-close) is passed
on. Not here: messages and the ends (``circuit``), whom a hospital asks (``reservations``).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import trio

from p2pfed.errors import ConfigError, PeerError, RemoteProtocolError
from p2pfed.network.addresses import pack, parse_direct
from p2pfed.network.circuit import (
    MAX_ADDRESSES,
    STOP,
    Answer,
    Connect,
    Limit,
    Reserve,
    Status,
    encode_hop,
    encode_stop,
    read_hop,
    read_stop,
    write_message,
)
from p2pfed.network.framing import ByteStream, deadline

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["CHUNK", "CircuitStats", "RelayLimits", "RelayLink", "RelayService", "RelayStats"]
__all__ += ["RelayStream", "RelayWire"]

logger = logging.getLogger(__name__)

CHUNK = 64 * 1024  # a Noise record; larger pieces gain nothing
_RECHECK = 5.0  # seconds within which a circuit notices that an end is no member any more


class RelayStream(ByteStream, Protocol):
    """What a relay needs of a stream."""

    def end(self) -> None:
        """End our side, at once or a second time; what the peer sends can still be read."""

    async def finish(self, seconds: float) -> None:
        """End our side, wait for the peer's end, and forget the stream."""

    def discard(self) -> None:
        """Reset the stream unless it is over; never blocks."""


class RelayWire(Protocol):
    """What a relay needs to know of what a link runs over."""

    @property
    def via(self) -> str:
        """The peer id of the relay in between; "" for a direct connection."""


class RelayLink(Protocol):
    """What a relay needs of a link."""

    @property
    def peer(self) -> str:
        """Who is at the other end, base58."""

    @property
    def wire(self) -> RelayWire:
        """What it runs over."""

    @property
    def done(self) -> trio.Event:
        """Set when the link has ended."""

    async def open(self, protocol: str) -> RelayStream:
        """Open a stream and agree on ``protocol``."""


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """Bounds of a relay; seconds, counts and bytes."""

    reservations: int = 64  # a committee, all but its relays behind firewalls
    reservation_seconds: int = 3600  # the specification's example, go-libp2p's default
    circuits: int = 64
    # Both ends dialling at once, and the same again while a dead circuit is not yet noticed.
    circuits_per_pair: int = 4
    circuits_per_source: int = 16
    streams_per_peer: int = 32  # every circuit a source may have, and as many being refused
    message_seconds: float = 10.0
    open_seconds: float = 10.0  # for the target's consent
    idle_seconds: float = 30.0
    circuit_seconds: int = 0  # 0: as long as it is used
    circuit_bytes: int = 0  # in each direction; 0: as many as there are


@dataclass(frozen=True, slots=True)
class CircuitStats:
    """One circuit: its ends, and the bytes passed in both directions together."""

    source: str
    target: str
    relayed: int


@dataclass(frozen=True, slots=True)
class RelayStats:
    """The relay's figures: what is held now, and bytes and refused requests since its start."""

    reservations: int
    circuits: tuple[CircuitStats, ...]
    relayed: int
    refused: int


@dataclass(slots=True)
class _Held:
    link: RelayLink
    expires_at: float

    def holds(self) -> bool:
        return not self.link.done.is_set() and trio.current_time() < self.expires_at


class _Circuit:
    """Two links, the scope in which everything between them runs, and what has passed."""

    def __init__(self, source: RelayLink, target: RelayLink) -> None:
        self.source = source
        self.target = target
        self.scope = trio.CancelScope()
        self.moved_at = trio.current_time()
        self.relayed = 0
        self.is_up = False

    def peers(self) -> tuple[str, str]:
        return self.source.peer, self.target.peer


class RelayService:
    """The hop: grants reservations and joins streams to circuits.

    Args:
        us: Our own peer id, base58.
        is_member: Asked about both ends, again and again.
        addresses: Where we are reached; asked at every reservation.
        limits: Bounds.
        wall: The time of day, UTC, in which a reservation's end is told.
    """

    def __init__(
        self,
        us: str,
        *,
        is_member: Callable[[str], bool],
        addresses: Callable[[], Sequence[str]],
        limits: RelayLimits | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._us = us
        self._is_member = is_member
        self._addresses = addresses
        self._limits = limits or RelayLimits()
        self._wall = wall
        self._held: dict[str, _Held] = {}
        self._circuits: set[_Circuit] = set()
        self._serving: Counter[str] = Counter()
        self._relayed = 0
        self._refused = 0

    async def serve_hop(self, link: RelayLink, stream: RelayStream) -> None:
        """Serve one stream that a member opened for ``HOP``; the stream is over afterwards.

        A circuit is served here to its end, so this runs as long as the circuit does.

        Raises:
            PeerUnreachable: The peer is gone, or did not say what it wants in time.
        """
        peer = link.peer
        if self._serving[peer] >= self._limits.streams_per_peer:
            self._refused += 1
            stream.discard()
            return
        self._serving[peer] += 1
        try:
            status = await self._serve(link, stream)
            if status is not None:
                await self._refuse(link, stream, status)
        finally:
            self._serving[peer] -= 1
            if not self._serving[peer]:
                del self._serving[peer]
            stream.discard()

    def recheck(self) -> None:
        """Drop what belongs to peers that are no members any more (after a roster change)."""
        for peer in [peer for peer in self._held if not self._is_member(peer)]:
            del self._held[peer]
        for circuit in self._circuits:
            if not self._is_allowed(circuit):
                circuit.scope.cancel()

    def stats(self) -> RelayStats:
        """Return the figures up to now."""
        circuits = (CircuitStats(*each.peers(), each.relayed) for each in self._circuits)
        return RelayStats(
            reservations=sum(held.holds() for held in self._held.values()),
            circuits=tuple(sorted(circuits, key=lambda each: (each.source, each.target))),
            relayed=self._relayed,
            refused=self._refused,
        )

    # -- requests ------------------------------------------------------------------------------

    async def _serve(self, link: RelayLink, stream: RelayStream) -> Status | None:
        """Do what the stream asks for; a status is a refusal still to be told."""
        try:
            request = await read_hop(stream, seconds=self._limits.message_seconds)
        except RemoteProtocolError:
            return Status.MALFORMED_MESSAGE
        if isinstance(request, Answer):
            return Status.UNEXPECTED_MESSAGE
        if link.wire.via or not self._is_member(link.peer):
            return Status.PERMISSION_DENIED
        if isinstance(request, Reserve):
            return await self._reserve(link, stream)
        circuit = self._claim(link, request.peer)
        if isinstance(circuit, Status):
            return circuit
        try:
            await self._join(circuit, stream)
        finally:
            self._circuits.discard(circuit)
        return None if circuit.is_up else Status.CONNECTION_FAILED

    async def _refuse(self, link: RelayLink, stream: RelayStream, status: Status) -> None:
        self._refused += 1
        logger.debug("a relay request of peer %s was refused: %s", link.peer, status.name)
        await self._tell(stream, Answer(status))
        await stream.finish(self._limits.message_seconds)

    async def _tell(self, stream: RelayStream, answer: Answer) -> None:
        with deadline(self._limits.message_seconds, "answering a relay request"):
            await write_message(stream, encode_hop(answer))

    async def _reserve(self, link: RelayLink, stream: RelayStream) -> Status | None:
        """Grant, or renew, the one reservation of a peer; the newest link counts."""
        for gone in [peer for peer, held in self._held.items() if not held.holds()]:
            del self._held[gone]
        if link.peer not in self._held and len(self._held) >= self._limits.reservations:
            return Status.RESERVATION_REFUSED
        seconds = self._limits.reservation_seconds
        self._held[link.peer] = _Held(link, trio.current_time() + seconds)
        answer = Answer(
            Status.OK,
            expires_at=int(self._wall()) + seconds,
            addresses=self._announced(),
            limit=self._limit(),
        )
        await self._tell(stream, answer)
        await stream.finish(self._limits.message_seconds)
        return None

    def _announced(self) -> tuple[bytes, ...]:
        """Our own addresses that somebody can dial, in binary form."""
        packed = []
        for text in self._addresses():
            with suppress(ConfigError):
                address = parse_direct(text, self._us)
                if not address.is_wildcard:
                    packed.append(pack(replace(address, peer=self._us)))
        return tuple(packed[:MAX_ADDRESSES])

    def _limit(self) -> Limit:
        return Limit(self._limits.circuit_seconds, self._limits.circuit_bytes)

    def _claim(self, link: RelayLink, target: str) -> _Circuit | Status:
        """Take a place for a circuit, or say why there is none."""
        if target == link.peer or not self._is_member(target):
            return Status.PERMISSION_DENIED
        held = self._held.get(target)
        if held is None or not held.holds():
            return Status.NO_RESERVATION
        ends = [each.peers() for each in self._circuits]
        limits = self._limits
        if (
            len(ends) >= limits.circuits
            or ends.count((link.peer, target)) >= limits.circuits_per_pair
            or sum(source == link.peer for source, _ in ends) >= limits.circuits_per_source
        ):
            return Status.RESOURCE_LIMIT_EXCEEDED
        circuit = _Circuit(link, held.link)
        self._circuits.add(circuit)
        return circuit

    # -- circuits ------------------------------------------------------------------------------

    async def _join(self, circuit: _Circuit, near: RelayStream) -> None:
        """Open the second half and pump until the circuit ends, for whatever reason."""
        far: RelayStream | None = None
        try:
            with circuit.scope:
                async with trio.open_nursery() as watch:
                    watch.start_soon(_end_with, circuit.source.done, circuit.scope)
                    watch.start_soon(_end_with, circuit.target.done, circuit.scope)
                    watch.start_soon(self._watch, circuit)
                    with suppress(PeerError):
                        with deadline(self._limits.open_seconds, "opening a circuit"):
                            far = await circuit.target.open(STOP)
                            await self._agree(circuit, far)
                        await self._tell(near, Answer(Status.OK, limit=self._limit()))
                        circuit.is_up = True
                        await self._pump_both(circuit, near, far)
                    watch.cancel_scope.cancel()
        finally:
            if far is not None:
                far.discard()

    async def _agree(self, circuit: _Circuit, far: RelayStream) -> None:
        """Ask the target.

        Raises:
            PeerError: It does not want the circuit, or is gone.
        """
        request = Connect(circuit.source.peer, self._limit())
        await write_message(far, encode_stop(request))
        answer = await read_stop(far, seconds=self._limits.open_seconds)
        if not isinstance(answer, Answer) or answer.status is not Status.OK:
            raise RemoteProtocolError(f"{circuit.target.peer} did not accept the circuit")

    async def _pump_both(self, circuit: _Circuit, near: RelayStream, far: RelayStream) -> None:
        circuit.moved_at = trio.current_time()
        if self._limits.circuit_seconds:
            circuit.scope.deadline = trio.current_time() + self._limits.circuit_seconds
        async with trio.open_nursery() as both:
            both.start_soon(partial(self._pump, circuit, near, far))
            both.start_soon(partial(self._pump, circuit, far, near))
        for stream in (near, far):  # both have ended; what is left is to see the end sent
            await stream.finish(self._limits.message_seconds)

    async def _pump(self, circuit: _Circuit, here: RelayStream, there: RelayStream) -> None:
        """Pass one direction on, to its end; what is not an end ends the circuit."""
        passed, most = 0, self._limits.circuit_bytes
        try:
            while piece := await here.read(CHUNK):
                passed += len(piece)
                if most and passed > most:
                    circuit.scope.cancel()
                    return
                circuit.moved_at = trio.current_time()
                await there.write(piece)
                circuit.moved_at = trio.current_time()
                circuit.relayed += len(piece)
                self._relayed += len(piece)
            there.end()
        except PeerError:
            circuit.scope.cancel()

    async def _watch(self, circuit: _Circuit) -> None:
        """End a circuit that is silent, or whose ends are no members any more."""
        while self._is_allowed(circuit):
            left = circuit.moved_at + self._limits.idle_seconds - trio.current_time()
            if left <= 0:
                break
            await trio.sleep(min(left, _RECHECK))
        circuit.scope.cancel()

    def _is_allowed(self, circuit: _Circuit) -> bool:
        return all(map(self._is_member, circuit.peers()))


async def _end_with(done: trio.Event, scope: trio.CancelScope) -> None:
    await done.wait()
    scope.cancel()
