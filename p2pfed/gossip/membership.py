"""Who is there: alive, suspect, away, left, revoked.

*Left is not failed*: a peer that said goodbye is neither waited for nor dialled; a peer that fell
silent is suspect after `suspect_after` seconds, away after `away_after`, and dialled for ever.
Invariant: any message of a member makes it alive again; only the roster makes it a member or
revokes it. Beats are answered by Acks, which give the round-trip time.

Source: suspicion before verdict as in SWIM (Das, Gupta, Motivala 2002, section 4.2). Every member
is watched directly here; indirect probes and local health belong to a later, larger membership.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from p2pfed.identity.roster import Roster
from p2pfed.wire.messages import Beat

__all__ = ["Liveness", "Membership", "Peer", "State"]


class State(Enum):
    """What we know about a member's presence."""

    UNKNOWN = "unknown"  # on the roster, never heard
    ALIVE = "alive"
    SUSPECT = "suspect"
    AWAY = "away"
    LEFT = "left"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class Liveness:
    """How long silence may last, seconds."""

    beat_interval: float = 1.0  # 100 bytes a second and peer
    suspect_after: float = 4.0  # four missed beats
    away_after: float = 10.0  # measured: a busy two-core node stalls up to 3 s


@dataclass(slots=True)
class Peer:
    """One member as this node sees it; times are of the core's clock, seconds."""

    peer_id: str
    name: str
    state: State = State.UNKNOWN
    connected: bool = False
    last_heard: float = float("-inf")
    rtt: float | None = None
    beat: Beat | None = None
    addresses: tuple[str, ...] = ()
    sent_at: dict[int, float] = field(default_factory=dict)

    @property
    def is_present(self) -> bool:
        """Whether others may still wait for it."""
        return self.state in {State.ALIVE, State.SUSPECT}


class Membership:
    """The table of peers; every method returns the peers whose state changed."""

    def __init__(self, own_id: str, liveness: Liveness) -> None:
        self._own_id = own_id
        self._liveness = liveness
        self.peers: dict[str, Peer] = {}

    def adopt(self, roster: Roster) -> list[Peer]:
        """Bring the table in line with a roster."""
        changed = []
        for member in roster.members:
            if member.peer_id == self._own_id:
                continue
            peer = self.peers.setdefault(member.peer_id, Peer(member.peer_id, member.name))
            peer.name = member.name
            if peer.state is State.REVOKED:
                peer.state = State.UNKNOWN
                changed.append(peer)
        members = {m.peer_id for m in roster.members}
        for peer in self.peers.values():
            if peer.peer_id not in members and peer.state is not State.REVOKED:
                peer.state = State.REVOKED
                changed.append(peer)
        return changed

    def get(self, peer_id: str) -> Peer | None:
        """The peer with this id, if it is or was a member."""
        return self.peers.get(peer_id)

    def heard(self, peer: Peer, now: float) -> bool:
        """A member spoke; returns whether that changed its state."""
        peer.last_heard = now
        if peer.state in {State.ALIVE, State.REVOKED}:
            return False
        peer.state = State.ALIVE
        return True

    def left(self, peer: Peer) -> bool:
        """A member said goodbye; returns whether that changed its state."""
        if peer.state in {State.LEFT, State.REVOKED}:
            return False
        peer.state = State.LEFT
        return True

    def tick(self, now: float) -> list[Peer]:
        """Let time pass: silent peers become suspect, then away."""
        changed = []
        for peer in self.peers.values():
            silence = now - peer.last_heard
            if peer.state is State.ALIVE and silence > self._liveness.suspect_after:
                peer.state = State.SUSPECT
                changed.append(peer)
            if peer.state is State.SUSPECT and silence > self._liveness.away_after:
                peer.state = State.AWAY
                changed.append(peer)
        return changed

    def present(self) -> list[Peer]:
        """Peers that are alive or suspect, and connected."""
        return [p for p in self.peers.values() if p.connected and p.is_present]
