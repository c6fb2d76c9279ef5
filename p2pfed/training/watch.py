"""Where a round's time goes, and how far a long step is; for the hospital's own eyes.

A `Watch` is told by those who work and read by the private socket's threads. It never leaves the
trainer: how long the work on a hospital's patients takes, and on what, tells of them.

Kinds of time: `data` (waiting for records), `compute`, `gate` (clipping, ledger, noise, encoding),
`peers` (between rounds), `load` (reading the model), `evaluation`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

__all__ = ["Watch", "telling"]

logger = logging.getLogger(__name__)

_KEPT_NOTES = 20


class Watch:
    """See the module docstring.

    Args:
        now: A clock in seconds.
        heard: Is given every note, in place of the log.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.monotonic,
        heard: Callable[[str], None] | None = None,
    ) -> None:
        self._now = now
        self._heard = heard
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}
        self._inner: list[float] = []
        self._step: dict[str, Any] = {}
        self._since = now()
        self._notes: dict[str, int] = {}  # which of all it was when it was said last
        self._said = 0

    @contextmanager
    def spent_on(self, kind: str) -> Iterator[None]:
        """Count the time of the block; what blocks inside count is not counted again."""
        started = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            whole = self._now() - started
            inside = self._inner.pop()
            if self._inner:
                self._inner[-1] += whole
            with self._lock:
                self._seconds[kind] = self._seconds.get(kind, 0.0) + whole - inside

    def add(self, kind: str, seconds: float) -> None:
        """Count time that was measured elsewhere; it is not counted again by blocks around it."""
        if self._inner:
            self._inner[-1] += seconds
        with self._lock:
            self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds

    def progress(self, step: str, done: int, of: int) -> None:
        """Say how far a step is; the first call of a step starts its clock."""
        with self._lock:
            if self._step.get("step") != step:
                self._since = self._now()
            self._step = {"step": step, "done": done, "of": of}

    def note(self, text: str) -> None:
        """Say what the engineer should know, e.g. that memory ran out; also to the log.

        What is said again in every round is kept once, or it would drive out all else.
        """
        with self._lock:
            self._notes.pop(text, None)
            self._said += 1
            self._notes[text] = self._said
            if len(self._notes) > _KEPT_NOTES:
                del self._notes[next(iter(self._notes))]
        if self._heard is None:
            logger.warning("%s", text)
        else:
            self._heard(text)

    @property
    def notes(self) -> list[str]:
        """The newest notes, each once, by when they were said last."""
        return self.notes_after(0)

    @property
    def said(self) -> int:
        """How many notes there were so far; for `notes_after`."""
        with self._lock:
            return self._said

    def notes_after(self, said: int) -> list[str]:
        """The notes that were said, or said again, since there were so many."""
        with self._lock:
            return [text for text, number in self._notes.items() if number > said]

    def idle(self) -> None:
        """Nothing is going on."""
        with self._lock:
            self._step = {}

    def taken(self) -> dict[str, float]:
        """Seconds by kind since the last call; starts anew."""
        with self._lock:
            taken, self._seconds = self._seconds, {}
        return taken

    @property
    def shown(self) -> dict[str, Any]:
        """The step at hand with its seconds so far, for JSON; empty while idle."""
        with self._lock:
            return {**self._step, "seconds": self._now() - self._since} if self._step else {}


class _Telling(Protocol):
    progress: Callable[[int, int], None] | None


@contextmanager
def telling(task: _Telling, watch: Watch, step: str) -> Iterator[None]:
    """While open, what a task says of its progress is that of a step.

    In this thread alone: pictures are drawn in another one, whenever somebody looks at them.
    """
    mine, before = threading.get_ident(), task.progress

    def tell(done: int, of: int) -> None:
        if threading.get_ident() == mine:
            watch.progress(step, done, of)

    task.progress = tell
    try:
        yield
    finally:
        task.progress = before
