"""Formats for people and for programs; pure except for `emit`.

Invariant: what is printed for people holds printable characters only, so that no name or event can
move a terminal's cursor. JSON is one envelope `{"schema": "p2pfed.X/1", "ok": ..., "data": ...}`,
in ASCII, so that no locale and no name can spoil it; `ok` is true exactly where the exit code is 0.
A schema has one shape, whatever command prints it.
"""

from __future__ import annotations

import json

from p2pfed.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable, Sequence
    from typing import Any

__all__ = [
    "VERSIONS",
    "as_json",
    "columns",
    "cut",
    "duration",
    "emit",
    "envelope",
    "number",
    "printable",
    "short_id",
    "size",
    "span",
    "table",
    "took",
    "utc",
]

# schema -> its version, where it is not 1: raised when a field goes or changes its type
VERSIONS: dict[str, int] = {}

_SECONDS = {"min": 60.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}


def emit(args: Namespace, schema: str, data: Any, lines: Iterable[str], *, ok: bool = True) -> None:
    """Print `data` as an envelope with --json, else the lines."""
    if args.json:
        print(envelope(schema, data, ok=ok))
    else:
        for line in lines:
            print(printable(line))


def envelope(schema: str, data: Any, *, ok: bool = True) -> str:
    """The JSON envelope, on one line."""
    version = VERSIONS.get(schema, 1)
    answer = {"schema": f"p2pfed.{schema}/{version}", "ok": ok, "data": data}
    return as_json(answer)


def as_json(value: Any) -> str:
    """One line of JSON in ASCII; a number that is not finite, which JSON does not have, is null."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:  # hardly ever: a loss that went astray
        return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not -1e999 < value < 1e999 else value


def printable(text: str) -> str:
    """`text` with everything that could steer a terminal replaced."""
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Aligned columns."""
    lines = [list(head), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def size(count: float | None) -> str:
    """Bytes with three digits: `420 MB`."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def span(seconds: float | None) -> str:
    """A duration in its two greatest units: `3d 4h`."""
    if seconds is None:
        return "-"
    left = max(0, round(seconds))
    if left < 60:
        return f"{left} s"
    days, left = divmod(left, 86400)
    hours, left = divmod(left, 3600)
    minutes = left // 60
    if days:
        return f"{days}d {hours}h"
    return f"{hours}h {minutes}min" if hours else f"{minutes} min"


def took(seconds: float) -> str:
    """How long something lasted, also where that is less than a second: `85 ms`."""
    return f"{1000 * seconds:.0f} ms" if 0 < seconds < 0.9995 else span(seconds)


def utc(at: Any, form: str = "%Y-%m-%d %H:%M") -> str:
    """A Unix time in UTC; `?` where it is none."""
    from datetime import UTC, datetime

    try:
        return datetime.fromtimestamp(at, UTC).strftime(form)
    except (OverflowError, TypeError, ValueError, OSError):
        return "?"


def duration(text: str) -> float:
    """The seconds of `30s`, `5min` or `5m`, `2h`, `3d`, or of a bare number.

    Raises:
        ConfigError: It is none of these.
    """
    unit = text.lstrip("0123456789.")
    try:
        value = float(text.removesuffix(unit)) * _SECONDS[unit]
    except (KeyError, ValueError):
        value = -1.0
    if not 0 <= value < 1e9:
        raise ConfigError(
            f"{text!r} is not a time",
            "a time is a number and one of s, min, m, h, d; a bare number is in seconds",
            "write e.g. 30s, 5min or 2h",
        )
    return value


def columns() -> int:
    """How many columns the terminal has; plenty where standard output is none."""
    import os

    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return 1000


def cut(text: str, width: int) -> str:
    """`text` in at most `width` characters, with … where some are left out."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def short_id(peer_id: str) -> str:
    """The first and last letters of a peer id or hash."""
    return peer_id if len(peer_id) <= 14 else f"{peer_id[:8]}…{peer_id[-4:]}"


def number(value: Any) -> str:
    """A number with at most four digits; - for none."""
    return "-" if value is None else f"{float(value):.4g}".replace("e-0", "e-")
