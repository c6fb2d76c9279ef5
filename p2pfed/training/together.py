"""A round's work with or without other processes: the same calls either way.

`train_together` is `local.train_local` with the task's own figures, `contributions_together` gives
one row per patient; with a crew every process does its part (`crew`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from p2pfed.privacy.units import Contributions
from p2pfed.training.contributions import PatientContributions
from p2pfed.training.crew import Crew, Job
from p2pfed.training.hardware import Hardware
from p2pfed.training.home import Home, tensors_of
from p2pfed.training.local import Trained, train_local
from p2pfed.training.patients import WHOLE, Patients
from p2pfed.training.task import Task
from p2pfed.training.vector import Vector
from p2pfed.training.watch import Watch

__all__ = ["contributions_together", "train_together"]


def train_together(
    crew: Crew | None,
    task: Task,
    patients: Patients,
    view: Vector,
    *,
    seed: int,
    hardware: Hardware,
    shift: Vector | None,
    home: Home,
    watch: Watch,
) -> Trained:
    """Local training of one round, as the task's hyper-parameters say.

    Args:
        crew: The other processes, if there are some.
        task: Gives everything else.
        patients: Those who train.
        view: The common model, shape (P,).
        seed: Fixes batches and dropout.
        hardware: Where this process computes.
        shift: See `train_local`.
        home: What the round before left.
        watch: Is told of time and progress.

    Raises:
        UpdateRejected: Training ended in NaN or infinity.
        RuntimeError: Another process has died or did not keep up.
    """
    ours = partial(
        train_local,
        task,
        patients,
        view,
        seed=seed,
        hardware=hardware,
        shift=shift,
        home=home,
        watch=watch,
    )
    if crew is None:
        return ours()
    tensors = {"start": torch.from_numpy(view), **tensors_of(home)}
    if shift is not None:
        tensors["shift"] = torch.from_numpy(shift)
    hyper = task.hyper  # the others must not take their own, should it differ
    facts = {
        "steps": hyper.local_steps,
        "learning_rate": hyper.learning_rate,
        "batch_size": hyper.batch_size,
        "seed": seed,
    }
    with crew.doing(Job("train", facts, tensors)) as team:
        return ours(team=team)


def contributions_together(
    crew: Crew | None,
    task: Task,
    patients: Patients,
    view: Vector,
    *,
    patients_per_row: int,
    seed: int,
    hardware: Hardware,
    watch: Watch,
) -> Contributions:
    """One row per patient or group.

    Args:
        crew: The other processes, if there are some.
        task: Gives model and loss.
        patients: Those who train, in groups already.
        view: The common model, shape (P,).
        patients_per_row: How many are in a group.
        seed: Fixes what is drawn from a patient's records; public.
        hardware: Where this process computes.
        watch: Is told of time and progress.

    Raises:
        ConfigError: The task carries patients from round to round.
    """
    own = PatientContributions(
        task,
        view,
        patients,
        seed=seed,
        hardware=hardware,
        watch=watch,
        part=WHOLE if crew is None else crew.team.part,
    )
    if crew is None:
        return own
    facts = {"group": patients_per_row, "seed": seed}
    job = Job("contributions", facts, {"start": torch.from_numpy(view)})
    return _Shared(own, crew, job)


class _Shared:
    """Contributions that several processes compute; implements `privacy.units.Contributions`.

    Args:
        own: Those of this process's part.
        crew: The others.
        job: What they do meanwhile, anew at every reading.
    """

    def __init__(self, own: PatientContributions, crew: Crew, job: Job) -> None:
        self._own, self._crew, self._job = own, crew, job
        self.unusable = 0  # patients whose row was not finite when last read; never leaves

    @property
    def num_patients(self) -> int:
        """P of all processes."""
        return self._own.num_patients

    @property
    def num_parameters(self) -> int:
        """Length of each row."""
        return self._own.num_parameters

    def chunks(self) -> Iterator[NDArray[np.float32]]:
        """Yield all rows: a chunk of the own, one of each other process, and so on."""
        with self._crew.doing(self._job):
            own, others = self._own.chunks(), list(range(1, self._crew.team.part.world))
            owed, unusable = self.num_patients, 0
            while True:  # in turn, so that nobody waits long with rows in its hands
                rows = next(own, None)
                if rows is None and not others:
                    break
                if rows is not None:
                    owed -= len(rows)
                    yield rows
                for rank in tuple(others):
                    told = self._crew.rows(rank, self.num_parameters)
                    if told is None:
                        others.remove(rank)
                        continue
                    owed, unusable = owed - len(told[0]), unusable + told[1]
                    yield told[0]
            if owed:
                raise RuntimeError(f"{owed} contributions are missing, or too many if below 0")
            self.unusable = self._own.unusable + unusable
