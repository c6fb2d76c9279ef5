"""`export`: a model as a folder with a card; for `p2pfed model export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from p2pfed.training import place
from p2pfed.training.answering import answer
from p2pfed.training.export import Wishes, example_of, export, onnx_installed

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, where to, and what of it."""
    place.arguments(parser)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--onnx", action="store_true")
    parser.add_argument("--mine", action="store_true")
    parser.add_argument("--with-metrics", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Write the folder; print what is in it."""
    return answer(lambda: _export(args))


def _export(args: argparse.Namespace) -> dict[str, Any]:
    if args.onnx:
        onnx_installed()
    here = place.Place.opened(args)
    held = here.held(args.model)
    wishes = Wishes(
        mine=args.mine,
        onnx=example_of(here.data.test) if args.onnx else None,
        metrics=here.measured(held) if args.with_metrics else None,
    )
    made = export(args.out, here.task, here.spec, held, wishes)
    return {**made, "model": held.origin.short}
