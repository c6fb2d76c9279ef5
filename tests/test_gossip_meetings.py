"""Meetings of two peers: done by both or by none, whatever is lost, doubled or crashes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from consortium import Consortium, peer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise_world import SIZE, MemoryModel

from p2pfed.errors import RemoteProtocolError
from p2pfed.gossip.events import Send
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
from p2pfed.gossip.meetings import MOST_GIVEN, MOST_OPEN, Meetings
from p2pfed.gossip.pairwise import (
    FINE_BITS,
    add_change,
    vector_bytes,
)
from p2pfed.identity.rules import Averaging, Encoding
from p2pfed.wire.meetings import (
    Abort,
    Accept,
    Busy,
    Commit,
    Done,
    MeetingMessage,
    Propose,
    Status,
)
from p2pfed.wire.messages import decode_message

SEEDS = st.integers(0, 1 << 32)


# --- one meeting, and every misfortune ---------------------------------------------------------


class Table:
    """Two nodes on one table: what is under way lies in a queue, and a test may spoil it.

    Node 0 proposes to node 1 until `wanted` of its meetings have come to something. Every entry of
    the queue is one delivery: a frame, or what the shell did.
    """

    def __init__(self, *, wanted: int = 1, values: str = "int8") -> None:
        self.net = Consortium(2, samples=(30, 70))
        self.run = self.net.run(
            averaging=Averaging(mode="pairwise"), encoding=Encoding(values=values)
        )
        self.weights = {peer_of(0): 30, peer_of(1): 70}
        self.models = [MemoryModel(self.run, i) for i in range(2)]
        rng = np.random.default_rng(9)
        for model in self.models:
            add_change(model.x, slice(None), rng.integers(-3000, 3000, SIZE).astype(np.int16))
        self.before = self.total()
        self.wanted, self.done = wanted, 0
        self.now = 0.0
        self.lives = [0, 0]
        self.up = [self.begin(0), self.begin(1)]
        self.queue: list[tuple[int, int, Any]] = []  # (node, its life or -1 for any, event)
        self.count = 0
        self.spoil = lambda count, node, event: [event]

    def begin(self, i: int) -> Meetings:
        rng = random.Random(f"{i}/{self.lives[i]}")
        return Meetings(self.run, peer_of(i), rng, self.models[i].held())

    def total(self) -> list[int]:
        pairs = zip((30, 70), self.models, strict=True)
        return list(sum(n * m.x.astype(object) for n, m in pairs))

    def crash(self, i: int) -> None:
        self.done += self.up[i].met if i == 0 else 0
        self.lives[i] += 1
        self.up[i] = self.begin(i)

    def do(self, i: int, effects: list[Any]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.queue.append((1 - i, -1, decode_message(effect.frame)))
            elif isinstance(effect, Quote | MakeStep | TakeStep | SendStep | CloseMeeting):
                event = self.models[i].perform(effect)
                if event is not None:
                    self.queue.append((i, self.lives[i], event))

    def deliver(self, i: int, event: Any) -> None:
        if isinstance(event, Quoted | StepMade | StepTaken):
            self.do(i, self.up[i].on_done_here(event, self.now))
            return
        effects = self.up[i].on_message(
            peer_of(1 - i),
            event,
            self.now,
            roster_hash=bytes(32),
            weights=self.weights,
            willing=True,
        )
        self.do(i, effects)

    def step(self) -> None:
        """Deliver one thing, or let time pass."""
        if not self.queue:
            self.now += 1.0
            for i in range(2):
                self.do(i, self.up[i].tick(self.now, frozenset({peer_of(1 - i)})))
            if self.done + self.up[0].met < self.wanted:
                others = frozenset({peer_of(1)})
                self.do(0, self.up[0].propose(self.now, others, bytes(32), self.weights))
            return
        i, life, event = self.queue.pop(0)
        if life not in {-1, self.lives[i]}:
            return  # the process that asked for it is gone
        for again in self.spoil(self.count, i, event):
            self.deliver(i, again)
        self.count += 1

    def settle(self) -> None:
        """Go on until nothing is open, and check that it is as if nothing had happened."""
        for _ in range(400):
            self.step()
            idle = not self.queue and not any(m.given or m.made for m in self.models)
            if idle and self.done + self.up[0].met >= self.wanted and not self.up[1].is_engaged:
                break
        else:
            pytest.fail("something stays open")
        assert self.total() == self.before


def test_one_meeting_brings_two_models_to_their_weighted_average():
    table = Table(values="int16")
    right = np.array(table.before, float) / 100
    table.settle()
    for model in table.models:
        assert np.abs(model.x - right).max() < 2**FINE_BITS
    assert table.count == LENGTH  # propose, quoted, accept, made, commit, taken, done and no more
    assert table.up[0].met == 1
    assert table.up[0].failed == 0


LENGTH = 7  # deliveries of one meeting that nothing disturbs


@pytest.mark.parametrize("who", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("at", range(LENGTH + 1))
def test_a_crash_at_any_point_leaves_a_meeting_done_by_both_or_by_none(at, who):
    table = Table()
    while table.count < at:
        table.step()
    for i in who:
        table.crash(i)
    table.settle()


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("at", range(LENGTH + 1))
def test_so_does_a_crash_that_takes_everything_under_way_with_it(at, who):
    table = Table(wanted=2)
    while table.count < at:
        table.step()
    table.queue = [entry for entry in table.queue if entry[1] >= 0]  # no message arrives
    table.crash(who)
    table.settle()


@pytest.mark.parametrize("second", range(LENGTH + 4))
@pytest.mark.parametrize("first", range(LENGTH))
def test_two_lost_messages_wherever_they_are_change_nothing(first, second):
    table = Table()
    lost = (first, first + 1 + second)

    def spoil(count: int, _node: int, event: Any) -> list[Any]:
        mine = isinstance(event, Quoted | StepMade | StepTaken)  # the own shell loses nothing
        return [] if count in lost and not mine else [event]

    table.spoil = spoil
    table.settle()


def test_a_message_that_comes_twice_or_again_at_the_end_moves_nothing_twice():
    for replayed in range(LENGTH + 1):
        table = Table()
        seen: list[tuple[int, Any]] = []

        def spoil(
            count: int, node: int, event: Any, seen: Any = seen, replayed: int = replayed
        ) -> list[Any]:
            if isinstance(event, MeetingMessage):
                seen.append((node, event))
            return [event, event] if count == replayed else [event]

        table.spoil = spoil
        table.settle()
        after = [m.x.copy() for m in table.models]
        table.wanted = 0
        for node, event in seen:  # the whole talk once more, oldest first and newest first
            table.queue.append((node, -1, event))
        table.settle()
        for node, event in reversed(list(seen)):
            table.queue.append((node, -1, event))
        table.settle()
        moved = [np.abs(m.x - x).max() for m, x in zip(table.models, after, strict=True)]
        assert moved == [0, 0]


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_the_weighted_sum_survives_any_mixture_of_loss_doubles_disorder_and_crashes(seed):
    table = Table(wanted=4)
    chance = random.Random(seed)

    def spoil(_count: int, _node: int, event: Any) -> list[Any]:
        if not isinstance(event, MeetingMessage):
            return [event]
        return [event] * chance.choice([0, 1, 1, 1, 2])

    table.spoil = spoil
    for _ in range(60):
        chance.shuffle(table.queue)
        table.step()
        if chance.random() < 0.05:
            table.crash(chance.randrange(2))
    table.spoil = lambda _count, _node, event: [event]
    table.settle()


# --- what one side refuses ---------------------------------------------------------------------


class Side:
    """Hospital 1 with three others, and nothing under way."""

    def __init__(self, held: Survived | None = None, **changes: Any) -> None:
        self.net = Consortium(4)
        rules = {"averaging": Averaging(mode="pairwise"), "encoding": Encoding(values="int8")}
        self.run = self.net.run(**(rules | changes))
        self.meetings = Meetings(self.run, peer_of(1), random.Random(1), held or Survived())
        self.weights = {peer_of(i): 50 + 10 * i for i in range(4)}
        self.vector = bytes(vector_bytes(self.run.num_parameters, "int8"))
        self.now = 0.0

    def hears(self, i: int, message: Any, *, willing: bool = True) -> list[Any]:
        effects = self.meetings.on_message(
            peer_of(i),
            message,
            self.now,
            roster_hash=self.net.roster.hash,
            weights=self.weights,
            willing=willing,
        )
        return [decode_message(e.frame) if isinstance(e, Send) else e for e in effects]

    def proposal(self, exchange: bytes = b"e" * 16, **changes: Any) -> Propose:
        values = {"run_id": self.run.run_id, "roster_hash": self.net.roster.hash}
        return Propose(exchange=exchange, **(values | changes))

    def accepted(self, i: int = 2) -> Meeting:
        """A ticket that this side has given to hospital i."""
        (quoting,) = self.hears(i, self.proposal())
        (answer,) = self.did(Quoted(quoting.meeting.ticket, self.vector))
        assert isinstance(answer, Accept)
        return quoting.meeting

    def did(self, event: Any) -> list[Any]:
        effects = self.meetings.on_done_here(event, self.now)
        return [decode_message(e.frame) if isinstance(e, Send) else e for e in effects]

    def proposes(self, *to: int) -> Propose:
        peers = frozenset(peer_of(i) for i in to)
        (sent,) = self.meetings.propose(self.now, peers, self.net.roster.hash, self.weights)
        assert isinstance(sent, Send)
        message = decode_message(sent.frame)
        assert isinstance(message, Propose)
        return message


def test_a_node_that_is_engaged_answers_at_once_and_is_free_again_by_itself():
    side = Side()
    side.accepted(2)
    assert side.hears(3, side.proposal()) == [Busy(side.run.run_id, b"e" * 16)]
    assert side.meetings.propose(0.0, frozenset({peer_of(3)}), b"", side.weights) == []
    side.now = 2 * side.meetings.patience
    side.meetings.tick(side.now, frozenset())
    assert isinstance(side.hears(3, side.proposal())[0], Quote)


def test_a_node_whose_proposal_gets_no_reply_is_free_again_by_itself():
    side = Side()
    side.proposes(2)
    assert side.meetings.is_engaged
    side.now = side.meetings.patience
    side.meetings.tick(side.now, frozenset())
    assert not side.meetings.is_engaged
    assert side.meetings.failed == 1
    assert isinstance(side.hears(3, side.proposal())[0], Quote)


@pytest.mark.parametrize(
    "case", ["not willing", "another roster", "no weight", "own weight gone", "another run"]
)
def test_a_proposal_that_cannot_be_meant_is_turned_down(case):
    side = Side()
    proposal = side.proposal()
    if case == "another roster":
        proposal = side.proposal(roster_hash=bytes(32))
    if case == "no weight":
        del side.weights[peer_of(2)]
    if case == "own weight gone":
        del side.weights[peer_of(1)]
    if case == "another run":
        assert side.hears(2, side.proposal(run_id=bytes(32))) == []
        return
    answer = side.hears(2, proposal, willing=case != "not willing")
    assert answer == [Busy(side.run.run_id, b"e" * 16)]
    assert not side.meetings.is_engaged


def test_the_weights_of_a_meeting_are_those_of_our_own_roster():
    side = Side()
    assert side.accepted(2).initiator == 70
    other = Side()
    exchange_ = other.proposes(3).exchange
    accept = Accept(other.run.run_id, exchange_, b"t" * 16, other.vector)
    (making,) = other.hears(3, accept)
    assert (making.meeting.initiator, making.meeting.answerer) == (60, 80)


def test_who_lets_a_ticket_run_out_or_aborts_it_is_refused_for_a_while():
    side = Side()
    ticket = side.accepted(2).ticket
    side.now = 2 * side.meetings.patience
    side.meetings.tick(side.now, frozenset())
    assert isinstance(side.hears(2, side.proposal())[0], Busy)
    assert side.hears(2, Abort(side.run.run_id, ticket)) == [CloseMeeting(ticket)]
    assert isinstance(side.hears(2, side.proposal())[0], Busy)
    side.now += 2 * side.meetings.patience
    assert isinstance(side.hears(2, side.proposal())[0], Quote)


def test_a_peer_holds_a_few_open_tickets_at_most():
    side = Side()
    for _ in range(MOST_GIVEN):
        side.accepted(2)
        side.now += 10 * side.meetings.patience
        side.meetings.tick(side.now, frozenset())
        side.now += 10 * side.meetings.patience
    assert isinstance(side.hears(2, side.proposal())[0], Busy)
    assert isinstance(side.hears(3, side.proposal())[0], Quote)


def test_a_ticket_of_another_peer_is_a_breach_and_stays_open():
    side = Side()
    ticket = side.accepted(2).ticket
    with pytest.raises(RemoteProtocolError, match="another peer"):
        side.hears(3, Commit(side.run.run_id, ticket, side.vector))
    assert side.hears(3, Abort(side.run.run_id, ticket)) == []
    assert isinstance(side.hears(2, Commit(side.run.run_id, ticket, side.vector))[0], TakeStep)
    assert side.hears(2, Commit(side.run.run_id, ticket, side.vector)) == []  # it is being taken
    assert side.hears(2, Abort(side.run.run_id, ticket)) == []


@pytest.mark.parametrize("damage", ["short", "long", "too far"])
def test_a_step_or_a_quote_of_the_wrong_size_is_a_breach_and_changes_nothing(damage):
    side = Side()
    ticket = side.accepted(2).ticket
    bad = {
        "short": side.vector[1:],
        "long": side.vector + b"x",
        "too far": b"\xff" + side.vector[1:],
    }[damage]
    with pytest.raises(RemoteProtocolError):
        side.hears(2, Commit(side.run.run_id, ticket, bad))
    assert isinstance(side.hears(2, Commit(side.run.run_id, ticket, side.vector))[0], TakeStep)
    other = Side()
    proposal = other.proposes(2)
    with pytest.raises(RemoteProtocolError):
        other.hears(2, Accept(other.run.run_id, proposal.exchange, b"t" * 16, bad))


def test_what_is_unknown_is_presumed_aborted_and_stays_so():
    side = Side()
    run_id, ticket = side.run.run_id, b"t" * 16
    assert side.hears(2, Status(run_id, b"e" * 16, ticket)) == [Abort(run_id, ticket)]
    assert side.hears(2, Commit(run_id, ticket, side.vector)) == [Done(run_id, ticket)]
    assert side.hears(2, Done(run_id, ticket)) == []
    assert side.hears(2, Busy(run_id, b"e" * 16)) == []
    assert side.hears(2, Accept(run_id, b"e" * 16, ticket, side.vector)) == [Abort(run_id, ticket)]
    proposal = side.proposes(2)  # the answer's fate is asked for before the answer comes
    assert side.hears(2, Status(run_id, proposal.exchange, ticket)) == [Abort(run_id, ticket)]
    late = side.hears(2, Accept(run_id, proposal.exchange, ticket, side.vector))
    assert late == [Abort(run_id, ticket)]


def test_a_third_party_cannot_answer_for_the_one_that_was_asked():
    side = Side()
    proposal = side.proposes(2)
    run_id = side.run.run_id
    assert side.hears(3, Busy(run_id, proposal.exchange)) == []
    answer = side.hears(3, Accept(run_id, proposal.exchange, b"t" * 16, side.vector))
    assert answer == [Abort(run_id, b"t" * 16)]
    assert side.meetings.is_engaged
    accept = Accept(run_id, proposal.exchange, b"t" * 16, side.vector)
    assert isinstance(side.hears(2, accept)[0], MakeStep)
    assert side.hears(2, accept) == []  # doubled while the step is made
    assert side.hears(2, Status(run_id, proposal.exchange, b"t" * 16)) == []
    (commit,) = side.did(StepMade(b"t" * 16, side.vector))
    assert commit == Commit(run_id, b"t" * 16, side.vector)
    assert side.hears(3, Done(run_id, b"t" * 16)) == []
    assert side.hears(2, accept) == []  # doubled afterwards
    again = side.proposes(3)
    with pytest.raises(RemoteProtocolError, match="in use"):
        side.hears(3, Accept(run_id, again.exchange, b"t" * 16, side.vector))
    assert side.hears(2, Done(run_id, b"t" * 16)) == [CloseMeeting(b"t" * 16)]
    assert side.did(StepMade(b"t" * 16, side.vector)) == []


def test_steps_that_nobody_confirms_are_bounded_and_the_oldest_is_given_up_with_a_note():
    side = Side()
    run_id = side.run.run_id
    for i in range(MOST_OPEN + 1):
        ticket = bytes([i]) * 16
        proposal = side.proposes(2)
        side.hears(2, Accept(run_id, proposal.exchange, ticket, side.vector))
        effects = side.did(StepMade(ticket, side.vector))
    assert [type(e).__name__ for e in effects] == ["Note", "CloseMeeting", "Commit"]
    assert effects[0].type == "meeting.half"
    assert effects[1].ticket == bytes(16)


def test_what_is_open_after_a_start_is_asked_about_once_the_peer_is_there():
    given = Meeting(b"g" * 16, b"e" * 16, peer_of(2), 70, 60)
    made = Meeting(b"m" * 16, b"f" * 16, peer_of(3), 60, 80)
    side = Side(Survived(given=(given,), made=(made,)))
    assert side.meetings.tick(0.0, frozenset()) == []
    both = frozenset({peer_of(2), peer_of(3)})
    asked, again = side.meetings.tick(0.0, both)
    assert decode_message(asked.frame) == Status(side.run.run_id, b"e" * 16, b"g" * 16)
    assert again == SendStep(b"m" * 16)
    assert side.meetings.tick(0.1, both) == []  # not again at once
    later = 2 * side.meetings.patience + 0.1
    assert len(side.meetings.tick(later, both)) == 2


def test_peers_that_owe_an_answer_are_asked_last():
    made = Meeting(b"m" * 16, b"f" * 16, peer_of(3), 60, 80)
    for seed in range(20):
        side = Side(Survived(made=(made,)))
        side.meetings._rng = random.Random(seed)
        (sent,) = side.meetings.propose(
            0.0, frozenset({peer_of(2), peer_of(3)}), b"r" * 32, side.weights
        )
        assert sent.peer == peer_of(2)
    # And where there is nobody else:
    alone = Side(Survived(made=(made,)))
    (sent,) = alone.meetings.propose(0.0, frozenset({peer_of(3)}), b"r" * 32, alone.weights)
    assert sent.peer == peer_of(3)


def test_the_patience_grows_with_the_size_of_the_model():
    small, large = Side(), Side(num_parameters=10_000_000)
    assert small.meetings.patience < 2.1
    assert 6 < large.meetings.patience < 8
