"""`check`: a dry run of a task, in a process that may die of it; for `p2pfed task check`.

Messages (`training.check`) go as lines of JSON to a file descriptor of their own: what the task
prints is left to who started the process. The last one is `{"end": true}`.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import resource
import sys
from pathlib import Path

from p2pfed.config import Node, Settings, Train
from p2pfed.training.limits import free_memory, keep_within

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """What to check, and whom to tell."""
    parser.add_argument("--subject", type=json.loads, required=True, help="JSON of a Subject")
    parser.add_argument("--memory-gb", type=float, default=0.0, help="0: what is free")
    parser.add_argument("--report-fd", type=int, required=True)


def run(args: argparse.Namespace) -> int:
    """Check, and leave without waiting for what a task has started."""
    faulthandler.enable()  # names the line where a task crashed
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it would hold the patients
    os.set_inheritable(args.report_fd, False)
    limit = args.memory_gb or (free_memory() or 0) / 1e9
    keep_within(
        Settings(node=Node(name="check", data_dir=Path()), train=Train(task="-", memory_gb=limit))
    )
    _check(args)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a task may have closed it
            stream.flush()
    os._exit(0)


def _check(args: argparse.Namespace) -> None:
    # Not before the limit is set: loading torch counts.
    import torch  # noqa: PLC0415

    from p2pfed.training.check import Message, Subject, check  # noqa: PLC0415
    from p2pfed.training.check_steps import Bench  # noqa: PLC0415
    from p2pfed.training.check_training import steps_of  # noqa: PLC0415
    from p2pfed.training.hardware import share_of_processors  # noqa: PLC0415

    def tell(message: Message) -> None:
        left = json.dumps(message).encode() + b"\n"
        while left:
            left = left[os.write(args.report_fd, left) :]

    torch.set_num_threads(share_of_processors())
    told = dict(args.subject)
    told["data"] = None if told["data"] is None else Path(told["data"])
    bench = Bench(Subject(**told), tell)
    check(bench, steps_of(bench), tell)
    tell({"end": True})
