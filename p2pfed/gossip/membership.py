"""Who is there: alive, suspect, away, left, revoked.

*Left is not failed*: a peer that said goodbye is neither waited for nor dialled; a peer that is
silent for longer than its path explains (`silence`) is suspect, then away, and dialled for ever.
How long that takes depends on how well this node itself keeps up (`health`). Up to `full_mesh`
members each one watches all others and asks some about the suspect (`probing`). In a larger network
(`is_crowd`) a node watches its neighbours, the next ones on the ring closely, and believes what is
claimed of the others (`claims`): a member of whom silence is claimed is suspect, and away if it
does not speak up in time.

Invariants: any message of a member makes it alive again; in a mesh nobody is suspect or away that
this node hears itself, whoever says so; only the roster makes it a member or revokes it; time costs
nothing where nothing is due. `version` grows whenever anybody's presence, run or willingness
changes.

Source: suspicion before verdict as in SWIM (Das, Gupta, Motivala 2002, section 4.2).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from p2pfed.gossip.asked import PATIENCE
from p2pfed.gossip.claims import Claim, Kind
from p2pfed.gossip.health import LocalHealth
from p2pfed.gossip.silence import Doubt, RoundTrip, away_after, suspect_after
from p2pfed.identity.roster import Roster
from p2pfed.wire.beat import Beat
from p2pfed.wire.versions import NEWEST

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
    """How often a node speaks, how long silence may last, with how many it talks; seconds.

    Attributes:
        beat_interval: Between beats to all that are connected; in a crowd, only if they say
            anything new.
        suspect_after: Least silence until a peer is suspect; longer on a long path.
        away_after: Most silence until it is away.
        away_least: Least silence until it is away, if enough others do not hear it either.
        gossip_interval: Between two contacts with random neighbours.
        brisk_interval: Between two contacts while deltas of a young round are new.
        digest_interval: Between digests of all rounds; else the newest rounds are shown.
        address_interval: Between two messages of news about addresses.
        patience: Until a fact is asked of somebody else; longer for runs with large deltas.
        introduce_interval: Between beats that say nothing new; others are pings.
        full_mesh: Up to so many members everybody is connected to everybody.
        neighbours: How many a node chooses to be connected to in a crowd.
        crowded: With more neighbours than this it asks some to choose others.
        quiet_after: In a crowd, a neighbour silent for so long is sent a beat.
        scout_interval: In a crowd, between two attempts to reach a member that is absent.
        compare_interval: In a crowd, between two comparisons of what was heard of the others.
    """

    beat_interval: float = 1.0  # 200 bytes a second and peer
    suspect_after: float = 2.5  # two missed beats; with a tick it is seen within 3 s
    away_after: float = 14.5  # with a tick: within 15 s, wherever the peer is
    away_least: float = 8.0  # measured: a busy two-core node stalls up to 3 s
    gossip_interval: float = 1.0
    brisk_interval: float = 0.25
    digest_interval: float = 5.0
    address_interval: float = 10.0
    patience: float = PATIENCE
    introduce_interval: float = 10.0
    full_mesh: int = 32
    neighbours: int = 8
    crowded: int = 32
    quiet_after: float = 20.0
    scout_interval: float = 10.0
    compare_interval: float = 30.0


@dataclass(slots=True)
class Peer:
    """One member as this node sees it; times are of the core's clock, seconds."""

    peer_id: str
    name: str
    state: State = State.UNKNOWN
    connected: bool = False
    watched: bool = False  # in a crowd: heard by ourselves, so the verdict is ours
    parting: bool = False  # the connection will end, and that means nothing
    close: bool = False  # in a crowd: pinged every beat
    probed: bool = False  # the same until it is heard, since others say that it is silent
    last_heard: float = float("-inf")
    silent_from: float = float("-inf")  # its silence counts from here: later if we stood still
    linked_at: float = float("-inf")
    doubt: Doubt | None = None  # while it is suspect
    back_at: float = float("-inf")  # when it was last heard again after that
    vouched: int = -1  # newest round of which a delta came while it was not known to be there
    claim: Claim | None = None
    rtt: float | None = None  # the last one
    path: RoundTrip = field(default_factory=RoundTrip)
    beat: Beat | None = None
    addresses: tuple[str, ...] = ()  # what it told us itself
    hearsay: tuple[str, ...] = ()  # what others told, the newest first
    sent_at: dict[int, float] = field(default_factory=dict)
    version: int = NEWEST  # of the wire, on the connection that there is or was
    speaks: tuple[int, ...] | None = None  # versions, as far as it told, if none of them is ours

    @property
    def ways(self) -> tuple[str, ...]:
        """Where to dial it: its own word first."""
        return tuple(dict.fromkeys((*self.addresses, *self.hearsay)))

    @property
    def is_present(self) -> bool:
        """Whether others may still wait for it."""
        return self.state is State.ALIVE or self.state is State.SUSPECT  # enums hash slowly


class Membership:
    """The table of peers; every method returns the peers whose state changed.

    Attributes:
        own_id: This node.
        health: How well this node itself keeps up.
        peers: By peer id, everyone who is or was a member.
        version: Grows with every change that matters to who is waited for.
        is_crowd: Whether there are too many members for everybody to be connected to everybody.
    """

    def __init__(self, own_id: str, liveness: Liveness) -> None:
        self.own_id = own_id
        self.liveness = liveness
        self.health = LocalHealth(liveness.beat_interval)
        self.peers: dict[str, Peer] = {}
        self.version = 0
        self.is_crowd = False
        self._linked: dict[str, Peer] = {}
        self._timed: dict[str, Peer] = {}  # alive or suspect, and to be judged by time
        self._next_verdict = float("inf")
        self._factor = self.health.factor  # with which that was computed

    def adopt(self, roster: Roster) -> list[Peer]:
        """Bring the table in line with a roster."""
        changed = []
        for member in roster.members:
            if member.peer_id == self.own_id:
                continue
            peer = self.peers.setdefault(member.peer_id, Peer(member.peer_id, member.name))
            peer.name = member.name
            if peer.state is State.REVOKED:
                self._turn(peer, State.UNKNOWN)
                changed.append(peer)
        members = {m.peer_id for m in roster.members}
        for peer in self.peers.values():
            if peer.peer_id not in members and peer.state is not State.REVOKED:
                self._turn(peer, State.REVOKED)
                changed.append(peer)
        self.is_crowd = len(members) > self.liveness.full_mesh
        self.version += 1
        self._retime()
        return changed

    def get(self, peer_id: str) -> Peer | None:
        """The peer with this id, if it is or was a member."""
        return self.peers.get(peer_id)

    # --- what is heard ---------------------------------------------------------------------------

    def link(self, peer: Peer, now: float = 0.0) -> None:
        """A connection to a peer is up."""
        peer.connected, peer.linked_at = True, now
        self._linked[peer.peer_id] = peer
        self.version += 1

    def unlink(self, peer: Peer, now: float) -> None:
        """The connection to a peer is gone; in a crowd its silence begins now."""
        peer.connected = False
        peer.sent_at.clear()
        self._linked.pop(peer.peer_id, None)
        self.version += 1
        if peer.parting:
            peer.watched = peer.parting = False
            self._time(peer)
        if self.is_crowd and peer.watched:
            peer.silent_from = now
            self._next_verdict = min(self._next_verdict, now)

    def beat(self, peer: Peer, beat: Beat) -> None:
        """Take in a peer's beat."""
        held = peer.beat
        if held is None or (held.run_id, held.contributes) != (beat.run_id, beat.contributes):
            self.version += 1
        peer.beat = beat

    def heard(self, peer: Peer, now: float) -> bool:
        """A member spoke; returns whether that changed its state."""
        peer.last_heard = peer.silent_from = now
        peer.probed = False
        if peer.state is State.REVOKED:
            return False
        was_watched = peer.watched
        peer.watched = was_watched or peer.connected  # a frame may come after the hanging up
        if peer.state is State.ALIVE:
            if not was_watched:
                self._time(peer)
            return False
        self._turn(peer, State.ALIVE, now)
        return True

    def hears(self, peer: Peer) -> bool:
        """Whether we need nobody's word that this peer is there."""
        return peer.connected and peer.watched and peer.state is State.ALIVE

    def left(self, peer: Peer) -> bool:
        """A member said goodbye; returns whether that changed its state."""
        if peer.state in {State.LEFT, State.REVOKED}:
            return False
        peer.watched = False
        self._turn(peer, State.LEFT)
        return True

    def claimed(self, peer: Peer, claim: Claim, now: float) -> bool:
        """Something new is claimed of a member that we do not hear ourselves."""
        peer.claim, before = claim, peer.state
        self.version += 1
        if before is State.REVOKED or self.hears(peer):
            return False
        if claim.kind is Kind.SILENT:
            state = State.SUSPECT if peer.is_present else before
            state = State.AWAY if before is State.UNKNOWN else state
        else:
            state = State.LEFT if claim.kind is Kind.LEFT else State.ALIVE
            peer.watched = False  # somebody else hears it
        self._turn(peer, state, now)
        return state is not before

    def vouch(self, peer_id: str, round_: int) -> None:
        """A delta of a member arrived: that it is there needs nobody's word in this round."""
        peer = self.peers.get(peer_id)
        if peer is not None and not peer.connected and round_ > peer.vouched:
            peer.vouched = round_
            if self.is_crowd and peer.state is not State.ALIVE:
                self.version += 1

    # --- time ------------------------------------------------------------------------------------

    def slept(self, seconds: float, now: float) -> None:
        """This node stood still: nobody was silent in that time, and nobody answered late."""
        for peer in self.peers.values():
            peer.silent_from = min(now, peer.silent_from + seconds)
            peer.linked_at = min(now, peer.linked_at + seconds)
            peer.sent_at.clear()
            if peer.doubt is not None:
                peer.doubt.since = min(now, peer.doubt.since + seconds)

    def watch_closely(self, peers: Iterable[str], now: float) -> None:
        """In a crowd: these are pinged every beat from now on, and no others."""
        wanted = set(peers)
        for peer in self.peers.values():
            if peer.peer_id in wanted and not peer.close:
                peer.silent_from = max(peer.silent_from, now)  # it had no reason to speak
                self.reconsider()
            peer.close = peer.peer_id in wanted

    def probe(self, peer: Peer, now: float) -> None:
        """In a crowd others say that this neighbour is silent: hear it now, or find so too."""
        if not (peer.close or peer.probed) and now > peer.silent_from + self.patience(peer):
            peer.probed, peer.silent_from = True, now
            self.reconsider()

    def rests(self, peer: Peer) -> bool:
        """Whether a connected peer need not speak with every beat."""
        return self.is_crowd and not (peer.close or peer.probed)

    def reconsider(self) -> None:
        """Something was learnt that may bring a verdict forward."""
        self._next_verdict = float("-inf")

    def tick(self, now: float) -> list[Peer]:
        """Let time pass: silent peers become suspect, then away."""
        if self.health.factor < self._factor:
            self.reconsider()
        self._factor = self.health.factor
        if now < self._next_verdict:
            return []
        changed = []
        for peer in list(self._timed.values()):
            for before, after in ((State.ALIVE, State.SUSPECT), (State.SUSPECT, State.AWAY)):
                if peer.state is before and now > self._verdict_at(peer):
                    self._turn(peer, after, now)
                    changed.append(peer)
        self._next_verdict = min(map(self._verdict_at, self._timed.values()), default=float("inf"))
        return changed

    def _verdict_at(self, peer: Peer) -> float:
        """When silence is long enough for the next verdict."""
        live, factor = self.liveness, self.health.factor
        if peer.doubt is not None and self.is_crowd:
            return peer.doubt.since + factor * (live.away_after - live.suspect_after)
        if peer.doubt is not None:
            since = max(peer.silent_from, peer.doubt.heard_at)
            return since + factor * away_after(live, peer.path, peer.doubt)
        rest = live.quiet_after if peer.connected and self.rests(peer) else 0.0
        return peer.silent_from + self.patience(peer) + rest

    def patience(self, peer: Peer) -> float:
        """Silence after which this peer is suspect now, seconds."""
        return self.health.factor * suspect_after(self.liveness, peer.path)

    def _turn(self, peer: Peer, state: State, now: float = 0.0) -> None:
        if state is not State.SUSPECT:
            if state is State.ALIVE and peer.state in {State.SUSPECT, State.AWAY}:
                peer.back_at = now
            peer.doubt = None
        elif peer.doubt is None:
            peer.doubt = Doubt(now)
        if state is State.AWAY:
            peer.watched = False
        peer.state = state
        self.version += 1
        self._time(peer)

    def _time(self, peer: Peer) -> None:
        """Judge a peer by time from now on, or no more: of one alive by claim others are judges."""
        by_others = self.is_crowd and peer.state is State.ALIVE and not peer.watched
        if peer.is_present and not by_others:
            self._timed[peer.peer_id] = peer
            self._next_verdict = min(self._next_verdict, self._verdict_at(peer))
        else:
            self._timed.pop(peer.peer_id, None)

    def _retime(self) -> None:
        for peer in self.peers.values():
            self._time(peer)

    # --- asking ----------------------------------------------------------------------------------

    def linked(self) -> list[Peer]:
        """Peers that are connected."""
        return list(self._linked.values())

    def suspects(self) -> list[Peer]:
        """Peers that are suspect."""
        return [p for p in self._timed.values() if p.state is State.SUSPECT]

    def present(self) -> list[Peer]:
        """Peers that are alive or suspect, and connected."""
        return [p for p in self._linked.values() if p.is_present]

    def rounds(self, run_id: bytes) -> dict[str, int]:
        """In which round of a run present peers say they are, by peer id."""
        beats = [(p.peer_id, p.beat) for p in self.present() if p.beat is not None]
        return {peer: beat.round for peer, beat in beats if beat.run_id == run_id}
