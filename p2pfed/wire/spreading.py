"""The messages that spread deltas and presence by seat instead of by name.

A *seat* is a member's place in the sorted peer ids of one roster version; both sides hold that
roster, so a set of members is a bit field (`wire/seats.py`) and a whole round of a thousand
hospitals is told in at most 128 bytes. Runs and rosters go by the first 4 bytes of their hashes: a
mix-up costs a question in vain, never a wrong belief, for what arrives is checked by itself.

What they mean is told in `gossip/spread.py` (Held, Wanted), `gossip/rumours.py` (Claims),
`gossip/neighbours.py` (Crowded), `gossip/heartbeat.py` (Ping) and `gossip/probing.py` (AskHeard,
Heard, Doubted: the talk about a suspect, by peer id, since it is of a small network).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from p2pfed.wire.codec import Items, pack

__all__ = [
    "MAX_AGE",
    "MAX_ASKED",
    "MAX_PORTIONS",
    "PREFIX_BYTES",
    "READERS",
    "TABLE_DIGEST_BYTES",
    "AskHeard",
    "Claims",
    "Crowded",
    "Doubted",
    "Heard",
    "Held",
    "Ping",
    "Portion",
    "SpreadingMessage",
    "Wanted",
    "encode_spreading",
]

PREFIX_BYTES = 4
TABLE_DIGEST_BYTES = 8
MAX_PORTIONS = 64
MAX_SEAT_BYTES = 129  # a kind and 1024 seats
MAX_CLAIMS_BYTES = 1 << 14  # 1024 records of at most 12 bytes
MAX_ROUND = 1 << 31
MAX_ASKED = 32  # members of a network that is no crowd
MAX_AGE = 1 << 40  # milliseconds


@dataclass(frozen=True, slots=True)
class Portion:
    """Seats of one round.

    Attributes:
        round: The round.
        seats: Encoded bit field of seats.
        digest: First 4 bytes of the round's digest; empty in a `Wanted` and in an answer.
    """

    round: int
    seats: bytes
    digest: bytes = b""


@dataclass(frozen=True, slots=True)
class Held:
    """Whose deltas I hold of some rounds; answered by what the other side lacks, and holds more.

    Attributes:
        run: First 4 bytes of the run id.
        roster: First 4 bytes of the hash of the roster that gives the seats.
        is_answer: These are the ones that you lack; say nothing but what you want of them.
        portions: One for each round.
    """

    run: bytes
    roster: bytes
    is_answer: bool
    portions: tuple[Portion, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Send me the deltas of these seats."""

    run: bytes
    roster: bytes
    portions: tuple[Portion, ...]


@dataclass(frozen=True, slots=True)
class Claims:
    """What is said about members' presence.

    Attributes:
        roster: First 4 bytes of the hash of the roster that gives the seats.
        digest: Digest of all that I have heard, 8 bytes; empty: do not compare.
        groups: (first 4 bytes of a run id or nothing, packed records: seat gap and stamp).
    """

    roster: bytes
    digest: bytes
    groups: tuple[tuple[bytes, bytes], ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Crowded:
    """I have neighbours enough: keep a connection to somebody else, please."""


@dataclass(frozen=True, slots=True)
class Ping:
    """A beat that says nothing new; answered by `Ack` like one."""

    sequence: int


@dataclass(frozen=True, slots=True)
class AskHeard:
    """These are silent to me: when did you last hear them? Answered by `Heard`."""

    sequence: int
    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Heard:
    """How long ago I heard whom.

    Attributes:
        sequence: Of the question.
        ages: (peer id, milliseconds since its last word); those of whom nothing is known are left
            out.
    """

    sequence: int
    ages: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Doubted:
    """You are suspect: speak up.

    Attributes:
        first_hand: You are silent to me; else to somebody that asked me.
    """

    first_hand: bool


SpreadingMessage = Held | Wanted | Claims | Crowded | Ping | AskHeard | Heard | Doubted


def encode_spreading(message: SpreadingMessage) -> bytes:
    """Encode one of these messages."""
    match message:
        case Held():
            portions = tuple((p.round, p.seats, p.digest) for p in message.portions)
            return pack("held", message.run, message.roster, message.is_answer, portions)
        case Wanted():
            wanted = tuple((p.round, p.seats) for p in message.portions)
            return pack("wanted", message.run, message.roster, wanted)
        case Claims():
            return pack("claims", message.roster, message.digest, message.groups)
        case Crowded():
            return pack("crowded")
        case Ping():
            return pack("ping", message.sequence)
        case AskHeard():
            return pack("ask-heard", message.sequence, message.peers)
        case Heard():
            return pack("heard", message.sequence, message.ages)
        case Doubted():
            return pack("doubted", message.first_hand)


def _read_seats(items: Items) -> Portion:
    return Portion(items.integer(0, MAX_ROUND), items.raw(longest=MAX_SEAT_BYTES))


def _read_portion(items: Items) -> Portion:
    bare = _read_seats(items)
    return Portion(bare.round, bare.seats, items.raw(0, PREFIX_BYTES))


def _read_held(items: Items) -> Held:
    return Held(
        items.raw(PREFIX_BYTES),
        items.raw(PREFIX_BYTES),
        items.flag(),
        items.many(_read_portion, MAX_PORTIONS),
    )


def _read_wanted(items: Items) -> Wanted:
    return Wanted(
        items.raw(PREFIX_BYTES), items.raw(PREFIX_BYTES), items.many(_read_seats, MAX_PORTIONS)
    )


def _read_claims(items: Items) -> Claims:
    def group(item: Items) -> tuple[bytes, bytes]:
        return item.raw(0, PREFIX_BYTES), item.raw(longest=MAX_CLAIMS_BYTES)

    return Claims(
        items.raw(PREFIX_BYTES), items.raw(0, TABLE_DIGEST_BYTES), items.many(group, MAX_PORTIONS)
    )


def _read_age(items: Items) -> tuple[str, int]:
    return items.text(64), items.integer(0, MAX_AGE)


READERS: dict[str, Callable[[Items], SpreadingMessage]] = {
    "held": _read_held,
    "wanted": _read_wanted,
    "claims": _read_claims,
    "crowded": lambda _: Crowded(),
    "ping": lambda items: Ping(items.integer()),
    "ask-heard": lambda items: AskHeard(items.integer(), items.texts(MAX_ASKED, 64)),
    "heard": lambda items: Heard(items.integer(), items.many(_read_age, MAX_ASKED)),
    "doubted": lambda items: Doubted(items.flag()),
}
