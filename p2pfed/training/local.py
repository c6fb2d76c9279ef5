"""Ordinary local training: the update of mechanism `none`, and "alone" in every comparison.

McMahan et al. 2017 (arXiv:1602.05629): some mini-batch steps from the common model. A run without
privacy shares the difference, its largest entries only (privacy.mechanisms), on the run's grid.
Nothing bounds a patient's influence on it.

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
from p2pfed.training.vector import get_vector, set_vector
from p2pfed.wire.payload import Payload

__all__ = ["Quantised", "evaluate", "initial_vector", "quantise", "train_local"]

Vector = NDArray[np.float32]
_MOST = 32767  # symmetric int16


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A vector on the run's grid.

    Attributes:
        payload: Its entries other than zero.
        saturated: How many did not fit into int16 and were cut off at its end.
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
        batches = _batches(len(split.x), batch_size)
        for _ in range(steps):
            rows = next(batches)
            x, y = split.x[rows].to(device), split.y[rows].to(device)
            optimizer.zero_grad(set_to_none=True)
            task.loss(model(x), y).mean().backward()
            optimizer.step()
    trained = get_vector(model)
    if not np.isfinite(trained).all():
        raise UpdateRejected(
            "local training ended in NaN or infinity",
            f"after {steps} steps at learning rate {learning_rate}",
            "lower the task's learning rate",
        )
    return trained


def evaluate(task: Task, vector: Vector, split: Split) -> dict[str, float]:
    """The task's metrics of a model on some records; for the hospital's own eyes."""
    model = task.model()
    set_vector(model, vector)
    model.to(split.x.device).eval()
    with torch.no_grad():
        return task.metrics(model, split)


def quantise(indices: NDArray[np.int64], values: NDArray[Any], *, grid_bits: int) -> Quantised:
    """Round values to multiples of 2**-grid_bits in int16, cutting off what does not fit.

    Args:
        indices: Strictly increasing positions, shape (K,).
        values: Finite real numbers, shape (K,).
        grid_bits: The run's grid.

    Returns:
        The entries that are not zero after rounding, and how many were cut off.
    """
    units = np.rint(values.astype(np.float64) * 2.0**grid_bits)
    cut = np.clip(units, -_MOST, _MOST)
    kept = cut != 0
    payload = Payload(indices[kept], cut[kept].astype(np.int16))
    return Quantised(payload, saturated=int((cut != units).sum()))


def _batches(count: int, batch_size: int) -> Iterator[torch.Tensor]:
    while True:
        yield from torch.split(torch.randperm(count), batch_size)
