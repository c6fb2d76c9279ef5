"""Made-up volumes for who has no images: structures that touch, in noise with a texture.

Each phantom is a function of its number. A chain of ellipsoids lies from front to back, the first
class in front, each a little brighter than the noise around it and darker than some round
distractors that belong to no class; sizes, place, tilt and brightness differ from one to the next.
The network has to learn shape and place; brightness alone does not do.

What a model learns on them says that the machinery works, and nothing about patients.
"""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from p2pfed.tasks.scans import Scan

__all__ = ["is_test_phantom", "phantom", "phantom_name", "phantom_number", "write_phantoms"]

_SEED = 20_261
_LEAST, _MOST = (30, 40, 28), (40, 54, 42)  # voxels of 1 mm, as hippocampus volumes are
_DISTRACTORS = 3


def phantom_name(number: int) -> str:
    """What phantom `number` is called as a case."""
    return f"phantom_{number:03d}"


def phantom_number(name: str) -> int:
    """The number in a phantom's name."""
    return int(name.removeprefix("phantom_"))


def is_test_phantom(number: int) -> bool:
    """Every fourth phantom is for testing."""
    return number % 4 == 0


def phantom(number: int, *, classes: int = 2, channels: int = 1) -> tuple[list[Scan], Scan]:
    """Images (one per channel) and label of one phantom, RAS, 1 mm.

    Args:
        number: Which one; 0, 1, ….
        classes: Structures in the chain.
        channels: Images; each has another contrast.
    """
    chance = np.random.default_rng([_SEED, number])
    shape = tuple(int(n) for n in chance.integers(_LEAST, _MOST, endpoint=True))
    places = np.indices(shape, dtype=np.float64)
    middle = np.array(shape) / 2 + chance.uniform(-2.5, 2.5, 3)
    tilt = chance.uniform(-0.25, 0.25, 2)  # of the chain: sideways and upwards per voxel backwards
    label = np.zeros(shape, np.uint8)
    long = shape[1] * chance.uniform(0.55, 0.7) / classes  # of one structure, front to back
    for number_in_chain in range(classes):
        back = (classes / 2 - number_in_chain - 0.5) * long
        centre = middle + np.array([tilt[0] * back, back, tilt[1] * back])
        radii = [chance.uniform(5, 8), 0.62 * long, chance.uniform(4, 7)]
        inside = _ellipsoid(places, centre, radii) & (label == 0)
        label[inside] = number_in_chain + 1
    bright = np.zeros(shape)
    for _ in range(_DISTRACTORS):
        centre = chance.uniform(0, 1, 3) * shape
        bright[_ellipsoid(places, centre, chance.uniform(2, 5, 3))] = 1.0
    affine = np.eye(4)
    images = []
    for channel in range(channels):
        contrast = chance.uniform(0.7, 1.0) * (1.0 if channel % 2 == 0 else -1.0)
        tissue = contrast * (label > 0) + 1.3 * bright * (label == 0) + 0.12 * contrast * label
        noise = 0.4 * _smooth(chance.normal(size=shape), 3) + 0.2 * chance.normal(size=shape)
        images.append(Scan((300 + 90 * (tissue + noise)).astype(np.float32), affine))
    return images, Scan(label, affine)


def write_phantoms(folder: Path, count: int, *, classes: int = 2) -> None:
    """Write phantoms 0..count-1 as NIfTI into `images/` and `labels/` of a folder."""
    for number in range(count):
        images, label = phantom(number, classes=classes)
        for part, scan in (("images", images[0]), ("labels", label)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            path = folder / part / f"{phantom_name(number)}.nii.gz"
            nib.save(nib.Nifti1Image(scan.voxels, scan.affine), path)


def _ellipsoid(
    places: NDArray[np.float64], centre: NDArray[np.float64], radii: object
) -> NDArray[np.bool_]:
    scale = np.asarray(radii, dtype=np.float64)[:, None, None, None]
    apart = (places - centre[:, None, None, None]) / scale
    return np.asarray((apart**2).sum(axis=0) <= 1)


def _smooth(noise: NDArray[np.float64], times: int) -> NDArray[np.float64]:
    """Averages over neighbours, scaled to deviation 1; the volume's faces meet."""
    for _ in range(times):
        for axis in range(3):
            noise = (np.roll(noise, 1, axis) + noise + np.roll(noise, -1, axis)) / 3
    return np.asarray(noise / noise.std())
