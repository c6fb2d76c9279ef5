"""The Task that a hospital's engineer writes: model, data, loss, metrics; no network.

Every hospital installs the same task itself; code never comes from a peer. `task_id` hashes the
task's source file, its hyper-parameters and the shared tensors' names, shapes and types, so
hospitals that would average different things find out before the first round. (Line endings and
comments count.) What stays at home (`private_parameters`) is not hashed: it may differ.

Where it is asked for: `model`, `loss` and `optimizer` in every round, `metrics`, `infer`,
`pictures` and `predict_all` for the hospital's own eyes, `data` once at the start. What a
hospital's data must keep to is in `patients`.

Not here: tasks that come with p2pfed (tasks room), the loop form (`loop`).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from p2pfed.errors import ConfigError
from p2pfed.training.patients import WHOLE, Batch, Part, Patients, Split, TaskData
from p2pfed.training.pictures import Picture
from p2pfed.training.vector import shared_parameters

__all__ = [
    "WHOLE",
    "Batch",
    "HyperParameters",
    "Options",
    "Part",
    "Patients",
    "Picture",
    "Split",
    "Task",
    "TaskData",
    "load_task",
    "task_id",
]

Options = Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True)
class HyperParameters:
    """What every hospital must share about local training; part of the task id.

    Attributes:
        local_steps: Mini-batch steps per round with mechanism `none`.
        batch_size: Records per step.
        learning_rate: Of those steps.
        optimizer: Their optimiser: "sgd", "adam", "adamw" or "momentum" (SGD with Nesterov's
            momentum .9).
        optimizer_state: "fresh" in every round, or "kept" at home from one to the next.
        proximal: FedProx: each step is also drawn to the common model, by this times the distance
            (Li et al. 2020, arXiv:1812.06127, eq. 2).
        patient_steps: 0: a patient contributes the negative gradient of the mean loss; s > 0: the
            change after s full-batch SGD steps on the patient's records alone.
        patient_learning_rate: Of those s steps.
    """

    local_steps: int = 100
    batch_size: int = 16
    learning_rate: float = 0.01
    optimizer: Literal["sgd", "momentum", "adam", "adamw"] = "sgd"
    optimizer_state: Literal["fresh", "kept"] = "fresh"
    proximal: float = 0.0
    patient_steps: int = 0
    patient_learning_rate: float = 0.1


class Task(ABC):
    """Subclass this; see `p2pfed/tasks/breast_cancer.py` for a whole one.

    Attributes:
        name: What people call it.
        hyper: What is the same at every hospital.
        private_parameters: Patterns (as of `fnmatch`) of the names of parameters that stay at home:
            heads for a hospital's own targets, per-hospital normalisation (FedBN, Li et al. 2021,
            arXiv:2102.07623). Their number and shape may differ between hospitals. Buffers always
            stay.
        monitor: Which metric says whether the model got better.
        larger_is_better: In which direction.
        code: Names of further modules whose source is part of the identity: what makes records of
            files, for instance.
        options: `train.options` of the configuration; set before anything else is asked for.
        progress: To be told, where it is set, how many cases of how many are done: while `data`
            reads, and while `metrics` and `pictures` go over them.
        note: To be told, where it is set, what an engineer should know; nothing of a patient.
        own_folder: The trainer's own folder, where files of patients may lie; None: keep none.
    """

    name: ClassVar[str]
    hyper: ClassVar[HyperParameters] = HyperParameters()
    private_parameters: ClassVar[tuple[str, ...]] = ()
    monitor: ClassVar[str] = "loss"
    larger_is_better: ClassVar[bool] = False
    code: ClassVar[tuple[str, ...]] = ()
    options: Options = MappingProxyType({})
    progress: Callable[[int, int], None] | None = None
    note: Callable[[str], None] | None = None
    own_folder: Path | None = None

    @abstractmethod
    def model(self) -> nn.Module:
        """A fresh model; its first values come from torch's generator."""

    @abstractmethod
    def data(self, folder: Path | None, options: Options) -> TaskData[Any]:
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
    def metrics(self, model: nn.Module, patients: Any) -> dict[str, float]:
        """Figures of merit on patients of `data`, for the hospital's own eyes; they stay there."""

    def optimizer(
        self, parameters: Iterable[nn.Parameter], *, learning_rate: float, fused: bool
    ) -> torch.optim.Optimizer:
        """What local training steps with; as `hyper.optimizer` says where it is not overridden.

        Args:
            parameters: Of the model, those that stay at home as well.
            learning_rate: Of this training; comparisons and fine-tuning may use another one.
            fused: Whether the device has fused steps.
        """
        if self.hyper.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=learning_rate, fused=fused)
        if self.hyper.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=learning_rate, fused=fused)
        momentum = 0.9 if self.hyper.optimizer == "momentum" else 0.0
        return torch.optim.SGD(
            parameters, lr=learning_rate, momentum=momentum, nesterov=momentum > 0, fused=fused
        )

    def infer(self, model: nn.Module, x: Tensor) -> Tensor:
        """Outputs for whole inputs (N, ...); an image task goes over them in windows."""
        output: Tensor = model(x)
        return output

    def pictures(self, model: nn.Module, patients: Any) -> Sequence[Picture]:  # noqa: ARG002
        """Its cases for the hospital's own eyes; none where there are no images."""
        return ()

    def predict_all(
        self,
        model: nn.Module,  # noqa: ARG002 - for those who can
        source: Path,  # noqa: ARG002
        target: Path,  # noqa: ARG002
        progress: Callable[[int, int], None] | None = None,  # noqa: ARG002
    ) -> Sequence[Path]:
        """Write what the model says of new cases; `p2pfed predict` calls it.

        Args:
            model: In evaluation mode, on its device.
            source: A file or folder of one or several cases, which need no labels.
            target: Folder for the files.
            progress: Is told, before each case, how many of how many are done.

        Returns:
            The files written.

        Raises:
            ConfigError: The task cannot, or a case is unreadable.
        """
        raise ConfigError(
            f"the task {self.name!r} cannot predict",
            "it does not say how to read a new case and write a result",
            "give its class predict_all(model, source, target, progress)",
        )

    def identity(self) -> bytes:
        """What `task_id` tells; only a task that is not its source files says it otherwise."""
        return _by_code(self)


def task_id(task: Task) -> bytes:
    """What hospitals compare before they average: BLAKE2b-256, 32 bytes.

    Hashed are the source files of the class, of what it inherits from short of `Task` and of the
    modules in `code`, the hyper-parameters, and names, shapes and types of the shared parameters.

    Raises:
        ConfigError: The class has no source file.
    """
    return task.identity()


def _by_code(task: Task) -> bytes:
    code = hashlib.blake2b(digest_size=32)
    parts: list[type | ModuleType] = [*_own_classes(task)]
    parts += [importlib.import_module(name) for name in task.code]
    for source in dict.fromkeys(map(_source, parts)):
        code.update(hashlib.blake2b(source.read_bytes(), digest_size=32).digest())
    shared = shared_parameters(task.model(), task.private_parameters)
    tensors = [[name, list(p.shape), str(p.dtype)] for name, p in shared]
    facts = {"name": task.name, "hyper": asdict(task.hyper), "tensors": tensors}
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
    whole = code.digest() + canonical
    return hashlib.blake2b(whole, digest_size=32, person=b"p2pfed-task").digest()


def _own_classes(task: Task) -> list[type]:
    lineage = type(task).__mro__
    return [c for c in lineage[: lineage.index(Task)] if issubclass(c, Task)]


def _source(part: type | ModuleType) -> Path:
    try:
        return Path(inspect.getfile(part))
    except (OSError, TypeError) as error:
        raise ConfigError(
            f"the task {part.__name__} has no source file",
            "its code is part of its identity",
            "put the class into a module",
        ) from error


def load_task(spec: str, options: Options | None = None) -> Task:
    """The bundled task of this name, or the one that the hospital installed as `module:Class`.

    The bundled tasks are found by name like a hospital's own: this room does not depend on them.

    Args:
        spec: `train.task` of the configuration.
        options: `train.options`.

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
    task = found()
    task.options = options or {}
    return task
