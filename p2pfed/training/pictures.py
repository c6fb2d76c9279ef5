"""What a task shows of its cases: images with the expert's and the model's labels.

A picture is a patient's: it is seen on the trainer's private socket and in files of the hospital's
own, and nowhere else. The choice is best, median and worst by the task's own score, so that nobody
is shown the best alone.

Not here: drawing (report room), the socket (`private_socket`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Picture", "Stack", "chosen", "slices", "stacks"]

Voxels = NDArray[np.uint8]

_AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
_MOST_SLICES = 25  # of one plane
_MOST_PIXELS = 600_000  # of one plane's slices together: what is shown travels as one text


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One case.

    Attributes:
        case: What the hospital calls it; private.
        score: The task's own measure of this case, larger is better.
        image: Shape (X, Y, Z), RAS, grey values 0..255.
        target: The expert's labels, the same shape.
        predicted: The model's labels, the same shape.
        spacing: Millimetres per voxel along X, Y and Z.
    """

    case: str
    score: float
    image: Voxels
    target: Voxels
    predicted: Voxels
    spacing: tuple[float, float, float]


def chosen(scores: Sequence[float]) -> dict[str, int]:
    """Which of some cases are best, median (the lower of two) and worst; by number.

    Args:
        scores: Of every case, at least one.
    """
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}


def slices(picture: Picture) -> dict[str, dict[str, Any]]:
    """The three planes through the middle of what the expert marked; each meets some of it.

    Returns:
        Per plane ("sagittal", "coronal", "axial") the 2D arrays `image`, `target` and `predicted`
        and the `spacing` of their two axes; rows are the first of the remaining axes.
    """
    middle, planes = _middle(picture), {}
    for name, axis in _AXES.items():
        kept = [other for other in range(3) if other != axis]
        planes[name] = {
            "spacing": tuple(picture.spacing[other] for other in kept),
            **_cut(picture, axis, middle[axis]),
        }
    return planes


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Slices of one plane.

    Attributes:
        middle: Which of them is that of `slices`: where the expert marked something.
        slices: By growing index, the 2D arrays `image`, `target` and `predicted` of each.
    """

    middle: int
    slices: list[dict[str, Voxels]]


def stacks(picture: Picture) -> dict[str, Stack]:
    """Slices of every plane, evenly spread over what the expert or the model marked.

    The one that is nearest to the middle of what the expert marked gives way to the middle itself:
    a model that marks something far off does not move it.
    """
    found = {}
    marked = (picture.target > 0) | (picture.predicted > 0)
    places = np.argwhere(marked if marked.any() else np.ones_like(marked))
    centre = _middle(picture)
    for name, axis in _AXES.items():
        low, high = int(places[:, axis].min()), int(places[:, axis].max())
        size = picture.image.size // picture.image.shape[axis]
        count = max(1, min(_MOST_SLICES, high - low + 1, _MOST_PIXELS // size))
        at = np.rint(np.linspace(low, high, count)).astype(int)
        middle = int(np.abs(at - centre[axis]).argmin())
        at[middle] = centre[axis]
        found[name] = Stack(middle, [_cut(picture, axis, index) for index in at])
    return found


def _middle(picture: Picture) -> list[int]:
    """Along each axis the marked slice that is nearest to the centre of what the expert marked."""
    marked = np.argwhere(picture.target if picture.target.any() else np.ones_like(picture.target))
    found = []
    for at in marked.T:
        places = np.unique(at)
        found.append(int(places[np.abs(places - at.mean()).argmin()]))
    return found


def _cut(picture: Picture, axis: int, index: int) -> dict[str, Voxels]:
    return {
        part: np.take(getattr(picture, part), index, axis=axis)
        for part in ("image", "target", "predicted")
    }
