"""Several processes for one round: one per accelerator (or, on a CPU, per share of processors).

Map: `Team` (one process's place among them; sums gradients) -> `Crew` (the trainer's side: starts
the others, gives them jobs, takes their rows) -> `follow` (what the others do).

The trainer is rank 0 and alone has the ledger, the sockets and the node. The others are processes
of the same interpreter that load the same task and data from the same configuration, and do as they
are told. What is computed is torch.distributed's: gloo between processors, nccl between GPUs, on
the loopback device. (Accelerate and torchrun do the same with more packages, and a server port.
DistributedDataParallel would sum during the backward pass, where memory that runs out in one
process can no longer be made good.)

Invariant: with one process nothing here is used. With more, local training takes the same batches
and gives the same model up to the order in which floats are summed (dropout differs by process; a
model with batch norm is not shared); contributions are the same rows, each computed by one process.
Jobs are JSON and safetensors. A process that dies, fails or hangs fails the round; the next round
has a new crew. The others end with the trainer, however it ends: each holds the end of a pipe. They
wait for the next round as long as it takes: only the trainer loses patience.

Not here: how they meet, and that nobody else is among them (`meeting`); training and contributions
themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from p2pfed.training.meeting import ANY_S, meet, talking
from p2pfed.training.patients import WHOLE, Part

__all__ = [
    "ALONE",
    "Crew",
    "Job",
    "Team",
    "end_with_the_trainer",
    "follow",
    "same_as",
    "send_rows",
    "teller",
]

SAME = "same"
_NOTES = "notes-"  # files beside the meeting, one for each of the others

_SILENCE_S = 1800.0  # that the trainer bears from another process within a round
_END_S = 3.0


@dataclass(frozen=True, slots=True)
class Team:
    """One process's place.

    Attributes:
        part: Which records of every batch, and which patients, are its own.
    """

    part: Part = WHOLE

    def share_gradients(self, parameters: Sequence[nn.Parameter], records: int) -> None:
        """Turn gradients of own sums of losses into that of the mean over all processes.

        Args:
            parameters: All of the model's, in the same order everywhere.
            records: How many losses the own sum has; may be none.

        Raises:
            RuntimeError: Another process has died or did not keep up.
        """
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        # A parameter that no loss reaches has no gradient, which is not the same as zeros.
        reached = [float(p.grad is not None) for p in parameters]
        count = torch.tensor([float(records), *reached])
        with talking():
            dist.all_reduce(count)  # through gloo, which tells of a dead process; nccl waits
            dist.all_reduce(flat)
        total, *having = count.tolist()
        flat /= total
        split = flat.split([g.numel() for g in grads])
        for parameter, part, some in zip(parameters, split, having, strict=True):
            # empty_like keeps the strides, which fused optimisers compare
            own = torch.empty_like(parameter).copy_(part.view_as(parameter)) if some else None
            parameter.grad = own


ALONE = Team()


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What all processes do at the same time.

    Attributes:
        name: "train" or "contributions".
        facts: Arguments, as JSON has them.
        tensors: Larger arguments.
    """

    name: str
    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class Crew:
    """The trainer's side; processes are started with the first job.

    Args:
        config: The node's configuration file.
        world: How many processes, the trainer included; at least two.
        threads: For each of them.
        told: What every job says besides, `same_as`: of task and patients, so that a process that
            has read others ends, and the round fails before anything is paid.
        patience: Seconds for the others to read the data once more.
        silence: Seconds within a round without a word of another process.
        note: Is given the others' notes, once at the end of each job.
    """

    def __init__(
        self,
        config: Path,
        world: int,
        *,
        threads: int,
        told: str = "",
        patience: float = 600.0,
        silence: float = _SILENCE_S,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.team = Team(Part(0, world))
        self._config, self._threads = config, threads
        self._told, self._start_s, self._silence_s = told, patience, silence
        self._note, self._noted = note, dict[Path, int]()
        self._folder: Path | None = None
        self._others: list[subprocess.Popen[bytes]] = []

    @contextlib.contextmanager
    def doing(self, job: Job) -> Iterator[Team]:
        """Have all processes do a job, this one in the block; what fails ends the crew.

        Raises:
            RuntimeError: Another process has died or did not keep up.
        """
        try:
            if not self._others:
                self._start()
            _tell(Job(job.name, {**job.facts, SAME: self._told}, job.tensors))
            yield self.team
        except BaseException:
            self._pass_on_notes()
            self.end()
            raise
        self._pass_on_notes()

    def rows(self, rank: int, num_parameters: int) -> tuple[NDArray[np.float32], int] | None:
        """The next rows of another process, and how many are unusable; None after the last.

        Raises:
            RuntimeError: It has died or did not keep up.
        """
        size = torch.zeros(2, dtype=torch.int64)
        with talking():
            dist.recv(size, src=rank)
        count, unusable = size.tolist()
        if not count:
            return None
        rows = torch.empty(count, num_parameters)
        with talking():
            dist.recv(rows, src=rank)
        return rows.numpy(), unusable

    def end(self) -> None:
        """End the others, gently where they listen."""
        for process in self._others:
            with contextlib.suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr] # it has one
        for process in self._others:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._others = []
        if self._folder is not None:
            if dist.is_initialized():
                dist.destroy_process_group()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder, self._noted = None, {}

    def _pass_on_notes(self) -> None:
        """Give what the others have noted since the last time, each text once."""
        if self._folder is None:
            return
        fresh: list[str] = []
        with contextlib.suppress(OSError):  # a note is not worth a round
            for file in sorted(self._folder.glob(f"{_NOTES}*")):
                lines = file.read_text("utf-8").splitlines()
                fresh += lines[self._noted.get(file, 0) :]
                self._noted[file] = len(lines)
        for text in dict.fromkeys(fresh):
            self._note(f"in another process of the trainer: {text}")

    def _start(self) -> None:
        if dist.is_initialized():
            raise RuntimeError("this process works with others already: it can have one crew")
        self._folder = Path(tempfile.mkdtemp(prefix="p2pfed-crew-"))  # 0700
        meeting = self._folder / "meeting"
        world = self.team.part.world
        for rank in range(1, world):
            command = [sys.executable, "-P", "-m", "p2pfed.training", "worker"]
            command += ["--config", str(self._config), "--meeting", str(meeting)]
            command += ["--rank", str(rank), "--world", str(world)]
            command += ["--threads", str(self._threads)]
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}  # torchrun's
            environment = os.environ | {name: str(value) for name, value in names.items()}
            # Standard output and error are the trainer's: its log.
            process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)  # noqa: S603
            self._others.append(process)
        self._wait_for_them()
        meet(meeting, self.team.part, self._silence_s)

    def _wait_for_them(self) -> None:
        """Until each has read its data, and put a file beside the meeting; at once if one dies."""
        assert self._folder is not None
        until = time.monotonic() + self._start_s
        while len(list(self._folder.glob("ready-*"))) < len(self._others):
            dead = [p.returncode for p in self._others if p.poll() is not None]
            if dead or time.monotonic() > until:
                how = f"exit status {dead[0]}" if dead else f"not ready in {self._start_s:g} s"
                raise RuntimeError(f"another process of the trainer did not start: {how}")
            time.sleep(0.05)


def follow(
    meeting: Path, part: Part, jobs: Mapping[str, Callable[[Job, Team], None]], *, told: str = ""
) -> None:
    """Do jobs as they come; the process ends with the trainer (`end_with_the_trainer`).

    Args:
        meeting: File through which the processes meet.
        part: Which of them this is.
        jobs: What to do by name.
        told: What `same_as` says of this process's task and patients.

    Raises:
        RuntimeError: The trainer has another task or other patients, or there is none any more.
    """
    meeting.with_name(f"ready-{part.rank}").touch()
    meet(meeting, part, ANY_S)
    while True:
        job = _told()
        facts = dict(job.facts)
        if facts.pop(SAME) != told:
            raise RuntimeError("this process has read another task or other patients")
        jobs[job.name](Job(job.name, facts, job.tensors), Team(part))


def teller(meeting: Path, rank: int) -> Callable[[str], None]:
    """What gives one of the others' notes to the trainer, for its `Watch`.

    They go through a file of the private folder: when a job ends in the trainer, the others have
    been heard on what they computed for it, and what they noted before lies there.
    """

    def tell(text: str) -> None:
        place = meeting.with_name(f"{_NOTES}{rank}")
        with contextlib.suppress(OSError), place.open("a", encoding="utf-8") as file:
            file.write(" ".join(text.splitlines()) + "\n")

    return tell


def same_as(task_id: bytes, patients: Sequence[bytes]) -> str:
    """A hash that is equal where task and patients are, in this order.

    Without it a patient who was added between two processes' reading would move the others' places,
    and be counted by two of them.
    """
    whole = hashlib.blake2b(task_id, digest_size=32, person=b"p2pfed-crew")
    for record in patients:
        whole.update(len(record).to_bytes(8, "big") + hashlib.blake2b(record).digest())
    return whole.hexdigest()


def send_rows(rows: NDArray[np.float32], unusable: int) -> None:
    """Hand rows to the trainer; none says that there are no more.

    Raises:
        RuntimeError: The trainer has gone.
    """
    with talking():
        dist.send(torch.tensor([len(rows), unusable]), dst=0)
        if len(rows):
            dist.send(torch.from_numpy(np.ascontiguousarray(rows)), dst=0)


def end_with_the_trainer() -> None:
    """End this process as soon as the trainer does, from any moment on and whatever it is doing."""

    def wait() -> None:
        while os.read(0, 1):  # the trainer writes nothing: this returns when it closes or dies
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _tell(job: Job) -> None:
    head = json.dumps({"name": job.name, "facts": job.facts}).encode()
    body = safetensors.torch.save(dict(job.tensors))
    with talking():
        dist.broadcast(torch.tensor([len(head), len(body)]), src=0)
        dist.broadcast(torch.frombuffer(bytearray(head + body), dtype=torch.uint8), src=0)


def _told() -> Job:
    sizes = torch.zeros(2, dtype=torch.int64)
    with talking():
        dist.broadcast(sizes, src=0)
    head, body = sizes.tolist()
    data = torch.empty(head + body, dtype=torch.uint8)
    with talking():
        dist.broadcast(data, src=0)
    said = json.loads(data[:head].numpy().tobytes())
    return Job(said["name"], said["facts"], safetensors.torch.load(data[head:].numpy().tobytes()))
