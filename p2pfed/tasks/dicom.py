"""A DICOM series, one slice per file in one folder, as one volume.

Slices are put in order by where they lie (ImagePositionPatient along the slices' normal), never by
file name or number; grey values are slope * stored + intercept of each slice; the affine turns
DICOM's left and back (LPS) into NIfTI's right and front (RAS): DICOM PS3.3, C.7.6.2.1.1.

Invariant: a series that comes out of here is complete: one series, slices of one size and direction
and evenly spaced. Everything else is refused, the slice named by its number in the order of file
names, never by a value of its header.

Not here: multi-frame files and packed pixels for which pydicom needs more libraries; both are
refused with what to do.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from p2pfed.errors import ConfigError
from p2pfed.tasks.scans import Scan, checked, refused

__all__ = ["read_series", "series_files"]

_INDEX = "DICOMDIR"
_UNEVEN = 0.05  # of a step between slices
_TURNED = 1e-3  # of a direction cosine
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


@dataclass(frozen=True, slots=True, eq=False)
class _Slice:
    """One file: grey values (rows, columns), where its first voxel lies, and its directions."""

    series: str
    values: NDArray[np.float32]
    position: NDArray[np.float64]  # LPS millimetres, (3,)
    directions: NDArray[np.float64]  # (2, 3): along a row, along a column
    spacing: NDArray[np.float64]  # (2,): between rows, between columns


def series_files(folder: Path) -> list[Path]:
    """The files of a folder that should be slices, in the order of their names."""
    files = (path for path in folder.iterdir() if path.is_file())
    return sorted(p for p in files if not p.name.startswith(".") and p.name != _INDEX)


def read_series(folder: Path, where: str) -> Scan:
    """Read the series in a folder.

    Args:
        folder: Holds one file per slice and nothing else.
        where: Its place for the text of an error, as "case 3 of 17, image".

    Raises:
        ConfigError: No slice or only one, a slice that cannot be read, several series, or slices
            that differ, are missing or doubled.
    """
    try:
        files = series_files(folder)
    except OSError as error:
        raise refused(where, "cannot be read", error.strerror or "") from None
    if len(files) < 2:
        raise refused(where, f"a series of {len(files)} slices", "a volume needs two at least")
    slices = [_read_slice(f, f"{where}, slice {i} of {len(files)}") for i, f in enumerate(files, 1)]
    _check_alike(slices, where)
    along_row, along_column = slices[0].directions
    normal = np.cross(along_row, along_column)
    slices.sort(key=lambda s: float(s.position @ normal))
    step = _step(slices, normal, where)
    between_rows, between_columns = slices[0].spacing
    affine = np.eye(4)
    columns = (along_row * between_columns, along_column * between_rows, step)
    affine[:3, :3] = _LPS_TO_RAS @ np.stack(columns, axis=1)
    affine[:3, 3] = _LPS_TO_RAS @ slices[0].position
    # A file holds rows of columns: (j, i); the volume is (i, j, k).
    return checked(np.stack([s.values.T for s in slices], axis=-1), affine, where)


def _read_slice(path: Path, where: str) -> _Slice:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's warnings quote the header's values
            return _slice_of(pydicom.dcmread(path), where)
    except ConfigError:
        raise
    except (NotImplementedError, RuntimeError):
        raise refused(
            where,
            "has packed pixels that cannot be unpacked here",
            "damaged, or pydicom lacks a library for them",
            "unpack the series first, for instance with gdcmconv --raw",
        ) from None
    except Exception:  # noqa: BLE001 - pydicom raises what the damage led it to
        raise refused(
            where, "is not a whole DICOM image", "damaged, cut off, or without its place"
        ) from None


def _slice_of(header: pydicom.Dataset, where: str) -> _Slice:
    """What is needed of a file; raises whatever pydicom does where it is damaged."""
    if int(header.get("NumberOfFrames", 1)) > 1:
        raise refused(
            where,
            "holds several frames",
            "only series with one file per slice are read",
            "convert it to NIfTI, for instance with dcm2niix",
        )
    if header.SamplesPerPixel != 1 or header.PhotometricInterpretation != "MONOCHROME2":
        raise refused(where, "holds colours or inverted grey values")
    slope = float(header.get("RescaleSlope", 1))
    intercept = float(header.get("RescaleIntercept", 0))
    return _Slice(
        series=str(header.SeriesInstanceUID),
        values=(header.pixel_array * slope + intercept).astype(np.float32),
        position=_numbers(header.ImagePositionPatient, 3),
        directions=_numbers(header.ImageOrientationPatient, 6).reshape(2, 3),
        spacing=_numbers(header.PixelSpacing, 2),
    )


def _numbers(values: Any, count: int) -> NDArray[np.float64]:
    numbers = np.array([float(v) for v in values], dtype=np.float64)
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise ValueError
    return numbers


def _check_alike(slices: Sequence[_Slice], where: str) -> None:
    """Refuse slices of several series, sizes or directions."""
    first = slices[0]
    if any(s.series != first.series for s in slices):
        raise refused(
            where, "several series are mixed in the folder", "", "give each its own folder"
        )
    if any(s.values.shape != first.values.shape for s in slices):
        raise refused(where, "the slices differ in size")
    if not all(np.allclose(s.spacing, first.spacing, rtol=1e-3) for s in slices):
        raise refused(where, "the slices differ in spacing")
    if not all(np.allclose(s.directions, first.directions, atol=_TURNED) for s in slices):
        raise refused(where, "the slices differ in direction")
    square = first.directions @ first.directions.T
    if not np.allclose(square, np.eye(2), atol=0.01):
        raise refused(where, "rows and columns are not at right angles")


def _step(slices: Sequence[_Slice], normal: NDArray[np.float64], where: str) -> NDArray[np.float64]:
    """From one slice to the next, (3,); refuses gaps, doubles and slices out of line."""
    steps = np.diff([s.position for s in slices], axis=0)
    along = steps @ normal
    usual = float(np.median(along))
    if float(along.min()) <= 1e-3 or usual <= 1e-3:
        raise refused(where, "two slices lie at one place", "the series holds a slice twice")
    if float(along.max()) > (1.5 - _UNEVEN) * usual:
        raise refused(where, "slices are missing", "there is a gap between two of them")
    if np.linalg.norm(steps - np.median(steps, axis=0), axis=1).max() > _UNEVEN * usual:
        raise refused(where, "the slices are not evenly spaced on one line")
    step: NDArray[np.float64] = (slices[-1].position - slices[0].position) / (len(slices) - 1)
    return step
