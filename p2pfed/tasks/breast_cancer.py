"""Breast cancer at N hospitals of unequal size: 30 features of cell nuclei, malignant or not?

Data: Wisconsin Diagnostic Breast Cancer (Street, Wolberg, Mangasarian 1993, CC BY 4.0) as scikit-
learn carries it, 569 patients. `train.options.sites` is N and `train.options.site` this hospital,
0..N-1. The hospitals are made: a fixed shuffle of the row numbers is cut into parts whose sizes
fall from the first to the last about threefold; the first quarter of each part is for testing.

Neither the split nor the normalisation looks at a patient: rows are shuffled by number, and centre
and scale are the public constants below, rounded from the data set's published description.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import ClassVar

import torch
from sklearn.datasets import load_breast_cancer

from p2pfed.tasks.logistic import LogisticTask
from p2pfed.tasks.sites import whole, whole_or_none
from p2pfed.training.task import HyperParameters, Options, Split, TaskData

__all__ = ["BreastCancer"]

# Centre and scale of ten measures: mean over the nuclei, its standard error, the worst three.
SCALES = (
    ((14.0, 3.5), (0.4, 0.3), (16.0, 5.0)),  # radius
    ((19.0, 4.0), (1.2, 0.5), (26.0, 6.0)),  # texture
    ((92.0, 24.0), (2.9, 2.0), (107.0, 34.0)),  # perimeter
    ((650.0, 350.0), (40.0, 45.0), (880.0, 570.0)),  # area
    ((0.096, 0.014), (0.007, 0.003), (0.13, 0.023)),  # smoothness
    ((0.10, 0.05), (0.025, 0.018), (0.25, 0.16)),  # compactness
    ((0.09, 0.08), (0.03, 0.03), (0.27, 0.21)),  # concavity
    ((0.05, 0.04), (0.012, 0.006), (0.11, 0.065)),  # concave points
    ((0.18, 0.027), (0.02, 0.008), (0.29, 0.06)),  # symmetry
    ((0.063, 0.007), (0.004, 0.0026), (0.084, 0.018)),  # fractal dimension
)
MOST_SITES = 50


class BreastCancer(LogisticTask):
    """See the module docstring; options `site` (0..sites-1) and `sites` (default 5)."""

    name = "breast-cancer"
    num_features = 30
    hyper: ClassVar[HyperParameters] = HyperParameters(
        local_steps=20, batch_size=16, learning_rate=0.05
    )

    def data(self, folder: Path | None, options: Options) -> TaskData[Split]:  # noqa: ARG002 - no files
        """One hospital's patients; `folder` is not used. See `Task.data`."""
        sites = whole_or_none(options, "sites", low=1, high=MOST_SITES) or 5
        site = whole(options, "site", low=0, high=sites - 1)
        bunch = load_breast_cancer()
        scale = torch.tensor(SCALES, dtype=torch.float64).transpose(0, 1).reshape(30, 2)
        x = ((torch.from_numpy(bunch.data) - scale[:, 0]) / scale[:, 1]).to(torch.float32)
        y = torch.from_numpy(bunch.target == 0).to(torch.float32)  # 1 = malignant
        rows = _rows_of(site, sites, len(y))
        cut = max(1, round(len(rows) / 4))
        return TaskData(train=_split(x, y, rows[cut:]), test=_split(x, y, rows[:cut]))


def _split(x: torch.Tensor, y: torch.Tensor, rows: list[int]) -> Split:
    ids = tuple(f"wisconsin-breast-cancer/{row}".encode() for row in rows)
    return Split(x[rows], y[rows], torch.arange(len(rows)), ids)


def _rows_of(site: int, sites: int, total: int) -> list[int]:
    """Row numbers of one made hospital, in shuffled order; a function of public numbers only."""
    rows = list(range(total))
    random.Random(20_241).shuffle(rows)  # noqa: S311 - a fixed public order, not a secret
    weights = [3 * sites - 2 * k for k in range(sites)]  # 3 to about 1
    ends = [total * sum(weights[: k + 1]) // sum(weights) for k in range(sites)]
    return rows[ends[site - 1] if site else 0 : ends[site]]
