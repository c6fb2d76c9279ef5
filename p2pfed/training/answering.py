"""How a verb answers the command that started it: one JSON object on its standard output.

`{"data": ...}`, or `{"error": {what, why, do, exit_code}}`. What a task or a library prints
meanwhile goes to standard error, where progress goes too; it cannot be taken for the answer.

Invariant: whatever a task raises becomes an error that says so, never a traceback (except with
P2PFED_DEBUG). No core is dumped: it would hold patients.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from p2pfed.errors import P2PFedError
from p2pfed.training.hardware import is_out_of_memory
from p2pfed.training.watch import Watch

__all__ = ["answer", "reporting", "say"]

_EVERY_S = 2.0  # between two lines of progress


def answer(work: Callable[[], Mapping[str, Any]]) -> int:
    """Do the work and print what it gave, or what went wrong.

    Args:
        work: Gives what can be written as JSON; numbers that are not finite become null.

    Returns:
        The exit code.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    output = os.dup(1)
    sys.stdout.flush()
    os.dup2(2, 1)
    try:
        told, code = _told(work)
        with os.fdopen(output, "w", encoding="utf-8") as file:
            json.dump(told, file, allow_nan=False)
    except BrokenPipeError:  # who asked has gone
        return 1
    return code


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - the terminal of who asked


@contextmanager
def reporting(watch: Watch) -> Iterator[None]:
    """Say now and then how far the block is."""
    over = threading.Event()

    def report() -> None:
        last: tuple[Any, ...] = ()
        while not over.wait(_EVERY_S):
            now = watch.shown
            here = tuple(now.get(key) for key in ("step", "done", "of"))
            if now and here != last:
                say(f"{now['step']}: {now['done']} of {now['of']}")
                last = here

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _told(work: Callable[[], Mapping[str, Any]]) -> tuple[dict[str, Any], int]:
    try:
        return {"data": _finite(work())}, 0
    except P2PFedError as error:
        problem = error
    except KeyboardInterrupt:
        problem = P2PFedError("interrupted", "", "")
        problem.exit_code = 130
    except BaseException as error:  # noqa: BLE001 - a task may raise anything, SystemExit too
        problem = _problem(error)
    told = {"what": problem.what, "why": problem.why, "do": problem.do}
    return {"error": {**told, "exit_code": problem.exit_code}}, problem.exit_code


def _problem(error: BaseException) -> P2PFedError:
    if os.environ.get("P2PFED_DEBUG"):
        traceback.print_exception(error)
    if is_out_of_memory(error):
        return P2PFedError(
            "memory ran out",
            "the model, its data and the trainer share this machine",
            "pause the trainer meanwhile (p2pfed task pause), or set train.device = cpu",
        )
    text = str(error).strip().partition("\n")[0]
    frames = traceback.extract_tb(error.__traceback__)
    where = f"in {frames[-1].name}, line {frames[-1].lineno} of {frames[-1].filename}"
    return P2PFedError(
        f"the task failed: {type(error).__name__}{': ' * bool(text)}{text}",
        where,
        "p2pfed task check looks for what is wrong with a task",
    )


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
