"""What stays at the hospital from round to round: private parameters, buffers, optimiser state.

Map: `Home` (the tensors) -> `put` and `taken` (into and out of a model and its optimiser) ->
`HomeFolder` (one file per run, in the trainer's own folder).

Invariant: nothing of it is ever part of a release's *content*; it only influences, inside the
trainer, the change that the gate then clips. Therefore runs that protect single patients cannot
have any (each patient's contribution must depend on that patient alone); with the unit "hospital"
and with mechanism `none` it belongs to the hospital's one row.

A file is safetensors, 0600 in a 0700 folder, replaced atomically after the round was released: a
trainer that is killed in the middle of a round goes on from the round before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from p2pfed.errors import ConfigError
from p2pfed.training.private_file import write_privately
from p2pfed.training.vector import saved_buffers, shared_parameters

__all__ = ["NOTHING", "Home", "HomeFolder", "home_of", "is_finite", "put", "taken", "tensors_of"]

_MODEL, _OPTIMIZER = "model/", "optimizer/"


@dataclass(frozen=True, slots=True, eq=False)
class Home:
    """Tensors on the CPU.

    Attributes:
        model: Private parameters and buffers by their name in the state dict.
        optimizer: State of the optimiser as "number of the parameter/key"; empty unless kept.
    """

    model: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)


NOTHING = Home()


def put(
    home: Home,
    model: nn.Module,
    private: Sequence[str] = (),
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Put what was kept into a model, and into its optimiser; what was not kept stays as it is.

    Raises:
        ConfigError: It was kept of a model with other tensors.
    """
    own = _own_tensors(model, private)
    for name, value in home.model.items():
        if name not in own or own[name].shape != value.shape:
            raise ConfigError(
                f"what is kept at home has the tensor {name} of shape {tuple(value.shape)}",
                "the installed task has no such private parameter or buffer",
                "install the task that it was kept by, or move the file away to start anew",
            )
        with torch.no_grad():
            own[name].copy_(value)
    if optimizer is None or not home.optimizer:
        return
    state: dict[int, dict[str, Any]] = {}
    for name, value in home.optimizer.items():
        number, _, key = name.partition("/")
        state.setdefault(int(number), {})[key] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for place, parameter in enumerate(parameters):
        for key, value in state.get(place, {}).items():
            if value.shape == parameter.shape:  # with its strides: fused steps compare them
                state[place][key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    try:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    except (ValueError, KeyError) as error:
        raise ConfigError("the optimiser's state that is kept at home does not fit") from error


def taken(
    model: nn.Module,
    private: Sequence[str] = (),
    optimizer: torch.optim.Optimizer | None = None,
) -> Home:
    """What a model, and its optimiser if given, leave for the next round; copies."""

    def copy(value: Tensor) -> Tensor:
        return value.detach().to("cpu", copy=True).contiguous()

    kept = {name: copy(value) for name, value in _own_tensors(model, private).items()}
    state = {} if optimizer is None else optimizer.state_dict()["state"]
    return Home(
        kept,
        {
            f"{number}/{key}": copy(value)
            for number, values in state.items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        },
    )


def _own_tensors(model: nn.Module, private: Sequence[str]) -> dict[str, Tensor]:
    """Whatever the state dict holds that is not shared; the tensors themselves."""
    shared = {id(parameter) for _, parameter in shared_parameters(model, private)}
    own: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if id(p) not in shared}
    return own | saved_buffers(model)


def is_finite(home: Home) -> bool:
    """Whether no value of it is NaN or infinite."""
    floats = (t for t in tensors_of(home).values() if t.is_floating_point())
    return all(bool(torch.isfinite(tensor).all()) for tensor in floats)


def tensors_of(home: Home) -> dict[str, Tensor]:
    """Everything under one name each, for a file or another process."""
    tensors = {_MODEL + name: value for name, value in home.model.items()}
    return tensors | {_OPTIMIZER + name: value for name, value in home.optimizer.items()}


def home_of(tensors: Mapping[str, Tensor]) -> Home:
    """The inverse of `tensors_of`; other names are left out."""

    def under(beginning: str) -> dict[str, Tensor]:
        return {n.removeprefix(beginning): t for n, t in tensors.items() if n.startswith(beginning)}

    return Home(under(_MODEL), under(_OPTIMIZER))


class HomeFolder:
    """Keeps one `Home` per run.

    Args:
        folder: Made if need be, 0700; None keeps everything in memory only.
        task_id: Of the installed task.
    """

    def __init__(self, folder: Path | None, task_id: bytes) -> None:
        self._folder = folder
        self._task_id = task_id.hex()
        self._known: dict[bytes, Home] = {}

    def of(self, run_id: bytes) -> Home:
        """What the last released round of a run left; nothing before its first.

        Raises:
            ConfigError: The file is damaged or was kept by another task.
        """
        if run_id not in self._known:
            self._known[run_id] = self._read(run_id)
        return self._known[run_id]

    def keep(self, run_id: bytes, home: Home) -> None:
        """Replace what is kept, durably.

        Raises:
            OSError: It cannot be written; the file before stays.
        """
        self._known[run_id] = home
        if self._folder is None or not (home.model or home.optimizer):
            return
        data = safetensors.torch.save(tensors_of(home), metadata={"task_id": self._task_id})
        write_privately(self._place(run_id), data)

    def _read(self, run_id: bytes) -> Home:
        if self._folder is None or not (place := self._place(run_id)).exists():
            return NOTHING
        try:
            data = place.read_bytes()
            tensors = safetensors.torch.load(data)
            with safetensors.safe_open(place, framework="pt") as file:
                kept_by = (file.metadata() or {}).get("task_id", "")
        except (OSError, SafetensorError, ValueError) as error:
            raise ConfigError(
                "what the trainer keeps at home between rounds cannot be read",
                f"{place}: {type(error).__name__}",
                "move the file away; private parameters then start anew",
            ) from error
        if kept_by != self._task_id:
            raise ConfigError(
                f"{place} was kept by another task",
                f"by {kept_by[:16]}…, installed is {self._task_id[:16]}…",
                "install that task again, or move the file away",
            )
        return home_of(tensors)

    def _place(self, run_id: bytes) -> Path:
        assert self._folder is not None
        return self._folder / f"home-{run_id.hex()[:32]}.safetensors"
