"""The breast cancer task with a model so wide that an update takes a slow line seconds."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from p2pfed.tasks.breast_cancer import BreastCancer
from p2pfed.training.task import HyperParameters

WIDTH = 8192
PARAMETERS = 32 * WIDTH + 1  # 30 weights and a bias into each, one weight out of each, and a bias


class WideBreastCancer(BreastCancer):
    """As its parent, with one hidden layer."""

    name = "wide-breast-cancer"
    hyper: ClassVar[HyperParameters] = HyperParameters(
        local_steps=2, batch_size=16, optimizer="adam", learning_rate=0.001
    )

    def model(self):
        return nn.Sequential(
            nn.Linear(self.num_features, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1), nn.Flatten(0)
        )
