"""Two cores in one conversation, in memory, and its record: what either of them put on the wire.

Everything is a function of the seeds: clock, chance, keys and payloads. `record` gives one line for
each frame, ``seconds sender hex``, in the order of sending; `tests/data/conversation-v1.hex` was
made so by the last release that spoke version 1 only.

Not here: folding (a model's hash stands for its chain), streams and connections.
"""

from __future__ import annotations

import datetime as dt
import random
from dataclasses import dataclass, field
from typing import Any

from consortium import Consortium, hospital, key_of, peer_of, some_payload

from p2pfed.gossip.core import Core
from p2pfed.gossip.events import (
    Connected,
    Disconnect,
    Fold,
    Folded,
    Received,
    Released,
    RosterOffered,
    Send,
    SendStored,
    SendWitness,
    StoreDelta,
    Tick,
    Train,
)
from p2pfed.gossip.witness import witness_of
from p2pfed.identity.signing import DELTA, fact_hash, sign
from p2pfed.wire.messages import Facts, encode_message
from p2pfed.wire.payload import count_released, encode_payload

STEP = 0.25
LATENCY = 0.05
WALL = dt.datetime(2026, 6, 1, tzinfo=dt.UTC)
ROUNDS = 3
SEATS = (0, 1)


def a_consortium() -> Consortium:
    """Two hospitals; the third version of the roster adds one that never comes."""
    net = Consortium(2, samples=[10, 10])
    net.grow(hospital(2, samples=0))
    return net


@dataclass
class Party:
    """One core with what its shell would hold.

    Attributes:
        blamed: Why it hung up on the other one, if it did.
    """

    index: int
    core: Core
    run: Any
    stored: dict[bytes, Any] = field(default_factory=dict)
    blamed: list[str] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)

    def perform(self, effect: Any) -> tuple[list[bytes], list[Any]]:
        """Frames for the other one, and events for this one."""
        match effect:
            case Send():
                return [effect.frame], []
            case SendStored():
                deltas = tuple(self.stored[fact].encode() for fact in effect.deltas)
                facts = Facts(deltas, effect.rosters, effect.proofs)
                return [encode_message(facts)], []
            case SendWitness():
                own = [d.signed for d in self.stored.values() if d.header.origin == effect.peer]
                newest = max(own, key=lambda signed: signed.header.round, default=None)
                shown = witness_of(effect.peer, [] if newest is None else [newest])
                return [encode_message(shown)], []
            case StoreDelta():
                self.stored[effect.delta.fact] = effect.delta
            case Disconnect() if effect.blame:
                self.blamed.append(effect.reason)
            case Train():
                self.trained.append(effect.round)
                return [], [self._released(effect.round)]
            case Fold():
                chain = effect.chain(effect.round)
                assert chain is not None
                return [], [Folded(effect.round, chain, fact_hash(chain))]
        return [], []

    def _released(self, round_: int) -> Released:
        payload = some_payload(self.run, round_, self.index)
        data = encode_payload(payload, num_parameters=self.run.num_parameters)
        return Released(round_, data, count_released(data), "none", 0, round_ + 1, bytes(32))

    @property
    def folded(self) -> tuple[int, bytes]:
        """Round and hash of its newest model."""
        progress = self.core.progress
        assert progress is not None
        assert progress.folded is not None
        return progress.folded.round, progress.folded.model_hash


def a_party(index: int, net: Consortium, versions: tuple[int, ...]) -> Party:
    """Hospital `index` in a run of three rounds, before its first connection."""
    run = net.run(rounds=ROUNDS, quorum=1.0, min_live=1.0, min_round_interval_s=1.0)
    core = Core(
        own_id=peer_of(index),
        sign=lambda data: sign(key_of(index).seed, DELTA, data),
        book=net.book(*versions),
        rng=random.Random(index),
        addresses=(f"/ip4/10.0.0.{index + 1}/tcp/4001",),
    )
    core.introduction.task_id = run.task_id
    core.start_run(run)
    return Party(index, core, run)


class TwoCores:
    """A conversation; party 1 holds an older roster than party 0 and learns the new one.

    Args:
        wire: The version that the two have agreed on; None: what `Connected` says by itself.
    """

    def __init__(self, wire: int | None = None) -> None:
        net = a_consortium()
        self.parties = (a_party(0, net, (1, 2, 3)), a_party(1, net, (1, 2)))
        self.now = 0.0
        self.frames: list[tuple[float, int, bytes]] = []
        self.wire = wire
        self._under_way: list[tuple[float, int, bytes]] = []
        self._signed = net.signed

    def give(self, index: int, event: Any) -> None:
        """One event to one of the two, and all that follows at once."""
        party = self.parties[index]
        events = [event]
        while events:
            for effect in party.core.handle(events.pop(0), self.now):
                frames, more = party.perform(effect)
                events += more
                for frame in frames:
                    self.frames.append((self.now, index, frame))
                    self._under_way.append((self.now + LATENCY, index, frame))

    def hold(self, seconds: float = 30.0) -> None:
        """Connect them and let time pass."""
        how = {} if self.wire is None else {"version": self.wire}
        for index in SEATS:
            self.give(index, Connected(peer_of(1 - index), **how))
        while self.now < seconds:
            self.now += LATENCY
            self._deliver(how)
            if round(self.now / LATENCY) % round(STEP / LATENCY) == 0:
                for index in SEATS:
                    self.give(index, Tick(WALL))
        self.give(1, RosterOffered(self._signed[2]))  # known by now: nothing comes of it

    def _deliver(self, how: dict[str, int]) -> None:
        arrived = [each for each in self._under_way if each[0] <= self.now + 1e-9]
        self._under_way = [each for each in self._under_way if each not in arrived]
        for _, sender, frame in arrived:
            self.give(1 - sender, Received(peer_of(sender), frame, **how))


def record() -> str:
    """The conversation of two cores as text."""
    talk = TwoCores()
    talk.hold()
    assert not any(party.blamed for party in talk.parties)
    assert [party.folded for party in talk.parties] == [talk.parties[0].folded] * 2
    end, model = talk.parties[0].folded
    lines = [f"# ends at {end} {model.hex()}"]
    lines += [f"{when:.2f} {sender} {frame.hex()}" for when, sender, frame in talk.frames]
    return "\n".join(lines) + "\n"
