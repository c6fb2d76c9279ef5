"""Who releases in a round: everybody, or a rotating committee drawn by a public hash.

Above 64 training members, or by choice of the run, only the m members with the lowest
H(run id, round, peer id) release; the others receive, fold and relay. So the bytes of a round do
not grow with the network, and under noise each member spends its budget on fewer, cleaner releases.

Invariant: the committee is a function of the run id, the round and the roster that a delta names,
the same on every node. It is no defence by itself: members know long before when they sit, and one
that names an older roster sits where that one puts it (as it weighs what that one says), until the
stewards revoke it; so the robust rule has to hold within a committee.

Source: partial participation as in McMahan et al. 2017 (arXiv:1602.05629, section 3), drawn by a
hash in place of a server.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from p2pfed.identity.roster import Roster
from p2pfed.identity.run import Run

__all__ = ["AUTOMATIC", "Committees", "seats"]

AUTOMATIC = 64  # from so many training members on a committee of this size is drawn
REMEMBERED = 8


def seats(run: Run, num_training: int) -> int:
    """How many of so many training members release in one round."""
    return min(num_training, run.averaging.committee or AUTOMATIC)


class Committees:
    """The committees of one run.

    Args:
        run: Gives its id and the number of seats.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._drawn: OrderedDict[tuple[bytes, int], frozenset[str]] = OrderedDict()

    def of(self, roster: Roster, round_: int) -> frozenset[str]:
        """Peer ids of the members that release in this round."""
        found = self._drawn.get((roster.hash, round_)) or self._drawn.get((roster.hash, -1))
        if found is not None:
            return found
        training = _training(roster)
        if seats(self._run, len(training)) == len(training):
            round_ = -1
        key = (roster.hash, round_)
        if key not in self._drawn:
            self._drawn[key] = self._draw(training, round_)
            if len(self._drawn) > REMEMBERED:
                self._drawn.popitem(last=False)
        return self._drawn[key]

    def _draw(self, training: list[str], round_: int) -> frozenset[str]:
        if round_ < 0:
            return frozenset(training)
        seed = self._run.run_id + round_.to_bytes(8, "little")

        def lot(peer: str) -> bytes:
            text = seed + peer.encode()
            return hashlib.blake2b(text, digest_size=16, person=b"p2pfed-seat").digest()

        return frozenset(sorted(training, key=lot)[: seats(self._run, len(training))])


def _training(roster: Roster) -> list[str]:
    return [m.peer_id for m in roster.members if m.trains]
