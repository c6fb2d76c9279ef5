"""One vector per patient, computed from the public model: what the privacy gate clips and sums.

A contribution is the negative gradient of the patient's mean loss at the round's public model or,
with `patient_steps` > 0, the change after that many SGD steps on the patient's records alone, with
no optimiser state from anywhere. It is vectorised over patients (torch.func) in chunks of bounded
memory, a patient's activations counted; patients are grouped by the shape of their records, and
what vmap cannot do is done one patient at a time. Memory that runs out halves the chunks.

Formal guarantee: row i is a function of patient i's records and of public facts (model, task, the
round's seed) only, so a patient moves one row. Dropout is off and nothing is shared between
patients: buffers are refused by `check_no_buffers`, and a task that keeps parameters at home is. A
row with NaN or infinity becomes zeros by itself, and the round goes on even if every row is so:
whoever chose the model could otherwise read from a refusal, which costs no budget, that no patient
is an exception. (Rows are floats: where a patient's *number* of records changes, or chunks have
another size, the others are computed in another batch shape and may differ in the last bit before
they are clipped and rounded.)

Not here: clipping, rounding and summing (privacy.clipping), ordinary training (`local`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from p2pfed.errors import ConfigError
from p2pfed.training.hardware import CPU, Hardware, is_out_of_memory
from p2pfed.training.task import WHOLE, Part, Patients, Task
from p2pfed.training.vector import check_no_buffers, num_parameters, set_vector
from p2pfed.training.watch import Watch

__all__ = ["PatientContributions", "of_no_use"]

_CHUNK_BYTES = 64 << 20  # on a CPU: small enough for the caches to be of use
_FREE_SHARE = 2  # on an accelerator one of so many parts of what is free
_COPIES = 4  # gradient, flat row, a step's parameters and its slopes

Parameters = dict[str, Tensor]


class PatientContributions:
    """Implements `privacy.units.Contributions`; `chunks` computes anew at every reading.

    Args:
        task: Gives model, loss and `patient_steps`.
        vector: The public model, shape (P,).
        patients: The hospital's training patients.
        seed: Fixes what is drawn from a patient's records; public, new in every round.
        hardware: Where to compute, and how.
        chunk_bytes: Memory for one chunk of patients, about; None for what the device allows.
        watch: Is told of time and progress.
        part: Which of every group's patients are this process's.

    Raises:
        ConfigError: The model has buffers, or the task keeps parameters at home.
        UpdateRejected: The vector does not fit the model.
    """

    def __init__(
        self,
        task: Task,
        vector: NDArray[np.float32],
        patients: Patients,
        *,
        seed: int = 0,
        hardware: Hardware = CPU,
        chunk_bytes: int | None = None,
        watch: Watch | None = None,
        part: Part = WHOLE,
    ) -> None:
        model = task.model()
        check_no_buffers(model)
        if task.private_parameters:
            raise ConfigError(
                "the task keeps parameters at home",
                "they carry all patients from round to round into each one's contribution",
                "use the unit hospital, or share them",
            )
        set_vector(model, vector)
        self._task = task
        self._model = hardware.place(model).eval()
        self._patients = patients
        self._seed = seed
        self._hardware = hardware
        self._watch = watch or Watch()
        self._part = part
        if chunk_bytes is None:
            free = hardware.free_bytes()
            chunk_bytes = _CHUNK_BYTES if free is None else free // _FREE_SHARE
        self._limit = chunk_bytes
        self._vectorised = True
        self.unusable = 0  # patients whose row was not finite when last read; never leaves

    @property
    def num_patients(self) -> int:
        """P of the patients: how many rows come."""
        return self._patients.num_patients

    @property
    def num_parameters(self) -> int:
        """Length of each row."""
        return num_parameters(self._model)

    def chunks(self) -> Iterator[NDArray[np.float32]]:
        """Yield all rows, shape (patients, parameters), grouped by shape of the records."""
        self.unusable = 0
        for _, rows in self.labelled_chunks():
            broken = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            self.unusable += broken.size
            rows[broken] = 0
            yield rows

    def labelled_chunks(self) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        """Yield patients' numbers with their rows as computed, not yet checked."""
        done = 0
        for group in self._patients.alike():
            left = list(group[self._part.rank :: self._part.world])
            each = self._bytes_of(left[0]) if left else 1
            while left:
                self._watch.progress("contributions", done, self.num_patients)
                chunk, rows = self._next_rows(left, each)
                left, done = left[len(chunk) :], done + len(chunk)
                yield chunk, rows

    def _next_rows(self, left: list[int], each: int) -> tuple[list[int], NDArray[np.float32]]:
        """Rows of the first patients of those that are left; of fewer where memory runs out."""
        while True:
            chunk = left[: max(1, self._limit // each)]
            try:
                return chunk, self._rows(chunk)
            except Exception as error:
                if not is_out_of_memory(error) or len(chunk) == 1:
                    raise
            self._hardware.forget()
            self._limit = len(chunk) // 2 * each
            self._watch.note(f"memory ran out: {len(chunk) // 2} patients at a time from now on")

    def _bytes_of(self, patient: int) -> int:
        """About what one patient like this one takes: copies of its row, and activations."""
        return max(1, 4 * _COPIES * self.num_parameters + self._activation_bytes(patient))

    def _activation_bytes(self, patient: int) -> int:
        """What autograd keeps of one patient's forward pass."""
        x, y = self._stacked([patient])
        own = {p.data_ptr() for p in self._model.parameters()}
        kept: dict[int, int] = {}

        def weigh(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in own:
                kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor),
            self._hardware.computing(),
        ):
            self._task.loss(self._model(x[0]), y[0])
        return sum(kept.values())

    def _stacked(self, patients: Sequence[int]) -> tuple[Tensor, Tensor]:
        asked = time.monotonic()
        x, y = self._hardware.take(*self._patients.stacked(patients, seed=self._seed))
        self._watch.add("data", time.monotonic() - asked)
        return x, y

    def _rows(self, patients: list[int]) -> NDArray[np.float32]:
        x, y = self._stacked(patients)
        with self._watch.spent_on("compute"), self._hardware.computing():
            public = {name: p.detach() for name, p in self._model.named_parameters()}
            one = _contribution(self._task, self._model)
            if self._vectorised:
                try:
                    return self._flat(vmap(one, in_dims=(None, 0, 0))(public, x, y), len(patients))
                except RuntimeError as error:  # no batching rule, or control flow on data
                    if is_out_of_memory(error):
                        raise
                    self._vectorised = False
                    self._watch.note("this model cannot be vectorised over patients: one by one")
            singles = [self._flat(one(public, x[i], y[i]), 1) for i in range(len(patients))]
            return np.concatenate(singles)

    def _flat(self, parts: Parameters, patients: int) -> NDArray[np.float32]:
        """Put gradients (with the other sign) or changes side by side, in one pass."""
        sign = 1.0 if self._task.hyper.patient_steps else -1.0
        rows = torch.empty(patients, self.num_parameters)
        place = 0
        for part in parts.values():
            flat = part.detach().reshape(patients, -1)
            torch.mul(
                flat.to("cpu", torch.float32), sign, out=rows[:, place : place + flat.shape[1]]
            )
            place += flat.shape[1]
        return np.asarray(rows.numpy(), dtype=np.float32)


def of_no_use(unit: str, unusable: int, of: int) -> str:
    """What the hospital alone is told of such rows: its peers see noise as in any other round.

    Args:
        unit: The run's.
        unusable: How many rows were not finite.
        of: How many there were.
    """
    if unit == "hospital":
        return (
            "the model held NaN or infinity: zeros took the place of its change, for the same"
            " budget; lower the learning rate"
        )
    return (
        f"{unusable} of {of} contributions held NaN or infinity: zeros took their place, for the"
        " same budget; see: p2pfed task check"
    )


def _contribution(
    task: Task, model: nn.Module
) -> Callable[[Parameters, Tensor, Tensor], Parameters]:
    """Return what gives one patient's gradient or, with `patient_steps`, its change."""

    def mean_loss(parameters: Parameters, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = task.loss(functional_call(model, parameters, (x,)), y).mean()
        return loss

    slope: Callable[..., Any] = grad(mean_loss)

    def local_change(public: Parameters, x: Tensor, y: Tensor) -> Parameters:
        rate, now = task.hyper.patient_learning_rate, public
        for _ in range(task.hyper.patient_steps):
            slopes = slope(now, x, y)
            now = {name: p - rate * slopes[name] for name, p in now.items()}
        return {name: p - public[name] for name, p in now.items()}

    return local_change if task.hyper.patient_steps else slope
