"""One round at one hospital: from the public model to the bytes that may leave.

Order: the hospital's own policy -> the run's ceiling -> contributions and a public plan -> the
privacy gate (debit, noise, output) -> post-processing on the run's grid. With mechanism `none` one
vector, the change by ordinary local training (`feedback`), takes the place of the patients'
contributions, and the gate keeps it so that a round never has two answers.

Formal guarantee: what a `Released` holds is computed from the gate's output and public facts only
(plan, run, the roster's number of patients): post-processing. All debits of one run together stay
within the run's epsilon, and all debits on a patient within the hospital's lifetime budget. The
threshold of `svt` follows from this node's own earlier releases of the run. `Skipped`, `Refused`
and `Exhausted` carry fixed texts and public numbers.

Not here: clipping, noise, budget (privacy room), signing and sending (network process).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch

from p2pfed.config import Settings
from p2pfed.errors import BudgetExhausted, ConfigError, UpdateRejected
from p2pfed.identity.run import Run
from p2pfed.privacy.accountant import NANO, Budget, forecast, rho_nano_allowed
from p2pfed.privacy.gate import decode_release, release_round
from p2pfed.privacy.ledger import Ledger, ReleaseKey, Spent
from p2pfed.privacy.mechanisms import GaussianPlan, NoPrivacyPlan, Plan
from p2pfed.privacy.svt import SvtPlan, next_threshold
from p2pfed.privacy.units import Contributions
from p2pfed.training.contributions import PatientContributions
from p2pfed.training.feedback import LocalChange, LocalMemory
from p2pfed.training.local import quantise
from p2pfed.training.task import Task, TaskData, task_id
from p2pfed.training.vector import MeanDelta, Vector, check_no_buffers, num_parameters
from p2pfed.wire.payload import encode_payload

__all__ = ["Exhausted", "Hospital", "Refused", "Released", "RoundResult", "Skipped"]

MAX_SCALE = 4  # a member that was away for long does not take over its first round

_CLIP_BITS = 16  # a clipped row is 2^15 to 2^16 grid units long, shorter from 16384 patients on
_SUM_BITS = 30  # the sum of `samples` clipped rows; the gate allows twice that
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

    Under a privacy mechanism it follows from public facts alone, for it is seen and not paid for.
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
        self._thresholds: dict[bytes, tuple[int, SvtPlan]] = {}
        self._memory: tuple[bytes, LocalMemory] = (b"", LocalMemory())

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
        if self.ledger.output(key) is None and self._run_is_paid_for(run):
            return self._exhausted("the run's rounds are paid for; a run never passes its epsilon")
        plan = self._plan(run, round_number, samples)
        self.unusable = 0
        try:
            contributions = self._contributions(run, round_number, view, mean)
            gate = release_round(
                contributions,
                plan=plan,
                ledger=self.ledger,
                dataset=self.dataset,
                key=key,
                budget=self.budget,
                unit="hospital" if run.mechanism == "none" else "patient",
            )
        except BudgetExhausted:
            return self._exhausted("the lifetime budget of these patients does not allow it")
        except UpdateRejected:  # its text may count patients; patients' values never cause it
            return Skipped("the update is not finite or does not fit the run")
        if isinstance(contributions, PatientContributions):
            self.unusable = contributions.unusable
        # `none` gives the mean update on the run's grid, the others a sum over patients.
        unit = 2.0**-run.grid_bits
        if not isinstance(plan, NoPrivacyPlan):
            unit = 2.0**-plan.bits / samples
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
            releases_left=self._releases_left(run, plan),
        )

    def _why_not(self, run: Run, round_number: int, samples: int, scale: Fraction) -> str:
        scales = run.averaging.participation_scaling
        private = run.mechanism != "none"
        buffers = ""
        if private:
            try:
                check_no_buffers(self.task.model())
            except ConfigError as error:
                buffers = error.what
        checks = (
            (run.task_id != self.task_id, "the run names another version of the task"),
            (run.num_parameters != self.num_parameters, "the run's model has another size"),
            (not 0 <= round_number <= run.rounds, "the run has no such round"),
            (not 1 <= samples < 1 << 24, "the roster names no sensible number of patients"),
            (not 1 <= scale <= (MAX_SCALE if scales else 1), "the run does not scale deltas so"),
            (not private and not self._policy.allow_none, "mechanism 'none' is not allowed here"),
            (private and run.unit != self._policy.unit, "the run's unit is below our floor"),
            (private and self._policy.epsilon <= 0, "no lifetime budget is configured here"),
            (private and _rho_nano(run) < 1, "the run has too many rounds for its epsilon"),
            (bool(buffers), f"{buffers}, which no clip bounds"),
        )
        return next((reason for wrong, reason in checks if wrong), "")

    def _run_is_paid_for(self, run: Run) -> bool:
        return run.mechanism != "none" and self.ledger.payments(run.run_id) >= run.rounds

    def _releases_left(self, run: Run, plan: Plan) -> int:
        """How many more releases of this run the budget allows; public, like the spending."""
        if isinstance(plan, NoPrivacyPlan):
            return run.rounds
        return forecast(self.budget, self.ledger.costs(self.dataset), plan.cost)

    def _exhausted(self, reason: str) -> Exhausted:
        spent = self.spent
        return Exhausted(spent.rho_nano, spent.epsilon, spent.releases, spent.head, reason)

    def _contributions(
        self, run: Run, round_number: int, view: Vector, mean: MeanDelta | None
    ) -> Contributions:
        if run.mechanism != "none":
            return PatientContributions(self.task, view, self.data.train, device=self.device)
        seed = int.from_bytes(hashlib.blake2b(_label(run, round_number), digest_size=7).digest())
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

    def _plan(self, run: Run, round_number: int, samples: int) -> Plan:
        if run.mechanism == "none":
            least = Fraction(1, run.num_parameters)
            return NoPrivacyPlan(
                num_parameters=run.num_parameters,
                bits=run.grid_bits,
                fraction=max(run.top_fraction, least),
            )
        clip_bits = min(_CLIP_BITS, _SUM_BITS - samples.bit_length())
        bits = max(0, math.floor(math.log2(2**clip_bits / run.clip)))
        rho = Fraction(_rho_nano(run), NANO)
        if run.mechanism == "gaussian":
            return GaussianPlan(
                num_parameters=run.num_parameters, clip=run.clip, bits=bits, rho=rho
            )
        return self._svt_plan(
            run,
            round_number,
            lambda seed: SvtPlan.for_budget(
                rho,
                num_parameters=run.num_parameters,
                clip=run.clip,
                bits=bits,
                shuffle_seed=seed,
                block_size=run.block_size,
                segment_blocks=run.segment_blocks,
                select_share=run.select_share,
            ),
        )

    def _svt_plan(self, run: Run, round_number: int, fresh: Callable[[bytes], SvtPlan]) -> SvtPlan:
        """The round's plan; its threshold follows from the earlier releases of the run."""
        plan = fresh(_label(run, round_number))
        done, steered = self._thresholds.get(run.run_id, (0, plan))
        if done > round_number:
            done, steered = 0, plan
        for earlier in range(done, round_number):
            stored = self.ledger.output(ReleaseKey(run.run_id, earlier))
            if stored is not None:
                release = decode_release(stored.payload)
                steered = steered.at_threshold(next_threshold(steered, release))
        self._thresholds[run.run_id] = (round_number, steered)
        return plan.at_threshold(steered.threshold)


def _rho_nano(run: Run) -> int:
    """Every round's equal share of the run's zCDP, in nano-rho."""
    return rho_nano_allowed(float(run.epsilon), float(run.delta)) // run.rounds


def _label(run: Run, round_number: int) -> bytes:
    return run.run_id + round_number.to_bytes(8)
