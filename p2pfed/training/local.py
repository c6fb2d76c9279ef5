"""Ordinary local training: the update of mechanism `none`, and "alone" in every comparison.

McMahan et al. 2017 (arXiv:1602.05629): some mini-batch steps from the common model. A run without
privacy shares the difference, its largest entries only (privacy.plain), on the run's grid: nothing
bounds a patient's influence on it. With the unit "hospital" it is the one row that the gate clips.
What it remembers from round to round is in `feedback`.

Invariant: on a CPU and for one version of torch the result is a function of the arguments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from p2pfed.errors import UpdateRejected
from p2pfed.training.crew import ALONE, Team
from p2pfed.training.hardware import CPU, Hardware, is_out_of_memory
from p2pfed.training.home import NOTHING, Home, is_finite, put, taken
from p2pfed.training.task import Patients, Task
from p2pfed.training.vector import Vector, get_vector, parts, set_vector, shared_parameters
from p2pfed.training.watch import Watch, telling
from p2pfed.wire.payload import MOST_INT8, Payload, least_exponent

__all__ = [
    "HospitalContribution",
    "Quantised",
    "Trained",
    "evaluate",
    "initial_vector",
    "quantise",
    "ready_model",
    "train_local",
]

_MOST = 32767  # symmetric int16
_CHUNK = 1 << 16  # values rounded at a time: stays in the cache


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What local training ended with.

    Attributes:
        vector: The shared parameters, shape (P,), float32.
        home: What stays at the hospital for the next round.
    """

    vector: Vector
    home: Home


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A vector on the run's grid.

    Attributes:
        payload: Its entries other than zero.
        saturated: How many did not fit and were cut off at the end of the range.
    """

    payload: Payload
    saturated: int


def initial_vector(task: Task, *, seed: int) -> Vector:
    """The task's first model; a function of the seed for one version of torch, shape (P,)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_vector(task.model(), task.private_parameters)


def train_local(
    task: Task,
    patients: Patients,
    start: Vector,
    *,
    steps: int | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    seed: int,
    hardware: Hardware = CPU,
    shift: Vector | None = None,
    home: Home = NOTHING,
    watch: Watch | None = None,
    team: Team = ALONE,
) -> Trained:
    """Train from `start` for some mini-batch steps.

    Args:
        task: Gives model, loss, optimiser and FedProx's weight.
        patients: Those who train.
        start: Shape (P,), float32.
        steps: Number of steps; None, here and below, is what the task's `hyper` says.
        learning_rate: Of each step.
        batch_size: Records per step; fewer at the end of an epoch.
        seed: Fixes batches and dropout.
        hardware: Where to compute, and how.
        shift: Added to the model after each step, shape (P,); see training.feedback.
        home: What the round before left.
        watch: Is told of time and progress.
        team: With which other processes every batch is shared; all are given the same arguments.

    Returns:
        The trained vector and what it leaves at home.

    Raises:
        UpdateRejected: The start does not fit, or training ended in NaN or infinity.
        ConfigError: `home` does not fit.
    """
    watch, private, hyper = watch or Watch(), task.private_parameters, task.hyper
    steps = hyper.local_steps if steps is None else steps
    learning_rate = hyper.learning_rate if learning_rate is None else learning_rate
    batch_size = hyper.batch_size if batch_size is None else batch_size
    with torch.random.fork_rng(devices=hardware.seeded_devices()):
        torch.manual_seed(seed)
        model = task.model()
        set_vector(model, start, private)
        hardware.place(model).train()
        optimizer = task.optimizer(
            model.parameters(), learning_rate=learning_rate, fused=hardware.fused
        )
        put(home, model, private, optimizer)
        pulls = _Pulls(task, model, start, shift)
        batches = patients.batches(batch_size, seed=seed, part=team.part)
        torch.manual_seed(seed + team.part.rank)  # for dropout; the models are alike by now
        stepping = _Stepping(task, model, hardware, watch, team)
        waited, began = 0.0, time.monotonic()
        try:
            for step in range(steps):
                watch.progress("local steps", step, steps)
                asked = time.monotonic()
                x, y = hardware.take(*next(batches))
                waited += time.monotonic() - asked
                optimizer.zero_grad(set_to_none=True)
                stepping.gradients(x, y)
                pulls.before_step()
                optimizer.step()
                pulls.after_step()
            trained = get_vector(model, private)  # waits for the device
        finally:  # what fails has taken its time too
            watch.add("data", waited)
            watch.add("compute", time.monotonic() - began - waited)
        kept = optimizer if hyper.optimizer_state == "kept" else None
        home = taken(model, private, kept)
    if not (np.isfinite(trained).all() and is_finite(home)):
        raise UpdateRejected(
            "local training ended in NaN or infinity",
            f"after {steps} steps at learning rate {learning_rate}",
            "lower the task's learning rate",
        )
    return Trained(trained, home)


class _Stepping:
    """Gradients of one batch; in as many pieces as memory asks for."""

    def __init__(
        self, task: Task, model: nn.Module, hardware: Hardware, watch: Watch, team: Team
    ) -> None:
        self._task, self._model = task, model
        self._hardware, self._watch = hardware, watch
        self._team, self._parameters = team, [p for p in model.parameters() if p.requires_grad]
        self._pieces = 1

    def gradients(self, x: Tensor, y: Tensor) -> None:
        """Leave the gradient of the batch's mean loss in the parameters."""
        while True:
            try:
                self._in_pieces(x, y)
                break
            except Exception as error:
                if not is_out_of_memory(error) or self._pieces >= len(x):
                    raise
            self._pieces *= 2
            self._model.zero_grad(set_to_none=True)
            self._hardware.forget()
            self._watch.note(f"memory ran out: batches go in {self._pieces} pieces from now on")

        if self._team.part.world > 1:
            self._team.share_gradients(self._parameters, len(x))

    def _in_pieces(self, x: Tensor, y: Tensor) -> None:
        alone = self._team.part.world == 1
        if self._pieces == 1 and alone:
            with self._hardware.computing():
                mean = self._task.loss(self._model(x), y).mean()
            mean.backward()
            return
        if not len(x):
            return  # of a short batch the other processes have all
        for some_x, some_y in zip(x.chunk(self._pieces), y.chunk(self._pieces), strict=True):
            with self._hardware.computing():
                part = self._task.loss(self._model(some_x), some_y).sum()
                part = part / len(x) if alone else part
            part.backward()


class _Pulls:
    """What local steps are drawn by besides the loss: FedProx and the correction of drift."""

    def __init__(self, task: Task, model: nn.Module, start: Vector, shift: Vector | None) -> None:
        private = task.private_parameters
        self._parameters = [p for _, p in shared_parameters(model, private)]
        self._proximal = task.hyper.proximal
        device = self._parameters[0].device

        def here(vector: Vector) -> list[Tensor]:
            return [part.to(device) for part in parts(model, vector, private)]

        self._anchors = here(start) if self._proximal else []
        self._shifts = [] if shift is None else here(shift)

    def before_step(self) -> None:
        if not self._anchors:
            return
        for parameter, anchor in zip(self._parameters, self._anchors, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=self._proximal)

    def after_step(self) -> None:
        if not self._shifts:
            return
        with torch.no_grad():
            for parameter, shift in zip(self._parameters, self._shifts, strict=True):
                parameter.add_(shift)


class HospitalContribution:
    """The change by ordinary local training as the hospital's one row, for the unit "hospital".

    Implements `privacy.units.Contributions`. It is trained once, when the row is first read. A
    change with NaN or infinity becomes zeros: a refusal would tell something that nobody paid for.

    Args:
        view: The public model, shape (P,).
        train: Gives what training makes of it.
    """

    num_patients = 1

    def __init__(self, view: Vector, train: Callable[[], Trained]) -> None:
        self._view, self._train = view, train
        self._row: Vector | None = None
        self.home: Home | None = None  # what it leaves; None before, and if it failed
        self.unusable = 0  # 1 if the change was not finite; never leaves

    @property
    def num_parameters(self) -> int:
        """P."""
        return int(self._view.size)

    def chunks(self) -> Iterator[NDArray[np.float32]]:
        """Yield the row, shape (1, P)."""
        if self._row is None:
            self._row = self._change()
        yield self._row[None, :]

    def _change(self) -> Vector:
        try:
            trained = self._train()
        except UpdateRejected:
            self.unusable = 1
            return np.zeros_like(self._view)
        self.home = trained.home
        return trained.vector - self._view


def evaluate(
    task: Task,
    vector: Vector,
    patients: Patients,
    *,
    home: Home = NOTHING,
    hardware: Hardware = CPU,
    watch: Watch | None = None,
) -> dict[str, float]:
    """The task's metrics of a model on some patients; for the hospital's own eyes.

    A watch is told how far it is, as far as the task says so.
    """
    watch = watch or Watch()
    watch.progress("evaluation", 0, 1)
    model = ready_model(task, vector, home=home, hardware=hardware)
    with telling(task, watch, "evaluation"), torch.no_grad():
        values = task.metrics(model, patients)
    return {name: float(value) for name, value in values.items()}


def ready_model(
    task: Task, vector: Vector, *, home: Home = NOTHING, hardware: Hardware = CPU
) -> nn.Module:
    """The task's model with these values, in evaluation mode and without gradients."""
    model = task.model()
    set_vector(model, vector, task.private_parameters)
    put(home, model, task.private_parameters)
    return hardware.place(model).eval().requires_grad_(requires_grad=False)


def quantise(
    indices: NDArray[Any], values: NDArray[Any], *, grid_bits: int, width: str = "int16"
) -> Quantised:
    """Round values, half to even, to what a payload can hold; symmetric, without chance.

    That is up to 32767 multiples of 2**-grid_bits, or with "int8" up to 127 multiples of 2**e times
    that, with the least e of 0 to 8 that holds the largest value. What does not fit is cut off.

    Args:
        indices: Strictly increasing positions, shape (K,).
        values: Finite real numbers, shape (K,).
        grid_bits: The run's grid.
        width: The run's `encoding.values`.

    Returns:
        The entries that are not zero after rounding, and how many were cut off.
    """
    most, exponent = _MOST, 0
    if width == "int8":
        largest = max(float(values.max(initial=0)), -float(values.min(initial=0)))
        most, exponent = MOST_INT8, least_exponent(largest * 2.0**grid_bits)
    coded, saturated = np.empty(values.size, np.int16), 0
    for start in range(0, values.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        units = np.rint(values[part].astype(np.float64) * 2.0 ** (grid_bits - exponent))
        saturated += int(np.count_nonzero(np.abs(units) > most))
        coded[part] = np.clip(units, -most, most)
    coded <<= exponent
    kept = coded != 0
    indices = indices.astype(np.int64, copy=False)
    payload = Payload(indices, coded) if kept.all() else Payload(indices[kept], coded[kept])
    return Quantised(payload, saturated)
