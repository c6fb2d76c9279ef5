"""The patients of one hospital, wherever their records lie: in memory (`Split`) or in files.

Map: `Patients` is what training and the gate ask of them (mini-batches in any order; one stack of
records per patient) -> `Split`, whose tensors are all in memory -> `TaskData`, those who train and
those who only test. Image volumes, which are read, cached and cut into patches, are another
`Patients` (tasks.patches).

Invariant: a patient is in exactly one of train and test, and `stacked` of a patient is a function
of that patient's records, of the seed and of public constants only. So is whatever a task does to a
record: statistics over the hospital's patients (means for normalisation, vocabularies, a split
stratified by label) would let one patient move another one's contribution, and the guarantee of the
privacy room would no longer be exact.

Shapes: N records, P patients, R records of one patient, B records of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from p2pfed.errors import ConfigError

__all__ = ["WHOLE", "Batch", "Part", "Patients", "Split", "TaskData"]

Batch = tuple[Tensor, Tensor]  # inputs (B, ...), targets (B, ...)


@dataclass(frozen=True, slots=True)
class Part:
    """Which share of every batch one of several processes takes: records rank, rank + world, ..."""

    rank: int = 0
    world: int = 1


WHOLE = Part()


class Patients(ABC):
    """See the module docstring."""

    @property
    @abstractmethod
    def num_patients(self) -> int:
        """P."""

    @abstractmethod
    def patient_records(self) -> tuple[bytes, ...]:
        """Stable bytes per patient, by which the ledger recognises a patient it has met; P."""

    @property
    def named_by_files(self) -> bool:
        """Whether the names of `patient_records` are those of files, of some patients at least."""
        return False

    @abstractmethod
    def batches(self, batch_size: int, *, seed: int, part: Part = WHOLE) -> Iterator[Batch]:
        """Yield mini-batches without end, from every patient equally often.

        Args:
            batch_size: Records per batch of all processes together; fewer at the end of an epoch.
            seed: The same seed gives the same batches.
            part: Which records of every batch this process gets; there may be none.
        """

    @abstractmethod
    def alike(self) -> Sequence[Sequence[int]]:
        """All patients' numbers 0..P-1, in groups whose stacks have one shape."""

    @abstractmethod
    def stacked(self, patients: Sequence[int], *, seed: int) -> Batch:
        """The records of some patients of one group, shapes (len(patients), R, ...).

        Args:
            patients: Numbers from one of the groups of `alike`.
            seed: Fixes what is drawn (patches, augmentation), for each patient on its own; public.
        """

    @abstractmethod
    def grouped(self, size: int) -> Patients:
        """The same records with `size` patients in a row as one; the last group may have fewer."""

    @abstractmethod
    def subset(self, patients: Sequence[int]) -> Patients:
        """Some of the patients alone, e.g. to hold a fifth of them out.

        Args:
            patients: Their numbers, ascending, at least one.
        """

    def on(self, device: torch.device) -> Self:  # noqa: ARG002 - for those who can
        """The same patients with their records on `device`, where they are kept in memory."""
        return self


@dataclass(frozen=True, eq=False)
class Split(Patients):
    """Records of some patients, all in memory.

    Attributes:
        x: Inputs, shape (N, ...).
        y: Targets, shape (N, ...).
        patient: Patient of each record, shape (N,), int64, values 0..P-1, each in use.
        patient_ids: P distinct names for the ledger that stay the same when the data are edited or
            processed anew (the hospital's own record number, spelled alike in all of its tasks), or
            () where there are none. They stay in the trainer. The ledger knows a patient by this
            name only: another name, or without names other values, is a new patient to it, with a
            new budget.
    """

    x: Tensor
    y: Tensor
    patient: Tensor
    patient_ids: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        count = self.x.shape[0]
        if self.y.shape[0] != count or tuple(self.patient.shape) != (count,) or count == 0:
            raise ConfigError(
                "x, y and patient differ in their number of records, or there is none",
                "every record needs one target and one patient",
            )
        for name, values in (("x", self.x), ("y", self.y)):
            if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                raise ConfigError(
                    f"the data holds NaN or infinity, in {name}",
                    "training on it would only spoil the model",
                    "drop or impute it in the task's data()",
                )
        used = torch.unique(self.patient)
        if self.patient.dtype != torch.int64 or not torch.equal(used, torch.arange(len(used))):
            raise ConfigError("patient must number the patients 0..P-1 without a gap, as int64")
        if self.patient_ids and len(set(self.patient_ids)) != len(used):
            raise ConfigError("patient_ids must hold one distinct name per patient")

    @property
    def num_patients(self) -> int:
        """P, the number of patients."""
        return int(self.patient.max()) + 1

    @cached_property
    def records_of(self) -> tuple[Tensor, ...]:
        """Per patient the indices of the records, ascending; P tensors of int64."""
        order = torch.argsort(self.patient, stable=True)
        counts = torch.bincount(self.patient, minlength=self.num_patients)
        return tuple(torch.split(order, counts.tolist()))

    def patient_records(self) -> tuple[bytes, ...]:
        """`patient_ids` where given, else the patient's tensors, whatever the records' order."""
        if self.patient_ids:
            return self.patient_ids

        def of(index: int) -> bytes:
            record = (self.x[index], self.y[index])
            return b"".join(t.contiguous().cpu().numpy().tobytes() for t in record)

        return tuple(b"".join(sorted(map(of, rows.tolist()))) for rows in self.records_of)

    def batches(self, batch_size: int, *, seed: int, part: Part = WHOLE) -> Iterator[Batch]:
        """Records are reshuffled when all were seen."""
        chance = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.x), generator=chance)
            for rows in torch.split(order, batch_size):
                mine = rows[part.rank :: part.world]
                yield self.x[mine.to(self.x.device)], self.y[mine.to(self.y.device)]

    def alike(self) -> list[list[int]]:
        """Patients with the same number of records."""
        groups: defaultdict[int, list[int]] = defaultdict(list)
        for patient, records in enumerate(self.records_of):
            groups[len(records)].append(patient)
        return [patients for _, patients in sorted(groups.items())]

    def stacked(self, patients: Sequence[int], *, seed: int) -> Batch:  # noqa: ARG002 - all of them
        """Every record of these patients."""
        rows = torch.stack([self.records_of[p] for p in patients])
        return self.x[rows.to(self.x.device)], self.y[rows.to(self.y.device)]

    def grouped(self, size: int) -> Split:
        """A patient is in one group only, and which one follows from its number alone."""
        return Split(self.x, self.y, torch.div(self.patient, size, rounding_mode="floor"))

    def subset(self, patients: Sequence[int]) -> Split:
        """Their records in the order in which they lie."""
        chosen = torch.isin(self.patient, torch.tensor(patients))
        _, renumbered = torch.unique(self.patient[chosen], return_inverse=True)
        ids = tuple(self.patient_ids[p] for p in patients) if self.patient_ids else ()
        rows = torch.nonzero(chosen).squeeze(1)
        x, y = self.x[rows.to(self.x.device)], self.y[rows.to(self.y.device)]
        return Split(x, y, renumbered, ids)

    def on(self, device: torch.device) -> Split:
        """The same records with x and y on `device`."""
        return Split(self.x.to(device), self.y.to(device), self.patient, self.patient_ids)


PatientsT = TypeVar("PatientsT", bound=Patients)


@dataclass(frozen=True, slots=True)
class TaskData(Generic[PatientsT]):
    """A hospital's patients: those who train and those who only test."""

    train: PatientsT
    test: PatientsT
