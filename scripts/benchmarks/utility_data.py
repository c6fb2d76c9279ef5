"""What `utility` trains: scikit-learn's digits at five unequal hospitals, and two small models.

Map: `TASKS` -> `split` (who has which records) -> `Model.prepare`, `Model.gradients` (one row per
record, all at once) and `Model.accuracy`.

One record is one patient. `Split.train` is either three quarters of the training records, tested on
the other quarter (to choose learning rates), or all of them, tested on records never looked at
before. The clips are public constants, about the median length of a record's gradient before any
training: a run must take such a number from public data or from a guess, never from its patients.
The guess is easy here: pixels lie in [-.3, .7], so an image is about 3.2 long with its bias, and
the errors of an untrained model about .95.

Shapes: N = records, P = parameters.

Not here: privacy, rounds, accuracy tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

__all__ = ["TASKS", "Conv", "Hospital", "Model", "Softmax", "Split", "Task", "split"]

Floats = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]

_CLASSES = 10
_SHARES = (0.4, 0.25, 0.15, 0.12, 0.08)  # of the records, by hospital


class Model(Protocol):
    """A model with hand-written gradients."""

    size: int

    def prepare(self, images: Floats) -> Floats:
        """Return what the other functions read, computed once from images (N, 64)."""
        ...

    def first(self, rng: np.random.Generator) -> Floats:
        """Return the untrained parameters, (P,)."""
        ...

    def gradients(self, weights: Floats, x: Floats, labels: Labels) -> Floats:
        """Return each record's gradient of the cross-entropy, (N, P) float32."""
        ...

    def scores(self, weights: Floats, x: Floats) -> Floats:
        """Return the logits, (N, classes)."""
        ...


class Softmax:
    """Logistic regression: 64 pixels and a bias to 10 classes."""

    size = 65 * _CLASSES

    def prepare(self, images: Floats) -> Floats:
        """Pixels and a one, (N, 65)."""
        return np.column_stack([images, np.ones(len(images))]).astype(np.float32)

    def first(self, rng: np.random.Generator) -> Floats:  # noqa: ARG002 - of the protocol
        """Zeros."""
        return np.zeros(self.size)

    def gradients(self, weights: Floats, x: Floats, labels: Labels) -> Floats:
        """Return each record's gradient, (N, P) float32."""
        error = _errors(self.scores(weights, x), labels)
        return (x[:, :, None] * error[:, None, :]).reshape(len(x), -1)

    def scores(self, weights: Floats, x: Floats) -> Floats:
        """Return the logits, (N, classes)."""
        return x @ weights.astype(np.float32).reshape(-1, _CLASSES)


class Conv:
    """Eight 3 x 3 filters, tanh, means of 2 x 2, a dense layer from 128 to 10."""

    _filters = 8
    size = 9 * _filters + _filters + 16 * _filters * _CLASSES + _CLASSES
    _ends = (9 * _filters, 10 * _filters, 10 * _filters + 16 * _filters * _CLASSES)

    def prepare(self, images: Floats) -> Floats:
        """Patches, (N, 16 cells of the pooling, 4 places in it, 9 pixels)."""
        padded = np.pad(images.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
        patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        cells = patches.reshape(-1, 4, 2, 4, 2, 9).transpose(0, 1, 3, 2, 4, 5)
        return np.ascontiguousarray(cells.reshape(-1, 16, 4, 9), np.float32)

    def first(self, rng: np.random.Generator) -> Floats:
        """Uniform within 1 / sqrt(inputs) of each layer."""
        bounds = np.repeat([1 / 3, 128**-0.5], [self._ends[1], self.size - self._ends[1]])
        return rng.uniform(-1, 1, self.size) * bounds

    def gradients(self, weights: Floats, x: Floats, labels: Labels) -> Floats:
        """Return each record's gradient, (N, P) float32."""
        hidden, feature, out = self._forward(weights, x)
        count = len(x)
        error = _errors(out, labels)
        dense = self._parts(weights)[2]
        back = (error @ dense.T).reshape(count, 16, 1, self._filters) / 4 * (1 - hidden * hidden)
        back = back.reshape(count, 64, self._filters)
        filters = back.transpose(0, 2, 1) @ x.reshape(count, 64, 9)
        found = np.empty((count, self.size), np.float32)
        a, b, c = self._ends
        found[:, :a] = filters.reshape(count, -1)
        found[:, a:b] = back.sum(axis=1)
        found[:, b:c] = (feature[:, :, None] * error[:, None, :]).reshape(count, -1)
        found[:, c:] = error
        return found

    def scores(self, weights: Floats, x: Floats) -> Floats:
        """Return the logits, (N, classes)."""
        return self._forward(weights, x)[2]

    def _parts(self, weights: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        kernel, shift, dense, bias = np.split(weights.astype(np.float32), self._ends)
        return kernel.reshape(self._filters, 9), shift, dense.reshape(-1, _CLASSES), bias

    def _forward(self, weights: Floats, x: Floats) -> tuple[Floats, Floats, Floats]:
        kernel, shift, dense, bias = self._parts(weights)
        hidden = np.tanh((x.reshape(-1, 9) @ kernel.T).reshape(*x.shape[:3], -1) + shift)
        feature = hidden.mean(axis=2).reshape(len(x), -1)
        return hidden, feature, feature @ dense + bias


def _errors(scores: Floats, labels: Labels) -> Floats:
    """The gradient by the logits: softmax minus one-hot."""
    error = np.exp(scores - scores.max(axis=1, keepdims=True))
    error /= error.sum(axis=1, keepdims=True)
    error[np.arange(len(labels)), labels] -= 1
    return error


@dataclass(frozen=True, slots=True)
class Task:
    """A model and how it is trained.

    Attributes:
        name: As the rows call it.
        model: What is trained.
        rounds: How many.
        clip: L2 bound of a record's gradient: a public constant (module docstring).
    """

    name: str
    model: Model
    rounds: int
    clip: float


TASKS = (Task("digits", Softmax(), 10, 3.0), Task("conv", Conv(), 15, 3.0))


@dataclass(frozen=True, slots=True)
class Hospital:
    """The records of one hospital, as the model reads them, and their labels."""

    x: Floats
    y: Labels


@dataclass(frozen=True, slots=True)
class Split:
    """Who has which records.

    Attributes:
        train: By hospital.
        test: Of nobody.
    """

    train: tuple[Hospital, ...]
    test: Hospital

    @property
    def patients(self) -> int:
        """How many train; public."""
        return sum(len(hospital.y) for hospital in self.train)


def split(model: Model, *, tuning: bool) -> Split:
    """Deal the digits out, always the same way.

    Args:
        model: Who reads them.
        tuning: Whether to hold out a quarter of the training records instead of the test records.
    """
    images, labels = load_digits(return_X_y=True)
    x, y = model.prepare(images / 16 - 0.3), labels.astype(np.int64)
    train, test = train_test_split(np.arange(y.size), test_size=0.2, random_state=0, stratify=y)
    if tuning:
        train, test = train_test_split(train, test_size=0.25, random_state=1, stratify=y[train])
    dealt = np.random.default_rng(0).permutation(train)
    cuts = (np.cumsum(_SHARES) * dealt.size).astype(int)[:-1]
    hospitals = tuple(Hospital(x[part], y[part]) for part in np.split(dealt, cuts))
    return Split(hospitals, Hospital(x[test], y[test]))
