"""`tune`: fine-tune the common model on the hospital's patients and keep it; for `p2pfed model`.

What it makes is never shared: it is kept in the trainer's own folder, 0600.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any

from p2pfed.errors import ConfigError
from p2pfed.training import place
from p2pfed.training.answering import answer, reporting
from p2pfed.training.model_file import HeldModel, named_tensors, tuned_path, write_tensors
from p2pfed.training.tuning import tune
from p2pfed.training.watch import Watch

__all__ = ["arguments", "run"]

_ROUNDS = 5  # so many rounds' local steps are tried at most, unless it is said otherwise


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and how far."""
    place.arguments(parser)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Keep the tuned model; print how it was made and what it is worth."""
    return answer(lambda: _tune(args))


def _tune(args: argparse.Namespace) -> dict[str, Any]:
    here = place.Place.opened(args)
    held = here.held(args.model)
    if held.origin.kind == "tuned":
        raise ConfigError(
            "this model is tuned already", "", "tune the common one: p2pfed model tune"
        )
    steps = args.steps or _ROUNDS * here.task.hyper.local_steps
    path = tuned_path(here.state, held.origin.run_id)
    train, watch = here.data.train, Watch()
    with reporting(watch):
        made = tune(
            here.task,
            held.vector,
            train,
            steps=steps,
            seed=args.seed,
            home=held.home,
            hardware=here.hardware,
            watch=watch,
        )
    how = f"{made.chosen.steps} steps at learning rate {made.chosen.rate:g}"
    tuned = HeldModel(made.vector, made.home, replace(held.origin, kind="tuned", tuning=how))
    rows = [
        {"model": name, "metrics": here.measured(model)}
        for name, model in (("common", held), ("tuned", tuned))
    ]
    write_tensors(path, named_tensors(here.task, tuned, mine=True), tuned.origin)
    return {
        "model": held.origin.short,
        "file": str(path),
        "monitor": here.task.monitor,
        "larger_is_better": here.task.larger_is_better,
        "chosen": asdict(made.chosen),
        "trials": [asdict(trial) for trial in made.trials],
        "rows": rows,
    }
