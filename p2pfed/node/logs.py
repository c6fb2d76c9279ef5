"""What the daemon writes of itself: one line a record, as text on a terminal, as JSON elsewhere.

Map: `Plain` makes of any log record a small dictionary of plain values; `as_text` and `as_json`
write it; `begin_logging` wires them for the process.

Invariants. No value of an array, no name of a file of patients and no long text gets through:
only true and false, numbers, short texts and short lists of texts pass as they are; everything else
is named by its kind and size, four numbers in a row in a text are blotted out, and so is whatever
lies below the hospital's data. A peer's text can begin no line of its own and move no cursor.
Logging never raises.

A record may bring `extra={"event": KIND, "fields": {...}}`; both are optional.

Not here: the file itself (`logfile`); the event log (`eventlog`); the trainer's log, which belongs
to the hospital alone and holds what its task prints (`training/process.py`).
"""

from __future__ import annotations

import datetime as dt
import enum
import json
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from p2pfed.config import Settings
from p2pfed.errors import P2PFedError
from p2pfed.node.logfile import Form, LogFile

__all__ = [
    "LogHandler",
    "Plain",
    "as_json",
    "as_text",
    "begin_logging",
    "for_journal",
    "set_level",
]

LONGEST_TEXT = 500  # of one value
LONGEST_MESSAGE = 2000
LONGEST_EXCEPTION = 8000
MOST_TEXTS = 32  # in a list that passes
HIDDEN = "<data>"
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}  # of syslog
_STRANGERS = ("libp2p", "multiaddr", "hypercorn", "trio", "asyncio")  # quiet unless debug
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_NUMBERS = re.compile(rf"(?<![\w.]){_NUMBER}(?:[\s,;]+{_NUMBER}){{3,}}")


class Plain:
    """Makes log records plain.

    Args:
        private: Folders or files whose paths, and whatever is below them, are never named.
    """

    def __init__(self, private: Iterable[Path] = ()) -> None:
        given = [path for path in private if len(path.parts) > 1]
        paths = {os.fspath(path) for path in given} | {os.path.realpath(path) for path in given}
        longest_first = sorted(paths, key=len, reverse=True)
        # A name of a file may hold blanks: what follows on the line goes with it, up to a quote.
        some = "|".join(map(re.escape, longest_first))
        self._private = re.compile(rf"(?:{some})[^'\"\n]*") if paths else None

    def text(self, text: str, longest: int = LONGEST_TEXT) -> str:
        """A text without paths of the data and rows of numbers, cut at `longest` characters."""
        text = text[: 2 * longest]
        if self._private is not None:
            text = self._private.sub(HIDDEN, text)
        text = _NUMBERS.sub("<numbers>", text)
        return text if len(text) <= longest else text[: longest - 1] + "…"

    def value(self, value: object) -> bool | int | float | str | list[str] | None:
        """A value that may be written, or what it is instead."""
        if value is None or type(value) in {bool, int}:
            return value  # type: ignore[return-value] # a narrowing by `in` is beyond mypy
        if type(value) is float:
            return value if math.isfinite(value) else str(value)
        if isinstance(value, enum.Enum):
            return value.name
        if isinstance(value, (str, os.PathLike)):
            return self.text(os.fspath(value) if not isinstance(value, str) else str(value))
        if isinstance(value, BaseException):
            return self._error(value)
        if isinstance(value, (list, tuple, set, frozenset)) and _are_texts(value):
            return [self.text(item) for item in value]
        return _kind_of(value)

    def record(self, record: logging.LogRecord) -> dict[str, Any]:
        """`ts`, `level`, `logger`, `message`; and `event`, `fields`, `exception` where there are.

        Never raises.
        """
        moment = dt.datetime.fromtimestamp(record.created, dt.UTC)
        plain: dict[str, Any] = {
            "ts": moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self.text(self._message(record), LONGEST_MESSAGE),
        }
        event, fields = getattr(record, "event", None), getattr(record, "fields", None)
        if isinstance(event, str):
            plain["event"] = self.text(event)
        if isinstance(fields, Mapping) and fields:
            plain["fields"] = {str(key): self.value(value) for key, value in fields.items()}
        if record.exc_info and isinstance(record.exc_info[1], BaseException):
            plain["exception"] = self._traceback(record.exc_info[1])
        return plain

    def _message(self, record: logging.LogRecord) -> str:
        template, args = str(record.msg), record.args
        if not args:
            return template
        try:
            if isinstance(args, Mapping):
                return template % _Values({k: self.value(v) for k, v in args.items()})
            return template % tuple(self.value(value) for value in args)
        except (TypeError, ValueError, KeyError):  # %d of something that is no number any more
            values = args.values() if isinstance(args, Mapping) else args
            return " ".join([template, *(str(self.value(value)) for value in values)])

    def _error(self, error: BaseException) -> str:
        try:
            told = error.what if isinstance(error, P2PFedError) else str(error)
        except Exception:  # noqa: BLE001 - a stranger's __str__ may raise anything
            told = ""
        return self.text(f"{type(error).__name__}: {told}" if told else type(error).__name__)

    def _traceback(self, error: BaseException) -> str:
        """Frames and messages; never the values of variables."""
        try:
            told = traceback.TracebackException.from_exception(error, limit=-20, compact=True)
            text = "".join(told.format())
        except Exception:  # noqa: BLE001 - a stranger's __str__ may raise anything
            text = type(error).__name__
        lines = [self.text(line) for line in text.splitlines()]
        whole = "\n".join(lines)
        # The end says what it was.
        return whole if len(whole) <= LONGEST_EXCEPTION else "…" + whole[-LONGEST_EXCEPTION:]


class _Values(dict[Any, Any]):
    """For `%(key)s`; what `%s` says of the whole is its kind."""

    def __repr__(self) -> str:
        return f"<dict of {len(self)}>"


def _are_texts(values: list[Any] | tuple[Any, ...] | set[Any] | frozenset[Any]) -> bool:
    return len(values) <= MOST_TEXTS and all(type(item) is str for item in values)


def _kind_of(value: object) -> str:
    kind = type(value).__name__
    try:
        if hasattr(value, "dtype") and hasattr(value, "shape"):
            return f"<{kind} {value.dtype} {tuple(value.shape)}>"
        if isinstance(value, (bytes, bytearray, memoryview)):
            return f"<{len(value)} bytes>"
        if isinstance(value, (list, tuple, set, frozenset, dict)):
            return f"<{kind} of {len(value)}>"
    except Exception:  # noqa: BLE001 - a stranger's property may raise anything
        return f"<{kind}>"
    return f"<{kind}>"


# --- forms -------------------------------------------------------------------------------------


def as_json(record: Mapping[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(record)  # ASCII: nothing in it can move a terminal's cursor


def as_text(record: Mapping[str, Any]) -> str:
    """A line for people; an exception follows, indented."""
    fields = record.get("fields", {})
    told = " ".join(f"{key}={_shown(value)}" for key, value in fields.items())
    head = f"{record['ts']} {record['level'].upper():7} {record['logger']}: {record['message']}"
    lines = [f"{head} {told}" if told else head, *record.get("exception", "").splitlines()]
    return "\n    ".join(_printable(line) for line in lines)


def _shown(value: object) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


def _printable(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def for_journal(form: Form) -> Form:
    """The same with each line's priority before it (sd-daemon(3)); the journal takes that off."""

    def prefixed(record: Mapping[str, Any]) -> str:
        begin = f"<{_PRIORITIES.get(record['level'], _PRIORITIES['info'])}>"
        return "\n".join(begin + line for line in form(record).split("\n"))

    return prefixed


# --- wiring --------------------------------------------------------------------------------------


class LogHandler(logging.Handler):
    """Writes plain records to a `LogFile`.

    Args:
        plain: Makes them plain.
        form: `as_text` or `as_json`.
        file: Where they go.
    """

    def __init__(self, plain: Plain, form: Form, file: LogFile) -> None:
        super().__init__()
        self.plain = plain
        self._form = form
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; never raises."""
        try:
            self._file.write(self._form(self.plain.record(record)))
        except Exception:  # noqa: BLE001 - whoever logs must not fail by it
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - its name there
        """Say that a record was lost; the standard way would print its arguments."""
        line = {"ts": "", "level": "error", "logger": __name__}
        self._file.write(as_json(line | {"message": f"a record of {record.name} is lost"}))

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def begin_logging(settings: Settings) -> LogHandler:
    """Send all log records of this process where the configuration says.

    Args:
        settings: `log` says how; nothing below `train.data` is ever named.

    Returns:
        The handler, which is the root logger's only one of this kind.
    """
    log, data = settings.log, settings.train.data
    form = _form(log.format, on_terminal=log.file is None and _is_terminal())
    if log.file is None and _is_journal():
        form = for_journal(form)
    handler = LogHandler(Plain([data] if data else []), form, LogFile(log.file, form))
    root = logging.getLogger()
    for other in [other for other in root.handlers if isinstance(other, LogHandler)]:
        root.removeHandler(other)
        other.close()
    root.addHandler(handler)
    set_level(log.level)
    logging.captureWarnings(True)  # a warning's text may quote anything, so it goes the same way
    return handler


def set_level(level: str) -> None:
    """Write records from this level on; may be called again at any time.

    Args:
        level: `debug`, `info`, `warning` or `error`.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    root = logging.getLogger()
    root.setLevel(number)
    for handler in root.handlers:
        if isinstance(handler, LogHandler):
            handler.setLevel(number)
    for name in _STRANGERS:
        quiet = number > logging.DEBUG
        logging.getLogger(name).setLevel(max(number, logging.WARNING) if quiet else number)


def _form(wanted: Literal["auto", "text", "json"], *, on_terminal: bool) -> Form:
    if wanted == "auto":
        return as_text if on_terminal else as_json
    return as_text if wanted == "text" else as_json


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


def _is_journal() -> bool:
    """Whether standard error is systemd's journal, by what systemd says of it (systemd.exec(5))."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
