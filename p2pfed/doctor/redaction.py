"""What goes out of a value before it may be sent to a stranger; pure.

Two passes over decoded JSON: `without` takes out texts that are known to be private (paths of the
data, of the ledger), wherever they stand; `Pseudonyms` replaces names, peer ids and addresses, the
same one always by the same.

Invariant: keys of objects are treated like values; a text is cut out whole, with what hangs on a
path behind it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["Pseudonyms", "cut_out", "every_text", "settings_without"]

_PEER_ID = re.compile(r"12D3Koo[1-9A-HJ-NP-Za-km-z]{3,50}")
_DNS = re.compile(r"/(dns|dns4|dns6)/([^/\s\"',;()\[\]]+)")
_IP4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.]*\d)")
_IP6 = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")


def every_text(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with each text in it changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(key)): every_text(each, change) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [every_text(each, change) for each in value]
    return value


def cut_out(secrets: Mapping[str, str]) -> Callable[[str], str]:
    """What replaces private texts, and whatever path goes on behind them.

    Args:
        secrets: What stands there instead, by the text to cut out.
    """
    longest = sorted((text for text in secrets if text.strip("/. ")), key=len, reverse=True)
    if not longest:
        return str
    pattern = re.compile("(" + "|".join(map(re.escape, longest)) + r")(?:/[^\s\"';:]*)?")
    return lambda text: pattern.sub(lambda match: secrets[match[1]], text)


def settings_without(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON without what names patients' folders or tells how they are read."""
    shown = {section: dict(values) for section, values in settings.items()}
    train, privacy = shown.get("train", {}), shown.get("privacy", {})
    for table, key in ((train, "data"), (train, "state"), (privacy, "ledger")):
        if table.get(key) is not None:
            table[key] = "[redacted]"
    if isinstance(train.get("options"), dict):
        train["options"] = dict.fromkeys(train["options"], "[redacted]")
    return shown


class Pseudonyms:
    """Replaces who takes part, and from where; see the module docstring.

    Args:
        names: Texts that name a member, the network, this machine or a user of it.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._given: dict[str, str] = {}
        self._count: dict[str, int] = {}
        longest = sorted({name for name in names if name.strip()}, key=len, reverse=True)
        joined = "|".join(map(re.escape, longest))
        self._names = re.compile(rf"(?<!\w)(?:{joined})(?!\w)") if longest else None

    def __call__(self, text: str) -> str:
        """The text with everyone's pseudonym."""
        text = _PEER_ID.sub(lambda match: self._for("id", match[0]), text)
        if self._names is not None:
            text = self._names.sub(lambda match: self._for("name", match[0]), text)
        text = _DNS.sub(lambda match: f"/{match[1]}/{self._for('address', match[2])}", text)
        text = _IP4.sub(self._address, text)
        return _IP6.sub(self._address, text)

    def _address(self, match: re.Match[str]) -> str:
        try:
            address = ipaddress.ip_address(match[0])
        except ValueError:  # a time of day, a version
            return match[0]
        if address.is_loopback or address.is_unspecified:  # everybody's
            return match[0]
        return self._for("address", match[0])

    def _for(self, kind: str, text: str) -> str:
        if text in self._given.values():  # it is one already
            return text
        if text not in self._given:
            self._count[kind] = self._count.get(kind, 0) + 1
            self._given[text] = f"{kind}-{self._count[kind]}"
        return self._given[text]
