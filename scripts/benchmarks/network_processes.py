"""Processes of the network benchmarks: orders and answers over a pipe, none of them without an end.

The parent gives orders to each :class:`Child` and measures it from outside; the child's main takes
its :class:`Orders`. Invariant: whatever a child does (fail, die, stand still), the parent's next
`hear` raises :class:`Failed` in time, and no child outlives its `with` block or its parent.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import trio

__all__ = ["Child", "Failed", "Orders"]

PAGE = os.sysconf("SC_PAGE_SIZE")


class Failed(Exception):
    """A process of the benchmark did not do what it was told."""


class _ParentGone(Exception):
    """There is nobody to work for."""


@dataclass(frozen=True, slots=True)
class _Report:
    """What a child says last."""

    text: str


class Orders:
    """A child's side of the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    async def next(self) -> Any:
        """Wait for an order."""
        await trio.lowlevel.wait_readable(self._pipe.fileno())
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            raise _ParentGone from None

    def answer(self, value: Any) -> None:
        """Say how it went."""
        try:
            self._pipe.send(value)
        except OSError:
            raise _ParentGone from None


class Child:
    """A process that lives as long as the `with` block.

    Args:
        name: What it is called when it fails.
        main: An async function of a module, called with its Orders and the arguments.
        arguments: Anything that can be pickled.
    """

    def __init__(self, name: str, main: Callable[..., Any], *arguments: Any) -> None:
        self._name = name
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_child, args=(theirs, main, arguments), daemon=True
        )
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def order(self, order: Any) -> None:
        """Tell it what to do next."""
        try:
            self._pipe.send(order)
        except OSError as error:
            raise Failed(f"{self._name} is gone") from error

    def hear(self, seconds: float) -> Any:
        """Return its next answer.

        Raises:
            Failed: It said that it failed, ended, or said nothing for so long.
        """
        try:
            if not self._pipe.poll(seconds):
                raise Failed(f"{self._name} gave no answer for {seconds:g} s")
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            raise Failed(f"{self._name} ended, exit code {self._process.exitcode}") from error
        if isinstance(answer, _Report):
            raise Failed(f"{self._name} failed: {answer.text}")
        return answer

    def ask(self, order: Any, seconds: float) -> Any:
        """Give an order and return the answer."""
        self.order(order)
        return self.hear(seconds)

    def cpu_seconds(self) -> float:
        """User and system time of all its threads up to now."""
        return time.clock_gettime((~self._pid << 3) | 2)  # clock_getcpuclockid(3), as Linux has it

    def memory(self) -> int:
        """Resident bytes."""
        return PAGE * int(Path(f"/proc/{self._pid}/statm").read_text().split()[1])

    def descriptors(self) -> int:
        """How many files and sockets it has open."""
        return sum(1 for _ in Path(f"/proc/{self._pid}/fd").iterdir())

    @property
    def _pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid


def _child(pipe: Connection, main: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends us
    try:
        trio.run(main, Orders(pipe), *arguments)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent tells it
        text = "; ".join(_leaves(error))
        if text:
            with contextlib.suppress(OSError):
                pipe.send(_Report(text))


def _leaves(error: BaseException) -> list[str]:
    """The single errors of a group, without that the parent is gone."""
    if isinstance(error, BaseExceptionGroup):
        return [text for inner in error.exceptions for text in _leaves(inner)]
    if isinstance(error, _ParentGone):
        return []
    why = f" ({error.__cause__!r})" if error.__cause__ is not None else ""
    return [f"{type(error).__name__}: {error}{why}"]
