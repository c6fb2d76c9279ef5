"""The model on its way to the trainer: written into pages that the trainer maps, copied never.

A view is one safetensors file under one name in the exchange folder: `model`, float32, (P,), and
where there is one `mean` with its round in the metadata `mean_round`. Behind the name stand a few
files, the slots. Each is made once, stays mapped, and is written again and again in place: pages
that exist cost neither zeroing nor a page fault, which is most of what writing a new file costs.

Invariants, and what they rest on:

* The file under the name is whole. It is never written to: a slot is written while it has no name,
  and gets the name (a hard link put in the place of the last one) when it is done.
* What a trainer maps does not change. It holds a shared lock (flock) on the slot as long as it
  holds the view, and a slot is only written under an exclusive lock that is never waited for.
* Whoever dies leaves nothing wrong behind: locks end with their process, and a slot that was half
  written has no name.

In a steady run three slots serve: one is named, one trained on, one still looked at in pictures.
A process that the trainer forked keeps the locks of that moment; new slots replace those.

Not here: what is folded (`model`, `pairing`), where the folder lies (`trainer`), the other end
(`training/handover.py`).
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
import tempfile
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from p2pfed.errors import ConfigError
from p2pfed.node.tensorfile import FLOAT, header

__all__ = ["DATA_BEGINS", "Handover", "Mean"]

DATA_BEGINS = 4096  # bytes of the file before its first tensor: the header, padded to a page
_MOST_SLOTS = 4
_CHUNK = 1 << 16  # coordinates turned into float32 at a time: stays in the cache
_PIECE = 16 * _CHUNK  # coordinates that one thread does in turn
_THREADS = 2  # more than two gain little: memory is the limit


@dataclass(frozen=True, slots=True, eq=False)
class Mean:
    """The weighted mean delta of a round, on its way to the trainer.

    Attributes:
        round: Of which round.
        values: Shape (P,), float32, in units of the parameters.
    """

    round: int
    values: NDArray[np.float32]


class Handover:
    """The newest model under one name, for the trainer; see the module docstring.

    One call at a time. Its slots are removed with it; what has the name stays.

    Args:
        place: The view's name, in the exchange folder.
    """

    def __init__(self, place: Path) -> None:
        self._place = place
        self._slots: list[_Slot] = []  # the one that was named longest ago first
        weakref.finalize(self, _drop_all, self._slots)

    def write(self, model: NDArray[np.int32], *, grid_bits: int, mean: Mean | None = None) -> None:
        """Put a model under the name.

        Args:
            model: Multiples of the grid, shape (P,).
            grid_bits: The run's; written is model * 2**-grid_bits, as `fold.view_of` has it.
            mean: Goes with it under drift correction.

        Raises:
            ConfigError: The folder has no room, or cannot be written.
        """
        size = DATA_BEGINS + FLOAT.itemsize * model.size * (1 if mean is None else 2)
        try:
            slot = self._free_slot(size)
            try:
                slot.write(model, np.float32(2.0**-grid_bits), mean)
                slot.unlock()
                slot.name(self._place)
            except BaseException:
                slot.drop()
                raise
        except OSError as error:
            raise ConfigError(
                f"cannot write the model for the trainer, {size} bytes in {self._place.parent}",
                error.strerror or str(error),
                "make room there: this node needs four times as much (docker run --shm-size)",
            ) from error
        self._slots.append(slot)

    def _free_slot(self, size: int) -> _Slot:
        """A slot of this size that nobody reads, locked and taken from the list."""
        for slot in self._slots[:-1]:  # the last one has the name
            if not slot.lock():
                continue
            self._slots.remove(slot)
            if slot.size == size and slot.is_there():
                return slot
            slot.drop()  # of a view with a mean, or without one
        while len(self._slots) >= _MOST_SLOTS:
            self._slots.pop(0).drop()  # its pages live as long as its reader
        slot = _Slot(self._place, size)
        slot.lock()
        return slot


class _Slot:
    """A file beside the view's name, mapped as long as this object lives."""

    def __init__(self, place: Path, size: int) -> None:
        self.size = size
        self._descriptor, name = tempfile.mkstemp(prefix=f".{place.name}.", dir=place.parent)
        self._path = Path(name)
        try:
            if place.parent.stat().st_mode & stat.S_IRGRP:  # the trainer is another user
                os.fchmod(self._descriptor, 0o640)
            # Room first: a page that cannot be had later would kill this process (SIGBUS).
            os.posix_fallocate(self._descriptor, 0, size)
            self._memory = mmap.mmap(self._descriptor, size)
        except BaseException:
            self.drop()
            raise

    def lock(self) -> bool:
        """Lock it against readers; False where there is one."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def is_there(self) -> bool:
        """Whether the file is in the folder still, and as long as it was made."""
        try:
            found, own = self._path.lstat(), os.fstat(self._descriptor)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, own) and own.st_size == self.size

    def write(self, model: NDArray[np.int32], unit: np.float32, mean: Mean | None) -> None:
        names = ["model"] if mean is None else ["model", "mean"]
        named = None if mean is None else {"mean_round": str(mean.round)}
        self._memory[:DATA_BEGINS] = header(names, model.size, named, size=DATA_BEGINS)
        view = self._tensor(0, model.size)

        def fill(begin: int) -> None:
            for start in range(begin, min(begin + _PIECE, model.size), _CHUNK):
                part = view[start : start + _CHUNK]
                np.copyto(part, model[start : start + _CHUNK], casting="unsafe")
                part *= unit

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(fill, range(0, model.size, _PIECE)))
        if mean is not None:
            np.copyto(self._tensor(1, model.size), mean.values)

    def _tensor(self, number: int, length: int) -> NDArray[np.float32]:
        begin = DATA_BEGINS + number * length * FLOAT.itemsize
        tensor: NDArray[np.float32] = np.frombuffer(self._memory, FLOAT, length, begin)
        return tensor

    def name(self, place: Path) -> None:
        """Give it the name; the slot that had it goes on without."""
        aside = place.with_suffix(".tmp")
        aside.unlink(missing_ok=True)
        os.link(self._path, aside)
        aside.replace(place)

    def drop(self) -> None:
        """Let go of it, also where it was never whole; a trainer that maps it keeps its pages."""
        os.close(self._descriptor)
        self._path.unlink(missing_ok=True)


def _drop_all(slots: list[_Slot]) -> None:
    for slot in slots:
        with contextlib.suppress(OSError):  # the folder may be gone
            slot.drop()
    slots.clear()
