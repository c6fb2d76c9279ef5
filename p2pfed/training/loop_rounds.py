"""The rounds of a training loop: its `for`, its `sync`, and what the daemon is told in between.

Map: a request comes -> `_has_begun` answers it at once (refused, spent, or released before) or
yields its number with the network's model in the user's -> the user trains -> `sync` asks the gate
-> the answer goes to the daemon. `_has_followed` takes models that are not trained on; the one of
the run's last round ends the `for`.

Invariant: no round is given to the user that could not be paid for; a round is handed in once; an
error is told to the daemon, in its public part, before it is raised.

Not here: how a process joins (`loop`), the connection (`loop_link`), the gate's side of it
(`loop_task`).
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn, Self, SupportsFloat

import numpy as np
import torch
from torch import nn

from p2pfed.config import Settings
from p2pfed.errors import (
    ConfigError,
    FactRejected,
    TrainerError,
    UpdateRejected,
)
from p2pfed.identity.run import Run
from p2pfed.training.answers import Answers
from p2pfed.training.control import Message, Request
from p2pfed.training.early import Plateau
from p2pfed.training.guarded import failed
from p2pfed.training.hardware import Hardware
from p2pfed.training.loop_link import Link
from p2pfed.training.loop_task import (
    LoopHospital,
    LoopPatients,
    LoopTask,
    TrainingWanted,
    raise_where_it_ends,
)
from p2pfed.training.patients import TaskData
from p2pfed.training.private_socket import serve_private_socket
from p2pfed.training.process import open_ledger
from p2pfed.training.record import Record
from p2pfed.training.vector import MeanDelta, Vector, get_vector, set_vector

__all__ = ["Federation", "Metrics"]

logger = logging.getLogger(__name__)

Metrics = Callable[[nn.Module], Mapping[str, SupportsFloat]]


@dataclass(frozen=True, slots=True, eq=False)
class _Round:
    """A round that waits for its update."""

    request: Request
    run: Run
    view: Vector
    mean: MeanDelta | None
    since: float


class Federation:
    """What `join` gives: iterate over it, and call `sync` once in every round.

    A context manager; else it is closed when it is dropped or the program ends.

    Args:
        settings: Of the node.
        task: The model.
        patients: Those whom it trains on, if named.
        metrics: See `join`.
        wait: See `join`.

    Raises:
        DaemonNotRunning, StateInUse, TrainerError, PrivacyError: See `join`.
    """

    def __init__(
        self,
        settings: Settings,
        task: LoopTask,
        patients: LoopPatients | None,
        *,
        metrics: Metrics | None = None,
        wait: float = 0.0,
    ) -> None:
        self._task, self._model = task, task.model()
        self._private = task.private_parameters
        self._metrics, self._wait = metrics, wait
        self._run: Run | None = None
        self._round: _Round | None = None
        self._unscored: tuple[int, Vector] | None = None
        self._where = settings.file
        self._link = Link(settings.loop_socket, wait)
        held = ExitStack()
        held.callback(self._link.close)
        self._end = weakref.finalize(self, _close, held, os.getpid())
        try:
            self._link.connect()
            self._answers = self._opened(settings, patients, held)
        except BaseException as error:
            if isinstance(error, Exception):
                self._link.send(failed(error))
            self.close()
            raise
        self._say_hello()

    def _opened(
        self, settings: Settings, patients: LoopPatients | None, held: ExitStack
    ) -> Answers:
        known = patients or LoopPatients((f"loop at {settings.node.name}".encode(),))
        device = next(self._model.parameters()).device
        hospital = LoopHospital(
            settings,
            self._task,
            TaskData(known, known),
            held.enter_context(open_ledger(settings)),
            hardware=Hardware(device),
        )
        hospital.names_patients = patients is not None
        self._hospital, self._watch = hospital, hospital.watch
        plateau = Plateau(settings.train.patience, larger_is_better=self._task.larger_is_better)
        record = Record(str(device), hospital.watch)
        answers = Answers(hospital, self._link.exchange, plateau, record)
        held.enter_context(serve_private_socket(settings.trainer_socket, record.views))
        return answers

    def _say_hello(self) -> None:
        self._answers.exchange = self._link.exchange.resolve()
        self._link.send(self._answers.hello)
        logger.info("joined the daemon of %s", self._where)

    def close(self) -> None:
        """Leave the daemon and free the ledger; the model stays as it is."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def rounds(self) -> int | None:
        """How many rounds the run has; None before its first one here."""
        return None if self._run is None else self._run.rounds

    # --- the user's `for` ------------------------------------------------------------------------

    def __iter__(self) -> Iterator[int]:
        """Yield the number of every round that needs an update, until the run ends.

        The model then holds the network's model, as it does after the last round. Rounds that were
        released before are answered on the way.

        Raises:
            BudgetExhausted: The patients' or the run's budget does not allow another release.
                Whoever iterates on receives: the model follows until the run ends.
            PolicyError: The hospital, or what a loop can give, does not allow the run.
            PrivacyError: The ledger does not allow any release.
            TrainerError: The last round was not handed in, or the daemon has gone.
        """
        while (number := self._next_round()) is not None:
            yield number

    def _next_round(self) -> int | None:
        """The next round to train; None when the run is over."""
        if self._round is not None:
            raise TrainerError(
                f"round {self._round.request.round} was not handed in",
                "every round ends with one call of sync, in the body of the loop over p2pfed.join",
                "call fed.sync(n_samples=..., loss=...) after the last step",
            )
        if self._unscored is not None:
            self._score(*self._unscored)
        while True:
            request = self._next_request()
            if request is None:
                continue
            if request.op == "evaluate":
                if self._has_followed(request):
                    return None
            elif self._has_begun(request):
                return request.round

    def _next_request(self) -> Request | None:
        """What the daemon asks next; None where it was nothing that can be answered."""
        with self._watch.spent_on("peers"):
            line = self._link.read()
        if line is None:
            self._link.send({"event": "failed", "what": "a request is over 1 MiB"})
            return None
        if line:
            try:
                request = Request(line, self._answers.exchange)
            except ConfigError as error:
                self._fail(error)
                return None
            if request.op != "stop":
                return request
        self._come_back()
        return None

    def _come_back(self) -> None:
        """Wait for a daemon that has gone and join it again."""
        if self._wait <= 0:
            _gone("it was stopped, paused or killed; nothing that was released is lost")
        logger.warning("the daemon has gone; waiting %.0f s for it to come back", self._wait)
        self._link.connect()
        self._say_hello()

    def _has_followed(self, request: Request) -> bool:
        """Put a newer model into the user's; whether it is the run's last one."""
        try:
            view, _ = self._answers.read(request)
            run = self._answers.turn_to(request) if request.names_run else self._run
        except (ConfigError, FactRejected, UpdateRejected) as error:
            self._fail(error)
            return False
        self._run = run
        answer = {"event": "evaluated", "round": request.round}
        if self._hospital.shares_metrics:
            self._score(request.round, view)  # before the answer, which tells of it
            self._link.send({**answer, **self._answers.shared})
        else:
            self._link.send(answer)
            self._score(request.round, view)
        return run is not None and request.round >= run.rounds

    def _score(self, number: int, view: Vector) -> None:
        """Let the network's model be judged by the user's own figures."""
        self._unscored = None
        set_vector(self._model, view, self._private)
        if self._metrics is None:
            return
        with (
            self._watch.spent_on("evaluation"),
            _evaluating(self._model),
            torch.no_grad(),
        ):
            values = {name: float(value) for name, value in self._metrics(self._model).items()}
        self._answers.saw(number, values)

    def _has_begun(self, request: Request) -> bool:
        """Answer a round that needs no training; True where it needs some."""
        try:
            answer = self._answer_without_training(request)
        except (ConfigError, FactRejected, UpdateRejected) as error:
            self._fail(error, request)
            return False
        except BaseException as error:  # an interrupt too: the daemon waits for an answer
            self._fail(_as_failure(error), request)
            self._round = None
            raise
        if answer is None:
            return True
        self._link.send(answer)
        raise_where_it_ends(answer)
        return False

    def _answer_without_training(self, request: Request) -> Message | None:
        """The answer to a round; None where it needs an update, for which all is ready then."""
        run = self._run = self._answers.turn_to(request)
        refusal = self._answers.why_not(request, run)
        if refusal is not None:
            return refusal
        view, mean = self._answers.read(request)
        try:
            return self._answers.to_round(request, run, view, mean)
        except TrainingWanted:
            set_vector(self._model, view, self._private)
            self._watch.progress("training loop", 0, 1)
            self._round = _Round(request, run, view, mean, time.monotonic())
            return None

    # --- the user's last line --------------------------------------------------------------------

    def sync(self, n_samples: SupportsFloat | None = None, **metrics: SupportsFloat) -> str:
        """Hand in what the model holds now; only what the gate makes of it leaves this process.

        Args:
            n_samples: How many samples it was trained on; for the private socket alone. What a
                hospital weighs is the roster's public number.
            **metrics: Any other figures, e.g. loss; for the private socket alone.

        Returns:
            "released"; "skipped" where the update does not fit the run, or its worth gate said that
            it is not worth its budget; "lost" where the daemon has gone and `wait` is set: the next
            round waits for it.

        Raises:
            BudgetExhausted: The budget does not allow the release; nothing was spent.
            UpdateRejected: The model holds NaN or infinity, in a run without a mechanism. With one
                zeros are released: that something went wrong would tell more than was paid for.
            PrivacyError: The ledger cannot be written; nothing left.
            TrainerError: No round is under way, or the daemon has gone.
        """
        values = {name: float(value) for name, value in metrics.items()}
        if n_samples is not None:
            values["n_samples"] = float(n_samples)
        at = self._round
        if at is None:
            raise TrainerError(
                "no round is under way",
                "sync hands in a round once, in the body of the loop over p2pfed.join",
                "call it once, after the last step of `for epoch in fed`",
            )
        self._round, number = None, at.request.round
        self._watch.add("compute", time.monotonic() - at.since)
        if self._link.is_gone:
            return self._lost("it is trained and not released; nothing was spent")
        try:
            with self._hospital.handing_in():
                answer = self._answers.to_round(at.request, at.run, at.view, at.mean)
        except BaseException as error:  # an interrupt too: the daemon waits for an answer
            self._fail(_as_failure(error), at.request)
            raise
        sent = self._link.send(answer)
        self._keep(number, at.view, values)
        if at.run.mechanism == "none" and answer["event"] == "skipped":
            self._refuse_unusable()
        raise_where_it_ends(answer)
        if not sent:
            return self._lost("its release is in the ledger, and is given when it is asked for")
        return str(answer["event"])

    def _keep(self, number: int, view: Vector, values: dict[str, float]) -> None:
        """Show the loop's figures on the private socket, and remember what is to be scored."""
        if self._metrics is not None:
            self._unscored = (number, view)
            self._answers.record.add_metrics(number, values)
        else:
            self._answers.saw(number, values)

    def _refuse_unusable(self) -> None:
        if not np.isfinite(get_vector(self._model, self._private)).all():
            raise UpdateRejected(
                "the model holds NaN or infinity",
                "it would spoil everybody's model, so the round was skipped",
                "lower the learning rate, and make the optimiser anew: its state is spoilt as well",
            )

    def _lost(self, why: str) -> str:
        if self._wait <= 0:
            _gone(f"in the middle of a round: {why}")
        return "lost"

    def _fail(self, error: Exception, request: Request | None = None) -> None:
        """Tell the daemon that a request failed, and keep the text for the hospital's own eyes."""
        self._link.send(self._answers.failure(error, request))


def _as_failure(error: BaseException) -> Exception:
    return error if isinstance(error, Exception) else RuntimeError("interrupted")


def _gone(why: str) -> NoReturn:
    raise TrainerError(
        "the daemon has gone",
        why,
        "start it and this loop again; p2pfed.join(..., wait=600) waits for it by itself",
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _close(held: ExitStack, owner: int) -> None:
    if os.getpid() == owner:  # a forked process has only copies
        held.close()
