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

Not here: the plans of the rounds (`plans`), clipping, noise, budget (privacy room), signing and
sending (network process).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction

import torch

from p2pfed.config import Settings
from p2pfed.errors import BudgetExhausted, ConfigError, UpdateRejected
from p2pfed.identity.run import Run
from p2pfed.privacy.accountant import Budget, fits, forecast
from p2pfed.privacy.gate import NotWorth, decode_release, release_round
from p2pfed.privacy.gaussian import GaussianPlan
from p2pfed.privacy.ledger import Ledger, ReleaseKey, Spent
from p2pfed.privacy.mechanism import Mechanism
from p2pfed.privacy.svt import SvtPlan, next_threshold
from p2pfed.privacy.units import Contributions
from p2pfed.privacy.worth import WorthGate
from p2pfed.training.contributions import PatientContributions
from p2pfed.training.feedback import LocalChange, LocalMemory
from p2pfed.training.guarded import OfTask, words_of_the_task
from p2pfed.training.local import HospitalContribution, quantise
from p2pfed.training.plans import Budgeted, contributions_of, plan_for, worth_plan
from p2pfed.training.task import Split, Task, TaskData, task_id
from p2pfed.training.vector import MeanDelta, Vector, check_no_buffers, num_parameters
from p2pfed.wire.payload import encode_payload

__all__ = ["Exhausted", "Hospital", "Refused", "Released", "RoundResult", "Skipped"]

MAX_SCALE = 4  # a member that was away for long does not take over its first round

_AT_LEAST = {"patient": ("patient", "hospital"), "hospital": ("hospital",)}  # a floor allows these

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
        device: Where to compute.

    Raises:
        PrivacyError: The ledger cannot be written.
    """

    def __init__(
        self,
        settings: Settings,
        task: Task,
        data: TaskData,
        ledger: Ledger,
        *,
        device: torch.device | None = None,
    ) -> None:
        self.task = task
        self.data = data
        self.ledger = ledger
        self.device = device or torch.device("cpu")
        self.task_id = task_id(task)
        self.num_parameters = num_parameters(task.model())
        self.unusable = 0  # patients whose row was not finite in the last round; never leaves
        self.dataset = ledger.register(
            f"{task.name} at {settings.node.name}", data.train.patient_records()
        )
        self._policy = settings.privacy
        self._thresholds: dict[bytes, tuple[int, int]] = {}
        self._worth: dict[
            tuple[bytes, int], WorthGate
        ] = {}  # never stored: a restart ends their instances
        self._memory: tuple[bytes, LocalMemory] = (b"", LocalMemory())
        self._groups = (1, data.train)

    @property
    def spent(self) -> Spent:
        """What these patients have spent so far, at the hospital's delta."""
        return self.ledger.spent(self.dataset, delta=float(self._policy.delta))

    @property
    def budget(self) -> Budget:
        """The lifetime ceiling."""
        return Budget(
            epsilon=float(self._policy.epsilon) or _NO_BUDGET, delta=float(self._policy.delta)
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
        reason = self._why_not(run, round_number, samples, scale)
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
        self.unusable = getattr(contributions, "unusable", 0)
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

    def _why_not(self, run: Run, round_number: int, samples: int, scale: Fraction) -> str:
        scales = run.averaging.participation_scaling
        private = run.mechanism != "none"
        buffers = ""
        if private:
            with words_of_the_task():
                model = self.task.model()
            try:
                check_no_buffers(model)
            except ConfigError as error:
                buffers = error.what
        checks = (
            (run.task_id != self.task_id, "the run names another version of the task"),
            (run.num_parameters != self.num_parameters, "the run's model has another size"),
            (not 0 <= round_number <= run.rounds, "the run has no such round"),
            (not 1 <= samples < 1 << 24, "the roster names no sensible number of patients"),
            (
                samples < run.gate.patients_per_row,
                "the roster names fewer patients than a group has",
            ),
            (not 1 <= scale <= (MAX_SCALE if scales else 1), "the run does not scale deltas so"),
            (not private and not self._policy.allow_none, "mechanism 'none' is not allowed here"),
            (
                private and run.unit not in _AT_LEAST[self._policy.unit],
                "the run's unit is below our floor",
            ),
            (private and self._policy.epsilon <= 0, "no lifetime budget is configured here"),
            (
                private and not Budgeted.of(run).is_enough,
                "the run has too many rounds for its epsilon",
            ),
            (bool(buffers), f"{buffers}, which no clip bounds"),
        )
        return next((reason for wrong, reason in checks if wrong), "")

    def _run_is_paid_for(self, run: Run, worth: WorthGate | None) -> bool:
        """Whether one more release, and its worth gate if not open, would pass its epsilon."""
        if run.mechanism == "none":
            return False
        share = Budgeted.of(run)
        cost = share.cost
        if worth is not None and not worth.is_open:
            cost = share.together
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
        if run.unit == "patient":
            rows = self._grouped(run.gate.patients_per_row)
            return PatientContributions(self.task, view, rows, device=self.device)
        seed = int.from_bytes(hashlib.blake2b(_label(run, round_number), digest_size=7).digest())
        if run.unit == "hospital":
            return HospitalContribution(
                self.task, view, self.data.train, seed=seed, device=self.device
            )
        if self._memory[0] != run.run_id:
            self._memory = (run.run_id, LocalMemory.of(run))
        return LocalChange(
            self.task,
            view,
            self.data.train,
            round_number=round_number,
            seed=seed,
            device=self.device,
            memory=self._memory[1],
            mean=mean,
        )

    def _grouped(self, size: int) -> Split:
        """The training patients in groups of `size`, kept from round to round."""
        if size == 1:
            return self.data.train
        if self._groups[0] != size:
            self._groups = (size, self.data.train.grouped(size))
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
