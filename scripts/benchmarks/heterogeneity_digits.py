"""Digits at hospitals that differ: in what they mostly see, or in how their scanners draw it.

Data: scikit-learn's 1797 images of 8 x 8. `SkewedDigits`: ten hospitals with 40 patients, half of
them of two digits that are frequent there, and 60 that test, mixed alike. `ShiftedDigits`: six
hospitals with 60 and 100 patients of all digits; each scanner has a contrast, an offset and an
orientation of its own, as in `SCANNERS`. Who is where follows from the option `seed`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn

from p2pfed.training.task import HyperParameters, Options, Split, Task, TaskData

__all__ = ["SCANNERS", "ShiftedDigits", "SkewedDigits"]

DIGITS = 10
SCANNERS = (  # contrast, offset, quarter turns
    (1.0, 0.0, 0),
    (0.5, 0.5, 0),
    (0.25, 1.0, 0),
    (-1.0, 1.0, 0),
    (-0.5, 0.0, 0),
    (1.0, 0.0, 1),
)


class _Digits(Task):
    monitor: ClassVar[str] = "accuracy"
    larger_is_better: ClassVar[bool] = True
    hyper: ClassVar[HyperParameters] = HyperParameters(
        local_steps=10, batch_size=16, learning_rate=0.05, optimizer="momentum"
    )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, reduction="none")

    def metrics(self, model: nn.Module, patients: Split) -> dict[str, float]:
        output = model(patients.x)
        return {
            "accuracy": float((output.argmax(1) == patients.y).float().mean()),
            "loss": float(self.loss(output, patients.y).mean()),
        }


class SkewedDigits(_Digits):
    """Options `site` (0..9), `seed` and `twenties` (of patients who train); an MLP 64-32-10."""

    name = "skewed-digits"

    def model(self) -> nn.Module:
        """64 -> 32 -> 10."""
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, DIGITS))

    def data(self, folder: Path | None, options: Options) -> TaskData[Split]:  # noqa: ARG002 - none
        """A hand of 40 (or so many twenties) and one of 60, mixed alike."""
        images, labels = load_digits(return_X_y=True)
        chance = np.random.default_rng(int(options["seed"]))
        piles = [list(chance.permutation(np.flatnonzero(labels == k))) for k in range(DIGITS)]
        for site in range(int(options["site"]) + 1):  # everybody deals alike, and keeps one hand
            hand = [_dealt(piles, site, int(options["twenties"])), _dealt(piles, site, 3)]
        train, test = (_split(images, labels, rows, np.asarray) for rows in hand)
        return TaskData(train, test)


class ShiftedDigits(_Digits):
    """Options `site` (0..5) and `seed`; an MLP with batch norm, whose statistics stay at home."""

    name = "shifted-digits"

    def model(self) -> nn.Module:
        """64 -> 32 -> 32 -> 10."""
        return _Normed()

    def data(self, folder: Path | None, options: Options) -> TaskData[Split]:  # noqa: ARG002 - none
        """60 and 100 images as the scanner draws them."""
        images, labels = load_digits(return_X_y=True)
        rows = np.random.default_rng(int(options["seed"])).permutation(labels.size)
        site = int(options["site"])
        contrast, offset, turns = SCANNERS[site]

        def seen(chosen: NDArray[Any]) -> NDArray[Any]:
            turned = np.rot90(chosen.reshape(-1, 8, 8), turns, axes=(1, 2))
            return contrast * turned.reshape(-1, 64) + offset

        mine = rows[site * 160 : (site + 1) * 160]
        parts = (_split(images, labels, part, seen) for part in (mine[:60], mine[60:]))
        return TaskData(*parts)


class _Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Linear(64, 32), nn.BatchNorm1d(32)
        self.second, self.norm2 = nn.Linear(32, 32), nn.BatchNorm1d(32)
        self.last = nn.Linear(32, DIGITS)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(self.first(x)))
        output: Tensor = self.last(torch.relu(self.norm2(self.second(h))))
        return output


def _dealt(piles: list[list[int]], site: int, few: int) -> list[int]:
    """A few of every digit, and five times as many more of each of two."""
    counts = [few * (6 if digit in {site, (site + 1) % DIGITS} else 1) for digit in range(DIGITS)]
    return [pile.pop() for pile, count in zip(piles, counts, strict=True) for _ in range(count)]


def _split(images: Any, labels: Any, rows: Any, seen: Any) -> Split:
    x = seen(images[rows] / 16 - 0.3)
    return Split(
        torch.from_numpy(np.ascontiguousarray(x, np.float32)),
        torch.from_numpy(labels[rows].astype(np.int64)),
        torch.arange(len(rows)),
    )
