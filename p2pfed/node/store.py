"""What a node keeps between starts, in one SQLite file: deltas, proofs, addresses, events.

Invariants: this node's own delta is on the disk (synchronous=FULL) before anyone hears of it, so a
crash never makes it sign a second one for a round; everything else could be asked of a peer again
and is written with synchronous=NORMAL, which keeps the file consistent. Used from the event loop
and from the fold's worker thread; a lock serialises them. The privacy ledger is not here: it
belongs to the trainer.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from p2pfed.errors import ConfigError, RemoteProtocolError
from p2pfed.identity.signing import fact_hash
from p2pfed.wire.delta import Delta, Header, Proof, SignedHeader

__all__ = ["Store"]

logger = logging.getLogger(__name__)

KEPT_EVENTS = 10_000

_SCHEMA = """
CREATE TABLE IF NOT EXISTS deltas (
  fact BLOB PRIMARY KEY, run_id BLOB NOT NULL, round INTEGER NOT NULL, origin TEXT NOT NULL,
  header BLOB NOT NULL, signature BLOB NOT NULL, payload BLOB NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS deltas_by_run ON deltas (run_id, round);
CREATE INDEX IF NOT EXISTS deltas_by_origin ON deltas (origin, run_id, round);
CREATE TABLE IF NOT EXISTS proofs (origin TEXT NOT NULL, run_id BLOB NOT NULL, proof BLOB NOT NULL,
  PRIMARY KEY (origin, run_id));
CREATE TABLE IF NOT EXISTS addresses (peer TEXT PRIMARY KEY, addresses TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS events (seq INTEGER PRIMARY KEY, event TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS remembered (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class Store:
    """One node's store; see the module docstring.

    Raises:
        ConfigError: The file cannot be opened or is not ours.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._archived: dict[bytes, int] = {}
        try:
            path.touch(mode=0o600)  # before SQLite makes it: the journal takes over its mode
            path.chmod(0o600)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.executescript(_SCHEMA)
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
        with self._lock:
            self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            return self._db.execute(statement, values).rowcount

    def _read(self, statement: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(statement, values).fetchall()

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

    def add_events(self, events: Iterable[tuple[int, str]]) -> None:
        """Keep events by sequence number, and drop those that are too old."""
        batch = list(events)
        if not batch:
            return
        with self._lock:
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("BEGIN")
            self._db.executemany("INSERT OR REPLACE INTO events VALUES (?, ?)", batch)
            self._db.execute("DELETE FROM events WHERE seq <= ?", (batch[-1][0] - KEPT_EVENTS,))
            self._db.execute("COMMIT")

    def events(self, since: int, limit: int) -> list[str]:
        """Kept events after a sequence number, oldest first."""
        rows = self._read(
            "SELECT event FROM events WHERE seq > ? ORDER BY seq LIMIT ?", (since, limit)
        )
        return [row[0] for row in rows]

    def event_range(self) -> tuple[int, int]:
        """The first and the last kept sequence number; (1, 0) if there is none."""
        first, last = self._read("SELECT MIN(seq), MAX(seq) FROM events")[0]
        return (1, 0) if first is None else (first, last)
