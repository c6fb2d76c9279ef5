"""`python -m p2pfed.training serve|describe`: the trainer process; a task's facts for a run."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from p2pfed.errors import P2PFedError
from p2pfed.training.local import initial_vector
from p2pfed.training.process import serve
from p2pfed.training.task import load_task, task_id
from p2pfed.training.vector import write_vector


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m p2pfed.training")
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve", help="answer a node's requests; started by the node")
    serving.add_argument("--config", type=Path, required=True)
    serving.add_argument("--control-fd", type=int, required=True)
    serving.add_argument("--exchange", type=Path, required=True)
    describing = commands.add_parser("describe", help="write a genesis, print the task's facts")
    describing.add_argument("task")
    describing.add_argument("--genesis", type=Path, required=True)
    describing.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "serve":
        # Ctrl-C reaches the whole terminal; the node decides when we stop.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return serve(args.config, args.control_fd, args.exchange)
    return _describe(args.task, args.genesis, args.seed)


def _describe(name: str, genesis: Path, seed: int) -> int:
    try:
        task = load_task(name)
        vector = initial_vector(task, seed=seed)
        facts = {
            "task": name,
            "task_id": task_id(task).hex(),
            "genesis": write_vector(genesis, vector).hex(),
            "num_parameters": int(vector.size),
        }
    except P2PFedError as error:
        print(error, file=sys.stderr)  # noqa: T201 - a command's error
        return error.exit_code
    except OSError as error:
        print(f"cannot write {genesis}: {error.strerror}", file=sys.stderr)  # noqa: T201
        return 2
    print(json.dumps(facts))  # noqa: T201 - a command's output
    return 0


if __name__ == "__main__":
    sys.exit(main())
