"""The messages by which two peers average their models; part of every version of the gossip.

One meeting: the initiator sends `Propose`; the other one answers `Accept` with a fresh *ticket* and
its model, or `Busy`; the initiator applies its half and sends `Commit` with the step, or `Abort`;
the other one applies its half and sends `Done`. Who holds a ticket and hears nothing sends
`Status`. What each means, and why nothing is lost or done twice, is told in `gossip/meetings.py`;
the vectors are those of `gossip/pairwise.py`.

Weights are not sent: each side reads them from the roster that `Propose` names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from p2pfed.wire.codec import Items

__all__ = [
    "ID_BYTES",
    "MEETING_READERS",
    "Abort",
    "Accept",
    "Busy",
    "Commit",
    "Done",
    "MeetingMessage",
    "Propose",
    "Status",
    "meeting_items",
]

ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class Propose:
    """Let us average.

    Attributes:
        run_id: 32 bytes.
        exchange: The initiator's name for it, 16 random bytes.
        roster_hash: Roster whose weights are meant, 32 bytes.
    """

    run_id: bytes
    exchange: bytes
    roster_hash: bytes


@dataclass(frozen=True, slots=True)
class Accept:
    """This is my model; I wait for your step for a while.

    Attributes:
        run_id: 32 bytes.
        exchange: Of the proposal.
        ticket: The other one's name for it, 16 random bytes, fresh for every answer.
        vector: Its model as `pairwise.quote` writes it.
    """

    run_id: bytes
    exchange: bytes
    ticket: bytes
    vector: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Busy:
    """Not now; ask somebody else."""

    run_id: bytes
    exchange: bytes


@dataclass(frozen=True, slots=True)
class Commit:
    """I have moved by this step; move by yours."""

    run_id: bytes
    ticket: bytes
    step: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Done:
    """I hold no such ticket any more: you can forget the step."""

    run_id: bytes
    ticket: bytes


@dataclass(frozen=True, slots=True)
class Abort:
    """I have not moved and shall not."""

    run_id: bytes
    ticket: bytes


@dataclass(frozen=True, slots=True)
class Status:
    """What became of the ticket that I gave you?"""

    run_id: bytes
    exchange: bytes
    ticket: bytes


MeetingMessage = Propose | Accept | Busy | Commit | Done | Abort | Status


def meeting_items(message: MeetingMessage) -> tuple[Any, ...]:
    """The items of a message's array, its kind first."""
    match message:
        case Propose():
            return "propose", message.run_id, message.exchange, message.roster_hash
        case Accept():
            return "accept", message.run_id, message.exchange, message.ticket, message.vector
        case Busy():
            return "busy", message.run_id, message.exchange
        case Commit():
            return "commit", message.run_id, message.ticket, message.step
        case Done():
            return "done", message.run_id, message.ticket
        case Abort():
            return "abort", message.run_id, message.ticket
        case Status():
            return "status", message.run_id, message.exchange, message.ticket


def _id(items: Items) -> bytes:
    return items.raw(ID_BYTES)


MEETING_READERS: Mapping[str, Callable[[Items], MeetingMessage]] = {
    "propose": lambda items: Propose(items.raw(32), _id(items), items.raw(32)),
    "accept": lambda items: Accept(items.raw(32), _id(items), _id(items), items.raw()),
    "busy": lambda items: Busy(items.raw(32), _id(items)),
    "commit": lambda items: Commit(items.raw(32), _id(items), items.raw()),
    "done": lambda items: Done(items.raw(32), _id(items)),
    "abort": lambda items: Abort(items.raw(32), _id(items)),
    "status": lambda items: Status(items.raw(32), _id(items), _id(items)),
}
