"""Hippocampus in T1 MRI: which voxels are its anterior part, which its posterior?

Data: Task04 of the Medical Segmentation Decathlon (Antonelli et al. 2022, doi:10.1038/s41467-022-
30695-9, CC BY-SA 4.0; Vanderbilt University Medical Center), cropped volumes of about 36 x 50 x 35
voxels of 1 mm, in `train.data` as `images/` and `labels/` or as the Decathlon's own folders. All
come from one site: hospitals are made of them by `train.options.site` and `sites`. Without the
data, `train.options.phantoms = 24` makes volumes up (`phantoms`).

The network is small on purpose (122,913 parameters): one local step of four patches takes one CPU
thread about .05 s.
"""

from __future__ import annotations

from typing import ClassVar

from p2pfed.tasks.segmentation import Plan, SegmentationTask
from p2pfed.training.task import HyperParameters

__all__ = ["Hippocampus", "HippocampusOwnNorm"]


class Hippocampus(SegmentationTask):
    """See the module docstring; options as of `SegmentationTask`."""

    name: ClassVar[str] = "hippocampus"
    hyper: ClassVar[HyperParameters] = HyperParameters(
        local_steps=20, batch_size=4, learning_rate=1e-2, optimizer="adam"
    )

    def plan(self) -> Plan:
        """Two parts, at the 1 mm that the volumes have."""
        return Plan(
            classes=("anterior", "posterior"),
            patch=(32, 40, 32),
            widths=(8, 16, 32, 64),
            residual_units=0,
        )


class HippocampusOwnNorm(Hippocampus):
    """Each hospital keeps the scales of its normalisation at home (FedBN)."""

    name: ClassVar[str] = "hippocampus-own-norm"
    private_parameters: ClassVar[tuple[str, ...]] = ("*.adn.N.*",)
