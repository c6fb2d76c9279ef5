"""A model as a file: the common vector as the daemon gives it, or tensors by their name.

Map: `read_model` (a file -> `HeldModel`: shared vector, what stays at home, provenance) ->
`named_tensors` (what `load_state_dict` takes) -> `write_tensors`; `tuned_path` and `newest_tuned`
say where a fine-tuned model is kept.

Invariant: a model of another task is refused by name before a tensor of it is read, one of another
size by its size, and one with NaN or infinity at all. Files are safetensors: reading runs no code;
pickled checkpoints are never opened.

Not here: what is told of a model (`card`), the files that pass between daemon and trainer in every
round (`handover`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from p2pfed.errors import ConfigError
from p2pfed.training.home import NOTHING, Home, taken
from p2pfed.training.local import ready_model
from p2pfed.training.private_file import write_privately
from p2pfed.training.provenance import Provenance
from p2pfed.training.task import Task, task_id
from p2pfed.training.vector import Vector, get_vector, num_parameters, shared_parameters

__all__ = [
    "HeldModel",
    "named_tensors",
    "newest_tuned",
    "read_model",
    "tuned_path",
    "write_tensors",
]

_KEY = "p2pfed"  # in the file's metadata
_SAFE = "models are safetensors files; pickled checkpoints are never opened"
_INSTALL = "install the task that the model was made with"


@dataclass(frozen=True, slots=True, eq=False)
class HeldModel:
    """A model of the installed task.

    Attributes:
        vector: The shared parameters, shape (P,), float32.
        home: Private parameters and buffers, as far as the file has them.
        origin: Where it comes from.
    """

    vector: Vector
    home: Home
    origin: Provenance


def read_model(path: Path, task: Task) -> HeldModel:
    """Read a file of `p2pfed model fetch`, `export` or `tune`.

    Args:
        path: The file.
        task: The installed task.

    Raises:
        ConfigError: It cannot be read, is of another task or size, or holds NaN or infinity.
    """
    if not path.is_file():  # a pipe or device would be waited for
        raise ConfigError(f"there is no model file {path}", "", "p2pfed model fetch -o FILE")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            origin = Provenance.parse((file.metadata() or {}).get(_KEY), name=path.name)
            _check_task(origin, task, path.name)
            if origin.kind == "common":
                return HeldModel(_flat(file, task, path.name), NOTHING, origin)
            vector, home = _named(file, task, path.name)
            return HeldModel(vector, home, origin)
    except OSError as error:
        reason = error.strerror or "it cannot be opened"
        raise ConfigError(f"cannot read the model {path}", reason, "name another file") from error
    except SafetensorError as error:
        raise ConfigError(
            f"{path} is not a model", f"{_SAFE} ({error})", "p2pfed model fetch -o FILE makes one"
        ) from error


def named_tensors(task: Task, held: HeldModel, *, mine: bool) -> dict[str, Tensor]:
    """The model's state dict: copies on the CPU.

    Args:
        task: The installed task.
        held: The model.
        mine: Whether what stays at home, private parameters and buffers, is in it.
    """
    model = ready_model(task, held.vector, home=held.home)
    state = model.state_dict(keep_vars=True)  # the parameters themselves: tied ones are one
    shared = {id(parameter) for _, parameter in shared_parameters(model, task.private_parameters)}
    return {
        name: value.detach().clone().contiguous()
        for name, value in state.items()
        if isinstance(value, Tensor) and (mine or id(value) in shared)
    }


def write_tensors(path: Path, tensors: Mapping[str, Tensor], origin: Provenance) -> None:
    """Write a file, 0600, whole or not at all.

    Raises:
        ConfigError: It cannot be written.
    """
    data = safetensors.torch.save(dict(tensors), metadata={_KEY: origin.as_json()})
    try:
        write_privately(path, data)
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}", error.strerror or "", "make room there, or name another place"
        ) from error


def tuned_path(state: Path, run_id: str) -> Path:
    """Where the model that was tuned in a run is kept, in the trainer's own folder."""
    return state / f"tuned-{run_id[:32]}.safetensors"


def newest_tuned(state: Path) -> Path:
    """The model that was tuned last, of whatever run.

    Raises:
        ConfigError: None was.
    """
    found = sorted(state.glob("tuned-*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise ConfigError("there is no tuned model here", f"in {state}", "run: p2pfed model tune")
    return found[-1]


def _check_task(origin: Provenance, task: Task, name: str) -> None:
    installed = task_id(task).hex()
    if origin.task_id != installed:
        raise ConfigError(
            f"{name} is a model of the task {origin.task!r}, id {origin.task_id[:16]}…",
            f"installed here is {task.name!r}, id {installed[:16]}…: code or constants differ",
            f"{_INSTALL}, or name its configuration with -c",
        )


def _flat(file: Any, task: Task, name: str) -> Vector:
    if set(file.keys()) != {"model"}:
        raise ConfigError(f"{name} must hold one tensor named 'model'", "its metadata say so")
    part = file.get_slice("model")
    length = num_parameters(task.model(), task.private_parameters)
    if part.get_shape() != [length] or part.get_dtype() != "F32":
        raise ConfigError(
            f"{name} holds values of shape {part.get_shape()} and type {part.get_dtype()}",
            f"the installed task {task.name!r} has [{length}] F32",
            _INSTALL,
        )
    vector = np.ascontiguousarray(file.get_tensor("model").numpy(), dtype=np.float32)
    return _finite(vector, name)


def _named(file: Any, task: Task, name: str) -> tuple[Vector, Home]:
    model = task.model()
    state = model.state_dict()
    shared = {n for n, _ in shared_parameters(model, task.private_parameters)}
    names = set(file.keys())
    if odd := sorted(names - state.keys()) or sorted(shared - names):
        raise ConfigError(
            f"{name} does not fit the installed task {task.name!r}",
            f"one of them has no tensor {odd[0]}",
            _INSTALL,
        )
    for key in names:
        shape = file.get_slice(key).get_shape()
        if shape != list(state[key].shape):
            raise ConfigError(
                f"{name} has the tensor {key} of shape {shape}",
                f"the installed task {task.name!r} has {list(state[key].shape)}",
                _INSTALL,
            )
    with torch.no_grad():
        for key in names:
            state[key].copy_(file.get_tensor(key))
    own = taken(model, task.private_parameters).model
    home = Home({key: value for key, value in own.items() if key in names})
    return _finite(get_vector(model, task.private_parameters), name), home


def _finite(vector: Vector, name: str) -> Vector:
    if not np.isfinite(vector).all():
        raise ConfigError(f"{name} holds NaN or infinity", "it predicts nothing", "fetch it anew")
    return vector
