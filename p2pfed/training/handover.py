"""The model that the network process hands over: mapped, checked, used where it lies.

The file is safetensors with `model`, shape (P,), float32, and perhaps a `mean` of the same shape,
which then names its round in the metadata `mean_round`. P is the number of parameters here. Nothing
is copied: the arrays are pages that both processes see, so a view costs no memory here. They may be
written to; what is written stays here (copy on write).

Invariant: an array does not change as long as it lives. The mapping keeps a shared lock (flock) on
the file, and the writer only writes to a file that has no name and no lock; both ends of that, and
what happens if one dies, are told in `node/handover.py`. Nothing about privacy rests on this: the
gate's bounds hold for whatever model the network process gives. What is told of a file that is no
view is the same for every such file, because the network process names it.

The header is read here, with no library: it must say exactly one of two things.
"""

from __future__ import annotations

import fcntl
import json
import math
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from p2pfed.errors import UpdateRejected
from p2pfed.training.vector import MeanDelta, Vector

__all__ = ["read_view"]

_MOST_HEADER_BYTES = 1 << 16
_LENGTH_BYTES = 8
_FLOAT = np.dtype("<f4")
_LONGEST_ROUND = 16  # digits
_NO_VIEW = "it is missing, a link, too large or no safetensors file"
_TRIES = 100  # the name moves at most once per fold


def read_view(path: Path, length: int) -> tuple[Vector, MeanDelta | None]:
    """The public model that the network process wrote, and the last mean delta if it is there.

    Args:
        path: The safetensors file.
        length: P, our own model's number of parameters.

    Returns:
        Arrays of shape (P,), float32, whose memory is the file.

    Raises:
        UpdateRejected: Missing, a link, too large, no such file, NaN or infinity in either tensor,
            or the mean's round is not named.
    """
    try:
        memory = _mapped(path, _LENGTH_BYTES + _MOST_HEADER_BYTES + 2 * _FLOAT.itemsize * length)
        header, begins = _header_of(memory)
    except (OSError, ValueError, RecursionError) as error:
        # In fixed words: who named the file could learn of a patient's one what its bytes are.
        raise UpdateRejected(f"cannot read {path.name} as a view", _NO_VIEW) from error
    said = header.pop("__metadata__", None)
    if not {"model"} <= set(header) <= {"model", "mean"}:
        raise UpdateRejected(f"{path.name} must hold a tensor 'model' and may hold a 'mean'")
    places = _places(header, length)
    if places is None or len(memory) != begins + _FLOAT.itemsize * length * len(places):
        raise UpdateRejected(
            f"{path.name} does not hold what it must",
            f"expected are tensors of shape ({length},), float32, and nothing else",
        )
    tensors: dict[str, Vector] = {
        name: np.frombuffer(memory, _FLOAT, length, begins + place)
        for name, place in places.items()
    }
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise UpdateRejected(f"{name} in {path.name} holds NaN or infinity")
    if "mean" not in tensors:
        return tensors["model"], None
    named = said.get("mean_round") if isinstance(said, dict) else None
    if not (isinstance(named, str) and named.isascii() and named.isdigit()):
        raise UpdateRejected(f"{path.name} does not name the round of its mean")
    if len(named) > _LONGEST_ROUND:
        raise UpdateRejected(f"the round of the mean in {path.name} has {len(named)} digits")
    return tensors["model"], MeanDelta(int(named), tensors["mean"])


def _mapped(path: Path, most: int) -> mmap.mmap:
    """The file under the name, locked against its writer until the mapping is gone.

    Raises:
        OSError: It is not there, not a file, or cannot be locked.
        ValueError: It is empty or longer than `most` bytes.
    """
    for _ in range(_TRIES):
        with open(path, "rb", buffering=0, opener=_no_link) as file:
            found = os.fstat(file.fileno())
            if found.st_size > most:
                raise ValueError(f"it has {found.st_size} bytes, at most {most} are expected")
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # it lost the name after it was opened and is being written again
            if os.path.samestat(found, path.lstat()):
                # The mapping has a duplicate of the descriptor, and with it the lock.
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    raise BlockingIOError("somebody else has locked it")


def _no_link(path: str, flags: int) -> int:
    # Not to block, should it be a pipe.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _header_of(memory: mmap.mmap) -> tuple[dict[str, Any], int]:
    """The header, and where the data begins; ValueError where that is not a header."""
    size = int.from_bytes(memory[:_LENGTH_BYTES], "little")
    begins = _LENGTH_BYTES + size
    if size > _MOST_HEADER_BYTES or begins > len(memory) or begins % _FLOAT.itemsize:
        raise ValueError(f"a header of {size} bytes in a file of {len(memory)}")
    header = json.loads(memory[_LENGTH_BYTES:begins].decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")  # noqa: TRY004 - of a file, not of an argument
    return header, begins


def _places(header: dict[str, Any], length: int) -> dict[str, int] | None:
    """Where in the data each tensor begins; None unless each is P floats and they fill it."""
    each = _FLOAT.itemsize * length
    free, places = [number * each for number in range(len(header))], {}
    for name, described in header.items():
        for begin in free:
            offsets = [begin, begin + each]
            if described == {"dtype": "F32", "shape": [length], "data_offsets": offsets}:
                places[name] = begin
                free.remove(begin)
                break
    return None if free else places


def _is_finite(tensor: Vector) -> bool:
    """Whether all values are; one pass without a temporary array, on the trainer's own threads."""
    least, largest = torch.aminmax(torch.from_numpy(tensor))  # NaN if there is one
    return math.isfinite(least.item()) and math.isfinite(largest.item())
