"""What a steward's invites are refused for; pure but for the clock, which the caller reads.

Every refusal is three lines for a person who made a mistake: the wrong key, an old roster file, a
name that is taken, an invite that was used, revoked or has ended, or a clock that is wrong.

Not here: whether a request answers its invite (`identity.invite`).
"""

from __future__ import annotations

import itertools

from p2pfed.cli.roster_file import RosterFile
from p2pfed.errors import FactRejected, PolicyError
from p2pfed.identity.invite import Invite, Request, moment_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Sequence

    from p2pfed.cli.invite_record import Entry, InviteRecord
    from p2pfed.identity.keys import StewardKey
    from p2pfed.identity.roster import Roster

__all__ = [
    "check_base",
    "check_distinct",
    "check_entry",
    "check_name",
    "check_newest",
    "check_place",
    "check_signed",
]


def check_base(file: RosterFile, key: StewardKey, now: dt.datetime) -> None:
    """Raise PolicyError unless this steward can build on this roster today."""
    roster = file.roster
    if key.public_key not in {s.key for s in roster.stewards}:
        raise PolicyError(
            f"this key is of no steward of {roster.network}, roster v{roster.version}",
            f"its stewards are {', '.join(s.name for s in roster.stewards)}",
            "give your own key with --key, or the newest roster",
        )
    if not file.is_signed:
        raise PolicyError(
            f"roster v{roster.version} is not signed by {roster.threshold} of its stewards",
            "nothing can be built on what they may still change",
            "have it signed first: p2pfed steward sign FILE --key KEYFILE",
        )
    if roster.is_expired(now):
        raise PolicyError(
            f"roster v{roster.version} expired at {moment_text(roster.expires)}",
            f"this machine's clock shows {moment_text(now)}",
            "run: p2pfed steward extend ROSTER --expires 365d --out NEXT   (or set the clock)",
        )


def check_newest(
    roster: Roster, record: InviteRecord, made: Roster | None = None, *, instead: bool = False
) -> None:
    """Raise PolicyError for an older roster than this steward has approved.

    Args:
        roster: What is built on.
        record: What was approved.
        made: What is built; the very roster that was approved may be made again.
        instead: What is built takes the place of the newest approved one, which is never used.
    """
    version, known = record.newest.get(roster.network_id.hex(), (0, ""))
    if made is not None and (made.version, made.hash.hex()) == (version, known):
        return
    if made is not None and instead and made.version == version:
        return
    if roster.version < version:
        raise PolicyError(
            f"this is roster v{roster.version}; you have approved v{version} already",
            "a version that follows it would leave out whom you admitted since",
            f"give the file with v{version}, or a later one; if it was lost, approve the same"
            " requests with the same flags: that makes it once more",
        )
    if roster.version == version and roster.hash.hex() != known:
        raise PolicyError(
            f"this is another roster v{version} than the one you approved",
            "two rosters of one version would split the network",
            "agree with the other stewards on one; if it is not yours, give the"
            f" v{version + 1} that they sign on top of theirs, or a later one",
        )


def check_signed(roster: Roster, record: InviteRecord, *, instead: bool) -> None:
    """Raise PolicyError if this steward signed another roster of this version.

    Args:
        roster: What is to be signed.
        record: What was signed.
        instead: The steward knows, and says that the other one is never used.
    """
    known = record.signed.get((roster.network_id.hex(), roster.version), roster.hash.hex())
    if known == roster.hash.hex() or instead:
        return
    raise PolicyError(
        f"you signed another roster v{roster.version} of {roster.network}: {known[:16]}…",
        f"this one is {roster.hash.hex()[:16]}…; two that enough stewards signed split the network",
        "agree with the other stewards on one; if it is this one, and nobody has the other or will"
        " ever sign it: add --instead",
    )


def check_distinct(requests: Sequence[Request]) -> None:
    """Raise PolicyError if two of the requests cannot be approved together."""
    for first, second in itertools.combinations(requests, 2):
        keys = f"they are of {first.peer_id} and {second.peer_id}"
        if first == second:
            raise PolicyError(
                f"the request of {first.name} was given twice",
                "each request brings one node into the roster",
                "give it once",
            )
        if first.number == second.number:
            raise PolicyError(
                f"two requests answer the one invite for {first.name}",
                keys if first.peer_id != second.peer_id else "both are of the same key",
                f"call {first.name}, and approve the one whose number they read to you",
            )
        if first.name == second.name:
            raise PolicyError(
                f"two requests are of {first.name}",
                keys,
                f"call {first.name}; a second node of theirs needs an invite for another name",
            )
        if first.peer_id == second.peer_id:
            raise PolicyError(
                f"the requests of {first.name} and {second.name} are of the same key",
                f"it is {first.peer_id}; a key stands once in the roster",
                "have one of the two make a new key: p2pfed init, in a new folder",
            )


def check_name(roster: Roster, name: str, record: InviteRecord, now: dt.datetime) -> None:
    """Raise PolicyError if the name is a member's or has an open invite."""
    if any(member.name == name for member in roster.members):
        raise PolicyError(
            f"{name} is a member already, see roster v{roster.version}",
            "a name stands once in the roster",
            "for a second node of the same hospital choose another name",
        )
    for entry in record.entries:
        same = (entry.name, entry.network_id) == (name, roster.network_id)
        if same and entry.state(now) == "open":
            raise PolicyError(
                f"{name} has an open invite, until {moment_text(entry.expires)}",
                "two at a time could admit two nodes under one name",
                f'take it back first: p2pfed invite revoke "{name}" --key KEYFILE',
            )


def check_entry(entry: Entry, request: Request, made: Invite, now: dt.datetime) -> None:
    """Raise PolicyError if the invite was used by another, revoked, or has ended."""
    if entry.used is not None:
        if entry.peer_id == request.peer_id:
            return  # the same answer once more: the approval was lost on its way
        raise PolicyError(
            f"the invite for {entry.name} was used before, at {moment_text(entry.used)}",
            f"by {entry.peer_id}; this request is of {request.peer_id}",
            "call the hospital: one of the two may not be theirs. Then make a new invite",
        )
    if entry.revoked is not None:
        raise PolicyError(
            f"the invite for {entry.name} was revoked at {moment_text(entry.revoked)}",
            "whoever answers it may not be the hospital",
            "call the hospital; then make a new invite",
        )
    made.check_date(now)


def check_place(request: Request, roster: Roster) -> None:
    """Raise FactRejected or PolicyError if the name or the key is taken or revoked."""
    for member in roster.members:
        if request.name == member.name or request.peer_id == member.peer_id:
            same = request.name == member.name and request.peer_id == member.peer_id
            raise FactRejected(
                f"{request.name} is a member already, see roster v{roster.version}"
                if same
                else f"{member.name} in roster v{roster.version} has the same name or key",
                "a name and a key stand once in the roster",
                "send the hospital this roster" if same else "make an invite for another name",
            )
    for revocation in roster.revoked:
        if revocation.peer_id == request.peer_id:
            raise PolicyError(
                f"{request.name}'s key was revoked: {revocation.reason}",
                "a request cannot undo what the stewards decided",
                "have the hospital make a new key in a new folder; or use: p2pfed steward add",
            )
