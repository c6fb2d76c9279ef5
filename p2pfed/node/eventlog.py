"""The event log: numbered, kept across restarts, followed by the admin socket.

Numbers only grow, also across restarts; what is older than the last million is dropped, and a
reader who asks for it is told how many are lost. Events hold names, rounds, counts and hashes of
public things only. Their order is that of their numbers, whatever the wall clock did; `ts` is what
the wall clock said.

Where the disk takes no more, the newest events stay in memory and are shown all the same, `trouble`
says so, and they are written once there is room.
"""

from __future__ import annotations

import datetime as dt
import fnmatch
import json
import logging
import re
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import trio

from p2pfed.errors import StoreFailed
from p2pfed.node.store import KeptEvent, Store

__all__ = ["EventLog", "Found"]

logger = logging.getLogger("p2pfed.events")

_QUIET = {"model.folded", "round.started"}  # one line a round is enough at level info
_HELD = 10_000  # events that wait for the disk


@dataclass(frozen=True, slots=True)
class Found:
    """An answer from the log.

    Attributes:
        events: What was asked for, oldest first.
        lost: How many events before them are no longer kept.
        upto: The number after which to go on; all before it was looked at.
    """

    events: list[dict[str, Any]]
    lost: int
    upto: int


class EventLog:
    """See the module docstring.

    Args:
        store: Keeps the events.
        wall: The calendar time.

    Attributes:
        trouble: Why events are not on the disk; empty when they are.
        counts: Events by type since the start; the types are the code's own words.
    """

    def __init__(self, store: Store, wall: Callable[[], dt.datetime]) -> None:
        self.trouble = ""
        self.counts: Counter[str] = Counter()
        self._store = store
        self._wall = wall
        self._first, self._last = store.event_range()
        self._types = store.event_types()
        self._high = store.latest_time()
        self._unwritten: deque[KeptEvent] = deque()
        self._dropped = 0
        self._news = trio.Event()

    def add(self, kind: str, data: Mapping[str, Any]) -> None:
        """Append one event."""
        self._last += 1
        self.counts[kind] += 1
        now = self._wall()
        event = {
            "v": 1,
            "seq": self._last,
            "ts": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "type": kind,
            "data": dict(data),
        }
        level = logging.DEBUG if kind in _QUIET else logging.INFO
        logger.log(level, "%s", kind, extra={"event": kind, "fields": dict(data)})
        self._high = max(self._high, _milliseconds(now))
        self._types.add(kind)
        self._unwritten.append(KeptEvent(self._last, kind, self._high, json.dumps(event)))
        self._news.set()
        self._news = trio.Event()

    def flush(self) -> None:
        """Write what was added since the last call; what cannot be written waits."""
        if not self._unwritten:
            return
        try:
            self._store.add_events(self._unwritten)
        except StoreFailed as error:
            if not self.trouble:
                logger.error("events are kept in memory only: %s", error.why)  # noqa: TRY400
            self.trouble = f"events are not written to the disk: {error.why}"
            while len(self._unwritten) > _HELD:
                self._unwritten.popleft()
                self._dropped += 1
            return
        self._unwritten.clear()
        if self.trouble:
            self.trouble = ""
            self.add("events.written", {"lost": self._dropped})
            self._dropped = 0

    def find(
        self, since: int, limit: int, *, kind: str = "", after: dt.datetime | None = None
    ) -> Found:
        """Look events up.

        Args:
            since: A sequence number; what is asked for comes after it.
            limit: The most that are given.
            kind: Only events whose type matches this pattern (`peer.*`); empty for all.
            after: Only from the first event on that happened at or after this time.
        """
        self.flush()
        oldest = max(self._first, self._last - self._store.kept_events + 1)
        begin = 0 if after is None else self._first_at(_milliseconds(after))
        if begin > oldest:  # else some that are lost may have been later, too
            since = max(since, begin - 1)
        lost = max(0, min(oldest - 1, self._last) - since)
        types = self._matching(kind) if kind else None
        texts = self._store.events(max(since, oldest - 1), limit, types)
        found = [json.loads(text) for text in texts]
        for event in self._unwritten:  # the disk is full
            if len(found) < limit and event.seq > since and (types is None or event.type in types):
                found.append(json.loads(event.text))
        upto = found[-1]["seq"] if len(found) >= limit else max(since, self._last)
        return Found(found, lost, upto)

    def before_newest(self, count: int, kind: str = "") -> int:
        """The number after which the newest `count` events come; 0 if there are fewer.

        Args:
            count: At least 1.
            kind: Only events whose type matches this pattern; empty for all.
        """
        self.flush()
        types = self._matching(kind) if kind else None
        waiting = [e.seq for e in self._unwritten if types is None or e.type in types]
        if count <= len(waiting):  # the disk is full
            return waiting[-count] - 1
        return self._store.before_newest(count - len(waiting), types)

    def since(self, sequence: int, limit: int) -> tuple[list[dict[str, Any]], int]:
        """Events after `sequence`, oldest first, and how many before them are lost."""
        found = self.find(sequence, limit)
        return found.events, found.lost

    async def wait_beyond(self, sequence: int) -> None:
        """Return once there is an event after `sequence`."""
        while self._last <= sequence:
            await self._news.wait()

    def _matching(self, pattern: str) -> list[str]:
        # Not fnmatchcase, which keeps the last 32,768 patterns: strangers' patterns come in here.
        meant = re.compile(fnmatch.translate(pattern))
        return [name for name in self._types if meant.match(name)]

    def _first_at(self, moment: int) -> int:
        """The number of the first event from a moment on, one after the last if there is none."""
        kept = self._store.first_event_at(moment)
        if kept is not None:
            return kept
        return next((e.seq for e in self._unwritten if e.high >= moment), self._last + 1)


def _milliseconds(moment: dt.datetime) -> int:
    return int(moment.timestamp() * 1000)
