"""A case as the network sees it: RAS, a public spacing, grey values from that volume alone.

Map: `Transform` (public constants) -> `read_volume` (files of a case -> `Volume`) -> `restore` (a
mask of the network -> NIfTI on the grid that the image came on).

Invariant: a volume is a function of one patient's files and of public constants; nothing is
learned from other patients (see training.patients). `restore` undoes what was done to the grid: a
label that was only turned comes back bit for bit.

Turning to RAS swaps and flips axes and interpolates nothing. A target spacing resamples along the
volume's own axes (images linearly, labels by the nearest voxel): MONAI's Spacing would also turn an
oblique volume in space, and then the mask could not be put back exactly.

Not here: cutting patches (`patches`), keeping volumes (`cache`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from p2pfed.tasks.dicom import read_series
from p2pfed.tasks.scans import Scan, check_same_grid, read_nifti, refused

__all__ = ["Geometry", "Transform", "Volume", "read_volume", "restore", "volume_of"]

VERSION = 1  # of what is done to a volume; raise it with every change, cached volumes follow
_CUT = (0.5, 99.5)  # percentiles of a volume beyond which grey values are cut off

Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Transform:
    """What is done to every volume; public constants of a task.

    Attributes:
        spacing: Millimetres per voxel along R, A and S; None keeps the volume's own.
        window: Grey values that become 0 and 1, what lies beyond is cut off (CT, whose values mean
            something); None centres and scales each volume by its own mean and deviation (MRI).
    """

    spacing: Triple | None = None
    window: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Geometry:
    """Where a volume came from.

    Attributes:
        shape: Of the file, (X, Y, Z).
        affine: Of the file, (4, 4) float64.
        spacing: Millimetres per voxel of the volume, along R, A and S.
    """

    shape: tuple[int, ...]
    affine: NDArray[np.float64]
    spacing: Triple


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """One case.

    Attributes:
        image: Shape (C, X, Y, Z), float32, RAS.
        label: Shape (X, Y, Z), uint8; None where there is none.
        geometry: Where it came from.
    """

    image: NDArray[np.float32]
    label: NDArray[np.uint8] | None
    geometry: Geometry


def read_volume(
    images: Sequence[Path],
    label: Path | None,
    transform: Transform,
    *,
    classes: int,
    where: str,
) -> Volume:
    """Read and transform one case.

    Args:
        images: One NIfTI file, or one folder of a DICOM series, per channel.
        label: A NIfTI file on the same grid with whole numbers 0..classes, or None.
        transform: What is done to it.
        classes: Number of classes besides the background.
        where: The case's place for the text of an error, as "case 3 of 17".

    Raises:
        ConfigError: Something of it is unreadable or does not belong together; see `scans`,
            `dicom`.
    """
    scans = [_read(path, f"{where}, image") for path in images]
    for scan in scans[1:]:
        check_same_grid(scans[0], scan, f"{where}, another channel")
    expert = None
    if label is not None:
        expert = read_nifti(label, f"{where}, label")
        check_same_grid(scans[0], expert, f"{where}, label")
    return volume_of(scans, expert, transform, classes=classes, where=where)


def volume_of(
    scans: Sequence[Scan], label: Scan | None, transform: Transform, *, classes: int, where: str
) -> Volume:
    """The volume of scans that lie on one grid; arguments as of `read_volume`.

    Raises:
        ConfigError: The label holds something other than 0..classes.
    """
    first = scans[0]
    turn = nib.io_orientation(first.affine)
    spacing = _turned_spacing(first, turn)
    target = transform.spacing or spacing
    shape = tuple(first.voxels.shape[int(axis)] for axis in np.argsort(turn[:, 0]))
    size = [max(1, round(n * s / t)) for n, s, t in zip(shape, spacing, target, strict=True)]
    channels = [
        _normalised(_linear(nib.apply_orientation(s.voxels, turn), size), transform) for s in scans
    ]
    marked = None
    if label is not None:
        whole = _whole_numbers(label.voxels, classes, f"{where}, label")
        marked = _nearest(np.asarray(nib.apply_orientation(whole, turn)), size)
    return Volume(
        np.stack(channels),
        marked,
        Geometry(tuple(first.voxels.shape), first.affine, target),
    )


def restore(mask: NDArray[np.uint8], geometry: Geometry) -> nib.Nifti1Image:
    """A mask on the grid that the image came on.

    Args:
        mask: Shape (X, Y, Z) of the volume, RAS.
        geometry: The volume's.

    Returns:
        An image of uint8 with the file's shape and affine.
    """
    turn = nib.io_orientation(geometry.affine)
    shape = [geometry.shape[int(axis)] for axis in np.argsort(turn[:, 0])]
    back = nib.orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), turn)
    turned = nib.apply_orientation(_nearest(mask, shape), back)
    image = nib.Nifti1Image(np.ascontiguousarray(turned, dtype=np.uint8), geometry.affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(geometry.affine, code="scanner")
    image.set_qform(geometry.affine, code="scanner")
    return image


def _read(path: Path, where: str) -> Scan:
    return read_series(path, where) if path.is_dir() else read_nifti(path, where)


def _turned_spacing(scan: Scan, turn: NDArray[Any]) -> Triple:
    x, y, z = (scan.spacing[int(axis)] for axis in np.argsort(turn[:, 0]))
    return x, y, z


def _whole_numbers(voxels: NDArray[Any], classes: int, where: str) -> NDArray[np.uint8]:
    if not np.issubdtype(voxels.dtype, np.integer) and (voxels != np.rint(voxels)).any():
        raise refused(where, "holds fractions", "each voxel is of one class, a whole number")
    if voxels.min() < 0 or voxels.max() > classes:
        raise refused(
            where, "holds a class that the task does not have", f"its classes are 0 to {classes}"
        )
    return voxels.astype(np.uint8)


def _linear(voxels: NDArray[Any], size: Sequence[int]) -> NDArray[np.float32]:
    """Resample to a size; the outer faces of the volume stay where they are."""
    values = np.ascontiguousarray(voxels, dtype=np.float32)
    if list(values.shape) == list(size):
        return values
    resampled = torch.nn.functional.interpolate(
        torch.from_numpy(values)[None, None], size=list(size), mode="trilinear"
    )
    return np.asarray(resampled[0, 0].numpy(), dtype=np.float32)


def _nearest(mask: NDArray[np.uint8], size: Sequence[int]) -> NDArray[np.uint8]:
    """The same for labels: each voxel takes that of the old one in whose box its centre lies."""
    if list(mask.shape) == list(size):
        return np.ascontiguousarray(mask)
    old = [(2 * np.arange(n) + 1) * m // (2 * n) for n, m in zip(size, mask.shape, strict=True)]
    return np.ascontiguousarray(mask[np.ix_(*old)])


def _normalised(values: NDArray[np.float32], transform: Transform) -> NDArray[np.float32]:
    if transform.window is not None:
        low, high = transform.window
        return np.asarray(np.clip((values - low) / (high - low), 0, 1), dtype=np.float32)
    low, high = np.percentile(values, _CUT)
    values = np.clip(values, low, high)
    centre, deviation = values.mean(dtype=np.float64), values.std(dtype=np.float64)
    scaled = (values - centre) / (deviation if deviation > 0 else 1.0)  # an even volume is zeros
    return np.asarray(scaled, dtype=np.float32)
