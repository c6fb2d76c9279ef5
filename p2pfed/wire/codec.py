"""msgpack with explicit limits, and strict reading of what it decodes to.

Invariants: a frame is at most `MAX_FRAME` bytes and known whole before it is decoded (msgpack's own
limits do not bound a stream); nothing but nil, bool, int, bytes, str and arrays is accepted, no
map, no extension type, no trailing byte; every value is checked for exact type and range where it
is read. Whatever is wrong raises RemoteProtocolError: decoding is the boundary where blame is
decided.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgpack

from p2pfed.errors import RemoteProtocolError

__all__ = ["MAX_FRAME", "Items", "pack", "unpack"]

MAX_FRAME = 16 << 20  # one dense delta of 4 million parameters; larger ones wait for chunking
MAX_ITEMS = 4096  # per array; a Have of one round of 1024 members is one bytes value
MAX_TOTAL = 1 << 15  # in all arrays of a frame: two thirds for the fullest Facts, 3 * 4096 * 2

T = TypeVar("T")
_END = object()  # nil is an item like any other


def pack(*items: Any) -> bytes:
    """Encode an array of plain values."""
    encoded: bytes = msgpack.packb(items, use_bin_type=True)
    return encoded


def _no_map(_pairs: Any) -> Any:
    raise ValueError("maps are not part of this protocol")


def _counter() -> Callable[[Any], Any]:
    """Counts what is in arrays: small ones take 30 times the bytes that they came in."""
    total = 0

    def count(array: Any) -> Any:
        nonlocal total
        total += len(array)
        if total > MAX_TOTAL:
            raise ValueError("too many items")
        return array

    return count


def _no_extension(code: int, _data: bytes) -> Any:
    raise ValueError(f"extension type {code} is not part of this protocol")


def unpack(data: bytes, what: str) -> Items:
    """Decode one array.

    Args:
        data: The whole frame.
        what: Name of the thing, for errors.

    Raises:
        RemoteProtocolError: Too long, not msgpack, not an array, or with trailing bytes.
    """
    if len(data) > MAX_FRAME:
        raise RemoteProtocolError(f"{what}: {len(data)} bytes; at most {MAX_FRAME} are accepted")
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            use_list=False,
            object_pairs_hook=_no_map,
            list_hook=_counter(),
            ext_hook=_no_extension,
            max_str_len=256,
            max_bin_len=MAX_FRAME,
            max_array_len=MAX_ITEMS,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise RemoteProtocolError(f"{what}: not decodable") from error
    return Items(value, what)


class Items:
    """One decoded array that is read item by item; `done` refuses what was not read."""

    def __init__(self, value: Any, what: str) -> None:
        if not isinstance(value, tuple):
            raise RemoteProtocolError(f"{what}: not an array")
        self._values: Iterator[Any] = iter(value)
        self._what = what

    def _next(self) -> Any:
        try:
            return next(self._values)
        except StopIteration as error:
            raise RemoteProtocolError(f"{self._what}: too few items") from error

    def integer(self, low: int = 0, high: int = (1 << 63) - 1) -> int:
        """An integer in [low, high]; a bool is not one."""
        value = self._next()
        if type(value) is not int or not low <= value <= high:
            raise RemoteProtocolError(f"{self._what}: an integer is missing or out of range")
        return value

    def flag(self) -> bool:
        """A bool."""
        value = self._next()
        if type(value) is not bool:
            raise RemoteProtocolError(f"{self._what}: a flag is missing")
        return value

    def text(self, longest: int = 256) -> str:
        """A printable string of at most `longest` characters."""
        value = self._next()
        if type(value) is not str or len(value) > longest or not (value.isprintable() or not value):
            raise RemoteProtocolError(f"{self._what}: a text is missing or too long")
        return value

    def raw(self, *lengths: int, longest: int = MAX_FRAME) -> bytes:
        """Bytes of one of the given lengths, or of at most `longest` where none is given."""
        value = self._next()
        if (
            type(value) is not bytes
            or len(value) > longest
            or (lengths and len(value) not in lengths)
        ):
            raise RemoteProtocolError(f"{self._what}: bytes are missing or of the wrong length")
        return value

    def many(self, read: Callable[[Items], T], most: int) -> tuple[T, ...]:
        """An array of at most `most` arrays, each read by `read`."""
        value = self._next()
        if not isinstance(value, tuple) or len(value) > most:
            raise RemoteProtocolError(f"{self._what}: a list is missing or too long")
        return tuple(self._one(item, read) for item in value)

    def _one(self, item: Any, read: Callable[[Items], T]) -> T:
        items = Items(item, self._what)
        result = read(items)
        items.done()
        return result

    def one(self, read: Callable[[Items], T]) -> T:
        """An array, read by `read`."""
        return self._one(self._next(), read)

    def texts(self, most: int, longest: int = 256) -> tuple[str, ...]:
        """An array of at most `most` strings."""
        value = self._next()
        if not isinstance(value, tuple) or len(value) > most:
            raise RemoteProtocolError(f"{self._what}: a list is missing or too long")
        reader = Items(value, self._what)
        return tuple(reader.text(longest) for _ in value)

    def at_end(self) -> bool:
        """Whether all items were read."""
        value = next(self._values, _END)
        if value is _END:
            return True
        self._values = itertools.chain((value,), self._values)
        return False

    def skip(self, most: int) -> None:
        """Pass over what a later version added: at most `most` items."""
        for _ in range(most):
            next(self._values, None)

    def done(self) -> None:
        """Refuse items that nobody asked for."""
        if next(self._values, _END) is not _END:
            raise RemoteProtocolError(f"{self._what}: too many items")
