"""With whom a node keeps a connection.

Up to `full_mesh` members: with everybody. In a crowd: with the next two on the ring of sorted peer
ids, which keeps the living connected and each of them closely watched by two, at the same cost
however many there are, and with a few drawn at random, which keeps the ways short;
others choose this node likewise. Who cannot be reached is replaced; from time to time one that is
absent is tried, so that two halves that lost each other meet again. Who has more neighbours than it
cares for says so (`Crowded`), and those who chose it choose others.

Invariants: at most `neighbours` + 1 peers are dialled at a time in a crowd; connections that others
made are used as well as our own; more than four times `crowded` are not held.

Source: ring successors as in Chord (Stoica et al. 2001, section 4.2); random views as in
peer sampling (Jelasity et al. 2007).
"""

from __future__ import annotations

import bisect
import random

from p2pfed.gossip.events import Disconnect, Effect, Keep, Send, StopDialling
from p2pfed.gossip.membership import Membership, Peer, State
from p2pfed.gossip.seating import Seating
from p2pfed.wire.messages import encode_message
from p2pfed.wire.spreading import Crowded

__all__ = ["Neighbours"]

SUCCESSORS = 2
AVOIDED_SECONDS = 300.0  # who could not be reached, or was crowded, is not chosen again so soon
CHECK_INTERVAL = 1.0
HELD_OUT = {State.LEFT, State.REVOKED}


class Neighbours:
    """See the module docstring.

    Args:
        membership: The table of peers.
        seating: Gives the order of the ring.
        rng: Chance for choosing.
    """

    def __init__(self, membership: Membership, seating: Seating, rng: random.Random) -> None:
        self._membership = membership
        self._live = membership.liveness
        self._seating = seating
        self._rng = rng
        self._chosen: dict[str, float] = {}  # whom we dial -> when last connected, or chosen
        self._avoided: dict[str, float] = {}  # -> until when
        self._turn: list[str] = []
        self._next_check = self._next_scout = float("-inf")
        self._trimmed = False
        self._checked = -1

    # --- whom to talk to -------------------------------------------------------------------------

    def partner(self) -> str | None:
        """The next neighbour to talk to: each in its turn, in an order drawn anew each time."""
        if not self._membership.is_crowd:
            present = sorted(p.peer_id for p in self._membership.present())
            return self._rng.choice(present) if present else None
        while True:
            if not self._turn:
                self._turn = sorted(p.peer_id for p in self._membership.present())
                self._rng.shuffle(self._turn)
            if not self._turn:
                return None
            peer = self._membership.get(self._turn.pop())
            if peer is not None and peer.connected and peer.is_present:
                return peer.peer_id

    # --- events ----------------------------------------------------------------------------------

    def located(self, peer: Peer) -> list[Effect]:
        """A peer's addresses are known, or it is there again."""
        wanted = not self._membership.is_crowd or peer.peer_id in self._chosen
        return [Keep(peer.peer_id, peer.ways)] if wanted and peer.ways else []

    def on_crowded(self, peer: Peer, now: float) -> list[Effect]:
        """A neighbour asks us to choose somebody else."""
        if not self._membership.is_crowd or len(self._membership.linked()) <= SUCCESSORS:
            return []
        self._avoided[peer.peer_id] = now + AVOIDED_SECONDS
        return [*self._drop(peer.peer_id), *self._part(peer, "it has neighbours enough")]

    def tick(self, now: float) -> list[Effect]:
        """Let time pass: replace, choose, scout, trim."""
        if not self._membership.is_crowd:
            return self._back_to_mesh()
        if now < self._next_check or (self._is_settled() and now < self._next_scout):
            return []
        self._next_check = now + CHECK_INTERVAL
        self._checked = self._membership.version
        successors = self._successors(now)
        self._membership.watch_closely(successors, now)
        effects = self._drop_unreachable(now) + self._drop_surplus(set(successors))
        wanted = [p for p in successors if p not in self._chosen]
        missing = self._live.neighbours - len(self._chosen) - len(wanted)
        wanted += self._draw(missing, set(wanted), now) if missing > 0 else []
        if now >= self._next_scout:
            self._next_scout = now + self._live.scout_interval
            wanted += self._scout(now)
        for peer_id in wanted:
            self._chosen[peer_id] = now
            effects.append(Keep(peer_id, self._membership.peers[peer_id].ways))
        return effects + self._trim()

    def _back_to_mesh(self) -> list[Effect]:
        if not self._chosen:
            return []
        self._chosen.clear()
        self._trimmed = False
        peers = [p for p in self._membership.peers.values() if p.state not in HELD_OUT]
        return [effect for peer in peers for effect in self.located(peer)]

    def _is_settled(self) -> bool:
        """Whether nothing has changed since the last check, and all that are chosen are there."""
        if self._checked != self._membership.version:
            return False
        peers = self._membership.peers
        return len(self._chosen) >= self._live.neighbours and all(
            peers[peer_id].connected for peer_id in self._chosen
        )

    # --- choosing --------------------------------------------------------------------------------

    def _usable(self, peer_id: str, now: float) -> bool:
        peer = self._membership.get(peer_id)
        if peer is None or peer.state in HELD_OUT or not (peer.ways or peer.connected):
            return False
        return now >= self._avoided.get(peer_id, now)

    def _successors(self, now: float) -> list[str]:
        """The next ones on the ring that are not known to be absent."""
        plan, found = self._seating.current(), []
        members = plan.members if plan is not None else ()
        at = bisect.bisect_right(members, self._membership.own_id)
        for step in range(min(len(members), 4 * self._live.neighbours)):
            peer_id = members[(at + step) % len(members)]
            peer = self._membership.get(peer_id)
            if peer is not None and peer.state is not State.AWAY and self._usable(peer_id, now):
                found.append(peer_id)
            if len(found) == SUCCESSORS:
                break
        return found

    def _draw(self, count: int, besides: set[str], now: float) -> list[str]:
        """Some at random that are not known to be absent."""
        plan = self._seating.current()
        members = plan.members if plan is not None else ()
        drawn: list[str] = []
        for peer_id in self._rng.sample(members, min(len(members), 16 * count)):
            peer = self._membership.get(peer_id)
            new = peer_id not in self._chosen and peer_id not in besides
            there = peer is not None and peer.state is not State.AWAY and not peer.connected
            if new and there and self._usable(peer_id, now):
                drawn.append(peer_id)
            if len(drawn) == count:
                break
        return drawn

    def _scout(self, now: float) -> list[str]:
        """One that is absent, in the hope that it is not."""
        plan = self._seating.current()
        members = plan.members if plan is not None else ()
        for peer_id in self._rng.sample(members, min(len(members), 4 * self._live.neighbours)):
            peer = self._membership.get(peer_id)
            absent = peer is not None and not peer.connected and not peer.is_present
            if absent and peer_id not in self._chosen and self._usable(peer_id, now):
                return [peer_id]
        return []

    # --- letting go ------------------------------------------------------------------------------

    def _drop_unreachable(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for peer_id, since in list(self._chosen.items()):
            peer = self._membership.get(peer_id)
            if peer is not None and peer.connected:
                self._chosen[peer_id] = now
            elif peer is None or peer.state in HELD_OUT:
                effects += self._drop(peer_id)
            elif now - since > self._live.away_after:
                self._avoided[peer_id] = now + AVOIDED_SECONDS
                effects += self._drop(peer_id)
        self._avoided = {p: until for p, until in self._avoided.items() if until > now}
        return effects

    def _drop_surplus(self, successors: set[str]) -> list[Effect]:
        """Scouts that found somebody, and successors of once, leave at random."""
        surplus = len(self._chosen) - self._live.neighbours - 1
        if surplus <= 0:
            return []
        others = sorted(set(self._chosen) - successors)
        dropped = self._rng.sample(others, min(len(others), surplus))
        return [effect for peer_id in dropped for effect in self._drop(peer_id)]

    def _drop(self, peer_id: str) -> list[Effect]:
        self._chosen.pop(peer_id, None)
        return [StopDialling(peer_id)]

    def _part(self, peer: Peer, reason: str) -> list[Effect]:
        peer.parting = True  # it is not silent: we hang up
        return [Disconnect(peer.peer_id, reason, blame=False)]

    def _trim(self) -> list[Effect]:
        """Stop dialling those that nobody chose here; ask some to choose others."""
        linked = self._membership.linked()
        effects: list[Effect] = []
        if not self._trimmed and len(linked) >= self._live.neighbours:
            self._trimmed = True
            others = [p for p in self._membership.peers if p not in self._chosen]
            effects += [StopDialling(p) for p in others]
        surplus = len(linked) - self._live.crowded
        if surplus <= 0:
            return effects
        guests = sorted(p.peer_id for p in linked if p.peer_id not in self._chosen)
        for peer_id in self._rng.sample(guests, min(len(guests), surplus)):
            self._membership.peers[peer_id].parting = True
            effects.append(Send(peer_id, encode_message(Crowded())))
            if len(linked) > 4 * self._live.crowded:
                effects += self._part(self._membership.peers[peer_id], "too many neighbours")
        return effects
