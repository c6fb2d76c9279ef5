"""Patients whose records are patches, cut out of their volumes where chance says.

Map: `Cut` (how patches are drawn; public constants) -> `Volumes` (the `Patients` of an imaging
task): `batches` for mini-batch steps, `stacked` for one contribution per patient, `whole` for
metrics.

Invariant: a patch is a function of its patient's volumes, of the patient's name, the seed and the
number of the draw; of no other patient. All patches have one shape, so that all patients are alike:
a smaller volume is padded with zeros on both sides.

Half of the patches are centred on a voxel of a class, the classes equally often, so that a small
structure is seen as often as a large one; the other half lie anywhere (Isensee et al. 2021,
doi:10.1038/s41592-020-01008-z). Batches are cut ahead in a thread; each is a function of its place
in the order, so that the thread changes nothing but the waiting.

Not here: reading and keeping volumes (`volumes`, `cache`).
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from random import Random
from typing import Self

import torch
from torch import Tensor

from p2pfed.errors import ConfigError
from p2pfed.tasks.cache import Prepared, Shelf
from p2pfed.tasks.cases import Case
from p2pfed.training.patients import WHOLE, Batch, Part, Patients

__all__ = ["Cut", "Volumes", "cut"]

_AHEAD = 2  # batches


@dataclass(frozen=True, slots=True)
class Cut:
    """How patches are drawn.

    Attributes:
        size: Voxels along X, Y and Z.
        per_patient: Patches of a patient that make up one contribution.
        flips: Axes (0, 1, 2) along which half of the patches are turned over.
    """

    size: tuple[int, int, int]
    per_patient: int = 2
    flips: tuple[int, ...] = ()


class Volumes(Patients):
    """Patients with volumes; a record is a patch, x (C, *size) float32 and y (*size) uint8.

    A patient with several cases gives a patch of each in turn.

    Args:
        shelf: Volumes.
        cases: Name and patient of each; at least one.
        how: How patches are drawn.
        places: Where on the shelf the volume of each case is; None for their order.

    Raises:
        ConfigError: There is no case.
    """

    def __init__(
        self,
        shelf: Sequence[Prepared],
        cases: Sequence[Case],
        how: Cut,
        *,
        places: Sequence[int] | None = None,
    ) -> None:
        if not cases:
            raise ConfigError(
                "no patient with images is in one of the two parts, train and test",
                "who tests follows from a hash of the name: with few patients it may be nobody",
                "add patients, or name the parts in patients.csv (case,patient,part)",
            )
        self._shelf, self._cases, self._how = shelf, cases, how
        self._places = range(len(cases)) if places is None else places
        numbers: dict[bytes, list[int]] = {}
        for number, case in enumerate(cases):
            numbers.setdefault(case.patient, []).append(number)
        self._ids = tuple(numbers)
        self._of = tuple(tuple(each) for each in numbers.values())

    @property
    def num_patients(self) -> int:
        """P, the number of patients; one may have several cases."""
        return len(self._ids)

    @property
    def num_cases(self) -> int:
        """How many volumes there are."""
        return len(self._cases)

    def patient_records(self) -> tuple[bytes, ...]:
        """The patients' names: with the same name a new version of an image is no new patient."""
        return self._ids

    @property
    def named_by_files(self) -> bool:
        """Whether of some of them nothing but the files' name says who they are."""
        return any(case.by_file for case in self._cases)

    def case(self, number: int) -> tuple[str, Prepared]:
        """Name and volume of a case, 0..num_cases-1."""
        return self._cases[number].name, self._shelf[self._places[number]]

    def whole(self) -> Iterator[tuple[str, Prepared]]:
        """Every case, one after the other."""
        return map(self.case, range(self.num_cases))

    def batches(self, batch_size: int, *, seed: int, part: Part = WHOLE) -> Iterator[Batch]:
        """One patch of each patient per epoch, the patients reshuffled; cut ahead of time."""
        order = self._order(batch_size, seed=seed, part=part)
        with _Ahead() as pool:
            waiting: deque[Future[Batch]] = deque()
            while True:
                while len(waiting) <= _AHEAD:
                    epoch, mine = next(order)
                    waiting.append(pool.submit(self._batch, mine, seed, epoch))
                yield waiting.popleft().result()

    def alike(self) -> list[list[int]]:
        """One group: all patches have one shape."""
        return [list(range(self.num_patients))]

    def stacked(self, patients: Sequence[int], *, seed: int) -> Batch:
        """`per_patient` patches of each, x (n, R, C, X, Y, Z) and y (n, R, X, Y, Z)."""
        draws = range(self._how.per_patient)
        stacks = [[self._record(p, seed, k) for k in draws] for p in patients]
        x = torch.stack([torch.stack([image for image, _ in each]) for each in stacks])
        y = torch.stack([torch.stack([label for _, label in each]) for each in stacks])
        return x, y

    def grouped(self, size: int) -> Volumes:
        """Groups of `size` patients in a row; each gives `size` times as many patches."""
        names: dict[bytes, bytes] = {}
        for start in range(0, self.num_patients, size):
            members = self._ids[start : start + size]
            whole = b"".join(len(m).to_bytes(4, "big") + m for m in members)
            names |= dict.fromkeys(members, whole)
        cases = [replace(case, patient=names[case.patient]) for case in self._cases]
        how = replace(self._how, per_patient=size * self._how.per_patient)
        return Volumes(self._shelf, cases, how, places=self._places)

    def subset(self, patients: Sequence[int]) -> Volumes:
        """Their volumes; what is kept in memory is not kept twice."""
        numbers = sorted(number for p in patients for number in self._of[p])
        return Volumes(
            self._shelf,
            [self._cases[number] for number in numbers],
            self._how,
            places=[self._places[number] for number in numbers],
        )

    def on(self, device: torch.device) -> Self:
        """The same patients, their volumes on `device` where they are in memory and fit there."""
        if device.type == "cpu" or not (
            isinstance(self._shelf, Shelf) and self._shelf.is_in_memory
        ):
            return self
        volumes = [volume for _, volume in self.whole()]
        needed = sum(volume.nbytes for volume in volumes)
        if device.type == "cuda" and 4 * needed > torch.cuda.mem_get_info(device)[0]:
            return self
        there = [volume.on(device) for volume in volumes]
        return type(self)(there, self._cases, self._how)

    def _order(self, batch_size: int, *, seed: int, part: Part) -> Iterator[tuple[int, list[int]]]:
        """Epoch and patients of each batch, without end."""
        chance, epoch = torch.Generator().manual_seed(seed), 0
        while True:
            order = torch.randperm(self.num_patients, generator=chance)
            for rows in torch.split(order, batch_size):
                yield epoch, rows[part.rank :: part.world].tolist()
            epoch += 1

    def _batch(self, patients: Sequence[int], seed: int, epoch: int) -> Batch:
        if not patients:
            x, y = self._record(0, seed, epoch)
            return x.new_empty((0, *x.shape)), y.new_empty((0, *y.shape))
        records = [self._record(p, seed, epoch) for p in patients]
        return torch.stack([x for x, _ in records]), torch.stack([y for _, y in records])

    def _record(self, patient: int, seed: int, draw: int) -> Batch:
        """The patch of a patient that belongs to this seed and draw."""
        cases = self._of[patient]
        key = f"{seed}/{draw}/".encode() + self._ids[patient]
        digest = hashlib.blake2b(key, digest_size=16, person=b"p2pfed-patch").digest()
        chance = Random(int.from_bytes(digest, "big"))  # noqa: S311 - public, fixed by the seed
        _, volume = self.case(cases[draw % len(cases)])
        return cut(volume, self._how, chance)


def cut(volume: Prepared, how: Cut, chance: Random) -> tuple[Tensor, Tensor]:
    """One patch.

    Args:
        volume: Out of which.
        how: Size and flips.
        chance: Says where.

    Returns:
        x, shape (C, *size), float32, and y, shape (*size), uint8.
    """
    shape = volume.label.shape
    start = _start(volume, how, chance)
    takes, puts = [], []
    for first, length, size in zip(start, shape, how.size, strict=True):
        low, high = max(first, 0), min(first + size, length)
        takes.append(slice(low, high))
        puts.append(slice(low - first, high - first))
    x = volume.image.new_zeros((volume.image.shape[0], *how.size), dtype=torch.float32)
    y = volume.label.new_zeros(how.size)
    x[(slice(None), *puts)] = volume.image[(slice(None), *takes)]
    y[tuple(puts)] = volume.label[tuple(takes)]
    turned = [axis for axis in how.flips if chance.random() < 0.5]
    if turned:
        return x.flip([axis + 1 for axis in turned]), y.flip(turned)
    return x, y


def _start(volume: Prepared, how: Cut, chance: Random) -> list[int]:
    """The patch's first voxel along each axis; below 0 where the volume is smaller."""
    shape = volume.label.shape
    centre: tuple[int, ...] = ()
    there = [number for number, count in enumerate(volume.counts) if count]
    if chance.random() < 0.5 and there:
        number = chance.choice(there)
        row = sum(volume.counts[:number]) + chance.randrange(volume.counts[number])
        voxel = int(volume.marked[row])
        centre = (voxel // (shape[1] * shape[2]), voxel // shape[2] % shape[1], voxel % shape[2])
    start = []
    for axis, (length, size) in enumerate(zip(shape, how.size, strict=True)):
        if length <= size:
            start.append(-((size - length) // 2))
        elif centre:
            start.append(min(max(centre[axis] - size // 2, 0), length - size))
        else:
            start.append(chance.randint(0, length - size))
    return start


class _Ahead(ThreadPoolExecutor):
    """One thread that is left alone when nobody wants its batches any more."""

    def __init__(self) -> None:
        super().__init__(1, thread_name_prefix="patches")

    def __exit__(self, *_: object) -> None:
        self.shutdown(wait=False, cancel_futures=True)
