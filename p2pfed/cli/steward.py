"""The stewards' desk: keys, rosters, signatures. Works on files; no daemon, no network.

A roster that nobody has signed yet is a draft: `add`, `revoke`, `rotate` and `extend` amend it. One
that carries a signature is never changed; they write the version that follows it. A new version
needs k signatures of the stewards of the version before (and k of its own, which matters when the
stewards change), so every command says whose signatures are still missing. A roster that lies in an
approval (`approval`) is read and signed in there.

Invariant: what a key signed is noted beside it (`invite_record`), durably and before the signature
exists; a second roster of the same version is not signed unless a person insists.

Not here: how hospitals are invited (`invite`), what rosters say and how two differ (`roster_file`).
"""

from __future__ import annotations

import datetime as dt
import re
from pathlib import Path

from p2pfed.cli.files import replace_file, write_new
from p2pfed.cli.invite_record import open_record
from p2pfed.cli.invite_rules import check_signed
from p2pfed.cli.options import describe, with_json
from p2pfed.cli.roster_file import RosterFile, missing_signatures, shown, summary, verified
from p2pfed.cli.text import emit
from p2pfed.errors import ConfigError, NotFound
from p2pfed.identity.keys import StewardKey, public_key_of
from p2pfed.identity.roster import ROLES, Member, Revocation, Roster, Steward
from p2pfed.identity.signing import SignedDocument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Callable

__all__ = ["steward"]


def steward(parser: ArgumentParser) -> None:
    """Fill in the command group `steward`."""
    describe(parser, "Keys, rosters and signatures of the stewards; works on files, offline.")
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def action(name: str, text: str, run: Callable[[Namespace], None]) -> ArgumentParser:
        made = actions.add_parser(name, help=text, description=text)
        with_json(made)
        made.set_defaults(run=run)
        return made

    def change(name: str, text: str, run: Callable[[Namespace], None]) -> ArgumentParser:
        made = action(name, text, run)
        made.add_argument("file", metavar="ROSTER", help="the roster to build on")
        made.add_argument("--out", required=True, metavar="NEXT", help="file to write")
        return made

    key = action("key", "make a steward key, or show its public half", _key)
    key.add_argument("what", choices=("new", "show"), metavar="new|show")
    key.add_argument("file", metavar="FILE")

    found = action("found", "draft the first roster of a new network", _found)
    found.add_argument("--network", required=True, metavar="NAME")
    found.add_argument(
        "--steward",
        required=True,
        action="append",
        metavar="NAME=KEY",
        help="64 hex digits, or your key file; repeatable",
    )
    found.add_argument(
        "--threshold", required=True, type=int, metavar="K", help="signatures needed"
    )
    found.add_argument("--expires", default="365d", metavar="TIME", help="365d or 2027-01-31")
    found.add_argument("--out", required=True, metavar="FILE")

    sign = action("sign", "add one steward's signature to a roster, in place", _sign)
    sign.add_argument("file", metavar="FILE")
    sign.add_argument("--key", required=True, metavar="KEYFILE")
    sign.add_argument(
        "--instead",
        action="store_true",
        help="you signed another roster of this version, which nobody has or will ever get",
    )

    verify = action("verify", "check signatures, expiry, and that it follows an older one", _verify)
    verify.add_argument("file", metavar="FILE")
    verify.add_argument("--against", metavar="OLD", help="the roster that is believed already")

    action("show", "what a roster says", _show).add_argument("file", metavar="FILE")

    add = change("add", "add a member", _add)
    add.add_argument("--name", required=True)
    add.add_argument("--peer-id", required=True, metavar="ID", help="from its `p2pfed init`")
    add.add_argument("--roles", default="train,relay", help=f"out of {','.join(ROLES)}")
    add.add_argument("--samples", required=True, type=int, metavar="N", help="patients; its weight")

    revoke = change("revoke", "put a member out", _revoke)
    revoke.add_argument("peer", metavar="PEER", help="name or peer id")
    revoke.add_argument("--reason", required=True)
    until = revoke.add_mutually_exclusive_group(required=True)
    until.add_argument(
        "--from-round", type=int, metavar="R", help="its updates count up to the round before"
    )
    until.add_argument(
        "--forget",
        dest="from_round",
        action="store_const",
        const=0,
        help="take all its updates out of the model, everywhere; also of one revoked before",
    )

    rotate = change("rotate", "replace stewards; needs k signatures of the old ones", _rotate)
    rotate.add_argument("--remove", action="append", default=[], metavar="NAME")
    rotate.add_argument("--add", action="append", default=[], metavar="NAME=KEY")
    rotate.add_argument("--threshold", type=int, metavar="K")

    extend = change("extend", "set a later expiry", _extend)
    extend.add_argument("--expires", default="365d", metavar="TIME", help="365d or 2027-01-31")


def _write_draft(args: Namespace, draft: Roster, base: RosterFile | None, told: str) -> None:
    payload = draft.encode()
    document = SignedDocument(payload)
    roster = Roster.decode(payload)  # what we write must be what a node will accept
    write_new(args.out, document.encode())
    follows = base.roster if base is not None and base.document.signatures else None
    lines = [f"{told}: {args.out}, roster v{roster.version} of {roster.network}, not signed yet"]
    if base is not None and follows is not None and not follows.enough_signatures(base.document):
        lines.append(f"# warning: v{follows.version}, which it follows, is not fully signed itself")
    lines += missing_signatures(roster, document, follows, args.out)
    emit(args, "roster", summary(roster, document), lines)


# --- keys and signatures -----------------------------------------------------------------------


def _key(args: Namespace) -> None:
    path = Path(args.file)
    key = StewardKey.create(path) if args.what == "new" else StewardKey.load(path)
    public = key.public_key.hex()
    lines = [f"public key  {public}"]
    if args.what == "new":
        lines += [
            f"secret key  {path}   (0600; keep it off the machines that run nodes)",
            f"next: give the founder of the network this: --steward NAME={public}",
        ]
    emit(args, "steward-key", {"public_key": public, "file": str(path)}, lines)


def _sign(args: Namespace) -> None:
    file = RosterFile.read(args.file)
    key, roster = StewardKey.load(Path(args.key)), file.roster
    with open_record(Path(args.key)) as writer:
        check_signed(roster, writer.record, instead=args.instead)
        noted = writer.record.with_signed(roster.network_id, roster.version, roster.hash)
        if noted != writer.record:
            writer.write(noted)
        signed = file.signed_with(key.seed)
        replace_file(args.file, signed.encode())
    lines = [f"signed roster v{file.roster.version} of {file.roster.network}: {args.file}"]
    if key.public_key not in {s.key for s in file.roster.stewards}:
        lines.append("# this key is not of its stewards: it counts for the version before only")
    lines += missing_signatures(file.roster, signed.document, None, args.file)
    emit(args, "roster", summary(file.roster, signed.document), lines)


def _verify(args: Namespace) -> None:
    file = RosterFile.read(args.file)
    older = RosterFile.read(args.against) if args.against else None
    emit(args, "roster", summary(file.roster, file.document), verified(file, older))


def _show(args: Namespace) -> None:
    file = RosterFile.read(args.file)
    emit(args, "roster", summary(file.roster, file.document), shown(file))


# --- drafts ------------------------------------------------------------------------------------


def _found(args: Namespace) -> None:
    draft = Roster.found(
        args.network,
        stewards=[_steward(text) for text in args.steward],
        threshold=args.threshold,
        expires=_moment(args.expires),
    )
    _write_draft(args, draft, None, "founded")


def _add(args: Namespace) -> None:
    file = RosterFile.read(args.file)
    public_key_of(args.peer_id)
    roles = tuple(role.strip() for role in args.roles.split(",") if role.strip())
    member = Member(args.name, args.peer_id, roles, args.samples)
    forgotten = [r for r in file.roster.revoked if (r.peer_id, r.from_round) == (args.peer_id, 0)]
    if forgotten:
        raise ConfigError(
            f"{args.name}'s key was forgotten: {forgotten[0].reason}",
            "coming back under it would bring all its old updates back into the model",
            "have the hospital make a new key: p2pfed init, in a new folder",
        )
    # A member that comes back after a revocation is no longer revoked.
    revoked = tuple(r for r in file.roster.revoked if r.peer_id != args.peer_id)
    members = (*file.roster.members, member)
    draft = file.next(members=members, revoked=revoked)
    _write_draft(args, draft, file, f"added {args.name}")


def _revoke(args: Namespace) -> None:
    file = RosterFile.read(args.file)
    roster = file.roster
    names = {m.name: m.peer_id for m in roster.members}
    peer_id = names.get(args.peer, args.peer)
    before = next((r.from_round for r in roster.revoked if r.peer_id == peer_id), None)
    if peer_id not in names.values() and (before is None or before <= args.from_round):
        raise NotFound(
            f"{args.peer} is not a member of roster v{roster.version}",
            "" if before is None else f"it is revoked from round {before} on already",
            f"see: p2pfed steward show {args.file}",
        )
    draft = file.next(
        members=tuple(m for m in roster.members if m.peer_id != peer_id),
        revoked=(
            *(r for r in roster.revoked if r.peer_id != peer_id),
            Revocation(peer_id, args.reason, args.from_round),
        ),
    )
    _write_draft(args, draft, file, f"revoked {args.peer}")


def _rotate(args: Namespace) -> None:
    file = RosterFile.read(args.file)
    kept = [s for s in file.roster.stewards if s.name not in args.remove]
    unknown = set(args.remove) - {s.name for s in file.roster.stewards}
    if unknown:
        raise NotFound(
            f"{min(unknown)} is not a steward of roster v{file.roster.version}",
            "only who is one can be removed",
            f"see: p2pfed steward show {args.file}",
        )
    if not args.remove and not args.add and args.threshold is None:
        raise ConfigError(
            "nothing to rotate",
            "the next roster would have the same stewards",
            "give --remove, --add or --threshold",
        )
    stewards = (*kept, *(_steward(text) for text in args.add))
    threshold = file.roster.threshold if args.threshold is None else args.threshold
    _write_draft(args, file.next(stewards=stewards, threshold=threshold), file, "rotated")


def _extend(args: Namespace) -> None:
    file = RosterFile.read(args.file)
    _write_draft(args, file.next(expires=_moment(args.expires)), file, "extended")


def _steward(text: str) -> Steward:
    name, _, key = text.rpartition("=")
    if name and re.fullmatch(r"[0-9a-f]{64}", key):
        return Steward(name, bytes.fromhex(key))
    if name and key and Path(key).is_file():  # the founder's own
        return Steward(name, StewardKey.load(Path(key)).public_key)
    raise ConfigError(
        f"{text[:100]!r} is not a steward",
        "expected NAME=KEYHEX with the 64 hex digits of the public key, or NAME=KEYFILE",
        "the steward gets them from: p2pfed steward key show FILE",
    )


def _moment(text: str) -> dt.datetime:
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    try:
        if re.fullmatch(r"[0-9]{1,5}d", text):
            moment = now + dt.timedelta(days=int(text[:-1]))
        else:
            moment = dt.datetime.fromisoformat(text)
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"{text!r} is not a time",
            "it is a number of days, or a date as ISO 8601",
            "write e.g. 365d or 2027-01-31",
        ) from error
    moment = moment.astimezone(dt.UTC) if moment.tzinfo else moment.replace(tzinfo=dt.UTC)
    if moment <= now:
        raise ConfigError(
            f"{text} is over",
            "under an expired roster nodes release nothing",
            "write e.g. 365d or a day that is to come",
        )
    return moment
