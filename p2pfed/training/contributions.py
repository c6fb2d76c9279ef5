"""One vector per patient, computed from the public model: what the privacy gate clips and sums.

A contribution is the negative gradient of the patient's mean loss at the round's public model or,
with `patient_steps` > 0, the change after that many SGD steps on the patient's records alone, with
no optimiser state from anywhere. It is vectorised over patients (torch.func) in chunks of bounded
memory; patients are grouped by their number of records, and what vmap cannot do is done one patient
at a time.

Formal guarantee: row i is a function of patient i's records and of public facts (model, task)
only, so a patient moves one row. Dropout is off and nothing is shared between patients: buffers
are refused by `check_no_buffers`. A row with NaN or infinity becomes zeros by itself, and the round
goes on even if every row is so: whoever chose the model could otherwise read from a refusal, which
costs no budget, that no patient is an exception. (Rows are floats: where a patient's *number* of
records changes, the others are computed in another batch shape and may differ in the last bit
before they are clipped and rounded.)

Not here: clipping, rounding and summing (privacy.clipping), ordinary training (`local`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from p2pfed.training.task import Split, Task
from p2pfed.training.vector import check_no_buffers, num_parameters, set_vector

__all__ = ["PatientContributions"]

_CHUNK_BYTES = 64 << 20
_COPIES = 4  # gradient, flat row, a step's parameters, activations of about that size

Parameters = dict[str, Tensor]


class PatientContributions:
    """Implements `privacy.units.Contributions`; `chunks` computes anew at every reading.

    Args:
        task: Gives model, loss and `patient_steps`.
        vector: The public model, shape (P,).
        split: The hospital's training patients.
        device: Where to compute.
        chunk_bytes: Memory for one chunk of patients, about.

    Raises:
        ConfigError: The model has buffers.
        UpdateRejected: The vector does not fit the model.
    """

    def __init__(
        self,
        task: Task,
        vector: NDArray[np.float32],
        split: Split,
        *,
        device: torch.device | None = None,
        chunk_bytes: int = _CHUNK_BYTES,
    ) -> None:
        self._device = device or torch.device("cpu")
        model = task.model()
        check_no_buffers(model)
        set_vector(model, vector)
        self._task = task
        self._model = model.to(self._device).eval()
        self._split = split
        self._at_once = max(1, chunk_bytes // (4 * _COPIES * max(1, len(vector))))
        self._vectorised = True
        self.unusable = 0  # patients whose row was not finite when last read; never leaves

    @property
    def num_patients(self) -> int:
        """P of the split: how many rows come."""
        return self._split.num_patients

    @property
    def num_parameters(self) -> int:
        """Length of each row."""
        return num_parameters(self._model)

    def chunks(self) -> Iterator[NDArray[np.float32]]:
        """Yield all rows, shape (patients, parameters), grouped by number of records."""
        self.unusable = 0
        for _, rows in self.labelled_chunks():
            broken = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            self.unusable += broken.size
            rows[broken] = 0
            yield rows

    def labelled_chunks(self) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        """Yield patients' numbers with their rows as computed, not yet checked."""
        groups: defaultdict[int, list[int]] = defaultdict(list)
        for patient, records in enumerate(self._split.records_of):
            groups[len(records)].append(patient)
        for _, patients in sorted(groups.items()):
            for start in range(0, len(patients), self._at_once):
                chunk = patients[start : start + self._at_once]
                yield chunk, self._rows(chunk)

    def _rows(self, patients: list[int]) -> NDArray[np.float32]:
        index = torch.stack([self._split.records_of[p] for p in patients])
        x = self._split.x[index.to(self._split.x.device)].to(self._device)
        y = self._split.y[index.to(self._split.y.device)].to(self._device)
        public = {name: p.detach() for name, p in self._model.named_parameters()}
        one = _contribution(self._task, self._model)
        if self._vectorised:
            try:
                return self._flat(vmap(one, in_dims=(None, 0, 0))(public, x, y), len(patients))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # an operation without a batching rule, or control flow on data
                self._vectorised = False
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
