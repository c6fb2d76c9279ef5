"""The hand-over of vectors between daemon and trainer, against a plain copy in memory.

Both ends run here, on real files, in the exchange folder of a node. The way to the trainer begins
with the folded model's integers and ends with a checked float32 array, while the trainer still
holds the view before, as it does. The way back begins with what the gate released and ends with
what the daemon signs. `copy` is np.copyto between two arrays that are resident, of as many bytes.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import safetensors.numpy
from goals import Goal
from rows import Row, interleaved

from p2pfed.identity.run import MAX_DELTA_BYTES
from p2pfed.node.handover import Handover
from p2pfed.node.trainer import exchange_folder
from p2pfed.training.handover import read_view
from p2pfed.wire.payload import Payload, decode_payload, encode_payload, max_payload_bytes

__all__ = ["SIZES", "rows"]

SIZES = (10**7, 10**8)
TIMES = 5
GRID_BITS = 12
SLOTS = 4  # most files that the hand-over keeps
COPY, MOST = "copy", 3.0  # what is compared with, and the goal


def rows(sizes: Sequence[int] = SIZES) -> list[Row]:
    """Measure every size, in parameters; medians of 5."""
    measured: list[Row] = []
    for size in sizes:
        with _exchange(4 * size * (SLOTS + 2)) as folder:
            measured += _to_trainer(size, folder / "view.safetensors")
            measured += _back(size, folder / "round.payload")
    return measured


@contextmanager
def _exchange(needed: int) -> Iterator[Path]:
    """The folder that a node would use; on the disk where its memory has no room for this."""
    with tempfile.TemporaryDirectory() as data:
        with exchange_folder(Path(data)) as folder:
            if shutil.disk_usage(folder).free > needed:
                yield folder
                return
        yield Path(data)


def _to_trainer(size: int, place: Path) -> list[Row]:
    grid = np.random.default_rng(1).integers(-(2**20), 2**20, size, np.int32)
    source, target = np.ones(size, np.float32), np.zeros(size, np.float32)
    hand = Handover(place)
    held = []

    def write() -> None:
        hand.write(grid, grid_bits=GRID_BITS)

    def read() -> None:
        held[:] = [*held[-1:], read_view(place, size)[0]]

    for _ in range(SLOTS):  # from then on no slot is new
        write()
        read()
    copied, wrote, mapped, anew = interleaved(
        [
            _timed(lambda: np.copyto(target, source)),
            _timed(write),
            _timed(read),
            _timed(lambda: _in_a_new_file(place.with_name("anew"), grid)),
        ],
        TIMES,
    )
    assert held[-1][-1] == np.float32(grid[-1]) / 2**GRID_BITS
    where = f"{size:.0e} parameters"
    together = wrote + mapped
    return [
        Row(f"{where}: copy", copied, "s"),
        Goal(
            f"{where}: to the trainer", together, "s", COPY, together / copied, "lower", goal=MOST
        ),
        Row(f"{where}:   written by the daemon", wrote, "s", COPY, wrote / copied, "lower"),
        Row(f"{where}:   mapped and checked", mapped, "s", COPY, mapped / copied, "lower"),
        Row(f"{where}:   through a new file", anew, "s", COPY, anew / copied, "lower"),
    ]


def _in_a_new_file(place: Path, grid: np.ndarray) -> None:
    """The plain way, for comparison: a new file every time, read as a whole and checked."""
    view = grid.astype(np.float32)
    view *= np.float32(2.0**-GRID_BITS)
    aside = place.with_suffix(".tmp")
    safetensors.numpy.save_file({"model": view}, aside)
    aside.replace(place)
    assert np.isfinite(safetensors.numpy.load(place.read_bytes())["model"]).all()
    place.unlink()


def _back(size: int, place: Path) -> list[Row]:
    """The largest release that a run of this size may have: 8 bits a value, dense if it fits."""
    most = _most_released(size)
    values = np.random.default_rng(2).integers(-127, 128, most, np.int16)
    values[values == 0] = 1
    indices = None if most == size else np.arange(most, dtype=np.int64) * (size // most)
    payload = Payload(indices, values)
    data = encode_payload(payload, num_parameters=size, width="int8")
    source, target = np.frombuffer(data, np.uint8), np.zeros(len(data), np.uint8)

    def give() -> None:
        partial = place.with_suffix(".partial")
        partial.write_bytes(data)
        partial.replace(place)

    def take() -> bytes:
        taken = place.read_bytes()
        place.unlink()
        return taken

    def whole() -> None:
        coded = encode_payload(payload, num_parameters=size, width="int8")
        decode_payload(coded, num_parameters=size, max_released=most, width="int8")

    def through() -> None:
        give()
        take()

    copied, moved, coded = interleaved(
        [_timed(lambda: np.copyto(target, source)), _timed(through), _timed(whole)], TIMES
    )
    where = f"{size:.0e} parameters: back, {len(data) / 2**20:.1f} MiB"
    return [
        Row(f"{where}: copy", copied, "s"),
        Row(f"{where}: through a file", moved, "s", COPY, moved / copied, "lower"),
        Row(f"{where}: encoded and decoded", coded, "s", COPY, coded / copied, "lower"),
    ]


def _most_released(size: int) -> int:
    if max_payload_bytes(size, size, "int8") <= MAX_DELTA_BYTES:
        return size
    return MAX_DELTA_BYTES // 3 - size // 0xFFFF - 8  # 3 bytes each, and fillers


def _timed(work: Callable[[], object]) -> Callable[[], float]:
    def measure() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return measure
