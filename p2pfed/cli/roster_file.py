"""Roster files: reading, checking, comparing, and telling what they say; for steward and roster.

Invariant: what is written back is what was read, with signatures added; a roster that lies in an
approval stays in it. Nothing in here asks a daemon or prints.

Not here: the commands (`steward`, `roster`, `invite`), what a roster means (`identity.roster`).
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, replace

from p2pfed.cli.approval import Approval
from p2pfed.cli.files import read_bytes, reading
from p2pfed.cli.text import short_id, span, table
from p2pfed.errors import FactRejected, PolicyError
from p2pfed.identity.book import RosterBook
from p2pfed.identity.roster import Roster
from p2pfed.identity.signing import ROSTER, SignedDocument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

__all__ = [
    "RosterFile",
    "differences",
    "missing_signatures",
    "shown",
    "signed_by",
    "summary",
    "verified",
]


@dataclass(frozen=True)
class RosterFile:
    """A roster, its exact bytes with signatures, and the approval that it lies in, if any."""

    roster: Roster
    document: SignedDocument
    approval: Approval | None = None

    @classmethod
    def read(cls, path: str) -> RosterFile:
        """Read a roster file or an approval; raises ConfigError or FactRejected."""
        data = read_bytes(path)
        with reading(path, "a roster or an approval"):
            return cls.of(data)

    @classmethod
    def of(cls, data: bytes) -> RosterFile:
        """Read the bytes of a roster file or an approval; raises ConfigError or FactRejected."""
        approval = Approval.parse(data.decode("utf-8", "replace"))
        document = SignedDocument.parse(approval.roster.encode() if approval else data)
        return cls(Roster.decode(document.payload), document, approval)

    @property
    def is_signed(self) -> bool:
        """Whether enough of its own stewards signed it."""
        return self.roster.enough_signatures(self.document)

    def next(self, **parts: Any) -> Roster:
        """The draft with `parts` replaced: this one amended, or the version after it."""
        if self.document.signatures:
            return self.roster.next(**parts)
        return replace(self.roster, hash=b"", **parts)

    def signed_with(self, seed: bytes) -> RosterFile:
        """This file with one more signature."""
        return replace(self, document=self.document.signed_by(seed, ROSTER))

    def encode(self) -> bytes:
        """The bytes of the file."""
        signed = self.document.encode()
        if self.approval is None:
            return signed
        return replace(self.approval, roster=signed.decode()).encode()


def signed_by(roster: Roster, document: SignedDocument) -> list[str]:
    """Names of the roster's stewards whose signature verifies."""
    signers = document.signers(ROSTER, among={s.key for s in roster.stewards})
    return [s.name for s in roster.stewards if s.key in signers]


def missing_signatures(
    roster: Roster, document: SignedDocument, follows: Roster | None, file: str
) -> list[str]:
    """Whose signatures a roster still needs, judged by itself and by the version before it."""
    lines = []
    judges = [("its own stewards", roster)]
    if follows is not None and follows.stewards != roster.stewards:
        judges.append((f"the stewards of v{follows.version}", follows))
    for whose, judge in judges:
        have = signed_by(judge, document)
        lack = judge.threshold - len(have)
        if lack > 0:
            others = ", ".join(s.name for s in judge.stewards if s.name not in have)
            lines.append(
                f"{len(have)} of {judge.threshold} signatures of {whose}; {lack} more needed"
                f" out of: {others}"
            )
    if lines:
        return [*lines, f"next: p2pfed steward sign {file} --key KEYFILE"]
    return [f"signed by {roster.threshold} of its stewards; check: p2pfed roster verify {file}"]


def summary(roster: Roster, document: SignedDocument) -> dict[str, Any]:
    """What a roster says, as JSON."""
    return {
        "network": roster.network,
        "network_id": roster.network_id.hex(),
        "version": roster.version,
        "hash": roster.hash.hex(),
        "previous": roster.previous.hex(),
        "expires": roster.expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "expired": roster.is_expired(_now()),
        "threshold": roster.threshold,
        "stewards": [{"name": s.name, "key": s.key.hex()} for s in roster.stewards],
        "signed_by": signed_by(roster, document),
        "members": [
            {"name": m.name, "peer_id": m.peer_id, "roles": list(m.roles), "samples": m.samples}
            for m in roster.members
        ],
        "revoked": [
            {"peer_id": r.peer_id, "reason": r.reason, "from_round": r.from_round}
            for r in roster.revoked
        ],
    }


def shown(file: RosterFile) -> list[str]:
    """What a roster says, as lines."""
    roster, data = file.roster, summary(file.roster, file.document)
    signed = ", ".join(data["signed_by"]) or "nobody"
    lines = [
        f"{roster.network}  roster v{roster.version}  {'EXPIRED' if data['expired'] else 'expires'}"
        f" {data['expires']}",
        f"network id  {data['network_id']}",
        f"hash        {data['hash']}",
        f"signed by   {signed}   ({roster.threshold} of {len(roster.stewards)} needed)",
        "",
        *table(("STEWARD", "KEY"), [(s.name, s.key.hex()) for s in roster.stewards]),
        "",
        *table(
            ("MEMBER", "PEER ID", "ROLES", "SAMPLES"),
            [(m.name, m.peer_id, ",".join(m.roles), str(m.samples)) for m in roster.members],
        ),
    ]
    if roster.revoked:
        rows = [(r.peer_id, str(r.from_round), r.reason) for r in roster.revoked]
        lines += ["", *table(("REVOKED", "FROM ROUND", "REASON"), rows)]
    return lines


def verified(file: RosterFile, older: RosterFile | None) -> list[str]:
    """Check signatures, expiry, and that a roster follows an older one.

    Args:
        file: The roster in question.
        older: The one that is believed already, if there is one.

    Returns:
        What was found right, as lines.

    Raises:
        FactRejected: A node would not believe it.
        PolicyError: It has expired.
    """
    roster, book = file.roster, RosterBook()
    if older is not None:
        book.add(older.document.encode())
    if roster.hash not in book.hashes:
        before = book.current
        book.add(file.document.encode(), explain=True)
        if before is not None and roster.version <= before.version:
            raise FactRejected(f"roster v{roster.version} is not newer", "it is an ancestor")
    if roster.is_expired(_now()):
        raise PolicyError(
            f"roster v{roster.version} expired on {roster.expires:%Y-%m-%d}",
            "nodes under it receive but release nothing",
            "run: p2pfed steward extend ROSTER --expires 365d --out NEXT, and have it signed",
        )
    names = ", ".join(signed_by(roster, file.document))
    lines = [f"ok: roster v{roster.version} of {roster.network}, signed by {names}"]
    if older is None and roster.version > 1:
        lines.append("# checked against its own stewards only; add --against OLD")
    return lines


# --- comparing ---------------------------------------------------------------------------------


def differences(old: Roster, new: Roster) -> list[dict[str, Any]]:
    """What changes from one roster to another.

    Returns:
        One object per change: `what` (member, steward, revoked, expires, threshold), `change`
        (added, removed, changed) and `text` in words. Empty if they say the same.

    Raises:
        FactRejected: They are of two networks.
    """
    if old.network_id != new.network_id:
        raise FactRejected(
            f"the rosters are of two networks, {old.network} and {new.network}",
            f"their ids are {old.network_id.hex()[:16]}… and {new.network_id.hex()[:16]}…",
            "compare two versions of one network's roster",
        )
    return [*_members(old, new), *_revoked(old, new), *_stewards(old, new), *_terms(old, new)]


def _change(what: str, change: str, name: str, text: str) -> dict[str, Any]:
    return {"what": what, "change": change, "name": name, "text": text}


def _members(old: Roster, new: Roster) -> Iterator[dict[str, Any]]:
    for peer_id, member in new.by_id.items():
        before = old.by_id.get(peer_id)
        roles = ", ".join(member.roles) or "no role"
        if before is None:
            yield _change(
                "member",
                "added",
                member.name,
                f"{member.name} comes in ({short_id(peer_id)}; {roles}; {member.samples} patients)",
            )
        elif before != member:
            yield _change("member", "changed", member.name, _changed(before, member))
    for peer_id, member in old.by_id.items():
        if peer_id not in new.by_id:
            text = f"{member.name} goes out ({short_id(peer_id)})"
            yield _change("member", "removed", member.name, text)


def _changed(before: Any, member: Any) -> str:
    told = []
    if before.name != member.name:
        told.append(f"is called {member.name} now")
    if before.samples != member.samples:
        told.append(f"{before.samples} patients become {member.samples}")
    if before.roles != member.roles:
        gained = [f"+{role}" for role in member.roles if role not in before.roles]
        lost = [f"-{role}" for role in before.roles if role not in member.roles]
        told.append(f"roles {' '.join([*gained, *lost]) or 'in another order'}")
    return f"{before.name}: {'; '.join(told)}"


def _revoked(old: Roster, new: Roster) -> Iterator[dict[str, Any]]:
    names = {m.peer_id: m.name for m in (*new.members, *old.members)}
    before, after = ({r.peer_id: r for r in roster.revoked} for roster in (old, new))
    for peer_id, revocation in after.items():
        if before.get(peer_id) == revocation:
            continue
        name = names.get(peer_id, short_id(peer_id))
        until = (
            "all its updates leave the model"
            if revocation.from_round == 0
            else f"its updates from round {revocation.from_round} on do not count"
        )
        change = "changed" if peer_id in before else "added"
        yield _change("revoked", change, name, f"{name} is revoked: {until} ({revocation.reason})")
    for peer_id in before.keys() - after.keys():
        name = names.get(peer_id, short_id(peer_id))
        yield _change("revoked", "removed", name, f"{name} is not revoked any more")


def _stewards(old: Roster, new: Roster) -> Iterator[dict[str, Any]]:
    before, after = ({s.key: s.name for s in roster.stewards} for roster in (old, new))
    for key, name in after.items():
        if key not in before:
            text = f"{name} becomes a steward (key {key.hex()[:16]}…)"
            yield _change("steward", "added", name, text)
        elif before[key] != name:
            text = f"the steward {before[key]} is called {name} now"
            yield _change("steward", "changed", name, text)
    for key, name in before.items():
        if key not in after:
            text = f"{name} is no steward any more (key {key.hex()[:16]}…)"
            yield _change("steward", "removed", name, text)


def _terms(old: Roster, new: Roster) -> Iterator[dict[str, Any]]:
    if old.threshold != new.threshold:
        text = f"{new.threshold} stewards must sign instead of {old.threshold}"
        yield _change("threshold", "changed", "", text)
    if old.expires != new.expires:
        seconds = (new.expires - old.expires).total_seconds()
        way = "later" if seconds > 0 else "earlier"
        text = f"it expires on {new.expires:%Y-%m-%d}, {span(abs(seconds))} {way}"
        yield _change("expires", "changed", "", text)
    if old.network != new.network:
        text = f"the network {old.network} is called {new.network} now"
        yield _change("network", "changed", new.network, text)


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)
