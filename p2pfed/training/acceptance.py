"""Whether a hospital takes part in a round of a run: its policy and its installed task, as data.

`why_not` is a pure function: the run, the round and the roster's number are public, `Installed` is
what the network process is told at the start anyway, and the policy is the hospital's own file. So
a refusal tells nothing about a patient, and costs nothing.

Not here: budgets and the ledger (privacy room), the round itself (`round`).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Self

from torch import nn

from p2pfed.config import Privacy
from p2pfed.errors import ConfigError
from p2pfed.identity.run import Run
from p2pfed.training.plans import Budgeted
from p2pfed.training.task import Task, TaskData, task_id
from p2pfed.training.vector import check_no_buffers, num_parameters

__all__ = ["Installed", "why_not"]

MAX_SCALE = 4  # a member that was away for long does not take over its first round

_AT_LEAST = {"patient": ("patient", "hospital"), "hospital": ("hospital",)}  # a floor allows these


@dataclass(frozen=True, slots=True)
class Installed:
    """The task at this hospital, as far as a run must fit it.

    Attributes:
        task_id: 32 bytes.
        num_parameters: P, of the shared ones.
        not_by_patient: Why it cannot make one contribution per patient; "" if it can.
    """

    task_id: bytes
    num_parameters: int
    not_by_patient: str = ""

    @classmethod
    def of(cls, task: Task, data: TaskData[Any]) -> Self:
        """Look at a task; its model is made once."""
        model = task.model()
        return cls(
            task_id(task),
            num_parameters(model, task.private_parameters),
            next(filter(None, (_one_row(data), _at_home(task), _buffers(model))), ""),
        )


def why_not(
    run: Run,
    round_number: int,
    samples: int,
    scale: Fraction,
    *,
    installed: Installed,
    policy: Privacy,
) -> str:
    """Why the hospital does not take part; "" if it does.

    Args:
        run: The run.
        round_number: Which round of it.
        samples: The hospital's number of patients in the roster.
        scale: What deltas are multiplied by after the gate.
        installed: The task.
        policy: The hospital's own limits.
    """
    scales = run.averaging.participation_scaling
    private = run.mechanism != "none"
    checks = (
        (run.task_id != installed.task_id, "the run names another version of the task"),
        (run.num_parameters != installed.num_parameters, "the run's model has another size"),
        (not 0 <= round_number <= run.rounds, "the run has no such round"),
        (not 1 <= samples < 1 << 24, "the roster names no sensible number of patients"),
        (
            samples < run.gate.patients_per_row,
            "the roster names fewer patients than a group has",
        ),
        (not 1 <= scale <= (MAX_SCALE if scales else 1), "the run does not scale deltas so"),
        (not private and not policy.allow_none, "mechanism 'none' is not allowed here"),
        (
            private and run.unit not in _AT_LEAST[policy.unit],
            "the run's unit is below our floor",
        ),
        (private and policy.epsilon <= 0, "no lifetime budget is configured here"),
        (private and not Budgeted.of(run).is_enough, "the run has too many rounds for its epsilon"),
        (
            run.unit == "patient" and bool(installed.not_by_patient),
            f"this run protects single patients, and {installed.not_by_patient}",
        ),
    )
    return next((reason for wrong, reason in checks if wrong), "")


def _one_row(data: TaskData[Any]) -> str:
    if data.train.alike():
        return ""
    return "a training loop of its own makes one contribution for the whole hospital"


def _at_home(task: Task) -> str:
    if not task.private_parameters:
        return ""
    return "the task keeps parameters at home, which carry all patients into each contribution"


def _buffers(model: nn.Module) -> str:
    try:
        check_no_buffers(model)
    except ConfigError as error:
        return f"{error.what}, which carries all patients into each contribution"
    return ""
