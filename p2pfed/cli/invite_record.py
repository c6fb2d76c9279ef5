"""A steward's record of invites and signatures: a file beside the key, `KEYFILE.invites`, 0600.

It says of each invite whom it is for, until when, and whether it is open, used or revoked; nothing
in it is secret, for an invite's secret is made from the key whenever it is needed
(`identity.invite`). It also holds the newest roster approved, so that an older file taken by
mistake is noticed; and which roster of each version was signed, so that no second one is.

Invariants. A change is durable before the command goes on, and whole: the file is replaced at once.
Two commands cannot change it at the same time: whoever changes it holds a lock on the key file.
An invite's number is never used twice. Times are those of this machine's clock.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from p2pfed.cli.files import replace_file
from p2pfed.errors import ConfigError, FactRejected, NotFound, PolicyError
from p2pfed.identity.fields import Fields, encode_payload, read_payload
from p2pfed.identity.invite import moment_text
from p2pfed.identity.keys import write_private
from p2pfed.small_files import open_regular, read_small

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Entry", "InviteRecord", "RecordWriter", "open_record", "read_record"]

KIND = "p2pfed.invites/1"
MOST = 4096
_MOST_BYTES = 1 << 23  # so many invites and signatures


@dataclass(frozen=True, slots=True)
class Entry:
    """One invite of the record.

    Attributes:
        number: Its name, 8 bytes.
        name: Whom it is for.
        network: The network's name.
        network_id: The network's id, 32 bytes.
        made: When.
        expires: When it ends.
        revoked: When it was revoked, or None.
        used: When it was approved, or None.
        peer_id: Whom it was approved for, or "".
    """

    number: bytes
    name: str
    network: str
    network_id: bytes
    made: dt.datetime
    expires: dt.datetime
    revoked: dt.datetime | None = None
    used: dt.datetime | None = None
    peer_id: str = ""

    def state(self, now: dt.datetime) -> str:
        """One of open, used, revoked, expired."""
        if self.used is not None:
            return "used"
        if self.revoked is not None:
            return "revoked"
        return "expired" if now >= self.expires else "open"


@dataclass(frozen=True, slots=True)
class InviteRecord:
    """All invites of one steward's key.

    Attributes:
        entries: In the order in which they were made.
        newest: The newest roster approved, (version, hash in hex), by network id in hex.
        signed: The roster signed, hash in hex, by (network id in hex, version); of the newest only.
    """

    entries: tuple[Entry, ...] = ()
    newest: dict[str, tuple[int, str]] = field(default_factory=dict)
    signed: dict[tuple[str, int], str] = field(default_factory=dict)

    def entry(self, number: bytes) -> Entry:
        """The invite with this number; raises NotFound."""
        for entry in self.entries:
            if entry.number == number:
                return entry
        raise NotFound(
            f"no invite {number.hex()} was made with this key",
            "each steward approves the answers to the invites that he or she made",
            "give the key that made it with --key, or pass the request on to the right steward",
        )

    def with_entry(self, entry: Entry) -> InviteRecord:
        """This record with one invite added or replaced."""
        numbers = [known.number for known in self.entries]
        if entry.number in numbers:
            kept = [entry if e.number == entry.number else e for e in self.entries]
            return replace(self, entries=tuple(kept))
        if len(numbers) >= MOST:
            raise PolicyError(
                f"this key has made {MOST} invites",
                "their record is kept whole, so that none is used twice, and takes no more",
                "use a new steward key: p2pfed steward rotate -h",
            )
        return replace(self, entries=(*self.entries, entry))

    def with_newest(self, network_id: bytes, version: int, roster_hash: bytes) -> InviteRecord:
        """This record with a newer roster remembered."""
        known = {**self.newest, network_id.hex(): (version, roster_hash.hex())}
        return replace(self, newest=known)

    def with_signed(self, network_id: bytes, version: int, roster_hash: bytes) -> InviteRecord:
        """This record with the roster of a version remembered as the one that was signed.

        It takes the place of another one of that version that was approved.
        """
        network, told = network_id.hex(), roster_hash.hex()
        signed = {**self.signed, (network, version): told}
        approved = (
            {network: (version, told)} if self.newest.get(network, (0,))[0] == version else {}
        )
        return replace(
            self, newest={**self.newest, **approved}, signed=dict(list(signed.items())[-MOST:])
        )

    def found(self, wanted: str, now: dt.datetime) -> Entry:
        """The invite that a person means: an open one by name, or any by its number.

        Raises:
            NotFound: There is none.
        """
        for entry in self.entries:
            if entry.number.hex() == wanted or (
                entry.name == wanted and entry.state(now) == "open"
            ):
                return entry
        raise NotFound(
            f"there is no open invite for {wanted}",
            "with this key none was made for it, or it has ended or was revoked",
            "see: p2pfed invite list --key KEYFILE",
        )

    def encode(self) -> bytes:
        """The file."""
        invites = [
            {
                "number": e.number.hex(),
                "name": e.name,
                "network": e.network,
                "network_id": e.network_id.hex(),
                "made": e.made.isoformat(),
                "expires": e.expires.isoformat(),
                "revoked": _written(e.revoked),
                "used": _written(e.used),
                "peer_id": e.peer_id or "-",
            }
            for e in self.entries
        ]
        newest = [
            {"network_id": network, "version": version, "hash": roster_hash}
            for network, (version, roster_hash) in self.newest.items()
        ]
        signed = [
            {"network_id": network, "version": version, "hash": roster_hash}
            for (network, version), roster_hash in self.signed.items()
        ]
        told = {"type": KIND, "invites": invites, "newest": newest, "signed": signed}
        return encode_payload(told) + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> InviteRecord:
        """Read the file; raises FactRejected."""
        fields = read_payload(data, KIND)
        entries = fields.many("invites", _read_entry, most=MOST)
        newest = fields.many("newest", _read_roster, most=MOST)
        # A record from before stewards' own signatures were kept has none.
        signed = fields.many("signed", _read_roster, most=MOST) if fields.has("signed") else ()
        fields.done()
        return cls(
            entries,
            {network: (version, known) for network, version, known in newest},
            {(network, version): known for network, version, known in signed},
        )


def _written(moment: dt.datetime | None) -> str:
    return "-" if moment is None else moment.isoformat()


def _read_moment(fields: Fields, key: str) -> dt.datetime | None:
    text = fields.text(key)
    if text == "-":
        return None
    try:
        return dt.datetime.fromisoformat(text).astimezone(dt.UTC)
    except (ValueError, OverflowError) as error:
        raise FactRejected(f"{key} is {text!r:.40}", "expected a time") from error


def _read_entry(fields: Fields) -> Entry:
    made, expires = _read_moment(fields, "made"), _read_moment(fields, "expires")
    number, peer_id = fields.text("number"), fields.text("peer_id")
    if made is None or expires is None or len(number) != 16:
        raise FactRejected("an invite has no number or no time", "each has both when it is made")
    try:
        raw = bytes.fromhex(number)
    except ValueError as error:
        raise FactRejected(
            f"{number!r} is no number of an invite", "those have 16 hexadecimal digits"
        ) from error
    entry = Entry(
        raw,
        fields.text("name", longest=64),
        fields.text("network", longest=64),
        fields.hex32("network_id"),
        made,
        expires,
        _read_moment(fields, "revoked"),
        _read_moment(fields, "used"),
        "" if peer_id == "-" else peer_id,
    )
    fields.done()
    return entry


def _read_roster(fields: Fields) -> tuple[str, int, str]:
    network_id, version = fields.hex32("network_id"), fields.integer("version", low=1, high=1 << 31)
    read = (network_id.hex(), version, fields.hex32("hash").hex())
    fields.done()
    return read


# --- the file ------------------------------------------------------------------------------------


def _beside(key_file: Path) -> Path:
    key_file = key_file.resolve()  # one key has one record, by whatever name it is called
    return key_file.with_name(f"{key_file.name}.invites")


def read_record(key_file: Path) -> InviteRecord:
    """The record beside a key; empty if there is none yet.

    Raises:
        ConfigError: It cannot be read, or does not say what a record says.
    """
    path = _beside(key_file)
    try:
        return InviteRecord.decode(read_small(path, _MOST_BYTES)[0])
    except FileNotFoundError:
        return InviteRecord()
    except OSError as error:
        raise ConfigError(f"cannot read {path}", error.strerror or str(error)) from error
    except FactRejected as error:
        raise ConfigError(
            f"{path} is no record of invites",
            f"{error.what}; without it nobody knows which invites are used, nor what was signed",
            "take it back from a backup; if it is lost move it away and make all invites anew",
        ) from error


class RecordWriter:
    """Keeps the record and writes it durably."""

    def __init__(self, key_file: Path, now: dt.datetime | None) -> None:
        self._path = _beside(key_file)
        self.record = read_record(key_file)
        entries = self.record.entries if now is not None else ()
        later = [e for e in entries if now is not None and now < e.made and e.state(now) == "open"]
        if now is not None and later:
            last = max(later, key=lambda entry: entry.made)
            made = f"the invite for {last.name}, number {last.number.hex()}, was made with this key"
            raise PolicyError(
                f"this machine's clock shows {moment_text(now)}",
                f"{made} at {moment_text(last.made)}, which is later",
                "set the clock; if it is right, it was ahead then: take that invite back with"
                f" p2pfed invite revoke {last.number.hex()} --key KEYFILE, and make it anew",
            )

    def write(self, record: InviteRecord) -> None:
        """Replace the file; durable when this returns."""
        if not self._path.exists():
            write_private(self._path, InviteRecord().encode())
        replace_file(self._path, record.encode())
        self.record = record


@contextlib.contextmanager
def open_record(key_file: Path, now: dt.datetime | None = None) -> Iterator[RecordWriter]:
    """The record beside a key, to be changed by nobody else meanwhile.

    Args:
        key_file: The steward's key.
        now: What this machine's clock shows; None where nothing hangs on it.

    Raises:
        ConfigError: The key or the record cannot be read.
        PolicyError: The clock is behind the record, or another command is changing it.
    """
    try:
        held, _ = open_regular(key_file)
    except OSError as error:
        raise ConfigError(
            f"cannot read the key {key_file}",
            error.strerror or "",
            "name your key with --key; one is made with: p2pfed steward key new FILE",
        ) from error
    with os.fdopen(held, "rb"):
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PolicyError(
                f"another command is using {key_file}",
                "an invite must not be used twice at one time",
                "wait until it has ended, and try again",
            ) from error
        yield RecordWriter(key_file, now)
