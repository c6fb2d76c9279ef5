"""The trainer process: requests from the node's network process in, the gate's output out.

Control is newline-delimited JSON, one object of at most 1 MiB per line, over an inherited socket;
vectors and payloads are files in the exchange folder. Requests: `round`, `evaluate`, `stop`; the
end of the stream is a `stop`. Every request gets one answer, an object with `event`.

Invariant: what crosses the control socket is what the gate released, fixed texts and public
numbers; no loss, metric, count or figure of time. Those are seen on the private socket alone (but
*when* an answer comes is seen, and tells how long the training took). What a task or a library
prints goes to `trainer.log` beside that socket (0600), not to the daemon's output. A request that
cannot be read, a task that fails and memory that runs out are answered and survived.

Not here: the round itself (`round`), the private socket's server (`private_socket`).
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, assert_never

import torch

from p2pfed.config import Settings, load_settings
from p2pfed.errors import ConfigError, P2PFedError, PrivacyError
from p2pfed.identity.run import Run
from p2pfed.privacy.ledger import Ledger
from p2pfed.training.local import evaluate
from p2pfed.training.private_socket import serve_private_socket
from p2pfed.training.round import (
    Exhausted,
    Hospital,
    Refused,
    Released,
    RoundResult,
    Skipped,
)
from p2pfed.training.task import load_task
from p2pfed.training.vector import Vector, read_view

__all__ = ["serve"]

Message = dict[str, Any]

_MOST_LINE_BYTES = 1 << 20
_MOST_LOG_BYTES = 1 << 20  # a longer log is begun anew by the next start
_KEPT_ROUNDS = 1000
_GRACE_S = 2.0
_ROLLED_BACK = (
    "the ledger is older than what this node has released (a restored copy?); "
    "restore the newest ledger, or ask the stewards for a new membership"
)


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
            _keep_private(settings.trainer_socket.with_suffix(".log"))
            trainer = held.enter_context(_opened(settings, exchange))
        except Exception as error:  # noqa: BLE001 - a hospital's data() may raise anything
            _send(control, _failed(error))
            if not isinstance(error, P2PFedError):
                traceback.print_exc()
            return 1
        hospital = trainer.hospital
        _send(
            control,
            {
                "event": "ready",
                "task": hospital.task.name,
                "task_id": hospital.task_id.hex(),
                "num_parameters": hospital.num_parameters,
                "device": str(hospital.device),
            },
        )
        answered = threading.Event()
        threading.Thread(target=_leave_with, args=(control, answered), daemon=True).start()
        trainer.answer_all(control)
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
def _opened(settings: Settings, exchange: Path) -> Iterator[_Trainer]:
    if not exchange.is_dir():
        raise ConfigError(f"the exchange folder {exchange} does not exist")
    # One core's worth stays free for the network process.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    device = _device(settings.train.device)
    task = load_task(settings.train.task)
    data = task.data(settings.train.data, settings.train.options)
    if settings.privacy.ledger is None:  # a folder that the operator named is never made: it may
        _make_folder(settings.ledger_path.parent)  # be a disk that is missing, and with it a budget
    with Ledger.open(settings.ledger_path) as ledger:
        hospital = Hospital(settings, task, data, ledger, device=device)
        trainer = _Trainer(hospital, exchange.resolve())
        with serve_private_socket(settings.trainer_socket, trainer.record.views):
            yield trainer


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the ledger's folder {folder}", error.strerror or "", "set privacy.ledger"
        ) from error


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is cuda and there is none", "", "use auto or cpu")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


@dataclass(slots=True)
class _PrivateRecord:
    """What the hospital alone may see; written by the trainer, read by the private socket."""

    device: str
    metrics: deque[Message] = field(default_factory=lambda: deque(maxlen=_KEPT_ROUNDS))
    rounds: deque[Message] = field(default_factory=lambda: deque(maxlen=_KEPT_ROUNDS))
    ledger: Message = field(default_factory=dict)
    problem: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def views(self) -> Mapping[str, Any]:
        return {
            "/v1/status": lambda: self._copy(
                {"device": self.device, "rounds": self.rounds, "problem": self.problem}
            ),
            "/v1/metrics": lambda: self._copy({"metrics": self.metrics}),
            "/v1/ledger": lambda: self._copy(self.ledger),
        }

    def _copy(self, shown: Message) -> Message:
        with self.lock:
            return {k: list(v) if isinstance(v, deque) else v for k, v in shown.items()}


class _Trainer:
    def __init__(self, hospital: Hospital, exchange: Path) -> None:
        self.hospital = hospital
        self.record = _PrivateRecord(str(hospital.device))
        self._exchange = exchange
        self._test = hospital.data.test.to(hospital.device)
        self._show_ledger()

    def answer_all(self, control: socket.socket) -> None:
        """Answer requests until `stop` or the end of the stream."""
        with control.makefile("rb") as stream:
            while line := stream.readline(_MOST_LINE_BYTES + 1):
                if len(line) > _MOST_LINE_BYTES:
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(_MOST_LINE_BYTES)
                    _send(control, {"event": "failed", "what": "a request is over 1 MiB"})
                    continue
                if not self._serve_one(control, line):
                    return

    def _serve_one(self, control: socket.socket, line: bytes) -> bool:
        """Answer one request; False when there will be no other."""
        view, number = None, 0
        try:
            request = _Request(line, self._exchange)
            if request.op == "stop":
                return False
            number = request.round
            answer, view = self._answer(request)
        except Exception as error:  # noqa: BLE001 - a task's code may raise anything
            self._note(error)
            answer = _failed(error)
        sent = _send(control, answer)
        if sent and view is not None:  # after the answer: peers need not wait for it
            self._evaluate(number, view)
        return sent

    def _answer(self, request: _Request) -> tuple[Message, Vector | None]:
        if request.op == "evaluate":
            view, _ = read_view(request.view, self.hospital.num_parameters)
            return {"event": "evaluated", "round": request.round}, view
        run = Run.decode(request.text("run").encode())
        if not self.hospital.ledger.knows(request.heads()):
            return {"event": "rolled-back", "round": request.round, "reason": _ROLLED_BACK}, None
        started = time.monotonic()
        view, mean = read_view(request.view, self.hospital.num_parameters)
        loaded = time.monotonic()
        facts: Message = {"samples": request.whole("samples"), "scale": request.scale, "mean": mean}
        try:
            result = self.hospital.run_round(run, request.round, view, **facts)
        except PrivacyError:  # the ledger's own words
            raise
        except P2PFedError as error:  # a task's words are its own, whatever type it gives them
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        answer = self._told(run, request.round, result)
        split = {"load": loaded - started, "train_and_release": time.monotonic() - loaded}
        with self.record.lock:
            self.record.rounds.append(
                {
                    "round": request.round,
                    "run": run.name,
                    "seconds": split,
                    "event": answer["event"],
                    "unusable_patients": self.hospital.unusable,
                }
            )
        self._show_ledger()
        return answer, view

    def _told(self, run: Run, number: int, result: RoundResult) -> Message:
        where = {"round": number, "run_id": run.run_id.hex()}
        match result:
            case Released():
                path = self._exchange / f"{run.run_id.hex()[:16]}-{number}.payload"
                partial = path.with_suffix(".partial")
                partial.write_bytes(result.payload)
                partial.replace(path)
                told = {"event": "released", "payload": path.name, "mechanism": result.mechanism}
                left = {"saturated": result.saturated, "releases_left": result.releases_left}
                return {**where, **told, **_spent(result), **left}
            case Exhausted():
                told = {"event": "exhausted", "reason": result.reason}
                return {**where, **told, **_spent(result), "releases_left": 0}
            case Skipped():
                return {**where, "event": "skipped", "reason": result.reason}
            case Refused():
                return {**where, "event": "refused", "reason": result.reason}
            case _:
                assert_never(result)

    def _evaluate(self, number: int, view: Vector) -> None:
        try:
            values = evaluate(self.hospital.task, view, self._test)
            shown = {name: float(value) for name, value in values.items()}
        except Exception as error:  # noqa: BLE001 - a task's metrics() may raise anything
            self._note(error)
            return
        with self.record.lock:
            self.record.metrics.append({"round": number, "values": shown})

    def _note(self, error: Exception) -> None:
        """Keep the whole text for the private socket; the answer has only its public part."""
        if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available():
            torch.cuda.empty_cache()
        with self.record.lock:
            self.record.problem = f"{type(error).__name__}: {error}"

    def _show_ledger(self) -> None:
        hospital, spent = self.hospital, self.hospital.spent
        shown = {
            "spent": {"nano_rho": spent.rho_nano, "epsilon": spent.epsilon},
            "limit": {"nano_rho": hospital.budget.rho_nano, "epsilon": hospital.budget.epsilon},
            "delta": hospital.budget.delta,
            "releases": spent.releases,
            "unprotected": spent.unprotected,
            "head": spent.head.hex(),
            "entries": [
                {"seq": e.seq, "kind": e.kind, "at": e.at, "chain": e.chain.hex(), **e.detail}
                for e in hospital.ledger.entries()
            ],
        }
        with self.record.lock:
            self.record.ledger = shown


class _Request:
    """One line from the network process, checked."""

    def __init__(self, line: bytes, exchange: Path) -> None:
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            raise ConfigError("a request is not a JSON object")
        self._data: Message = data
        self.op = self.text("op")
        if self.op not in {"round", "evaluate", "stop"}:
            raise ConfigError(f"no request {self.op[:40]!r}")
        if self.op == "stop":
            return
        self.round = self.whole("round")
        self.view = (exchange / self.text("view")).resolve()
        if self.view.parent != exchange:
            raise ConfigError("the view is not in the exchange folder")

    @property
    def scale(self) -> Fraction:
        """Two whole numbers, at most 2**53, the second not 0."""
        below = self.whole("scale_of")
        if below == 0:
            raise ConfigError("the request's scale_of is 0")
        return Fraction(self.whole("scale"), below)

    def text(self, key: str) -> str:
        value = self._data.get(key)
        if not isinstance(value, str):
            raise ConfigError(f"the request's {key} is not a text")
        return value

    def whole(self, key: str) -> int:
        value = self._data.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 53:
            raise ConfigError(f"the request's {key} is not a whole number")
        return value

    def heads(self) -> list[bytes]:
        """Ledger heads that peers have seen, signed by this node."""
        value = self._data.get("heads", [])
        if not isinstance(value, list):
            raise ConfigError("the request's heads are not a list")
        try:
            return [bytes.fromhex(head) for head in value]
        except (TypeError, ValueError) as error:
            raise ConfigError("the request's heads are not hexadecimal") from error


def _spent(result: Released | Exhausted) -> Message:
    return {
        "spent_nano_rho": result.spent_nano_rho,
        "spent_epsilon": result.spent_epsilon,
        "releases": result.releases,
        "ledger_head": result.ledger_head.hex(),
    }


def _failed(error: Exception) -> Message:
    """What the network process may know of a failure: our own texts, never a stranger's."""
    if isinstance(error, P2PFedError):
        told = {"what": error.what, "why": error.why, "do": error.do}
    elif isinstance(error, MemoryError | torch.OutOfMemoryError):
        told = {"what": "the trainer ran out of memory", "why": "", "do": "use a smaller batch"}
    else:
        what = f"the task failed with {type(error).__name__}"
        told = {"what": what, "why": "", "do": "see `problem` on the trainer's socket, or its log"}
    return {"event": "failed", **told}


def _send(control: socket.socket, message: Message) -> bool:
    """Send one line; False when the network process has gone."""
    try:
        control.sendall(json.dumps(message).encode() + b"\n")
    except OSError as error:
        print(f"trainer: the network process has gone ({error.strerror})", file=sys.stderr)  # noqa: T201
        return False
    return True
