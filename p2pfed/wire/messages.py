"""The messages of `/p2pfed/gossip/1` and `/2`: frozen values, one encoding each in a version.

A message is `[kind, fields…]` in msgpack (see `codec`). Peers exchange names of facts first and
facts only when asked (`Want`), so that no payload crosses twice. Facts are content-addressed: a
name on the wire is the first 16 bytes of the fact's BLAKE2b-256.

What the messages mean is told where they are handled: `gossip/membership.py` (Beat, Ack, Leave,
Addresses), `gossip/sync.py` (Digest, Have, Want, Facts), `gossip/joining.py` (AskCheckpoints,
Checkpoints), `gossip/witness.py` (AskWitness, Witness). Those of `wire/spreading.py` are told by
seats instead of names; those of `wire/meetings.py` belong to pairwise mode.

The versions (`versions`) differ in the beat alone, which is in `beat`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from p2pfed.errors import RemoteProtocolError
from p2pfed.wire.beat import HASH_BYTES, MAX_ADDRESSES, Beat, beat_items, is_sayable, read_beat
from p2pfed.wire.codec import MAX_FRAME, Items, pack, unpack
from p2pfed.wire.delta import MAX_HEADER
from p2pfed.wire.meetings import MEETING_READERS, MeetingMessage, meeting_items
from p2pfed.wire.spreading import (
    READERS,
    AskHeard,
    Claims,
    Crowded,
    Doubted,
    Heard,
    Held,
    Ping,
    SpreadingMessage,
    Wanted,
    encode_spreading,
)
from p2pfed.wire.versions import NEWEST

__all__ = [
    "DOCUMENTS",
    "NAME_BYTES",
    "Ack",
    "Addresses",
    "AskCheckpoints",
    "AskWitness",
    "Beat",
    "CheckpointOffer",
    "Checkpoints",
    "Digest",
    "Facts",
    "Have",
    "Leave",
    "Message",
    "Range",
    "Want",
    "Witness",
    "decode_message",
    "encode_message",
    "is_sayable",
]

NAME_BYTES = 16  # 128 bits of a fact's hash name it on the wire
MAX_NAMES = 4096
MAX_RANGES = 512
MAX_ROUND = 1 << 31
MAX_WITNESSED = 256  # runs that a member took part in
DOCUMENTS = -1  # the "round" under which rosters and proofs are listed


@dataclass(frozen=True, slots=True)
class Ack:
    """The answer to a beat; gives the round-trip time."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Leave:
    """I go on purpose: do not wait for me and do not dial me."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where other members were seen: hints, authenticated by the handshake that follows."""

    peers: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class Range:
    """The digest of the deltas of rounds [start, start + length); length is a power of two."""

    start: int
    length: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Digest:
    """What I hold of a run, as digests of ranges of rounds.

    Attributes:
        run_id: 32 bytes.
        end: If > 0, the ranges cover [0, end) and the sender holds nothing beyond.
        ranges: The digests.
    """

    run_id: bytes
    end: int
    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Have:
    """Names of facts that I hold.

    Attributes:
        run_id: 32 bytes.
        round: The round, or `DOCUMENTS`.
        full: Whether these are all that I hold of it (then the other side answers with the rest).
        names: Concatenated 16-byte names.
    """

    run_id: bytes
    round: int
    full: bool
    names: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Want:
    """Send me these facts."""

    run_id: bytes
    names: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts, as they were signed: encoded deltas, signed rosters, proofs."""

    deltas: tuple[bytes, ...] = field(repr=False)
    rosters: tuple[bytes, ...] = field(repr=False)
    proofs: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class AskCheckpoints:
    """Which checkpoints of this run do you hold?"""

    run_id: bytes


@dataclass(frozen=True, slots=True)
class CheckpointOffer:
    """One checkpoint: the fold of all deltas of rounds < `round`.

    Attributes:
        round: The first round that is not folded in.
        chain: Hash of exactly what was folded (`gossip/facts.py`), 32 bytes.
        digest: BLAKE2b-256 of the checkpoint's file, by which it is fetched.
        size: Length of that file, bytes.
    """

    round: int
    chain: bytes
    digest: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints that I hold."""

    run_id: bytes
    offers: tuple[CheckpointOffer, ...]


@dataclass(frozen=True, slots=True)
class AskWitness:
    """Which headers that I signed do you hold?"""


@dataclass(frozen=True, slots=True)
class Witness:
    """The newest headers that you signed, as far as I hold them.

    Attributes:
        headers: (header bytes, signature): the newest one of each run; none, if none is known.
    """

    headers: tuple[tuple[bytes, bytes], ...] = field(repr=False)


Message = (
    Beat
    | Ack
    | Leave
    | Addresses
    | Digest
    | Have
    | Want
    | Facts
    | AskCheckpoints
    | Checkpoints
    | AskWitness
    | Witness
    | SpreadingMessage
    | MeetingMessage
)


def encode_message(message: Message, version: int = NEWEST) -> bytes:
    """Encode a message as a version has it; raises ValueError if it is longer than a frame."""
    data = _encode(message, version)
    if len(data) > MAX_FRAME:
        raise ValueError(f"{type(message).__name__} has {len(data)} bytes")
    return data


def _encode(message: Message, version: int) -> bytes:  # noqa: C901, PLR0911 - one case per message
    match message:
        case Beat():
            return pack("beat", *beat_items(message, version))
        case Ack():
            return pack("ack", message.sequence)
        case Leave():
            return pack("leave")
        case Addresses():
            return pack("addresses", message.peers)
        case Digest():
            return pack(
                "digest",
                message.run_id,
                message.end,
                tuple((r.start, r.length, r.digest) for r in message.ranges),
            )
        case Have():
            return pack("have", message.run_id, message.round, message.full, message.names)
        case Want():
            return pack("want", message.run_id, message.names)
        case Facts():
            return pack("facts", *(tuple((f,) for f in kind) for kind in _kinds(message)))
        case AskCheckpoints():
            return pack("ask-checkpoints", message.run_id)
        case Checkpoints():
            offers = tuple((o.round, o.chain, o.digest, o.size) for o in message.offers)
            return pack("checkpoints", message.run_id, offers)
        case Held() | Wanted() | Claims() | Crowded() | Ping() | AskHeard() | Heard() | Doubted():
            return encode_spreading(message)
        case AskWitness():
            return pack("ask-witness")
        case Witness():
            return pack("witness", message.headers)
        case _:
            return pack(*meeting_items(message))


def _kinds(facts: Facts) -> tuple[tuple[bytes, ...], ...]:
    return facts.deltas, facts.rosters, facts.proofs


def decode_message(frame: bytes, version: int = NEWEST) -> Message:
    """Decode a frame from a peer.

    Args:
        frame: The whole frame.
        version: Of the stream that it came on.

    Raises:
        RemoteProtocolError: The frame is not one of that version's messages, exactly.
    """
    items = unpack(frame, "message")
    kind = items.text(32)
    reader = _READERS.get(kind)
    if kind != "beat" and reader is None:
        raise RemoteProtocolError(f"message: unknown kind {kind!r}")
    message = read_beat(items, version) if reader is None else reader(items)
    items.done()
    return message


def _read_addresses(items: Items) -> Addresses:
    def one(item: Items) -> tuple[str, tuple[str, ...]]:
        return item.text(64), item.texts(MAX_ADDRESSES)

    return Addresses(items.many(one, 1024))


def _read_range(items: Items) -> Range:
    start, length = items.integer(0, MAX_ROUND), items.integer(1, MAX_ROUND)
    if length & (length - 1) or start % length:
        raise RemoteProtocolError("digest: a range is not aligned to a power of two")
    return Range(start, length, items.raw(HASH_BYTES))


def _read_digest(items: Items) -> Digest:
    return Digest(items.raw(32), items.integer(0, MAX_ROUND), items.many(_read_range, MAX_RANGES))


def _read_names(items: Items) -> bytes:
    names = items.raw(longest=NAME_BYTES * MAX_NAMES)
    if len(names) % NAME_BYTES:
        raise RemoteProtocolError("names of facts: a name is cut short")
    return names


def _read_have(items: Items) -> Have:
    return Have(
        items.raw(32), items.integer(DOCUMENTS, MAX_ROUND), items.flag(), _read_names(items)
    )


def _read_facts(items: Items) -> Facts:
    return Facts(*(items.many(Items.raw, MAX_NAMES) for _ in range(3)))


def _read_offer(items: Items) -> CheckpointOffer:
    return CheckpointOffer(
        items.integer(0, MAX_ROUND), items.raw(32), items.raw(32), items.integer(1, 1 << 40)
    )


def _read_signed(items: Items) -> tuple[bytes, bytes]:
    return items.raw(longest=MAX_HEADER), items.raw(64)


_READERS: dict[str, Callable[[Items], Message]] = {
    **READERS,
    "ack": lambda items: Ack(items.integer()),
    "leave": lambda _: Leave(),
    "addresses": _read_addresses,
    "digest": _read_digest,
    "have": _read_have,
    "want": lambda items: Want(items.raw(32), _read_names(items)),
    "facts": _read_facts,
    "ask-checkpoints": lambda items: AskCheckpoints(items.raw(32)),
    "checkpoints": lambda items: Checkpoints(items.raw(32), items.many(_read_offer, 64)),
    "ask-witness": lambda _: AskWitness(),
    "witness": lambda items: Witness(items.many(_read_signed, MAX_WITNESSED)),
    **MEETING_READERS,
}
