"""What this node signs, and when not: the policy of releasing, without I/O.

A release is made by the trainer's gate; here it gets its header and its signature. Everything that
forbids contributing has one place (`why_not`), and one order, so that people are told the first
thing that they can change.

Invariants: one delta per round is signed; none by a node that is out, whose roster expired, whose
sharing is off, that has not heard enough witnesses since its start, or whose ledger is known to be
an older copy; what is not signed stays here.

Not here: when a training starts (`progress`), what is done with a signed delta (`intake`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

from p2pfed.gossip.events import (
    Effect,
    Note,
    Released,
    SetSharing,
    TrainerChanged,
    TrainingEnded,
)
from p2pfed.gossip.intake import Intake
from p2pfed.gossip.local_rounds import LocalRounds
from p2pfed.gossip.progress import Progress
from p2pfed.gossip.witness import Witnesses
from p2pfed.identity.book import RosterBook
from p2pfed.identity.signing import fact_hash
from p2pfed.wire.delta import Delta, Header

__all__ = ["Releasing"]


class Releasing:
    """See the module docstring.

    Args:
        own_id: This node.
        sign: Signs a header with this node's key.
        book: The believed rosters.
        intake: Takes in the signed delta like any other fact.
        witnesses: What the others know of this node's past.
        has_trainer: False for a bootstrap-only node.
    """

    def __init__(
        self,
        *,
        own_id: str,
        sign: Callable[[bytes], bytes],
        book: RosterBook,
        intake: Intake,
        witnesses: Witnesses,
        has_trainer: bool,
    ) -> None:
        self.sharing = True
        self.verdict = ""  # why the trainer contributes nothing any more; empty while it does
        self.trainer_up = has_trainer
        self._own_id = own_id
        self._sign = sign
        self._book = book
        self._intake = intake
        self._witnesses = witnesses
        self._has_trainer = has_trainer
        self._trainer_lost = False
        self._progress: Progress | None = None

    def take_run(self, progress: Progress) -> None:
        """From now on releases are made for this run."""
        self._progress = progress
        self.verdict = ""

    def why_not(self, wall: dt.datetime) -> str:
        """Empty if this node contributes; else the reason, for people.

        Args:
            wall: The calendar time.
        """
        roster, progress = self._book.current, self._progress
        if not self._has_trainer:
            return "this node has no trainer"
        if self._trainer_lost:
            return "the trainer fails again and again"
        if roster is None or progress is None:
            return "no run has begun here"
        member = roster.member(self._own_id)
        if member is None or not member.trains:
            return "the roster does not list this node as a training member"
        if roster.is_expired(wall):
            return f"roster v{roster.version} has expired"
        if progress.facts.is_out(self._own_id, progress.round):
            return "this node is revoked or was proven to sign two deltas for one round"
        if not self.sharing:
            return "sharing is switched off"
        return self.verdict or self._not_yet(progress)

    def _not_yet(self, progress: Progress) -> str:
        if progress.owing:
            first, last = progress.owing[0], progress.owing[-1]
            return f"the deltas of rounds {first} to {last} are missing, and a member has to go"
        missing, facts = self._witnesses.missing, progress.facts
        if missing:
            return f"waiting for witnesses: {missing} more must say what this node released before"
        closed = self._witnesses.closed_round(facts.run.run_id)
        if progress.round <= closed and not facts.holds(progress.round, self._own_id):
            return f"this node released for round {closed} before its store was lost; it waits"
        return ""

    def may_show(self, wall: dt.datetime) -> bool:
        """Whether this node's own model may leave it, in pairwise mode."""
        roster = self._book.current
        return self.sharing and roster is not None and not roster.is_expired(wall)

    def on_sharing(self, event: SetSharing) -> list[Effect]:
        """The operator switched sharing on or off."""
        self.sharing = event.on
        return [Note("sharing.on" if event.on else "sharing.off", {})]

    def on_trainer(self, event: TrainerChanged) -> list[Effect]:
        """The trainer came up or went down."""
        self.trainer_up, self._trainer_lost = event.up, event.lost
        return []

    def on_released(self, event: Released, wall: dt.datetime) -> list[Effect]:
        """The gate released a payload: sign it, unless something forbids it."""
        progress, roster = self._progress, self._book.current
        trained = progress.trained(event.round) if progress is not None else None
        if progress is None or trained is None or roster is None:
            return []
        if not self.sharing or roster.is_expired(wall):
            return [Note("release.withheld", {"round": event.round})]
        if isinstance(progress, LocalRounds):
            return progress.learn(event)
        facts = progress.facts
        if event.round <= self._witnesses.closed_round(facts.run.run_id):
            return []
        if facts.holds(event.round, self._own_id):
            return []  # its own delta came back while it trained: the store was lost
        if facts.has_later_ledger(self._own_id, event.releases, event.ledger_head):
            self.verdict = "the ledger is older than what this node has released (a restored copy?)"
            return [Note("privacy.rollback", {"round": event.round, "releases": event.releases})]
        header = Header(
            run_id=facts.run.run_id,
            round=event.round,
            origin=self._own_id,
            roster_hash=trained.roster_hash,
            view_hash=trained.view_hash,
            mechanism=event.mechanism,
            spent_nano_rho=event.spent_nano_rho,
            releases=event.releases,
            ledger_head=event.ledger_head,
            payload_hash=fact_hash(event.payload),
            num_released=event.num_released,
        )
        delta = Delta.make(header, event.payload, self._sign)
        self._witnesses.remember([delta.signed])
        note = Note(
            "delta.released",
            {"round": event.round, "bytes": len(event.payload), "releases": event.releases},
        )
        return [*self._intake.delta(delta), note]

    def on_training_ended(self, event: TrainingEnded) -> list[Effect]:
        """The trainer has nothing for this round."""
        if self._progress is None or self._progress.trained(event.round) is None:
            return []
        if event.outcome in {"exhausted", "refused", "rolled-back"}:
            self.verdict = event.reason
        kinds = {"exhausted": "privacy.exhausted", "rolled-back": "privacy.rollback"}
        kind = kinds.get(event.outcome, f"training.{event.outcome}")
        return [Note(kind, {"round": event.round, "reason": event.reason})]
