"""Fine-tuning a common model at home, when a run has ended or whenever it is good enough.

The hospital goes on from the common model on its own patients, with the task's optimiser. How far
is chosen on a held-out fifth of its *training* patients, of whom none trains meanwhile: a rate and
a number of steps, or none at all where no tuning helps. Then it is done once more on all of them.
The test patients are not looked at.

No guarantee is needed here, because nothing leaves. But a tuned model is a function of patients
whom no gate protected: it stays at the hospital and must not be given away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from p2pfed.errors import ConfigError, UpdateRejected
from p2pfed.training.hardware import CPU, Hardware
from p2pfed.training.home import NOTHING, Home
from p2pfed.training.local import Trained, evaluate, train_local
from p2pfed.training.patients import Patients
from p2pfed.training.task import Task
from p2pfed.training.watch import Watch

__all__ = ["Trial", "Tuned", "tune"]

RATES = (0.1, 0.3, 1.0)  # times the task's own learning rate: from a good model short steps do
_CHECKPOINTS = 5  # of each rate


@dataclass(frozen=True, slots=True)
class Trial:
    """What one way did on the held-out patients.

    Attributes:
        rate: Learning rate; 0 is the common model as it came.
        steps: Local steps.
        value: The task's `monitor` there.
    """

    rate: float
    steps: int
    value: float


@dataclass(frozen=True, slots=True, eq=False)
class Tuned:
    """A tuned model.

    Attributes:
        vector: The shared parameters, shape (P,).
        home: Private parameters and buffers.
        chosen: Which way it was made in.
        trials: All that were tried.
    """

    vector: NDArray[np.float32]
    home: Home
    chosen: Trial
    trials: tuple[Trial, ...]


def tune(
    task: Task,
    vector: NDArray[np.float32],
    patients: Patients,
    *,
    steps: int,
    seed: int,
    home: Home = NOTHING,
    hardware: Hardware = CPU,
    watch: Watch | None = None,
) -> Tuned:
    """Tune a common model on one hospital's training patients.

    Args:
        task: Gives optimiser, loss and the metric that decides.
        vector: The common model, shape (P,).
        patients: The hospital's training patients, at least two.
        steps: The most local steps to try, at least one.
        seed: Fixes who is held out, batches and dropout.
        home: What the hospital's last round left.
        hardware: Where to compute, and how.
        watch: Is told of progress.

    Raises:
        ConfigError: There is only one patient, or the task's metrics lack `monitor`.
        UpdateRejected: Training ended in NaN or infinity.
    """
    held, kept = _held_out(patients.num_patients, seed)
    learning, judging = patients.subset(kept), patients.subset(held)
    watch = watch or Watch()

    def trained(on: Patients, start: Trained, rate: float, more: int) -> Trained:
        return train_local(
            task,
            on,
            start.vector,
            steps=more,
            learning_rate=rate,
            seed=seed,
            hardware=hardware,
            home=start.home,
            watch=watch,
        )

    def judged(model: Trained) -> float:
        values = evaluate(
            task, model.vector, judging, home=model.home, hardware=hardware, watch=watch
        )
        if task.monitor not in values:
            raise ConfigError(
                f"the task's metrics have no {task.monitor!r}",
                "its `monitor` says which of them decides how far to tune",
                "set monitor to one of " + ", ".join(values),
            )
        return values[task.monitor]

    common = Trained(vector, home)
    trials = [Trial(0.0, 0, judged(common))]
    for rate in (task.hyper.learning_rate * times for times in RATES):
        now, done = common, 0
        for goal in _goals(steps):
            try:
                now, done = trained(learning, now, rate, goal - done), goal
            except UpdateRejected:  # this rate is too high; the lower ones may do
                break
            trials.append(Trial(rate, goal, judged(now)))
    best = _best(trials, larger=task.larger_is_better)
    if not best.steps:
        return Tuned(vector, home, best, tuple(trials))
    end, done = common, 0
    for goal in (g for g in _goals(steps) if g <= best.steps):  # in the same pieces as above
        end, done = trained(patients, end, best.rate, goal - done), goal
    return Tuned(end.vector, end.home, best, tuple(trials))


def _held_out(count: int, seed: int) -> tuple[list[int], list[int]]:
    """A fifth of the patients, at least one, and the others; each in ascending order."""
    if count < 2:
        raise ConfigError(
            "one patient alone cannot be tuned on",
            "somebody must be held out to tell when to stop",
            "use the common model as it is",
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    size = max(1, count // 5)
    return sorted(order[:size]), sorted(order[size:])


def _goals(steps: int) -> Sequence[int]:
    """Numbers of steps to look at, evenly spaced up to all of them."""
    return sorted({-(-steps * part // _CHECKPOINTS) for part in range(1, _CHECKPOINTS + 1)})


def _best(trials: Sequence[Trial], *, larger: bool) -> Trial:
    """The best value; of equals the one with fewer steps and the lower rate. NaN is never best."""
    sign = 1 if larger else -1
    real = [trial for trial in trials if not np.isnan(trial.value)] or trials[:1]
    return max(real, key=lambda trial: (sign * trial.value, -trial.steps, -trial.rate))
