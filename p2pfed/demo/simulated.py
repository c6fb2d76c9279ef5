"""Many hospitals that really train, without daemons: any task, in this process.

Map: `SimulatedHospitals` (what each of them releases in a round: the code of the daemon's trainer,
with ledger, gate and what stays at home) -> `federate` (rounds in which everybody is heard,
folded as every node folds them) and `in_simulation` (the same hospitals on the simulated network,
where deltas are late and nodes crash: `p2pfed simulate NAME --task`).

Invariant: what a hospital releases is a function of run, round and model, on one machine and for
one version of torch; under a privacy mechanism the noise is new every time.

Not here: the network of the simulation (simulate room), daemons (`federation`).
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from p2pfed.config import Settings
from p2pfed.errors import ConfigError, UpdateRejected
from p2pfed.gossip.fold import ModelState, Weighted, fold_round, genesis_state, view_of
from p2pfed.identity.run import Run
from p2pfed.privacy.ledger import Ledger
from p2pfed.simulate.scenario import Scenario
from p2pfed.simulate.training import Bring
from p2pfed.training.home import Home
from p2pfed.training.local import evaluate, initial_vector
from p2pfed.training.round import Hospital, Released
from p2pfed.training.task import Options, Task, TaskData, load_task, task_id
from p2pfed.wire.payload import Payload, decode_payload

__all__ = [
    "Member",
    "SimulatedHospitals",
    "federate",
    "fitting",
    "in_simulation",
    "members_of",
]

Member = tuple[Task, TaskData[Any]]
Vector = NDArray[np.float32]

JUDGES = 8  # hospitals whose tests say how good a model is


class SimulatedHospitals:
    """Hospitals by peer id; a `simulate.training.Training`, and a context manager.

    Args:
        run: What they all train; see `fitting`.
        members: Task and patients by peer id.
        folder: For their ledgers; None makes a temporary one.

    Raises:
        PrivacyError: A ledger cannot be written.
    """

    def __init__(self, run: Run, members: Mapping[str, Member], folder: Path | None = None) -> None:
        self.run = run
        self._open = ExitStack()
        if folder is None:
            made = self._open.enter_context(tempfile.TemporaryDirectory(prefix="p2pfed-hospitals-"))
            folder = Path(made)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._hospitals = {
            peer: self._hospital(peer, member, folder / f"{number}.db")
            for number, (peer, member) in enumerate(members.items())
        }
        peers = list(members)
        self._judges = peers[:: max(1, len(peers) // JUDGES)][:JUDGES]

    def _hospital(self, peer: str, member: Member, path: Path) -> Hospital:
        task, data = member
        private = self.run.mechanism != "none"
        allowed = {"epsilon": str(float(self.run.epsilon)), "delta": str(float(self.run.delta))}
        settings = Settings.model_validate(
            {
                "node": {"name": peer[-12:], "data_dir": path.parent},
                "train": {"task": task.name},
                "privacy": {"ledger": path, **(allowed if private else {"allow_none": True})},
            }
        )
        return Hospital(settings, task, data, self._open.enter_context(Ledger.open(path)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def samples(self, peer: str) -> int:
        """How many patients of a hospital train."""
        count: int = self._hospitals[peer].data.train.num_patients
        return count

    def home(self, peer: str) -> Home:
        """What a hospital's last round left at home."""
        return self._hospitals[peer].homes.of(self.run.run_id)

    def train(self, peer: str, round_: int, model: NDArray[np.int32]) -> Payload:
        """What a hospital releases in a round.

        Args:
            peer: Which hospital.
            round_: Which round.
            model: The common model before it, in multiples of the run's grid, shape (P,).

        Raises:
            UpdateRejected: It releases nothing: its policy, its budget or its training forbid it.
        """
        hospital = self._hospitals[peer]
        view = model.astype(np.float32) * np.float32(2.0**-self.run.grid_bits)
        result = hospital.run_round(self.run, round_, view, samples=self.samples(peer))
        if not isinstance(result, Released):
            raise UpdateRejected(
                f"a simulated hospital releases nothing in round {round_}",
                result.reason,
                "correct the run's constants or the task",
            )
        return decode_payload(
            result.payload,
            num_parameters=self.run.num_parameters,
            max_released=self.run.max_released,
            width=self.run.encoding.values,
        )

    def evaluate(self, peer: str, vector: Vector) -> dict[str, float]:
        """The metrics of a common model, and of what is at home, on a hospital's tests."""
        hospital = self._hospitals[peer]
        return evaluate(hospital.task, vector, hospital.data.test, home=self.home(peer))

    def score(self, model: NDArray[np.int32]) -> float | None:
        """Mean of the task's `monitor` over some hospitals' tests, where more of it is better."""
        task = self._hospitals[self._judges[0]].task
        if not task.larger_is_better:
            return None
        view = model.astype(np.float32) * np.float32(2.0**-self.run.grid_bits)
        values = [self.evaluate(peer, view).get(task.monitor) for peer in self._judges]
        there = [value for value in values if value is not None]
        return statistics.mean(there) if there else None


def members_of(spec: str, count: int, *, data: Path | None = None, **options: Any) -> list[Member]:
    """Task and patients of hospitals 0 to `count` - 1, by the options `site` and `sites`.

    Args:
        spec: As `train.task` names it.
        count: How many.
        data: As `train.data`.
        options: Further options, the same for all.

    Raises:
        ConfigError: No such task, or it has no such site.
    """
    members = []
    for site in range(count):
        own: Options = {**options, "site": site, "sites": count}
        task = load_task(spec, own)
        members.append((task, task.data(data, own)))
    return members


def fitting(run: Run, task: Task) -> Run:
    """The run with the task and the size of its model."""
    size = initial_vector(task, seed=0).size
    return replace(run, task=task.name, task_id=task_id(task), num_parameters=size)


def federate(
    hospitals: SimulatedHospitals,
    members: Sequence[str],
    genesis: Vector,
    *,
    heard: Callable[[ModelState], None] = lambda _state: None,
) -> Vector:
    """All rounds of the run, every hospital heard in each.

    Args:
        hospitals: Those who train.
        members: Their peer ids.
        genesis: The first model, shape (P,).
        heard: Is told the state after each round.

    Returns:
        The common model, shape (P,), on the run's grid.
    """
    run = hospitals.run
    state = genesis_state(genesis, run)
    for round_ in range(run.rounds):
        deltas = [
            Weighted(hospitals.train(peer, round_, state.model), hospitals.samples(peer))
            for peer in members
        ]
        fold_round(state, deltas, run)
        heard(state)
    return view_of(state, run.grid_bits)


@contextmanager
def in_simulation(
    scenario: Scenario, members: Sequence[Member], *, seed: int = 0
) -> Iterator[tuple[Scenario, Bring]]:
    """A scenario with real hospitals in it.

    Args:
        scenario: Its members are as many as `members`.
        members: Task and patients of each.
        seed: Fixes the first model.

    Yields:
        The scenario with the hospitals' numbers of patients, and what `simulate.play.play` takes as
        `bring`; the hospitals' ledgers are gone at the end.

    Raises:
        ConfigError: There are more or fewer of them.
    """
    if len(members) != scenario.members:
        raise ConfigError(
            f"the scenario has {scenario.members} members, the task {len(members)} hospitals",
            "each member is one hospital",
            "change members.count",
        )
    samples = tuple(data.train.num_patients for _, data in members)
    task = members[0][0]
    genesis = initial_vector(task, seed=seed)
    with ExitStack() as opened:

        def bring(run: Run, peers: Sequence[str]) -> tuple[Run, Vector, SimulatedHospitals]:
            fitted = fitting(run, task)
            mine = dict(zip(peers, members, strict=True))
            return fitted, genesis, opened.enter_context(SimulatedHospitals(fitted, mine))

        yield replace(scenario, samples=samples), bring
