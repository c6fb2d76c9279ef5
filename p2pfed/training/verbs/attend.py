"""`attend`: the trainer as a service of its own user; what `p2pfed trainer` becomes."""

from __future__ import annotations

import argparse
from pathlib import Path

from p2pfed.training.service import attend

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which node it trains for."""
    parser.add_argument("--config", type=Path, required=True)


def run(args: argparse.Namespace) -> int:
    """Keep a trainer for the node until told to stop."""
    return attend(args.config.resolve())
