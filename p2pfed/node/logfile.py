"""Where log lines go: a file that may be rotated, removed or full, and standard error beside it.

Invariants. Writing never raises. A file that was moved away or removed is opened anew at the next
line (0600, with its folder), as `logging.handlers.WatchedFileHandler` does; where that fails, lines
go to standard error until it works again, and both changes are said once. Lines that could not be
written are counted, and the number is written when there is room again; a line that went out in
part is ended before the next one.

Not here: what a line says (`logs`).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import math
import os
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Form", "LogFile"]

RETRY = 5.0  # seconds between attempts to open a file that could not be opened

Form = Callable[[Mapping[str, Any]], str]


class LogFile:
    """Appends lines to a file, whatever becomes of it; or to a descriptor.

    Args:
        path: The file; None for the descriptor alone.
        form: How this class's own records are written.
        descriptor: Where lines go while the file cannot be opened.
        now: A clock in seconds.
    """

    def __init__(
        self,
        path: Path | None,
        form: Form,
        *,
        descriptor: int = 2,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._form = form
        self._aside = descriptor
        self._now = now
        self._file: int | None = None
        self._identity: tuple[int, int] | None = None
        self._next_attempt = -math.inf
        self._outage = False  # it has been said that the file cannot be opened
        self._lost = 0
        self._torn = False  # the last line did not go out whole

    def write(self, line: str) -> None:
        """Append a line; never raises."""
        target = self._target()
        if self._lost:
            told = self._own("warning", f"{self._lost} log records could not be written")
            if self._append(target, told):
                self._lost = 0
        if not self._append(target, line):
            self._lost += 1

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
        self._file = self._identity = None

    def _target(self) -> int:
        if self._path is None:
            return self._aside
        if self._file is not None and self._is_there(self._path):
            return self._file
        self.close()
        if self._now() >= self._next_attempt:
            self._open(self._path)
        return self._aside if self._file is None else self._file

    def _is_there(self, path: Path) -> bool:
        try:
            found = path.stat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._identity

    def _open(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # A pipe without a reader would hold up the daemon.
            descriptor = os.open(path, flags | os.O_NONBLOCK, 0o600)
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) != 0o600:
                os.fchmod(descriptor, 0o600)
        except OSError as error:
            self._next_attempt = self._now() + RETRY
            if not self._outage:
                self._outage = True
                why = error.strerror or type(error).__name__
                text = f"cannot write the log file {path} ({why}); logging to standard error"
                self._append(self._aside, self._own("error", text))
            return
        self._file, self._identity = descriptor, (found.st_dev, found.st_ino)
        self._torn = False
        if self._outage:
            self._outage = False
            self._append(self._aside, self._own("warning", f"logging to {path} again"))

    def _own(self, level: str, text: str) -> str:
        moment = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        return self._form({"ts": moment, "level": level, "logger": __name__, "message": text})

    def _append(self, descriptor: int, line: str) -> bool:
        data = ("\n" * self._torn + line + "\n").encode("utf-8", "replace")
        written = 0
        try:
            while written < len(data):
                written += os.write(descriptor, data[written:])
        except OSError:  # a full disk, a reader that has gone
            self._torn = self._torn or written > 0
            return False
        self._torn = False
        return True
