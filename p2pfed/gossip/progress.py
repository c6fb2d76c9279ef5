"""This node's way through the rounds of one run: join, wait, fold, train, gather, and on.

    JOINING    ask peers for a checkpoint that enough of them vouch for; else start from the genesis
    WAITING    not enough of the weight is alive to start a round
    FOLDING    the fold of all earlier rounds is being computed
    GATHERING  training (if this node contributes) and collecting the others' deltas
    FINISHED   all rounds are done; late deltas are still folded in

Invariants: nothing here waits for one particular peer; at most one `Train` is outstanding, and none
is asked for a round in which this node has a delta already; training starts are
`min_round_interval_s` apart. When rounds start and end is decided by the pure functions of
`rounds`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from p2pfed.gossip.events import Effect, FetchCheckpoint, Fold, Folded, Note, Train
from p2pfed.gossip.facts import RunFacts
from p2pfed.gossip.joining import trusted_checkpoint
from p2pfed.gossip.rounds import enough_alive, furthest_round, quorum_reached, weights_of
from p2pfed.identity.roster import Roster
from p2pfed.wire.messages import CheckpointOffer

__all__ = ["Phase", "Presence", "Progress", "Trained"]

JOIN_PATIENCE = 5.0  # seconds to wait for the peers' checkpoint lists
JOIN_SETTLE = 1.0  # seconds after the first list, so that others can answer
MAX_CHECKPOINT_BYTES_PER_PARAMETER = 32  # a model (4) and two moments (8 each), with room
MAX_CHECKPOINT_HEAD = 1 << 16
REFOLD_EVERY = 1.0  # seconds between folds of late deltas once the run is finished


class Phase(Enum):
    """Where this node is in its round."""

    JOINING = "joining"
    WAITING = "waiting for peers"
    FOLDING = "folding"
    GATHERING = "gathering"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Presence:
    """Who is there, as membership sees it; this node included.

    Attributes:
        alive: Present members.
        contributing: Present members whose deltas are to be waited for.
        left: Members that said goodbye.
        in_run: Connected peers that take part in this run.
    """

    alive: frozenset[str]
    contributing: frozenset[str]
    left: frozenset[str]
    in_run: frozenset[str]


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training was asked for: needed to sign its result."""

    round: int
    roster_hash: bytes
    view_hash: bytes
    samples: int


class Progress:
    """See the module docstring.

    Args:
        facts: The facts of the run.
        own_id: This node.
        joining: Whether to look for a checkpoint first.
        round_: The round to continue with.
    """

    def __init__(self, facts: RunFacts, own_id: str, *, joining: bool, round_: int) -> None:
        self.facts = facts
        self.phase = Phase.JOINING
        self.round = 0
        self.folded: Folded | None = None
        self.training: Trained | None = None
        self._own_id = own_id
        self._folding = False
        self._round_started = float("-inf")
        self._last_train = float("-inf")
        self._last_asked = -1
        self._last_fold = float("-inf")
        self._offers: dict[str, tuple[CheckpointOffer, ...]] = {}
        self._asked_since: float | None = None
        self._first_offer = float("inf")
        self._fetching: CheckpointOffer | None = None
        self._newcomer = joining
        if not joining:
            self._go_to(round_)

    def _go_to(self, round_: int) -> None:
        self.round = round_
        self.phase = Phase.FINISHED if round_ >= self.facts.run.rounds else Phase.WAITING

    def advance(
        self,
        now: float,
        roster: Roster,
        presence: Presence,
        *,
        contributes: bool,
        ahead: dict[str, int],
    ) -> list[Effect]:
        """Do whatever can be done now; calling it again at once does nothing.

        Args:
            now: The core's clock, seconds.
            roster: The newest roster.
            presence: Who is there.
            contributes: Whether this node may train and release.
            ahead: Newest round by origin among the deltas that are set aside.
        """
        weights = weights_of(roster)
        effects: list[Effect] = []
        if self.phase is Phase.JOINING:
            alone = enough_alive(
                weights, alive=set(presence.alive), left=set(presence.left), run=self.facts.run
            )
            effects += self._try_join(now, presence, may_start_alone=alone)
        if self.phase in {Phase.WAITING, Phase.GATHERING}:
            effects += self._maybe_next_round(now, weights, presence, ahead)
        if self.phase is Phase.WAITING and not self._folding:
            effects += self._maybe_start(now, weights, presence)
        if self.phase is Phase.GATHERING and contributes:
            effects += self._maybe_train(now, roster)
        if self.phase is Phase.FINISHED and not self._folding:
            effects += self._maybe_refold(now)
        return effects

    # --- joining -------------------------------------------------------------------------------

    @property
    def answered(self) -> frozenset[str]:
        """Peers that told which checkpoints they hold."""
        return frozenset(self._offers)

    def offered(self, peer: str, offers: tuple[CheckpointOffer, ...], now: float) -> None:
        """A peer told which checkpoints it holds; what cannot be one of this run is ignored."""
        run = self.facts.run
        most = MAX_CHECKPOINT_BYTES_PER_PARAMETER * run.num_parameters + MAX_CHECKPOINT_HEAD
        self._offers[peer] = tuple(o for o in offers if o.round <= run.rounds and o.size <= most)
        self._first_offer = min(self._first_offer, now)

    def _try_join(self, now: float, presence: Presence, *, may_start_alone: bool) -> list[Effect]:
        if self._fetching or not (presence.in_run or may_start_alone):
            return []
        if self._asked_since is None:
            self._asked_since = now
        all_answered = bool(presence.in_run) and presence.in_run <= set(self._offers)
        settled = all_answered and now >= self._first_offer + JOIN_SETTLE
        if not settled and now < self._asked_since + JOIN_PATIENCE:
            return []
        trusted = trusted_checkpoint(self._offers)
        if trusted is None or trusted[0].round <= self.round:
            self.phase = Phase.WAITING
            return []
        self._fetching = trusted[0]
        return [FetchCheckpoint(*trusted)]

    def fetched(self, offer: CheckpointOffer, *, ok: bool) -> list[Effect]:
        """The checkpoint arrived, or not; without it the run is folded from the genesis."""
        if offer != self._fetching:
            return []  # of a run that is over
        self._fetching = None
        self._go_to(max(self.round, offer.round if ok else 0))
        if not ok:
            return [Note("join.checkpoint_failed", {"round": offer.round})]
        self.facts.adopt(offer.round, offer.chain)
        return [Note("join.checkpoint", {"round": offer.round, "digest": offer.digest.hex()})]

    # --- rounds --------------------------------------------------------------------------------

    def _maybe_next_round(
        self, now: float, weights: dict[str, int], presence: Presence, ahead: dict[str, int]
    ) -> list[Effect]:
        run = self.facts.run
        newest = self.facts.newest_rounds() | ahead
        target = furthest_round(weights, newest)
        if target > self.round:
            return self._enter(min(target, run.rounds), "behind")
        if (
            self.phase is not Phase.GATHERING
            or now < self._round_started + run.min_round_interval_s
        ):
            return []
        arrived = {
            o for o in self.facts.origins(self.round) if not self.facts.is_out(o, self.round)
        }
        contributing = set(presence.contributing)
        late = now >= self._round_started + run.deadline_s
        if not arrived and not (late and self._gave_up):
            return []
        if not late and not quorum_reached(
            weights, contributing=contributing, arrived=arrived, run=run
        ):
            return []
        missing = sorted(contributing - arrived)
        return [
            Note(
                "round.finished", {"round": self.round, "deltas": len(arrived), "missing": missing}
            ),
            *self._enter(self.round + 1, "quorum" if not late else "deadline"),
        ]

    @property
    def _gave_up(self) -> bool:
        """Whether this node's trainer was asked for this round and gave nothing.

        If that happens to all in one round, nobody would ever leave it.
        """
        return self._last_asked == self.round and self.training is None

    def _enter(self, round_: int, why: str) -> list[Effect]:
        self._go_to(round_)
        if self.phase is Phase.FINISHED:
            return [Note("run.finished", {"rounds": round_})]
        return [Note("round.skipped_to", {"round": round_})] if why == "behind" else []

    def _maybe_start(self, now: float, weights: dict[str, int], presence: Presence) -> list[Effect]:
        alive, left = set(presence.alive), set(presence.left)
        if not enough_alive(weights, alive=alive, left=left, run=self.facts.run):
            return []
        self.phase = Phase.FOLDING
        self._round_started = now
        return [self._fold(now), Note("round.started", {"round": self.round})]

    def _fold(self, now: float) -> Fold:
        self._folding = True
        self._last_fold = now
        rounds = range(self.round)
        return Fold(
            self.round,
            tuple(self.facts.chain(r) for r in range(self.round + 1)),
            tuple(self.facts.counted(r) for r in rounds),
            self.facts.adopted_round,
        )

    def on_folded(self, folded: Folded) -> None:
        """The fold is done."""
        self._folding = False
        self.folded = folded
        if self.phase is Phase.FOLDING:
            self.phase = Phase.GATHERING if folded.round == self.round else Phase.WAITING
            newcomer, self._newcomer = self._newcomer, False
            if newcomer and self.round > 0:  # it may have lost its store: its own deltas of this
                self._last_asked = self.round  # round come back first, so it sits this one out

    def _maybe_refold(self, now: float) -> list[Effect]:
        folded = self.folded
        done = folded is not None and folded.round == self.round
        if done and folded is not None and folded.chain == self.facts.chain(self.round):
            return []
        return [self._fold(now)] if now >= self._last_fold + REFOLD_EVERY else []

    # --- training ------------------------------------------------------------------------------

    def _maybe_train(self, now: float, roster: Roster) -> list[Effect]:
        member = roster.member(self._own_id)
        if self.training is not None or member is None or self.folded is None:
            return []
        if self._last_asked >= self.round:
            return []  # a trainer that fails again and again must not spend again and again
        if (
            self.folded.round != self.round
            or self.facts.header(self.round, self._own_id) is not None
        ):
            return []
        if now < self._last_train + self.facts.run.min_round_interval_s:
            return []
        self._last_asked = self.round
        self._last_train = now
        self.training = Trained(self.round, roster.hash, self.folded.model_hash, member.samples)
        return [Train(self.round, member.samples)]

    def trained(self, round_: int) -> Trained | None:
        """The training for this round is over; returns what it was asked for."""
        training = self.training
        if training is None or training.round != round_:
            return None
        self.training = None
        return training
