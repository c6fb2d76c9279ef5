"""`serve`: the trainer process, started by the node."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from p2pfed.training.process import serve

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the node gives it."""
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--exchange", type=Path, required=True)


def run(args: argparse.Namespace) -> int:
    """Answer the node's requests until it stops."""
    # Ctrl-C reaches the whole terminal; the node decides when we stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return serve(args.config, args.control_fd, args.exchange)
