"""Versions of the talk between two nodes: what their numbers mean, and how two nodes agree on one.

A version is a protocol of its own, `/p2pfed/gossip/N`, and is agreed on where any protocol is: who
opens a stream proposes the versions it speaks, the highest first, and the other side takes the
first one that it speaks too (multistream-select). So each connection has the highest common
version, nobody believes a number that the other one claims, and a node that knows nothing of later
versions says no to them as to any other unknown protocol.

    1  the first one
    2  a beat may carry a measure, and items that later versions add behind it

A release speaks its own version and the one before it.

Not here: what is signed. Deltas, rosters and run files outlive a connection; each carries a format
number of its own, and no two nodes can agree to read one differently.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["NEWEST", "VERSIONS", "gossip_protocol", "speaks", "version_of"]

VERSIONS = (1, 2)  # this release's, the lowest first
NEWEST = VERSIONS[-1]

_PREFIX = "/p2pfed/gossip/"
_MOST_DIGITS = 4


def gossip_protocol(version: int) -> str:
    """The name under which a version is agreed on."""
    return f"{_PREFIX}{version}"


def version_of(protocol: str) -> int | None:
    """Which version a protocol's name stands for; None for any other protocol."""
    digits = protocol.removeprefix(_PREFIX)
    if digits == protocol or not 0 < len(digits) <= _MOST_DIGITS:
        return None
    if not (digits.isascii() and digits.isdigit()) or digits.startswith("0"):
        return None
    return int(digits)


def speaks(versions: Iterable[int]) -> str:
    """Versions in words: `3`, `1 to 2`, or `2, 5`."""
    sorted_ = sorted(set(versions))
    if len(sorted_) > 1 and sorted_ == list(range(sorted_[0], sorted_[-1] + 1)):
        return f"{sorted_[0]} to {sorted_[-1]}"
    return ", ".join(map(str, sorted_))
