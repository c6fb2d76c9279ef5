"""What is said about the presence of members that are not our neighbours.

In a large network nobody is connected to everybody. Each member claims of itself whether it is
there, in which run, and whether it contributes; its neighbours claim that it is silent or that it
left. A claim bears a stamp: a count that only its subject raises, and the kind. The greater stamp
wins, so claims merge in any order; who hears itself called silent or gone, and is not, raises its
count, and that outweighs what was said. News is told in the next few contacts (rumours); now and
then two neighbours compare all that they have heard.

Claims are hearsay, not signed. A lying peer can make others believe that a member is silent or
left until that member's next word; they then do not wait for it, and nothing else follows: its
deltas count as ever. A claim against a member that speaks to us is passed on to that member alone.

Invariants: the table has one claim per member of the roster; merging is commutative, associative
and idempotent; a quiet network sends nothing but a digest now and then.

Source: incarnation numbers and infection-style dissemination of SWIM (Das, Gupta, Motivala 2002,
sections 4.1 and 4.2), with a periodic comparison as in memberlist.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from p2pfed.errors import RemoteProtocolError
from p2pfed.gossip.seating import Plan
from p2pfed.wire.spreading import MAX_PORTIONS, TABLE_DIGEST_BYTES, Claims

__all__ = ["Claim", "Hearsay", "Kind"]

MAX_STAMP = 1 << 56
NEWS_AT_ONCE = 128  # claims in one message of news
_SUM = (1 << 8 * TABLE_DIGEST_BYTES) - 1
EXTRA_CONTACTS = 3  # a rumour is told log2(members) times and this many more


class Kind(IntEnum):
    """What is claimed; of one count the greater wins."""

    IDLE = 0  # there, and gives nothing
    CONTRIBUTES = 1
    SILENT = 2
    LEFT = 3


_KINDS = tuple(Kind)  # Kind(n) costs a microsecond, and a table has a thousand claims


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim about one member.

    Attributes:
        stamp: 4 * count + kind.
        run: First 4 bytes of the id of the run that it takes part in, or empty.
    """

    stamp: int
    run: bytes = b""

    @property
    def kind(self) -> Kind:
        """What is claimed."""
        return _KINDS[self.stamp & 3]

    @property
    def count(self) -> int:
        """How often its subject has spoken up."""
        return self.stamp >> 2

    def of_kind(self, kind: Kind) -> Claim:
        """The same count, with this to say."""
        return Claim(self.stamp & ~3 | kind, self.run)


class Hearsay:
    """The claims that this node has heard, and what it says of itself.

    Args:
        own_id: This node.
    """

    def __init__(self, own_id: str) -> None:
        self.table: dict[str, Claim] = {}
        self._own_id = own_id
        self._news: dict[str, int] = {}  # peer -> in how many contacts it is still to be told
        self._sum = 0  # of the hashes of all claims: an order-free digest that is cheap to keep

    # --- own words -------------------------------------------------------------------------------

    def speak(self, kind: Kind, run: bytes) -> None:
        """Say this of ourselves, unless it has been said."""
        said = self.table.get(self._own_id)
        if said is None or (said.kind, said.run) != (kind, run):
            count = said.count + 1 if said is not None else 1
            self._believe(self._own_id, Claim(4 * count + kind, run))

    def accuse(self, peer: str, kind: Kind) -> None:
        """Say of a member that it is silent, or left."""
        claim = self.table.get(peer, Claim(0))
        if claim.kind < kind:
            self._believe(peer, claim.of_kind(kind))

    def knows_better(self, peer: str, claim: Claim) -> bool:
        """Whether a claim tells nothing new."""
        held = self.table.get(peer)
        return held is not None and (held.stamp, held.run) >= (claim.stamp, claim.run)

    def hear(self, peer: str, claim: Claim) -> None:
        """Believe a claim that is news; our own name is spoken for by ourselves."""
        own = self.table.get(self._own_id) if peer == self._own_id else None
        if own is not None:
            self._believe(peer, Claim(4 * (claim.count + 1) + own.kind, own.run))
        elif peer != self._own_id:
            self._believe(peer, claim)

    def forget_strangers(self, members: Iterable[str]) -> None:
        """Keep what is said of members only."""
        kept = set(members)
        for peer in [peer for peer in self.table if peer not in kept]:
            self._sum = self._sum - _hash(peer, self.table.pop(peer)) & _SUM
            self._news.pop(peer, None)

    def _believe(self, peer: str, claim: Claim) -> None:
        if claim.stamp >= MAX_STAMP:
            return
        held = self.table.get(peer)
        gone = _hash(peer, held) if held is not None else 0
        self._sum = self._sum - gone + _hash(peer, claim) & _SUM
        self.table[peer] = claim
        self._news[peer] = len(self.table).bit_length() + EXTRA_CONTACTS

    # --- messages --------------------------------------------------------------------------------

    @property
    def has_news(self) -> bool:
        """Whether there is something to tell."""
        return bool(self._news)

    def news(self, plan: Plan) -> Claims:
        """What is to be told in this contact; counted as told."""
        told = list(itertools.islice(self._news, NEWS_AT_ONCE))
        for peer in told:
            left = self._news.pop(peer) - 1
            if left:
                self._news[peer] = left  # behind the others
        return self._message(plan, told, b"")

    def everything(self, plan: Plan, *, compare: bool) -> Claims:
        """All that was heard; `compare` asks for what it lacks."""
        return self._message(plan, self.table, self.digest() if compare else b"")

    def question(self, plan: Plan) -> Claims:
        """The digest alone: is it all that you have heard?"""
        return Claims(plan.prefix, self.digest(), ())

    def digest(self) -> bytes:
        """Digest of the table: the sum of its claims' hashes, 8 bytes."""
        return self._sum.to_bytes(TABLE_DIGEST_BYTES, "little")

    def _message(self, plan: Plan, peers: Iterable[str], digest: bytes) -> Claims:
        groups: dict[bytes, list[tuple[int, int]]] = {}
        for peer in peers:
            seat, claim = plan.seat.get(peer), self.table[peer]
            if seat is not None:
                groups.setdefault(claim.run, []).append((seat, claim.stamp))
        common = sorted(groups, key=lambda run: (-len(groups[run]), run))[:MAX_PORTIONS]
        packed = tuple((run, _packed(sorted(groups[run]))) for run in common)
        return Claims(plan.prefix, digest, packed)

    def about(self, plan: Plan, peer: str, claim: Claim) -> Claims:
        """One claim, for the one that it is about."""
        record = _packed([(plan.seat[peer], claim.stamp)])
        return Claims(plan.prefix, b"", ((claim.run, record),))

    @staticmethod
    def read(message: Claims, plan: Plan) -> list[tuple[str, Claim]]:
        """The claims of a message.

        Raises:
            RemoteProtocolError: A seat beyond the roster, or a stamp out of range.
        """
        found = []
        for run, data in message.groups:
            for seat, stamp in _unpacked(data):
                if seat >= plan.size or stamp >= MAX_STAMP:
                    raise RemoteProtocolError("claims: a seat or a stamp is out of range")
                found.append((plan.members[seat], Claim(stamp, run)))
        return found


def _hash(peer: str, claim: Claim) -> int:
    data = f"{peer} {claim.stamp} ".encode() + claim.run
    return int.from_bytes(hashlib.blake2b(data, digest_size=TABLE_DIGEST_BYTES).digest(), "little")


def _packed(records: list[tuple[int, int]]) -> bytes:
    """Seat gaps and stamps, each as a little-endian base-128 number."""
    data, last = bytearray(), -1
    for seat, stamp in records:
        data += _number(seat - last - 1) + _number(stamp)
        last = seat
    return bytes(data)


def _number(value: int) -> bytes:
    data = bytearray()
    while value >= 128:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes(data) + bytes([value])


def _unpacked(data: bytes) -> list[tuple[int, int]]:
    numbers, number, shift = [], 0, 0
    for byte in data:
        number |= (byte & 127) << shift
        shift += 7
        if shift > 63:
            raise RemoteProtocolError("claims: a number is too long")
        if byte < 128:
            numbers.append(number)
            number = shift = 0
    if shift or len(numbers) % 2:
        raise RemoteProtocolError("claims: a record is cut short")
    records, seat = [], -1
    for gap, stamp in zip(numbers[::2], numbers[1::2], strict=True):
        seat += gap + 1
        records.append((seat, stamp))
    return records
