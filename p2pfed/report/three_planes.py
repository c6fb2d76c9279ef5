"""A patient's image in three planes, with the expert's and the model's outlines, as PNG.

Arrays are RAS: index grows to the patient's right, front and head. They are shown as radiologists
see them: the patient's right on the left of the picture, the front on top or on the left, the head
on top; letters on the edges say so. All planes of a case are drawn to one scale, by the voxels'
size. The expert's outline is blue and solid, the model's orange and dashed (Okabe-Ito colours, told
apart with colour-blindness, and by the dashes without colours).

Invariant: the files are 0600 in a folder of 0700, which must not exist: they show patients.

Not here: which slices and cases are shown (training.pictures).
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from p2pfed.errors import ConfigError, VersionMismatch

__all__ = ["EDGES", "Plane", "draw_pictures", "on_screen"]

# Plane -> what lies at the left, right, top and bottom edge of the picture.
EDGES = {
    "sagittal": ("A", "P", "S", "I"),
    "coronal": ("R", "L", "S", "I"),
    "axial": ("R", "L", "A", "P"),
}
# Okabe and Ito 2008, "Color Universal Design"; the lighter blue, since the ground is dark.
EXPERT, MODEL = "#56B4E9", "#E69F00"
_DASHES = (0, (2.6, 1.4))
_LONGEST_NAME = 60
_INCHES = 7.5  # of the three planes together
_GAP = 0.02  # between planes, of the picture's width

Voxels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Plane:
    """One slice as it lies on the screen: rows from the top, columns from the left.

    Attributes:
        image: Grey values 0..255, (rows, columns).
        target: The expert's labels.
        predicted: The model's labels.
        width: Of the whole slice, millimetres.
        height: The same.
    """

    image: Voxels
    target: Voxels
    predicted: Voxels
    width: float
    height: float


def draw_pictures(pictures: Mapping[str, Any], folder: Path, *, score: str = "score") -> list[Path]:
    """Draw one PNG per case and a sheet of all of them.

    Args:
        pictures: As `GET /v1/pictures` of the trainer's private socket gives them: per rank (best,
            median, worst) `case`, `score` and `planes`.
        folder: Made, 0700; must not exist.
        score: What the score is called.

    Returns:
        The files written, the sheet last.

    Raises:
        ConfigError: The folder exists or cannot be written.
        VersionMismatch: The pictures are not of this form.
    """
    if folder.exists():
        raise _taken(folder)
    try:
        cases = {rank: _case(shown) for rank, shown in pictures.items()}
        titles = {
            rank: f"{rank}: {_shown(str(shown['case']))}   {score} {float(shown['score']):.3f}"
            for rank, shown in pictures.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise VersionMismatch(
            "the pictures are not of the form that is known here",
            f"{type(error).__name__}",
            "restart the daemon after an update, so that both are of one version",
        ) from error
    drawn = {rank: _drawn([(titles[rank], case)]) for rank, case in cases.items()}
    drawn["sheet"] = _drawn([(titles[rank], case) for rank, case in cases.items()])
    try:
        folder.mkdir(mode=0o700, parents=True)
    except FileExistsError as error:
        raise _taken(folder) from error
    except OSError as error:
        raise _unwritten(folder, error) from error
    return [_write(folder / f"{name}.png", data) for name, data in drawn.items()]


def on_screen(slice_: NDArray[Any]) -> NDArray[Any]:
    """A slice of an RAS volume (first axis, second axis) as rows from the top, columns from left.

    In all three planes the second axis points up and the first one to the left: to the patient's
    right in coronal and axial pictures, to the front in sagittal ones.
    """
    return slice_.T[::-1, ::-1]


def _case(shown: Mapping[str, Any]) -> list[Plane]:
    planes = []
    for name in EDGES:
        parts = shown["planes"][name]
        across, up = (float(s) for s in parts["spacing"])
        image, target, predicted = (
            on_screen(_array(parts[part])) for part in ("image", "target", "predicted")
        )
        rows, columns = image.shape
        if not (image.shape == target.shape == predicted.shape and across > 0 and up > 0):
            raise ValueError(name)
        planes.append(Plane(image, target, predicted, columns * across, rows * up))
    return planes


def _array(coded: Mapping[str, Any]) -> Voxels:
    data = np.frombuffer(base64.b64decode(coded["data"], validate=True), np.uint8)
    rows, columns = coded["shape"]
    return data.reshape(int(rows), int(columns))


def _shown(name: str) -> str:
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 1]}…"


def _drawn(cases: Sequence[tuple[str, Sequence[Plane]]]) -> bytes:
    """A PNG with one row of three planes per case."""
    widest = max(sum(plane.width for plane in planes) for _, planes in cases)
    inches = _INCHES / widest  # per millimetre, in all rows
    heights = [max(plane.height for plane in planes) * inches for _, planes in cases]
    title, foot = 0.36, 0.36
    whole = sum(heights) + title * len(cases) + foot
    across = _INCHES * (1 + 4 * _GAP)
    with mpl.rc_context({"font.family": "sans-serif", "font.size": 9, "text.color": "white"}):
        figure = Figure(figsize=(across, whole), facecolor="black")
        top = whole
        for (text, planes), height in zip(cases, heights, strict=True):
            figure.text(_GAP, (top - 0.26) / whole, text, fontsize=10, parse_math=False)
            top -= title
            left = _GAP * _INCHES
            for name, plane in zip(EDGES, planes, strict=True):
                width, own = plane.width * inches, plane.height * inches
                low = top - (height + own) / 2
                box = (left / across, low / whole, width / across, own / whole)
                _draw(figure.add_axes(box), plane, name)
                left += width + _GAP * _INCHES
            top -= height
        figure.legend(
            handles=[
                Line2D([], [], color=EXPERT, lw=1.6, label="expert"),
                Line2D([], [], color=MODEL, lw=1.6, ls=_DASHES, label="model"),
            ],
            loc="lower left",
            ncols=2,
            frameon=False,
            handlelength=3,
        )
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=150, metadata={"Software": None})
    return data.getvalue()


def _draw(axes: Axes, plane: Plane, name: str) -> None:
    axes.set_axis_off()
    extent = (0.0, plane.width, plane.height, 0.0)
    axes.imshow(plane.image, cmap="gray", vmin=0, vmax=255, extent=extent, interpolation="nearest")
    for labels, colour, style, line in (
        (plane.target, EXPERT, "solid", 1.5),
        (plane.predicted, MODEL, _DASHES, 1.3),
    ):
        for number in np.unique(labels[labels > 0]):
            _outline(axes, labels == number, plane, colour=colour, style=style, line=line)
    axes.set_xlim(0, plane.width)
    axes.set_ylim(plane.height, 0)
    for letter, x, y in zip(
        EDGES[name], (0.03, 0.97, 0.5, 0.5), (0.5, 0.5, 0.97, 0.03), strict=True
    ):
        axes.text(
            x,
            y,
            letter,
            transform=axes.transAxes,
            ha={0.03: "left", 0.97: "right"}.get(x, "center"),
            va={0.03: "bottom", 0.97: "top"}.get(y, "center"),
            path_effects=[patheffects.withStroke(linewidth=2, foreground="black")],
        )


def _outline(
    axes: Axes, mask: NDArray[np.bool_], plane: Plane, *, colour: str, style: Any, line: float
) -> None:
    """The edge of a structure; closed also where it reaches the end of the slice."""
    rows, columns = mask.shape
    inside = np.pad(mask.astype(float), 1)
    x = (np.arange(columns + 2) - 0.5) * plane.width / columns
    y = (np.arange(rows + 2) - 0.5) * plane.height / rows
    axes.contour(x, y, inside, levels=[0.5], colors=[colour], linestyles=[style], linewidths=[line])


def _write(path: Path, data: bytes) -> Path:
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
            file.write(data)
    except OSError as error:
        raise _unwritten(path, error) from error
    return path


def _taken(folder: Path) -> ConfigError:
    return ConfigError(f"{folder} exists already", "nothing is overwritten", "name a new folder")


def _unwritten(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot write {path}", error.strerror or "", "make room there, or name another place"
    )
