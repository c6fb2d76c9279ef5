"""What simulated hospitals train: models small enough that thousands of rounds cost nothing.

`synthetic`   an arbitrary payload that depends on who and when: every mistake changes the model
`quadratic`   each hospital has its own optimum, a step goes towards it; the network's optimum is
              the weighted mean, so that consensus and convergence can be seen
`softmax`     softmax regression on Gaussian classes, skewed labels per hospital; gives an accuracy

The first two use integers, or float operations that are correctly rounded, and are the same on
every machine; the third repeats on one machine. Real training is brought by the caller instead
(`Bring`), who knows tasks and torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from p2pfed.identity.run import Run
from p2pfed.wire.payload import Payload

__all__ = ["Bring", "Quadratic", "Softmax", "Synthetic", "Training", "training_of"]

STEP = 127  # values are at most so many steps of the coarsest grid that int8 can write


class Training(Protocol):
    """What the world asks for releases and measures."""

    def train(self, peer: str, round_: int, model: NDArray[np.int32]) -> Payload:
        """What a hospital releases in a round, from the model of that round, shape (P,)."""

    def score(self, model: NDArray[np.int32]) -> float | None:
        """How good a model is, from 0 to 1, if that can be said."""


# From the scenario's run and the peer ids in the order of the roster: the run with task and size of
# the model, the genesis (P,), and who trains.
Bring = Callable[[Run, Sequence[str]], tuple[Run, NDArray[np.float32], Training]]


def _chance(*parts: object) -> random.Random:
    return random.Random("/".join(map(str, parts)))  # noqa: S311 - a simulation, not a secret


class Synthetic:
    """An arbitrary payload that depends on who and when."""

    def __init__(self, run: Run, seed: int) -> None:
        self._run = run
        self._seed = seed

    def train(self, peer: str, round_: int, _model: NDArray[np.int32]) -> Payload:
        """Half of what the run allows, scattered."""
        chance = _chance(self._seed, peer, round_)
        count = max(1, min(self._run.max_released, self._run.num_parameters) // 2)
        kept = sorted(chance.sample(range(self._run.num_parameters), count))
        values = [chance.choice((-1, 1)) * chance.randint(1, STEP) * 8 for _ in kept]
        return Payload(np.array(kept, np.int64), np.array(values, np.int16))

    def score(self, _model: NDArray[np.int32]) -> float | None:
        """Nothing can be said."""
        return None


class _FromModel:
    """A step of local training, cut to what the run lets out."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def _release(self, step: NDArray[np.float64]) -> Payload:
        """The largest coordinates of a step, on the grid and in range."""
        values = np.clip(np.rint(np.ldexp(step, self._run.grid_bits)), -1016, 1016)
        values = np.rint(values / 8) * 8  # a grid that int8 can write as well
        most = self._run.max_released
        order = np.lexsort((np.arange(values.size), -np.abs(values)))[:most]
        kept = np.sort(order[values[order] != 0])
        if not kept.size:
            kept = np.zeros(1, np.int64)
        return Payload(kept.astype(np.int64), values[kept].astype(np.int16))

    def _view(self, model: NDArray[np.int32]) -> NDArray[np.float64]:
        view: NDArray[np.float64] = np.ldexp(model.astype(np.float64), -self._run.grid_bits)
        return view


class Quadratic(_FromModel):
    """Hospital i minimises |x - x_i|^2 / 2.

    Args:
        run: The run.
        seed: Places the optima.
        weights: Weight by peer id.
    """

    def __init__(self, run: Run, seed: int, weights: Mapping[str, int]) -> None:
        super().__init__(run)
        size = run.num_parameters
        self._optima = {}
        for peer in weights:
            chance = _chance(seed, "optimum", peer)
            self._optima[peer] = np.array([chance.uniform(-1, 1) for _ in range(size)])
        total = sum(weights.values())
        mean = np.zeros(size)
        for peer, weight in sorted(weights.items()):
            mean += self._optima[peer] * (weight / total)
        self.optimum = mean

    def train(self, peer: str, _round: int, model: NDArray[np.int32]) -> Payload:
        """A quarter of the way to the own optimum."""
        return self._release(0.25 * (self._optima[peer] - self._view(model)))

    def score(self, model: NDArray[np.int32]) -> float | None:
        """1 at the optimum, 0 at the distance of the genesis or further."""
        far = float(np.abs(self.optimum).sum())
        return max(0.0, 1.0 - float(np.abs(self._view(model) - self.optimum).sum()) / far)


class Softmax(_FromModel):
    """Softmax regression on Gaussian classes; most patients of a hospital have one disease.

    Args:
        run: Its model has `CLASSES` rows of P / CLASSES features.
        seed: Draws classes and patients.
        weights: Peer ids to draw patients for.
    """

    CLASSES = 4
    PATIENTS = 40

    def __init__(self, run: Run, seed: int, weights: Mapping[str, int]) -> None:
        super().__init__(run)
        self._features = max(1, run.num_parameters // self.CLASSES)
        chance = _chance(seed, "classes")
        self._centres = np.array(
            [[chance.gauss(0, 1) for _ in range(self._features)] for _ in range(self.CLASSES)]
        )
        self._own = {
            peer: self._patients(_chance(seed, "patients", peer), i % self.CLASSES)
            for i, peer in enumerate(sorted(weights))
        }
        self._test = self._patients(_chance(seed, "test"), None, 400)

    def _patients(
        self, chance: random.Random, favourite: int | None, count: int = PATIENTS
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        labels = [chance.randrange(self.CLASSES) for _ in range(count)]
        if favourite is not None:
            labels = [favourite if chance.random() < 0.5 else label for label in labels]
        noise = [[chance.gauss(0, 1.5) for _ in range(self._features)] for _ in labels]
        y = np.array(labels, np.int64)
        return self._centres[y] + np.array(noise), y

    def _matrix(self, model: NDArray[np.int32]) -> NDArray[np.float64]:
        used = self._view(model)[: self.CLASSES * self._features]
        return used.reshape(self.CLASSES, self._features)

    def train(self, peer: str, _round: int, model: NDArray[np.int32]) -> Payload:
        """A few steps of gradient descent on the own patients."""
        x, y = self._own[peer]
        start = self._matrix(model)
        weights = start.copy()
        for _ in range(3):
            logits = x @ weights.T
            logits -= logits.max(axis=1, keepdims=True)
            chances = np.exp(logits)
            chances /= chances.sum(axis=1, keepdims=True)
            chances[np.arange(y.size), y] -= 1
            weights -= 0.1 * (chances.T @ x) / y.size
        step = np.zeros(self._run.num_parameters)
        step[: weights.size] = (weights - start).ravel()
        return self._release(step)

    def score(self, model: NDArray[np.int32]) -> float | None:
        """Accuracy on patients of no hospital."""
        x, y = self._test
        return float((np.argmax(x @ self._matrix(model).T, axis=1) == y).mean())


def training_of(kind: str, run: Run, seed: int, weights: Mapping[str, int]) -> Training:
    """The training of a scenario.

    Args:
        kind: `synthetic`, `quadratic` or `softmax`.
        run: The run.
        seed: Draws what the hospitals know.
        weights: Weight by peer id, of all members that ever are.
    """
    if kind == "quadratic":
        return Quadratic(run, seed, weights)
    if kind == "softmax":
        return Softmax(run, seed, weights)
    return Synthetic(run, seed)
