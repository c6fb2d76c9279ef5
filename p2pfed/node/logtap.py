"""Readers of the daemon's log at a level of their own, as serf's `monitor` has them.

A reader may be more verbose than the log that the daemon writes, which stays as it is: while there
is a reader the loggers let more through, and the daemon's own handler goes on judging by its level.

Invariants. Records pass the same `Plain` as those that are written, so that no reader sees what the
log may not hold. A reader that is slow loses the oldest of its records and is told how many; the
daemon never waits for it. Records come from any thread.

Source: serf's `agent monitor`. Not here: the endpoint (`admin/app`), the log itself (`logs`).
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

import trio

from p2pfed.errors import ConfigError
from p2pfed.node.logs import LogHandler, Plain

__all__ = ["KEPT", "follow_log", "let_through", "log_level"]

KEPT = 1000  # records of a reader that it has not taken yet
_LEVELS = ("debug", "info", "warning", "error")
_readers: list[_Reader] = []


def log_level(text: str) -> int:
    """The number of a level by its name.

    Raises:
        ConfigError: There is no such level.
    """
    if text not in _LEVELS:
        raise ConfigError(f"level={text[:40]!r} is no level", f"there are {', '.join(_LEVELS)}")
    return logging.getLevelNamesMapping()[text.upper()]


class _Reader(logging.Handler):
    """One reader's records on their way from any thread to the event loop."""

    def __init__(self, level: int, plain: Plain) -> None:
        super().__init__(level)
        self._plain = plain
        self._waiting: deque[dict[str, Any]] = deque()
        self._lost = 0
        self._loop = trio.lowlevel.current_trio_token()
        self._news = trio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._waiting) >= KEPT:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append(self._line(record))
        with contextlib.suppress(trio.RunFinishedError):  # the daemon has ended
            self._loop.run_sync_soon(self._wake, idempotent=True)

    def _line(self, record: logging.LogRecord) -> dict[str, Any]:
        plain = self._plain.record(record)
        told = " ".join(f"{key}={value}" for key, value in plain.get("fields", {}).items())
        message = f"{plain['message']} {told}" if told else plain["message"]
        if "exception" in plain:
            message = f"{message}\n{plain['exception']}"
        return {**{key: plain[key] for key in ("ts", "level", "logger")}, "message": message}

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def take(self) -> list[dict[str, Any]]:
        """Wait for records; where some were lost, a line of type `gap` comes first."""
        while True:
            news = self._news
            with self.lock:  # type: ignore[union-attr] # every handler has one
                taken, lost = list(self._waiting), self._lost
                self._waiting.clear()
                self._lost = 0
            if taken:
                return [{"type": "gap", "lost": lost}, *taken] if lost else taken
            await news.wait()


async def follow_log(level: int) -> AsyncGenerator[dict[str, Any], None]:
    """Every record of at least this level from now on, `{"ts", "level", "logger", "message"}`.

    Args:
        level: As `log_level` gives it.
    """
    root = logging.getLogger()
    own = _own_handler()
    reader = _Reader(level, own.plain if own is not None else Plain())
    before = root.level if own is None and not _readers else None
    _readers.append(reader)
    root.addHandler(reader)
    let_through()
    try:
        while True:
            for line in await reader.take():
                yield line
    finally:
        root.removeHandler(reader)
        _readers.remove(reader)
        reader.close()
        let_through()
        if before is not None:
            root.setLevel(before)


def let_through() -> None:
    """Have the loggers pass what the daemon's own log and all readers want; after `set_level`."""
    own = _own_handler()
    wanted = [reader.level for reader in _readers]
    wanted += [own.level] if own is not None else []
    if wanted:
        logging.getLogger().setLevel(min(wanted))


def _own_handler() -> LogHandler | None:
    handlers = logging.getLogger().handlers
    return next((handler for handler in handlers if isinstance(handler, LogHandler)), None)
