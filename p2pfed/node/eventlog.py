"""The event log: numbered, kept across restarts, followed by the admin socket.

Numbers only grow, also across restarts; what is older than the last ten thousand is dropped, and a
reader who asks for it is told how many are lost. Events hold names, rounds, counts and hashes of
public things only.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import trio

from p2pfed.node.store import KEPT_EVENTS, Store

__all__ = ["EventLog"]

logger = logging.getLogger("p2pfed.events")

_QUIET = {"model.folded", "round.started"}  # one line a round is enough at level info


class EventLog:
    """See the module docstring.

    Args:
        store: Keeps the events.
        wall: The calendar time.
    """

    def __init__(self, store: Store, wall: Callable[[], dt.datetime]) -> None:
        self._store = store
        self._wall = wall
        self._first, self._last = store.event_range()
        self._unwritten: deque[tuple[int, str]] = deque()
        self._news = trio.Event()

    def add(self, kind: str, data: Mapping[str, Any]) -> None:
        """Append one event."""
        self._last += 1
        event = {
            "v": 1,
            "seq": self._last,
            "ts": self._wall().strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "type": kind,
            "data": dict(data),
        }
        level = logging.DEBUG if kind in _QUIET else logging.INFO
        logger.log(level, "%s %s", kind, " ".join(f"{k}={v}" for k, v in data.items()))
        self._unwritten.append((self._last, json.dumps(event)))
        self._news.set()
        self._news = trio.Event()

    def flush(self) -> None:
        """Write what was added since the last call."""
        self._store.add_events(self._unwritten)
        self._unwritten.clear()

    def since(self, sequence: int, limit: int) -> tuple[list[dict[str, Any]], int]:
        """Events after `sequence`, oldest first, and how many before them are lost."""
        self.flush()
        oldest = max(self._first, self._last - KEPT_EVENTS + 1)
        lost = max(0, min(oldest - 1, self._last) - sequence)
        return [json.loads(text) for text in self._store.events(sequence, limit)], lost

    async def wait_beyond(self, sequence: int) -> None:
        """Return once there is an event after `sequence`."""
        while self._last <= sequence:
            await self._news.wait()
