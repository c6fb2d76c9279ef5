"""Image files for tests: small NIfTI volumes, DICOM series, folders of cases, MONAI bundles.

Everything is a function of its arguments. Values grow along the patient's axes, so that a volume
that was turned the wrong way is another one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from real_data import real_data

from p2pfed.tasks.phantoms import write_phantoms

MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"


def hippocampus_folder() -> Path:
    """The 64 hippocampus volumes; skipped where they are missing, a failure in CI."""
    return real_data("hippocampus", "images")


def ramp(shape: tuple[int, ...]) -> np.ndarray:
    """A float32 volume in which every voxel has another value."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def blocks(shape: tuple[int, ...]) -> np.ndarray:
    """A uint8 label: background, 1 in the front half of the middle, 2 behind; nothing is even."""
    label = np.zeros(shape, np.uint8)
    x, y, z = shape
    label[x // 4 : x // 2, y // 2 : y - 1, 1 : z // 2] = 1
    label[x // 4 : x // 2 + 1, 1 : y // 2, 1 : z // 2] = 2
    return label


def write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Write voxels as they are; RAS with 1 mm unless an affine says otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return path


def affine_of(axes: str, spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> np.ndarray:
    """An affine whose voxel axes point as said, for instance "LPS"."""
    turn = nib.orientations.axcodes2ornt(axes)
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, ((row, sign), step) in enumerate(zip(turn, spacing, strict=True)):
        affine[int(row), column] = sign * step
    affine[:3, 3] = (3.0, -7.0, 11.0)
    return affine


def slice_of(
    voxels: np.ndarray, k: int, *, spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
) -> FileDataset:
    """Slice k of a volume whose axes are L, P and S, as a DICOM file in memory."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MR_IMAGE
    meta.MediaStorageSOPInstanceUID = f"1.2.3.{k + 1}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    made.SOPClassUID, made.SOPInstanceUID = MR_IMAGE, f"1.2.3.{k + 1}"
    made.SeriesInstanceUID, made.Modality = "1.2.3", "MR"
    made.PatientID, made.PatientName = "secret-4711", "Secret^Name"
    columns, rows, _ = voxels.shape
    made.Rows, made.Columns, made.SamplesPerPixel = rows, columns, 1
    made.PhotometricInterpretation = "MONOCHROME2"
    made.BitsAllocated = made.BitsStored = 16
    made.HighBit, made.PixelRepresentation = 15, 0
    made.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    made.ImagePositionPatient = [-5.0, 6.0, 10.0 + k * spacing[2]]
    made.PixelSpacing = [spacing[1], spacing[0]]
    made.RescaleSlope, made.RescaleIntercept = 2, -1000
    made.PixelData = np.ascontiguousarray(voxels[:, :, k].T).astype("<u2").tobytes()
    return made


def write_series(folder: Path, slices: list[FileDataset], names: list[str] | None = None) -> Path:
    """Write slices as files; names are by default in an order that is not theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    names = names or [f"{(7 * i) % 31:02d}.dcm" for i in range(len(slices))]
    for name, one in zip(names, slices, strict=True):
        pydicom.dcmwrite(folder / name, one, enforce_file_format=True)
    return folder


def series(folder: Path, voxels: np.ndarray, **how: Any) -> Path:
    """A whole series of a volume whose axes are L, P and S."""
    return write_series(folder, [slice_of(voxels, k, **how) for k in range(voxels.shape[2])])


def phantom_folder(folder: Path, count: int = 8) -> Path:
    """images/ and labels/ with phantoms."""
    write_phantoms(folder, count)
    return folder


def write_bundle(folder: Path, network: Any = None, **metadata: Any) -> Path:
    """A MONAI bundle's folder for a small U-Net with three outputs."""
    network = network or {
        "_target_": "UNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 3,
        "channels": [4, 8],
        "strides": [2],
        "norm": "instance",
    }
    config = {
        "imports": ["$import os"],
        "device": "$torch.device('cpu')",
        "network_def": network,
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Spacingd", "keys": "image", "pixdim": [1.5, 1.5, 2.0]},
                {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": -57, "a_max": 164},
            ],
        },
    }
    form = {
        "inputs": {"image": {"num_channels": 1, "spatial_shape": [32, 32, 32]}},
        "outputs": {
            "pred": {
                "num_channels": 3,
                "channel_def": {"0": "background", "1": "liver", "2": "left lobe"},
            }
        },
    }
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    (folder / "configs" / "train.json").write_text(json.dumps(config))
    facts = {"network_data_format": form} | metadata
    (folder / "configs" / "metadata.json").write_text(json.dumps(facts))
    return folder
