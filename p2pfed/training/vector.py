"""A model's parameters as one flat float32 vector, and the safetensors file that carries it.

Invariant: order and length follow `shared_parameters()` of the task's own model, so `get_vector`
after `set_vector` gives the same bits back. What a task keeps at home and buffers (running means of
batch norm and the like) are not in the vector; see `home`. Under a privacy mechanism a model that
has buffers is refused, because they are statistics of patients which no clip bounds.

A file holds exactly one tensor, `model`, shape (P,), float32; P is the number of parameters here.
Files are safetensors only: reading one runs no code. Not here: the view that the network process
hands over in every round (`handover`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import nn

from p2pfed.errors import ConfigError, UpdateRejected
from p2pfed.identity.filehash import file_hash

__all__ = [
    "MeanDelta",
    "Vector",
    "check_no_buffers",
    "get_vector",
    "num_parameters",
    "parts",
    "read_vector",
    "saved_buffers",
    "set_vector",
    "shared_parameters",
    "write_vector",
]

Vector = NDArray[np.float32]
_MOST_HEADER_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class MeanDelta:
    """The weighted mean delta of one round: public.

    Attributes:
        round: Of which round.
        values: Shape (P,), float32, in units of the parameters.
    """

    round: int
    values: Vector


def shared_parameters(
    model: nn.Module, private: Sequence[str] = ()
) -> list[tuple[str, nn.Parameter]]:
    """The parameters that hospitals average, by name; tied ones come once.

    Args:
        model: The task's model.
        private: Patterns of the names that stay at home.

    Raises:
        ConfigError: A pattern fits no parameter, or nothing is shared.
    """
    named = list(model.named_parameters())
    for pattern in private:
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            raise ConfigError(
                f"private_parameters names {pattern!r}, which fits no parameter of the model",
                "it would be shared under another name",
                f"the model has {', '.join(name for name, _ in named[:12])}",
            )
    shared = [(n, p) for n, p in named if not any(fnmatchcase(n, each) for each in private)]
    if not shared:
        raise ConfigError("the task shares no parameter", "there would be nothing to average")
    return shared


def num_parameters(model: nn.Module, private: Sequence[str] = ()) -> int:
    """Length of the flat vector."""
    return sum(p.numel() for _, p in shared_parameters(model, private))


def saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the model's state holds besides its parameters, by name; the tensors themselves."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def check_no_buffers(model: nn.Module) -> None:
    """Refuse a model whose state is more than its parameters; needed under a privacy mechanism.

    Raises:
        ConfigError: Names the first persistent buffer.
    """
    for name in saved_buffers(model):
        raise ConfigError(
            f"the model has the buffer {name!r}",
            "such statistics of patients are outside the privacy gate",
            "use GroupNorm or InstanceNorm without running statistics, or persistent=False",
        )


def get_vector(model: nn.Module, private: Sequence[str] = ()) -> Vector:
    """A copy of the shared parameters, shape (P,), float32."""
    shared = shared_parameters(model, private)
    flat = [p.detach().reshape(-1).to("cpu", torch.float32) for _, p in shared]
    return np.asarray(torch.cat(flat).numpy(), dtype=np.float32).copy()


def set_vector(model: nn.Module, vector: Vector, private: Sequence[str] = ()) -> None:
    """Put the values into the model's shared parameters, in place.

    Raises:
        UpdateRejected: Wrong length or type, NaN or infinity.
    """
    shared = shared_parameters(model, private)
    _check(vector, sum(p.numel() for _, p in shared), "the vector")
    with torch.no_grad():
        for (_, parameter), part in zip(shared, parts(model, vector, private), strict=True):
            parameter.copy_(part)


def parts(model: nn.Module, vector: Vector, private: Sequence[str] = ()) -> list[torch.Tensor]:
    """The vector's part for each shared parameter, in its shape, on the CPU."""
    shared = [p for _, p in shared_parameters(model, private)]
    flat = torch.from_numpy(np.ascontiguousarray(vector))
    split = flat.split([p.numel() for p in shared])
    return [part.view_as(parameter) for part, parameter in zip(split, shared, strict=True)]


def write_vector(path: Path, vector: Vector) -> bytes:
    """Write the file durably under its name and return the hash that names it."""
    data = safetensors.numpy.save({"model": np.ascontiguousarray(vector, dtype=np.float32)})
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return file_hash(data)


def read_vector(path: Path, length: int, *, digest: bytes | None = None) -> Vector:
    """Read a vector file and check everything about it.

    Args:
        path: The safetensors file.
        length: P, our own model's number of parameters.
        digest: Hash that the file must have (`identity/filehash`), e.g. the run's genesis.

    Raises:
        UpdateRejected: Missing, too large, another hash, not such a file, NaN or infinity.
    """
    try:
        data = _read(path, length)
        if digest is not None and file_hash(data) != digest:
            raise UpdateRejected(
                f"{path.name} is not the file that the run names",
                f"its hash is {file_hash(data).hex()[:16]}…, expected {digest.hex()[:16]}…",
                "fetch it again from another member",
            )
        tensors = safetensors.numpy.load(data)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UpdateRejected(f"cannot read {path.name} as a vector", str(error)) from error
    if set(tensors) != {"model"}:
        raise UpdateRejected(f"{path.name} must hold one tensor named 'model'")
    vector = tensors["model"]
    _check(vector, length, path.name)
    return vector


def _read(path: Path, length: int) -> bytes:
    size = path.stat().st_size
    if size > 4 * length + _MOST_HEADER_BYTES:
        raise UpdateRejected(f"{path.name} has {size} bytes, too many for {length} parameters")
    return path.read_bytes()


def _check(vector: Vector, length: int, what: str) -> None:
    if vector.shape != (length,) or vector.dtype != np.float32:
        raise UpdateRejected(
            f"{what} has shape {vector.shape} and type {vector.dtype}",
            f"expected ({length},) float32",
        )
    if not np.isfinite(vector).all():
        raise UpdateRejected(f"{what} holds NaN or infinity")
