"""The second implementation, 7: a peer that talks (sections 5 to 7 of `docs/protocol.md`).

A member that talks to one other member, exchanges beats, brings rosters and deltas to the same on
both sides, offers deltas of its own and folds. It was written from the document alone and imports
nothing of p2pfed; who writes a peer in another language may read it beside the document:
`second_transport.py` (Noise), `second_muxer.py` (yamux), `second_formats.py` (facts),
`second_fold.py` (arithmetic), `second_wire.py` (frames, files, seats) and this file (messages).

Invariant: every handler of a message does what its row in section 6 says, and nothing is taken in
that `second_formats` has not checked.

Not here, as a small network does not need it: more than one connection, crowds (`claims`,
`crowded`), pairwise mode, checkpoints of its own, buckets of tokens, suspicion of others. A peer
that spends a privacy budget also has to keep its ledger across starts; this one adds no noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import msgpack
import trio
from nacl.signing import SigningKey
from second_facts import Facts, Rosters
from second_facts import seats as seats_of
from second_fold import read_genesis
from second_formats import (
    ZEROS,
    Delta,
    Run,
    make_delta,
    require,
)
from second_muxer import Connection, Stream
from second_transport import Ended, Pipe, consent, peer_id
from second_wire import BLOB, NOT_HELD, fetch_file, frame, read_frame, read_seats, write_seats

GOSSIP, ROSTER_STREAM = "/p2pfed/gossip/%d", "/p2pfed/roster/1"
VERSIONS = (2, 1)
URGENT = 4096

Message = list[Any]


class Peer:
    """A member of a network.

    Args:
        seed: Of its key.
        roster: A signed roster, which its operator gave it; believed as the first.
        run: The signed run file, which its operator accepted.
        telling: Called after every message with it, once it was acted on.
        versions: Of the gossip, that it speaks, the highest first.

    Attributes:
        facts: What is held.
        beat: The last beat heard.
        round: The round that is worked on: all earlier ones have ended.
        contributes: Whether others are to wait for its deltas.
        version: Of the gossip, that was agreed on.
        addresses: Where it can be dialled.
        connection: Which it talks on.
    """

    def __init__(
        self,
        seed: bytes,
        roster: bytes,
        run: bytes,
        telling: Callable[[Message], None],
        *,
        versions: Sequence[int] = VERSIONS,
    ) -> None:
        self._seed, self._telling = seed, telling
        self.peer_id = peer_id(bytes(SigningKey(seed).verify_key))
        self.rosters = Rosters(roster)
        self.run = Run(run, self.rosters.newest, self.rosters.network_id)
        self.facts = Facts(self.rosters, self.run)
        self.beat: Message = []
        self.round, self.contributes, self._sequence = 0, False, 0
        self._protocols = [GOSSIP % version for version in versions]
        self.version = 0
        self.addresses: list[str] = []
        self.connection: Connection
        self._short: Pipe
        self._long: Pipe | None = None
        self._can_answer = trio.Event()

    # --- a connection ---

    async def talk(self, connection: Connection) -> None:
        """Be a peer of whoever is at the other end, until the connection ends.

        Raises:
            Wrong: It is no member.
        """
        require(self.rosters.newest.member(connection.peer), "a stranger is at the other end")
        self.connection = connection
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve, connection, nursery.cancel_scope)
            if connection.dialled:
                newest = self.rosters.signed[self.rosters.newest.name]
                told, _ = await connection.open(ROSTER_STREAM, at_once=frame(newest))
                await told.finish()
            self._short, spoken = await connection.open(*self._protocols)
            self.version = int(spoken.rpartition("/")[2])
            self._can_answer.set()
            await self.say_beat()
            await self.say("ask-witness")
            await self._show_digest()
            nursery.start_soon(self._tick)

    async def _serve(self, connection: Connection, all_else: trio.CancelScope) -> None:
        """Take the streams that the other side opens; with the connection all else ends."""
        async with trio.open_nursery() as nursery:
            async for stream in connection.opened:
                nursery.start_soon(self._take, stream)
            all_else.cancel()

    async def _take(self, stream: Stream) -> None:
        with suppress(Ended):
            await self._take_all(stream)

    async def _take_all(self, stream: Stream) -> None:
        spoken = await consent(stream, [*self._protocols, ROSTER_STREAM, BLOB])
        if spoken == ROSTER_STREAM:
            self.rosters.believe_all([await read_frame(stream)])
        elif spoken == BLOB:
            await stream.read(45)
            await stream.write(NOT_HELD.to_bytes(8, "big"))
            await stream.finish()
        else:
            await self._listen(stream)

    async def _listen(self, stream: Pipe) -> None:
        """Take in what comes on a gossip stream."""
        await self._can_answer.wait()  # the other side may speak before it consents to our stream
        while True:
            message = msgpack.unpackb(await read_frame(stream))
            kind, *fields = message
            handler = getattr(self, "on_" + kind.replace("-", "_"), None)
            if handler is not None:  # the others need no answer from this peer
                await handler(*fields)
            self._telling(message)

    async def say(self, *message: Any) -> None:
        """Send a message on the stream for its length."""
        payload = msgpack.packb(message)
        if len(payload) <= URGENT:
            await self._short.write(frame(payload))
            return
        if self._long is None:
            self._long, _ = await self.connection.open(GOSSIP % self.version)
        await self._long.write(frame(payload))

    async def _tick(self) -> None:
        seconds = 0
        while True:
            await trio.sleep(1)
            seconds += 1
            if seconds % 10 == 0:
                await self.say_beat()
            else:
                self._sequence += 1
                await self.say("ping", self._sequence)
            if seconds % 5 == 0:
                await self._show_digest()

    # --- life ---

    async def say_beat(self) -> None:
        self._sequence += 1
        ids = [self.rosters.network_id, self.run.run_id, self.run.task_id]
        model = self.facts.model(self.round).hash() if self.facts.genesis else b""
        state = [self.round, self.contributes, self.round, model]
        told = [self.facts.documents_digest(), self.addresses]
        await self.say("beat", self._sequence, *ids, *state, *told)

    async def on_beat(self, sequence: int, network: bytes, *rest: Any) -> None:
        require(network == self.rosters.network_id, "a beat of another network")
        self.beat = [sequence, network, *rest]
        await self.say("ack", sequence)
        compared = 16 if rest[0] == self.run.run_id else 8
        if rest[6][:compared] != self.facts.documents_digest()[:compared]:
            await self.say("have", ZEROS, -1, True, b"".join(self.facts.documents()))

    async def on_ping(self, sequence: int) -> None:
        await self.say("ack", sequence)

    async def on_doubted(self, first_hand: bool) -> None:
        await self.say_beat()

    async def on_ask_heard(self, sequence: int, peers: list[str]) -> None:
        await self.say("heard", sequence, [])  # it watches nobody else

    # --- facts ---

    async def on_have(self, run: bytes, round_: int, full: bool, names: bytes) -> None:
        if round_ >= 0 and run != self.run.run_id:
            return
        listed = _split(names)
        held = {delta.name[:16] for delta in self.facts.of_round(round_)}
        held = set(self.facts.documents()) if round_ < 0 else held
        if listed - held:
            await self.say("want", run, b"".join(listed - held))
        if full and held - listed:
            await self.say("have", run, round_, False, b"".join(held - listed))

    async def on_want(self, run: bytes, names: bytes) -> None:
        wanted, rosters = _split(names), self.rosters.signed
        proofs = [[wire] for _, wire in self.facts.proofs.values()]
        documents = [wire for name, wire in self.facts.documents().items() if name in wanted]
        await self._give(
            [d for d in self.facts.deltas.values() if d.name[:16] in wanted],
            [wire for wire in documents if wire in rosters.values()],
            [wire for wire in documents if [wire] in proofs],
        )

    async def _give(self, deltas: Iterable[Delta], *documents: Iterable[bytes]) -> None:
        rosters, proofs = documents or ((), ())
        kinds = ([delta.wire for delta in deltas], rosters, proofs)
        await self.say("facts", *([[wire] for wire in kind] for kind in kinds))

    async def on_facts(self, deltas: list[Any], rosters: list[Any], proofs: list[Any]) -> None:
        self.rosters.believe_all([signed for (signed,) in rosters])
        for (wire,) in proofs:
            self.facts.take_proof(wire)
        for (wire,) in deltas:
            self.facts.take_delta(wire)

    # --- who holds which deltas ---

    async def _show_digest(self) -> None:
        await self.say("digest", self.run.run_id, *self.facts.cover())

    async def on_digest(self, run: bytes, end: int, ranges: list[Any]) -> None:
        if run != self.run.run_id:
            return
        narrower, rounds = [], {each for each, _ in self.facts.deltas if each >= end > 0}
        for start, length, theirs in ranges:
            if self.facts.digest(start, length) == theirs:
                continue
            if length == 1:
                rounds.add(start)
                continue
            part = max(1, length // 4)
            starts = range(start, start + length, part)
            narrower += [[at, part, self.facts.digest(at, part)] for at in starts]
        if narrower:
            await self.say("digest", run, 0, narrower)
        if rounds:
            await self._show_held(rounds)

    async def _show_held(self, rounds: Iterable[int]) -> None:
        """Say whose deltas of these rounds are held."""
        roster, seated = self.rosters.newest, seats_of(self.rosters.newest)
        portions = []
        for round_ in sorted(rounds):
            seats = {
                seated.index(d.origin) for d in self.facts.of_round(round_) if d.origin in seated
            }
            digest = self.facts.digest(round_, 1)[:4]
            portions.append([round_, write_seats(seats, len(seated)), digest])
        for i in range(0, len(portions), 16):
            said = portions[i : i + 16]
            await self.say("held", self.run.run_id[:4], roster.name[:4], False, said)

    async def on_held(self, run: bytes, roster: bytes, answer: bool, portions: list[Any]) -> None:
        seated = self._seats_by(roster)
        if run != self.run.run_id[:4]:
            return
        wanted, lacking = [], []
        for round_, packed, digest in portions:
            ours = {delta.origin for delta in self.facts.of_round(round_)}
            theirs = {seated[seat] for seat in read_seats(packed, len(seated))} if seated else ours
            if not seated or (
                ours == theirs and digest and digest != self.facts.digest(round_, 1)[:4]
            ):
                names = b"".join(delta.name[:16] for delta in self.facts.of_round(round_))
                await self.say("have", self.run.run_id, round_, True, names)
                continue
            for portion, peers in ((wanted, theirs - ours), (lacking, ours - theirs)):
                seats = {seated.index(peer) for peer in peers if peer in seated}
                if seats:
                    portion.append([round_, write_seats(seats, len(seated))])
        if wanted:
            await self.say("wanted", run, roster, wanted)
        if lacking and not answer:
            await self.say("held", run, roster, True, [[*each, b""] for each in lacking])

    async def on_wanted(self, run: bytes, roster: bytes, portions: list[Any]) -> None:
        seated = self._seats_by(roster)
        if run != self.run.run_id[:4] or not seated:
            return
        asked = {
            (round_, seated[seat])
            for round_, packed in portions
            for seat in read_seats(packed, len(seated))
        }
        await self._give(delta for key, delta in self.facts.deltas.items() if key in asked)

    def _seats_by(self, roster: bytes) -> list[str]:
        """The peer ids of a roster that is named by 4 bytes, in order; none if it is not held."""
        named = (held for name, held in self.rosters.held.items() if name[:4] == roster)
        return next(map(seats_of, named), [])

    # --- questions ---

    async def on_ask_witness(self) -> None:
        signed = [
            d for (_, origin), d in self.facts.deltas.items() if origin == self.connection.peer
        ]
        newest = sorted(signed, key=lambda delta: delta.round)[-1:]
        await self.say("witness", [[d.header.data, d.header.signature] for d in newest])

    async def on_ask_checkpoints(self, run: bytes) -> None:
        await self.say("checkpoints", run, [])

    # --- rounds ---

    async def fetch_genesis(self) -> None:
        """Ask the other side for the first model."""
        self.facts.genesis = read_genesis(await fetch_file(self.connection, self.run.genesis))

    async def offer(self, released: dict[int, int]) -> Delta:
        """Sign a delta of the round that is worked on, and tell of it."""
        view, roster = self.facts.model(self.round).hash(), self.rosters.newest.name
        own = sum(origin == self.peer_id for _, origin in self.facts.deltas)
        made = self._seed, self.run, self.round, self.peer_id, roster, view, released, own + 1
        delta = self.facts.take_delta(make_delta(*made))
        await self._show_held([delta.round])
        return delta


def _split(names: bytes) -> set[bytes]:
    return {names[i : i + 16] for i in range(0, len(names), 16)}
