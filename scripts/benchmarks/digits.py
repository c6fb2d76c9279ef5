"""The digits task that the benchmarks train: 1797 images of 8 x 8, an MLP of chosen size.

Daemons find it by PYTHONPATH as `digits:Digits10k`, `digits:Digits1M` and `digits:Digits10M`.
"""

from __future__ import annotations

import os
import random
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from p2pfed.demo.plan import Cast, Hospital
from p2pfed.identity.rules import Averaging, Encoding, Outer
from p2pfed.training.task import HyperParameters, Options, Split, Task, TaskData

__all__ = ["SIZES", "Digits1M", "Digits10M", "Digits10k", "cast_of", "run_of"]

SIZES = {10_000: "Digits10k", 1_000_000: "Digits1M", 10_000_000: "Digits10M"}
IMAGES = 1797
TESTED = 360


class _Digits(Task):
    """An MLP with two hidden layers; every site holds an equal share, all test on the same."""

    hidden: ClassVar[tuple[int, int]]
    hyper: ClassVar[HyperParameters] = HyperParameters(
        local_steps=20, batch_size=32, learning_rate=0.5
    )

    def model(self) -> nn.Module:
        one, two = self.hidden
        return nn.Sequential(
            nn.Linear(64, one), nn.ReLU(), nn.Linear(one, two), nn.ReLU(), nn.Linear(two, 10)
        )

    def data(self, folder: Path | None, options: Options) -> TaskData:  # noqa: ARG002 - no files
        images, labels = load_digits(return_X_y=True)
        x = torch.from_numpy(images).to(torch.float32) / 16 - 0.3
        y = torch.from_numpy(labels)
        rows = list(range(IMAGES))
        random.Random(7).shuffle(rows)
        mine = rows[TESTED:][int(options["site"]) :: int(options["sites"])]

        def split(chosen: list[int]) -> Split:
            return Split(x[chosen], y[chosen], torch.arange(len(chosen)))

        return TaskData(train=split(mine), test=split(rows[:TESTED]))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, reduction="none")

    def metrics(self, model: nn.Module, split: Split) -> dict[str, float]:
        with torch.no_grad():
            return {"accuracy": float((model(split.x).argmax(1) == split.y).float().mean())}


class Digits10k(_Digits):
    """About ten thousand parameters."""

    name, hidden = "digits-10k", (80, 50)


class Digits1M(_Digits):
    """About a million parameters."""

    name, hidden = "digits-1m", (950, 980)


class Digits10M(_Digits):
    """About ten million parameters."""

    name, hidden = "digits-10m", (3_100, 3_150)
    hyper: ClassVar[HyperParameters] = HyperParameters(
        local_steps=20, batch_size=32, learning_rate=0.3
    )


def cast_of(size: int, nodes: int, *, idle: int = 0) -> Cast:
    """Nodes that train on the task of this size, after `idle` bootstrap-only ones."""
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent)  # the trainers look there
    share = (IMAGES - TESTED) // nodes
    hospitals = [Hospital(f"Gate {i}", 0) for i in range(idle)]
    hospitals += [Hospital(f"Node {i}", share, {"site": i, "sites": nodes}) for i in range(nodes)]
    return Cast(f"digits:{SIZES[size]}", None, tuple(hospitals), "", "", "")


def run_of(rounds: int, *, share: str = "1", **changes: Any) -> dict[str, Any]:
    """Constants of a run without noise that waits for every live node in every round.

    Args:
        rounds: How many.
        share: Of the coordinates that are sent; below 1 with error feedback.
        changes: Constants to be replaced.
    """
    return {
        "rounds": rounds,
        "grid_bits": 14,
        "mechanism": "none",
        "unit": "none",
        "epsilon": Fraction(0),
        "delta": Fraction(0),
        "clip": Fraction(1),
        "block_size": 1,
        "segment_blocks": 1,
        "select_share": Fraction(1, 5),
        "top_fraction": Fraction(share),
        "outer": Outer("fedavg", 1.0),
        "robust": "none",
        "quorum": 1.0,
        "min_live": 0.5,
        "deadline_s": 120.0,
        "min_round_interval_s": 0.0,
        "encoding": Encoding("int8", error_feedback=Fraction(share) < 1),
        "averaging": Averaging(),
    } | changes
