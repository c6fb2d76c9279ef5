"""Meetings of two peers, each of which averages their models once, whatever is lost or repeated.

    i -> j   PROPOSE(exchange)          j is engaged: BUSY, at once
    j -> i   ACCEPT(ticket, Q(x_j))     the ticket is durable at j before
    i        x_i -= a t                 commit point: the step t is durable with it, then
    i -> j   COMMIT(ticket, t)          or ABORT(ticket), if i waited no longer
    j        x_j += b t                 durable together with the ticket's end, then
    j -> i   DONE(ticket)               i forgets the step

The steps commute with each other and with local training, so the time at which a side moves never
matters for the weighted sum, only whether. Two-phase commit with the initiator as coordinator and
presumed abort (Mohan, Lindsay, Obermarck 1986): what i does not know of was not done.

**Once.** j moves only for a ticket that it holds, and moving ends the ticket in the same
transaction. A ticket is fresh for each ACCEPT, also for that of a repeated PROPOSE; i commits to
one ticket per exchange at most. So no list of past exchanges is kept, and no replay of any age can
move a model twice.

**Both or none.** j asks STATUS for a ticket that stays open, for as long as it takes; i sends the
step again as long as j has not said DONE. A crash of either side at any point is one of these
cases. One side moves alone only if the other's disk is lost, or if `MOST_OPEN` steps wait for peers
that do not come back (the oldest is dropped, and noted as `meeting.half`): then the sum is off by
what the two disagreed by in that moment.

**No gridlock.** A node that is engaged answers BUSY at once; it never lets anyone wait. Who waits,
waits for a node that answers at once, so there are no chains; and every engagement ends by itself:
`patience` for the reply to a proposal, twice that for the step. A step that comes later is taken
all the same. While engaged a node takes part in no other meeting, so that a quoted model is still
nearly that model when the step comes: that is for convergence; the sum needs no lock.

**Bounds.** A peer can hold `MOST_GIVEN` open tickets here, of 16 bytes each; who lets a ticket run
out or aborts it is refused for a while, so that it cannot make this node write down its model for
nothing. A malformed message costs the connection.

Not here: the arithmetic (`pairwise`), when meetings are wanted (`local_rounds`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

from p2pfed.errors import RemoteProtocolError
from p2pfed.gossip.events import Effect, Note, Send
from p2pfed.gossip.meeting_events import (
    CloseMeeting,
    MakeStep,
    Meeting,
    Quote,
    Quoted,
    SendStep,
    StepMade,
    StepTaken,
    Survived,
    TakeStep,
)
from p2pfed.gossip.pairwise import check_vector, shares, vector_bytes
from p2pfed.identity.run import Run
from p2pfed.wire.meetings import (
    ID_BYTES,
    Abort,
    Accept,
    Busy,
    Commit,
    Done,
    MeetingMessage,
    Propose,
    Status,
)
from p2pfed.wire.messages import encode_message

__all__ = ["Meetings"]

REPLY = 1.0  # seconds for a reply of no length: many round trips, and a worker thread's turn
RATE = 2e6  # bytes a second that a hospital's line surely carries
BACK_OFF = 0.5  # seconds at most until another peer is asked after a refusal
MOST_OPEN = 32  # own steps kept for peers that have not confirmed them
MOST_GIVEN = 4  # open tickets per peer


@dataclass(frozen=True, slots=True)
class _Proposal:
    exchange: bytes
    peer: str
    initiator: int
    answerer: int


class Meetings:
    """See the module docstring.

    Args:
        run: Gives the size of the model and the encoding.
        own_id: This node.
        rng: Chance for choosing peers and names; not for privacy.
        held: Open meetings from before the start.

    Attributes:
        met: Steps made so far: meetings that this node began and committed to.
        failed: Meetings that this node began and that came to nothing.
    """

    def __init__(self, run: Run, own_id: str, rng: random.Random, held: Survived) -> None:
        self.met = self.failed = 0
        self._run = run
        self._own_id = own_id
        self._rng = rng
        self._values = run.encoding.values
        self.patience = REPLY + vector_bytes(run.num_parameters, self._values) / RATE
        self._proposal: _Proposal | None = None
        self._making: Meeting | None = None
        self._given = {m.ticket: m for m in held.given}
        self._made = {m.ticket: m for m in held.made}
        self._taking: set[bytes] = set()
        self._ask_at = dict.fromkeys((*self._given, *self._made), float("-inf"))
        self._engaged: tuple[bytes, float] | None = None  # with what, until when
        self._refused: dict[str, float] = {}  # peer -> until when it is told BUSY
        self._next = float("-inf")  # when the next proposal may be made

    # --- what local_rounds asks ----------------------------------------------------------------

    @property
    def is_engaged(self) -> bool:
        """Whether a meeting is under way; `tick` ends those that take too long."""
        return self._engaged is not None

    def propose(
        self, now: float, peers: frozenset[str], roster_hash: bytes, weights: Mapping[str, int]
    ) -> list[Effect]:
        """Ask a random one of these peers, if this node is free.

        Args:
            now: Seconds.
            peers: Present members that take part in the run.
            roster_hash: The roster that the weights are of.
            weights: Weight by peer id.
        """
        owed = {m.peer for m in self._made.values()}  # with its answer pending, ask others first
        known = [p for p in sorted(peers - owed) or sorted(peers) if weights.get(p, 0)]
        own = weights.get(self._own_id, 0)
        if self._engaged is not None or now < self._next or not known or not own:
            return []
        peer = self._rng.choice(known)
        exchange = self._rng.randbytes(ID_BYTES)
        self._proposal = _Proposal(exchange, peer, own, weights[peer])
        self._engaged = exchange, now + self.patience
        return [self._send(peer, Propose(self._run.run_id, exchange, roster_hash))]

    def tick(self, now: float, present: frozenset[str]) -> list[Effect]:
        """End what took too long, and ask those who are there about what is still open."""
        if self._engaged is not None and now >= self._engaged[1]:
            name, _ = self._engaged
            if self._proposal is not None and self._proposal.exchange == name:
                self._give_up(now)
            elif name in self._given:
                self._refused[self._given[name].peer] = now + 2 * self.patience
            self._engaged = None
        effects: list[Effect] = []
        for ticket, meeting in (self._given | self._made).items():
            busy = ticket in self._taking or self._is_engaged_with(ticket)
            if busy or meeting.peer not in present or now < self._ask_at[ticket]:
                continue
            self._ask_at[ticket] = now + 2 * self.patience
            status = Status(self._run.run_id, meeting.exchange, ticket)
            mine = ticket in self._made
            effects.append(SendStep(ticket) if mine else self._send(meeting.peer, status))
        return effects

    def _is_engaged_with(self, name: bytes) -> bool:
        return self._engaged is not None and self._engaged[0] == name

    def _free(self, name: bytes) -> None:
        if self._is_engaged_with(name):
            self._engaged = None

    def _give_up(self, now: float) -> None:
        """The proposal came to nothing; somebody else is asked a little later."""
        assert self._proposal is not None
        self._free(self._proposal.exchange)
        self._proposal = None
        self.failed += 1
        self._next = now + self._rng.uniform(0, BACK_OFF)

    def _send(self, peer: str, message: MeetingMessage) -> Send:
        return Send(peer, encode_message(message))

    # --- messages ------------------------------------------------------------------------------

    def on_message(
        self,
        peer: str,
        message: MeetingMessage,
        now: float,
        *,
        roster_hash: bytes,
        weights: Mapping[str, int],
        willing: bool,
    ) -> list[Effect]:
        """Hear a member.

        Args:
            peer: Who said it.
            message: What it said; of another run it is ignored.
            now: Seconds.
            roster_hash: The newest roster here.
            weights: Weight by peer id in it.
            willing: Whether this node would show its model now.

        Raises:
            RemoteProtocolError: The message cannot come from a correct node.
        """
        if message.run_id != self._run.run_id:
            return []
        match message:
            case Propose():
                pair = weights.get(peer, 0), weights.get(self._own_id, 0)
                agreed = willing and message.roster_hash == roster_hash and all(pair)
                return self._on_propose(peer, message, now, pair if agreed else None)
            case Accept():
                return self._on_accept(peer, message)
            case Busy():
                return self._on_busy(peer, message, now)
            case Commit():
                return self._on_commit(peer, message)
            case Done():
                return self._on_done(peer, message)
            case Abort():
                return self._on_abort(peer, message, now)
            case Status():
                return self._on_status(peer, message, now)
            case _:
                assert_never(message)

    def _on_propose(
        self, peer: str, message: Propose, now: float, weights: tuple[int, int] | None
    ) -> list[Effect]:
        given = sum(m.peer == peer for m in self._given.values())
        refused = now < self._refused.get(peer, float("-inf"))
        if weights is None or self._engaged is not None or refused or given >= MOST_GIVEN:
            return [self._send(peer, Busy(self._run.run_id, message.exchange))]
        ticket = self._rng.randbytes(ID_BYTES)
        meeting = Meeting(ticket, message.exchange, peer, *weights)
        self._given[ticket] = meeting
        self._engaged = ticket, now + 2 * self.patience
        self._ask_at[ticket] = self._engaged[1]
        return [Quote(meeting)]

    def _on_accept(self, peer: str, message: Accept) -> list[Effect]:
        check_vector(message.vector, self._run.num_parameters, self._values)
        proposal = self._proposal
        if proposal is None or (proposal.exchange, proposal.peer) != (message.exchange, peer):
            known = message.ticket in self._made or (
                self._making is not None and self._making.ticket == message.ticket
            )
            return [] if known else [self._send(peer, Abort(self._run.run_id, message.ticket))]
        if message.ticket in self._made or message.ticket in self._given:
            raise RemoteProtocolError("a ticket that is in use was given again")
        self._proposal = None
        pair = proposal.initiator, proposal.answerer
        self._making = Meeting(message.ticket, message.exchange, peer, *pair)
        self._engaged = message.ticket, float("inf")  # until this node's own disk is done
        return [MakeStep(self._making, message.vector)]

    def _on_busy(self, peer: str, message: Busy, now: float) -> list[Effect]:
        proposal = self._proposal
        if proposal is not None and (proposal.exchange, proposal.peer) == (message.exchange, peer):
            self._give_up(now)
        return []

    def _on_commit(self, peer: str, message: Commit) -> list[Effect]:
        meeting = self._given.get(message.ticket)
        if meeting is None:  # taken before; or its end is not known to the other side
            return [self._send(peer, Done(self._run.run_id, message.ticket))]
        times = shares(meeting.initiator, meeting.answerer)[1]
        check_vector(message.step, self._run.num_parameters, self._values, times=times)
        if meeting.peer != peer:
            raise RemoteProtocolError("a step for a ticket that another peer holds")
        if message.ticket in self._taking:
            return []
        self._taking.add(message.ticket)
        return [TakeStep(meeting, message.step)]

    def _on_done(self, peer: str, message: Done) -> list[Effect]:
        meeting = self._made.get(message.ticket)
        if meeting is None or meeting.peer != peer:
            return []
        return [self._forget(message.ticket)]

    def _on_abort(self, peer: str, message: Abort, now: float) -> list[Effect]:
        meeting = self._given.get(message.ticket)
        if meeting is None or meeting.peer != peer or message.ticket in self._taking:
            return []
        self._refused[peer] = now + self.patience
        return [self._forget(message.ticket)]

    def _on_status(self, peer: str, message: Status, now: float) -> list[Effect]:
        meeting = self._made.get(message.ticket)
        if meeting is not None and meeting.peer == peer:
            return [SendStep(message.ticket)]
        if self._making is not None and self._making.ticket == message.ticket:
            return []  # the step follows
        proposal = self._proposal
        if proposal is not None and (proposal.exchange, proposal.peer) == (message.exchange, peer):
            self._give_up(now)  # so that this answer stays true, should the ACCEPT come after all
        return [self._send(peer, Abort(self._run.run_id, message.ticket))]

    def _forget(self, ticket: bytes) -> CloseMeeting:
        self._given.pop(ticket, None)
        self._made.pop(ticket, None)
        self._taking.discard(ticket)
        self._ask_at.pop(ticket, None)
        self._free(ticket)
        return CloseMeeting(ticket)

    # --- what the shell did --------------------------------------------------------------------

    def on_done_here(self, event: Quoted | StepMade | StepTaken, now: float) -> list[Effect]:
        """The shell did a piece of work on the model."""
        match event:
            case Quoted():
                return self._on_quoted(event)
            case StepMade():
                return self._on_step_made(event, now)
            case StepTaken():
                return self._on_step_taken(event)

    def _on_quoted(self, event: Quoted) -> list[Effect]:
        meeting = self._given.get(event.ticket)
        if meeting is None or not self._is_engaged_with(event.ticket):
            return []  # it took too long; STATUS will end the ticket
        accept = Accept(self._run.run_id, meeting.exchange, event.ticket, event.vector)
        return [self._send(meeting.peer, accept)]

    def _on_step_made(self, event: StepMade, now: float) -> list[Effect]:
        effects: list[Effect] = []
        if self._making is not None and self._making.ticket == event.ticket:
            self._made[event.ticket], self._making = self._making, None
            self.met += 1
            self._free(event.ticket)
            effects = self._drop_oldest()
        meeting = self._made.get(event.ticket)
        if meeting is None:
            return effects  # confirmed while it was read
        self._ask_at[event.ticket] = now + 4 * self.patience  # the other side asks sooner
        return [*effects, self._send(meeting.peer, Commit(self._run.run_id, *_step(event)))]

    def _drop_oldest(self) -> list[Effect]:
        if len(self._made) <= MOST_OPEN:
            return []
        oldest = next(iter(self._made.values()))
        note = Note("meeting.half", {"peer": oldest.peer, "ticket": oldest.ticket.hex()})
        return [note, self._forget(oldest.ticket)]

    def _on_step_taken(self, event: StepTaken) -> list[Effect]:
        meeting = self._given.pop(event.ticket, None)
        if meeting is None:
            return []
        self._forget(event.ticket)
        return [self._send(meeting.peer, Done(self._run.run_id, event.ticket))]


def _step(event: StepMade) -> tuple[bytes, bytes]:
    return event.ticket, event.step
