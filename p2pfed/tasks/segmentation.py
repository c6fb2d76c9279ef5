"""Segmentation of 3D images: a U-Net, patches to train on, whole volumes to judge and to predict.

Map: `Plan` (what hospitals must share about the images) -> `SegmentationTask` (`model`, `data`,
`loss`, `infer`, `metrics`, `pictures`, `predict`). A task of your own is a subclass whose `plan`
returns your classes, spacing and patch, in a module of your own (its source is part of the task's
identity); see `hippocampus` for a whole one.

`data` takes the folders that `cases` describes, and these `train.options`:

* `site`, `sites`: one of several made hospitals of unequal size; without them the whole folder.
* `phantoms`: where there is no folder, so many made-up volumes (`phantoms`).
* `cache`: auto, memory, disk or off; `cache_folder`: where (`cache`), else in the trainer's own
  folder; nothing goes to the disk where neither is known.

The model has no buffers (instance normalisation), so that single patients can be protected.

Not here: training (the training room), drawing (report room).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, cast

import nibabel as nib
import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from monai.networks.nets.unet import UNet
from numpy.typing import NDArray
from torch import Tensor, nn

from p2pfed.errors import ConfigError
from p2pfed.tasks.cache import CacheMode, Prepared, Shelf
from p2pfed.tasks.cases import Case, find_cases, of_site, unlabelled_cases
from p2pfed.tasks.patches import Cut, Volumes
from p2pfed.tasks.phantoms import is_test_phantom, phantom, phantom_name, phantom_number
from p2pfed.tasks.sites import whole, whole_or_none
from p2pfed.tasks.volumes import Transform, Volume, read_volume, restore, volume_of
from p2pfed.training.pictures import Picture, chosen
from p2pfed.training.task import HyperParameters, Options, Task, TaskData

__all__ = ["Plan", "SegmentationTask", "dice_of"]

_MODES = ("auto", "memory", "disk", "off")
_MOST_SITES, _MOST_PHANTOMS = 50, 1000
_WINDOWS = 4  # at a time
_OVERLAP = 0.25  # of neighbouring windows


@dataclass(frozen=True, slots=True)
class Plan:
    """What hospitals share about the images; public constants.

    Attributes:
        classes: Names of labels 1, 2, …; 0 is the background.
        channels: Images per case.
        patch: Voxels of a patch and of a window; a multiple of 2^(levels - 1) each.
        per_patient: Patches that make up one patient's contribution.
        flips: Axes along which half of the patches are turned over; 0 swaps left and right.
        transform: Spacing and grey values.
        widths: Channels of the U-Net's levels.
        residual_units: Per level; 0 for plain convolutions.
    """

    classes: tuple[str, ...]
    channels: int = 1
    patch: tuple[int, int, int] = (64, 64, 64)
    per_patient: int = 2
    flips: tuple[int, ...] = ()
    transform: Transform = field(default_factory=Transform)
    widths: tuple[int, ...] = (16, 32, 64, 128)
    residual_units: int = 1


class SegmentationTask(Task):
    """One foreground class at 1 mm from one image; subclass it for anything else."""

    name: ClassVar[str] = "segmentation"
    monitor: ClassVar[str] = "dice"
    larger_is_better: ClassVar[bool] = True
    code: ClassVar[tuple[str, ...]] = tuple(
        f"p2pfed.tasks.{name}" for name in ("volumes", "scans", "dicom", "cases", "patches")
    )
    hyper: ClassVar[HyperParameters] = HyperParameters(
        local_steps=50, batch_size=4, learning_rate=2e-3, optimizer="adam"
    )

    def plan(self) -> Plan:
        """What hospitals share about the images."""
        return Plan(classes=("foreground",), transform=Transform(spacing=(1.0, 1.0, 1.0)))

    def model(self) -> nn.Module:
        """A 3D U-Net; (N, C, X, Y, Z) to (N, classes + 1, X, Y, Z)."""
        plan = self.plan()
        levels = len(plan.widths)
        if any(n % 2 ** (levels - 1) for n in plan.patch):
            raise ConfigError(f"the patch {plan.patch} is no multiple of {2 ** (levels - 1)}")
        return UNet(
            spatial_dims=3,
            in_channels=plan.channels,
            out_channels=len(plan.classes) + 1,
            channels=plan.widths,
            strides=(2,) * (levels - 1),
            num_res_units=plan.residual_units,
            norm=("INSTANCE", {"affine": True}),
        )

    def data(self, folder: Path | None, options: Options) -> TaskData[Volumes]:
        """Read the hospital's cases; see `Task.data` and the module docstring."""
        plan = self.plan()
        if folder is not None and folder.is_dir():
            cases, made = self._found(folder), False
        else:
            cases, made = self._phantoms(folder, options), True
        # As `predict` counts, before anything is taken apart: people look a case up by its number.
        places = {c.name: f"case {n} of {len(cases)}" for n, c in enumerate(cases, start=1)}
        site, sites = options.get("site"), whole_or_none(options, "sites", low=1, high=_MOST_SITES)
        if (site is None) != (sites is None):
            raise ConfigError("train.options.site and sites belong together", "one is missing")
        if sites is not None:
            cases = of_site(cases, whole(options, "site", low=0, high=sites - 1), sites)
        how = Cut(plan.patch, plan.per_patient, plan.flips)
        train, test = (
            Volumes(self._shelf(part, options, places, made=made), part, how)
            for part in ([c for c in cases if c.test == test] for test in (False, True))
        )
        return TaskData(train, test)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross entropy plus 1 - soft Dice of the classes, per record; shape (N,).

        Args:
            output: Shape (N, classes + 1, X, Y, Z).
            target: Shape (N, X, Y, Z), whole numbers; others than the classes count as nothing.
        """
        logs = output.float().log_softmax(1)
        numbers = torch.arange(logs.shape[1], device=target.device)
        truth = (target[:, None] == numbers.view(1, -1, 1, 1, 1)).to(logs.dtype)
        entropy = -(truth * logs).sum(1).flatten(1).mean(1)
        found, truth = logs[:, 1:].exp(), truth[:, 1:]
        both = (found * truth).flatten(2).sum(2)
        either = (found + truth).flatten(2).sum(2)
        dice = (2 * both + 1) / (either + 1)  # + 1 voxel: a patch without the class is no cliff
        return entropy + 1 - dice.mean(1)

    def infer(self, model: nn.Module, x: Tensor) -> Tensor:
        """Outputs for whole volumes (N, C, X, Y, Z), averaged over windows of the patch's size."""
        return cast(
            "Tensor",
            sliding_window_inference(
                x, self.plan().patch, _WINDOWS, model, overlap=_OVERLAP, mode="gaussian"
            ),
        )

    def metrics(self, model: nn.Module, patients: Volumes) -> dict[str, float]:
        """Mean Dice over whole volumes: `dice_CLASS` each, and `dice`, the mean of those.

        A class that neither the expert nor the model marks in a volume does not count there; one
        that counts nowhere has no figure.
        """
        scores = [self._dice(self.segment(model, v), v) for v in self._each(patients)]
        values: dict[str, float] = {}
        for number, name in enumerate(self.plan().classes):
            known = [score[number] for score in scores if not np.isnan(score[number])]
            if known:
                values[f"dice_{name}"] = float(np.mean(known))
        return {"dice": float(np.mean(list(values.values())))} | values if values else values

    def pictures(self, model: nn.Module, patients: Volumes) -> Sequence[Picture]:
        """The best, the median and the worst case by mean Dice; fewer where there are fewer."""
        found = [(self.segment(model, volume), volume) for volume in self._each(patients)]
        masks = [mask for mask, _ in found]
        scores = [_mean(self._dice(mask, volume)) for mask, volume in found]
        del found  # volumes that are on disk go back there
        shown = []
        for number in dict.fromkeys(chosen(scores).values()):
            name, volume = patients.case(number)
            shown.append(
                Picture(
                    case=name,
                    score=scores[number],
                    image=_grey(volume.image[0]),
                    target=volume.label.cpu().numpy(),
                    predicted=masks[number].numpy(),
                    spacing=volume.spacing,
                )
            )
        return shown

    def _each(self, patients: Volumes) -> Iterator[Prepared]:
        """Every case, one after the other; says how many are done."""
        for number, (_, volume) in enumerate(patients.whole()):
            tell = self.progress  # another thread may take it away
            if tell is not None:
                tell(number, patients.num_cases)
            yield volume

    def segment(self, model: nn.Module, volume: Prepared) -> Tensor:
        """The most likely class of every voxel, (X, Y, Z) uint8 on the CPU."""
        device = next(model.parameters()).device
        with torch.no_grad():
            output = self.infer(model, volume.image[None].to(device, torch.float32))
        return output[0].argmax(0).to("cpu", torch.uint8)

    def predict(self, model: nn.Module, images: Sequence[Path], where: str) -> nib.Nifti1Image:
        """The mask of one new case on the grid of its first image.

        Args:
            model: In evaluation mode.
            images: One NIfTI file, or one folder of a DICOM series, per channel.
            where: The case's place for the text of an error, as "case 3 of 17".

        Raises:
            ConfigError: An image is unreadable, or channels do not belong together.
        """
        plan = self.plan()
        volume = read_volume(images, None, plan.transform, classes=len(plan.classes), where=where)
        device = next(model.parameters()).device
        x = torch.from_numpy(volume.image)[None].to(device)
        with torch.no_grad():
            mask = self.infer(model, x)[0].argmax(0).to("cpu", torch.uint8)
        return restore(mask.numpy(), volume.geometry)

    def predict_all(
        self,
        model: nn.Module,
        source: Path,
        target: Path,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Path]:
        """Write the mask of every case of `source` as NAME.nii.gz into the folder `target`.

        Args:
            model: In evaluation mode.
            source: See `cases.unlabelled_cases`.
            target: Made where it is missing, 0700; files of the same name are replaced.
            progress: Is told how many cases of how many are done.

        Returns:
            The files, in the order of the cases' names.

        Raises:
            ConfigError: There is nothing to predict, an image is unreadable, or `target` cannot be
                written.
        """
        cases = unlabelled_cases(source, channels=self.plan().channels)
        written = []
        for number, (name, images) in enumerate(cases.items()):
            if progress is not None:
                progress(number, len(cases))
            mask = self.predict(model, images, f"case {number + 1} of {len(cases)}")
            written.append(_saved(mask, target, name))
        return written

    def _dice(self, mask: Tensor, volume: Prepared) -> list[float]:
        return dice_of(mask, volume.label.cpu(), len(self.plan().classes))

    def _found(self, folder: Path) -> list[Case]:
        plan = self.plan()
        return find_cases(folder, channels=plan.channels, classes=len(plan.classes))

    def _phantoms(self, folder: Path | None, options: Options) -> list[Case]:
        count = whole_or_none(options, "phantoms", low=4, high=_MOST_PHANTOMS)
        if count is None:
            raise ConfigError(
                "train.data names no folder" if folder is None else f"there is no folder {folder}",
                "it must hold the images and the labels",
                "name it, or set train.options.phantoms = 24 to try with made-up volumes",
            )
        names = [phantom_name(n) for n in range(count)]
        return [
            Case(name, (), None, name.encode(), is_test_phantom(n)) for n, name in enumerate(names)
        ]

    def _shelf(
        self, cases: Sequence[Case], options: Options, places: Mapping[str, str], *, made: bool
    ) -> Shelf:
        mode = options.get("cache", "memory" if made else "auto")
        if mode not in _MODES:
            raise ConfigError(f"train.options.cache is {mode!r}", f"one of {', '.join(_MODES)}")
        own = None if self.own_folder is None else self.own_folder / "volumes"
        place = options.get("cache_folder")
        plan = self.plan()

        def read(number: int) -> Volume:
            case, classes = cases[number], len(plan.classes)
            where = places[case.name]
            if made:
                scans = phantom(phantom_number(case.name), classes=classes, channels=plan.channels)
                return volume_of(*scans, plan.transform, classes=classes, where=where)
            return read_volume(
                case.images, case.label, plan.transform, classes=classes, where=where
            )

        return Shelf(
            cases,
            read,
            transform=plan.transform,
            classes=len(plan.classes),
            mode=cast("CacheMode", mode),
            folder=own if place is None else Path(str(place)),
            progress=self.progress,
            note=self.note,
        )


def _saved(mask: nib.Nifti1Image, folder: Path, name: str) -> Path:
    """Write a mask, whole or not at all."""
    path, partial = folder / f"{name}.nii.gz", folder / f".{name}.partial.nii.gz"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        nib.save(mask, partial)
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}", error.strerror or "") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return path


def dice_of(mask: Tensor, truth: Tensor, classes: int) -> list[float]:
    """Dice of the classes 1..classes of two label volumes; NaN for a class that is in neither.

    Args:
        mask: Any shape, whole numbers.
        truth: The same shape.
        classes: How many, besides the background.
    """
    values = []
    for number in range(1, classes + 1):
        one, other = mask == number, truth == number
        either = int(one.sum()) + int(other.sum())
        values.append(2 * int((one & other).sum()) / either if either else float("nan"))
    return values


def _mean(scores: Sequence[float]) -> float:
    known = [score for score in scores if not np.isnan(score)]
    return float(np.mean(known)) if known else 0.0


def _grey(image: Tensor) -> NDArray[np.uint8]:
    """Grey values 0..255 of a volume, its own darkest to its own brightest."""
    values = image.float().cpu().numpy()
    low, high = float(values.min()), float(values.max())
    return np.asarray((values - low) * (255 / ((high - low) or 1)), dtype=np.uint8)
