"""What a node keeps between starts, in one SQLite file: deltas, proofs, addresses, events.

Invariants: this node's own delta is on the disk (synchronous=FULL) before anyone hears of it, so a
crash never makes it sign a second one for a round; everything else could be asked of a peer again
and is written with synchronous=NORMAL, which keeps the file consistent. Used from the event loop
and from the fold's worker thread; a lock serialises them. The privacy ledger is not here: it
belongs to the trainer.

Events are found by number, by type and by time in a few milliseconds among a million: the type has
an index, and `high` is the latest time (milliseconds since 1970) of this event and all before it.
It never falls, whatever the clock did, so that "from then on" is one place in the log. Deleting is
done in small bites, so that it never holds up the node for long.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import logging
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2pfed.errors import ConfigError, RemoteProtocolError, StoreFailed
from p2pfed.identity.signing import fact_hash
from p2pfed.wire.delta import Delta, Header, Proof, SignedHeader

__all__ = ["KEPT_EVENTS", "KeptEvent", "Store"]

logger = logging.getLogger(__name__)

KEPT_EVENTS = 1_000_000
_BITE = 2_000  # events that are deleted at a time

_SCHEMA = """
CREATE TABLE IF NOT EXISTS deltas (
  fact BLOB PRIMARY KEY, run_id BLOB NOT NULL, round INTEGER NOT NULL, origin TEXT NOT NULL,
  header BLOB NOT NULL, signature BLOB NOT NULL, payload BLOB NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS deltas_by_run ON deltas (run_id, round);
CREATE INDEX IF NOT EXISTS deltas_by_origin ON deltas (origin, run_id, round);
CREATE TABLE IF NOT EXISTS proofs (origin TEXT NOT NULL, run_id BLOB NOT NULL, proof BLOB NOT NULL,
  PRIMARY KEY (origin, run_id));
CREATE TABLE IF NOT EXISTS addresses (peer TEXT PRIMARY KEY, addresses TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS event_log (seq INTEGER PRIMARY KEY, type TEXT NOT NULL,
  high INTEGER NOT NULL, event TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS event_log_by_type ON event_log (type);
CREATE INDEX IF NOT EXISTS event_log_by_high ON event_log (high);
CREATE TABLE IF NOT EXISTS remembered (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""

_OLD_EVENTS = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'events'"
# Before version 0.2 events had no columns of their own. That program makes its table anew.
_TAKE_OVER = """
BEGIN;
INSERT OR IGNORE INTO event_log
  SELECT seq, json_extract(event, '$.type'),
    CAST(ROUND(MAX((julianday(json_extract(event, '$.ts')) - 2440587.5) * 86400000.0)
      OVER (ORDER BY seq)) AS INTEGER), event
  FROM events WHERE json_valid(event);
DROP TABLE events;
COMMIT;
"""


@dataclass(frozen=True, slots=True)
class KeptEvent:
    """One event as it is kept.

    Attributes:
        seq: Its number.
        type: Its type.
        high: Milliseconds since 1970: the latest of its own time and those of all events before.
        text: The event as JSON.
    """

    seq: int
    type: str
    high: int
    text: str


class Store:
    """One node's store; see the module docstring.

    Every method raises StoreFailed where the disk is full, fails or holds rubbish.

    Args:
        path: The file.
        kept_events: How many events are kept.

    Raises:
        ConfigError: The file cannot be opened or is not ours.
    """

    def __init__(self, path: Path, *, kept_events: int = KEPT_EVENTS) -> None:
        self.kept_events = kept_events
        self._path = path
        self._lock = threading.Lock()
        self._archived: dict[bytes, int] = {}
        try:
            path.touch(mode=0o600)  # before SQLite makes it: the journal takes over its mode
            path.chmod(0o600)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.executescript(_SCHEMA)
            if self._db.execute(_OLD_EVENTS).fetchone():
                self._db.executescript(_TAKE_OVER)
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(
                f"cannot open the store {path}",
                str(error),
                "if it is damaged, move it away: the deltas come back from the peers",
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _write(self, statement: str, values: tuple[Any, ...], *, durable: bool = False) -> int:
        """Write, and say how many rows changed."""
        with self._used():
            self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            return self._db.execute(statement, values).rowcount

    def _read(self, statement: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with self._used():
            return self._db.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def _used(self) -> Iterator[None]:
        """One at a time; what the disk does wrong is told in words."""
        with self._lock:
            try:
                yield
            except sqlite3.DatabaseError as error:
                if self._db.in_transaction:
                    with contextlib.suppress(sqlite3.Error):
                        self._db.execute("ROLLBACK")
                if isinstance(error, (sqlite3.IntegrityError, sqlite3.ProgrammingError)):
                    raise  # a bug of ours
                raise StoreFailed(
                    f"the store {self._path} failed",
                    str(error),
                    "make room on its disk, or check it, and start the daemon again",
                ) from error

    # --- deltas and proofs ---------------------------------------------------------------------

    def keep_delta(self, delta: Delta, *, durable: bool) -> None:
        """Keep a verified delta; `durable` means that it is on the disk when this returns."""
        header, signed = delta.header, delta.signed
        size = self.archived(header.run_id)
        new = self._write(
            "INSERT OR IGNORE INTO deltas VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                delta.fact,
                header.run_id,
                header.round,
                header.origin,
                signed.header_bytes,
                signed.signature,
                delta.payload,
            ),
            durable=durable,
        )
        self._archived[header.run_id] = size + new * len(delta.payload)

    def archived(self, run_id: bytes) -> int:
        """Bytes of payloads that are kept of a run."""
        if run_id not in self._archived:
            rows = self._read("SELECT SUM(LENGTH(payload)) FROM deltas WHERE run_id = ?", (run_id,))
            self._archived[run_id] = rows[0][0] or 0
        return self._archived[run_id]

    def headers(self, run_id: bytes) -> list[SignedHeader]:
        """Headers of all deltas of a run; one that rotted on the disk is dropped."""
        rows = self._read(
            "SELECT fact, header, signature FROM deltas WHERE run_id = ? ORDER BY round", (run_id,)
        )
        headers = []
        for fact, header, signature in rows:
            try:
                headers.append(SignedHeader.read(header, signature))
            except RemoteProtocolError as error:
                logger.warning("a stored delta is dropped, the peers hold it: %s", error.what)
                self._write("DELETE FROM deltas WHERE fact = ?", (fact,))
        return headers

    def newest_headers(self, origin: str) -> list[SignedHeader]:
        """The newest header of an origin in every run that is held."""
        rows = self._read(
            "SELECT header, signature, MAX(round) FROM deltas WHERE origin = ? GROUP BY run_id",
            (origin,),
        )
        found = []
        for header, signature, _ in rows:
            with contextlib.suppress(RemoteProtocolError):  # it rotted on the disk
                found.append(SignedHeader.read(header, signature))
        return found

    def header(self, fact: bytes) -> SignedHeader | None:
        """The signed header of a kept delta, by its full name; None if it rotted on the disk."""
        for header, signature in self._read(
            "SELECT header, signature FROM deltas WHERE fact = ?", (fact,)
        ):
            with contextlib.suppress(RemoteProtocolError):
                return SignedHeader.read(header, signature)
        return None

    def delta(self, fact: bytes) -> Delta:
        """A kept delta, by its full name."""
        header, signature, payload = self._read(
            "SELECT header, signature, payload FROM deltas WHERE fact = ?", (fact,)
        )[0]
        return Delta(SignedHeader.read(header, signature), payload)

    def payload(self, fact: bytes) -> bytes:
        """The payload bytes of a kept delta.

        Raises:
            ConfigError: It rotted on the disk; it is dropped, and fetched after the next start.
        """
        data: bytes
        header, data = self._read("SELECT header, payload FROM deltas WHERE fact = ?", (fact,))[0]
        if fact_hash(data) != Header.decode(header).payload_hash:
            self._write("DELETE FROM deltas WHERE fact = ?", (fact,))
            raise ConfigError(
                "the store is damaged: a delta is not what its origin signed",
                "folding it would give a model that no other hospital has",
                "start the daemon again, the peers send it once more; and check the disk",
            )
        return data

    def keep_proof(self, origin: str, proof: bytes) -> None:
        """Keep a proof of equivocation."""
        run_id = Proof.decode(proof).first.header.run_id
        self._write("INSERT OR REPLACE INTO proofs VALUES (?, ?, ?)", (origin, run_id, proof))

    def proofs(self, run_id: bytes) -> list[Proof]:
        """All kept proofs of a run."""
        rows = self._read("SELECT proof FROM proofs WHERE run_id = ?", (run_id,))
        return [Proof.decode(row[0]) for row in rows]

    # --- addresses, small facts ----------------------------------------------------------------

    def keep_addresses(self, peer: str, addresses: Iterable[str]) -> None:
        """Remember where a peer was reachable."""
        text = json.dumps(list(addresses))
        self._write("INSERT OR REPLACE INTO addresses VALUES (?, ?)", (peer, text))

    def addresses(self) -> dict[str, list[str]]:
        """Remembered addresses by peer."""
        rows = self._read("SELECT peer, addresses FROM addresses")
        return {peer: json.loads(text) for peer, text in rows}

    def remember(self, key: str, value: Any) -> None:
        """Keep one JSON value under a name."""
        self._write("INSERT OR REPLACE INTO remembered VALUES (?, ?)", (key, json.dumps(value)))

    def recall(self, key: str, default: Any = None) -> Any:
        """The value under a name."""
        rows = self._read("SELECT value FROM remembered WHERE key = ?", (key,))
        return json.loads(rows[0][0]) if rows else default

    # --- events --------------------------------------------------------------------------------

    def add_events(self, events: Iterable[KeptEvent]) -> None:
        """Keep events by sequence number, and drop some of those that are too old."""
        batch = list(events)
        if not batch:
            return
        with self._used():
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("BEGIN")
            self._db.executemany(
                "INSERT OR REPLACE INTO event_log VALUES (?, ?, ?, ?)",
                [(event.seq, event.type, event.high, event.text) for event in batch],
            )
            (oldest,) = self._db.execute("SELECT MIN(seq) FROM event_log").fetchone()
            outdated = min(batch[-1].seq - self.kept_events, oldest + len(batch) + _BITE)
            self._db.execute("DELETE FROM event_log WHERE seq <= ?", (outdated,))
            self._db.execute("COMMIT")

    def events(self, since: int, limit: int, types: Sequence[str] | None = None) -> list[str]:
        """Kept events after a sequence number, oldest first.

        Args:
            since: The number.
            limit: The most that are given.
            types: Only of these types; None for all.
        """
        if types is None:
            rows = self._read(
                "SELECT event FROM event_log WHERE seq > ? ORDER BY seq LIMIT ?", (since, limit)
            )
            return [row[0] for row in rows]
        with self._used():
            each = [
                self._db.execute(
                    "SELECT seq, event FROM event_log WHERE type = ? AND seq > ?"
                    " ORDER BY seq LIMIT ?",
                    (kind, since, limit),
                )
                for kind in types
            ]
            # Merged as they are read: of each type no more is looked at than is given.
            return [text for _, text in itertools.islice(heapq.merge(*each), limit)]

    def before_newest(self, count: int, types: Sequence[str] | None = None) -> int:
        """The number after which the newest `count` kept events come; 0 if there are fewer.

        Args:
            count: At least 1.
            types: Only of these types; None for all.
        """
        only = "" if types is None else f"WHERE type IN ({','.join('?' * len(types))})"
        rows = self._read(
            f"SELECT seq FROM event_log {only} ORDER BY seq DESC LIMIT 1 OFFSET ?",  # noqa: S608
            (*(types or ()), count - 1),
        )
        return rows[0][0] - 1 if rows else 0

    def event_types(self) -> set[str]:
        """The types of which an event is kept."""
        found: set[str] = set()
        last = ""
        while rows := self._read("SELECT MIN(type) FROM event_log WHERE type > ?", (last,)):
            last = rows[0][0]
            if last is None:
                break
            found.add(last)
        return found

    def first_event_at(self, moment: int) -> int | None:
        """The number of the first event at or after a time (ms since 1970); None if there is none.

        What follows it may be of an earlier time, where the clock was set back.
        """
        rows = self._read(
            "SELECT seq FROM event_log WHERE high >= ? ORDER BY high, seq LIMIT 1", (moment,)
        )
        return rows[0][0] if rows else None

    def latest_time(self) -> int:
        """The latest time of any kept event, in ms since 1970; 0 if there is none."""
        return self._read("SELECT MAX(high) FROM event_log")[0][0] or 0

    def event_range(self) -> tuple[int, int]:
        """The first and the last kept sequence number; (1, 0) if there is none."""
        first, last = self._read(
            "SELECT (SELECT MIN(seq) FROM event_log), (SELECT MAX(seq) FROM event_log)"
        )[0]  # each alone is one look; both in one SELECT would read the whole table
        return (1, 0) if first is None else (first, last)
