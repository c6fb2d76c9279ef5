"""Formats for people and for programs; pure except for `emit`.

Invariant: what is printed for people holds printable characters only, so that no name or event can
move a terminal's cursor. JSON is one envelope `{"schema": "p2pfed.X/1", "ok": ..., "data": ...}`.
"""

from __future__ import annotations

import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable, Sequence
    from typing import Any

__all__ = ["emit", "envelope", "number", "printable", "short_id", "size", "span", "table"]


def emit(args: Namespace, schema: str, data: Any, lines: Iterable[str]) -> None:
    """Print `data` as an envelope with --json, else the lines."""
    if args.json:
        print(envelope(schema, data))
    else:
        for line in lines:
            print(printable(line))


def envelope(schema: str, data: Any, *, ok: bool = True) -> str:
    """The JSON envelope, on one line."""
    answer = {"schema": f"p2pfed.{schema}/1", "ok": ok, "data": data}
    return json.dumps(answer, ensure_ascii=False)


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


def short_id(peer_id: str) -> str:
    """The first and last letters of a peer id or hash."""
    return peer_id if len(peer_id) <= 14 else f"{peer_id[:8]}…{peer_id[-4:]}"


def number(value: Any) -> str:
    """A number with at most four digits; - for none."""
    return "-" if value is None else f"{float(value):.4g}".replace("e-0", "e-")
