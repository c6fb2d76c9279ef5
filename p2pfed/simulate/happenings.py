"""The events of a scenario's timeline: what may happen, to whom, with which details."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from p2pfed.simulate.tables import Table

__all__ = ["DOINGS", "Happening", "read_happening", "read_members"]

_RANGE = re.compile(r"h(\d{1,4})(?:-h(\d{1,4}))?", re.ASCII)

# What may happen -> keys besides `at_s`, `do` and `members`; a star: members may be left out.
DOINGS: Mapping[str, tuple[str, ...]] = {
    "partition": ("silent",),
    "one-way": ("to",),
    "flap": ("period_s", "until_s"),
    "heal*": (),
    "crash": ("down_s", "effects"),
    "restart": (),
    "leave": (),
    "return": (),
    "start": (),
    "add": (),
    "revoke": ("from_round",),
    "forget": (),
    "clock": ("skew_s", "rate", "jump_s"),
    "slow": ("factor",),
    "share": ("on",),
    "backup": (),
    "restore": (),
    "weather*": ("loss", "spike", "spike_s", "latency_s"),
    "clog": ("until_s",),
    "freeze": ("for_s",),
}


@dataclass(frozen=True, slots=True)
class Happening:
    """One event of the timeline.

    Attributes:
        at_s: When.
        do: What; a key of `DOINGS`.
        members: Indices of the members it happens to.
        some: So many members that the seed chooses, if `members` is empty.
        to: Indices of the other side of a one-way cut.
        details: The other keys.
    """

    at_s: float
    do: str
    members: tuple[int, ...] = ()
    some: int = 0
    to: tuple[int, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


def read_happening(table: Table, count: int, end: float) -> Happening:
    """Read one `[[event]]`; mistakes go to the table's.

    Args:
        table: The event.
        count: How many members there are.
        end: When the scenario ends, seconds.
    """
    at_s = table.number("at_s", 0.0, high=end)
    if "at_s" not in table:
        table.wrong("at_s", "is missing", "when does it happen?")
    words = [word.rstrip("*") for word in DOINGS]
    do = table.one_of("do", words, "heal")
    if "do" not in table:
        table.wrong("do", "is missing", f"one of {', '.join(words)}")
    some, before = 0, len(table.mistakes.lines)
    if isinstance(table.raw("members"), dict):
        choice = table.table("members")
        some = choice.integer("some", 1, low=1, high=count)
        choice.done()
        members: tuple[int, ...] = ()
    else:
        members = read_members(table, count, "members")
    if not (members or some or f"{do}*" in DOINGS or len(table.mistakes.lines) > before):
        table.wrong("members", "is missing", f"to whom does {do!r} happen?")
    if some and do in {"start", "add"}:
        table.wrong("members", "the seed chooses among those that were started", "name them")
    details, to = _details(table, do, at_s, count, end)
    table.done()
    return Happening(at_s, do, members, some, to, details)


def _details(
    table: Table, do: str, at_s: float, count: int, end: float
) -> tuple[dict[str, Any], tuple[int, ...]]:
    readers: dict[str, Any] = {
        "silent": table.flag,
        "on": lambda key: table.flag(key, default=True),
        "period_s": lambda key: table.number(key, 10.0, low=0.1),
        "until_s": lambda key: table.number(key, end, low=at_s, high=end),
        "down_s": lambda key: table.number(key, 0.0),
        "for_s": lambda key: table.number(key, 10.0, low=0.1, high=1e6),
        "effects": lambda key: table.integer(key, -1, low=-1, high=1000),
        "from_round": lambda key: table.integer(key, 0),
        "skew_s": lambda key: table.number(key, 0.0, low=-1e8, high=1e8),
        "rate": lambda key: table.number(key, 1.0, low=0.5, high=2.0),
        "jump_s": lambda key: table.number(key, 0.0, high=1e7),
        "factor": lambda key: table.number(key, 1.0, low=0.01, high=1e4),
        "loss": lambda key: table.number(key, 0.0, high=0.9),
        "spike": lambda key: table.number(key, 0.0, high=1.0),
        "spike_s": lambda key: table.number(key, 2.0, high=3600.0),
        "latency_s": lambda key: table.pair(key, (0.005, 0.05)),
    }
    details: dict[str, Any] = {}
    to: tuple[int, ...] = ()
    for key in DOINGS.get(do, DOINGS.get(f"{do}*", ())):
        if key == "to":
            to = read_members(table, count, "to")
        elif key in table or do != "weather":
            details[key] = readers[key](key)
        else:
            table.raw(key)
    return details, to


def read_members(table: Table, count: int, key: str) -> tuple[int, ...]:
    """Indices of the members that a list names.

    Args:
        table: Holds the list.
        count: How many members there are.
        key: Where in the table.
    """
    value = table.raw(key, [])
    if not isinstance(value, list) or any(not isinstance(name, str) for name in value):
        table.wrong(key, f"{value!r:.40} is wrong", 'a list like ["h0", "h3-h9"] is expected')
        return ()
    members: list[int] = []
    for name in value:
        match = _RANGE.fullmatch(name)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if not int(first) <= int(last) < count:
            known = f"members are h0 to h{count - 1}; ranges are written h0-h2"
            table.wrong(key, f"there is no member {name!r:.40}", known)
            continue
        members += range(int(first), int(last) + 1)
    if len(set(members)) != len(members):
        table.wrong(key, "a member stands twice")
    return tuple(dict.fromkeys(members))
