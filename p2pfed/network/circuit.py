"""Circuit relay v2: the messages, and the ends of a circuit (who asks for one, who accepts one).

A message is a protobuf behind its length, an unsigned varint. *Hop* is spoken to a relay: RESERVE
(others may reach me through you), CONNECT (lead me to this peer), STATUS. *Stop* is what the relay
says to the peer reached: CONNECT (this peer wants you), STATUS. After an OK the stream itself is
the circuit, and the two ends shake hands in it as they would over a socket: what the relay says
about who is there is a hint, and Noise the proof.

Invariants: never a byte is read past a message, for it would be the circuit's; a message has at
most ``MAX_MESSAGE`` bytes and one deadline as a whole, so drops of bytes do not hold it open;
whatever does not decode, or lacks what its type needs, is a :class:`RemoteProtocolError` and
nothing else. Fields we do not know are skipped, as protobuf wants.

Source: libp2p/specs relay/circuit-v2.md, sections "Hop Protocol", "Stop Protocol" and "Protobuf";
multiformats/unsigned-varint. Not here: the relay (``relay``), whom to ask and when
(``reservations``); reservation vouchers, which the specification calls advisory: who may be reached
is decided by the roster.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage as PbHop
from libp2p.relay.circuit_v2.pb.circuit_pb2 import Limit as PbLimit
from libp2p.relay.circuit_v2.pb.circuit_pb2 import PeerId as PbPeer
from libp2p.relay.circuit_v2.pb.circuit_pb2 import Status as PbStatus
from libp2p.relay.circuit_v2.pb.circuit_pb2 import StopMessage as PbStop

from p2pfed.errors import FactRejected, PeerUnreachable, RemoteProtocolError
from p2pfed.identity.keys import public_key_of
from p2pfed.network.framing import deadline, read_exact

if TYPE_CHECKING:
    from collections.abc import Callable

    from p2pfed.network.framing import ByteStream

__all__ = ["HOP", "MAX_MESSAGE", "STOP", "Answer", "Connect", "HopMessage", "Limit", "Reservation"]
__all__ += ["Reserve", "Status", "StopMessage", "accept_stop", "connect", "decode_hop"]
__all__ += ["decode_stop", "encode_hop", "encode_stop", "read_hop", "read_stop", "reserve"]
__all__ += ["write_message"]

HOP = "/libp2p/circuit/relay/0.2.0/hop"
STOP = "/libp2p/circuit/relay/0.2.0/stop"
MAX_MESSAGE = 4096  # bytes, as in go-libp2p; eight addresses and a voucher are less than half
MAX_ADDRESSES = 8
SECONDS = 10.0  # for one message
_PEER_ID_BYTES = 38
# A relay whose clock is wrong, or ours, must not make us ask all the time, nor believe in a place
# that the relay has given away: an hour is what relays grant.
_SHORTEST, _LONGEST = 60.0, 3600.0


class Status(IntEnum):
    """How a request went, in the specification's numbers."""

    OK = 100
    RESERVATION_REFUSED = 200
    RESOURCE_LIMIT_EXCEEDED = 201
    PERMISSION_DENIED = 202
    CONNECTION_FAILED = 203
    NO_RESERVATION = 204
    MALFORMED_MESSAGE = 400
    UNEXPECTED_MESSAGE = 401

    @property
    def words(self) -> str:
        """The status in words, for a message."""
        return _WORDS[self]


_WORDS = {
    Status.OK: "agreed",
    Status.RESERVATION_REFUSED: "the relay has no place left",
    Status.RESOURCE_LIMIT_EXCEEDED: "there are too many circuits",
    Status.PERMISSION_DENIED: "it is not allowed",
    Status.CONNECTION_FAILED: "the other end could not be reached",
    Status.NO_RESERVATION: "the other end has no reservation there",
    Status.MALFORMED_MESSAGE: "our message was not understood",
    Status.UNEXPECTED_MESSAGE: "our message was not expected",
}


@dataclass(frozen=True, slots=True)
class Limit:
    """What a relay lets one circuit do; 0 is no limit.

    Attributes:
        seconds: Longest life.
        bytes: Most bytes in each direction.
    """

    seconds: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Reserve:
    """Hop: others may reach me through you."""


@dataclass(frozen=True, slots=True)
class Connect:
    """Hop: lead me to ``peer``. Stop: ``peer`` wants to talk to you."""

    peer: str
    limit: Limit = Limit()


@dataclass(frozen=True, slots=True)
class Answer:
    """How it went.

    Attributes:
        status: The outcome.
        expires_at: Of a granted reservation: UTC, seconds since 1970.
        addresses: Of a granted reservation: the relay's own, in binary form, not yet looked at.
        limit: What applies to circuits.
    """

    status: Status
    expires_at: int | None = None
    addresses: tuple[bytes, ...] = ()
    limit: Limit = Limit()


HopMessage = Reserve | Connect | Answer
StopMessage = Connect | Answer


@dataclass(frozen=True, slots=True)
class Reservation:
    """A relay's promise to let others reach us, for as long as our link to it lives.

    Attributes:
        expires_in: Seconds from now.
        limit_bytes: Most bytes of a circuit in each direction; 0: any number.
        limit_seconds: Longest life of a circuit; 0: any.
        addresses: Where the relay says it is, in binary form; ``addresses.unpack`` reads them.
    """

    expires_in: float
    limit_bytes: int = 0
    limit_seconds: int = 0
    addresses: tuple[bytes, ...] = ()


# -- the ends of a circuit -------------------------------------------------------------------------


async def reserve(
    stream: ByteStream, *, seconds: float = SECONDS, wall: Callable[[], float] = time.time
) -> Reservation:
    """Ask a relay for a reservation.

    Args:
        stream: Opened for ``HOP`` on our link to the relay; the caller ends it afterwards.
        seconds: For the whole exchange.
        wall: The time of day, UTC, which the answer is measured against; clocks that disagree
            shorten or lengthen what is believed, between one minute and one hour.

    Raises:
        PeerUnreachable: The relay refused, said nothing, or is gone.
        RemoteProtocolError: It answered something else.
    """
    with deadline(seconds, "asking for a reservation"):
        await write_message(stream, encode_hop(Reserve()))
        answer = await read_hop(stream, seconds=seconds)
    if not isinstance(answer, Answer):
        raise RemoteProtocolError("a relay answered a reservation with a request")
    if answer.status is not Status.OK:
        raise PeerUnreachable(f"the relay gave no reservation: {answer.status.words}")
    if answer.expires_at is None:
        raise RemoteProtocolError("a relay granted a reservation and did not say until when")
    return Reservation(
        expires_in=min(max(answer.expires_at - wall(), _SHORTEST), _LONGEST),
        limit_bytes=answer.limit.bytes,
        limit_seconds=answer.limit.seconds,
        addresses=answer.addresses[:MAX_ADDRESSES],
    )


async def connect(stream: ByteStream, target: str, *, seconds: float = 2 * SECONDS) -> None:
    """Ask a relay to lead us to ``target``; afterwards the stream is the circuit.

    Args:
        stream: Opened for ``HOP`` on our link to the relay; the caller discards it on an error.
        target: Peer id, base58.
        seconds: For the whole exchange; the relay itself waits up to ``SECONDS`` for the target.

    Raises:
        PeerUnreachable: The relay refused (the message says why), said nothing, or is gone.
        RemoteProtocolError: It answered something else.
    """
    with deadline(seconds, "asking for a circuit"):
        await write_message(stream, encode_hop(Connect(target)))
        answer = await read_hop(stream, seconds=seconds)
    if not isinstance(answer, Answer):
        raise RemoteProtocolError("a relay answered a request for a circuit with a request")
    if answer.status is not Status.OK:
        raise PeerUnreachable(f"the relay led nowhere: {answer.status.words}", f"wanted: {target}")


async def accept_stop(
    stream: ByteStream,
    *,
    admits: Callable[[str], bool] = lambda _: True,
    seconds: float = SECONDS,
) -> str:
    """Answer a relay that brings a circuit; afterwards the stream is the circuit.

    Args:
        stream: Opened by the relay for ``STOP``; the caller discards it on an error.
        admits: Says whether we want this peer's circuit.
        seconds: For the whole exchange.

    Returns:
        Who, as the relay has it, is at the other end; the handshake must show it.

    Raises:
        RemoteProtocolError: The relay said something else.
        PeerUnreachable: It said nothing or is gone, or the peer is not admitted.
    """
    with deadline(seconds, "accepting a circuit"):
        try:
            request = await read_stop(stream, seconds=seconds)
        except RemoteProtocolError:
            await write_message(stream, encode_stop(Answer(Status.MALFORMED_MESSAGE)))
            raise
        if not isinstance(request, Connect):
            await write_message(stream, encode_stop(Answer(Status.UNEXPECTED_MESSAGE)))
            raise RemoteProtocolError("a relay brought an answer that nobody waits for")
        if not admits(request.peer):
            await write_message(stream, encode_stop(Answer(Status.PERMISSION_DENIED)))
            raise PeerUnreachable(f"the circuit from {request.peer} was not admitted")
        await write_message(stream, encode_stop(Answer(Status.OK)))
    return request.peer


# -- reading and writing ---------------------------------------------------------------------------


async def read_hop(stream: ByteStream, *, seconds: float = SECONDS) -> HopMessage:
    """Read one hop message and nothing after it.

    Raises:
        RemoteProtocolError: Too long, or not one.
        PeerUnreachable: It was not there as a whole after ``seconds``.
    """
    return decode_hop(await _read_body(stream, seconds))


async def read_stop(stream: ByteStream, *, seconds: float = SECONDS) -> StopMessage:
    """Read one stop message and nothing after it.

    Raises:
        RemoteProtocolError: Too long, or not one.
        PeerUnreachable: It was not there as a whole after ``seconds``.
    """
    return decode_stop(await _read_body(stream, seconds))


async def write_message(stream: ByteStream, body: bytes) -> None:
    """Write one message behind its length; the caller bounds the time."""
    assert 0 < len(body) <= MAX_MESSAGE
    low, high = len(body) & 0x7F, len(body) >> 7
    await stream.write((bytes([low | 0x80, high]) if high else bytes([low])) + body)


async def _read_body(stream: ByteStream, seconds: float) -> bytes:
    with deadline(seconds, "reading a relay's message"):
        (length,) = await read_exact(stream, 1, stall=seconds)
        if length & 0x80:  # two bytes are enough, and the second is never idle
            (high,) = await read_exact(stream, 1, stall=seconds)
            length = (length & 0x7F) | (high << 7)
            if high == 0 or high & 0x80:
                raise RemoteProtocolError("the length of a relay's message is not a short varint")
        if not 0 < length <= MAX_MESSAGE:
            raise RemoteProtocolError(f"a relay's message has {length} bytes")
        return await read_exact(stream, length, stall=seconds)


# -- bytes and values ------------------------------------------------------------------------------


def encode_hop(message: HopMessage) -> bytes:
    """Return the body of a hop message."""
    if isinstance(message, Reserve):
        return bytes(PbHop(type=PbHop.RESERVE).SerializeToString())
    if isinstance(message, Connect):
        body = PbHop(type=PbHop.CONNECT, peer=_pb_peer(message.peer))
    else:
        body = PbHop(type=PbHop.STATUS, status=PbStatus.ValueType(message.status))
        if message.expires_at is not None:
            body.reservation.expire = message.expires_at
            body.reservation.addrs.extend(message.addresses)
    if message.limit != Limit():
        body.limit.CopyFrom(_pb_limit(message.limit))
    return bytes(body.SerializeToString())


def encode_stop(message: StopMessage) -> bytes:
    """Return the body of a stop message."""
    if isinstance(message, Connect):
        body = PbStop(type=PbStop.CONNECT, peer=_pb_peer(message.peer))
    else:
        body = PbStop(type=PbStop.STATUS, status=PbStatus.ValueType(message.status))
    if message.limit != Limit():
        body.limit.CopyFrom(_pb_limit(message.limit))
    return bytes(body.SerializeToString())


def decode_hop(body: bytes) -> HopMessage:
    """Read the body of a hop message.

    Raises:
        RemoteProtocolError: It is not one.
    """
    message = PbHop()
    _parse(message, body)
    if not message.HasField("type"):
        raise RemoteProtocolError("a hop message has no type")
    if message.type == PbHop.RESERVE:
        return Reserve()
    limit = Limit(message.limit.duration, message.limit.data)
    if message.type == PbHop.CONNECT:
        return Connect(_peer(message.peer), limit)
    if message.type == PbHop.STATUS:
        granted = message.HasField("reservation")
        return Answer(
            _status(message),
            message.reservation.expire if granted else None,
            tuple(message.reservation.addrs),
            limit,
        )
    raise RemoteProtocolError(f"a hop message has the unknown type {message.type}")


def decode_stop(body: bytes) -> StopMessage:
    """Read the body of a stop message.

    Raises:
        RemoteProtocolError: It is not one.
    """
    message = PbStop()
    _parse(message, body)
    if not message.HasField("type"):
        raise RemoteProtocolError("a stop message has no type")
    limit = Limit(message.limit.duration, message.limit.data)
    if message.type == PbStop.CONNECT:
        return Connect(_peer(message.peer), limit)
    if message.type == PbStop.STATUS:
        return Answer(_status(message), limit=limit)
    raise RemoteProtocolError(f"a stop message has the unknown type {message.type}")


def _parse(message: PbHop | PbStop, body: bytes) -> None:
    if not 0 < len(body) <= MAX_MESSAGE:
        raise RemoteProtocolError(f"a relay's message has {len(body)} bytes")
    try:
        message.ParseFromString(body)
    except Exception as garbage:  # protobuf's own error, whose package is not this room's
        raise RemoteProtocolError("a relay's message is not protobuf") from garbage


def _status(message: PbHop | PbStop) -> Status:
    try:
        return Status(message.status)
    except ValueError:
        raise RemoteProtocolError(f"a relay's answer has the status {message.status}") from None


def _peer(message: PbPeer) -> str:
    """The peer id in a message, as text; absent, it is as empty as a wrong one."""
    if len(message.id) == _PEER_ID_BYTES:
        try:
            peer = ID(message.id).to_base58()
            public_key_of(peer)
        except FactRejected:
            pass
        else:
            return peer
    raise RemoteProtocolError("a relay's message names no peer with an Ed25519 key")


def _pb_peer(peer: str) -> PbPeer:
    return PbPeer(id=ID.from_base58(peer).to_bytes())


def _pb_limit(limit: Limit) -> PbLimit:
    return PbLimit(duration=limit.seconds, data=limit.bytes)
