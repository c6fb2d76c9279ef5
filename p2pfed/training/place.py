"""What an operator's command works with on this machine: task, patients, device, models.

The trainer may run meanwhile: here everything is read only, but for the tuned model, and the ledger
is not opened.

Not here: what the commands do (`verbs`), how they answer (`answering`).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from p2pfed.config import Settings, load_settings
from p2pfed.errors import ConfigError
from p2pfed.training.answering import reporting, say
from p2pfed.training.hardware import Hardware, share_of_processors
from p2pfed.training.home import Home, HomeFolder
from p2pfed.training.limits import keep_within
from p2pfed.training.local import evaluate, ready_model
from p2pfed.training.loop_task import LOOP, LoopTask, load_either
from p2pfed.training.model_file import HeldModel, newest_tuned, read_model, tuned_path
from p2pfed.training.patients import TaskData
from p2pfed.training.task import Task, task_id
from p2pfed.training.watch import Watch, telling

__all__ = ["Place", "arguments"]

TUNED = "tuned"  # for --model: the one that was tuned last


def arguments(parser: argparse.ArgumentParser, *, model: bool = True) -> None:
    """Which configuration or task, and which model."""
    parser.add_argument("--config", type=Path, help="the node's configuration")
    parser.add_argument("--task", help="a task without a configuration, or instead of its own")
    if model:
        parser.add_argument("--model", required=True, help=f"a model file, or {TUNED}")


@dataclass(frozen=True)
class Place:
    """See the module docstring.

    Attributes:
        settings: Of the node; None where only a task was named.
        spec: How the task is named.
        task: As installed here.
        hardware: What to compute with.
    """

    settings: Settings | None
    spec: str
    task: Task
    hardware: Hardware

    @classmethod
    def opened(cls, args: argparse.Namespace) -> Self:
        """The place that the flags of `arguments` name.

        Raises:
            ConfigError: The configuration or the task is wrong, or neither is named.
        """
        torch.set_num_threads(share_of_processors())
        torch.manual_seed(0)  # what a model file lacks starts alike every time
        settings = None if args.config is None else load_settings(args.config)
        if settings is None and not args.task:
            raise ConfigError(
                "neither a configuration nor a task is named",
                "they say what the model is a model of",
                "name one: -c FILE, or --task NAME",
            )
        if settings is not None:
            keep_within(settings)
        spec = args.task or (settings.train.task if settings is not None else "")
        if spec in ("", LOOP):
            raise ConfigError(
                "the configuration names no task" if not spec else f'train.task is "{LOOP}"',
                "the model is made in code of the hospital's own",
                "export and predict take its name: --task module:Class, or loop:module:function",
            )
        task = load_either(spec, None if settings is None else settings.train.options)
        train = None if settings is None else settings.train
        hardware = Hardware.chosen(*(() if train is None else (train.device, train.precision)))
        return cls(settings, spec, task, hardware)

    @cached_property
    def data(self) -> TaskData[Any]:
        """The hospital's patients; those who test are on the device where they fit.

        Raises:
            ConfigError: There is no configuration that says where they are, or `data` refused.
        """
        if self.settings is None:
            raise ConfigError(
                "no configuration says where this hospital's patients are", "", "name it: -c FILE"
            )
        if isinstance(self.task, LoopTask):
            raise ConfigError(
                "the model is a training loop's, which reads its patients itself",
                "nothing is known of them here",
                "evaluate it in the loop's own code: p2pfed model export writes its tensors",
            )
        watch = Watch()
        self.task.note, self.task.own_folder = say, self.settings.trainer_state
        say("reading the hospital's patients")
        with reporting(watch), telling(self.task, watch, "reading cases"):
            data = self.task.data(self.settings.train.data, self.settings.train.options)
        return TaskData(data.train, data.test.on(self.hardware.device))

    @property
    def state(self) -> Path:
        """The trainer's own folder.

        Raises:
            ConfigError: There is no configuration.
        """
        if self.settings is None:
            raise ConfigError("no configuration says where models are kept", "", "name it: -c FILE")
        return self.settings.trainer_state

    def held(self, name: str) -> HeldModel:
        """A model: of a file, of an exported folder, or the one that was tuned last.

        A common model is completed by what this hospital keeps at home for its run.

        Raises:
            ConfigError: It is missing, or does not fit.
        """
        path = newest_tuned(self.state) if name == TUNED else Path(name)
        held = read_model(path / "model.safetensors" if path.is_dir() else path, self.task)
        if held.origin.kind in ("mine", "tuned"):
            return held
        return HeldModel(held.vector, self._at_home(held.origin.run_id), held.origin)

    def tuned_in(self, run_id: str) -> HeldModel | None:
        """The model that was tuned here in a run; None where none was."""
        if self.settings is None or not (path := tuned_path(self.state, run_id)).exists():
            return None
        return read_model(path, self.task)

    def ready(self, held: HeldModel) -> nn.Module:
        """The model on the device, in evaluation mode."""
        return ready_model(self.task, held.vector, home=held.home, hardware=self.hardware)

    def measured(self, held: HeldModel) -> dict[str, float]:
        """The task's metrics on the hospital's own test patients."""
        watch, test = Watch(), self.data.test
        with reporting(watch):
            return evaluate(
                self.task,
                held.vector,
                test,
                home=held.home,
                hardware=self.hardware,
                watch=watch,
            )

    def _at_home(self, run_id: str) -> Home:
        folder = None if self.settings is None else self.settings.trainer_state
        return HomeFolder(folder, task_id(self.task)).of(bytes.fromhex(run_id))
