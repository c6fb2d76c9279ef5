"""What the network is worth: every hospital's model alone, together and pooled, on the same tests.

*Alone* and *pooled* use the task's own optimiser from the same first model for as many local steps
as the run without privacy made, with the learning rate that does best on a validation fifth of the
training patients, then once more on all of them. Pooling is done by the demo for comparison only:
no node could do it.

Accuracy on a hospital's own test set and on all hospitals' test sets together.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from p2pfed.demo.plan import Cast
from p2pfed.training.local import evaluate, initial_vector, train_local
from p2pfed.training.task import Split, Task, TaskData, load_task

__all__ = ["Comparison", "Score", "compare"]

Vector = NDArray[np.float32]
RATES = (0.1, 0.3, 1.0, 3.0, 10.0)  # times the task's own learning rate


@dataclass(frozen=True, slots=True)
class Score:
    """Accuracy on the hospital's own tests and on all hospitals' tests."""

    own: float
    everyone: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The scores of one hospital."""

    hospital: str
    patients: int
    alone: Score
    together_gate: Score
    together_none: Score
    pooled: Score

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def compare(
    cast: Cast, *, together_gate: Vector, together_none: Vector, steps: int, seed: int
) -> list[Comparison]:
    """Train alone and pooled, and score everything.

    Args:
        cast: Who took part, on what data.
        together_gate: The network's model with the gate, shape (P,).
        together_none: The network's model without privacy, shape (P,).
        steps: Local steps of training alone.
        seed: Fixes first model and batches.
    """
    task = load_task(cast.task)
    hospitals = [h for h in cast.hospitals if h.trains]
    data = {h.name: task.data(cast.data, h.options) for h in hospitals}
    everyone = _joined([d.test for d in data.values()])
    start = initial_vector(task, seed=seed)

    def score(vector: Vector, own: TaskData[Split]) -> Score:
        return Score(_accuracy(task, vector, own.test), _accuracy(task, vector, everyone))

    everything = _joined([d.train for d in data.values()])
    pooled = _tuned(task, everything, start, steps=steps * len(hospitals), seed=seed)
    comparisons = []
    for hospital in hospitals:
        own = data[hospital.name]
        alone = _tuned(task, own.train, start, steps=steps, seed=seed)
        comparisons.append(
            Comparison(
                hospital.name,
                hospital.samples,
                alone=score(alone, own),
                together_gate=score(together_gate, own),
                together_none=score(together_none, own),
                pooled=score(pooled, own),
            )
        )
    return comparisons


def _accuracy(task: Task, vector: Vector, split: Split) -> float:
    return evaluate(task, vector, split)["accuracy"]


def _tuned(task: Task, split: Split, start: Vector, *, steps: int, seed: int) -> Vector:
    train, validation = _held_out(split, seed)

    def trained(on: Split, rate: float) -> Vector:
        return train_local(
            task,
            on,
            start,
            steps=steps,
            learning_rate=task.hyper.learning_rate * rate,
            seed=seed,
        ).vector

    best = max(RATES, key=lambda rate: _accuracy(task, trained(train, rate), validation))
    return trained(split, best)


def _held_out(split: Split, seed: int) -> tuple[Split, Split]:
    """Four fifths of the patients and the rest, the rest at least one patient."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(split.num_patients, generator=generator)
    cut = max(1, split.num_patients // 5)
    return split.subset(sorted(order[cut:].tolist())), split.subset(sorted(order[:cut].tolist()))


def _joined(splits: list[Split]) -> Split:
    patients, first = [], 0
    for split in splits:
        patients.append(split.patient + first)
        first += split.num_patients
    return Split(
        torch.cat([s.x for s in splits]), torch.cat([s.y for s in splits]), torch.cat(patients)
    )
