"""Volumes that are read and transformed once: kept in memory while they fit, else on disk.

Map: `Prepared` (a volume ready to be cut into patches) -> `Shelf` (all of a hospital's, by number).

Invariant: a shelf gives the same tensors whether they come from memory, from disk or from the
patient's files. A file on disk is named by a hash of where the case's files lie, their sizes and
times of change, the transform and its version; it carries a hash of its content, and one that is
damaged is made anew. It appears whole or not at all (rename). The folder is 0700 and may be deleted
at any time: it holds patients, and nothing that cannot be made again. Without a folder nothing is
written: patients lie where the hospital knows of it, or nowhere.

The disk only saves time. In mode auto a disk that is full or cannot be written is noted, and the
volumes that do not fit into memory are read from the patient's files at every access.

Images are kept as float16: half the memory, and with grey values scaled to some units the rounding
is below a two-hundredth of the deviation. They are float32 again when they are cut.

Not here: what is done to a volume (`volumes`), cutting patches (`patches`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, overload

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from p2pfed.errors import ConfigError
from p2pfed.tasks.cases import Case
from p2pfed.tasks.dicom import series_files
from p2pfed.tasks.volumes import VERSION, Transform, Triple, Volume
from p2pfed.training.limits import free_memory

__all__ = ["CacheMode", "Prepared", "Shelf", "prepared"]

logger = logging.getLogger(__name__)

CacheMode = Literal["auto", "memory", "disk", "off"]
_MOST_MARKED = 20_000  # voxels of one class that patches are centred on; more tell nothing new
_UNKNOWN = 1 << 32  # bytes taken for free where the system does not say
_SHARE = 2  # of the free memory one of so many parts


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A volume with its label, ready to be cut.

    Attributes:
        image: Shape (C, X, Y, Z), float16.
        label: Shape (X, Y, Z), uint8.
        marked: Numbers of voxels (C order) of the classes 1, 2, … one class after the other; shape
            (M,), int64, on the CPU.
        counts: How many of them are of each class.
        spacing: Millimetres per voxel.
    """

    image: Tensor
    label: Tensor
    marked: Tensor
    counts: tuple[int, ...]
    spacing: Triple

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(t.nbytes for t in (self.image, self.label, self.marked))

    def on(self, device: torch.device) -> Prepared:
        """The same with image and label on a device."""
        return replace(self, image=self.image.to(device), label=self.label.to(device))


def prepared(volume: Volume, *, classes: int) -> Prepared:
    """A volume with a label, ready to be cut.

    Args:
        volume: With a label.
        classes: Number of classes besides the background.
    """
    assert volume.label is not None
    flat, marked = volume.label.reshape(-1), []
    for number in range(1, classes + 1):
        voxels = np.flatnonzero(flat == number)
        every = -(-voxels.size // _MOST_MARKED) or 1
        marked.append(voxels[::every])
    return Prepared(
        image=torch.from_numpy(volume.image).half(),
        label=torch.from_numpy(volume.label),
        marked=torch.from_numpy(np.concatenate(marked).astype(np.int64)),
        counts=tuple(int(v.size) for v in marked),
        spacing=volume.geometry.spacing,
    )


class Shelf(Sequence[Prepared]):
    """The volumes of some cases, by their number.

    Every case is read once when the shelf is made, so that what is wrong with one is told at the
    start.

    Args:
        cases: In order.
        read: Reads and transforms one case, given its number.
        transform: What `read` does; part of the name on disk.
        classes: Number of classes besides the background.
        mode: "auto" keeps volumes in memory up to half of what is free, the others on disk;
            "memory" and "disk" do one alone; "off" reads the patient's files at every access.
        folder: For those on disk; made (0700) when the first one is written. None: nothing is
            written, and what would lie there is read from the patient's files at every access.
        progress: Is told how many cases of how many are ready.
        note: Is told, once, that the disk is not used though it was wanted; by default the log.

    Raises:
        ConfigError: A case is refused. In mode "disk" also: the folder can be read by others, or
            cannot be written.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        read: Callable[[int], Volume],
        *,
        transform: Transform,
        classes: int,
        mode: CacheMode = "auto",
        folder: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self._cases, self._read, self._classes = cases, read, classes
        self._note = note or logger.warning
        self._uses_disk = mode in ("auto", "disk")
        self._transform, self._mode, self._folder = transform, mode, folder
        self._kept: dict[int, Prepared] = {}
        self._paths: dict[int, Path] = {}  # on disk; found out once, files are asked for it
        self._sound: set[Path] = set()  # files whose hash was compared
        processes = int(os.environ.get("WORLD_SIZE") or 1)  # of one trainer; each keeps its own
        free = free_memory()
        room = (_UNKNOWN if free is None else free) // (_SHARE * processes) if mode == "auto" else 0
        for number in range(len(cases)):
            if progress is not None:
                progress(number, len(cases))
            volume = self._from_disk(number) if mode == "disk" else self._made(number)
            room -= volume.nbytes
            if mode == "memory" or (mode == "auto" and room >= 0):
                self._kept[number] = volume
            elif mode == "auto":
                self._keep(number, volume)

    def __len__(self) -> int:
        return len(self._cases)

    @overload
    def __getitem__(self, index: int) -> Prepared: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prepared]: ...
    def __getitem__(self, index: int | slice) -> Prepared | Sequence[Prepared]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError
        if index in self._kept:
            return self._kept[index]
        return self._from_disk(index)

    @property
    def is_in_memory(self) -> bool:
        """Whether every volume is."""
        return len(self._kept) == len(self)

    def _made(self, number: int) -> Prepared:
        return prepared(self._read(number), classes=self._classes)

    def _from_disk(self, number: int) -> Prepared:
        if self._folder is not None and self._mode != "off":
            # Also where writing failed: what lies there already is as good as before.
            with contextlib.suppress(OSError, SafetensorError, ValueError, KeyError, TypeError):
                return self._load(self._path(self._folder, number))
        volume = self._made(number)
        self._keep(number, volume)
        return volume

    def _path(self, folder: Path, number: int) -> Path:
        if number not in self._paths:
            self._paths[number] = folder / self._name(number)
        return self._paths[number]

    def _keep(self, number: int, volume: Prepared) -> None:
        """Write a volume to the disk, if that is used."""
        if not self._uses_disk:
            return
        if self._folder is None:
            self._go_on_without("no folder is known that is the trainer's own")
            return
        try:
            self._write(volume, self._path(self._folder, number))
        except ConfigError as error:
            if self._mode != "auto":
                raise
            self._go_on_without(error.why)

    def _go_on_without(self, why: str) -> None:
        self._uses_disk = False
        self._note(f"no volumes are kept on disk, they are read anew each time: {why}")

    def _name(self, number: int) -> str:
        case = self._cases[number]
        facts = [VERSION, asdict(self._transform), self._classes, case.name]
        for path in (*case.images, *(() if case.label is None else (case.label,))):
            files = series_files(path) if path.is_dir() else [path]
            facts += [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
        digest = hashlib.blake2b(
            json.dumps(facts).encode(), digest_size=16, person=b"p2pfed-volume"
        )
        return f"{digest.hexdigest()}.safetensors"

    def _load(self, path: Path) -> Prepared:
        # The tensors are mapped: what no patch touches is not read.
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            x, y, z = facts["spacing"]
            volume = Prepared(
                image=file.get_tensor("image"),
                label=file.get_tensor("label"),
                marked=file.get_tensor("marked"),
                counts=tuple(facts["counts"]),
                spacing=(x, y, z),
            )
        if path not in self._sound:
            if _digest(volume) != facts["digest"]:
                raise ValueError
            self._sound.add(path)
        return volume

    def _write(self, volume: Prepared, path: Path) -> None:
        try:
            for folder in (*reversed(path.parent.parents), path.parent):
                if not folder.exists():  # mkdir(parents=True) would let others into those between
                    folder.mkdir(mode=0o700, exist_ok=True)
            _check_private(path.parent)
            self._save(volume, path)
        except (OSError, SafetensorError) as error:  # of safetensors: a disk that is full
            why = error.strerror if isinstance(error, OSError) else "the disk may be full"
            raise ConfigError(
                f"the cache {path.parent} cannot be written",
                why or type(error).__name__,
                'make room, or set train.options.cache = "auto", which goes on without',
            ) from error

    def _save(self, volume: Prepared, path: Path) -> None:
        tensors = {"image": volume.image, "label": volume.label, "marked": volume.marked}
        facts = {"counts": volume.counts, "spacing": volume.spacing, "digest": _digest(volume)}
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")  # 0600
        os.close(handle)
        try:
            save_file(tensors, partial, {"facts": json.dumps(facts)})
            Path(partial).replace(path)
        finally:
            Path(partial).unlink(missing_ok=True)
        self._sound.add(path)


def _check_private(folder: Path) -> None:
    facts = folder.stat()
    if facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o077:
        raise ConfigError(
            f"the cache {folder} can be read by others",
            "others can read the folder, and it would hold patients",
            f"chmod 700 {folder}, or name another train.options.cache_folder",
        )


def _digest(volume: Prepared) -> str:
    parts: Iterable[Tensor] = (volume.image, volume.label, volume.marked)
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(np.ascontiguousarray(part.numpy()).view(np.uint8).reshape(-1).data)
    return whole.hexdigest()
