"""A task whose hospital's facts are marks that occur nowhere else, read from files of its folder.

Map: `MARKS` (what is searched for) -> `write_data` (the files) -> `Marked` (the task; without a
folder it has unmarked patients).
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from torch import nn

from p2pfed.errors import ConfigError
from p2pfed.training.task import HyperParameters, Split, Task, TaskData

FILE = "canary-scan-5c1e8842.bin"
PATIENT = "MRN-CANARY-7741"
VALUES = np.array([1234.5679, -777.125, 3.1622777, 9021.0625, 0.43429448, -58.59375], np.float32)
METRIC = 0.728193645546372
HEADER = b"DICM-CANARY-\x8f\x11\xa7\x5d"  # bytes of a file, as an image has them

MARKS = {
    "file name": FILE.encode(),
    "patient": PATIENT.encode(),
    "values": VALUES.tobytes(),
    "values as doubles": VALUES.astype(np.float64).tobytes(),
    "metric": struct.pack("<d", METRIC),
    "metric as text": b"0.72819364",
    "bytes": HEADER,
}
PATIENTS = 40


def write_data(folder: Path) -> None:
    """The hospital's folder: one file with every patient's values."""
    (folder / FILE).write_bytes(HEADER + VALUES.tobytes())


class Marked(Task):
    """See the module docstring."""

    name = "marked"
    hyper = HyperParameters(local_steps=2, batch_size=8, learning_rate=0.1)

    def model(self):
        return nn.Sequential(nn.Linear(VALUES.size, 1), nn.Flatten(0))

    def data(self, folder, options):
        numbers = np.random.default_rng(3)
        x = numbers.normal(size=(PATIENTS, VALUES.size)).astype(np.float32)
        names = [f"patient-{number}" for number in range(PATIENTS)]
        self._metric = 0.5
        if folder is not None:
            if (folder / "broken").exists():
                raise ConfigError(f"{folder / FILE} does not fit", f"{PATIENT} has {VALUES[0]}")
            raw = (folder / FILE).read_bytes()
            self._raw = raw  # as a cache would hold it
            x[::2] = np.frombuffer(raw, np.float32, VALUES.size, len(HEADER))
            names = [f"{PATIENT}-{number}" for number in range(PATIENTS)]
            self._metric = METRIC
            print(f"read {folder / FILE}: {names[0]}")
        y = torch.from_numpy((numbers.random(PATIENTS) < 0.5).astype(np.float32))
        ids = tuple(name.encode() for name in names)
        split = Split(torch.from_numpy(x), y, torch.arange(PATIENTS), ids)
        return TaskData(split, split)

    def loss(self, output, target):
        return nn.functional.binary_cross_entropy_with_logits(output, target, reduction="none")

    def metrics(self, model, split):
        return {"accuracy": self._metric}
