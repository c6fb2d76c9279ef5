"""`worker`: one of several processes that work on a round; started by the trainer (`crew`)."""

from __future__ import annotations

import argparse
import contextlib
import resource
import signal
from pathlib import Path

import numpy as np
import torch

from p2pfed.config import load_settings
from p2pfed.errors import UpdateRejected
from p2pfed.training.contributions import PatientContributions
from p2pfed.training.crew import (
    Job,
    Team,
    end_with_the_trainer,
    follow,
    same_as,
    send_rows,
    teller,
)
from p2pfed.training.hardware import Hardware
from p2pfed.training.home import home_of
from p2pfed.training.local import train_local
from p2pfed.training.patients import Part, Patients
from p2pfed.training.task import load_task, task_id
from p2pfed.training.watch import Watch

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the trainer gives it."""
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--meeting", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)


def run(args: argparse.Namespace) -> int:
    """Load task and data, then do as the trainer says."""
    end_with_the_trainer()  # also where reading the data takes hours
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it would hold the patients
    torch.set_num_threads(args.threads)
    settings = load_settings(args.config)
    train = settings.train
    task = load_task(train.task, train.options)
    watch = Watch(heard=teller(args.meeting, args.rank))
    task.note, task.own_folder = watch.note, settings.trainer_state
    data = task.data(train.data, train.options)
    hardware = Hardware.chosen(train.device, train.precision, args.rank)

    def local_steps(job: Job, team: Team) -> None:
        shift = job.tensors.get("shift")
        with contextlib.suppress(UpdateRejected):  # the trainer judges by its own
            train_local(
                task,
                data.train,
                job.tensors["start"].numpy(),
                hardware=hardware,
                shift=None if shift is None else shift.numpy(),
                home=home_of(job.tensors),
                watch=watch,
                team=team,
                **job.facts,
            )

    def contributions(job: Job, team: Team) -> None:
        size = job.facts["group"]
        patients: Patients = data.train.grouped(size) if size > 1 else data.train
        mine = PatientContributions(
            task,
            job.tensors["start"].numpy(),
            patients,
            seed=job.facts["seed"],
            hardware=hardware,
            watch=watch,
            part=team.part,
        )
        before = 0
        for rows in mine.chunks():
            send_rows(rows, mine.unusable - before)
            before = mine.unusable
        send_rows(np.empty((0, 0), np.float32), 0)

    jobs = {"train": local_steps, "contributions": contributions}
    told = same_as(task_id(task), data.train.patient_records())
    follow(args.meeting, Part(args.rank, args.world), jobs, told=told)
    return 0
