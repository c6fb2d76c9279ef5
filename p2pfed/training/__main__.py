"""`python -m p2pfed.training VERB`: the private plane's processes, one module per verb.

A deliberate error is told on standard error, and its exit code is ours.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from p2pfed.errors import P2PFedError

# verb -> one line of help; `verbs.VERB` has `arguments(parser)` and `run(args)`.
VERBS = {
    "serve": "answer a node's requests; started by the node",
    "attend": "start `serve` for a daemon of another user; for `p2pfed trainer`",
    "describe": "write a genesis, print the task's facts",
    "worker": "one of several processes for a round; started by the trainer",
    "check": "one dry step of a task; started by `p2pfed task check`",
    "export": "a model as a folder with a card; for `p2pfed model export`",
    "evaluate": "models on the hospital's own test patients; for `p2pfed model evaluate`",
    "tune": "fine-tune a model at home; for `p2pfed model tune`",
    "pictures": "best, median and worst case; for `p2pfed model pictures`",
    "predict": "what a model says of new cases; for `p2pfed predict`",
}


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m p2pfed.training")
    commands = parser.add_subparsers(dest="verb", required=True)
    wanted = next((word for word in sys.argv[1:] if word in VERBS), None)
    modules = {}
    for verb, text in VERBS.items():
        command = commands.add_parser(verb, help=text)
        if verb == wanted:  # the others need not be loaded
            modules[verb] = importlib.import_module(f"p2pfed.training.verbs.{verb}")
            modules[verb].arguments(command)
    args = parser.parse_args()
    try:
        return int(modules[args.verb].run(args))
    except P2PFedError as error:
        print(error, file=sys.stderr)  # noqa: T201 - a command's error
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
