"""Hospitals that differ, in a task small enough to be trained in a test: a line and a norm."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from p2pfed.training.task import HyperParameters, Split, Task, TaskData

__all__ = ["FEATURES", "Unlike", "Unscaled"]

FEATURES = 60


class Unlike(Task):
    """The same direction everywhere, and a threshold that every hospital has of its own.

    Options: `site`, `sites`, and `patients` that train (default 16).
    """

    name = "unlike"
    monitor: ClassVar[str] = "accuracy"
    larger_is_better: ClassVar[bool] = True
    hyper: ClassVar[HyperParameters] = HyperParameters(
        local_steps=5, batch_size=8, learning_rate=1.0
    )

    def model(self):
        return nn.Sequential(nn.Linear(FEATURES, 1), nn.Flatten(0))

    def data(self, folder, options):
        site, chance = options["site"], torch.Generator().manual_seed(options["site"])
        direction = torch.randn(FEATURES, generator=torch.Generator().manual_seed(99))
        direction /= direction.norm()
        threshold = 0.55 * (-1) ** site

        def some(count):
            x = torch.randn(count, FEATURES, generator=chance)
            return Split(x, (x @ direction > threshold).float(), torch.arange(count))

        return TaskData(some(options.get("patients", 16)), some(400))

    def loss(self, output, target):
        return binary_cross_entropy_with_logits(output, target, reduction="none")

    def metrics(self, model, patients):
        output = model(patients.x)
        return {
            "accuracy": float(((output > 0) == (patients.y > 0)).float().mean()),
            "loss": float(self.loss(output, patients.y).mean()),
        }


class Unscaled(Unlike):
    """The same, seen through scanners whose scale and offset differ; a norm with buffers."""

    name = "unscaled"
    hyper: ClassVar[HyperParameters] = HyperParameters(
        local_steps=5, batch_size=16, learning_rate=0.1
    )

    def model(self):
        inner = nn.Linear(FEATURES, 8)
        return nn.Sequential(inner, nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))

    def data(self, folder, options):
        data = super().data(folder, {**options, "patients": 64})
        scale, offset = ((1.0, 0.0), (0.5, 0.3), (-2.0, -0.5))[options["site"] % 3]
        seen = (Split(s.x * scale + offset, s.y, s.patient) for s in (data.train, data.test))
        return TaskData(*seen)
