"""Drug discovery at 17 partners: one trunk learned together, heads for targets of one's own.

The idea is that of multi-partner QSAR as the MELLODDY project ran it (Heyndrickx et al. 2023,
doi:10.1021/acs.jcim.3c00799): partners measured different compounds against different targets and
tell nobody which; what they share is how a compound is seen. The data are made by a public rule: a
compound has a few hidden properties; the bits of its fingerprint follow from them with noise, and
so do a few features, each a wave along one direction. Every target is a threshold on a mixture of
the features that nobody else has, with noise, and most compounds were measured against some of the
targets only. The features are the same for all partners, and no partner has enough compounds to
find them.

`train.options.site` is the partner, 0..16. The number of targets differs from partner to partner (3
to 12), so the shape of the head does; the head stays at home, and the task's identity is the same
everywhere.

Not here: real compounds. What a model learns here says that the machinery works, not that it would
pay for real ones.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from p2pfed.tasks.measures import area_under_curve
from p2pfed.tasks.sites import site_number
from p2pfed.training.task import HyperParameters, Options, Split, Task, TaskData

__all__ = ["NOT_MEASURED", "PARTNERS", "DrugDiscovery", "targets_of"]

PARTNERS = 17
BITS = 256
PROPERTIES = 6  # of a compound, hidden
FEATURES = 8  # that targets are mixed from
HIDDEN = (64, 32)
NOT_MEASURED = -1.0
TESTED = 200  # compounds per partner that do not train
_LEAST, _MORE = 60, 5  # training compounds of partner 0, and of each later one more than before
_MEASURED = 0.6  # of all pairs of compound and target
_NOISE = 0.3  # of an assay, where the activities' deviation is 1
_ACTIVE = 0.3  # activity from which a compound counts as active
_CHEMISTRY = 20_231  # public: fixes how bits and features follow from properties


class DrugDiscovery(Task):
    """See the module docstring; option `site` (0..16, default 0)."""

    name: ClassVar[str] = "drug-discovery"
    monitor: ClassVar[str] = "auc"
    larger_is_better: ClassVar[bool] = True
    private_parameters: ClassVar[tuple[str, ...]] = ("head.*",)
    hyper: ClassVar[HyperParameters] = HyperParameters(
        local_steps=10, batch_size=16, learning_rate=0.2, optimizer="momentum"
    )

    def model(self) -> nn.Module:
        """256 bits -> 64 -> 32, the trunk; -> the partner's targets, the head."""
        return _Net(targets_of(site_number(self.options, PARTNERS)))

    def data(self, folder: Path | None, options: Options) -> TaskData[Split]:  # noqa: ARG002 - none
        """One partner's compounds; see `Task.data`."""
        site = site_number(options, PARTNERS)
        chance = torch.Generator().manual_seed(1_000 + site)
        mixture = torch.randn(FEATURES, targets_of(site), generator=chance)
        train = _compounds(f"{site}/train", _LEAST + _MORE * site, mixture, chance)
        return TaskData(train, _compounds(f"{site}/test", TESTED, mixture, chance))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy over the targets that a compound was measured against.

        Args:
            output: Shape (N, targets).
            target: 1 active, 0 inactive, -1 not measured; the same shape.
        """
        known = (target != NOT_MEASURED).to(output.dtype)
        each = binary_cross_entropy_with_logits(output, target.clamp(min=0), reduction="none")
        return (each * known).sum(-1) / known.sum(-1).clamp(min=1)

    def metrics(self, model: nn.Module, patients: Split) -> dict[str, float]:
        """Mean area under the ROC curve over the partner's targets, and the loss.

        A target of which all compounds are active, or none, has no curve and does not count; `auc`
        is NaN where no target counts.
        """
        with torch.no_grad():
            output = model(patients.x)
        areas = []
        for scores, labels in zip(output.T, patients.y.T, strict=True):
            known = labels != NOT_MEASURED
            areas.append(area_under_curve(scores[known], labels[known]))
        there = [area for area in areas if not math.isnan(area)]
        return {
            "auc": sum(there) / len(there) if there else math.nan,
            "loss": float(self.loss(output, patients.y).mean()),
        }


class _Net(nn.Module):
    def __init__(self, targets: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(BITS, HIDDEN[0]), nn.ReLU(), nn.Linear(HIDDEN[0], HIDDEN[1]), nn.ReLU()
        )
        self.head = nn.Linear(HIDDEN[1], targets)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.trunk(x))
        return output


def targets_of(site: int) -> int:
    """How many targets a partner has, 3 to 12."""
    return 3 + 7 * site % 10


def _compounds(name: str, count: int, mixture: Tensor, chance: torch.Generator) -> Split:
    """Draw compounds, their fingerprints (count, BITS) and assays (count, targets)."""
    chemistry = torch.Generator().manual_seed(_CHEMISTRY)
    structure = torch.randn(PROPERTIES, BITS, generator=chemistry) / PROPERTIES**0.5
    directions = torch.randn(PROPERTIES, FEATURES, generator=chemistry)
    directions /= directions.norm(dim=0)
    phases = 2 * math.pi * torch.rand(FEATURES, generator=chemistry)

    properties = torch.randn(count, PROPERTIES, generator=chance)
    likely = torch.sigmoid(3 * properties @ structure - 1.5)
    bits = torch.rand(count, BITS, generator=chance) < likely
    features = torch.sin(1.5 * properties @ directions + phases)
    activity = features @ mixture / (mixture.square().sum(0) / 2).sqrt()
    activity += _NOISE * torch.randn(activity.shape, generator=chance)
    labels = (activity > _ACTIVE).float()
    measured = torch.rand(labels.shape, generator=chance) < _MEASURED
    return Split(
        bits.float(),
        torch.where(measured, labels, torch.tensor(NOT_MEASURED)),
        torch.arange(count),
        tuple(f"drug-discovery/{name}/{row}".encode() for row in range(count)),
    )
