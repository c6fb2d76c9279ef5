"""task new, check, pause, resume, log: write a task, try it out, have no trainer for a while.

`task` is a group of its own because what it holds concerns the hospital's training alone: no peer
is asked, and nothing that was released changes. `new`, `check` and `log` need no daemon: what a
task says is in the trainer's own log, which never goes through the network process.
"""

from __future__ import annotations

from p2pfed.cli.check_task import check, check_options
from p2pfed.cli.locate import admin_client, trainer_log
from p2pfed.cli.new_task import new, new_options
from p2pfed.cli.options import describe, with_socket
from p2pfed.cli.text import emit, printable
from p2pfed.errors import ConfigError, NotFound, NotPermitted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

__all__ = ["task"]

_MOST_BYTES = 1 << 20  # of the log's end


def task(parser: ArgumentParser) -> None:
    """Fill in the command group `task`."""
    describe(parser, "This hospital's training: write a task, try it, pause it.")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    making = actions.add_parser("new", help="write a small project with a task of your own")
    describe(making, "Write a small project with a task, which runs as it stands. No daemon.")
    new_options(making)
    making.set_defaults(run=new)
    checking = actions.add_parser("check", help="one dry step of a task on this hospital's data")
    describe(
        checking,
        "Try a task on this hospital's own data: what it gives, what is wrong with it, and what\n"
        "a round would cost in time, memory and bytes. Nothing leaves, no budget is spent, and\n"
        "no daemon is needed. Exit code 1 where something failed.",
    )
    check_options(checking)
    checking.set_defaults(run=check)
    reading = actions.add_parser("log", help="the end of the trainer's own log")
    describe(
        reading,
        "Print the end of trainer.log: what the task printed, and the whole text of what went\n"
        "wrong. It may hold patients' data; only the trainer's user (and root) may read it.\n"
        "No daemon.",
    )
    reading.add_argument("-n", "--lines", default="50", metavar="N", help="default 50")
    with_socket(reading)
    reading.set_defaults(run=_log)
    for name, paused, text in (
        (
            "pause",
            True,
            "End the trainer, so that its GPUs are free; a round under way is lost, nothing else.\n"
            "The node goes on receiving, and peers do not wait for it. It stays so over restarts\n"
            "until `p2pfed task resume`.",
        ),
        ("resume", False, "Start the trainer again."),
    ):
        action = actions.add_parser(name, help=text.partition(",")[0].partition(".")[0].lower())
        describe(action, text, endpoint="POST /v1/task")
        with_socket(action)
        action.set_defaults(run=lambda args, paused=paused: _pause(args, paused=paused))


def _pause(args: Namespace, *, paused: bool) -> None:
    # The daemon answers when the trainer has ended.
    data = admin_client(args, timeout=60.0).post("/v1/task", {"paused": paused})
    line = "training is paused; to go on: p2pfed task resume" if paused else "training goes on"
    emit(args, "task", data, [line])


def _log(args: Namespace) -> None:
    if not (args.lines.isascii() and args.lines.isdigit() and 0 < len(args.lines) < 7):
        raise ConfigError(
            f"-n {args.lines!r} is not a number of lines",
            "it is a whole number from 1 to 999999",
            "e.g. -n 50",
        )
    path = trainer_log(args)
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _MOST_BYTES))
            text = file.read(_MOST_BYTES).decode("utf-8", "replace")
    except FileNotFoundError as error:
        raise NotFound(
            f"there is no {path}",
            "no trainer has run yet that listens beside it",
            "look at p2pfed status; -c FILE names another configuration",
        ) from error
    except PermissionError as error:
        raise NotPermitted(
            f"cannot read {path}: permission denied",
            "it may hold patients' data and belongs to the trainer's user alone",
            "run it as that user (train.user, else the daemon's): sudo -u USER p2pfed task log",
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}", error.strerror or str(error)) from error
    lines = text.splitlines()[-int(args.lines) :]
    emit(args, "task-log", {"file": str(path), "lines": lines}, map(printable, lines))
