"""Finding events by type and time, a clock that jumps, a disk that is full."""

from __future__ import annotations

import contextlib
import datetime as dt
import fnmatch
import json
import os
import shutil
import sqlite3
import subprocess

import pytest

from p2pfed.errors import StoreFailed
from p2pfed.node import eventlog
from p2pfed.node import store as stores
from p2pfed.node.eventlog import EventLog
from p2pfed.node.store import KeptEvent, Store

NOON = dt.datetime(2026, 1, 2, 12, tzinfo=dt.UTC)
HOUR = dt.timedelta(hours=1)


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> dt.datetime:
        return self.now


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path / "store.db")
    yield opened
    opened.close()


def told(found) -> list[int]:
    return [event["seq"] for event in found.events]


def filled(store: Store, clock: Clock, *kinds: str) -> EventLog:
    log = EventLog(store, clock)
    for kind in kinds:
        log.add(kind, {})
        clock.now += HOUR
    return log


# --- by type -----------------------------------------------------------------------------------


def test_events_of_several_types_come_in_their_order_and_piece_by_piece(store):
    kinds = ["peer.joined", "round.started", "peer.left", "peer.joined", "node.ready", "peer.left"]
    log = filled(store, Clock(), *kinds)
    assert told(log.find(0, 10, kind="peer.*")) == [1, 3, 4, 6]
    first = log.find(0, 3, kind="peer.*")
    assert (told(first), first.upto) == ([1, 3, 4], 4)
    rest = log.find(first.upto, 3, kind="peer.*")
    assert (told(rest), rest.upto) == ([6], 6)
    assert told(log.find(0, 10, kind="node.read?")) == [5]
    before = fnmatch._compile_pattern.cache_info().currsize
    assert told(log.find(0, 10, kind="*.never.seen.*")) == []
    assert fnmatch._compile_pattern.cache_info().currsize == before  # any reader sends patterns
    assert log.find(0, 10, kind="nothing.*").upto == 6  # so that a follower need not look again


def test_the_newest_of_a_kind_are_found_without_reading_the_rest(store):
    log = filled(store, Clock(), "a.x", "b", "a.y", "b", "b")
    assert told(log.find(log.before_newest(2), 10)) == [4, 5]
    assert told(log.find(log.before_newest(2, "a.*"), 10, kind="a.*")) == [1, 3]
    assert log.before_newest(5) == 0
    assert log.before_newest(6) == log.before_newest(3, "a.*") == log.before_newest(1, "c") == 0


def test_the_newest_events_may_still_wait_for_the_disk(store, monkeypatch):
    log = filled(store, Clock(), "a", "b", "a")
    log.flush()

    def full(_: object) -> None:
        raise StoreFailed("no", "the disk is full")

    monkeypatch.setattr(store, "add_events", full)
    for kind in ("a", "b"):
        log.add(kind, {})
    assert told(log.find(log.before_newest(1), 10)) == [5]
    assert told(log.find(log.before_newest(3), 10)) == [3, 4, 5]
    assert told(log.find(log.before_newest(2, "a"), 10, kind="a")) == [3, 4]


def test_types_are_known_after_a_restart(store):
    filled(store, Clock(), "b.x", "a.x", "b.x", "c.y").flush()
    assert store.event_types() == {"a.x", "b.x", "c.y"}
    assert told(EventLog(store, Clock()).find(0, 9, kind="?.x")) == [1, 2, 3]


# --- by time -----------------------------------------------------------------------------------


def test_after_a_time_begins_with_the_first_event_of_then_on(store):
    log = filled(store, Clock(), "a", "b", "a", "b")  # at 12, 13, 14 and 15 o'clock
    assert told(log.find(0, 10, after=NOON + HOUR)) == [2, 3, 4]
    assert told(log.find(0, 10, after=NOON + 1.5 * HOUR, kind="b")) == [4]
    assert told(log.find(3, 10, after=NOON)) == [4]
    assert told(log.find(0, 10, after=NOON + 9 * HOUR)) == []
    assert told(log.find(0, 10, after=NOON - HOUR)) == [1, 2, 3, 4]


def test_a_clock_that_jumps_a_day_and_back_changes_no_order_and_hides_no_event(store):
    clock = Clock()
    log = filled(store, clock, "a")
    clock.now += dt.timedelta(days=1)
    log.add("in the future", {})
    clock.now = NOON + 2 * HOUR
    log.add("set back", {})
    assert told(log.find(0, 10)) == [1, 2, 3]
    assert told(log.find(0, 10, after=NOON + 1.5 * HOUR)) == [2, 3]
    clock.now = NOON - dt.timedelta(days=1)
    log.add("before all", {})
    assert told(log.find(0, 10, after=NOON)) == [1, 2, 3, 4]
    assert [e["ts"] for e in log.find(3, 1).events] == ["2026-01-01T12:00:00.000000Z"]


def test_a_loss_is_told_where_the_time_asked_for_may_be_in_it(tmp_path):
    store = Store(tmp_path / "store.db", kept_events=3)
    log = filled(store, Clock(), *"abcdef")  # 4, 5 and 6 are left, from 15 o'clock on
    assert log.find(0, 10, after=NOON).lost == 3
    assert log.find(0, 10, after=NOON + 4 * HOUR).lost == 0
    store.close()


# --- keeping and dropping ----------------------------------------------------------------------


def test_the_events_of_the_version_before_are_taken_over_once(tmp_path):
    path = tmp_path / "store.db"
    with sqlite3.connect(path) as old:
        old.execute("CREATE TABLE events (seq INTEGER PRIMARY KEY, event TEXT NOT NULL)")
        for seq, clock in ((7, "12"), (8, "10"), (9, "13")):
            ts = f"2026-01-02T{clock}:00:00.000000Z"
            text = json.dumps({"v": 1, "seq": seq, "ts": ts, "type": f"k.{seq}", "data": {}})
            old.execute("INSERT INTO events VALUES (?, ?)", (seq, text))
    old.close()
    for _ in range(2):
        store = Store(path)
        log = EventLog(store, Clock())
        assert told(log.find(6, 10)) == [7, 8, 9]
        assert told(log.find(6, 10, kind="k.8")) == [8]
        assert told(log.find(6, 10, after=NOON + HOUR)) == [9]
        assert store.latest_time() == int((NOON + HOUR).timestamp() * 1000)
        store.close()


def test_what_is_too_old_is_dropped_in_bites(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "_BITE", 20)
    path = tmp_path / "store.db"
    store = Store(path)
    store.add_events(KeptEvent(n, "k", n, "{}") for n in range(1, 201))
    store.close()
    store = Store(path, kept_events=50)  # of a version that keeps fewer
    left = []
    for n in range(201, 210):
        store.add_events([KeptEvent(n, "k", n, "{}")])
        left.append(store.event_range()[0])
    assert left[:3] == [23, 45, 67]
    assert left[-1] == 160
    store.close()


# --- a full disk -------------------------------------------------------------------------------


def test_events_stay_in_memory_while_the_disk_takes_none(store, monkeypatch):
    log = filled(store, Clock(), "a")
    log.flush()
    real = store.add_events

    def full(_):
        raise StoreFailed("the store failed", "database or disk is full")

    monkeypatch.setattr(store, "add_events", full)
    monkeypatch.setattr(eventlog, "_HELD", 2)
    for kind in ("b", "c", "b"):
        log.add(kind, {})
    assert told(log.find(0, 10)) == [1, 3, 4]  # the third that waits pushes out the first
    assert told(log.find(0, 10, kind="b")) == [4]
    assert "disk is full" in log.trouble
    monkeypatch.setattr(store, "add_events", real)
    assert [e["type"] for e in log.find(0, 10).events] == ["a", "c", "b", "events.written"]
    assert log.trouble == ""
    found = log.find(4, 10).events
    assert [(e["type"], e["data"]) for e in found] == [("events.written", {"lost": 1})]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_on_a_disk_that_is_really_full_reading_goes_on_and_a_fact_is_refused_in_words(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        store = Store(disk / "store.db")
        log = filled(store, Clock(), "a", "b")
        log.flush()
        hog = disk / "hog"
        with contextlib.suppress(OSError), hog.open("wb", buffering=0) as file:
            while True:  # until there is no room
                file.write(bytes(4096))
        log.add("c", {"text": "x" * 100_000})
        assert told(log.find(0, 10)) == [1, 2, 3]
        assert "full" in log.trouble
        with pytest.raises(StoreFailed, match=r"store\.db failed") as refused:
            store.remember("key", "x" * 100_000)
        assert "make room" in refused.value.do
        hog.unlink()
        store.remember("key", "value")
        assert store.recall("key") == "value"
        log.flush()
        assert log.trouble == ""
        assert store.event_range() == (1, 3)
        store.close()
    finally:
        subprocess.run([shutil.which("umount"), "-l", disk], check=True)
