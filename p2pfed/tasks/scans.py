"""One volume of a patient as it lies on disk: voxels, where they are, and what is wrong with them.

Map: `Scan` (voxels and affine) -> `read_nifti` (one file) -> `check_same_grid` (do an image and its
label belong together?) -> `refused` (how every mistake is told). DICOM series are in `dicom`.

Invariant: a scan that comes out of here is a finite 3D array whose affine can be inverted. What is
refused is named by its place ("case 3 of 17, image"), never by a file name, a patient or a value:
the network process shows the text too. A packed file is unpacked whole before anything of it is
believed, so that its checksum is looked at; nothing is ever unpickled.

The affine is that of NIfTI: voxel (i, j, k) lies at affine @ (i, j, k, 1), in millimetres to the
patient's right, front and head (RAS).

Not here: orientation, spacing and grey values (`volumes`), which files a case has (`cases`).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from p2pfed.errors import ConfigError

__all__ = ["SUFFIXES", "Scan", "check_same_grid", "checked", "read_nifti", "refused"]

SUFFIXES = (".nii.gz", ".nii")
_GZIP = b"\x1f\x8b"
_NIFTI2_HEADER = 540  # its first number; NIfTI-1 has 348
_MOST_BYTES = 1 << 33  # of an unpacked file: 1024 x 1024 x 1024 voxels of 8 bytes
_SPACINGS = (0.001, 100.0)  # millimetres per voxel that an instrument can have
_APART = 0.1  # voxels; grids whose corners are closer than this are one grid
_DO = "put it right or take the case out; cases are counted in the order of their names"


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """One volume.

    Attributes:
        voxels: Shape (X, Y, Z), real numbers.
        affine: Shape (4, 4), float64; from voxel numbers to RAS millimetres.
    """

    voxels: NDArray[Any]
    affine: NDArray[np.float64]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres per voxel along the three axes."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return x, y, z


def refused(where: str, what: str, why: str = "", do: str = _DO) -> ConfigError:
    """The error for one scan.

    Args:
        where: Its place, as "case 3 of 17, image".
        what: What is wrong, without a value of the patient's.
        why: Why that is refused.
        do: What to do.
    """
    return ConfigError(f"{where}: {what}", why, do)


def read_nifti(path: Path, where: str) -> Scan:
    """Read one NIfTI file, version 1 or 2, packed or not.

    Args:
        path: The file.
        where: Its place for the text of an error.

    Raises:
        ConfigError: It cannot be read, is damaged or cut off, is not one 3D volume of real numbers,
            or holds NaN.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise refused(where, "cannot be read", error.strerror or "") from None
    try:
        voxels, affine = _parsed(_unpacked(content) if content.startswith(_GZIP) else content)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - nibabel raises what the damage led it to
        raise refused(where, "is not a whole NIfTI file", "damaged, cut off or not NIfTI") from None
    return checked(_three(voxels, where), affine, where)


def checked(voxels: NDArray[Any], affine: NDArray[np.float64], where: str) -> Scan:
    """A scan of these, if they can be one; what they must be is said in the module docstring.

    Raises:
        ConfigError: Not real numbers, NaN or infinity, empty, or an affine that nothing lies on.
    """
    if not (np.issubdtype(voxels.dtype, np.integer) or np.issubdtype(voxels.dtype, np.floating)):
        raise refused(where, "holds colours or complex numbers", "a volume of grey values is meant")
    if voxels.size == 0:
        raise refused(where, "is empty")
    if not np.isfinite(voxels).all():
        raise refused(where, "holds NaN or infinity", "it would only spoil the model")
    scan = Scan(voxels, affine)
    low, high = _SPACINGS
    usable = np.isfinite(affine).all() and all(low <= s <= high for s in scan.spacing)
    # The volume of a voxel against that of a box with its edges: 0 where two axes are one.
    if not usable or abs(np.linalg.det(affine[:3, :3])) < 0.1 * np.prod(scan.spacing):
        raise refused(where, "lies nowhere", "its affine has no usable spacing or direction")
    return scan


def check_same_grid(image: Scan, other: Scan, where: str) -> None:
    """Refuse two scans whose voxels do not lie on each other.

    Args:
        image: The case's first image.
        other: Its label, or another channel.
        where: The other's place.

    Raises:
        ConfigError: Shape, orientation, spacing or position differ; it says which.
    """
    if image.voxels.shape != other.voxels.shape:
        raise refused(where, "has another shape than the image", "they show different voxels")
    ends = np.array(image.voxels.shape) - 1
    corners = np.array([[*(ends * c), 1] for c in np.ndindex(2, 2, 2)]).T
    apart = np.linalg.norm(((image.affine - other.affine) @ corners)[:3], axis=0).max()
    if apart <= _APART * min(image.spacing):
        return
    what = "position"
    if not np.allclose(image.spacing, other.spacing, rtol=0.01):
        what = "spacing"
    elif nib.aff2axcodes(image.affine) != nib.aff2axcodes(other.affine):
        what = "orientation"
    raise refused(
        where,
        f"has another {what} than the image",
        "voxels of one number lie at different places of the patient",
        "write it again on the image's grid, or take the case out",
    )


def _parsed(plain: bytes) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Voxels (as scaled by the header) and affine of an unpacked file."""
    first = {int.from_bytes(plain[:4], "little"), int.from_bytes(plain[:4], "big")}
    kind = nib.Nifti2Image if _NIFTI2_HEADER in first else nib.Nifti1Image
    image = kind.from_bytes(plain)
    room = np.prod([float(n) for n in image.shape]) * image.get_data_dtype().itemsize
    if room > len(plain):  # before memory is asked for
        raise EOFError
    return np.asanyarray(image.dataobj), np.asarray(image.affine, dtype=np.float64)


def _three(voxels: NDArray[Any], where: str) -> NDArray[Any]:
    """The array without its axes of length 1 past the third."""
    shape = voxels.shape
    if len(shape) < 3 or any(length != 1 for length in shape[3:]):
        raise refused(
            where,
            f"has {len(shape)} dimensions",
            "one 3D volume per file is meant; channels go into files of their own",
        )
    return voxels.reshape(shape[:3])


def _unpacked(content: bytes) -> bytes:
    """All members of a gzip file, their checksums compared.

    Raises:
        zlib.error: It is damaged.
        EOFError: It is cut off, or larger than any volume.
    """
    parts, left = [], _MOST_BYTES
    while content.startswith(_GZIP):
        stream = zlib.decompressobj(wbits=31)
        parts.append(stream.decompress(content, left + 1))
        left -= len(parts[-1])
        if not stream.eof or left < 0:
            raise EOFError
        content = stream.unused_data
    return b"".join(parts)
