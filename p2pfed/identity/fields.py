"""Strict reading of the JSON inside a signed document: every key named, typed, bounded.

Invariant: an unknown, missing, doubled or ill-typed key rejects the document and is named in the
error. There is no default for a missing key: what stewards signed is what counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, TypeVar

from p2pfed.errors import FactRejected

__all__ = ["Fields", "encode_payload", "read_payload"]

T = TypeVar("T")

_WHOLE = "take the whole file, as the stewards signed it"

_DECIMAL = re.compile(r"\d{1,20}(\.\d{1,30})?(e[+-]\d{1,2})?", re.ASCII)  # what repr(float) writes


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) != len(pairs):
        raise ValueError("a key stands twice")
    return read


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def read_payload(payload: bytes, kind: str) -> Fields:
    """Decode a payload whose `type` must be `kind`.

    Raises:
        FactRejected: Not JSON, not an object, or of another type.
    """
    try:
        text = payload.decode("utf-8")
        data = json.loads(text, object_pairs_hook=_no_doubles, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FactRejected(f"this is not a {kind} document", str(error), _WHOLE) from error
    if not isinstance(data, dict) or data.get("type") != kind:
        raise FactRejected(f"this is not a {kind} document", "its `type` says otherwise", _WHOLE)
    fields = Fields(data, kind)
    fields.text("type")
    return fields


def encode_payload(data: Mapping[str, Any]) -> bytes:
    """JSON for people and machines; made once, then only ever handled as bytes."""
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False).encode()


class Fields:
    """One JSON object that is read key by key; `done` refuses what was not read."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise FactRejected(f"{where} must be an object")
        self._data = data
        self._where = where
        self._read: set[str] = set()

    def _take(self, key: str) -> Any:
        self._read.add(key)
        if key not in self._data:
            raise FactRejected(f"{self._where}: {key} is missing")
        return self._data[key]

    def _refuse(self, key: str, wanted: str) -> FactRejected:
        return FactRejected(
            f"{self._where}: {key} is {self._data[key]!r:.80}", f"expected {wanted}"
        )

    def text(self, key: str, *, longest: int = 200) -> str:
        """A string of 1 to `longest` printable characters."""
        value = self._take(key)
        if not isinstance(value, str) or not 0 < len(value) <= longest or not value.isprintable():
            raise self._refuse(key, f"a text of 1 to {longest} printable characters")
        return value

    def one_of(self, key: str, allowed: tuple[str, ...]) -> str:
        """One of the strings `allowed`."""
        value = self._take(key)
        if value not in allowed or not isinstance(value, str):
            raise self._refuse(key, " or ".join(allowed))
        return value

    def flag(self, key: str) -> bool:
        """A truth value; 0 and 1 are none."""
        value = self._take(key)
        if type(value) is not bool:
            raise self._refuse(key, "true or false")
        return value

    def integer(self, key: str, *, low: int, high: int) -> int:
        """An integer in [low, high]; true and false are not integers."""
        value = self._take(key)
        if type(value) is not int or not low <= value <= high:
            raise self._refuse(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, *, low: float, high: float) -> float:
        """A finite number in [low, high]."""
        value = self._take(key)
        if type(value) not in {int, float} or not low <= value <= high:
            raise self._refuse(key, f"a number from {low} to {high}")
        return float(value)

    def fraction(self, key: str, *, low: Fraction, high: Fraction) -> Fraction:
        """A decimal number written as text, read exactly, in [low, high]."""
        value = self._take(key)
        decimal = isinstance(value, str) and _DECIMAL.fullmatch(value)
        read = Fraction(value) if decimal else None
        if read is None or not low <= read <= high:
            raise self._refuse(key, f"a decimal in quotes from {float(low)} to {float(high)}")
        return read

    def hex32(self, key: str) -> bytes:
        """32 bytes as 64 lower-case hex digits."""
        value = self._take(key)
        try:
            raw = bytes.fromhex(value) if isinstance(value, str) and len(value) == 64 else b""
        except ValueError:
            raw = b""
        if len(raw) != 32 or raw.hex() != value:
            raise self._refuse(key, "64 lower-case hex digits")
        return raw

    def many(self, key: str, read: Callable[[Fields], T], *, most: int) -> tuple[T, ...]:
        """A list of at most `most` objects, each read by `read`."""
        value = self._take(key)
        if not isinstance(value, list) or len(value) > most:
            raise self._refuse(key, f"a list of at most {most} objects")
        return tuple(
            read(Fields(item, f"{self._where}: {key}[{i}]")) for i, item in enumerate(value)
        )

    def has(self, key: str) -> bool:
        """Whether there is such a key; it is still to be read."""
        return key in self._data

    def texts(self, key: str, *, allowed: tuple[str, ...]) -> tuple[str, ...]:
        """A list of distinct strings out of `allowed`."""
        value = self._take(key)
        if (
            not isinstance(value, list)
            or any(item not in allowed for item in value)
            or len(set(value)) != len(value)
        ):
            raise self._refuse(key, f"a list out of {', '.join(allowed)}")
        return tuple(value)

    def done(self) -> None:
        """Refuse keys that nobody asked for."""
        unknown = sorted(set(self._data) - self._read)
        if unknown:
            raise FactRejected(
                f"{self._where}: unknown key {unknown[0]!r:.80}",
                "this version does not know what the stewards meant by it",
                "update p2pfed, or have the document corrected and signed again",
            )
