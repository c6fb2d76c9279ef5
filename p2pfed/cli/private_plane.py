"""Work for the private plane: `python -m p2pfed.training VERB` in a process of its own.

The command line never loads torch and never opens a patient's file. What the verb does there is
said on standard error as it goes; its answer is one JSON object, through a pipe.

Where the trainer is another user (`train.user`), root is sent away: a task's code would run with
root's rights, and leave files of root's in the trainer's folder.
"""

from __future__ import annotations

import os

from p2pfed.cli.locate import config_path, trainer_user
from p2pfed.errors import (
    ConfigError,
    NotPermitted,
    P2PFedError,
    PolicyError,
    TrainerError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from pathlib import Path
    from typing import Any

__all__ = ["ask", "place"]

_BY_EXIT_CODE: dict[int, type[P2PFedError]] = {2: ConfigError, 7: PolicyError}


def place(args: Namespace) -> list[str]:
    """The flags that say which configuration or task.

    Raises:
        ConfigError: Nothing says it.
        NotPermitted: The configuration is closed to us, and no task is named.
        PolicyError: We are root, and the trainer's user is to do it.
    """
    task = getattr(args, "task", None)
    try:
        found = config_path(args)
    except NotPermitted:
        if args.config or not task:
            raise
        found = None
    if found is not None:
        send_root_away(
            found,
            "p2pfed model fetch -o FILE, then: sudo -u {user} p2pfed ... --from FILE"
            "   (predict: --model FILE)",
        )
    if found is None and not task:
        raise ConfigError(
            "cannot tell which task the model belongs to",
            "no -c FILE, no P2PFED_CONFIG, and no p2pfed.toml here or in the usual places",
            "name the node's configuration: p2pfed -c FILE ...",
        )
    flags = [] if found is None else ["--config", str(found)]
    return [*flags, "--task", task] if task else flags


def send_root_away(config: Path, do: str) -> None:
    """Raise PolicyError for root where the patients are another user's: it runs no task's code.

    Args:
        config: The configuration, which may name that user (`train.user`).
        do: What to do instead, with `{user}` for the name.
    """
    user = trainer_user(config) if os.geteuid() == 0 else ""
    if user in {"", "0", "root"}:
        return
    raise PolicyError(
        f"the task's code would run as root; the patients are {user}'s",
        f"train.user is {user}, and what is written would be root's",
        do.format(user=user),
    )


def ask(verb: str, flags: list[str]) -> Any:
    """What a verb of the private plane answers.

    Args:
        verb: Its name.
        flags: Its arguments.

    Raises:
        P2PFedError: What it says went wrong, or that it ended without an answer.
    """
    import json
    import subprocess
    import sys

    command = [sys.executable, "-P", "-m", "p2pfed.training", verb, *flags]  # -P: as the trainer
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)  # noqa: S603
    try:
        told = json.loads(done.stdout)
        problem = told.get("error")
        if problem is None:
            return told["data"]
        what, why, do = (str(problem[key]) for key in ("what", "why", "do"))
        code = int(problem["exit_code"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _ended(verb, done.returncode) from error
    if code == 130:
        raise KeyboardInterrupt
    raise _BY_EXIT_CODE.get(code, P2PFedError)(what, why, do)


def _ended(verb: str, code: int) -> P2PFedError:
    import signal

    if code >= 0:
        how = f"with exit code {code}"
    else:
        try:
            how = f"by {signal.Signals(-code).name}"
        except ValueError:
            how = f"by signal {-code}"
    return TrainerError(
        f"the process that was to {verb} ended without an answer, {how}",
        "SIGKILL mostly means that the machine's memory ran out" if code == -9 else "",
        "see what it said above; p2pfed task check looks for what is wrong with a task",
    )
