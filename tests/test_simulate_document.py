"""docs/simulate.md names every key, event and lie of a scenario, with the defaults of the code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from p2pfed.simulate.happenings import DOINGS
from p2pfed.simulate.scenario import LIES, MOST_MEMBERS, TRAININGS, read_scenario
from p2pfed.simulate.tables import Table

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "simulate.md").read_text("utf-8")
SECTION = TEXT.partition("\n## Scenario files\n")[2].partition("\n## ")[0]
TABLES = ("members", "training", "run", "network", "timers", "churn", "check", "event")


def rows(header: str) -> list[list[str]]:
    """The cells of the table that begins with a header."""
    body = SECTION.partition(f"\n| {header} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body]


def names(cell: str) -> list[str]:
    return re.findall(r"`([\w.-]+)`", cell)


@pytest.fixture
def asked(monkeypatch):
    """Every key that the reader asks for, with its table."""
    keys: set[tuple[str, str]] = set()
    raw = Table.raw

    def noted(table, key, default=None):
        keys.add((re.sub(r"\[\d+\]", "", table.where), key))
        return raw(table, key, default)

    monkeypatch.setattr(Table, "raw", noted)
    read_scenario("", "empty")
    return keys


def test_the_table_lists_exactly_the_keys_that_are_read(asked):
    known = {f"{where}.{key}" if where else key for where, key in asked}
    known -= {*TABLES, *(f"members.byzantine.{lie}" for lie in LIES)}
    run = {key for key in known if key.startswith("run.")}
    known |= {"event.at_s", "event.do", "event.members"}
    written = {
        name
        for key, _, meaning in rows("key")
        for name in names(key) + [n for n in names(meaning) if n.startswith("members.")]
    }
    assert written == known - run
    paragraph = SECTION.partition("`[run]` takes")[2].partition("\n\n")[0]
    assert {key.partition(".")[2] for key in run} == set(re.findall(r"`(\w+)`", paragraph))


# Where the reader keeps a value otherwise than under the name of its key.
KEPT_AS = {"members.count": "members", "training.kind": "training", "training.seconds": "train_s"}
KEPT_AS |= {"check.every_s": "check_every_s"}


def kept(name: str) -> Any:
    """The value of a key in a scenario that says nothing."""
    empty = read_scenario("", "empty")
    table, _, key = name.rpartition(".")
    field = KEPT_AS.get(name, key)
    for owner in {"timers": (empty.liveness, empty), "churn": (empty.churn,)}.get(table, (empty,)):
        for one in (field, field.removesuffix("_s")):
            if hasattr(owner, one):
                value = getattr(owner, one)
                return [*value] if isinstance(value, tuple) else value
    return {}


def test_the_defaults_of_the_table_are_those_of_the_code():
    words = {"`until_s` / 20": 600 / 20, "/ 200": 600 / 200, "the end": 600, "the name": "empty"}
    seen = []
    for key, cell, _ in rows("key"):
        defaults = re.split(r", (?![^\[]*\])", cell)
        if cell and key != "`members.samples`":  # 100 each
            for name, default in zip(names(key), defaults * len(names(key)), strict=False):
                value = words[default] if default in words else json.loads(default.strip("`"))
                assert kept(name) == value, name
                seen.append(name)
    assert len(seen) == len(set(seen)) >= 40
    assert set(read_scenario("", "empty").samples) == {100}


def test_the_events_are_listed_with_their_keys():
    written = {names(do)[0]: tuple(names(keys)) for do, keys, _ in rows("do")}
    assert written == {word.rstrip("*"): keys for word, keys in DOINGS.items()}


def test_lies_trainings_and_bounds_are_told():
    told = set(names(SECTION)) | set(names(TEXT))
    assert {*LIES, *TRAININGS} <= told
    assert f"at most {MOST_MEMBERS}" in SECTION
    assert f"up to {MOST_MEMBERS} hospitals" in TEXT
