"""Plain TOML files read without tomllib, which would cost every command a third of its start.

Invariant: the answer is exactly that of `tomllib.loads`, or None. Everything that is not plain is
None, and so is every mistake: tomllib then reads the file, or says what is wrong with it.

Plain is: one line, one thing; tables by a bare name; bare keys, or quoted ones that could be
bare; texts in double quotes, whole numbers, true, false, decimal fractions, lists of such
texts, and inline tables of such things that no comma stands in; comments. Not plain are, among
others, dates, literal and multi-line texts, dotted names, arrays of tables.

Source: TOML 1.0. Of these values JSON has the same form and meaning, so that json, which a client
loads anyway, reads them.
"""

from __future__ import annotations

import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["plain_toml"]

_INFINITY = 1e999
_value = json.JSONDecoder().raw_decode


def plain_toml(text: str) -> dict[str, Any] | None:
    """What a plain TOML file says; None where it is not plain, or wrong.

    Args:
        text: The whole file.
    """
    found: dict[str, Any] = {}
    table = found
    try:
        for line in text.split("\n"):
            said = line.strip(" ")
            if not said.isprintable() or "\\/" in said or "\\ud" in said.lower():
                return None  # \/ and halves of a pair are escapes of JSON alone
            if not said or said[0] == "#":
                continue
            if said[0] == "[":
                name, closed, rest = said[1:].partition("]")
                if not closed:
                    return None
                table = _new(found, name.strip(" "), {}, rest)
            else:
                _new(table, *_pair(said))
    except (ValueError, RecursionError):
        return None
    return found


def _new(table: dict[str, Any], key: str, value: Any, rest: str) -> Any:
    """Put a value in; raises ValueError where there is one, or anything but a comment follows."""
    if key in table or not _is_bare(key) or rest.strip(" ")[:1] not in {"", "#"}:
        raise ValueError(key)
    table[key] = value
    return value


def _pair(said: str) -> tuple[str, Any, str]:
    """Key, value, and what follows on the line."""
    key, _, given = said.partition("=")
    key, given = key.strip(" "), given.strip(" ")
    if key[:1] == '"' and key[-1:] == '"':
        key = key[1:-1]
    if given[:1] == "{":
        inner, closed, rest = given[1:].partition("}")
        if not closed or "{" in inner:
            raise ValueError(given)
        inside: dict[str, Any] = {}
        for item in inner.split(",") if inner.strip(" ") else ():
            name, value, more = _pair(item)
            if more.strip(" "):
                raise ValueError(item)
            _new(inside, name, value, "")
        return key, inside, rest
    value, end = _value(given)
    if not _is_plain(value):
        raise ValueError(given)
    return key, value, given[end:]


def _is_bare(key: str) -> bool:
    return key.isascii() and key.replace("-", "").replace("_", "").isalnum()


def _is_plain(value: Any) -> bool:
    """Whether a value of JSON is the same in TOML: null, NaN, and lists of anything are not."""
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    if isinstance(value, float):
        return -_INFINITY < value < _INFINITY
    return isinstance(value, str | int)
