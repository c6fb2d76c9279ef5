"""`pictures`: best, median and worst test case of a model, in three planes; for `p2pfed model`.

They are patients' images: they go to who asked through a pipe and lie on no disk on the way.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from p2pfed.errors import ConfigError
from p2pfed.training import place
from p2pfed.training.answering import answer, reporting, say
from p2pfed.training.record import pictures_as_json
from p2pfed.training.watch import Watch, telling

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which model."""
    place.arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the pictures as the trainer's private socket gives them."""
    return answer(lambda: _pictures(args))


def _pictures(args: argparse.Namespace) -> dict[str, Any]:
    here = place.Place.opened(args)
    held = here.held(args.model)
    say("going over the hospital's test patients")
    watch, test, model = Watch(), here.data.test, here.ready(held)
    with reporting(watch), telling(here.task, watch, "pictures"), torch.no_grad():
        found = here.task.pictures(model, test)
    shown = pictures_as_json(list(found))
    if not shown:
        raise ConfigError(
            f"the task {here.task.name!r} shows no pictures",
            "its patients are no images, or it does not say how to show them",
            "see its figures instead: p2pfed model evaluate",
        )
    return {"model": held.origin.short, "monitor": here.task.monitor, "pictures": shown}
