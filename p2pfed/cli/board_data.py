"""What dashboard and report show: both sockets, joined on the client side.

    Board    one look at everything, and what peers' released measures were at earlier looks
    Feed     the daemon's events as they happen, for any number of readers

Invariants. Nothing is written to a socket: only GET. What the private socket says goes from here to
the page or the file and never to the network process. A daemon that goes away leaves the last look
standing, marked as not live, and is picked up again when it is back.

Not here: the page (`report/board`), serving it (`loopback`), freezing it (`report`).
"""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections import deque

from p2pfed import __version__
from p2pfed.errors import NotFound, P2PFedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from p2pfed.admin.client import Client

__all__ = ["KEPT_EVENTS", "SCHEMA", "Board", "Feed", "recent_events"]

SCHEMA = "p2pfed.board/1"
KEPT_EVENTS = 200
MOST_ROUNDS = 2000  # of the history; a page shows no more
_FRESH_S = 0.4  # looks within this time are one: several tabs may ask at once
_AGAIN_S = 1.0  # a daemon that went away is tried again after so long


class Board:
    """Looks at both sockets; may be asked from several threads.

    Args:
        public: The daemon's admin socket.
        private: Gives an endpoint's answer of the trainer's private socket, None where it may not
            be read.
        alone: Measures of a model that was trained on this hospital's patients only, by name;
            private.
    """

    def __init__(
        self,
        public: Client,
        private: Callable[[str], Any],
        *,
        alone: dict[str, float] | None = None,
    ) -> None:
        self._public = public
        self._private = private
        self._alone = alone
        self._lock = threading.Lock()
        self._last: dict[str, Any] = {}
        self._at = float("-inf")
        self._run = ""
        self._measures: dict[str, dict[int, list[Any]]] = {}

    def snapshot(self, *, fresh: bool = False) -> dict[str, Any]:
        """Everything the page shows, but the events.

        Args:
            fresh: Look now, and let an error of the socket pass.

        Returns:
            `schema`, `at`, `client`, `live`, `trouble` (why not live, in words), `status`, `peers`,
            `history`, `measures` (peer id -> list of round, value, name) and `private` (`metrics`,
            `status`, `ledger`, `alone`; None where the private socket may not be read).

        Raises:
            P2PFedError: With `fresh`, what is wrong with the admin socket.
        """
        with self._lock:
            if not fresh and time.monotonic() - self._at < _FRESH_S:
                return self._last
            try:
                looked = self._look()
            except P2PFedError as error:
                if fresh:
                    raise
                self._last = {**_nothing(), **self._last, "live": False, "trouble": error.what}
            else:
                self._last = looked
            self._at = time.monotonic()
            return self._last

    def _look(self) -> dict[str, Any]:
        status = self._public.get("/v1/status")
        peers = self._public.get("/v1/peers")
        run = status.get("run") or {}
        self._note_measures(str(run.get("id", "")), peers)
        return {
            **_nothing(),
            "at": _now(),
            "live": True,
            "status": status,
            "peers": peers,
            "history": self._history(int(run.get("round") or 0)),
            "measures": {
                peer: [told[r] for r in sorted(told)] for peer, told in self._measures.items()
            },
            "private": self._private_part(),
        }

    def _history(self, round_: int) -> Any:
        since = max(0, round_ + 1 - MOST_ROUNDS)
        try:
            return self._public.get(f"/v1/history?since={since}&limit={MOST_ROUNDS}")
        except (NotFound, P2PFedError):  # a daemon of the version before has no such endpoint
            return None

    def _note_measures(self, run: str, peers: list[dict[str, Any]]) -> None:
        """Peers tell their newest measure only; the line over rounds is drawn from our looks."""
        if run != self._run:
            self._run = run
            self._measures.clear()
        for peer in peers:
            told = peer.get("measure")
            if told:
                of = self._measures.setdefault(peer["peer_id"], {})
                of[int(told["round"])] = [told["round"], told["value"], told["name"]]
                if len(of) > MOST_ROUNDS:
                    del of[min(of)]

    def _private_part(self) -> dict[str, Any] | None:
        metrics = self._private("metrics")
        if not isinstance(metrics, dict):
            return None
        status, ledger = self._private("status"), self._private("ledger")
        return {
            "metrics": metrics.get("metrics", []),
            "rounds": (status or {}).get("rounds", [])[-20:],
            "progress": (status or {}).get("progress"),
            "ledger": {k: v for k, v in (ledger or {}).items() if k != "entries"} or None,
            "alone": self._alone,
        }


class Feed:
    """Follows the daemon's events from a thread of its own and keeps the newest.

    Args:
        client: The daemon's admin socket.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._grown = threading.Condition()
        self._kept: deque[dict[str, Any]] = deque(maxlen=KEPT_EVENTS)
        self._last = 0
        self._stopped = threading.Event()
        self.live = False

    def start(self) -> None:
        """Follow, until `stop` or the end of the process."""
        threading.Thread(target=self._follow_for_ever, daemon=True).start()

    def stop(self) -> None:
        """Do not come back once the stream that is open now ends."""
        self._stopped.set()

    def recent(self) -> list[dict[str, Any]]:
        """The newest events, oldest first."""
        with self._grown:
            return list(self._kept)

    def after(self, seq: int, seconds: float) -> tuple[list[dict[str, Any]], bool]:
        """Wait for events after a number, or for a change of `live`.

        Args:
            seq: The last number that the reader has.
            seconds: The longest to wait.

        Returns:
            The events, maybe none, oldest first; and whether the daemon is there.
        """
        with self._grown:
            if self._last <= seq:
                self._grown.wait(seconds)
            return [e for e in self._kept if e["seq"] > seq], self.live

    def _follow_for_ever(self) -> None:
        while not self._stopped.is_set():
            try:
                self._follow()
            except P2PFedError:
                self._mark(live=False)
            self._stopped.wait(_AGAIN_S)

    def _follow(self) -> None:
        newest = _newest_event(self._client)
        if newest < self._last:  # another daemon, or its store was lost: numbers begin anew
            self._last = 0
            self._kept.clear()
        since = max(self._last, newest - KEPT_EVENTS)
        self._mark(live=True)
        for event in self._client.stream(f"/v1/events?since={since}&follow=1"):
            if isinstance(event.get("seq"), int):
                with self._grown:
                    self._kept.append(event)
                    self._last = event["seq"]
                    self._grown.notify_all()

    def _mark(self, *, live: bool) -> None:
        with self._grown:
            if self.live != live:
                self.live = live
                self._grown.notify_all()


def recent_events(client: Client) -> list[dict[str, Any]]:
    """The newest events, oldest first; raises what the client raises."""
    since = max(0, _newest_event(client) - KEPT_EVENTS)
    found = client.stream(f"/v1/events?since={since}")
    return [event for event in found if isinstance(event.get("seq"), int)][-KEPT_EVENTS:]


def _newest_event(client: Client) -> int:
    """The number of the newest event, found by halving: reading all of them could be a million."""

    def is_beyond(seq: int) -> bool:
        found = client.stream(f"/v1/events?since={seq}&limit=1")
        return not any("seq" in event for event in found)

    low, high = -1, 1024
    while not is_beyond(high):
        low, high = high, high * 8
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_beyond(middle) else (middle, high)
    return max(high, 0)


def _nothing() -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "at": _now(),
        "client": __version__,
        "live": False,
        "trouble": "",
        "status": None,
        "peers": [],
        "history": None,
        "measures": {},
        "private": None,
    }


def _now() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
