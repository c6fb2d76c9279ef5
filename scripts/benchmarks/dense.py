"""Synthetic dense tasks of 0.1, 1 and 10 million parameters: next to no data, one cheap step.

They measure what the network costs, not what training costs. Daemons find them by PYTHONPATH as
`dense:Dense100k`, `dense:Dense1M` and `dense:Dense10M`.
"""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from p2pfed.demo.plan import Cast, Hospital
from p2pfed.identity.run import Outer
from p2pfed.training.task import HyperParameters, Options, Split, Task, TaskData

__all__ = ["Dense1M", "Dense10M", "Dense100k", "cast_of", "run_of"]

PATIENTS = 4
TASKS = {100_000: "dense:Dense100k", 1_000_000: "dense:Dense1M", 10_000_000: "dense:Dense10M"}


class _Dense(Task):
    """One matrix without bias, fitted to random targets."""

    inputs: ClassVar[int]
    outputs: ClassVar[int]
    hyper: ClassVar[HyperParameters] = HyperParameters(
        local_steps=1, batch_size=PATIENTS, learning_rate=0.01
    )

    def model(self) -> nn.Module:
        return nn.Linear(self.inputs, self.outputs, bias=False)

    def data(self, folder: Path | None, options: Options) -> TaskData:  # noqa: ARG002 - made here
        random = torch.Generator().manual_seed(int(options["site"]))

        def split() -> Split:
            x = torch.randn(PATIENTS, self.inputs, generator=random)
            y = torch.randn(PATIENTS, self.outputs, generator=random)
            return Split(x, y, torch.arange(PATIENTS))

        return TaskData(train=split(), test=split())

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum(dim=1)

    def metrics(self, model: nn.Module, split: Split) -> dict[str, float]:
        return {"loss": float(self.loss(model(split.x), split.y).mean())}


class Dense100k(_Dense):
    """0.1 million parameters."""

    name, inputs, outputs = "dense-100k", 100, 1_000


class Dense1M(_Dense):
    """1 million parameters."""

    name, inputs, outputs = "dense-1m", 500, 2_000


class Dense10M(_Dense):
    """10 million parameters."""

    name, inputs, outputs = "dense-10m", 1_000, 10_000


def cast_of(num_parameters: int, nodes: int) -> Cast:
    """Nodes that all train on the task of this size."""
    folder = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = folder  # the daemons' trainers look there
    hospitals = tuple(Hospital(f"Node {i}", PATIENTS, {"site": i}) for i in range(nodes))
    first = hospitals[0].name
    return Cast(TASKS[num_parameters], None, hospitals, first, first, first)


def run_of(rounds: int) -> dict[str, Any]:
    """Constants of a run that waits for every node in every round, and sends a tenth."""
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
        "top_fraction": Fraction(1, 10),
        "outer": Outer("fedadam", 0.01),
        "robust": "clip-median",
        "quorum": 1.0,
        "min_live": 1.0,
        "deadline_s": 120.0,
        "min_round_interval_s": 0.0,
    }
