"""What a dry run of a task looks at, one step after the other; see `check`.

Map: `Bench` (what a step leaves for later ones) -> `steps_of` a task -> the steps: functions that
look and yield rows. Steps that train are in `check_training`.

Here: the device, the task and its model, the hospital's patients, and bytes per exchange.
"""

from __future__ import annotations

import inspect
import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from p2pfed.training.check import Row, Subject, Tell, ToldWatch
from p2pfed.training.hardware import Hardware
from p2pfed.training.local import initial_vector
from p2pfed.training.loop_task import LOOP, load_either
from p2pfed.training.patients import Patients, Split, TaskData
from p2pfed.training.task import HyperParameters, Task, task_id
from p2pfed.training.vector import Vector, num_parameters, saved_buffers, shared_parameters
from p2pfed.wire.payload import max_payload_bytes

__all__ = [
    "Bench",
    "buffers",
    "data",
    "device",
    "exchange",
    "memory",
    "model",
    "patients",
    "ranges",
    "seconds",
    "size",
    "task",
]

_SEED = 0
_GROUPS = 100  # of patients alike, whose records are counted


class Bench:
    """What the steps share.

    Attributes:
        subject: What is checked.
        watch: Passes progress on.
        hardware, task, vector, data: Set by the steps of these names.
        per_round: Seconds of local training per round, set when they are known.
    """

    hardware: Hardware
    task: Task
    vector: Vector
    data: TaskData[Any]

    def __init__(self, subject: Subject, tell: Tell) -> None:
        self.subject = subject
        self.watch = ToldWatch(tell)
        self.is_loop = subject.task.startswith(f"{LOOP}:")

    def take(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors on the device."""
        return tuple(self.hardware.take(*tensors))


def device(bench: Bench) -> Iterator[Row]:
    """What would be computed with."""
    subject = bench.subject
    bench.hardware = Hardware.chosen(subject.device, subject.precision)
    where, threads = bench.hardware.device, torch.get_num_threads()
    name = f"{where.type}, {threads} thread{'s' * (threads > 1)}"
    if where.type == "cuda":
        name = f"{where}, {torch.cuda.get_device_name(where)}"
        torch.cuda.reset_peak_memory_stats(where)
    halves = "bf16" if bench.hardware.autocast else "float32"
    yield Row("device", "ok", f"{name}, {halves}", facts={"device": where.type})


def task(bench: Bench) -> Iterator[Row]:
    """Does it load, and is it complete?"""
    spec = bench.subject.task
    found = load_either(spec, bench.subject.options)
    bench.task = found
    kind = type(found)
    name: Any = getattr(found, "name", None)  # of the instance: a bundle's follows from its options
    if not isinstance(name, str) or not name:
        yield Row("task", "FAIL", f"{kind.__name__} has no name", 'write name = "..." into it')
        return
    hyper: Any = found.hyper
    if not isinstance(hyper, HyperParameters):
        yield Row("task", "FAIL", "hyper is no HyperParameters", "write HyperParameters(...)")
        return
    wrong = [key for key in ("local_steps", "batch_size") if getattr(hyper, key) < 1]
    if wrong or not hyper.learning_rate > 0:
        what = wrong[0] if wrong else "learning_rate"
        yield Row("task", "FAIL", f"hyper.{what} is not above 0", "correct `hyper`")
        return
    found.progress = lambda done, of: bench.watch.progress("reading", done, of)
    where = "a loop's model" if bench.is_loop else f"{kind.__name__} in {_file(kind)}"
    yield Row("task", "ok", f"{name}: {where}", facts={"name": name})


def _file(kind: type) -> str:
    return Path(inspect.getfile(kind)).name


def model(bench: Bench) -> Iterator[Row]:
    """How large is it, what stays at home, and what do hospitals compare?"""
    task = bench.task
    made: Any = task.model()
    if not isinstance(made, nn.Module):
        yield Row("model", "FAIL", f"model() gives a {type(made).__name__}", "return a nn.Module")
        return
    private = task.private_parameters
    bench.vector = initial_vector(task, seed=_SEED)
    count, shared = num_parameters(made, private), shared_parameters(made, private)
    home = sum(p.numel() for p in made.parameters()) - count
    if not np.isfinite(bench.vector).all():
        yield Row("model", "FAIL", "its first values hold NaN or infinity", "correct `model`")
        return
    at_home = f"; {home:,} stay at home ({', '.join(private)})" if private else ""
    yield Row(
        "model",
        "ok",
        f"{count:,} parameters in {len(shared)} tensors are shared{at_home}",
        facts={"num_parameters": count, "private_parameters": home},
    )
    identity = task_id(task).hex()
    yield Row("task id", "ok", f"{identity[:16]}…", facts={"task_id": identity})
    again = initial_vector(task, seed=_SEED)
    if np.array_equal(bench.vector, again):
        yield Row("first model", "ok", "the same twice from one seed")
    else:
        yield Row(
            "first model",
            "warn",
            "two first models of one seed differ",
            "draw every first value from torch's generator",
        )
    narrow = sorted(n for n, p in shared if p.dtype not in (torch.float32, torch.float64))
    if narrow:
        yield Row(
            "first model",
            "warn",
            f"{narrow[0]} is not float32: what is shared is rounded in every round",
            "keep the model in float32; train.precision says what is computed in",
        )


def buffers(bench: Bench) -> Iterator[Row]:
    """Has the model state besides its parameters?"""
    found = list(saved_buffers(bench.task.model()))
    if not found:
        yield Row("buffers", "ok", "none", facts={"buffers": 0})
        return
    some = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
    yield Row(
        "buffers",
        "warn",
        f"{len(found)} (batch norm and the like) stay at home: {some}",
        "a run that protects single patients refuses them: use GroupNorm or InstanceNorm",
        {"buffers": len(found)},
    )


def data(bench: Bench) -> Iterator[Row]:
    """Can the hospital's data be read, and what are its records?"""
    task, subject = bench.task, bench.subject
    began = time.monotonic()
    found: Any = task.data(subject.data, subject.options)
    took = time.monotonic() - began
    if not isinstance(found, TaskData):
        kind = type(found).__name__
        yield Row("data", "FAIL", f"data() gives a {kind}", "return TaskData(train=..., test=...)")
        return
    for name in ("train", "test"):
        part = getattr(found, name)
        if not isinstance(part, Patients):
            what = f"{name} is a {type(part).__name__}"
            yield Row("data", "FAIL", what, "give a Split or another Patients")
            return
    bench.data = found
    train, test = found.train.num_patients, found.test.num_patients
    yield Row(
        "data",
        "ok",
        f"{train} patients train ({_records(found.train)}), {test} test"
        f" ({_records(found.test)}); read in {seconds(took)}",
        facts={"train": train, "test": test, "seconds": took},
    )
    x, y = next(found.train.batches(task.hyper.batch_size, seed=_SEED))
    if len(x) != len(y) or len(x) == 0:
        what = f"a batch has {len(x)} inputs and {len(y)} targets"
        yield Row("records", "FAIL", what, "every record needs one target")
        return
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        yield Row("records", "FAIL", "x holds NaN or infinity", "drop or impute it in data()")
        return
    yield Row("records", "ok", f"x: {_kind(x)}; y: {_kind(y)} {ranges(found.train, y)}")


def _kind(tensor: Tensor) -> str:
    shape = " x ".join(map(str, tensor.shape[1:])) or "one number"
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')}"


def ranges(patients: Patients, y: Tensor) -> str:
    """From where to where targets go; of all where they are in memory."""
    values = patients.y if isinstance(patients, Split) else y
    return f"from {values.min().item():g} to {values.max().item():g}"


def _records(patients: Patients) -> str:
    """How many records; looked at once per shape."""
    groups = patients.alike()
    if not groups or len(groups) > _GROUPS:
        return "of many shapes" if groups else "one contribution"
    each = [patients.stacked([g[0]], seed=_SEED)[0].shape[1] for g in groups]
    total = sum(len(group) * count for group, count in zip(groups, each, strict=True))
    return f"{total} record{'s' * (total != 1)}"


def patients(bench: Bench) -> Iterator[Row]:
    """Does the ledger know who is who, and is nobody in both parts?"""
    found = list(_doubts(bench.data))
    yield from found or [Row("patients", "ok", "each in one part, and known by name")]


def _doubts(data: TaskData[Any]) -> Iterator[Row]:
    train = data.train
    names = {"train": train.patient_records(), "test": data.test.patient_records()}
    yield from _distinct("train", names["train"], train)
    yield from _distinct("test", names["test"], data.test)
    both = len(set(names["train"]) & set(names["test"]))
    if both:
        yield Row(
            "patients",
            "FAIL",
            f"{both} are in train and in test: the test would not be one",
            "split by patient, not by record",
            {"in_both": both},
        )
    if train.num_patients == 1:
        yield Row(
            "patients",
            "warn",
            "one patient only trains: the hospital's update is that patient's",
            "take part when there are more",
        )
    if train.named_by_files:
        yield Row(
            "patients",
            "warn",
            "no patients.csv: to the ledger each case is a patient, known by the files' name",
            "before the first run, say who is who: a second scan or a renamed file is a new patient"
            " with a new budget",
        )
    if isinstance(train, Split) and not train.patient_ids:
        yield Row(
            "patients",
            "warn",
            "no patient_ids: whose record is corrected is a new patient with a new budget",
            "give Split the hospital's record numbers, the same in all tasks",
        )


def _distinct(part: str, names: tuple[bytes, ...], of: Patients) -> Iterator[Row]:
    if not all(isinstance(name, bytes) for name in names):
        do = "encode them: name.encode()"
        yield Row("patients", "FAIL", f"{part}: a patient's name is not bytes", do)
    elif len(names) != of.num_patients:
        what = f"{part}: {len(names)} names for {of.num_patients} patients"
        yield Row("patients", "FAIL", what, "one name per patient, in their order")
    elif len(set(names)) != len(names):
        same = len(names) - len(set(names))
        named = not isinstance(of, Split) or bool(of.patient_ids)
        what = f"{part}: {same} patients have another one's {'name' if named else 'records'}"
        do = "number the patients by their ids, not their records"
        yield Row("patients", "FAIL" if named else "warn", what, do)


def exchange(bench: Bench) -> Iterator[Row]:
    """Bytes that one update of this hospital takes, per receiver."""
    count = int(bench.vector.size)
    facts = {
        f"{width}_{name}": max_payload_bytes(count, max(1, math.ceil(count * share)), width)
        for width in ("int16", "int8")
        for name, share in (("dense", 1.0), ("10_percent", 0.1), ("1_percent", 0.01))
    }
    found = ", ".join(
        f"{size(facts[f'int16_{key}'])}{of} (int8: {size(facts[f'int8_{key}'])})"
        for of, key in (
            (" whole", "dense"),
            (" with 10 % of the values", "10_percent"),
            (" with 1 %", "1_percent"),
        )
    )
    yield Row("exchange", "ok", f"an update: {found}", facts=facts)


def memory(bench: Bench) -> Iterator[Row]:
    """The most that this process has taken so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    facts, found = {"peak_bytes": peak}, f"at most {size(peak)}"
    where = bench.hardware.device
    if where.type == "cuda":
        facts["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(where)
        found += f", and {size(facts['peak_gpu_bytes'])} on the GPU"
    yield Row("memory", "ok", found, facts=facts)


def size(count: float) -> str:
    """Bytes with three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def seconds(span: float) -> str:
    """A time with two digits."""
    if span < 0.0995:
        return f"{span * 1000:.2g} ms"
    return f"{span:.2g} s" if span < 99.5 else f"{span:.0f} s"
