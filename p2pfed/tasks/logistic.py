"""What the two tabular tasks share: a logistic model, its loss and its metrics."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from p2pfed.tasks.measures import area_under_curve
from p2pfed.training.task import Split, Task

__all__ = ["LogisticTask"]


class LogisticTask(Task):
    """Binary classification by one linear layer; y is (N,) float32 of 0 and 1."""

    num_features: int

    def model(self) -> nn.Module:
        """Linear(num_features, 1), its output flattened to (N,)."""
        return nn.Sequential(nn.Linear(self.num_features, 1), nn.Flatten(0))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Binary cross-entropy per record, shape (N,)."""
        return binary_cross_entropy_with_logits(output, target, reduction="none")

    def metrics(self, model: nn.Module, split: Split) -> dict[str, float]:
        """Accuracy, mean loss, and the area under the ROC curve where both classes occur."""
        with torch.no_grad():
            output = model(split.x)
            loss = self.loss(output, split.y).mean()
        values = {
            "accuracy": float(((output > 0) == (split.y == 1)).float().mean()),
            "loss": float(loss),
        }
        area = area_under_curve(output, split.y)
        return values if math.isnan(area) else values | {"auc": area}
