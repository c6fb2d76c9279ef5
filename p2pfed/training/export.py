"""A model as a folder to keep or to give away: tensors by name, a model card, perhaps ONNX.

Map: `Wishes` -> `export` makes `model.safetensors`, `README.md` (`card`) and `model.onnx` in a
folder that appears when all of it is there.

Invariant: private parameters and buffers, and tuned models, come along only where they are asked
for by name; the folder is then 0700, and its card says that it must not be given away. No patient's
record gets into a file: the ONNX exporter is given zeros in the shape of one.

Not here: what the card says (`card`), reading the tensors again (`model_file`).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from p2pfed.errors import ConfigError, P2PFedError
from p2pfed.training.card import Contents, card, layers
from p2pfed.training.hardware import CPU
from p2pfed.training.local import ready_model
from p2pfed.training.loop_task import LoopTask
from p2pfed.training.model_file import HeldModel, named_tensors, write_tensors
from p2pfed.training.patients import Patients
from p2pfed.training.task import Task, load_task, task_id

__all__ = ["Wishes", "example_of", "export", "onnx_installed", "write_onnx"]

_OPSET = 20


@dataclass(frozen=True, slots=True)
class Wishes:
    """What of a model is exported.

    Attributes:
        mine: What stays at this hospital too.
        onnx: A record's inputs as they go into the model, shape (1, ...); None for no ONNX file.
        metrics: The hospital's own, for the card.
    """

    mine: bool = False
    onnx: Tensor | None = None
    metrics: Mapping[str, float] | None = None


def export(folder: Path, task: Task, spec: str, held: HeldModel, wishes: Wishes) -> dict[str, Any]:
    """Write the folder.

    Args:
        folder: Must not exist.
        task: The installed task.
        spec: How it is named here.
        held: The model.
        wishes: What of it.

    Returns:
        Facts for programs: files, numbers of parameters, what was left out.

    Raises:
        ConfigError: The folder exists or cannot be written, or what was asked for must stay here.
        P2PFedError: The model cannot be written as ONNX.
    """
    private = held.origin.kind in ("mine", "tuned")
    if private and not wishes.mine:
        raise ConfigError(
            f"this is a {held.origin.short}",
            "it is a function of this hospital's patients that nothing protects",
            "export the common model; or, for use in this hospital only, add --mine",
        )
    whole = named_tensors(task, held, mine=True)
    tensors = whole if wishes.mine else named_tensors(task, held, mine=False)
    left_out = sorted(whole.keys() - tensors.keys())
    if left_out and wishes.onnx is not None:
        raise ConfigError(
            "an ONNX file holds the whole model, and a part of this one stays at the hospital",
            f"for instance {left_out[0]}",
            "leave out --onnx; or, for use in this hospital only, add --mine",
        )
    model = ready_model(task, held.vector, home=held.home, hardware=CPU)
    kind = held.origin.kind if private else ("mine" if wishes.mine else "exported")
    contents = Contents(
        spec=spec,
        model=type(model).__name__,
        layers=layers(model, tensors),
        num_parameters=sum(p.numel() for name, p in model.named_parameters() if name in tensors),
        left_out=_told_of(left_out, task, model),
        loading=_loading(task, spec, whole=not left_out),
        onnx="" if wishes.onnx is None else _about_onnx(wishes.onnx),
        metrics=wishes.metrics,
    )
    with _appearing(folder, mode=0o700 if wishes.mine else 0o755) as partial:
        write_tensors(partial / "model.safetensors", tensors, replace(held.origin, kind=kind))
        if wishes.onnx is not None:
            write_onnx(model, wishes.onnx, partial / "model.onnx")
        text = card(held.origin, contents, mine=wishes.mine)
        (partial / "README.md").write_text(text, "utf-8")
        for file in partial.iterdir():
            file.chmod(0o600 if wishes.mine else 0o644)
    return {
        "folder": str(folder),
        "files": sorted(path.name for path in folder.iterdir()),
        "num_parameters": contents.num_parameters,
        "left_out": left_out,
        "mine": wishes.mine,
    }


def _told_of(left_out: Sequence[str], task: Task, model: nn.Module) -> list[str]:
    """Patterns in place of the names of private parameters: heads may be named after targets."""
    own = {name for name, _ in model.named_parameters()}
    patterns = list(task.private_parameters) if own & set(left_out) else []
    return patterns + [name for name in left_out if name not in own]


def example_of(patients: Patients) -> Tensor:
    """Zeros in the shape and type of one record's inputs, (1, ...)."""
    x, _ = patients.stacked([patients.alike()[0][0]], seed=0)
    return torch.zeros_like(x[0, :1], device="cpu")


def onnx_installed() -> None:
    """Refuse where the exporter is missing, before anything is computed.

    Raises:
        ConfigError: It is.
    """
    try:
        for name in ("onnx", "onnxscript"):
            importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            "ONNX needs packages that are not installed",
            str(error),
            "install the extra: pip install 'p2pfed[onnx]'",
        ) from error


def write_onnx(model: nn.Module, example: Tensor, path: Path) -> None:
    """Write a model as ONNX, any number of records at a time, and check the file's form.

    Args:
        model: In evaluation mode, on the CPU.
        example: Shape and type of its input, (1, ...); the values do not matter.
        path: The file.

    Raises:
        ConfigError: The packages for it are missing.
        P2PFedError: The exporter cannot write this model.
    """
    onnx_installed()
    onnx = importlib.import_module("onnx")
    pair = torch.cat([example, example])  # a batch of one would be taken for a constant
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses packages not needed here
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # the exporter's own, of its own code
            torch.onnx.export(
                model,
                (pair,),
                path,
                input_names=["input"],
                output_names=["output"],
                dynamic_shapes=({0: torch.export.Dim("records")},),
                opset_version=_OPSET,
                external_data=False,
                verbose=False,
            )
            onnx.checker.check_model(path, full_check=True)
    except OSError:
        raise
    except Exception as error:  # the exporter raises what the model led it to
        text = str(error).strip().partition("\n")[0]
        raise P2PFedError(
            "this model cannot be written as ONNX",
            f"{type(error).__name__}: {text}",
            "leave out --onnx: model.safetensors holds the whole model",
        ) from error


def _about_onnx(example: Tensor) -> str:
    shape = ", ".join(["records", *map(str, example.shape[1:])])
    kind = str(example.dtype).removeprefix("torch.")
    return (
        f"`model.onnx` is the same model for other runtimes: input ({shape}), {kind}, prepared as"
        " the task does."
    )


def _loading(task: Task, spec: str, *, whole: bool) -> list[str]:
    """Python of five lines that loads the model, where the task is installed."""
    name = "load_loop" if isinstance(task, LoopTask) else "load_task"
    module = "loop_task" if isinstance(task, LoopTask) else "task"
    options = "" if isinstance(task, LoopTask) or _needs_no_options(task, spec) else ", options"
    return [
        *(["options = {}  # train.options, as in your configuration"] if options else []),
        "import safetensors.torch",
        f"from p2pfed.training.{module} import {name}",
        f"model = {name}({json.dumps(spec)}{options}).model().eval()",
        'tensors = safetensors.torch.load_file("model.safetensors")',
        f"model.load_state_dict(tensors{'' if whole else ', strict=False'})",
    ]


def _needs_no_options(task: Task, spec: str) -> bool:
    try:
        return task_id(load_task(spec)) == task_id(task)
    except P2PFedError:
        return False


@contextlib.contextmanager
def _appearing(folder: Path, *, mode: int) -> Iterator[Path]:
    """A folder that gets its name when the block is over, and is gone if it fails."""
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"{folder} exists already", "nothing is overwritten", "name a new folder")
    try:
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise _unwritten(folder, error) from error
    try:
        yield partial
        partial.chmod(mode)
        partial.rename(folder)
    except OSError as error:
        raise _unwritten(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unwritten(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot write {folder}", error.strerror or "", "make room there, or name another place"
    )
