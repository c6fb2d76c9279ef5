"""Whom the attacks attack: a bundled task's own patients, and a small task of pictures.

Map: `hospital` or `digits` -> `Victims` (people, what the adversary knows of others, the public
model) -> `rows_of` (what goes into the gate) -> `plan` and `fresh_noise` (the product's own gate).

Invariant: everything that is drawn comes from the product's mechanisms with the product's noise.

Sources: the pictures are the handwritten digits of Alpaydin and Kaynak (1998, CC BY 4.0) as
scikit-learn carries them.

Not here: the attacks (`membership`, `inversion`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from p2pfed.errors import ConfigError
from p2pfed.privacy.accountant import NANO, rho_nano_allowed
from p2pfed.privacy.mechanism import Mechanism
from p2pfed.privacy.mechanisms import MechanismName, make_plan
from p2pfed.privacy.noise import ExactNoise, NoiseSource
from p2pfed.training.contributions import PatientContributions
from p2pfed.training.local import initial_vector
from p2pfed.training.task import Options, Split, Task, TaskData, load_task
from p2pfed.training.vector import Vector

__all__ = [
    "BITS",
    "CLIP",
    "DELTA",
    "Digits",
    "Victims",
    "digits",
    "fresh_noise",
    "hospital",
    "plan",
    "rho_of",
    "rows_of",
]

CLIP: Final = Fraction(1)
BITS: Final = 16
DELTA: Final = 1e-5

_SITES: Final[Mapping[str, str]] = {"breast-cancer": "0", "heart-disease": "cleveland"}
_FIRST = 200  # digits that "train"; more are not attacked


@dataclass(frozen=True, slots=True, eq=False)
class Victims:
    """Real people, one record each, and what an adversary knows anyway.

    Attributes:
        task: Gives model and loss.
        vector: The public model at which they contribute, shape (D,).
        people: Those who are attacked.
        strangers: Other people; what they have in common is the adversary's prior knowledge.
        shape: A record as a picture, (height, width), or (features,).
        stretch: How far a record may lie outside the range of the strangers, in ranges.
    """

    task: Task
    vector: Vector
    people: Split
    strangers: Split
    shape: tuple[int, ...]
    stretch: float = 0.0

    @property
    def mean(self) -> NDArray[np.float64]:
        """What other people look like, shape (F,): the prior."""
        return np.asarray(self._known.mean(axis=0))

    @property
    def spread(self) -> NDArray[np.float64]:
        """By how much they differ, shape (F,), above 0."""
        return np.asarray(np.maximum(self._known.std(axis=0), 1e-3))

    @property
    def low(self) -> NDArray[np.float64]:
        """No record is below, shape (F,)."""
        known = self._known
        return np.asarray(known.min(axis=0) - self.stretch * np.ptp(known, axis=0))

    @property
    def high(self) -> NDArray[np.float64]:
        """No record is above, shape (F,)."""
        known = self._known
        return np.asarray(known.max(axis=0) + self.stretch * np.ptp(known, axis=0))

    @property
    def _known(self) -> NDArray[np.float64]:
        x = self.strangers.x
        return np.asarray(x.reshape(len(x), -1).numpy(), np.float64)


class Digits(Task):
    """Handwritten digits, 8 x 8 pixels, for a small network: a picture shows a leak at a glance."""

    name = "digits"
    hidden: ClassVar[int] = 32

    def model(self) -> nn.Module:
        """64 pixels -> 32 -> 10 classes."""
        return nn.Sequential(nn.Linear(64, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 10))

    def data(self, folder: Path | None, options: Options) -> TaskData[Split]:  # noqa: ARG002 - no files
        """Pixels from 0 to 1; the first 200 train. See `Task.data`."""
        bunch = load_digits()
        x = torch.from_numpy(bunch.data / 16.0).to(torch.float32)
        y = torch.from_numpy(bunch.target).to(torch.int64)
        return TaskData(train=_single(x[:_FIRST], y[:_FIRST]), test=_single(x[_FIRST:], y[_FIRST:]))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy per record, shape (N,)."""
        return cross_entropy(output, target, reduction="none")

    def metrics(self, model: nn.Module, split: Split) -> dict[str, float]:
        """Accuracy."""
        with torch.no_grad():
            right = model(split.x).argmax(dim=1) == split.y
        return {"accuracy": float(right.float().mean())}


def digits() -> Victims:
    """The picture task at its first model."""
    task = Digits()
    data = task.data(None, {})
    return Victims(task, initial_vector(task, seed=0), data.train, data.test, (8, 8))


def hospital(name: str, *, folder: Path | None = None, site: str | None = None) -> Victims:
    """One hospital's patients at the task's first model.

    Args:
        name: A bundled task, or `module:Class` of one with a linear model.
        folder: Where its files are, if it has any.
        site: Which hospital; default: the first of the bundled task.

    Raises:
        ConfigError: No such task or data, or a model or patients that these attacks do not fit.
    """
    task = load_task(name)
    if name == "heart-disease" and folder is None:
        raise ConfigError(
            "the task 'heart-disease' needs its files", "", "name their folder with --data"
        )
    which = site if site is not None else _SITES.get(name)
    data: TaskData[Split] = task.data(folder, {} if which is None else {"site": which})
    shapes = [tuple(p.shape) for p in task.model().parameters()]
    features = math.prod(data.train.x.shape[1:])
    if shapes != [(1, features), (1,)] or task.hyper.patient_steps:
        raise ConfigError(
            f"the task {name!r} has no linear model that patients send one gradient of",
            "the attack on records is the exact inverse of such a gradient",
            "audit a bundled task",
        )
    if len(data.train.x) != data.train.num_patients:
        raise ConfigError(
            f"the task {name!r} has patients with several records",
            "the attack on records expects one each",
            "audit a bundled task",
        )
    vector = initial_vector(task, seed=0)
    return Victims(task, vector, data.train, data.test, (features,), stretch=0.5)


def rows_of(victims: Victims, people: Split | None = None) -> NDArray[np.float32]:
    """What the people put into the gate, by the product's own code, shape (people, D)."""
    split = victims.people if people is None else people
    return np.concatenate(list(PatientContributions(victims.task, victims.vector, split).chunks()))


def rho_of(epsilon: float, delta: float = DELTA) -> Fraction:
    """The zCDP that (epsilon, delta) allows, by the product's accountant."""
    return Fraction(rho_nano_allowed(epsilon, delta), NANO)


def plan(
    mechanism: MechanismName,
    num_parameters: int,
    *,
    rho: Fraction = Fraction(0),
    seed: bytes = b"",
    fraction: Fraction | float = 1,
) -> Mechanism:
    """The product's plan of one round as a run file's defaults give it.

    Args:
        mechanism: By name.
        num_parameters: D.
        rho: What the round may cost.
        seed: Public, new in every round.
        fraction: Share sent by "gaussian" and "none".
    """
    more: dict[str, Any] = {"segment_blocks": 4} if mechanism == "svt" else {}
    return make_plan(
        mechanism,
        num_parameters=num_parameters,
        clip=CLIP,
        bits=BITS,
        budget=rho,
        shuffle_seed=seed,
        fraction=fraction,
        **more,
    )


def fresh_noise() -> NoiseSource:
    """The noise of one release: the product's, fresh, without a seed."""
    return ExactNoise()


def _single(x: Tensor, y: Tensor) -> Split:
    return Split(x, y, torch.arange(len(x)))
