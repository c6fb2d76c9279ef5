"""A model's parameters as one flat float32 vector, and the safetensors file that carries it.

Invariant: order and length follow `named_parameters()` of the task's own model, so `get_vector`
after `set_vector` gives the same bits back. Buffers (running means of batch norm and the like) are
not in the vector: they stay at home, and under a privacy mechanism a model that has any is
refused, because they are statistics of patients which no clip bounds.

A file holds exactly one tensor, `model`, shape (P,), float32; P is the number of parameters here.
A view may hold a second one, `mean`, and then names its round in the metadata `mean_round`. Files
are safetensors only: reading one runs no code.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
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
    "read_view",
    "set_vector",
    "write_vector",
]

Vector = NDArray[np.float32]
_MOST_HEADER_BYTES = 1 << 16
_LONGEST_ROUND = 16  # digits


@dataclass(frozen=True, slots=True, eq=False)
class MeanDelta:
    """The weighted mean delta of one round: public.

    Attributes:
        round: Of which round.
        values: Shape (P,), float32, in units of the parameters.
    """

    round: int
    values: Vector


def num_parameters(model: nn.Module) -> int:
    """Length of the flat vector; tied parameters count once."""
    return sum(p.numel() for p in model.parameters())


def check_no_buffers(model: nn.Module) -> None:
    """Refuse a model whose state is more than its parameters; needed under a privacy mechanism.

    Raises:
        ConfigError: Names the first persistent buffer.
    """
    saved = model.state_dict().keys()
    for name, _ in model.named_buffers():
        if name in saved:
            raise ConfigError(
                f"the model has the buffer {name!r}",
                "such statistics of patients are outside the privacy gate",
                "use GroupNorm or InstanceNorm without running statistics, or persistent=False",
            )


def get_vector(model: nn.Module) -> Vector:
    """A copy of the parameters, shape (P,), float32."""
    parts = [p.detach().reshape(-1).to("cpu", torch.float32) for p in model.parameters()]
    return np.asarray(torch.cat(parts).numpy(), dtype=np.float32).copy()


def set_vector(model: nn.Module, vector: Vector) -> None:
    """Put the values into the model's parameters, in place.

    Raises:
        UpdateRejected: Wrong length or type, NaN or infinity.
    """
    _check(vector, num_parameters(model), "the vector")
    with torch.no_grad():
        for parameter, part in zip(model.parameters(), parts(model, vector), strict=True):
            parameter.copy_(part)


def parts(model: nn.Module, vector: Vector) -> list[torch.Tensor]:
    """The vector's part for each parameter, in its shape, on the CPU."""
    parameters = list(model.parameters())
    flat = torch.from_numpy(np.ascontiguousarray(vector))
    split = flat.split([p.numel() for p in parameters])
    return [part.view_as(parameter) for part, parameter in zip(split, parameters, strict=True)]


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


def read_view(path: Path, length: int) -> tuple[Vector, MeanDelta | None]:
    """Read the public model that the network process wrote, and the last mean delta if it is there.

    Args:
        path: The safetensors file.
        length: P, our own model's number of parameters.

    Raises:
        UpdateRejected: As `read_vector`, for either tensor; or the mean's round is not named.
    """
    try:
        tensors = safetensors.numpy.load(_read(path, 2 * length))
        with safetensors.safe_open(path, framework="numpy") as file:
            named = (file.metadata() or {}).get("mean_round", "")
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UpdateRejected(f"cannot read {path.name} as a view", str(error)) from error
    if not {"model"} <= set(tensors) <= {"model", "mean"}:
        raise UpdateRejected(f"{path.name} must hold a tensor 'model' and may hold a 'mean'")
    for name, tensor in tensors.items():
        _check(tensor, length, f"{name} in {path.name}")
    if "mean" not in tensors:
        return tensors["model"], None
    if not (named.isascii() and named.isdigit() and len(named) <= _LONGEST_ROUND):
        raise UpdateRejected(f"{path.name} does not name the round of its mean")
    return tensors["model"], MeanDelta(int(named), tensors["mean"])


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
