"""The tasks that come with p2pfed, by name; a hospital's own is named `module:Class`.

`training.task.load_task` looks names up here. Code never comes from a peer: what is not installed
at a hospital does not run there.
"""

from __future__ import annotations

__all__ = ["BUNDLED"]

BUNDLED = {
    "heart-disease": "p2pfed.tasks.heart_disease:HeartDisease",
    "breast-cancer": "p2pfed.tasks.breast_cancer:BreastCancer",
}
