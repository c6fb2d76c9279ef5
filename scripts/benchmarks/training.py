"""Local training: steps against a plain loop and on the device, patients, caches, hand-over."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import training_handover
from goals import Goal, tell
from rows import Row, interleaved, parser
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from p2pfed.tasks.hippocampus import Hippocampus
from p2pfed.tasks.phantoms import write_phantoms
from p2pfed.tasks.segmentation import Plan
from p2pfed.training.contributions import PatientContributions
from p2pfed.training.hardware import Hardware
from p2pfed.training.local import initial_vector, train_local
from p2pfed.training.task import HyperParameters, Options, Patients, Split, Task, TaskData
from p2pfed.training.vector import set_vector

PHANTOMS = 16
STEPS = {"tabular": 2000, "imaging": 40}
BATCH = {"tabular": 32, "imaging": 2}
STEP, CACHED, VECTORISED, COMPUTING = 1.05, 1 / 5, 3.0, 0.9  # goals


class Tabular(Task):
    """30 measures of 2000 patients, one record each, for a network of two hidden layers."""

    name = "tabular"
    hyper: ClassVar[HyperParameters] = HyperParameters(batch_size=32, learning_rate=0.05)

    def model(self) -> nn.Module:
        """30 -> 64 -> 64 -> 1; 6,209 parameters."""
        hidden = [nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(64, 1), nn.Flatten(0))

    def data(self, folder: Path | None, options: Options) -> TaskData[Split]:  # noqa: ARG002
        """The label is the sign of the first measure."""
        x = torch.randn(2000, 30, generator=torch.Generator().manual_seed(0))
        split = Split(x, (x[:, 0] > 0).float(), torch.arange(2000))
        return TaskData(split, split)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy."""
        return binary_cross_entropy_with_logits(output, target, reduction="none")

    def metrics(self, model: nn.Module, patients: Split) -> dict[str, float]:
        """Nothing that is looked at here."""
        return {"loss": float(self.loss(model(patients.x), patients.y).mean())}


def main() -> int:
    """Measure and print; returns the exit code."""
    options = parser(__doc__)
    options.add_argument("--times", type=int, default=7, help="measures per figure")
    options.add_argument("--sizes", type=int, nargs="+", default=[10_000_000, 100_000_000])
    args = options.parse_args()
    tell(training_handover.rows(args.sizes), as_json=args.json)
    torch.set_num_threads(1)
    imaging = Hippocampus()
    imaging.options = {"phantoms": PHANTOMS}
    tasks: dict[str, tuple[Task, TaskData[Any]]] = {
        "tabular": (Tabular(), Tabular().data(None, {})),
        "imaging": (imaging, imaging.data(None, imaging.options)),
    }
    for name, (task, data) in tasks.items():
        tell(steps(name, task, data.train, args.times), as_json=args.json)
    tell(computing(args.times), as_json=args.json)
    tell(vectorised(*tasks["tabular"], name="tabular", times=args.times), as_json=args.json)
    tell(vectorised(*tasks["imaging"], name="imaging", times=3), as_json=args.json)
    with tempfile.TemporaryDirectory(prefix="p2pfed-bench-") as folder:
        tell(cached(Path(folder)), as_json=args.json)
        tell(starts(Path(folder)), as_json=args.json)
    return 0


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def steps(name: str, task: Task, patients: Patients, times: int) -> list[Row]:
    """Seconds of a local step through the Task path and in a loop as it stands in textbooks."""
    vector, count, size = initial_vector(task, seed=0), STEPS[name], BATCH[name]
    rate = task.hyper.learning_rate

    def ours() -> None:
        how = {"steps": count, "learning_rate": rate, "batch_size": size}
        train_local(task, patients, vector, seed=1, **how)  # type: ignore[arg-type]

    def plain() -> None:
        model = task.model()
        set_vector(model, vector)
        optimizer = task.optimizer(model.parameters(), learning_rate=rate, fused=False)
        batches = patients.batches(size, seed=1)
        for _ in range(count):
            x, y = next(batches)
            optimizer.zero_grad()
            task.loss(model(x), y).mean().backward()
            optimizer.step()

    mine, theirs = interleaved([lambda: _seconds(ours), lambda: _seconds(plain)], times)
    per = 1e3 / count
    path, ratio = f"training/{name}/step", mine / theirs
    return [Goal(path, mine * per, "ms", "plain loop", ratio, "lower", goal=STEP)]


class Wide(Hippocampus):
    """The same with patches that a GPU has room for; volumes that are smaller are padded."""

    name: ClassVar[str] = "hippocampus-wide"

    def plan(self) -> Plan:
        """As of `Hippocampus`, but for the patch."""
        return replace(super().plan(), patch=(96, 96, 96))


def computing(times: int) -> list[Row]:
    """Which share of local steps the device computes: what they take with batches that lie there.

    On whatever `train.device = "auto"` means here; the goal is one of GPUs.
    """
    hardware = Hardware.chosen()
    on_gpu = hardware.device.type != "cpu"
    task, count = (Wide() if on_gpu else Hippocampus()), STEPS["imaging"]
    task.options = {"phantoms": PHANTOMS}
    patients, vector = task.data(None, task.options).train, initial_vector(task, seed=0)
    ahead = patients.batches(BATCH["imaging"], seed=1)
    there = [tuple(hardware.take(*next(ahead))) for _ in range(PHANTOMS)]
    held = SimpleNamespace(batches=lambda *_, **__: itertools.cycle(there))

    def trained(some: Any) -> Callable[[], float]:
        how = {"steps": count, "batch_size": BATCH["imaging"], "hardware": hardware}
        return lambda: _seconds(lambda: train_local(task, some, vector, seed=1, **how))

    trained(held)()  # a GPU's first steps choose their kernels
    alone, whole = interleaved([trained(held), trained(patients)], times)
    path, goal = f"training/imaging/{hardware.device.type}/computing", COMPUTING if on_gpu else None
    share = alone / whole
    return [Goal(path, 1e3 * alone / count, "ms", "whole step", share, "higher", goal=goal)]


def vectorised(task: Task, data: TaskData[Any], *, name: str, times: int) -> list[Row]:
    """One contribution per patient: all at once, one by one, and the plain gradient of all."""
    vector, patients = initial_vector(task, seed=0), data.train
    contributions = PatientContributions(task, vector, patients)
    model = task.model()
    set_vector(model, vector)
    everybody = [number for group in patients.alike() for number in group]
    size = 32 if name == "tabular" else 1
    row = torch.empty(len(vector))

    def ours() -> None:
        for _ in contributions.chunks():
            pass

    def backward(some: Sequence[int]) -> None:
        x, y = patients.stacked(some, seed=0)
        model.zero_grad(set_to_none=True)
        task.loss(model(x.flatten(0, 1)), y.flatten(0, 1)).mean().backward()

    def by_hand() -> None:
        for number in everybody:
            backward([number])
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            torch.cat(gradients, out=row)

    def batches() -> None:
        for start in range(0, len(everybody), size):
            backward(everybody[start : start + size])

    at_once, one_by_one, batch = interleaved(
        [lambda: _seconds(ours), lambda: _seconds(by_hand), lambda: _seconds(batches)], times
    )
    path, speed = f"training/{name}/private_round", one_by_one / at_once
    goal = VECTORISED if name == "tabular" else None
    return [
        Goal(f"{path}/speed", speed, "x", "a loop by hand", speed, "higher", goal=goal),
        Row(path, 1e3 * at_once, "ms", "steps without protection", at_once / batch, "lower"),
    ]


def cached(folder: Path) -> list[Row]:
    """One patch of every patient: from volumes in memory, on disk, and read anew each time."""
    write_phantoms(folder / "phantoms", PHANTOMS)
    task, places = Hippocampus(), {"cache_folder": str(folder / "cache")}
    ways = {
        mode: task.data(folder / "phantoms", {"cache": mode, **places}).train
        for mode in ("off", "memory", "disk")
    }

    def epoch(patients: Patients) -> None:
        next(patients.batches(patients.num_patients, seed=0))

    measures = [lambda each=each: _seconds(lambda: epoch(each)) for each in ways.values()]
    off, memory, disk = interleaved(measures, 7)
    return [
        Row("training/data/uncached", 1e3 * off, "ms"),
        Goal(
            "training/data/memory",
            1e3 * memory,
            "ms",
            "uncached",
            memory / off,
            "lower",
            goal=CACHED,
        ),
        Row("training/data/disk", 1e3 * disk, "ms", "uncached", disk / off, "lower"),
    ]


def starts(folder: Path) -> list[Row]:
    """From the start of a trainer process to its greeting, against the import of torch alone."""
    exchange, config = folder / "exchange", folder / "p2pfed.toml"
    exchange.mkdir()
    config.write_text(
        '[node]\nname = "bench"\ndata_dir = "."\n[train]\ntask = "breast-cancer"\n'
        'options = { site = 0 }\n[privacy]\nepsilon = 8\nledger = "ledger.db"\n'
    )

    def greeting() -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "p2pfed.training", "serve", "--config", str(config)]
        command += ["--control-fd", str(theirs.fileno()), "--exchange", str(exchange)]
        with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as process:
            theirs.close()
            hello = ours.makefile("rb").readline()
            assert b'"ready"' in hello, hello
            ours.sendall(b'{"op": "stop"}\n')
            process.wait()

    def torch_alone() -> None:
        subprocess.run([sys.executable, "-c", "import torch"], check=True)

    ready, bare = interleaved([lambda: _seconds(greeting), lambda: _seconds(torch_alone)], 5)
    return [Row("training/start", ready, "s", "import torch", ready / bare, "lower")]


if __name__ == "__main__":
    sys.exit(main())
