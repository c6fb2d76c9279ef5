"""`predict`: what a model says of new cases, as files; for `p2pfed predict`.

Each input is worked on in a hidden folder beside the results and moved there when it is done, so
that what has its name is whole, and nothing is overwritten.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from p2pfed.errors import ConfigError
from p2pfed.training import place
from p2pfed.training.answering import answer, say
from p2pfed.training.task import Task

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, which cases, where to."""
    place.arguments(parser)
    parser.add_argument("--in", type=Path, required=True, action="append", dest="sources")
    parser.add_argument("--out", type=Path, required=True)


def run(args: argparse.Namespace) -> int:
    """Write the predictions; print their files."""
    return answer(lambda: _predict(args))


def _predict(args: argparse.Namespace) -> dict[str, Any]:
    here = place.Place.opened(args)
    for source in args.sources:
        if not source.exists():
            raise ConfigError(f"there is nothing at {source}", "", "correct --in")
    held = here.held(args.model)
    model = here.ready(held)
    say(held.origin.short)
    _make(args.out)
    written: list[str] = []
    try:
        for source in args.sources:
            written += _predicted(here.task, model, source, args.out)
    finally:
        with contextlib.suppress(OSError):  # it stays where there is something in it
            args.out.rmdir()
    return {"model": held.origin.short, "task": here.task.name, "files": written}


def _predicted(task: Task, model: nn.Module, source: Path, out: Path) -> list[str]:
    try:
        aside = Path(tempfile.mkdtemp(dir=out, prefix=".partial-"))
        try:
            with torch.no_grad():
                return _moved(task.predict_all(model, source, aside, _tell), out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise _unwritten(out, error) from error


def _tell(done: int, of: int) -> None:
    say(f"case {done + 1} of {of}")


def _moved(found: Sequence[Path], out: Path) -> list[str]:
    names = []
    for path in found:
        there = out / path.name
        if there.exists():
            raise ConfigError(
                f"{there} exists already",
                "two inputs have a case of this name",
                "predict them apart",
            )
        path.chmod(0o600)
        path.rename(there)
        names.append(str(there))
    return names


def _make(out: Path) -> None:
    try:
        out.mkdir(mode=0o700, parents=True)
    except FileExistsError as error:
        raise ConfigError(
            f"{out} exists already", "nothing is overwritten", "name a new folder"
        ) from error
    except OSError as error:
        raise _unwritten(out, error) from error


def _unwritten(out: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot write to {out}", error.strerror or "", "make room there, or name another place"
    )
