"""An append-only, hash-chained, crash-safe list of records in its own SQLite file.

Map: `Journal.open` (lock, verify) -> `append` (durable when it returns) -> `payload`.

Invariant: what `append` returned survives a crash, and `entries` is exactly the list that was
appended, or opening fails.

The chain: a record's value is BLAKE2b-256 (person "p2pfed-ledger") over the value before, its
number (8 bytes, little endian), the digest of its body (BLAKE2b-256, "p2pfed-body") and that of its
payload ("p2pfed-payload"; nothing where there is none). The first follows 32 zeros. As it is made
of digests, who may not see a body can recompute it all the same. A `tip` row repeats the last
value, so that a vanished tail is noticed too.

How: write-ahead log with synchronous=FULL (NORMAL may lose a commit that was acknowledged), the
log folded back and emptied after each commit (a damaged log would silently end early), the
directory synced, SQLite's exclusive lock held until `close`. The file is made complete under
another name and then renamed, so an empty file is damage, never a fresh start.

Not here: what the records mean (`ledger`). That the whole file was deleted or replaced by an
older copy cannot be noticed here, and no one else looks: the newest `head` stands in this node's
own signed deltas, which the members keep, for a person to compare.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final, Self

from p2pfed.errors import ConfigError, LedgerCorrupt, PrivacyError, StateInUse

__all__ = ["Journal", "JournalEntry"]

_FORMAT: Final = 2  # of the tables and the chain, in the file's header; 1 chained whole bodies
_SCHEMA: Final = (
    "CREATE TABLE entries(seq INTEGER PRIMARY KEY, body BLOB, digest BLOB, chain BLOB)",
    "CREATE TABLE payloads(seq INTEGER PRIMARY KEY, payload BLOB)",
    "CREATE TABLE tip(id INTEGER PRIMARY KEY, seq INTEGER, chain BLOB)",
    "INSERT INTO tip VALUES(1, 0, zeroblob(32))",
    f"PRAGMA user_version = {_FORMAT}",
)
_START: Final = bytes(32)
_HEADER_BYTES: Final = 100  # of an SQLite file; a shorter one it takes for a new database
_IN_USE: Final = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_STORAGE: Final = {
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_TOOBIG,
}


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One record.

    Attributes:
        seq: 1, 2, 3, ... without gaps.
        body: What was appended.
        digest: BLAKE2b-256 of the payload; empty without one.
        chain: 32 bytes that stand for the whole journal up to here.
    """

    seq: int
    body: bytes
    digest: bytes
    chain: bytes


class Journal:
    """The open journal; one opener at a time, one process, one thread."""

    def __init__(self, path: Path, db: sqlite3.Connection, entries: list[JournalEntry]) -> None:
        self._path = path
        self._db = db
        self._entries = entries
        self._pid = os.getpid()
        self._failed = False

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the journal, or make it where there is none; verifies every record.

        Raises:
            StateInUse: Another process has it open.
            LedgerCorrupt: It does not verify, or is of another format.
            ConfigError: It is readable or writable by others.
            PrivacyError: The storage failed.
        """
        with _told(path):
            path = path.resolve()
            if not path.exists():
                _create(path)
            _check_file(path)
            db = _connect(path)
            try:
                db.execute("BEGIN EXCLUSIVE")
                entries = _read(db, path)
                db.execute("COMMIT")
                _sync_directory(path)  # the log's name is on disk before its first commit
            except BaseException:
                db.close()
                raise
        return cls(path, db, entries)

    @property
    def entries(self) -> tuple[JournalEntry, ...]:
        """All records, oldest first."""
        return tuple(self._entries)

    @property
    def head(self) -> bytes:
        """The last chain value: 32 bytes."""
        return self._entries[-1].chain if self._entries else _START

    def append(self, body: bytes, payload: bytes | None = None) -> JournalEntry:
        """Append a record; it is durable when this returns.

        After a failure the journal refuses further records until it is opened anew: whether the
        failed one reached the disk is known only then.

        Raises:
            PrivacyError: The storage failed, now or before; nothing may be released on it.
        """
        if self._failed or os.getpid() != self._pid:
            raise PrivacyError(
                f"ledger {self._path}: no more records here",
                "an earlier write failed, or this is a forked child of the ledger's owner",
                "Restart the trainer.",
            )
        seq = len(self._entries) + 1
        digest = b"" if payload is None else _digest(payload)
        entry = JournalEntry(seq, body, digest, _chain(self.head, seq, body, digest))
        self._failed = True
        with _told(self._path):
            db = self._db
            db.execute("BEGIN IMMEDIATE")
            db.execute("INSERT INTO entries VALUES(?, ?, ?, ?)", (seq, body, digest, entry.chain))
            if payload is not None:
                db.execute("INSERT INTO payloads VALUES(?, ?)", (seq, payload))
            db.execute("UPDATE tip SET seq = ?, chain = ? WHERE id = 1", (seq, entry.chain))
            db.execute("COMMIT")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._failed = False
        self._entries.append(entry)
        return entry

    def payload(self, seq: int) -> bytes:
        """Return the payload stored with a record.

        Raises:
            LedgerCorrupt: It is gone or does not match the record.
        """
        with _told(self._path):
            row = self._db.execute("SELECT payload FROM payloads WHERE seq = ?", (seq,)).fetchone()
        found = row[0] if row else None
        if not isinstance(found, bytes) or _digest(found) != self._entries[seq - 1].digest:
            raise _corrupt(self._path, f"the payload of record {seq} does not verify")
        return found

    def close(self) -> None:
        """Close the file and free its lock."""
        self._db.close()


def _create(path: Path) -> None:
    """Make an empty journal under another name, then rename it: complete or not there."""
    log = path.with_name(path.name + "-wal")
    if log.exists() and log.stat().st_size:
        raise _corrupt(path, "the file is gone but its write-ahead log remains")
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    db = _connect(draft)
    try:
        for statement in ("BEGIN IMMEDIATE", *_SCHEMA, "COMMIT"):
            db.execute(statement)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # closing would hide a full disk
    finally:
        db.close()
    draft.rename(path)
    _sync_directory(path)


def _connect(path: Path) -> sqlite3.Connection:
    uri = f"{path.as_uri()}?mode=rw"
    db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=0)
    try:
        db.text_factory = bytes  # a damaged file may hold anything
        db.execute("PRAGMA locking_mode=EXCLUSIVE").fetchall()
        _use_log(db, path)
        db.execute("PRAGMA synchronous=FULL")
    except BaseException:
        db.close()
        raise
    return db


def _use_log(db: sqlite3.Connection, path: Path) -> None:
    if db.execute("PRAGMA journal_mode=WAL").fetchone() != (b"wal",):
        raise _storage(path, "its file system does not carry a write-ahead log")


def _read(db: sqlite3.Connection, path: Path) -> list[JournalEntry]:
    (found,) = db.execute("PRAGMA user_version").fetchone()
    if found != _FORMAT:
        raise LedgerCorrupt(
            f"ledger {path} has format {found or 1}",
            f"this version of p2pfed reads format {_FORMAT}; or the file was damaged",
            "Nothing is released. Use the version that wrote it; never delete it.",
        )
    entries: list[JournalEntry] = []
    head = _START
    for row in db.execute("SELECT seq, body, digest, chain FROM entries ORDER BY seq"):
        seq, body, digest, chain = row
        whole = [isinstance(value, bytes) for value in (body, digest, chain)]
        if seq != len(entries) + 1 or not all(whole) or chain != _chain(head, seq, body, digest):
            raise _corrupt(path, f"record {len(entries) + 1} does not verify")
        entries.append(JournalEntry(seq, body, digest, chain))
        head = chain
    if db.execute("SELECT id, seq, chain FROM tip").fetchall() != [(1, len(entries), head)]:
        raise _corrupt(path, f"it ends at record {len(entries)}, its tip says otherwise")
    return entries


def _chain(head: bytes, seq: int, body: bytes, digest: bytes) -> bytes:
    linked = head + seq.to_bytes(8, "little") + _hash(body, b"p2pfed-body") + digest
    return _hash(linked, b"p2pfed-ledger")


def _digest(payload: bytes) -> bytes:
    return _hash(payload, b"p2pfed-payload")


def _hash(data: bytes, person: bytes) -> bytes:
    return blake2b(data, digest_size=32, person=person).digest()


def _check_file(path: Path) -> None:
    status = path.stat()
    if not path.is_file() or status.st_size < _HEADER_BYTES:
        raise _corrupt(path, "it is empty, cut off or not a file")
    if status.st_mode & 0o077:
        raise ConfigError(
            f"ledger {path} has mode {status.st_mode & 0o777:o}",
            "others could read or change it",
            f"chmod 600 {path}",
        )


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Tell SQLite's and the system's failures as ours."""
    try:
        yield
    except sqlite3.ProgrammingError:  # another thread, or closed: the caller's bug
        raise
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code in _IN_USE:
            raise StateInUse(
                f"ledger {path} is open elsewhere", "one trainer at a time may spend from it"
            ) from error
        if code in _STORAGE:
            raise _storage(path, str(error)) from error
        raise _corrupt(path, str(error)) from error
    except OSError as error:
        raise _storage(path, str(error)) from error


def _storage(path: Path, why: str) -> PrivacyError:
    return PrivacyError(
        f"ledger {path} cannot be opened or written",
        why,
        "Nothing was released. Check the path, the free space and the permissions.",
    )


def _corrupt(path: Path, why: str) -> LedgerCorrupt:
    return LedgerCorrupt(
        f"ledger {path} does not verify",
        why,
        "Nothing is released until a person has looked; restore the newest copy, never delete it.",
    )
