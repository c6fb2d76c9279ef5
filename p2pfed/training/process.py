"""The trainer process: requests from the node's network process in, the gate's output out.

Invariant: what crosses the control socket is what the gate released, fixed texts and public
numbers; no loss, metric, count or figure of time. Those are seen on the private socket alone (but
*when* an answer comes is seen, and tells how long the training took). What a task or a library
prints or raises goes to `trainer.log` beside that socket (0600), not to the daemon's output. A
request that cannot be read, a task that fails and memory that runs out are answered and survived.

Not here: the lines (`control`), what is answered (`answers`), what is told of an error (`guarded`),
the round itself (`round`), the private socket's server (`private_socket`).
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from p2pfed.config import Settings, load_settings
from p2pfed.errors import ConfigError, P2PFedError
from p2pfed.privacy.ledger import Ledger
from p2pfed.training.acceptance import Installed
from p2pfed.training.answers import Answers
from p2pfed.training.control import Message, Request, lines, send
from p2pfed.training.crew import Crew, same_as
from p2pfed.training.early import Plateau
from p2pfed.training.guarded import failed, words_of_the_task
from p2pfed.training.hardware import Hardware, number_of_accelerators, share_of_processors
from p2pfed.training.limits import keep_within
from p2pfed.training.private_socket import serve_private_socket
from p2pfed.training.record import Record
from p2pfed.training.round import Hospital
from p2pfed.training.task import TaskData, load_task
from p2pfed.training.vector import Vector
from p2pfed.training.watch import Watch, telling

__all__ = ["open_ledger", "serve"]

_MOST_LOG_BYTES = 1 << 20  # a longer log is begun anew by the next start
_GRACE_S = 2.0


def serve(config: Path, control_fd: int, exchange: Path) -> int:
    """Run the trainer until it is told to stop; returns the exit code.

    Args:
        config: The node's configuration file.
        control_fd: An inherited, connected Unix stream socket.
        exchange: Folder for views and payloads, shared with the network process.
    """
    with socket.socket(fileno=control_fd) as control, contextlib.ExitStack() as held:
        try:
            settings = load_settings(config)
            keep_within(settings)
            _keep_private(settings.trainer_socket.with_suffix(".log"))
            answers = held.enter_context(_opened(settings, exchange))
        except Exception as error:  # noqa: BLE001 - a hospital's data() may raise anything
            send(control, failed(error))
            if isinstance(error, P2PFedError):
                print(error, file=sys.stderr)  # noqa: T201 - the log, if it could be opened
            else:
                traceback.print_exc()
            return 1
        send(control, answers.hello)
        answered = threading.Event()
        threading.Thread(target=_leave_with, args=(control, answered), daemon=True).start()
        _Trainer(answers).answer_all(control)
        answered.set()
    return 0


def _keep_private(log: Path) -> None:
    """Let whatever is printed here go to a file of the hospital's own, and dump no core."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it would hold the patients
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    try:
        descriptor = os.open(log, flags, 0o600)
        os.fchmod(descriptor, 0o600)
        if os.fstat(descriptor).st_size > _MOST_LOG_BYTES:
            os.ftruncate(descriptor, 0)
    except OSError as error:
        raise ConfigError(f"cannot write the trainer's log {log}", error.strerror or "") from error
    for standard in (sys.stdout, sys.stderr):
        standard.flush()
        os.dup2(descriptor, standard.fileno())
    os.close(descriptor)


def _leave_with(control: socket.socket, answered: threading.Event) -> None:
    """End a round whose network process has died: the ledger's lock must be free for the next.

    Leaving at any moment is safe: the ledger stands it like a crash.
    """
    gone = select.poll()
    gone.register(control, select.POLLRDHUP | select.POLLHUP)
    gone.poll()
    if not answered.wait(_GRACE_S):
        os._exit(1)


@contextlib.contextmanager
def _opened(settings: Settings, exchange: Path) -> Iterator[Answers]:
    if not exchange.is_dir():
        raise ConfigError(f"the exchange folder {exchange} does not exist")
    train = settings.train
    hardware = Hardware.chosen(train.device, train.precision)
    world = _processes(train.gpus, hardware)
    os.environ["WORLD_SIZE"] = str(world)  # as torchrun names it; caches share the memory by it
    threads = max(1, share_of_processors() // world)
    torch.set_num_threads(threads)
    with _hospitals_code("being loaded") if ":" in train.task else contextlib.nullcontext():
        task = load_task(train.task, train.options)
    watch = Watch()
    task.note, task.own_folder = watch.note, settings.trainer_state
    record = Record(str(hardware.device), watch)
    shown = serve_private_socket(settings.trainer_socket, record.views)  # also while data are read
    with open_ledger(settings) as ledger, shown:
        with _hospitals_code("reading its data"), telling(task, watch, "reading cases"):
            data = task.data(train.data, train.options)
        watch.idle()
        with _hospitals_code("making its model"):
            installed = Installed.of(task, data)
        hospital = Hospital(
            settings,
            task,
            TaskData(data.train, data.test.on(hardware.device)),
            ledger,
            hardware=hardware,
            watch=watch,
            state=settings.trainer_state,
            installed=installed,
        )
        if world > 1 and any(isinstance(m, _BatchNorm) for m in task.model().modules()):
            watch.note("one process only: batch norm would see a part of every batch in each")
        elif world > 1:
            hospital.crew = Crew(
                settings.file,
                world,
                threads=threads,
                told=same_as(hospital.task_id, data.train.patient_records()),
                patience=train.longest_round,
                note=watch.note,
            )
        plateau = Plateau(train.patience, larger_is_better=task.larger_is_better)
        answers = Answers(hospital, exchange.resolve(), plateau, record)
        try:
            yield answers
        finally:
            hospital.end()


def _hospitals_code(doing: str) -> contextlib.AbstractContextManager[None]:
    """Where the hospital's own code runs before there is anything to answer."""
    return words_of_the_task(doing, kinds=Exception)


def _processes(wanted: int | Literal["auto"], hardware: Hardware) -> int:
    there = number_of_accelerators(hardware.device)
    if wanted == "auto":
        return there
    if hardware.device.type != "cpu" and wanted > there:
        raise ConfigError(
            f"train.gpus is {wanted}, and there are {there} of {hardware.device.type}",
            "each process has one to itself",
            "set train.gpus to auto",
        )
    return wanted


def open_ledger(settings: Settings) -> Ledger:
    """The hospital's ledger, locked for this process.

    Raises:
        ConfigError: Its folder cannot be made.
        PrivacyError: It cannot be opened, or another process has it.
    """
    if settings.privacy.ledger is None:  # a folder that the operator named is never made: it may
        folder = settings.ledger_path.parent  # be a disk that is missing, and with it a budget
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot make the ledger's folder {folder}",
                error.strerror or "",
                "set privacy.ledger",
            ) from error
    return Ledger.open(settings.ledger_path)


class _Trainer:
    """Answers requests one after the other."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    def answer_all(self, control: socket.socket) -> None:
        """Answer requests until `stop` or the end of the stream."""
        watch = self._answers.hospital.watch
        with control.makefile("rb") as stream:
            requests = lines(stream)
            while True:
                with watch.spent_on("peers"):
                    line = next(requests, b"")
                if line is None:
                    send(control, {"event": "failed", "what": "a request is over 1 MiB"})
                elif not line or not self._serve_one(control, line):
                    return

    def _serve_one(self, control: socket.socket, line: bytes) -> bool:
        """Answer one request; False when there will be no other."""
        view, number, request = None, 0, None
        try:
            request = Request(line, self._answers.exchange)
            if request.op == "stop":
                return False
            number = request.round
            answer, view = self._answer(request)
        except Exception as error:  # noqa: BLE001 - a task's code may raise anything
            answer = self._answers.failure(error, request)
        sent = send(control, answer)
        if not sent:
            print("trainer: the network process has gone", file=sys.stderr)  # noqa: T201
        if sent and view is not None:  # after the answer: peers need not wait for it
            self._answers.evaluate(number, view)
        return sent

    def _answer(self, request: Request) -> tuple[Message, Vector | None]:
        answers = self._answers
        if request.op == "evaluate":
            if request.names_run:
                answers.turn_to(request)
            view, _ = answers.read(request)
            answer = {"event": "evaluated", "round": request.round}
            if not answers.hospital.shares_metrics:
                return answer, view
            answers.evaluate(request.round, view)  # before the answer, which tells of it
            return {**answer, **answers.shared}, None
        run = answers.turn_to(request)
        refusal = answers.why_not(request, run)
        if refusal is not None and refusal["event"] != "skipped":
            return refusal, None
        view, mean = answers.read(request)
        return refusal or answers.to_round(request, run, view, mean), view
