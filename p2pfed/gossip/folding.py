"""Which fold is asked for, and when: one at a time, from the newest state that is right.

A fold is asked for at the start of a round. While none starts (`idle`: too few peers, nobody
contributes, the run is over) the model is brought up to date now and then, more and more rarely
while only late deltas come. Which late deltas count is decided by `lateness`.

Invariants: at most one fold is outstanding; its plan begins at a round of which a state is held
that stands for the right facts, or with the genesis; once facts stop arriving, the last fold stands
for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from p2pfed.gossip.events import Fold, Folded
from p2pfed.gossip.facts import RunFacts
from p2pfed.gossip.lateness import due

__all__ = ["Folding"]

REFOLD_EVERY = 1.0  # seconds between folds while no round starts


class Folding:
    """See the module docstring.

    Args:
        facts: The facts of the run.
    """

    def __init__(self, facts: RunFacts) -> None:
        self.folded: Folded | None = None
        self.is_running = False
        self._facts = facts
        self._checkpoints: Mapping[int, bytes] = {}  # round -> chain of what is on disk
        self._whole_plan = True  # no state that is held can be relied on
        self._last_fold = float("-inf")
        self._last_late = float("-inf")  # when deltas older than the hot rounds were folded in
        self._idle_folds = 0  # since the last round start

    @property
    def stands(self) -> bool:
        """Whether the last model stands for facts that are held or believed."""
        return self.folded is not None and self.folded.chain != b""

    # --- asking --------------------------------------------------------------------------------

    def for_round(self, now: float, round_: int) -> Fold:
        """The fold that a round begins with."""
        self._idle_folds = 0
        return self._ask(now, round_, self._due(now, round_))

    def while_idle(self, now: float, round_: int) -> Fold | None:
        """The fold that is due though no round starts, if any."""
        if self.is_running or now < self._last_fold + self._pause():
            return None
        folded = self.folded
        late = self._due_while_idle(now, round_)
        current = (
            folded is not None
            and folded.round == round_
            and folded.chain == self._facts.chain(round_)
        )
        if current and not late:
            return None
        self._idle_folds += 1
        return self._ask(now, round_, late)

    def _ask(self, now: float, round_: int, late: set[int]) -> Fold:
        facts = self._facts
        if late:
            facts.fold_late(late)
            if round_ - min(late) > facts.run.averaging.hot_rounds:
                self._last_late = now
        self.is_running = True
        self._last_fold = now
        first = self._oldest_needed(round_)
        return Fold(
            round_,
            tuple(facts.chain(r) for r in range(first, round_ + 1)),
            tuple(facts.counted(r) for r in range(first, round_)),
            facts.adopted_round,
            first,
        )

    def _pause(self) -> float:
        """Seconds after the last fold; doubled by each, so that nobody can make it go on."""
        most = max(REFOLD_EVERY, self._facts.run.averaging.late_interval_s)
        return min(most, REFOLD_EVERY * 2.0 ** min(max(0, self._idle_folds - 2), 30))

    def _due(self, now: float, round_: int) -> set[int]:
        rules = self._facts.run.averaging
        old_too = now >= self._last_late + rules.late_interval_s
        waiting = self._facts.late_rounds
        found = due(waiting, round_, hot_rounds=rules.hot_rounds, old_too=old_too)
        return found | self._facts.missed_rounds

    def _due_while_idle(self, now: float, round_: int) -> set[int]:
        rules = self._facts.run.averaging
        old_too = now >= self._last_late + rules.late_interval_s
        oldest = 0 if old_too else round_ - rules.hot_rounds
        return {r for r in self._facts.late_rounds if r >= oldest} | self._facts.missed_rounds

    def _oldest_needed(self, round_: int) -> int:
        """The newest round of which a state is held that stands for the right facts."""
        if self._whole_plan:
            return 0
        held = dict(self._checkpoints)
        if self.folded is not None:
            held[self.folded.round] = self.folded.chain
        right = (r for r in held if r <= round_ and held[r] == self._facts.chain(r))
        return max(right, default=0)

    # --- what comes back -----------------------------------------------------------------------

    def done(self, folded: Folded) -> None:
        """The fold is done."""
        self.is_running = False
        self._whole_plan = False
        self.folded = folded

    def fell_short(self) -> None:
        """A state that the last fold was to start from is gone: start from the genesis."""
        self.is_running = False
        self._whole_plan = True

    def checkpoints_changed(self, checkpoints: Mapping[int, bytes]) -> None:
        """The checkpoints on disk are these: round -> chain."""
        self._checkpoints = checkpoints
