"""What pairwise mode asks of the shell (effects) and hears from it (events); plain frozen values.

All of it is work on the node's own model, a vector too large for `handle`: the shell does it in a
worker thread, one piece after the other, and what changes the model is durable before its event
comes back. `Survived` is what the disk gives back after a start.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = [
    "CloseMeeting",
    "Learn",
    "Learnt",
    "MakeStep",
    "Meeting",
    "PairEffect",
    "PairEvent",
    "Quote",
    "Quoted",
    "SendStep",
    "StepMade",
    "StepTaken",
    "Survived",
    "TakeStep",
    "TakeStock",
]


@dataclass(frozen=True, slots=True)
class Meeting:
    """One exchange between two members.

    Attributes:
        ticket: The answering side's name for it, 16 bytes; it identifies the meeting.
        exchange: The initiator's name for it, 16 bytes.
        peer: The other member.
        initiator: Weight of the side that proposed.
        answerer: Weight of the side that gave the ticket.
    """

    ticket: bytes
    exchange: bytes
    peer: str
    initiator: int
    answerer: int


@dataclass(frozen=True, slots=True)
class Survived:
    """What survived the last stop.

    Attributes:
        round: The round that this node was in.
        learnt: The newest round whose local change is in the model; -1 if none.
        fresh: Whether the model is the genesis and has never been changed.
        given: Tickets that this node gave and whose step it has not seen.
        made: Steps that this node made and the other side has not confirmed.
    """

    round: int = 0
    learnt: int = -1
    fresh: bool = True
    given: tuple[Meeting, ...] = ()
    made: tuple[Meeting, ...] = ()


# --- effects -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Quote:
    """Remember the ticket durably, then write down the model for the other side: `Quoted`."""

    meeting: Meeting


@dataclass(frozen=True, slots=True)
class MakeStep:
    """Make the step from the other side's quote, move, keep the step, durably: `StepMade`."""

    meeting: Meeting
    quoted: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SendStep:
    """Read a kept step once more: `StepMade`."""

    ticket: bytes


@dataclass(frozen=True, slots=True)
class TakeStep:
    """Move by the other side's step and drop the ticket, durably and at once: `StepTaken`."""

    meeting: Meeting
    step: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class CloseMeeting:
    """Nobody will ask for this ticket or its step any more."""

    ticket: bytes


@dataclass(frozen=True, slots=True)
class Learn:
    """Add the change by this node's own training in a round, once: `Learnt`."""

    round: int
    payload: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class TakeStock:
    """Note that a round begins; write the view and a copy for joiners: `Folded`."""

    round: int


PairEffect = Quote | MakeStep | SendStep | TakeStep | CloseMeeting | Learn | TakeStock


# --- events ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Quoted:
    """The ticket is durable; this is the model."""

    ticket: bytes
    vector: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class StepMade:
    """This node has moved; this is the step."""

    ticket: bytes
    step: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class StepTaken:
    """This node has moved by the other side's step."""

    ticket: bytes


@dataclass(frozen=True, slots=True)
class Learnt:
    """The local change of a round is in the model."""

    round: int


PairEvent = Quoted | StepMade | StepTaken | Learnt
