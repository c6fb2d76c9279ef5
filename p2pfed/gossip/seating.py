"""Seats: a member's place in the sorted peer ids of one roster version.

Two nodes that hold the same roster mean the same member by a seat, so that sets of members travel
as bit fields. The roster is named by the first bytes of its hash.

Invariant: a plan is a function of its roster alone; rosters that are not held have none.
"""

from __future__ import annotations

from p2pfed.identity.book import RosterBook
from p2pfed.identity.roster import Roster
from p2pfed.wire.spreading import PREFIX_BYTES

__all__ = ["Plan", "Seating"]


class Plan:
    """The seats of one roster.

    Attributes:
        prefix: The roster's name on the wire.
        members: Peer id by seat.
        seat: Seat by peer id.
    """

    def __init__(self, roster: Roster) -> None:
        self.prefix = roster.hash[:PREFIX_BYTES]
        self.members = tuple(sorted(m.peer_id for m in roster.members))
        self.seat = {peer_id: seat for seat, peer_id in enumerate(self.members)}

    @property
    def size(self) -> int:
        """How many seats there are."""
        return len(self.members)


class Seating:
    """The plans of the believed rosters.

    Args:
        book: The believed rosters; they may become more.
    """

    def __init__(self, book: RosterBook) -> None:
        self._book = book
        self._plans: dict[bytes, Plan] = {}
        self._read: set[bytes] = set()

    def current(self) -> Plan | None:
        """The plan of the newest roster."""
        roster = self._book.current
        return self.of(roster.hash[:PREFIX_BYTES]) if roster is not None else None

    def of(self, prefix: bytes) -> Plan | None:
        """The plan of the roster whose hash begins so, if it is held."""
        if prefix not in self._plans and len(self._read) != len(self._book.hashes):
            for name in sorted(self._book.hashes - self._read):
                roster = self._book.get(name)
                assert roster is not None
                self._plans[name[:PREFIX_BYTES]] = Plan(roster)
                self._read.add(name)
        return self._plans.get(prefix)
