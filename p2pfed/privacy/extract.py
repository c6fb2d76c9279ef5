"""What an auditor may see of a ledger: read without changing it, exported, verified, added up.

Map: `read_ledger` (a file, verified) or `decode_export` (an auditor's copy, verified) or
`as_told` (what a running trainer shows) -> `Extract` -> `encode_export`.

Invariant: an export holds no secret and nothing made from a patient alone. Bodies of "debit" and
"output" records stand in it byte by byte, those of "open" (the secret) and "register" (the
patients' fingerprints) are hidden: of them it says the kind, the time, the names, which data sets
share patients, and the body's digest, of which nobody can guess the body without the secret.

What the verification is worth. The chain (`journal`) is made of digests, so every link of an
export is recomputed, hidden records included. The head stands in this node's signed deltas, which
all members keep: an export whose head was compared with one of them has exactly the records of the
ledger, each with its own body and payload digest. What is left to believe is what is *said* of a
hidden body. The digest binds it, and the hospital can open it on site. A lie about who shares
patients, or a debit passed off as a hidden record, contradicts the totals of the next output that
counts it (`review`): only debits after the last such output could be hidden so, and no output, for
hidden records have no payload. The seal in the last line finds accidents only.

Format: JSON lines, `{"format", "head", "records"}` first, then one line per record in their order,
then `{"end", "seal"}`, where the seal is BLAKE2b-256 (person "p2pfed-export") of all bytes before.

Not here: adding up what the records say (`review`), writing the ledger (`ledger`, `journal`).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

from p2pfed.errors import ConfigError, LedgerCorrupt, P2PFedError, PrivacyError, StateInUse
from p2pfed.privacy.journal import Journal, JournalEntry
from p2pfed.privacy.records import fingerprints

__all__ = [
    "Extract",
    "Record",
    "as_told",
    "decode_export",
    "encode_export",
    "read_ledger",
]

FORMAT: Final = "p2pfed.ledger-export/2"

_HIDDEN = {"open": "secret", "register": "patients"}  # kind -> the field that must not leave
_DIGEST_BYTES = 32
_SQLITE_LOCKS = 0x40000000, 512  # where SQLite keeps its locks, and how many bytes of them
_FLOCK = "hhqqi4x"  # struct flock of Linux


@dataclass(frozen=True, slots=True)
class Record:
    """One record, without what must not leave.

    Attributes:
        seq: Its number.
        fields: What it says; always "kind" and "at".
        chain: 32 bytes that stand for the ledger up to here.
        body: Its exact bytes; None where they are hidden or not known.
        body_digest: Of them: 32 bytes; empty where a trainer does not tell it.
        digest: Of the payload; empty without one.
    """

    seq: int
    fields: Mapping[str, Any]
    chain: bytes
    body: bytes | None = None
    body_digest: bytes = b""
    digest: bytes = b""


@dataclass(frozen=True, slots=True)
class Extract:
    """All records, oldest first."""

    records: tuple[Record, ...]

    @property
    def hidden(self) -> tuple[int, ...]:
        """Numbers of the records whose bodies are not here."""
        return tuple(record.seq for record in self.records if record.body is None)

    @property
    def head(self) -> bytes:
        """The last chain value; zeros where there is no record."""
        return self.records[-1].chain if self.records else bytes(32)

    def at_head(self, head: bytes) -> int:
        """Return the number of the record after which the ledger had this head.

        Raises:
            LedgerCorrupt: It never had.
        """
        for record in reversed(self.records):
            if record.chain == head:
                return record.seq
        raise LedgerCorrupt(
            f"no record has the head {head.hex()}",
            f"this is another ledger, or a copy older than that head; its own is {self.head.hex()}",
            "Ask for the newest ledger of the node whose signed delta has that head.",
        )


# --- reading a ledger --------------------------------------------------------------------------


def read_ledger(path: Path) -> Extract:
    """Read and verify a ledger; the file is neither written nor locked.

    It is opened as a copy in a private folder, for SQLite cannot read a write-ahead log without
    writing beside it.

    Raises:
        ConfigError: There is none, or others could read or change it.
        StateInUse: A trainer has it open.
        LedgerCorrupt: It does not verify.
        PrivacyError: It cannot be read.
    """
    if not path.exists():
        raise ConfigError(
            f"no ledger at {path}",
            "no trainer has spent from it yet, or it lies elsewhere: privacy.ledger says where",
            "name it: p2pfed privacy ledger FILE",
        )
    try:
        with tempfile.TemporaryDirectory(prefix="p2pfed-") as folder:
            copy = Path(folder).resolve() / path.name
            _copy(path, copy)
            with _told_of(path, copy):
                return _extract(copy)
    except OSError as error:
        raise PrivacyError(
            f"ledger {path} cannot be read",
            error.strerror or str(error),
            "read it as the user that runs the trainer",
        ) from error


@contextmanager
def _told_of(path: Path, copy: Path) -> Iterator[None]:
    """Let errors about the copy name the ledger."""
    try:
        yield
    except P2PFedError as error:
        lines = (line.replace(str(copy), str(path)) for line in error.args)
        raise type(error)(*lines) from error


def _copy(path: Path, copy: Path) -> None:
    files = {path: copy, _log(path): _log(copy)}
    before = _state(path)
    for source, target in files.items():
        if source.exists():
            target.touch(0o600)
            shutil.copyfile(source, target)
            target.chmod(0o600 | source.stat().st_mode & 0o077)  # the journal refuses open modes
    if _state(path) != before:
        raise StateInUse(
            f"ledger {path} changed while it was read", "a trainer has just used it", "try again"
        )


def _log(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def _state(path: Path) -> list[tuple[int, int, int]]:
    """What changes when a file is written.

    Raises:
        StateInUse: A process holds SQLite's locks on it.
    """
    with path.open("rb") as file:
        asked = struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, *_SQLITE_LOCKS, 0)
        kind, *_, holder = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    if kind != fcntl.F_UNLCK:
        raise StateInUse(
            f"ledger {path} is open in a trainer (process {holder})",
            "it may change while it is read",
            "without FILE the trainer is asked; for --export end it before: p2pfed task pause",
        )
    found = [one.stat() for one in (path, _log(path)) if one.exists()]
    return [(status.st_ino, status.st_size, status.st_mtime_ns) for status in found]


def _extract(copy: Path) -> Extract:
    journal = Journal.open(copy)
    try:
        patients: dict[str, frozenset[str]] = {}
        return Extract(tuple(_record(entry, patients, copy) for entry in journal.entries))
    finally:
        journal.close()


def _record(entry: JournalEntry, patients: dict[str, frozenset[str]], path: Path) -> Record:
    """Hide what must not leave; `patients` has those of the data sets so far."""
    try:
        fields = json.loads(entry.body)
        kind = fields["kind"]
        if kind == "register":
            mine = fingerprints(fields["patients"])
            fields["shares_with"] = [name for name, them in patients.items() if mine & them]
            patients[fields["dataset"]] = mine
    except (ValueError, TypeError, KeyError) as error:
        raise _not_understood(f"ledger {path}", entry.seq) from error
    hidden = _HIDDEN.get(kind)
    shown = {name: value for name, value in fields.items() if name != hidden}
    body = entry.body if hidden is None else None
    return Record(entry.seq, shown, entry.chain, body, _body_digest(entry.body), entry.digest)


def as_told(entries: Any) -> Extract:
    """Read the entries that a running trainer shows on its private socket.

    The trainer verified them when it opened the ledger. Whether data sets share patients it does
    not say; they are taken to, so that totals are never too low.

    Raises:
        P2PFedError: They make no sense.
    """
    records: list[Record] = []
    datasets: list[str] = []
    try:
        for entry in entries:
            fields = {name: value for name, value in entry.items() if name not in {"seq", "chain"}}
            if fields["kind"] == "register":
                fields["shares_with"] = list(datasets)
                datasets.append(fields["dataset"])
            records.append(Record(entry["seq"], fields, bytes.fromhex(entry["chain"])))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise P2PFedError(
            "the trainer's answer makes no sense", repr(error), "it may be of another version"
        ) from error
    return Extract(tuple(records))


# --- the export --------------------------------------------------------------------------------


def encode_export(extract: Extract) -> bytes:
    """Return the export of a ledger that `read_ledger` read; see the module docstring."""
    records = extract.records
    lines = [{"format": FORMAT, "head": extract.head.hex(), "records": len(records)}]
    lines += [_line(record) for record in records]
    data = b"".join(_encode(line) for line in lines)
    return data + _encode({"end": len(records), "seal": _hash(data, b"p2pfed-export").hex()})


def _line(record: Record) -> dict[str, Any]:
    line = {"seq": record.seq, "chain": record.chain.hex()}
    if record.body is None:
        return {**line, "body_digest": record.body_digest.hex(), "hidden": dict(record.fields)}
    return {**line, "digest": record.digest.hex(), "body": record.body.decode()}


def _encode(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def decode_export(data: bytes, *, name: str) -> Extract:
    """Read and verify an export; see the module docstring for what that is worth.

    Args:
        data: The whole file.
        name: For errors.

    Raises:
        LedgerCorrupt: It is no export, cut off, lacks a record, or was changed.
    """
    *lines, rest = data.split(b"\n")
    first = _decode(lines[0] if lines else rest)
    if first is None or first.get("format") != FORMAT:
        raise _bad(name, f"its first line does not say {FORMAT}: it is no export, or was changed")
    end = _decode(lines[-1])
    if rest or end is None or "end" not in end:
        raise _bad(
            name, f"it is cut off after line {len(lines)}: the line with the seal is missing"
        )
    records: list[Record] = []
    for line in lines[1:-1]:
        head = records[-1].chain if records else bytes(32)
        records.append(_verified(_decode(line), len(records) + 1, head, name))
    extract = Extract(tuple(records))
    if first.get("records") != len(records) or end["end"] != len(records):
        raise _bad(name, f"record {len(records) + 1} is missing: it ends after {len(records)}")
    if first.get("head") != extract.head.hex():
        raise _bad(name, f"its first line has another head than record {len(records)}")
    sealed = data[: -len(lines[-1]) - 1]
    if end.get("seal") != _hash(sealed, b"p2pfed-export").hex():
        raise _bad(name, "the seal does not match: what is said of a hidden record was changed")
    return extract


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _verified(line: dict[str, Any] | None, seq: int, head: bytes, name: str) -> Record:
    changed = _bad(name, f"line {seq + 1} is no record: it was changed")
    found = line.get("seq") if line else None
    if line is None or not isinstance(found, int):
        raise changed
    if found != seq:
        raise _bad(name, f"record {seq} is missing: line {seq + 1} has record {found}")
    try:
        record = _read_line(line)
        known = isinstance(record.fields["at"], int)
        known &= record.body is not None or record.fields["kind"] in _HIDDEN
        known &= len(record.body_digest) == _DIGEST_BYTES  # of fixed lengths, or two could swap
        known &= len(record.digest) in {0, _DIGEST_BYTES}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise changed from error
    if not known:
        raise changed
    if record.chain != _chain(head, record):
        raise _bad(name, f"record {seq} (line {seq + 1}) was changed")
    return record


def _read_line(line: dict[str, Any]) -> Record:
    seq, chain = line["seq"], bytes.fromhex(line["chain"])
    if "hidden" in line:
        return Record(seq, dict(line["hidden"]), chain, None, bytes.fromhex(line["body_digest"]))
    body, digest = line["body"].encode(), bytes.fromhex(line["digest"])
    return Record(seq, dict(json.loads(body)), chain, body, _body_digest(body), digest)


def _chain(head: bytes, record: Record) -> bytes:
    """As `journal` has it, written down once more: a verifier that shares no code."""
    number = struct.pack("<Q", record.seq)
    return _hash(head + number + record.body_digest + record.digest, b"p2pfed-ledger")


def _body_digest(body: bytes) -> bytes:
    return _hash(body, b"p2pfed-body")


def _hash(data: bytes, person: bytes) -> bytes:
    return blake2b(data, digest_size=32, person=person).digest()


def _bad(name: str, why: str) -> LedgerCorrupt:
    return LedgerCorrupt(f"export {name} does not verify", why, "ask the hospital for a new export")


def _not_understood(name: str, seq: int) -> LedgerCorrupt:
    return LedgerCorrupt(
        f"{name}: record {seq} is not understood",
        "a newer version may have written it",
        "use the newest version of p2pfed that ever opened this ledger",
    )
