"""invite approve: from the hospitals' requests to an approval file with the next roster in it.

Invariants. An invite is noted as used, durably, before a roster that admits its holder exists; the
same request can be approved again if the file was lost. Nothing is written before every check has
passed and a person has said yes.

Not here: the other commands (`invite`), the checks on their own (`invite_rules`).
"""

from __future__ import annotations

import datetime as dt
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from p2pfed.cli.approval import Approval
from p2pfed.cli.bootstrap import add_peer
from p2pfed.cli.enrol import line_of
from p2pfed.cli.files import read_text, write_new
from p2pfed.cli.invite_record import Entry, RecordWriter, open_record
from p2pfed.cli.invite_rules import (
    check_base,
    check_distinct,
    check_entry,
    check_newest,
    check_place,
    check_signed,
)
from p2pfed.cli.options import confirmed
from p2pfed.cli.roster_file import RosterFile, missing_signatures, summary
from p2pfed.cli.text import emit, printable
from p2pfed.errors import ConfigError, PolicyError
from p2pfed.identity.bootstrap import BootstrapList
from p2pfed.identity.invite import Invite, Request
from p2pfed.identity.keys import StewardKey
from p2pfed.identity.roster import ROLES, Member, Roster
from p2pfed.identity.run import check_signed_run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Sequence

__all__ = ["approve", "approve_options"]


def approve_options(parser: ArgumentParser) -> None:
    """Give `invite approve` its flags."""
    parser.add_argument("requests", nargs="+", metavar="REQUEST", help="p2pfedreq1-… or its file")
    parser.add_argument("--roster", required=True, metavar="FILE", help="the newest roster")
    parser.add_argument("--out", required=True, metavar="FILE", help="the approval, to be sent")
    parser.add_argument(
        "--bootstrap",
        metavar="FILE",
        help="bootstrap list to send along; the new address is added to it",
    )
    parser.add_argument("--run", dest="run_file", metavar="FILE", help="run file to send along")
    parser.add_argument("--roles", help=f"instead of those asked for; out of {','.join(ROLES)}")
    parser.add_argument(
        "--instead",
        action="store_true",
        help="you signed another roster of this version, which nobody has or will ever get",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")


@dataclass(frozen=True, slots=True)
class _Admission:
    """One request that has passed every check, with its invite and entry."""

    request: Request
    invite: Invite
    entry: Entry
    member: Member


def approve(args: Namespace) -> None:
    """Check, show, ask, note, write; in this order."""
    key, now = StewardKey.load(Path(args.key)), _now()
    file = RosterFile.read(args.roster)
    check_base(file, key, now)
    if Path(args.out).exists():
        raise ConfigError(f"{args.out} exists already", "nothing is overwritten", "choose another")
    requests = [Request.parse(line_of(text)) for text in args.requests]
    check_distinct(requests)
    with open_record(Path(args.key), now) as writer:
        roles = None if args.roles is None else _roles(args.roles)
        admitted = []
        for request in requests:
            entry = writer.record.entry(request.number)
            member = Member(request.name, request.peer_id, roles or request.roles, request.samples)
            made = _answered(key, entry, file.roster)
            request.check(made)
            check_entry(entry, request, made, now)
            check_place(request, file.roster)
            admitted.append(_Admission(request, made, entry, member))
        signed, approval = _next(args, key, file, admitted)
        check_newest(file.roster, writer.record, signed.roster, instead=args.instead)
        check_signed(signed.roster, writer.record, instead=args.instead)
        for line in _asked(admitted):  # with --json standard output is for the answer alone
            print(printable(line), file=sys.stderr if args.json else sys.stdout)
        names = ", ".join(a.member.name for a in admitted)
        if not confirmed(args, f"Did {names} read you the same numbers, and do you admit them?"):
            raise PolicyError("nobody was admitted", "you said no", "nothing was changed")
        roster = signed.roster
        _use(writer, admitted, roster, now)
        lines = _list_addresses(args, roster, admitted)
        if args.bootstrap and Path(args.bootstrap).exists():
            # With the newcomers: two admitted at once must find each other.
            approval = replace(approval, bootstrap=read_text(args.bootstrap))
        write_new(args.out, replace(approval, roster=signed.document.encode().decode()).encode())
        writer.write(writer.record.with_newest(roster.network_id, roster.version, roster.hash))
    lines += missing_signatures(roster, signed.document, file.roster, args.out)
    if signed.is_signed:
        lines.append(f"next: send it to {names}, to run: p2pfed join {Path(args.out).name}")
    names_admitted = [a.member.name for a in admitted]
    data = {**summary(roster, signed.document), "admitted": names_admitted, "file": args.out}
    emit(args, "roster", data, [f"approved: {args.out}, roster v{roster.version}", *lines])


def _answered(key: StewardKey, entry: Entry, roster: Roster) -> Invite:
    """The invite of an entry, made anew from the key; raises PolicyError for another network."""
    if entry.network_id != roster.network_id:
        raise PolicyError(
            f"the invite for {entry.name} is into another network, {entry.network}",
            f"the roster is of {roster.network}",
            "give the roster of the network that the invite is for",
        )
    return Invite.make(
        key,
        network_id=entry.network_id,
        network=entry.network,
        name=entry.name,
        number=entry.number,
        expires=entry.expires,
    )


def _roles(text: str) -> tuple[str, ...]:
    roles = tuple(role.strip() for role in text.split(",") if role.strip())
    unknown = [role for role in roles if role not in ROLES]
    if unknown:
        raise ConfigError(
            f"{unknown[0]!r} is no role",
            f"known: {', '.join(ROLES)}",
            "give --roles with some of them, or leave it out",
        )
    return roles


def _asked(admitted: Sequence[_Admission]) -> list[str]:
    """What a person must see before saying yes."""
    lines = []
    for admission in admitted:
        member, request = admission.member, admission.request
        lines += [
            f"{member.name} asks to be let in:",
            f"  peer id   {member.peer_id}",
            f"  patients  {member.samples}   (its weight; public)",
            f"  roles     {', '.join(member.roles)}",
            *(f"  address   {address}" for address in request.addresses),
            f"  phone     {admission.invite.fingerprint}   (you read this to them)",
            f"            {request.fingerprint}   (they read this to you)",
        ]
    return lines


def _next(
    args: Namespace, key: StewardKey, file: RosterFile, admitted: Sequence[_Admission]
) -> tuple[RosterFile, Approval]:
    """The next roster, signed by this steward, and the rest of the approval."""
    draft = file.roster.next(members=(*file.roster.members, *(a.member for a in admitted)))
    made = RosterFile.of(draft.encode()).signed_with(key.seed)
    run = None
    if args.bootstrap and Path(args.bootstrap).exists():
        known = BootstrapList.parse(read_text(args.bootstrap), args.bootstrap)
        if known.network_id not in {"", made.roster.network_id.hex()}:
            raise PolicyError(
                f"{args.bootstrap} is of another network",
                f"the roster's is {made.roster.network_id.hex()[:16]}…, the list says"
                f" {known.network_id[:16]}…",
                "give the list that belongs to the roster",
            )
    if args.run_file:
        run = read_text(args.run_file)
        check_signed_run(run.encode(), file.roster)
    return made, Approval("", None, run)


def _use(
    writer: RecordWriter, admitted: Sequence[_Admission], roster: Roster, now: dt.datetime
) -> None:
    """Note durably that the invites are used, and that this roster is signed."""
    record = writer.record.with_signed(roster.network_id, roster.version, roster.hash)
    for admission in admitted:
        if admission.entry.used is None:
            used = replace(admission.entry, used=now, peer_id=admission.member.peer_id)
            record = record.with_entry(used)
    writer.write(record)


def _list_addresses(args: Namespace, roster: Roster, admitted: Sequence[_Admission]) -> list[str]:
    """Add where the new members can be dialled to the stewards' bootstrap list."""
    lines = []
    for admission in admitted:
        name = admission.member.name
        addresses = [f"{a}/p2p/{admission.member.peer_id}" for a in admission.request.addresses]
        if not addresses:
            continue
        if not args.bootstrap:
            lines.append(f"# {name} can be dialled; with --bootstrap FILE it is put on the list")
            continue
        network_id = roster.network_id.hex()
        try:
            add_peer(args.bootstrap, name, addresses, network=roster.network, network_id=network_id)
            lines.append(f"added {name} to {args.bootstrap}")
        except ConfigError as error:
            lines.append(f"# {name} was not added to {args.bootstrap}: {error.what}")
    if args.bootstrap and not Path(args.bootstrap).exists():
        lines += [
            f"# there is no bootstrap list {args.bootstrap} and no address to begin one with: none"
            " goes along, and a member that can be dialled must come before they find anybody",
            f"# to begin one: p2pfed bootstrap add {args.bootstrap} --name NAME"
            " --addr /dns4/HOST/tcp/4201/p2p/PEERID",
        ]
    return lines


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC).replace(microsecond=0)
