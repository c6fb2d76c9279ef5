"""The Task that a hospital's engineer writes: model, data, loss, metrics; no network.

Every hospital installs the same task itself; code never comes from a peer. `task_id` hashes the
task's source file, its hyper-parameters and the tensors' names, shapes and types, so hospitals that
would average different things find out before the first round. (Line endings and comments count.)

Invariant: record i belongs to patient `patient[i]`, and a patient is in exactly one of train and
test. What a task does to one patient's records must depend on that patient and on public constants
only: statistics over the hospital's patients (means for normalisation, vocabularies, a split
stratified by label) would let one patient move another one's contribution, and the guarantee of the
privacy room would no longer be exact.

Shapes: N records, P patients.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from p2pfed.errors import ConfigError

__all__ = ["HyperParameters", "Options", "Split", "Task", "TaskData", "load_task", "task_id"]

Options = Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True)
class HyperParameters:
    """What every hospital must share about local training; part of the task id.

    Attributes:
        local_steps: Mini-batch steps per round with mechanism `none`.
        batch_size: Records per step.
        learning_rate: Of those steps.
        optimizer: Their optimiser, with fresh state every round.
        patient_steps: 0: a patient contributes the negative gradient of the mean loss; s > 0: the
            change after s full-batch SGD steps on the patient's records alone.
        patient_learning_rate: Of those s steps.
    """

    local_steps: int = 100
    batch_size: int = 16
    learning_rate: float = 0.01
    optimizer: Literal["sgd", "adam"] = "sgd"
    patient_steps: int = 0
    patient_learning_rate: float = 0.1


@dataclass(frozen=True, eq=False)
class Split:
    """Records of some patients.

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

    def grouped(self, size: int) -> Split:
        """The same records with `size` patients in a row as one; the last group may have fewer.

        A patient is in one group only, and which one follows from its number alone.
        """
        return Split(self.x, self.y, torch.div(self.patient, size, rounding_mode="floor"))

    def patient_records(self) -> tuple[bytes, ...]:
        """Stable bytes per patient, by which the ledger recognises a patient it has met.

        `patient_ids` where given, else the patient's tensors, whatever the order of the records.
        """
        if self.patient_ids:
            return self.patient_ids

        def of(index: int) -> bytes:
            record = (self.x[index], self.y[index])
            return b"".join(t.contiguous().cpu().numpy().tobytes() for t in record)

        return tuple(b"".join(sorted(map(of, rows.tolist()))) for rows in self.records_of)

    def to(self, device: torch.device) -> Split:
        """The same records with x and y on `device`."""
        return Split(self.x.to(device), self.y.to(device), self.patient, self.patient_ids)


@dataclass(frozen=True, slots=True)
class TaskData:
    """A hospital's patients: those who train and those who only test."""

    train: Split
    test: Split


class Task(ABC):
    """Subclass this; see `p2pfed/tasks/breast_cancer.py` for a whole one."""

    name: ClassVar[str]
    hyper: ClassVar[HyperParameters] = HyperParameters()

    @abstractmethod
    def model(self) -> nn.Module:
        """A fresh model; its first values come from torch's generator."""

    @abstractmethod
    def data(self, folder: Path | None, options: Options) -> TaskData:
        """This hospital's patients.

        Args:
            folder: `train.data` of the configuration; None where it names none.
            options: `train.options` of the configuration.

        Raises:
            ConfigError: The folder or an option is missing or wrong. Its text is shown to the
                operator by the network process: name the place of a mistake, never a value.
        """

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of every record, shape (N,), from the model's outputs (N, ...).

        It must not raise for any values, NaN and infinity included: peers see a round that fails,
        and nobody pays for what that tells them of a patient.
        """

    @abstractmethod
    def metrics(self, model: nn.Module, split: Split) -> dict[str, float]:
        """Figures of merit for the hospital's own eyes; they never leave it."""


def task_id(task: Task) -> bytes:
    """What hospitals compare before they average: BLAKE2b-256, 32 bytes.

    Hashed are the source files of the class and of what it inherits from short of `Task`, the
    hyper-parameters, and names, shapes and types of the state dict.

    Raises:
        ConfigError: The class has no source file.
    """
    code = hashlib.blake2b(digest_size=32)
    for source in dict.fromkeys(map(_source, _own_classes(task))):
        code.update(hashlib.blake2b(source.read_bytes(), digest_size=32).digest())
    tensors = [[name, list(t.shape), str(t.dtype)] for name, t in task.model().state_dict().items()]
    facts = {"name": task.name, "hyper": asdict(task.hyper), "tensors": tensors}
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
    whole = code.digest() + canonical
    return hashlib.blake2b(whole, digest_size=32, person=b"p2pfed-task").digest()


def _own_classes(task: Task) -> list[type]:
    lineage = type(task).__mro__
    return [c for c in lineage[: lineage.index(Task)] if issubclass(c, Task)]


def _source(cls: type) -> Path:
    try:
        return Path(inspect.getfile(cls))
    except (OSError, TypeError) as error:
        raise ConfigError(
            f"the task {cls.__name__} has no source file",
            "its code is part of its identity",
            "put the class into a module",
        ) from error


def load_task(spec: str) -> Task:
    """The bundled task of this name, or the one that the hospital installed as `module:Class`.

    The bundled tasks are found by name like a hospital's own: this room does not depend on them.

    Raises:
        ConfigError: No such task, module or class, or it is not a Task.
    """
    if ":" not in spec:
        bundled: Mapping[str, str] = importlib.import_module("p2pfed.tasks").BUNDLED
        if spec not in bundled:
            raise ConfigError(
                f"no task {spec!r}",
                f"bundled are {', '.join(bundled)}",
                "name a task of your own as module:Class",
            )
        spec = bundled[spec]
    module_name, _, class_name = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"no task {spec!r}", str(error), "install the module, or correct train.task"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(f"{spec!r} is not a p2pfed.training.task.Task")
    return found()
