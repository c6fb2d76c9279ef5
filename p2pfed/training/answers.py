"""Answers one hospital's trainer gives to its network process; the same for every form of training.

Map: `Answers.to_round` turns a `round` request into a message, and the result's payload into a file
of the exchange folder; `Answers.evaluate` scores a model for the private socket alone.

Invariant: an answer is made of a `RoundResult` and public facts. Losses, metrics, counts and times
go to the private record; the one exception, the main metric rounded to two digits, is handed over
only where the hospital's own configuration says `privacy.share_metrics = "rounded"`.

Not here: reading and writing lines (`control`), the processes (`process`, `loop`).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_never

from p2pfed.errors import P2PFedError, PrivacyError
from p2pfed.identity.run import Run
from p2pfed.training.control import Message, Request
from p2pfed.training.early import Plateau
from p2pfed.training.guarded import TaskFailed, failed
from p2pfed.training.handover import read_view
from p2pfed.training.home import Home
from p2pfed.training.local import evaluate, ready_model
from p2pfed.training.record import Record, pictures_as_json
from p2pfed.training.round import Exhausted, Hospital, Refused, Released, RoundResult, Skipped
from p2pfed.training.vector import MeanDelta, Vector
from p2pfed.wire.measure import Measure

__all__ = ["Answers"]

logger = logging.getLogger(__name__)

_MOST_SHARED_RUNS = 8
_MOST_LOGGED = 100
_ROLLED_BACK = (
    "the ledger is older than what this node has released (a restored copy?); "
    "restore the newest ledger, or ask the stewards for a new membership"
)


class Answers:
    """See the module docstring.

    Args:
        hospital: Patients, task, policy and ledger.
        exchange: Folder for views and payloads.
        plateau: When the hospital stops releasing because its own metric gets no better.
        record: What the private socket shows.
        now: A clock in seconds.
    """

    def __init__(
        self,
        hospital: Hospital,
        exchange: Path,
        plateau: Plateau,
        record: Record,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.hospital = hospital
        self.record = record
        self.exchange = exchange
        self._plateau = plateau
        self._now = now
        self._run_id, self._rounds = b"", 0
        self._measure: Measure | None = None  # of the newest evaluation, where policy shares it
        self._shared_up_to: dict[bytes, int] = {}  # a round of each run
        self._hour_ends, self._logged = float("-inf"), 0
        self.show_ledger()

    @property
    def hello(self) -> Message:
        """What the network process is told at the start."""
        return {
            "event": "ready",
            "task": self.hospital.task.name,
            "task_id": self.hospital.task_id.hex(),
            "num_parameters": self.hospital.num_parameters,
            "device": str(self.hospital.hardware.device),
        }

    def read(self, request: Request) -> tuple[Vector, MeanDelta | None]:
        """The model that a request names, and the last mean if it is there."""
        with self.hospital.watch.spent_on("load"):
            return read_view(request.view, self.hospital.num_parameters)

    def turn_to(self, request: Request) -> Run:
        """From now on it is about a request's run: its private parameters, its best model.

        Raises:
            ConfigError: The request names none.
            FactRejected: What it names is no run file.
        """
        run = request.run()
        if run.run_id != self._run_id:
            self._run_id, self._rounds = run.run_id, run.rounds
            self._measure = None
            self._plateau.begin()
        return run

    def why_not(self, request: Request, run: Run) -> Message | None:
        """The answer to a round that is not even tried; None where it is to be."""
        if not self.hospital.ledger.knows(request.heads()):
            return {"event": "rolled-back", "round": request.round, "reason": _ROLLED_BACK}
        # Where no run without protection is allowed, none may ask what was found of the patients.
        unprotected = run.mechanism == "none" and self.hospital.policy.allow_none
        if unprotected and self._plateau.reached:
            told = {"event": "skipped", "reason": self._plateau.reason}
            return {**_where(run, request), **told, **self.shared}
        return None

    def to_round(self, request: Request, run: Run, view: Vector, mean: MeanDelta | None) -> Message:
        """Do a round, or give again what it gave.

        Raises:
            PrivacyError: The ledger's own words.
            TaskFailed, RuntimeError: The task failed.
        """
        facts: dict[str, Any] = {
            "samples": request.whole("samples"),
            "scale": request.scale,
            "mean": mean,
        }
        try:
            result = self.hospital.run_round(run, request.round, view, **facts)
        except PrivacyError:
            raise
        except P2PFedError as error:  # a task's words are its own, whatever type it gives them
            raise TaskFailed(error, "training") from error
        finally:
            self.hospital.watch.idle()
        told = self._told(run, request.round, result)
        answer = {**_where(run, request), **told, **self.shared}
        self.record.add_round(
            {
                "round": request.round,
                "run": run.name,
                "event": answer["event"],
                "unusable_patients": self.hospital.unusable,
            }
        )
        self.show_ledger()
        return answer

    def evaluate(self, number: int, view: Vector) -> None:
        """Score a model on the hospital's own test patients; for the private socket alone."""
        hospital, watch = self.hospital, self.hospital.watch
        try:
            home = self._home()
            with watch.spent_on("evaluation"):
                values = evaluate(
                    hospital.task,
                    view,
                    hospital.data.test,
                    home=home,
                    hardware=hospital.hardware,
                    watch=watch,
                )
            self.record.set_pictures(lambda: self._pictures(number, view, home))
        except Exception as error:  # noqa: BLE001 - a task's metrics() may raise anything
            self.note(error)
            return
        finally:
            watch.idle()
        self.saw(number, values)

    def saw(self, number: int, values: dict[str, float]) -> None:
        """Take in the metrics of a round."""
        self._plateau.saw(values.get(self.hospital.task.monitor))
        self.record.add_metrics(number, values)
        if self.hospital.shares_metrics and self._may_share(number):
            self._shared_up_to[self._run_id] = number
            name = self.hospital.task.monitor
            self._measure = Measure.of(name, number, values.get(name))

    def _may_share(self, number: int) -> bool:
        """Once a round of a run, and of few runs until the trainer is started anew.

        A network process in wrong hands could have any number of models scored.
        """
        known = self._shared_up_to
        if self._run_id not in known and len(known) >= _MOST_SHARED_RUNS:
            return False
        return known.get(self._run_id, -1) < number <= self._rounds

    @property
    def shared(self) -> Message:
        """What an answer tells of the newest evaluation, where the hospital's policy says so.

        It is outside the accounting of epsilon.
        """
        return {} if self._measure is None else {"measure": self._measure.as_json()}

    def failure(self, error: Exception, request: Request | None = None) -> Message:
        """The answer to a request that failed; its whole text stays with the private record.

        Args:
            error: Why.
            request: What failed, if it could be read. A round is recorded like one that went well:
                its time is its own, not the next one's.
        """
        self.note(error)
        if request is not None and request.op == "round":
            self.record.add_round(
                {"round": request.round, "run": _name_of(request), "event": "failed"}
            )
        return failed(error)

    def note(self, error: Exception) -> None:
        """Keep the whole text of a problem for the hospital's own eyes, in its log as well.

        The newest is always shown; the log, which lies beside the ledger, takes a hundred an hour:
        a network process in wrong hands could fill the disk.
        """
        now = self._now()
        if now >= self._hour_ends:
            self._hour_ends, self._logged = now + 3600.0, 0
        self._logged += 1
        if self._logged <= _MOST_LOGGED:
            logger.error("a request failed", exc_info=error)
        elif self._logged == _MOST_LOGGED + 1:
            logger.error("%d requests failed within an hour; no more of it here", _MOST_LOGGED)
        self.hospital.hardware.forget()
        self.record.set_problem(error)

    def show_ledger(self) -> None:
        """Show the ledger as it is now on the private socket."""
        hospital = self.hospital
        self.record.set_ledger(hospital.ledger, hospital.spent, hospital.budget)

    def _home(self) -> Home:
        return self.hospital.homes.of(self._run_id)

    def _pictures(self, number: int, view: Vector, home: Home) -> Message:
        hospital = self.hospital
        model = ready_model(hospital.task, view, home=home, hardware=hospital.hardware)
        pictures = list(hospital.task.pictures(model, hospital.data.test))
        return {"round": number, "pictures": pictures_as_json(pictures)}

    def _told(self, run: Run, number: int, result: RoundResult) -> Message:
        match result:
            case Released():
                path = self.exchange / f"{run.run_id.hex()[:16]}-{number}.payload"
                _hand_over(path, result.payload)
                told = {"event": "released", "payload": path.name, "mechanism": result.mechanism}
                left = {"saturated": result.saturated, "releases_left": result.releases_left}
                return {**told, **_spent(result), **left}
            case Exhausted():
                told = {"event": "exhausted", "reason": result.reason}
                return {**told, **_spent(result), "releases_left": 0}
            case Skipped():
                return {"event": "skipped", "reason": result.reason}
            case Refused():
                return {"event": "refused", "reason": result.reason}
            case _:
                assert_never(result)


def _hand_over(path: Path, payload: bytes) -> None:
    """Put a payload where the network process finds it, whole or not at all.

    The folder may be another user's, who could put a link in our way: a new file is made. That
    user's group, which the folder gives to what is in it, may read it.
    """
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(partial, flags, 0o600), "wb") as file:
        os.fchmod(file.fileno(), 0o640)  # the folder decides who gets so far
        file.write(payload)
    partial.replace(path)


def _name_of(request: Request) -> str:
    """The run's name; none where what failed was reading the run."""
    try:
        return request.run().name
    except P2PFedError:
        return ""


def _where(run: Run, request: Request) -> Message:
    return {"round": request.round, "run_id": run.run_id.hex()}


def _spent(result: Released | Exhausted) -> Message:
    return {
        "spent_nano_rho": result.spent_nano_rho,
        "spent_epsilon": result.spent_epsilon,
        "releases": result.releases,
        "ledger_head": result.ledger_head.hex(),
    }
