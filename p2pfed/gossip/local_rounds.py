"""This node's way through the rounds in pairwise mode: train, meet a few peers, and on.

    JOINING    copy the model of a random peer that has one; else start from the genesis
    WAITING    not enough of the weight is alive to start a round
    FOLDING    taking stock: the view for the trainer and the copy for joiners are written
    GATHERING  training (if this node contributes), then `exchanges` meetings
    FINISHED   all rounds are done: some closing meetings, then answering those of others

A round belongs to one node: no delta is signed, `RunFacts` stays empty, and no two nodes hold the
same model. Peers meet in whatever rounds they are; a leaver drops out of the weighted sum, a joiner
copies a model and brings its own weight.

Invariants: nothing here waits for one particular peer; a round's meetings end at the latest
`deadline_s` after its start (its training has the trainer's own deadline); each round is trained at
most once and its change is added once. Nobody leaves a round that `quorum` of the weight that is
there has not reached, except by the deadline: who trains more often, or on older models, pulls more
than it weighs (measured on a quadratic, as a part of the way to the unweighted optimum: .01 to .04
instead of .04 to .07). A node that was away goes on in the round that more than a third of the
weight has reached, so that all finish together and no single member drags the others.

Measured: four gossip-only rounds after the last one shrink the disagreement from 4 % to .3 % of the
model; hence the closing meetings.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from p2pfed.gossip.events import Effect, FetchCheckpoint, Folded, Note, Released, Train
from p2pfed.gossip.facts import RunFacts
from p2pfed.gossip.meeting_events import (
    Learn,
    Learnt,
    PairEvent,
    Survived,
    TakeStock,
)
from p2pfed.gossip.meetings import Meetings
from p2pfed.gossip.membership import Membership
from p2pfed.gossip.progress import JOIN_PATIENCE, JOIN_SETTLE, Phase, Presence, Progress, Trained
from p2pfed.gossip.rounds import enough_alive, furthest_round
from p2pfed.identity.roster import Roster
from p2pfed.wire.meetings import MeetingMessage
from p2pfed.wire.messages import CheckpointOffer

__all__ = ["LocalRounds"]

CLOSING_ROUNDS = 4  # of meetings without training, after the last round
BEHIND = 4  # rounds; who is further behind goes on where the others are
TRIES = 4  # proposals per wanted meeting, at most
STOCK_EVERY = 1.0  # seconds between two looks at a model that still changes after the end


class LocalRounds(Progress):
    """See the module docstring.

    Args:
        facts: Gives the run and the weights; holds no delta.
        membership: The table of peers.
        survived: What survived the last stop, if there was one.
        rng: Chance for choosing peers.
        willing: Whether this node may show its model now.
    """

    def __init__(
        self,
        facts: RunFacts,
        membership: Membership,
        survived: Survived | None,
        *,
        rng: random.Random,
        willing: Callable[[], bool],
    ) -> None:
        held = survived or Survived()
        super().__init__(facts, membership.own_id, joining=held.fresh, round_=held.round)
        self.meetings = Meetings(facts.run, membership.own_id, rng, held)
        self._membership = membership
        self._rng = rng
        self._willing = willing
        self._last_asked = held.learnt
        self._learning = False
        self._before = (0, 0)  # meetings met and failed when the round began
        self._stock_of = -1  # how many meetings the last stock has seen
        self._last_stock = float("-inf")
        self._taken = 0
        self._roster: Roster | None = None
        self._near: frozenset[str] = frozenset()  # in the run and connected

    def advance(
        self,
        now: float,
        roster: Roster,
        presence: Presence,
        *,
        contributes: bool,
        ahead: Mapping[str, int],  # noqa: ARG002 - of deltas, and here are none
    ) -> list[Effect]:
        """Do whatever can be done now; see `Progress.advance`.

        Args:
            now: The core's clock, seconds.
            roster: The newest roster.
            presence: Who is there.
            contributes: Whether this node may train and show its model.
            ahead: Not used: there are no deltas.
        """
        self._roster = roster
        weights = self.facts.weights(roster.hash)
        self._near = self._connected(presence)
        effects = self.meetings.tick(now, self._near)
        if self.phase is Phase.JOINING:
            alone = enough_alive(
                weights, alive=presence.alive, left=presence.left, run=self.facts.run
            )
            effects += self._try_join(now, roster, presence, may_start_alone=alone)
        if self.phase in {Phase.WAITING, Phase.GATHERING}:
            effects += self._maybe_next(now, weights)
        if self.phase is Phase.WAITING and not self.folding.is_running:
            effects += self._maybe_begin(now, weights, presence)
        if self.phase is Phase.GATHERING and contributes:
            effects += self._maybe_train_here(roster)
        if self.phase in {Phase.GATHERING, Phase.FINISHED}:
            effects += self._maybe_meet(now, roster)
        if self.phase is Phase.FINISHED and not self.folding.is_running:
            effects += self._maybe_take_stock(now)
        return effects

    def _connected(self, presence: Presence) -> frozenset[str]:
        found = {p: self._membership.get(p) for p in presence.in_run}
        return frozenset(p for p, peer in found.items() if peer is not None and peer.connected)

    def hear(self, peer: str, message: MeetingMessage, now: float) -> list[Effect]:
        """A member speaks of a meeting.

        Raises:
            RemoteProtocolError: The message cannot come from a correct node.
        """
        roster = self._roster
        if roster is None:
            return []
        return self.meetings.on_message(
            peer,
            message,
            now,
            roster_hash=roster.hash,
            weights=self.facts.weights(roster.hash),
            willing=self.phase is not Phase.JOINING and self._willing(),
        )

    def on_pair_event(self, event: PairEvent, now: float) -> list[Effect]:
        """The shell did a piece of work on the model."""
        if not isinstance(event, Learnt):
            self._taken += 1
            return self.meetings.on_done_here(event, now)
        self._learning = False
        return [Note("change.learnt", {"round": event.round})]

    # --- joining -------------------------------------------------------------------------------

    def _try_join(
        self,
        now: float,
        roster: Roster,  # noqa: ARG002 - one model is as good as another: there is none for all
        presence: Presence,
        *,
        may_start_alone: bool,
    ) -> list[Effect]:
        if self._fetching or not (presence.in_run or may_start_alone):
            return []
        if self._asked_since is None:
            self._asked_since = now
        all_answered = bool(presence.in_run) and presence.in_run <= self.answered
        settled = all_answered and now >= self._first_offer + JOIN_SETTLE
        if not settled and now < self._asked_since + JOIN_PATIENCE:
            return []
        held = [(p, offers[-1]) for p, offers in sorted(self._offers.items()) if offers]
        there = [(p, offer) for p, offer in held if p in presence.in_run and offer.round]
        if not there:
            self.phase = Phase.WAITING
            return []
        peer, self._fetching = self._rng.choice(there)
        return [FetchCheckpoint(self._fetching, (peer,))]

    def fetched(self, offer: CheckpointOffer, *, ok: bool) -> list[Effect]:
        """A peer's model arrived and is ours now, or not: then another one is asked."""
        if offer != self._fetching:
            return []  # of a run that is over
        self._fetching = None
        if not ok:
            self._offers = {p: o for p, o in self._offers.items() if offer not in o}
            return [Note("join.checkpoint_failed", {"round": offer.round})]
        self._go_to(offer.round)
        return [Note("join.checkpoint", {"round": offer.round, "digest": offer.digest.hex()})]

    # --- rounds --------------------------------------------------------------------------------

    def _maybe_next(self, now: float, weights: Mapping[str, int]) -> list[Effect]:
        run = self.facts.run
        there = self._membership.rounds(run.run_id)
        target = furthest_round(weights, there, beyond=self.round + BEHIND)
        if target and not self._is_at_work:
            return self._enter(min(target, run.rounds), "behind")
        early = now < self._round_started + run.min_round_interval_s
        if self.phase is not Phase.GATHERING or early or self._is_at_work:
            return []
        late = now >= self._round_started + run.deadline_s
        if not late and (self._is_wanting() or self._is_ahead(weights, there)):
            return []
        done = {"meetings": self._met, "failed": self._failed}
        note = Note("round.finished", {"round": self.round, **done})
        return [note, *self._enter(self.round + 1, "")]

    def _is_ahead(self, weights: Mapping[str, int], there: Mapping[str, int]) -> bool:
        """Whether too few follow: who trains more rounds than others pulls more than it weighs."""
        following = sum(weights.get(p, 0) for p, round_ in there.items() if round_ >= self.round)
        return following < self.facts.run.quorum * sum(weights.get(p, 0) for p in there)

    @property
    def _is_at_work(self) -> bool:
        return self.training is not None or self._learning

    @property
    def _met(self) -> int:
        return self.meetings.met - self._before[0]

    @property
    def _failed(self) -> int:
        return self.meetings.failed - self._before[1]

    def _is_wanting(self) -> bool:
        """Whether this node still wants to begin meetings, or waits for the end of one."""
        wanted = self.facts.run.averaging.exchanges
        if self.phase is Phase.FINISHED:
            wanted *= CLOSING_ROUNDS
        enough = self._met >= wanted or self._met + self._failed >= TRIES * wanted
        nobody = not self._near or not self._willing()
        return self.meetings.is_engaged or not (enough or nobody)

    def _enter(self, round_: int, why: str) -> list[Effect]:
        self._before = self.meetings.met, self.meetings.failed
        return super()._enter(round_, why)

    def _maybe_begin(
        self, now: float, weights: Mapping[str, int], presence: Presence
    ) -> list[Effect]:
        run = self.facts.run
        if not enough_alive(weights, alive=presence.alive, left=presence.left, run=run):
            return []
        self.phase = Phase.FOLDING
        self._round_started = now
        return [self._take_stock(now), Note("round.started", {"round": self.round})]

    def _take_stock(self, now: float) -> TakeStock:
        self.folding.is_running = True
        self._last_stock = now
        self._stock_of = self._taken
        return TakeStock(self.round)

    def on_folded(self, folded: Folded) -> None:
        """The stock is taken."""
        self.folding.done(folded)
        if self.phase is Phase.FOLDING:
            self.phase = Phase.GATHERING if folded.round == self.round else Phase.WAITING

    def _maybe_take_stock(self, now: float) -> list[Effect]:
        """At the end the model still changes by meetings: look again now and then."""
        done = self.folded is not None and self.folded.round == self.round
        if done and self._stock_of == self._taken:
            return []
        return [self._take_stock(now)] if now >= self._last_stock + STOCK_EVERY else []

    def _maybe_meet(self, now: float, roster: Roster) -> list[Effect]:
        if self._is_at_work or self.meetings.is_engaged or not self._is_wanting():
            return []
        weights = self.facts.weights(roster.hash)
        return self.meetings.propose(now, self._near, roster.hash, weights)

    # --- training ------------------------------------------------------------------------------

    def _maybe_train_here(self, roster: Roster) -> list[Effect]:
        member = roster.member(self._own_id)
        if self._is_at_work or member is None or self.folded is None:
            return []
        if self._last_asked >= self.round or self.folded.round != self.round:
            return []
        self._last_asked = self.round
        self.training = Trained(self.round, roster.hash, self.folded.model_hash, member.samples)
        return [Train(self.round, member.samples)]

    def learn(self, event: Released) -> list[Effect]:
        """The change by local training: it becomes part of this node's own model."""
        self._learning = True
        note = Note("change.released", {"round": event.round, "bytes": len(event.payload)})
        return [Learn(event.round, event.payload), note]
