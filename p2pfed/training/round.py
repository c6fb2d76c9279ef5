"""One round at one hospital: from the public model to the bytes that may leave.

Order: the hospital's own policy -> the run's ceiling -> contributions and a public plan -> the
privacy gate (debit, noise, output) -> post-processing on the run's grid. With mechanism `none` one
vector, the change by ordinary local training (`feedback`), takes the place of the patients'
contributions, and the gate keeps it so that a round never has two answers.

Formal guarantee: what a `Released` holds is computed from the gate's output and public facts only
(plan, run, the roster's number of patients): post-processing. All debits of one run together stay
within the run's epsilon, and all debits on a patient within the hospital's lifetime budget. The
threshold of `svt` follows from this node's own earlier releases of the run. `Skipped`, `Refused`
and `Exhausted` carry fixed texts and public numbers; the one bit of a worth gate is paid for.

Not here: whether the hospital takes part (`acceptance`), the plans of the rounds (`plans`),
clipping, noise, budget (privacy room), signing and sending (network process).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from p2pfed.config import Settings
from p2pfed.errors import BudgetExhausted, UpdateRejected
from p2pfed.identity.run import Run
from p2pfed.privacy.accountant import Budget, fits, forecast
from p2pfed.privacy.gate import NotWorth, decode_release, release_round
from p2pfed.privacy.gaussian import GaussianPlan
from p2pfed.privacy.ledger import Ledger, ReleaseKey, Spent
from p2pfed.privacy.mechanism import Mechanism
from p2pfed.privacy.svt import SvtPlan, next_threshold
from p2pfed.privacy.units import Contributions
from p2pfed.privacy.worth import WorthGate
from p2pfed.training.acceptance import Installed, why_not
from p2pfed.training.contributions import of_no_use
from p2pfed.training.crew import Crew
from p2pfed.training.feedback import LocalChange, LocalMemory
from p2pfed.training.guarded import OfTask, words_of_the_task
from p2pfed.training.hardware import CPU, Hardware
from p2pfed.training.home import Home, HomeFolder
from p2pfed.training.local import HospitalContribution, Trained, quantise
from p2pfed.training.plans import Budgeted, contributions_of, plan_for, worth_plan
from p2pfed.training.task import Patients, Task, TaskData
from p2pfed.training.together import contributions_together, train_together
from p2pfed.training.vector import MeanDelta, Vector
from p2pfed.training.watch import Watch
from p2pfed.wire.payload import encode_payload

__all__ = ["Exhausted", "Hospital", "Refused", "Released", "RoundResult", "Skipped"]

_NO_BUDGET = 1e-6  # stands for epsilon 0, which only mechanism `none` gets to see


@dataclass(frozen=True, slots=True)
class Released:
    """What may leave; the same again whenever the same round is asked for.

    Attributes:
        payload: The encoded vector, see wire.payload.
        mechanism: What it was drawn with.
        spent_nano_rho: Cumulative spending of these patients, in 1e-9 rho.
        spent_epsilon: The same as epsilon at the hospital's delta.
        releases: Outputs drawn on these patients so far.
        ledger_head: 32 bytes.
        saturated: Entries cut off at the end of the values' range; public.
        releases_left: How many more of this run the lifetime budget allows.
    """

    payload: bytes
    mechanism: str
    spent_nano_rho: int
    spent_epsilon: float
    releases: int
    ledger_head: bytes
    saturated: int
    releases_left: int


@dataclass(frozen=True, slots=True)
class Exhausted:
    """The budget of the patients or of the run does not allow a release; nothing was spent."""

    spent_nano_rho: int
    spent_epsilon: float
    releases: int
    ledger_head: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """This round cannot be trained, and the reason is not a matter of policy.

    Under a privacy mechanism it follows from public facts alone, for it is seen and not paid for
    (the number of patients, which the neighbouring relation holds public, is one: far more than
    the roster says do not fit the grid); or it is the answer of a worth gate, which is paid for.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The hospital's policy or its installed task does not allow this run."""

    reason: str


RoundResult = Released | Exhausted | Skipped | Refused


class Hospital:
    """One hospital's patients with the task, the policy and the ledger that guard them.

    Args:
        settings: The hospital's own limits.
        task: As installed here.
        data: Its patients.
        ledger: Open, and owned by this process.
        hardware: Where to compute, and how.
        watch: Is told of time and progress.
        state: Folder for what stays at home between rounds; None keeps it in memory.
        installed: The task as a run must fit it, if that is known already.

    Attributes:
        crew: Other processes that work on a round together with this one.

    Raises:
        PrivacyError: The ledger cannot be written.
    """

    def __init__(
        self,
        settings: Settings,
        task: Task,
        data: TaskData[Any],
        ledger: Ledger,
        *,
        hardware: Hardware = CPU,
        watch: Watch | None = None,
        state: Path | None = None,
        installed: Installed | None = None,
    ) -> None:
        self.task = task
        self.data = data
        self.ledger = ledger
        self.hardware = hardware
        self.watch = watch or Watch()
        self.crew: Crew | None = None
        self._installed = installed or Installed.of(task, data)
        self.task_id = self._installed.task_id
        self.num_parameters = self._installed.num_parameters
        self.homes = HomeFolder(state, self.task_id)
        self.unusable = 0  # patients whose row was not finite in the last round; never leaves
        with words_of_the_task("naming its patients"):
            patients = data.train.patient_records()
        self.dataset = ledger.register(f"{task.name} at {settings.node.name}", patients)
        self.policy = settings.privacy
        self._thresholds: dict[bytes, tuple[int, int]] = {}
        self._worth: dict[tuple[bytes, int], WorthGate] = {}  # a restart ends their instances
        self._memory: tuple[bytes, LocalMemory] = (b"", LocalMemory())
        self._groups: tuple[int, Patients] = (1, data.train)

    @property
    def spent(self) -> Spent:
        """What these patients have spent so far, at the hospital's delta."""
        return self.ledger.spent(self.dataset, delta=float(self.policy.delta))

    @property
    def shares_metrics(self) -> bool:
        """Whether the hospital lets all members know its main metric, rounded."""
        return self.policy.share_metrics == "rounded"

    @property
    def budget(self) -> Budget:
        """The lifetime ceiling."""
        return Budget(
            epsilon=float(self.policy.epsilon) or _NO_BUDGET, delta=float(self.policy.delta)
        )

    def run_round(
        self,
        run: Run,
        round_number: int,
        view: Vector,
        *,
        samples: int,
        scale: Fraction = Fraction(1),
        mean: MeanDelta | None = None,
    ) -> RoundResult:
        """Do one round, or give again what it gave.

        Args:
            run: The accepted run.
            round_number: 0 to run.rounds.
            view: The public model, shape (P,), finite.
            samples: The hospital's number of patients in the roster: public.
            scale: What the values are multiplied by after the gate, 1 to 4: public. A repeat of the
                round must name the same samples and scale.
            mean: The newest public mean delta; used by drift correction alone.

        Raises:
            PrivacyError: The ledger does not verify or cannot be written; nothing leaves.
        """
        reason = why_not(
            run, round_number, samples, scale, installed=self._installed, policy=self.policy
        )
        if reason:
            return Refused(reason)
        key = ReleaseKey(run.run_id, round_number)
        try:
            plan = self._plan(run, round_number, samples)
        except ValueError:
            return Refused("the run's budget is too small for its size")
        worth = self._worth_gate(run, plan)
        if self.ledger.output(key) is None and self._run_is_paid_for(run, worth):
            return self._exhausted(
                "the run's releases are paid for; a run never passes its epsilon"
            )
        self.unusable = 0
        with words_of_the_task():
            contributions = self._contributions(run, round_number, view, mean)
        try:
            with self.watch.spent_on("gate"):
                gate = release_round(
                    OfTask(contributions, skips=run.mechanism == "none"),
                    plan=plan,
                    ledger=self.ledger,
                    dataset=self.dataset,
                    key=key,
                    budget=self.budget,
                    worth=worth,
                )
        except BudgetExhausted:
            return self._exhausted("the lifetime budget of these patients does not allow it")
        except UpdateRejected:  # its text may count patients; under a mechanism no value causes it
            return Skipped("the update is not finite or does not fit the run")
        self._count_unusable(run, contributions)
        if isinstance(gate, NotWorth):
            return Skipped("the worth gate said no: this update is not worth its budget")
        # `none` gives the mean update on the run's grid, the others a sum over contributions.
        unit = 2.0**-plan.bits
        if run.mechanism != "none":
            unit /= contributions_of(run, samples)
        result = quantise(
            gate.release.indices,
            gate.release.values * (unit * float(scale)),
            grid_bits=run.grid_bits,
            width=run.encoding.values,
        )
        if isinstance(contributions, LocalChange) and contributions.made is not None:
            self._memory[1].keep(contributions.made, result.payload, unit=unit / float(scale))
        if (home := getattr(contributions, "home", None)) is not None:
            self._keep_home(run, home)
        spent = gate.spent
        return Released(
            payload=encode_payload(
                result.payload, num_parameters=run.num_parameters, width=run.encoding.values
            ),
            mechanism=gate.mechanism,
            spent_nano_rho=spent.rho_nano,
            spent_epsilon=spent.epsilon,
            releases=spent.releases,
            ledger_head=spent.head,
            saturated=result.saturated,
            releases_left=self._releases_left(run),
        )

    def _count_unusable(self, run: Run, contributions: Contributions) -> None:
        self.unusable = getattr(contributions, "unusable", 0)
        if self.unusable:
            self.watch.note(of_no_use(run.unit, self.unusable, contributions.num_patients))

    def _keep_home(self, run: Run, home: Home) -> None:
        """What is paid for is released even where the disk is full."""
        try:
            self.homes.keep(run.run_id, home)
        except OSError as error:
            self.watch.note(f"what stays at home is in memory only: {error.strerror}")

    def _run_is_paid_for(self, run: Run, worth: WorthGate | None) -> bool:
        """Whether one more release, and its worth gate if not open, would pass its epsilon."""
        if run.mechanism == "none":
            return False
        share = Budgeted.of(run)
        cost = share.cost if worth is None or worth.is_open else share.together
        ceiling = Budget(epsilon=float(run.epsilon), delta=float(run.delta))
        return not fits(ceiling, self.ledger.costs_of_run(run.run_id), cost)

    def _releases_left(self, run: Run) -> int:
        """How many more releases of this run the budgets allow; public, like the spending."""
        if run.mechanism == "none":
            return run.rounds
        cost = Budgeted.of(run).together
        ceiling = Budget(epsilon=float(run.epsilon), delta=float(run.delta))
        return min(
            forecast(ceiling, self.ledger.costs_of_run(run.run_id), cost, fixed=True),
            forecast(self.budget, self.ledger.costs(self.dataset), cost),
        )

    def _worth_gate(self, run: Run, plan: Mechanism) -> WorthGate | None:
        """The run's open instance; a grid with another sensitivity has an instance of its own."""
        asking = worth_plan(run)
        if asking is None or not isinstance(plan, SvtPlan | GaussianPlan):
            return None
        moves = plan.unit.moves * plan.limit
        return self._worth.setdefault((run.run_id, moves), WorthGate(asking))

    def _exhausted(self, reason: str) -> Exhausted:
        spent = self.spent
        return Exhausted(spent.rho_nano, spent.epsilon, spent.releases, spent.head, reason)

    def _contributions(
        self, run: Run, round_number: int, view: Vector, mean: MeanDelta | None
    ) -> Contributions:
        seed = int.from_bytes(hashlib.blake2b(_label(run, round_number), digest_size=7).digest())
        if run.unit == "patient":
            group = run.gate.patients_per_row
            return contributions_together(
                self.crew,
                self.task,
                self._grouped(group),
                view,
                patients_per_row=group,
                seed=seed,
                hardware=self.hardware,
                watch=self.watch,
            )

        def train(shift: Vector | None = None) -> Trained:
            return self.train(run, view, seed=seed, shift=shift)

        if run.unit == "hospital":
            return HospitalContribution(view, train)
        if self._memory[0] != run.run_id:
            self._memory = (run.run_id, LocalMemory.of(run))
        return LocalChange(
            view,
            train,
            round_number=round_number,
            steps=self.task.hyper.local_steps,
            memory=self._memory[1],
            mean=mean,
        )

    def train(self, run: Run, view: Vector, *, seed: int, shift: Vector | None) -> Trained:
        """Ordinary local training of one round; the loop form puts its own in its place."""
        return train_together(
            self.crew,
            self.task,
            self.data.train,
            view,
            seed=seed,
            hardware=self.hardware,
            shift=shift,
            home=self.homes.of(run.run_id),
            watch=self.watch,
        )

    def end(self) -> None:
        """End the other processes, where there are some."""
        if self.crew is not None:
            self.crew.end()

    def _grouped(self, size: int) -> Patients:
        """The training patients in groups of `size`, kept from round to round."""
        if self._groups[0] != size:
            everybody: Patients = self.data.train
            self._groups = (size, everybody.grouped(size) if size > 1 else everybody)
        return self._groups[1]

    def _plan(self, run: Run, round_number: int, samples: int) -> Mechanism:
        """The round's plan; the threshold of `svt` follows from the earlier releases of the run."""
        plan = plan_for(run, samples, seed=_label(run, round_number))
        if not isinstance(plan, SvtPlan):
            return plan
        done, threshold = self._thresholds.get(run.run_id, (0, plan.threshold))
        if done > round_number:
            done, threshold = 0, plan.threshold
        for earlier in range(done, round_number):
            stored = self.ledger.output(ReleaseKey(run.run_id, earlier))
            if stored is not None:
                as_it_was = plan_for(run, samples, seed=_label(run, earlier), threshold=threshold)
                assert isinstance(as_it_was, SvtPlan)
                threshold = next_threshold(as_it_was, decode_release(stored.payload))
        self._thresholds[run.run_id] = (round_number, threshold)
        return plan.at_threshold(threshold)


def _label(run: Run, round_number: int) -> bytes:
    return run.run_id + round_number.to_bytes(8)
