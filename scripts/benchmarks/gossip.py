"""What it costs to spread a round: bytes, control traffic and gossip ticks at 4 to 1000 members.

The cores' own talk under a driver of this file: one clock, frames with a latency, connections that
are made because a core wants them. Rounds are driven from here: all members release at once, then
ticks pass until all hold all. Signatures are left out (deltas are told apart by their names), and
frames carry a name in place of each delta, which counts with the bytes that it would have with
1 % of a million parameters released.

`bytes` is what a node receives in a round, as a multiple of (members - 1) deltas; `control` is
what is not a delta, from the release until all hold all; `seconds` is how long that takes with a
daemon's timers, which count no transfer time; `twice` is the share of deltas that arrived a second
time; `idle` is the traffic while nothing is new. `ticks` is how many contacts with a neighbour each
node made until all held all, with one contact in `TICK` seconds: longer than a node's patience with
a question that is not answered. `lossy/ticks` is the same where 10 % of all frames are lost and
20 % of all members, drawn anew each tick, are offline.

`killed` and `left` are the time until half and until 99 % of the others know that a member's
process is gone, or that it said goodbye to its neighbours.
"""

from __future__ import annotations

import datetime as dt
import heapq
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from rows import Row, parser, show

from p2pfed.errors import RemoteProtocolError
from p2pfed.gossip.core import Core
from p2pfed.gossip.events import (
    Connected,
    Disconnect,
    Disconnected,
    Effect,
    Event,
    Keep,
    LeaveNetwork,
    Received,
    Send,
    SendStored,
    SendWitness,
    StopDialling,
    Tick,
)
from p2pfed.gossip.membership import Liveness, State
from p2pfed.identity.book import RosterBook
from p2pfed.identity.keys import NodeKey
from p2pfed.identity.roster import Member, Roster, Steward
from p2pfed.identity.rules import Averaging, Outer
from p2pfed.identity.run import Run
from p2pfed.identity.signing import ROSTER, SignedDocument, fact_hash
from p2pfed.wire.delta import Delta, Header
from p2pfed.wire.messages import Facts, Witness, encode_message
from p2pfed.wire.payload import Payload, encode_payload

SIZES = (4, 16, 64, 256, 1000)
DETECTION_SIZES = (5, 20, 50, 1000)
DELTA_BYTES = 40_400  # 10^4 gaps and values, header and signature, and its place in a frame
STANDS_IN = 35  # a name in its place
LOSS, OFFLINE = 0.1, 0.2
LATENCY = (0.005, 0.05)
CONTACTS = 3  # members that everyone knows the address of
TICK = 3.0
WARM_UP, IDLE = 120.0, 20.0
ROUNDS = 3
MOST_STEPS = 400
START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


class Talker(Core):
    """The core's talk without its rounds: these are driven from outside."""

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event."""
        return self._on_event(event, now)


@dataclass
class Node:
    """One member and what it received."""

    core: Talker
    up: bool = True
    online: bool = True
    wanted: dict[str, None] = field(default_factory=dict)
    links: dict[str, None] = field(default_factory=dict)
    control: int = 0
    deltas: int = 0


class Crowd:
    """All members, the wires between them, and one clock.

    Args:
        size: How many members.
        live: The cores' timers.
        step: Seconds between two ticks of a core.
        seed: Repeats it.
    """

    def __init__(
        self, size: int, *, live: Liveness | None = None, step: float = 0.25, seed: int = 0
    ) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.loss = 0.0
        self.step = step
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self._arrival: dict[tuple[str, str], float] = {}
        self.known: dict[bytes, Delta] = {}
        self.book = book_of(size)
        self.run = run_of(self.book)
        assert self.book.current is not None
        members = [m.peer_id for m in self.book.current.members]
        self.nodes = {peer: Node(self._core(peer, live or Liveness(), seed)) for peer in members}
        for node in self.nodes.values():
            node.core.start_run(self.run)
            node.wanted = dict.fromkeys(members[:CONTACTS])
            node.wanted.pop(node.core.own_id, None)
        for node in self.nodes.values():
            self._later(self.rng.uniform(0, step), self._tick, node)

    def _core(self, peer: str, live: Liveness, seed: int) -> Talker:
        return Talker(
            own_id=peer,
            sign=lambda _data: bytes(64),
            book=self.book,
            rng=random.Random(f"{seed}/{peer}"),
            addresses=(f"/dns4/{peer[-12:]}.example.org/tcp/4001",),
            liveness=live,
            read_delta=self._read,
        )

    def _read(self, name: bytes) -> Delta:
        delta = self.known.get(name)
        if delta is None:
            raise RemoteProtocolError("no such delta")
        return delta

    # --- time ------------------------------------------------------------------------------------

    def _later(self, delay: float, action: Callable[..., None], *arguments: Any) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now + delay, self._count, action, arguments))

    def pass_time(self, seconds: float) -> None:
        """Let the world go on."""
        end = self.now + seconds
        while self._heap and self._heap[0][0] <= end:
            self.now, _, action, arguments = heapq.heappop(self._heap)
            action(*arguments)
        self.now = end

    def _tick(self, node: Node) -> None:
        if not node.up:
            return
        for peer in node.wanted:
            if peer not in node.links:
                self._dial(node, self.nodes[peer])
        self.give(node, Tick(START + dt.timedelta(seconds=self.now)))
        self._later(self.step, self._tick, node)

    # --- connections and frames ------------------------------------------------------------------

    def _dial(self, one: Node, other: Node) -> None:
        if other.up and one.online and other.online:
            one.links[other.core.own_id] = other.links[one.core.own_id] = None
            delay = 3 * self.rng.uniform(*LATENCY)
            self._later(delay, self.give, one, Connected(other.core.own_id))
            self._later(delay, self.give, other, Connected(one.core.own_id))

    def hang_up(self, one: Node, other: Node) -> None:
        """The connection is gone."""
        if one.links.pop(other.core.own_id, 0) is None:
            del other.links[one.core.own_id]
            self._later(0.0, self.give, one, Disconnected(other.core.own_id))
            self._later(0.0, self.give, other, Disconnected(one.core.own_id))

    def cut(self, node: Node) -> None:
        """All its connections are reset."""
        for peer in list(node.links):
            self.hang_up(node, self.nodes[peer])

    def kill(self, node: Node) -> None:
        """Its process is gone."""
        node.up = False
        self.cut(node)

    def draw_offline(self, share: float) -> None:
        """A share of all members is offline from now on, all others are not."""
        for node in self.nodes.values():
            node.online = self.rng.random() >= share
            if not node.online:
                self.cut(node)

    def give(self, node: Node, event: Event) -> None:
        """Hand an event to a node and carry out what it says."""
        if not node.up:
            return
        for effect in node.core.handle(event, self.now):
            match effect:
                case Send():
                    self._send(node, effect.peer, effect.frame, 0)
                case SendStored():
                    message = Facts(effect.deltas, effect.rosters, effect.proofs)
                    self._send(node, effect.peer, encode_message(message), len(effect.deltas))
                case Keep():
                    node.wanted[effect.peer] = None
                case StopDialling():
                    node.wanted.pop(effect.peer, None)
                case SendWitness():
                    self._send(node, effect.peer, encode_message(Witness(())), 0)
                case Disconnect():
                    self.hang_up(node, self.nodes[effect.peer])
                case _:
                    pass

    def _send(self, node: Node, peer: str, frame: bytes, deltas: int) -> None:
        other = self.nodes[peer]
        if peer not in node.links:
            return
        if self.loss and self.rng.random() < self.loss:
            return
        way = (node.core.own_id, peer)
        arrival = max(self._arrival.get(way, 0.0) + 1e-6, self.now + self.rng.uniform(*LATENCY))
        self._arrival[way] = arrival
        self._later(arrival - self.now, self._receive, other, way, frame, deltas)

    def _receive(self, other: Node, way: tuple[str, str], frame: bytes, deltas: int) -> None:
        if way[0] not in other.links:
            return
        other.deltas += deltas
        other.control += len(frame) - STANDS_IN * deltas
        self.give(other, Received(way[0], frame))

    # --- rounds ----------------------------------------------------------------------------------

    def release(self, round_: int) -> None:
        """Every member releases its delta of a round now."""
        for node in self.nodes.values():
            delta = delta_of(self.run, self.book, round_, node.core.own_id)
            self.known[delta.fact] = delta
            assert node.core.progress is not None
            node.core.progress.round = round_
            for effect in node.core._intake.delta(delta):  # noqa: SLF001 - as a release does
                if isinstance(effect, Send):
                    self._send(node, effect.peer, effect.frame, 0)

    def holders(self, round_: int) -> int:
        """How many hold all of a round."""
        return sum(
            len(facts.origins(round_)) == len(self.nodes)
            for node in self.nodes.values()
            if (facts := node.core.facts) is not None
        )

    def reset(self) -> None:
        """Count from here."""
        for node in self.nodes.values():
            node.control = node.deltas = 0


# --- who and what --------------------------------------------------------------------------------


def book_of(size: int) -> RosterBook:
    """A believed roster of so many training members."""
    seed = bytes([200]) * 32
    steward = Steward("steward", NodeKey(seed).public_key)
    expires = START + dt.timedelta(days=365)
    first = Roster.found("bench", stewards=[steward], threshold=1, expires=expires)
    members = [
        Member(f"h{i}", NodeKey((i + 1).to_bytes(32, "big")).peer_id, ("train",), 100)
        for i in range(size)
    ]
    book = RosterBook()
    for draft in (first, Roster.decode(first.encode()).next(members=members)):
        book.add(SignedDocument(draft.encode()).signed_by(seed, ROSTER).encode())
    return book


def run_of(book: RosterBook) -> Run:
    """A run in which everybody releases in every round."""
    assert book.network_id is not None
    draft = Run(
        name="bench",
        network_id=book.network_id,
        task="bench",
        task_id=bytes(32),
        genesis=bytes(32),
        num_parameters=16,
        rounds=50,
        grid_bits=12,
        mechanism="none",
        unit="none",
        epsilon=Fraction(0),
        delta=Fraction(0),
        clip=Fraction(1),
        block_size=1,
        segment_blocks=1,
        select_share=Fraction(0),
        top_fraction=Fraction(1),
        outer=Outer("fedavg", 1.0),
        robust="none",
        quorum=0.8,
        min_live=0.5,
        deadline_s=60.0,
        min_round_interval_s=0.0,
        averaging=Averaging(committee=1024),
    )
    return Run.decode(draft.encode())


PAYLOAD = encode_payload(Payload(np.arange(4), np.ones(4, np.int16)), num_parameters=16)


def delta_of(run: Run, book: RosterBook, round_: int, origin: str) -> Delta:
    """An unsigned delta."""
    assert book.current is not None
    header = Header(
        run_id=run.run_id,
        round=round_,
        origin=origin,
        roster_hash=book.current.hash,
        view_hash=bytes(32),
        mechanism="none",
        spent_nano_rho=0,
        releases=round_ + 1,
        ledger_head=bytes(32),
        payload_hash=fact_hash(PAYLOAD),
        num_released=4,
    )
    return Delta.make(header, PAYLOAD, lambda _data: bytes(64))


# --- measures ------------------------------------------------------------------------------------


def spread(crowd: Crowd, round_: int, step: float, *, offline: float = 0.0) -> float:
    """One round until all hold all; returns how many steps of so many seconds it took."""
    crowd.reset()
    crowd.release(round_)
    steps = 0
    while crowd.holders(round_) < len(crowd.nodes) and steps < MOST_STEPS:
        crowd.draw_offline(offline)
        crowd.pass_time(step)
        steps += 1
    crowd.draw_offline(0.0)
    return steps


def measured(size: int) -> list[Row]:
    """All rows of one size."""
    crowd = Crowd(size, seed=size)
    crowd.pass_time(WARM_UP)
    control, deltas, seconds = [], [], []
    for round_ in range(ROUNDS):
        seconds.append(spread(crowd, round_, 0.25) / 4)
        control.append(statistics.mean(n.control for n in crowd.nodes.values()))
        crowd.pass_time(1.0)  # what is still on its way
        deltas.append(statistics.mean(n.deltas for n in crowd.nodes.values()))
        crowd.pass_time(20.0)
    crowd.reset()
    crowd.pass_time(IDLE)
    idle = statistics.mean(n.control for n in crowd.nodes.values()) / IDLE
    slow = Liveness(gossip_interval=TICK, brisk_interval=TICK)
    crowd = Crowd(size, live=slow, step=TICK, seed=size)
    crowd.pass_time(WARM_UP)
    ticks = max(spread(crowd, round_, TICK) for round_ in range(ROUNDS))
    crowd.loss = LOSS
    lossy = max(spread(crowd, ROUNDS + r, TICK, offline=OFFLINE) for r in range(ROUNDS))
    base = (size - 1) * DELTA_BYTES
    received = statistics.median(deltas) * DELTA_BYTES + statistics.median(control)
    twice = 100 * (statistics.median(deltas) / (size - 1) - 1)
    return [
        Row(f"{size}/bytes", received / 1e6, "MB", "(N-1) deltas", received / base, "lower"),
        Row(f"{size}/control", statistics.median(control) / 1000, "kB", better="lower"),
        Row(f"{size}/twice", twice, "%", better="lower"),
        Row(f"{size}/seconds", statistics.median(seconds), "s", better="lower"),
        Row(f"{size}/ticks", ticks, "ticks", better="lower"),
        Row(f"{size}/lossy/ticks", lossy, "ticks", better="lower"),
        Row(f"{size}/idle", idle, "B/s", better="lower"),
    ]


def found(size: int) -> list[Row]:
    """How long it takes to know that a member is gone."""
    rows = []
    for what, act, states in (
        ("killed", lambda crowd, node: crowd.kill(node), {State.SUSPECT, State.AWAY}),
        ("left", lambda crowd, node: crowd.give(node, LeaveNetwork()), {State.LEFT}),
    ):
        crowd = Crowd(size, seed=size)
        crowd.pass_time(WARM_UP)
        gone = list(crowd.nodes.values())[size // 2]
        others = [n for n in crowd.nodes.values() if n is not gone]
        act(crowd, gone)
        crowd.pass_time(0.0)
        gone.up = False
        began, times = crowd.now, {}
        while len(times) < 2 and crowd.now < began + 120:
            crowd.pass_time(0.5)
            know = sum(n.core.membership.peers[gone.core.own_id].state in states for n in others)
            for share in (0.5, 0.99):
                if know >= share * len(others):
                    times.setdefault(share, crowd.now - began)
        for share in (0.5, 0.99):
            name = f"{size}/{what}/{'half' if share == 0.5 else 'all'}"
            rows.append(Row(name, times.get(share, float("inf")), "s", better="lower"))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    options.add_argument("--detection", type=int, nargs="*", default=list(DETECTION_SIZES))
    args = options.parse_args(argv)
    for size in args.sizes:
        show(measured(size), as_json=args.json)
    for size in args.detection:
        show(found(size), as_json=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
