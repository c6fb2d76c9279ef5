"""How much a peer may ask, and for how long one that misbehaves is refused.

Questions cost us work (reading facts, comparing digests, listing checkpoints), so each peer has a
bucket of tokens for each kind of question: it fills at a steady rate up to a burst, and a question
takes out what it asks for. What is over the limit is dropped and noted; who goes on until it owes a
whole burst is blamed. A peer that was blamed `STRIKES` times within `MEMORY` seconds is refused for
a while, twice as long each time, at most `LONGEST`.

Invariants: an honest peer never meets a limit (a receiver verifies at most some 5000 deltas a
second; a node asks for checkpoints and witnesses once in a while); the tables hold members only and
a few numbers for each.

Source: token bucket (Turner 1986); back-off by doubling as in Ethernet (Metcalfe & Boggs 1976).
Not here: what a breach is (decoding and `intake`), limits of bytes and connections (`network`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from p2pfed.errors import RemoteProtocolError
from p2pfed.gossip.events import Disconnect, Effect, Keep, Note, StopDialling
from p2pfed.gossip.membership import Membership, Peer, State
from p2pfed.wire.messages import (
    NAME_BYTES,
    Addresses,
    AskCheckpoints,
    AskWitness,
    Beat,
    Digest,
    Facts,
    Have,
    Leave,
    Message,
    Want,
    Witness,
)
from p2pfed.wire.spreading import AskHeard, Claims, Doubted, Heard, Held, Wanted

__all__ = ["BLOBS", "Bucket", "Guard", "Rate"]

STRIKES = 3
MEMORY = 60.0  # seconds in which the strikes must fall
FIRST = 30.0  # seconds of the first refusal
LONGEST = 3600.0
NOTE_EVERY = 60.0  # seconds between two notes of one kind about one peer
_ROSTER_BYTES = 1 << 12  # of rosters are as much work as a signature


@dataclass(frozen=True, slots=True)
class Rate:
    """So many at once, and so many a second for ever."""

    burst: float
    per_second: float


BLOBS = Rate(60, 2)  # a fetch asks once, and once more after each cut
_RATES: dict[type, Rate] = {
    Want: Rate(1 << 15, 1 << 13),  # facts asked for
    Wanted: Rate(1 << 15, 1 << 13),
    Have: Rate(1 << 16, 1 << 14),  # names to compare
    Held: Rate(1 << 16, 1 << 14),
    Digest: Rate(1 << 14, 1 << 12),  # ranges to compare
    Claims: Rate(1 << 18, 1 << 14),  # bytes; a whole table has some 4000
    Beat: Rate(120, 10),  # may be answered by the names of all documents
    Facts: Rate(1 << 14, 1 << 11),  # signatures to check; rosters also by their bytes
    Leave: Rate(10, 1 / NOTE_EVERY),  # each goodbye, and each coming back, is noted
    AskCheckpoints: Rate(60, 2),
    AskWitness: Rate(60, 2),
    Witness: Rate(1 << 12, 1 << 6),  # headers to sign again
    AskHeard: Rate(1 << 9, 1 << 6),  # suspects: all members once a second, and twice that
    Heard: Rate(1 << 9, 1 << 6),
    Addresses: Rate(256, 8),  # members; where each is said to be is stored and tried
    Doubted: Rate(60, 4),  # answered by beats to all, once a second
}


@dataclass(slots=True)
class Bucket:
    """The tokens of one peer for one kind of question; starts full.

    Attributes:
        rate: How it fills.
        tokens: What is there; below 0 is owed.
        at: When that was computed, seconds.
    """

    rate: Rate
    tokens: float
    at: float

    @classmethod
    def full(cls, rate: Rate, now: float) -> Bucket:
        """One that holds a burst."""
        return cls(rate, rate.burst, now)

    def take(self, cost: float, now: float) -> bool:
        """Take out `cost`, or owe it; whether it was there."""
        filled = self.tokens + (now - self.at) * self.rate.per_second
        self.tokens = max(min(self.rate.burst, filled) - cost, -2 * self.rate.burst)
        self.at = now
        return self.tokens >= 0

    @property
    def is_overdrawn(self) -> bool:
        """Whether a whole burst is owed."""
        return self.tokens < -self.rate.burst


@dataclass(slots=True)
class _Record:
    buckets: dict[type, Bucket] = field(default_factory=dict)
    strikes: deque[float] = field(default_factory=lambda: deque(maxlen=STRIKES))
    refusals: int = 0
    until: float = float("-inf")
    is_refused: bool = False
    noted: float = float("-inf")
    told: dict[str, float] = field(default_factory=dict)  # kind of note -> when


def _cost(message: Message) -> float:
    """What it takes to answer, in the unit of its rate; at least 1."""
    match message:
        case Want() | Have():
            return max(1, len(message.names) // NAME_BYTES)
        case Digest():
            return max(1, len(message.ranges))
        case Facts():
            count = len(message.deltas) + len(message.rosters) + len(message.proofs)
            return max(1, count + sum(map(len, message.rosters)) / _ROSTER_BYTES)
        case Witness():
            return max(1, len(message.headers))
        case Wanted() | Held():
            return max(1, sum(8 * len(portion.seats) for portion in message.portions))
        case Addresses() | AskHeard() | Heard():
            return max(1, len(message.ages if isinstance(message, Heard) else message.peers))
        case Claims():
            return max(1, sum(len(records) for _, records in message.groups))
        case _:
            return 1


class Guard:
    """See the module docstring.

    Args:
        membership: The table of peers.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._records: dict[str, _Record] = {}
        self._next_release = float("inf")

    def _record(self, peer_id: str) -> _Record:
        return self._records.setdefault(peer_id, _Record())

    def turned_away(self, peer_id: str, now: float) -> Disconnect | None:
        """Why nothing is heard from this peer now; None if it is."""
        peer = self._membership.get(peer_id)
        if peer is None or peer.state is State.REVOKED:
            return Disconnect(peer_id, "not on the roster", blame=False)
        record = self._records.get(peer_id)
        if record is not None and now < record.until:
            return Disconnect(peer_id, "refused for a while", blame=False)
        return None

    def weigh(self, peer: Peer, message: Message, now: float) -> list[Effect] | None:
        """None if the message may be answered; else it is dropped, with these effects.

        Raises:
            RemoteProtocolError: The peer asks far too much.
        """
        rate = _RATES.get(type(message))
        if rate is None:
            return None
        record = self._record(peer.peer_id)
        bucket = record.buckets.setdefault(type(message), Bucket.full(rate, now))
        if bucket.take(_cost(message), now):
            return None
        if bucket.is_overdrawn:
            bucket.tokens = 0.0  # the debt is paid by the blame
            raise RemoteProtocolError(f"far too many questions ({type(message).__name__})")
        if now < record.noted + NOTE_EVERY:
            return []
        record.noted = now
        what = {"peer": peer.peer_id, "name": peer.name, "question": type(message).__name__}
        return [Note("peer.limited", what)]

    def tells(self, peer: Peer, kind: str, now: float) -> bool:
        """Whether a note of this kind about a peer is due: one a minute is enough.

        Else a member could push out of the event log what others did.
        """
        told = self._record(peer.peer_id).told
        if now < told.get(kind, float("-inf")) + NOTE_EVERY:
            return False
        told[kind] = now
        return True

    def sparing(self, peer: Peer, effects: list[Effect], now: float) -> list[Effect]:
        """What a peer's facts lead to, less the notes of refused rosters that are not due.

        It is no breach to send one: after a mistake of the stewards honest peers do.
        """
        return [
            effect
            for effect in effects
            if not isinstance(effect, Note)
            or effect.type != "roster.rejected"
            or self.tells(peer, effect.type, now)
        ]

    def blame(self, peer: Peer, reason: str, now: float) -> list[Effect]:
        """A peer broke the protocol: hang up, and after too many times refuse it for a while."""
        record = self._record(peer.peer_id)
        what = {"peer": peer.peer_id, "name": peer.name}
        effects: list[Effect] = [
            Note("peer.blamed", {**what, "reason": reason}),
            Disconnect(peer.peer_id, reason, blame=True),
        ]
        if now > record.until + LONGEST:
            record.refusals = 0  # it behaved for long enough
        record.strikes.append(now)
        if len(record.strikes) < STRIKES or now > record.strikes[0] + MEMORY:
            return effects
        seconds = min(LONGEST, FIRST * 2.0 ** min(record.refusals, 16))
        record.refusals += 1
        record.strikes.clear()
        record.until = now + seconds
        record.is_refused = True
        self._next_release = min(self._next_release, record.until)
        refused = Note("peer.refused", {**what, "seconds": seconds})
        return [*effects, refused, StopDialling(peer.peer_id)]

    def tick(self, now: float) -> list[Effect]:
        """Dial again those whose refusal is over."""
        if now < self._next_release:
            return []
        over: list[str] = []
        self._next_release = float("inf")
        for peer_id, record in self._records.items():
            if record.is_refused and record.until <= now:
                record.is_refused = False
                over.append(peer_id)
            elif record.is_refused:
                self._next_release = min(self._next_release, record.until)
        peers = [peer for p in sorted(over) if (peer := self._membership.get(p)) is not None]
        return [
            Keep(peer.peer_id, peer.ways)
            for peer in peers
            if peer.ways and peer.state not in {State.LEFT, State.REVOKED}
        ]
