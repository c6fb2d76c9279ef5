"""This node's way through the rounds of one run: join, wait, fold, train, gather, and on.

    JOINING    ask peers for a checkpoint that enough of them vouch for; else start from the genesis
    WAITING    not enough of the weight is alive to start a round
    FOLDING    the fold of all earlier rounds is being computed
    GATHERING  training (if this node contributes) and collecting the others' deltas
    FINISHED   all rounds are done; late deltas are still folded in

Invariants: nothing here waits for one particular peer; at most one `Train` is outstanding, and none
is asked for a round in which this node has a delta already or no seat; training starts are
`min_round_interval_s` apart. When rounds start and end is decided by the pure functions of
`rounds`, what is folded by `folding`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction

from p2pfed.gossip.events import Effect, FetchCheckpoint, Folded, Note, Train
from p2pfed.gossip.facts import RunFacts
from p2pfed.gossip.folding import Folding
from p2pfed.gossip.joining import VOUCHERS, trusted_checkpoint
from p2pfed.gossip.lateness import is_late
from p2pfed.gossip.rounds import enough_alive, furthest_round, quorum_reached
from p2pfed.identity.roster import Roster
from p2pfed.wire.messages import CheckpointOffer

__all__ = ["Phase", "Presence", "Progress", "Trained"]

JOIN_PATIENCE = 5.0  # seconds to wait for the peers' checkpoint lists
JOIN_SETTLE = 1.0  # seconds after the first list, so that others can answer
MAX_CHECKPOINT_BYTES_PER_PARAMETER = 32  # a model (4) and two moments (8 each), with room
MAX_CHECKPOINT_HEAD = 1 << 16
MOST_SCALE = 4  # of a member that is rarely there


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
        self.folding = Folding(facts)
        self.training: Trained | None = None
        self._own_id = own_id
        self._round_started = float("-inf")
        self._last_train = float("-inf")
        self._last_asked = -1
        self._offers: dict[str, tuple[CheckpointOffer, ...]] = {}
        self._asked_since: float | None = None
        self._first_offer = float("inf")
        self._fetching: CheckpointOffer | None = None
        self._newcomer = joining
        self._summed: tuple[Presence, dict[str, int], bool] | None = None
        self._seen: tuple[object, ...] = ()  # what `_target` was computed from
        self._target = 0
        self._owing = range(0)
        if not joining:
            self._go_to(round_)

    @property
    def folded(self) -> Folded | None:
        """What the last fold gave."""
        return self.folding.folded

    def _go_to(self, round_: int) -> None:
        self.round = round_
        self.facts.cool(round_ - self.facts.run.averaging.hot_rounds)
        self.phase = Phase.FINISHED if round_ >= self.facts.run.rounds else Phase.WAITING

    def advance(
        self,
        now: float,
        roster: Roster,
        presence: Presence,
        *,
        contributes: bool,
        ahead: Mapping[str, int],
    ) -> list[Effect]:
        """Do whatever can be done now; calling it again at once does nothing.

        Args:
            now: The core's clock, seconds.
            roster: The newest roster.
            presence: Who is there.
            contributes: Whether this node may train and release.
            ahead: Newest round by origin among the deltas that are set aside.
        """
        weights = self.facts.weights(roster.hash)
        effects = self._settle_debts()
        if self._owing:
            return effects
        if self.phase is Phase.JOINING:
            alone = self._is_enough(weights, presence)
            effects += self._try_join(now, roster, presence, may_start_alone=alone)
        if self.phase in {Phase.WAITING, Phase.GATHERING}:
            effects += self._maybe_next_round(now, roster, presence, contributes, ahead)
        if self.phase is Phase.WAITING and not self.folding.is_running:
            effects += self._maybe_start(now, weights, presence)
        if self.phase is Phase.GATHERING and contributes:
            effects += self._maybe_train(now, roster)
        return effects + self._keep_up(now)

    def _settle_debts(self) -> list[Effect]:
        """Say once what is missing to take a member out, and once that it is there."""
        owing, self._owing = self._owing, self.facts.owed
        if bool(owing) == bool(self._owing):
            return []
        if not self._owing:
            return [Note("forget.archive_complete", {})]
        data = {"first_round": self._owing[0], "last_round": self._owing[-1]}
        return [Note("forget.refused", data)]

    @property
    def owing(self) -> range:
        """Rounds whose deltas are missing to take a revoked member out of the model."""
        return self._owing

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

    def _try_join(
        self, now: float, roster: Roster, presence: Presence, *, may_start_alone: bool
    ) -> list[Effect]:
        if self._fetching or not (presence.in_run or may_start_alone):
            return []
        if self._asked_since is None:
            self._asked_since = now
        all_answered = bool(presence.in_run) and presence.in_run <= set(self._offers)
        settled = all_answered and now >= self._first_offer + JOIN_SETTLE
        if not settled and now < self._asked_since + JOIN_PATIENCE:
            return []
        others = self.facts.weights(roster.hash).keys() - {self._own_id}
        told = {peer: held for peer, held in self._offers.items() if peer in others}
        trusted = trusted_checkpoint(told, needed=min(VOUCHERS, len(others)))
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
        self,
        now: float,
        roster: Roster,
        presence: Presence,
        contributes: bool,
        ahead: Mapping[str, int],
    ) -> list[Effect]:
        run, weights = self.facts.run, self.facts.weights(roster.hash)
        target = self._furthest(roster, ahead)
        if target > self.round:
            return self._enter(min(target, run.rounds), "behind")
        if (
            self.phase is not Phase.GATHERING
            or now < self._round_started + run.min_round_interval_s
        ):
            return []
        arrived = self.facts.standing(self.round)
        seated = self.facts.seated(roster.hash, self.round)
        contributing = presence.contributing & seated
        late = now >= self._round_started + run.deadline_s
        idle = contributes and self._own_id not in seated
        if not arrived and not (late and (self._gave_up or idle)):
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

    def _furthest(self, roster: Roster, ahead: Mapping[str, int]) -> int:
        """The round where more than a third is; computed anew only when something has changed."""
        seen = (roster.hash, self.facts.num_deltas, tuple(ahead.items()), self.round)
        if seen != self._seen:
            self._seen = seen
            newest = self.facts.newest_rounds()
            for origin, round_ in ahead.items():
                newest[origin] = max(round_, newest.get(origin, 0))
            self._target = furthest_round(
                self.facts.weights(roster.hash),
                newest,
                lambda r: self.facts.seated(roster.hash, r),
                beyond=self.round,
                slack=self.facts.turn(roster.hash),
            )
        return self._target

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

    def _is_enough(self, weights: dict[str, int], presence: Presence) -> bool:
        """Whether a round may start; summed anew only when somebody came or went."""
        if (
            self._summed is None
            or self._summed[0] is not presence
            or self._summed[1] is not weights
        ):
            run, alive, left = self.facts.run, presence.alive, presence.left
            enough = enough_alive(weights, alive=alive, left=left, run=run)
            self._summed = (presence, weights, enough)
        return self._summed[2]

    def _maybe_start(self, now: float, weights: dict[str, int], presence: Presence) -> list[Effect]:
        if not self._is_enough(weights, presence):
            return []
        self.phase = Phase.FOLDING
        self._round_started = now
        return [
            self.folding.for_round(now, self.round),
            Note("round.started", {"round": self.round}),
        ]

    def is_late(self, round_: int) -> bool:
        """Whether a delta of this round waits until it counts."""
        return is_late(round_, self.round)

    def checkpoints_changed(self, checkpoints: Mapping[int, bytes]) -> None:
        """The checkpoints on disk are these: round -> chain."""
        self.folding.checkpoints_changed(checkpoints)

    def fold_fell_short(self) -> None:
        """A state that the last fold was to start from is gone: it is asked for anew."""
        self.folding.fell_short()
        if self.phase is Phase.FOLDING:
            self.phase = Phase.WAITING

    def on_folded(self, folded: Folded) -> None:
        """The fold is done."""
        self.folding.done(folded)
        if self.phase is Phase.FOLDING:
            self.phase = Phase.GATHERING if folded.round == self.round else Phase.WAITING
            newcomer, self._newcomer = self._newcomer, False
            if newcomer and self.round > 0:  # it may have lost its store: its own deltas of this
                self._last_asked = self.round  # round come back first, so it sits this one out

    def _is_idle(self, now: float) -> bool:
        """Whether no round starts or ends by itself, so that the model must be kept up to date."""
        if self.phase is Phase.GATHERING:
            late = now >= self._round_started + self.facts.run.deadline_s
            return late and self.training is None
        return self.phase is Phase.FINISHED or (
            self.phase is Phase.WAITING and self.folded is not None
        )

    def _keep_up(self, now: float) -> list[Effect]:
        fold = self.folding.while_idle(now, self.round) if self._is_idle(now) else None
        return [fold] if fold is not None else []

    # --- training ------------------------------------------------------------------------------

    def _maybe_train(self, now: float, roster: Roster) -> list[Effect]:
        member = roster.member(self._own_id)
        if self.training is not None or member is None or self.folded is None:
            return []
        if self.folding.is_running or not self.folding.stands:
            return []  # nobody else could say what a model without its facts was made of
        if self._last_asked >= self.round:
            return []  # a trainer that fails again and again must not spend again and again
        if self.folded.round != self.round or self.facts.holds(self.round, self._own_id):
            return []
        if now < self._last_train + self.facts.run.min_round_interval_s:
            return []
        if self._own_id not in self.facts.seated(roster.hash, self.round):
            return []
        self._last_asked = self.round
        self._last_train = now
        self.training = Trained(self.round, roster.hash, self.folded.model_hash, member.samples)
        return [Train(self.round, member.samples, self._scale())]

    def _scale(self) -> Fraction:
        """By how much this node's delta is scaled because it is rarely there."""
        if not self.facts.run.averaging.participation_scaling:
            return Fraction(1)
        share = self.facts.participation(self._own_id, self.round)
        return min(Fraction(MOST_SCALE), 1 / share)

    def trained(self, round_: int) -> Trained | None:
        """The training for this round is over; returns what it was asked for."""
        training = self.training
        if training is None or training.round != round_:
            return None
        self.training = None
        return training
