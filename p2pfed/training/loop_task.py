"""What a training loop of the hospital's own is to the gate: a task, patients and a hospital.

Map: `LoopTask` (the model and a name for what must be equal everywhere) -> `LoopPatients` (whose
budget it is; nothing else is known of them) -> `LoopHospital`, whose local training is "what the
model holds now". `load_loop` is the stewards' way to the same task, `loop:module:function`.

Invariant: everything that guards a release (policy, run's ceiling, ledger, clip, noise, the stored
answer to a repeated round) is `round.Hospital`'s own. Here is only what a loop cannot do, as
refusals: it makes one contribution for the whole hospital, knows no patient whose name it was not
told, and takes its steps without a correction by others.

Identity: BLAKE2b-256 (person p2pfed-task) over canonical JSON of the loop's `version` and of names,
shapes and types of the shared parameters. The loop's code is not hashed: it is the hospital's own
and differs in paths. What must be equal everywhere is named in `version`.

Not here: the daemon and the user's `for` (`loop`, `loop_rounds`).
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from p2pfed.errors import (
    BudgetExhausted,
    ConfigError,
    PolicyError,
    PrivacyError,
    UpdateRejected,
)
from p2pfed.identity.run import Run
from p2pfed.training.control import Message
from p2pfed.training.home import NOTHING
from p2pfed.training.local import Trained
from p2pfed.training.patients import WHOLE, Batch, Part, Patients, TaskData
from p2pfed.training.plans import Budgeted
from p2pfed.training.round import Hospital, Refused, RoundResult
from p2pfed.training.task import Options, Task, load_task
from p2pfed.training.vector import MeanDelta, Vector, get_vector, shared_parameters

__all__ = [
    "LOOP",
    "LoopHospital",
    "LoopPatients",
    "LoopTask",
    "TrainingWanted",
    "load_either",
    "load_loop",
    "raise_where_it_ends",
]

LOOP = "loop"
"""`train.task` of a node that a loop joins, and what `describe` calls such a task's kind."""

PRIVATE = "PRIVATE_PARAMETERS"  # a module's name for what stays at home, read by `load_loop`

_BUDGET = "the lifetime budget of these patients does not allow it"
_NAMELESS = (
    "the run spends patients' budgets, and the training loop did not say whose:"
    " p2pfed.join(model, patients=...)"
)
_UNCORRECTED = "the run corrects every local step, which a training loop of its own does not do"


class TrainingWanted(Exception):
    """The round has no answer yet: the loop is to train, and then to ask again."""


class LoopTask(Task):
    """The model of a loop.

    Args:
        build: Gives the model: a fresh one, or the user's own, which is then the only one.
        version: What must be equal at all hospitals and is not seen in the tensors.
        private: Patterns of the names of parameters that stay at home.

    Raises:
        ConfigError: A pattern fits no parameter, or a shared parameter has fewer bits than float32.
    """

    name = LOOP

    def __init__(
        self, build: Callable[[], nn.Module], *, version: str = "", private: Iterable[str] = ()
    ) -> None:
        self._build = build
        self._version = version
        # Of the class for those who write one; here every instance has its own.
        self.__dict__["private_parameters"] = tuple(private)
        for name, parameter in shared_parameters(self.model(), self.private_parameters):
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ConfigError(
                    f"the parameter {name} is {str(parameter.dtype).removeprefix('torch.')}",
                    "between rounds the values are float32: rounding would be taken for training",
                    "keep the model in float32 and compute under torch.autocast",
                )

    def model(self) -> nn.Module:
        """What `build` gives."""
        return self._build()

    def identity(self) -> bytes:
        """See the module docstring."""
        shared = shared_parameters(self.model(), self.private_parameters)
        tensors = [[name, list(p.shape), str(p.dtype)] for name, p in shared]
        facts = {LOOP: self._version, "tensors": tensors}
        canonical = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
        return hashlib.blake2b(canonical, digest_size=32, person=b"p2pfed-task").digest()

    def data(self, folder: Path | None, options: Options) -> TaskData[Any]:  # noqa: ARG002
        """A loop reads its own."""
        _not_known()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:  # noqa: ARG002
        """A loop has its own."""
        _not_known()

    def metrics(self, model: nn.Module, patients: Any) -> dict[str, float]:  # noqa: ARG002
        """A loop has its own."""
        _not_known()


class LoopPatients(Patients):
    """The patients of a loop, of whom only their names are known here.

    Args:
        records: For the ledger, one per patient.
    """

    num_patients: ClassVar[int] = 1  # one contribution, that of the hospital

    def __init__(self, records: Sequence[bytes]) -> None:
        self._records = tuple(records)

    @classmethod
    def named(cls, ids: Iterable[str | bytes]) -> LoopPatients:
        """From stable ids; who comes twice is one patient.

        Raises:
            ConfigError: One text, nobody, or an id that is neither str nor bytes.
        """
        do = "give one stable id per patient: the hospital's record number, the same in all tasks"
        if isinstance(ids, str | bytes):
            raise ConfigError("patients is one text", "its letters would be taken for patients", do)
        found = dict.fromkeys(ids)
        kinds = {type(each).__name__ for each in found if not isinstance(each, str | bytes)}
        if kinds:
            raise ConfigError(
                f"patients holds a {min(kinds)}", "a patient is named by str or bytes", do
            )
        if not all(found):
            raise ConfigError("patients holds an empty name", "", do)
        if not found:
            raise ConfigError("patients is empty", "there is nobody to protect", do)
        return cls([i.encode() if isinstance(i, str) else i for i in found])

    def patient_records(self) -> tuple[bytes, ...]:
        """As given."""
        return self._records

    def alike(self) -> tuple[Sequence[int], ...]:
        """Nobody can be asked for on their own."""
        return ()

    def batches(self, batch_size: int, *, seed: int, part: Part = WHOLE) -> Iterator[Batch]:  # noqa: ARG002
        """They are the loop's."""
        _not_known()

    def stacked(self, patients: Sequence[int], *, seed: int) -> Batch:  # noqa: ARG002
        """They are the loop's."""
        _not_known()

    def grouped(self, size: int) -> Patients:  # noqa: ARG002
        """They are the loop's."""
        _not_known()

    def subset(self, patients: Sequence[int]) -> Patients:  # noqa: ARG002
        """They are the loop's."""
        _not_known()


def _not_known() -> NoReturn:
    raise ConfigError(
        "p2pfed does not know the data, loss and metrics of a training loop of its own",
        "the loop keeps them to itself",
        "write a Task where p2pfed is to train or evaluate (docs/training.md)",
    )


class LoopHospital(Hospital):
    """A hospital whose local training is what the loop's model holds now.

    The arguments are those of `Hospital`; `task` is a `LoopTask` whose model is the user's own.
    """

    names_patients = True
    """Whether the loop said whose patients it trains on; set it before the first round."""

    _is_handing_in = False

    @contextmanager
    def handing_in(self) -> Iterator[None]:
        """While open, a round takes what the model holds; else it raises `TrainingWanted`."""
        self._is_handing_in = True
        try:
            yield
        finally:
            self._is_handing_in = False

    def run_round(
        self,
        run: Run,
        round_number: int,
        view: Vector,
        *,
        samples: int,
        scale: Fraction = Fraction(1),
        mean: MeanDelta | None = None,
    ) -> RoundResult:
        """Do one round, give again what it gave, or ask for training; see `Hospital.run_round`.

        Raises:
            TrainingWanted: The round can be paid for and needs an update; nothing was spent.
            PrivacyError: The ledger does not verify or cannot be written; nothing leaves.
        """
        if run.mechanism != "none" and not self.names_patients:
            return Refused(_NAMELESS)
        if run.averaging.drift_correction:
            return Refused(_UNCORRECTED)
        try:
            return super().run_round(
                run, round_number, view, samples=samples, scale=scale, mean=mean
            )
        except TrainingWanted:
            if not self._could_pay(run):
                return self._exhausted(_BUDGET)
            raise

    def train(self, run: Run, view: Vector, *, seed: int, shift: Vector | None) -> Trained:  # noqa: ARG002
        """What the model holds.

        Raises:
            TrainingWanted: Nothing is handed in yet.
            UpdateRejected: It holds NaN or infinity.
        """
        if not self._is_handing_in:
            raise TrainingWanted
        trained = get_vector(self.task.model(), self.task.private_parameters)
        if not np.isfinite(trained).all():
            raise UpdateRejected("the model holds NaN or infinity")
        if np.array_equal(trained, view):
            self.watch.note(
                "the model that was given to p2pfed.join has not changed in this round:"
                " was another one trained?"
            )
        return Trained(trained, NOTHING)

    def _could_pay(self, run: Run) -> bool:
        """Whether the lifetime budget allows a release: nobody need train for hours in vain."""
        if run.mechanism == "none":
            return True
        try:
            self.ledger.check(self.dataset, [Budgeted.of(run).cost], self.budget)
        except BudgetExhausted:
            return False
        return True


def raise_where_it_ends(answer: Message) -> None:
    """Tell the user of a loop what the daemon is told, where it is the end of releasing.

    Raises:
        BudgetExhausted: The answer is "exhausted".
        PolicyError: It is "refused".
        PrivacyError: It is "rolled-back".
    """
    reason = str(answer.get("reason", ""))
    if answer["event"] == "exhausted":
        raise BudgetExhausted(
            "no further release of this run: the budget is spent",
            f"{reason}; spent so far is epsilon {answer['spent_epsilon']:.4g}",
            "the node goes on receiving; iterate on to let the model follow to the run's end",
        )
    if answer["event"] == "refused":
        raise PolicyError(
            "this hospital does not take part in the run",
            reason,
            "see docs/training.md, and [privacy] in the node's configuration",
        )
    if answer["event"] == "rolled-back":
        raise PrivacyError("nothing may be released", reason, "see docs/operations.md")


def load_either(spec: str, options: Options | None = None) -> Task:
    """The task of a name of either form: `load_loop` for a loop's, else `load_task`.

    Raises:
        ConfigError: As those.
    """
    return load_loop(spec) if spec.startswith(f"{LOOP}:") else load_task(spec, options)


def load_loop(spec: str) -> LoopTask:
    """The task of `loop:module:function` or `loop:module:function:version`.

    The function returns the model. Where the module has a tuple PRIVATE_PARAMETERS, it names what
    stays at home, as `private_parameters` of `p2pfed.join` does.

    Raises:
        ConfigError: There is no such function, or it does not give a model.
    """
    kind, _, rest = spec.partition(":")
    module_name, _, rest = rest.partition(":")
    function, _, version = rest.partition(":")
    if kind != LOOP or not module_name or not function:
        raise ConfigError(
            f"{spec!r} names no loop's model", "", "write loop:module:function or ...:version"
        )
    try:
        module = importlib.import_module(module_name)
        build = getattr(module, function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"no function for {spec!r}", str(error), "install the module, or correct the name"
        ) from error
    if not callable(build) or not isinstance(build(), nn.Module):
        raise ConfigError(
            f"{module_name}:{function} does not give a model",
            "expected is a function without arguments that returns a torch.nn.Module",
        )
    return LoopTask(build, version=version, private=getattr(module, PRIVATE, ()))
