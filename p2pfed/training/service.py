"""The trainer as a service of its own user: wait for the daemon, then start the trainer for it.

`p2pfed trainer` is this process. It joins the daemon through `loop.sock`, as a training loop does
(`loop_link`), and hands the connection to `python -m p2pfed.training serve`: the very process that
a daemon with `train.user = ""` starts as its child. Whatever ends that one (the daemon was stopped
or killed, training was paused, the task failed) it waits here, and joins again.

Invariant: while no trainer runs nothing is held: no torch, no GPU, no ledger, no patient. One
trainer at a time; it ends with this process. What the daemon says while it takes nobody is told
once, on standard error.

Not here: who may join (node room), what the trainer does (`process`).
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from p2pfed.config import Settings, load_settings
from p2pfed.errors import AdminError, ConfigError, P2PFedError, PolicyError, TrainerError
from p2pfed.training.loop_link import Link

__all__ = ["attend"]

AGAIN_S = 2.0  # between two attempts to join
_FIRST_REST_S, _LONGEST_REST_S = 1.0, 60.0  # after a trainer that ended soon
_STOP_S = 10.0  # for a trainer to end


class _Told(BaseException):
    """We were told to stop."""


def attend(config: Path, *, rest: Callable[[float], None] = time.sleep) -> int:
    """Keep a trainer for the node until told to stop (SIGTERM, SIGINT); returns the exit code.

    Args:
        config: The node's configuration file; the trainer's user must be able to read it.
        rest: Waits for some seconds.

    Raises:
        ConfigError: It is wrong, or says that the daemon starts the trainer.
    """
    settings = _checked(load_settings(config), config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    link, pause = Link(settings.loop_socket, wait=0.0), _FIRST_REST_S
    with contextlib.suppress(_Told):
        while True:
            _join(link, rest)
            started = time.monotonic()
            code = _one_trainer(link, config)
            if code == 0 or time.monotonic() - started > _LONGEST_REST_S:
                pause = _FIRST_REST_S
                continue
            _say(f"the trainer ended with exit code {code}; next one in {pause:.0f} s")
            rest(pause)
            pause = min(2 * pause, _LONGEST_REST_S)
    return 0


def _checked(settings: Settings, config: Path) -> Settings:
    if not settings.train.enabled:
        raise ConfigError(f"{config}: this node trains nothing", "train.enabled is false")
    if not settings.train.user:
        raise ConfigError(
            "the daemon starts the trainer itself",
            "train.user is not set",
            "set it to the user of this process, and start the daemon again",
        )
    return settings


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    raise _Told


def _join(link: Link, rest: Callable[[float], None]) -> None:
    """Reach the daemon; where it is not there or takes nobody, try for ever."""
    said = ""
    while True:
        try:
            link.connect()
        except (AdminError, PolicyError, TrainerError, OSError) as error:
            told = error.what if isinstance(error, P2PFedError) else str(error)
            if told != said:
                _say(f"waiting: {told}")
            said = told
        else:
            return
        rest(AGAIN_S)


def _one_trainer(link: Link, config: Path) -> int:
    """Start a trainer on the connection and wait for its end; returns its exit code."""
    with link.give_away() as control:
        command = [sys.executable, "-P", "-m", "p2pfed.training", "serve"]  # -P: no code from here
        command += ["--config", str(config), "--control-fd", str(control.fileno())]
        command += ["--exchange", str(link.exchange)]
        trainer = subprocess.Popen(command, pass_fds=[control.fileno()])  # noqa: S603 - ourselves
    try:
        return trainer.wait()
    finally:
        _end(trainer)


def _end(trainer: subprocess.Popen[bytes]) -> None:
    """Ending it at any moment is safe: the ledger stands it like a crash."""
    if trainer.poll() is None:
        trainer.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            trainer.wait(_STOP_S)
        trainer.kill()
        trainer.wait()


def _say(text: str) -> None:
    print(f"trainer: {text}", file=sys.stderr, flush=True)  # noqa: T201 - the service's log
