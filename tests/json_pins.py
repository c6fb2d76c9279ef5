"""Answers of commands as programs read them, and the shapes that are pinned in data/json.

A pin is called after the words of its command (`run-show` for `p2pfed run show`); what `VARIANTS`
names is another answer of a command. `pinned` is called with the name written out, so that
`names_pinned_in` finds it: a pin that no test holds up is none.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from json_shapes import complaints, merge, shape_of

from p2pfed.cli.main import main

PINS = Path(__file__).with_name("data") / "json"
PINNING = bool(os.environ.get("P2PFED_PIN"))  # the tests clear their environment

# pin -> the command that it is another answer of
VARIANTS = {
    "error": "",  # any
    "events-gap": "events",
    "init-invited": "init",
    "peer": "peers",
    "roster-show-daemon": "roster show",
}

_MOMENT = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d")
_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
_OTHER_UNIT = re.compile(r"_(secs?|seconds|msecs?|millis|byte|octets)$")


def pinned(name: str, envelope: dict[str, Any]) -> None:
    """An answer has the shape that is pinned; with P2PFED_PIN what is new is written."""
    assert set(envelope) == {"schema", "ok", "data"}
    _compared(name, envelope["schema"], envelope["data"])


def pinned_line(name: str, line: dict[str, Any]) -> None:
    """The same for one line of a stream, which is in no envelope."""
    _compared(name, None, line)


def _compared(name: str, schema: str | None, data: Any) -> None:
    file = PINS / f"{name}.json"
    assert not (odd := list(unconventional(data))), odd
    found = {"schema": schema, "data": shape_of(data)}
    if PINNING:
        pin = json.loads(file.read_text("utf-8")) if file.exists() else found
        if pin["schema"] == found["schema"]:
            found["data"] = merge(pin["data"], found["data"])
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", "utf-8")
    assert file.exists(), f"{name} is not pinned: run this file with P2PFED_PIN=1"
    pin = json.loads(file.read_text("utf-8"))
    assert schema == pin["schema"], "its version was raised: write the pin anew"
    assert not (wrong := complaints(pin["data"], data)), wrong


def unconventional(value: Any, where: str = "data") -> Iterator[str]:
    """What in an answer is a time that is not UTC in ISO 8601, or has its unit under another name.

    Seconds end in `_s`, milliseconds in `_ms`, bytes in `_bytes`.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            number = isinstance(item, int | float) and not isinstance(item, bool)
            if number and _OTHER_UNIT.search(key):
                yield f"{where}.{key} has an unusual unit"
            yield from unconventional(item, f"{where}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from unconventional(item, f"{where}[{i}]")
    elif isinstance(value, str) and _MOMENT.match(value) and not _UTC.fullmatch(value):
        yield f"{where} is a time that is not UTC in ISO 8601: {value}"


def read_line(text: str) -> Any:
    """One line of JSON that any reader takes: ASCII, and neither NaN nor Infinity."""
    assert text.isascii()
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def asking(capture: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """A function that runs a command with --json, and gives the one envelope that it prints.

    Args:
        capture: `capfd` where a process of its own does the work, else `capsys`.
    """

    def ask(words: str, *more: object, code: int = 0) -> dict[str, Any]:
        capture.readouterr()
        got = main([*shlex.split(words), *map(str, more), "--json"])
        told = capture.readouterr()
        assert got == code, told.err
        (line,) = told.out.splitlines()
        envelope = read_line(line)
        assert envelope["ok"] == (code == 0)
        return envelope

    return ask


def names_pinned_in(file: Path) -> set[str]:
    """The names that a module of tests calls `pinned` with: as they stand there, or in a table."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        match node:
            case ast.Call(
                func=ast.Name(id="pinned" | "pinned_line"), args=[ast.Constant(value=str(name)), *_]
            ):
                names.add(name)
            case ast.Assign(targets=[ast.Name(id="READS" | "WRITES")], value=ast.Dict(keys=keys)):
                names |= {key.value for key in keys if isinstance(key, ast.Constant)}
    return names
