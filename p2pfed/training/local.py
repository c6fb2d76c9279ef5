"""Ordinary local training: the update of mechanism `none`, and "alone" in every comparison.

McMahan et al. 2017 (arXiv:1602.05629): some mini-batch steps from the common model. A run without
privacy shares the difference, its largest entries only (privacy.plain), on the run's grid: nothing
bounds a patient's influence on it. With the unit "hospital" it is the one row that the gate clips.
What it remembers from round to round is in `feedback`.

Invariant: on a CPU and for one version of torch the result is a function of the arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from p2pfed.errors import UpdateRejected
from p2pfed.training.task import Split, Task
from p2pfed.training.vector import Vector, get_vector, parts, set_vector
from p2pfed.wire.payload import MOST_INT8, Payload, least_exponent

__all__ = [
    "HospitalContribution",
    "Quantised",
    "evaluate",
    "initial_vector",
    "quantise",
    "train_local",
]

_MOST = 32767  # symmetric int16
_CHUNK = 1 << 16  # values rounded at a time: stays in the cache


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
        return get_vector(task.model())


def train_local(
    task: Task,
    split: Split,
    start: Vector,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    device: torch.device | None = None,
    shift: Vector | None = None,
) -> Vector:
    """Train from `start` for some mini-batch steps with fresh optimiser state.

    Args:
        task: Gives model, loss and the kind of optimiser.
        split: Training records.
        start: Shape (P,), float32.
        steps: Number of steps; records are reshuffled when all were seen.
        learning_rate: Of each step.
        batch_size: Records per step; fewer at the end of an epoch.
        seed: Fixes batches and dropout.
        device: Where to compute.
        shift: Added to the model after each step, shape (P,); see training.feedback.

    Returns:
        The trained vector, shape (P,).

    Raises:
        UpdateRejected: The start does not fit, or training ended in NaN or infinity.
    """
    device = device or torch.device("cpu")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = task.model()
        set_vector(model, start)
        model.to(device).train()
        kind = torch.optim.Adam if task.hyper.optimizer == "adam" else torch.optim.SGD
        optimizer = kind(model.parameters(), lr=learning_rate)
        shifts = [] if shift is None else [p.to(device) for p in parts(model, shift)]
        batches = _batches(len(split.x), batch_size)
        for _ in range(steps):
            rows = next(batches)
            x, y = split.x[rows].to(device), split.y[rows].to(device)
            optimizer.zero_grad(set_to_none=True)
            task.loss(model(x), y).mean().backward()
            optimizer.step()
            if shifts:
                with torch.no_grad():
                    for parameter, part in zip(model.parameters(), shifts, strict=True):
                        parameter.add_(part)
    trained = get_vector(model)
    if not np.isfinite(trained).all():
        raise UpdateRejected(
            "local training ended in NaN or infinity",
            f"after {steps} steps at learning rate {learning_rate}",
            "lower the task's learning rate",
        )
    return trained


class HospitalContribution:
    """The change by ordinary local training as the hospital's one row, for the unit "hospital".

    Implements `privacy.units.Contributions`. Training is repeated at every reading, from the same
    seed. A change with NaN or infinity becomes zeros: a refusal would tell something that nobody
    paid for.

    Args:
        task: Gives model, loss and hyper-parameters.
        view: The public model, shape (P,).
        split: Training records.
        seed: Fixes batches and dropout; public.
        device: Where to compute.
    """

    num_patients = 1

    def __init__(
        self, task: Task, view: Vector, split: Split, *, seed: int, device: torch.device
    ) -> None:
        self._task, self._view, self._split = task, view, split
        self._seed, self._device = seed, device
        self.unusable = 0  # 1 if the last reading was not finite; never leaves

    @property
    def num_parameters(self) -> int:
        """P."""
        return int(self._view.size)

    def chunks(self) -> Iterator[NDArray[np.float32]]:
        """Yield the row, shape (1, P)."""
        hyper = self._task.hyper
        self.unusable = 0
        try:
            trained = train_local(
                self._task,
                self._split,
                self._view,
                steps=hyper.local_steps,
                learning_rate=hyper.learning_rate,
                batch_size=hyper.batch_size,
                seed=self._seed,
                device=self._device,
            )
            change = trained - self._view
        except UpdateRejected:
            self.unusable = 1
            change = np.zeros_like(self._view)
        yield np.asarray(change, np.float32)[None, :]


def evaluate(task: Task, vector: Vector, split: Split) -> dict[str, float]:
    """The task's metrics of a model on some records; for the hospital's own eyes."""
    model = task.model()
    set_vector(model, vector)
    model.to(split.x.device).eval()
    with torch.no_grad():
        return task.metrics(model, split)


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


def _batches(count: int, batch_size: int) -> Iterator[torch.Tensor]:
    while True:
        yield from torch.split(torch.randperm(count), batch_size)
