"""The tasks that come with p2pfed, by name; a hospital's own is named `module:Class`.

`training.task.load_task` looks names up here. Code never comes from a peer: what is not installed
at a hospital does not run there.
"""

from __future__ import annotations

__all__ = ["BUNDLED"]

BUNDLED = {
    "heart-disease": "p2pfed.tasks.heart_disease:HeartDisease",
    "breast-cancer": "p2pfed.tasks.breast_cancer:BreastCancer",
    "segmentation": "p2pfed.tasks.segmentation:SegmentationTask",
    "hippocampus": "p2pfed.tasks.hippocampus:Hippocampus",
    "hippocampus-own-norm": "p2pfed.tasks.hippocampus:HippocampusOwnNorm",
    "drug-discovery": "p2pfed.tasks.drug_discovery:DrugDiscovery",
    "next-word": "p2pfed.tasks.next_word:NextWord",
    "bundle": "p2pfed.tasks.bundle:BundleTask",
}
