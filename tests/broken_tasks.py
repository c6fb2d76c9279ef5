"""One task per mistake, each sound but for that; and a sound one. Named as broken_tasks:NAME."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from p2pfed.errors import ConfigError
from p2pfed.training.task import HyperParameters, Split, Task, TaskData


def split(prefix, patients, *, of_each=2, y=None):
    count = patients * of_each
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
    return Split(
        x,
        (x[:, 0] > 0).float() if y is None else y,
        torch.arange(count) // of_each,
        tuple(f"{prefix}{n}".encode() for n in range(patients)),
    )


class Sound(Task):
    name = "sound"
    hyper: ClassVar[HyperParameters] = HyperParameters(local_steps=2, batch_size=4)
    monitor, larger_is_better = "accuracy", True

    def model(self):
        return nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))

    def data(self, folder, options):
        return TaskData(split("a", 6), split("b", 3))

    def loss(self, output, target):
        return binary_cross_entropy_with_logits(output, target, reduction="none")

    def metrics(self, model, patients):
        return {"accuracy": ((model(patients.x) > 0) == (patients.y > 0)).float().mean()}


class Nameless(Sound):
    name = ""


class WithoutSteps(Sound):
    hyper = HyperParameters(local_steps=0)


class WithoutLoss(Task):
    name = "without-loss"
    model, data, metrics = Sound.model, Sound.data, Sound.metrics


class ModelRaises(Sound):
    def model(self):
        raise RuntimeError("no weights here")


class ModelIsNone(Sound):
    def model(self):
        return [nn.Linear(3, 1)]


class ModelIsNan(Sound):
    def model(self):
        made = super().model()
        nn.init.constant_(made[0].weight, float("nan"))
        return made


class ModelByChance(Sound):
    def model(self):
        made = super().model()
        nn.init.constant_(made[0].weight, random.SystemRandom().random())
        return made


class ModelWithTypo(Sound):
    private_parameters = ("haed.*",)


class InHalves(Sound):
    def model(self):
        return super().model().to(torch.bfloat16)


class BatchNorm(Sound):
    def model(self):
        return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1), nn.Flatten(0))


class AtHome(Sound):
    private_parameters = ("1.*",)

    def model(self):
        return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1), nn.Flatten(0))


class DataRaises(Sound):
    def data(self, folder, options):
        return float("12,5")


class DataIsMissing(Sound):
    def data(self, folder, options):
        raise ConfigError("train.data is missing", "it must name a folder", "set it")


class DataIsNoTaskData(Sound):
    def data(self, folder, options):
        return split("a", 6), split("b", 3)


class DataHasNobody(Sound):
    def data(self, folder, options):
        return TaskData(split("a", 0), split("b", 3))


class DataIsNan(Sound):
    def data(self, folder, options):
        found = super().data(folder, options)
        found.train.x[0] = float("nan")  # after Split has looked
        return found


class PartsAreLists(Sound):
    def data(self, folder, options):
        return TaskData([1, 2], [3])


class InBothParts(Sound):
    def data(self, folder, options):
        return TaskData(split("a", 6), split("a", 3))


class OnePatient(Sound):
    def data(self, folder, options):
        return TaskData(split("a", 1, of_each=8), split("b", 3))


class Anonymous(Sound):
    def data(self, folder, options):
        found = super().data(folder, options)
        return TaskData(Split(found.train.x, found.train.y, found.train.patient), found.test)


class Named(Split):
    def patient_records(self):
        return (b"everybody",) * self.num_patients


class OneNameForAll(Sound):
    def data(self, folder, options):
        found = super().data(folder, options)
        train = found.train
        return TaskData(Named(train.x, train.y, train.patient, train.patient_ids), found.test)


class LabelsOutOfRange(Sound):
    """Three classes, and the model has two."""

    def model(self):
        return nn.Linear(3, 2)

    def data(self, folder, options):
        return TaskData(*(split(n, 6, y=torch.arange(12) % 3) for n in "ab"))

    def loss(self, output, target):
        return cross_entropy(output, target, reduction="none")

    def metrics(self, model, patients):
        return {"accuracy": (model(patients.x).argmax(1) == patients.y).float().mean()}


class LabelsOneTwo(Sound):
    def data(self, folder, options):
        return TaskData(*(split(n, 6, y=1.0 + torch.arange(12) % 2 * 9) for n in "ab"))


class LossRaises(Sound):
    def loss(self, output, target):
        raise ValueError("not today")


class LossIsMean(Sound):
    def loss(self, output, target):
        return super().loss(output, target).mean()


class LossIsFloat(Sound):
    def loss(self, output, target):
        return float(super().loss(output, target).mean())


class LossIsNan(Sound):
    def loss(self, output, target):
        return (-output.abs()).sqrt() + target


class LossOfOneIsScalar(Sound):
    def model(self):
        return nn.Linear(3, 1)

    def loss(self, output, target):
        return super().loss(output.squeeze(), target.squeeze())

    def metrics(self, model, patients):
        return {"accuracy": 0.5}


class LossRaisesOnNan(Sound):
    def loss(self, output, target):
        if torch.isnan(output).any():
            raise ValueError("the model gives NaN")
        return super().loss(output, target)


class LossChangesTargets(Sound):
    def loss(self, output, target):
        return super().loss(output, target.mul_(0.9))


class LossChangesModel(Sound):
    def model(self):
        self._made = super().model()
        return self._made

    def loss(self, output, target):
        with torch.no_grad():
            self._made[0].bias += 1
        return super().loss(output, target)


class LossOfTheBatch(Sound):
    def loss(self, output, target):
        return super().loss(output - output.mean() + 1, target)


class Detached(Sound):
    def loss(self, output, target):
        return super().loss(output.detach(), target)


class ZeroGradient(Sound):
    def loss(self, output, target):
        return super().loss(0 * output, target)


class NanGradient(Sound):
    def loss(self, output, target):
        return (0 * output).sqrt() + target


class Unused(Sound):
    def model(self):
        made = super().model()
        made[0].register_parameter("spare", nn.Parameter(torch.zeros(2)))
        return made


class Exploding(Sound):
    hyper = HyperParameters(local_steps=40, batch_size=4, learning_rate=1e30)

    def loss(self, output, target):
        return (output - target).square()


class MetricsRaise(Sound):
    def metrics(self, model, patients):
        return {"accuracy": patients.accuracy}


class MetricsAreNan(Sound):
    def metrics(self, model, patients):
        return {"accuracy": float("nan")}


class MetricsAreNumber(Sound):
    def metrics(self, model, patients):
        return 0.5


class MonitorIsMissing(Sound):
    monitor = "auc"


class MetricsChangeModel(Sound):
    def metrics(self, model, patients):
        with torch.no_grad():
            model[0].weight += 1
        return super().metrics(model, patients)


class OneByOne(Sound):
    def loss(self, output, target):
        sign = 1.0 if float(output.sum().detach()) > 1e9 else 2.0
        return sign * super().loss(output, target)


class AnotherEveryTime(Sound):
    def loss(self, output, target):
        return super().loss(output * (1 + random.SystemRandom().random()), target)


class Exits(Sound):
    def data(self, folder, options):
        sys.exit(3)


class Interrupts(Sound):
    def metrics(self, model, patients):
        raise KeyboardInterrupt


class EatsMemory(Sound):
    def loss(self, output, target):
        bytearray(1 << 50)
        return super().loss(output, target)


class Leaves(Sound):
    def data(self, folder, options):
        os._exit(4)


class Hangs(Sound):
    def loss(self, output, target):
        while True:
            time.sleep(0.01)


class Crashes(Sound):
    def metrics(self, model, patients):
        ctypes.string_at(0)


class IsKilled(Sound):
    def loss(self, output, target):
        os.kill(os.getpid(), signal.SIGKILL)


class Prints(Sound):
    def metrics(self, model, patients):
        print("patient R-1001 is ill")
        print("so is R-1002", end="")
        return super().metrics(model, patients)


class LeavesAChild(Sound):
    """A process of its own that would hold our pipes open."""

    def metrics(self, model, patients):
        child = os.fork()
        if child == 0:
            time.sleep(600)
            os._exit(0)
        Path(str(self.options["place"])).write_text(str(child))
        return super().metrics(model, patients)
