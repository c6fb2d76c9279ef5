"""`evaluate`: models side by side on the hospital's own test patients; for `p2pfed model`.

The first model is the task's own of seed 0: that of `p2pfed run create`, where torch is the same.
*Alone* is trained from it on this hospital's training patients only, with the task's optimiser, for
as many local steps as the run without privacy has made; so it has seen as much as the common model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from p2pfed.training import place
from p2pfed.training.answering import answer, reporting, say
from p2pfed.training.home import NOTHING
from p2pfed.training.local import initial_vector, train_local
from p2pfed.training.model_file import HeldModel
from p2pfed.training.provenance import Provenance
from p2pfed.training.watch import Watch

__all__ = ["arguments", "run"]

_SEED = 0


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and against what."""
    place.arguments(parser)
    parser.add_argument("--against-alone", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Print the metrics of each model."""
    return answer(lambda: _evaluate(args))


def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    here = place.Place.opened(args)
    held = here.held(args.model)
    here.data  # noqa: B018 - read now: what it says comes before the first model
    rows = []
    for name, model in _models(here, held, alone=args.against_alone):
        say(f"evaluating: {name}")
        rows.append({"model": name, "metrics": here.measured(model)})
    return {
        "model": held.origin.short,
        "task": here.task.name,
        "monitor": here.task.monitor,
        "larger_is_better": here.task.larger_is_better,
        "rows": rows,
    }


def _models(here: place.Place, held: HeldModel, *, alone: bool) -> Iterator[tuple[str, HeldModel]]:
    """What is compared, one by one: a model can be large."""
    is_tuned = held.origin.kind == "tuned"
    yield ("tuned" if is_tuned else "common"), held
    tuned = None if is_tuned else here.tuned_in(held.origin.run_id)
    if tuned is not None:
        yield f"tuned (after round {tuned.origin.round})", tuned
    first = initial_vector(here.task, seed=_SEED)
    yield "first, untrained", HeldModel(first, NOTHING, held.origin)
    if alone:
        steps = here.task.hyper.local_steps * max(1, held.origin.round)
        yield f"alone, {steps} steps", _alone(here, held.origin, steps)


def _alone(here: place.Place, origin: Provenance, steps: int) -> HeldModel:
    watch = Watch()
    say(f"training alone for {steps} steps")
    with reporting(watch):
        trained = train_local(
            here.task,
            here.data.train,
            initial_vector(here.task, seed=_SEED),
            steps=steps,
            seed=_SEED,
            hardware=here.hardware,
            watch=watch,
        )
    return HeldModel(trained.vector, trained.home, origin)
