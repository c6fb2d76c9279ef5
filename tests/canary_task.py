"""A task whose every private fact is a mark, and a trainer that can be made to leak, or repeatable.

Map: `World` (one hospital's private facts) -> `Canary` (the task that has, prints and throws them)
-> `python -m canary_task leak|fixed ...`, the product's own trainer with one change each:

leak   round r puts one private fact where the network process can see it, as `LEAKS[r]` says, and
       nothing is kept from the daemon's output.
fixed  the noise comes from a key stream that is the same in every process.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import sys
import warnings
from dataclasses import dataclass, replace
from functools import partial

import msgpack
import numpy as np
import torch
from torch import nn

from p2pfed.errors import (
    BudgetExhausted,
    ConfigError,
    LedgerCorrupt,
    PrivacyError,
    UpdateRejected,
)
from p2pfed.privacy.gate import release_round
from p2pfed.privacy.noise import ExactNoise
from p2pfed.training import __main__ as command
from p2pfed.training import answers, process
from p2pfed.training import round as rounds
from p2pfed.training.task import HyperParameters, Split, Task, TaskData

OURS = {  # errors of our own kinds that a task may raise, with a patient in their text
    f"raise {kind.__name__}": kind
    for kind in (BudgetExhausted, ConfigError, LedgerCorrupt, PrivacyError, UpdateRejected)
}

WIDTH = 3  # of a record, and of the model
CARRIER = 1e4  # only a patient with a target above this moves the model
METRIC_NAME = "canary-metric"


@dataclass(frozen=True)
class World:
    """Private facts of one hospital.

    Attributes:
        value: The first patient's first number.
        target: That patient's target.
        loss: Of every record.
        metric: What the task measures on the test patients.
        buffer: A statistic of the patients that the model holds in a buffer.
        patients: How many train.
        records: How many records they have.
        sick: How many records have a target above one half.
        name: How patients' names begin.
        factor: All the first patient's numbers are multiplied by it; its clipped row is the same.
        unusable: How many others have a loss that is not a number in the mood `nan`.
    """

    value: float = 1234.56789
    target: float = 31415.9265
    loss: float = 31337.125
    metric: float = 0.728193645546372
    buffer: float = 5772.15664
    patients: int = 70_297
    records: int = 104_729
    sick: int = 99_991
    name: str = "MRN-CANARY"
    factor: int = 1
    unusable: int = 1

    def patient(self, number: int) -> str:
        """A patient's name."""
        return f"{self.name}-{number:06d}"


MARKED = World()
OTHER = World(
    target=27182.8182,
    loss=-404.75,
    metric=0.314159,
    buffer=-1.5,
    patients=140_009,
    records=160_009,
    sick=20_011,
    name="PID-OTHER",
    factor=4,
    unusable=1000,
)
WORLDS = {
    "marked": MARKED,
    "other": OTHER,
    "small": replace(MARKED, patients=41, records=67, sick=30),
    "small-other": replace(OTHER, patients=59, records=83, sick=7, unusable=20),
}


class Statistic(nn.Module):
    """Keeps a number of the patients beside the parameters and lets its input through."""

    def __init__(self, value: float, *, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("statistic", torch.tensor(value), persistent=persistent)

    def forward(self, x):
        return x


class Canary(Task):
    """Options: `world`, and `carrier` = 0 for nobody who moves the model."""

    name = "canary"
    persistent = False  # the buffer
    hyper = HyperParameters(local_steps=3, batch_size=16, learning_rate=0.1)

    def __init__(self):
        self.world = None
        self._folder = None

    def model(self):
        kept = 0.0 if self.world is None else self.world.buffer
        statistic = Statistic(kept, persistent=self.persistent)
        return nn.Sequential(statistic, nn.Linear(WIDTH, 1, bias=False), nn.Flatten(0))

    def data(self, folder, options):
        self.world, self._folder = WORLDS[str(options["world"])], folder
        if self._mood().startswith("no data"):
            raise OURS.get(self._mood().removeprefix("no data, "), ValueError)(self._secrets())
        split = _split(self.world, carrier=bool(options.get("carrier", 1)))
        return TaskData(split, split)

    def loss(self, output, target):
        mood, world = self._mood(), self.world
        self._tell_everyone()
        if mood == "raise":
            raise ValueError(self._secrets())
        if mood in OURS:
            raise OURS[mood](self._secrets())
        if mood == "memory":
            raise torch.OutOfMemoryError(self._secrets())
        moves = (target > CARRIER).float()
        loss = (output - output.detach()) * moves + world.loss
        if mood == "nan":
            loss = torch.where((target > 1) & (target < CARRIER), loss * float("nan"), loss)
        return loss

    def metrics(self, model, split):
        self._tell_everyone()
        if self._mood() == "no metrics":
            raise ValueError(self._secrets())
        world = self.world
        return {METRIC_NAME: world.metric, "loss": world.loss, "patients": world.patients}

    def _mood(self) -> str:
        """What a test asks for by a file; nothing else of a task differs between moods."""
        path = self._folder / "mood" if self._folder else None
        return path.read_text() if path and path.exists() else ""

    def _secrets(self) -> str:
        return f"{self.world.patient(0)} has {self.world.value} of {self.world.patients}"

    def _tell_everyone(self) -> None:
        """What careless code does: print, log, warn, write to the descriptors."""
        if self._folder is None:
            return
        print(self._secrets())
        print(self._secrets(), file=sys.stderr)
        logging.getLogger("canary").warning(self._secrets())
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(self._secrets(), stacklevel=1)
        for descriptor in (1, 2):
            os.write(descriptor, self._secrets().encode() + b"\n")


def _split(world: World, *, carrier: bool) -> Split:
    """Patients whose clipped sum is that of the first one, in every world the same."""
    numbers = np.random.default_rng(world.patients)
    patient = np.arange(world.records) % world.patients
    x = numbers.normal(size=(world.records, WIDTH)).astype(np.float32)
    y = np.where(np.arange(world.records) < world.sick, 0.75, 0.25).astype(np.float32)
    y[1 : 1 + world.unusable] = 1.5  # not a number in the mood `nan`
    first = patient == 0
    x[first] = np.array([MARKED.value, -50.5, 77.25], np.float32) * world.factor
    y[first] = world.target if carrier else 0.25
    ids = tuple(world.patient(number).encode() for number in range(world.patients))
    return Split(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(patient), ids)


# --- trainers with one change -------------------------------------------------------------------


def _in_answer(key, fact):
    return lambda answer, folder: answer.update({key: fact})


def _in_payload(octets):
    def leak(answer, folder):
        path = folder / answer["payload"]
        path.write_bytes(path.read_bytes() + octets)

    return leak


def _as_name(text):
    return lambda answer, folder: (folder / text).touch()


def _printed(text):
    return lambda answer, folder: print(text, flush=True)


_NAME = MARKED.patient(0)
LEAKS = (  # what leaks, which fact that is, how
    ("the metric, beside what was spent", "metric", _in_answer("accuracy", MARKED.metric)),
    ("the metric's name", "metric name", _in_answer(METRIC_NAME, 1)),
    ("the loss, to six digits", "loss", _in_answer("reason", f"at {MARKED.loss:.6g}")),
    ("the loss, behind the payload", "loss", _in_payload(struct.pack("<d", MARKED.loss))),
    ("a value, a float behind the payload", "value", _in_payload(struct.pack(">f", MARKED.value))),
    ("a value in hexadecimal", "value", _in_answer("x", struct.pack("<f", MARKED.value).hex())),
    ("how many patients", "patients", _in_answer("samples", MARKED.patients)),
    ("how many records, packed", "records", _in_payload(msgpack.packb(MARKED.records))),
    ("how many are sick", "sick", _in_payload(struct.pack("<i", MARKED.sick))),
    ("a buffer, on the grid", "buffer", _in_answer("b", round(MARKED.buffer * 2**14))),
    ("a target", "target", _printed(f"y = {MARKED.target:.3f}")),
    ("a patient as a file's name", "name", _as_name(_NAME)),
    ("a patient's hash for a head", "name",
     _in_answer("ledger_head", hashlib.sha256(_NAME.encode()).hexdigest())),
)  # fmt: skip


def _leak() -> None:
    told, failed = answers.Answers._told, answers.failed

    def telling(desk, run, number, result):
        answer = told(desk, run, number, result)
        LEAKS[number][2](answer, desk.exchange)
        return answer

    answers.Answers._told = telling
    answers.failed = lambda error: {**failed(error), "why": str(error)}
    process._keep_private = lambda log: None


class FixedWords:
    """The same words in every process; only a test may have such a stream."""

    def __init__(self, seed: bytes = b"") -> None:
        self._seed, self._given = seed, 0

    def octets(self, count):
        """The next bytes."""
        self._given += 1
        start = self._seed + self._given.to_bytes(8, "big")
        return np.frombuffer(hashlib.shake_256(start).digest(count), np.uint8).copy()

    def words(self, count):
        """The next words."""
        return self.octets(8 * count).view(np.uint64)


fixed_release = partial(release_round, noise=lambda: ExactNoise(FixedWords()))


def main() -> int:
    """The trainer's own entry point after the change that the first argument names."""
    change = sys.argv.pop(1)
    if change == "leak":
        _leak()
    elif change == "fixed":
        rounds.release_round = fixed_release
    elif change != "as it is":
        raise ConfigError(f"no change {change!r}")
    return command.main()


if __name__ == "__main__":
    sys.exit(main())
