"""trainer: the hospital's trainer as a service of its own user, in front.

The command becomes the private plane's process (exec), so that a service manager sees one process
and its signals arrive. It speaks to the daemon through `loop.sock` alone.
"""

from __future__ import annotations

import os
import sys

from p2pfed.cli.locate import config_path
from p2pfed.cli.options import describe
from p2pfed.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

__all__ = ["trainer"]


def trainer(parser: ArgumentParser) -> None:
    """Fill in the command `trainer`."""
    import argparse

    describe(
        parser,
        "Run the trainer in front, as the user that train.user names. It waits for the daemon,\n"
        "joins it through loop.sock and trains when it is asked; after a restart of the daemon it\n"
        "joins again. Only this user needs to read the patients, the ledger and trainer.log.\n"
        "Without train.user the daemon starts the trainer itself, and this command is not needed.",
    )
    parser.add_argument("-c", "--config", metavar="FILE", default=argparse.SUPPRESS)
    parser.set_defaults(run=_trainer)


def _trainer(args: Namespace) -> int:
    path = config_path(args)
    if path is None:
        raise ConfigError(
            "no configuration found",
            "not here, not in ~/.config/p2pfed, not in /etc/p2pfed",
            "name the node's: p2pfed trainer -c FILE",
        )
    command = [sys.executable, "-P", "-m", "p2pfed.training", "attend"]  # -P: no code from here
    sys.stdout.flush()
    os.execv(sys.executable, [*command, "--config", str(path.resolve())])  # noqa: S606 - ourselves
