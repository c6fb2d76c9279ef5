"""Plays one seed of a scenario to its end, and says what happened.

The timeline and the churn run until `until_s`; then everything heals, nobody releases any more, and
the honest members have `settle_s` to agree. The first broken invariant ends the seed; an exception
out of a core is one as well, since `handle` always returns.

Invariant: the result is a function of the scenario and the seed.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from p2pfed.gossip.events import Effect, Event
from p2pfed.simulate.cast import Cast
from p2pfed.simulate.constants import run_of
from p2pfed.simulate.folds import Broken
from p2pfed.simulate.heap import EventHeap
from p2pfed.simulate.invariants import Invariants
from p2pfed.simulate.measures import Measures
from p2pfed.simulate.node import SimulatedNode
from p2pfed.simulate.scenario import Scenario
from p2pfed.simulate.timeline import Timeline
from p2pfed.simulate.training import Bring, training_of
from p2pfed.simulate.wires import Links, Timers

__all__ = ["Result", "Stage", "play"]


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one seed.

    Attributes:
        seed: The seed.
        broken: The invariant that does not hold, or empty.
        at_s: When it ended, simulated seconds.
        events: How many events cores were given.
        trace: Hash over all of them, hex; empty if not traced.
        node_hours: Simulated hours of all nodes that were up.
        rounds: The furthest round of an honest node.
        releases: How many deltas were released.
        model: Hash of the final model where there is one for all, hex.
        folds: Folds done in full, and taken over.
        coverage: Share of releases that had arrived, by gossip intervals.
        points: The curves, see `Measures`.
        detail: A traceback, if a core raised.
    """

    seed: int
    broken: str
    at_s: float
    events: int
    trace: str
    node_hours: float
    rounds: int
    releases: int
    model: str
    folds: tuple[int, int]
    coverage: list[float] = field(repr=False)
    points: list[dict[str, Any]] = field(repr=False)
    detail: str = ""


class Stage:
    """One seed of one scenario, ready to run.

    Args:
        scenario: What happens.
        seed: Which chance.
        traced: Whether to hash every event.
        checked: Whether to check invariants; without, only speed can be measured.
        bring: Real training instead of the scenario's own.
    """

    def __init__(
        self,
        scenario: Scenario,
        seed: int,
        *,
        traced: bool = True,
        checked: bool = True,
        bring: Bring | None = None,
    ) -> None:
        self.scenario = scenario
        self.seed = seed
        self.node_seconds = 0.0
        self._counted_at = 0.0
        cast = Cast(scenario, seed)
        run = run_of(scenario.run, cast.rosters[0].hash)
        genesis = np.zeros(run.num_parameters, np.float32)
        if bring is not None:
            run, genesis, self.training = bring(run, cast.peers)
        else:
            weights = dict(zip(cast.peers, cast.samples, strict=True))
            self.training = training_of(scenario.training, run, seed, weights)
        durations = random.Random(f"{seed}/durations")  # noqa: S311 - a simulation
        self.heap = EventHeap(
            run,
            genesis,
            train=self.training.train,
            seed=seed,
            links=Links(
                *scenario.latency_s, scenario.loss, spike=scenario.spike, spike_s=scenario.spike_s
            ),
            timers=Timers(scenario.tick_s, scenario.sync_s, scenario.liveness),
            train_seconds=lambda _peer: durations.uniform(*scenario.train_s),
            contacts=tuple(cast.peers[: scenario.contacts]),
            full_fold_every=scenario.full_fold_every,
            traced=traced,
        )
        self.timeline = Timeline(self.heap, cast, scenario, seed)
        self.invariants = Invariants(self.heap, cast, self.timeline, scenario)
        self.measures = Measures(scenario.liveness.gossip_interval, self.training)
        if checked:
            self.heap.watch = self._watch
        self._checked = checked
        self.timeline.schedule()
        self._every(scenario.sample_s, self._sample)
        if checked:
            self._every(scenario.check_every_s, self.invariants.check)
            self._every(run.deadline_s, self.invariants.check_progress)

    def _watch(self, node: SimulatedNode, event: Event, effects: list[Effect]) -> None:
        if effects:
            self.invariants.watch(node, event, effects)
            self.measures.watch(node, self.heap.now, effects, len(self.timeline.nodes))

    def _every(self, seconds: float, what: Callable[[], None]) -> None:
        def again() -> None:
            what()
            if self.heap.now + seconds <= self.scenario.until_s:
                self.heap.later(seconds, again)

        self.heap.later(seconds, again)

    def _sample(self) -> None:
        self.count_hours()
        self.measures.sample(self.heap.now, self.invariants.honest())

    def count_hours(self) -> None:
        """Add the time since the last call, for the nodes that are up."""
        now = self.heap.now
        up = self.timeline.up
        self.node_seconds += up * (now - self._counted_at)
        self._counted_at = now

    def run_until(self, when: float) -> None:
        """Let the world run."""
        self.heap.run_until(when)

    def settle(self) -> None:
        """Heal everything and wait until the honest members agree; then check the end."""
        self.timeline.heal_everything()
        if not self.scenario.agree:
            return
        end = self.heap.now + self.scenario.settle_s
        step = max(1.0, self.scenario.settle_s / 100)
        while self.heap.now < end and not self.invariants.has_settled():
            self.heap.run_until(min(end, self.heap.now + step))
            self._sample()
        if self._checked:
            self.invariants.check_the_end()


def play(
    scenario: Scenario,
    seed: int,
    *,
    progress: Callable[[float], None] = lambda _done: None,
    traced: bool = True,
    bring: Bring | None = None,
) -> Result:
    """Play one seed.

    Args:
        scenario: What happens.
        seed: Which chance.
        progress: Told the simulated seconds that are over.
        traced: Whether to hash every event.
        bring: Real training instead of the scenario's own; what it raises ends the seed as broken.
    """
    stage = Stage(scenario, seed, traced=traced, bring=bring)
    broken, detail = "", ""
    try:
        for step in range(1, 101):
            stage.run_until(scenario.until_s * step / 100)
            progress(stage.heap.now)
        stage.settle()
    except Broken as error:
        broken = str(error)
    except Exception as error:  # noqa: BLE001 - a core must never raise, whatever it is given
        broken = f"a core raised {type(error).__name__}: {error}"
        detail = traceback.format_exc()
    stage.count_hours()
    honest = stage.invariants.honest()
    models = {node.hash for node in honest}
    return Result(
        seed=seed,
        broken=broken,
        at_s=stage.heap.now,
        events=stage.heap.events,
        trace=stage.heap.trace,
        node_hours=stage.node_seconds / 3600,
        rounds=max((node.round for node in honest), default=0),
        releases=stage.invariants.releases,
        model=models.pop().hex() if len(models) == 1 else "",
        folds=(stage.heap.folds.in_full, stage.heap.folds.taken_over),
        coverage=stage.measures.coverage(),
        points=stage.measures.points,
        detail=detail,
    )
