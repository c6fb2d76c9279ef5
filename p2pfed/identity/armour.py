"""Bytes as one line of letters that survives mail, and as digits that survive the telephone.

A line is a prefix that says what it is, then base32 (RFC 4648, small letters, no padding) of the
bytes and a checksum of four bytes. Blanks, line breaks, capitals and the `>` of quoted mail do not
matter. Inside, texts carry their length in one byte.

Invariant: whatever is wrong with a line is a ConfigError; a typo is told as a typo.

Not here: what the bytes mean (`invite`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re

from p2pfed.errors import ConfigError

__all__ = ["VERSION", "Reader", "armoured", "opened", "phone_digits", "short_text"]

VERSION = b"\x01"  # the first byte of every line
LONGEST_LINE = 4096  # letters
KINDS = {"p2pfed1-": "an invite", "p2pfedreq1-": "a request"}

# BLAKE2b personalisations, at most 16 bytes each.
_TYPO = b"p2pfed-typo"
_PHONE = b"p2pfed-phone"

_GROUPS = 6  # of four decimal digits: 2^79 tries to make a number that reads the same


def phone_digits(data: bytes) -> str:
    """Six groups of four digits, read alike in every language."""
    number = int.from_bytes(hashlib.blake2b(data, digest_size=32, person=_PHONE).digest(), "big")
    text = f"{number % 10 ** (4 * _GROUPS):0{4 * _GROUPS}d}"
    return " ".join(text[i : i + 4] for i in range(0, 4 * _GROUPS, 4))


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=4, person=_TYPO).digest()


def armoured(prefix: str, data: bytes) -> str:
    """The line of `data`, behind the prefix that says what it is."""
    return prefix + base64.b32encode(data + _checksum(data)).decode("ascii").rstrip("=").lower()


def opened(prefix: str, text: str, what: str) -> bytes:
    """The bytes inside a line, without the checksum.

    Args:
        prefix: What the line must begin with.
        text: What a person pasted.
        what: What it should be, for errors.

    Raises:
        ConfigError: It is something else, or there is a typo in it.
    """
    line = re.sub(r"[\s>]+", "", text[: 2 * LONGEST_LINE]).lower()
    if len(line) > LONGEST_LINE or not line.startswith(prefix):
        others = {start: told for start, told in KINDS.items() if start != prefix}
        found = next((told for start, told in others.items() if line.startswith(start)), "")
        raise ConfigError(
            f"this is {found}, no {what}" if found else f"{line[:24]!r} is no {what}",
            f"one begins with {prefix} and has at most {LONGEST_LINE} letters",
            f"copy the whole line of the {what}, or name the file that holds it",
        )
    letters = line.removeprefix(prefix).upper()
    try:
        data = base64.b32decode(letters + "=" * (-len(letters) % 8))
    except binascii.Error:
        data = b""
    if armoured(prefix, data[:-4]) != line:  # also where the last letter has stray bits
        raise ConfigError(
            f"there is a typo in the {what}",
            f"its checksum does not match; {len(letters)} letters after {prefix} were read",
            f"copy the whole line of the {what} again, or use the file that holds it",
        )
    return data[:-4]


def short_text(text: str, what: str, longest: int = 64) -> bytes:
    """One byte of length and the text as UTF-8.

    Raises:
        ConfigError: It is empty, longer than `longest` characters or 255 bytes, or not printable.
    """
    raw = text.encode() if 0 < len(text) <= longest and text.isprintable() else b""
    if not 0 < len(raw) <= 255:
        raise ConfigError(
            f"{what} {text[:80]!r} cannot stand in an invite",
            f"it must have 1 to {longest} printable characters, and at most 255 bytes",
        )
    return bytes([len(raw)]) + raw


class Reader:
    """Takes bytes from the front; raises ConfigError where they end too soon or too late."""

    def __init__(self, data: bytes, what: str) -> None:
        self._left = data
        self._what = what

    def malformed(self) -> ConfigError:
        """The error for bytes that mean nothing."""
        return ConfigError(
            f"the {self._what} is malformed",
            "its checksum is right, so it was made so",
            "have it made again, with the same version of p2pfed",
        )

    def version(self) -> None:
        """Take the version, which must be ours."""
        if self.take(1)[0] != VERSION[0]:
            raise ConfigError(
                f"the {self._what} is of another version of p2pfed",
                f"this one reads version {VERSION[0]}",
                "update p2pfed here, or there",
            )

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if len(self._left) < count:
            raise self.malformed()
        taken, self._left = self._left[:count], self._left[count:]
        return taken

    def text(self, longest: int = 64) -> str:
        """The next text, as `short_text` writes it."""
        raw = self.take(self.take(1)[0])
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise self.malformed() from error
        if not 0 < len(text) <= longest or not text.isprintable():
            raise self.malformed()
        return text

    def done(self) -> None:
        """Refuse what is left over."""
        if self._left:
            raise self.malformed()
