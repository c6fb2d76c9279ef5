"""`describe`: a task's facts for a run file, and the run's first model; for `p2pfed run create`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from p2pfed.errors import ConfigError
from p2pfed.training.local import initial_vector
from p2pfed.training.loop_task import LOOP, load_either
from p2pfed.training.task import task_id
from p2pfed.training.vector import write_vector

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which task, and where to put its first model."""
    parser.add_argument("task", help="bundled, module:Class, or loop:module:function")
    parser.add_argument("--genesis", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--options", type=json.loads, default={}, help="JSON of what train.options is here"
    )


def run(args: argparse.Namespace) -> int:
    """Print the facts as JSON; the options are this machine's own and are none of them."""
    name, genesis = args.task, args.genesis
    if args.options and name.startswith(f"{LOOP}:"):
        raise ConfigError(
            f"{name!r} takes no options", "a loop's model is made without", "leave --option out"
        )
    task = load_either(name, args.options)
    vector = initial_vector(task, seed=args.seed)
    try:
        digest = write_vector(genesis, vector)
    except OSError as error:
        raise ConfigError(f"cannot write {genesis}: {error.strerror}") from error
    facts = {
        "task": name,
        "task_id": task_id(task).hex(),
        "genesis": digest.hex(),
        "num_parameters": int(vector.size),
    }
    print(json.dumps(facts))  # noqa: T201 - a command's output
    return 0
