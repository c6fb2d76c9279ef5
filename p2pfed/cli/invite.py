"""invite create, list, revoke, approve: the steward's half of joining; on files, offline.

Map: `create` signs an invite and notes it in the record beside the key -> the hospital's `init`
answers with a request -> `approve` checks the request against the record, asks a person, notes the
invite as used, and writes the next roster, signed, as an approval file.

Not here: `approve` (`invite_approve`), what is refused (`invite_rules`), the record's file
(`invite_record`), the hospital's half (`enrol`), the bytes (`identity.invite`).
"""

from __future__ import annotations

import datetime as dt
import os
import re
from dataclasses import replace
from pathlib import Path

from p2pfed.cli.invite_approve import approve, approve_options
from p2pfed.cli.invite_record import Entry, open_record, read_record
from p2pfed.cli.invite_rules import check_base, check_name, check_newest
from p2pfed.cli.options import describe, with_json
from p2pfed.cli.roster_file import RosterFile
from p2pfed.cli.text import emit, table
from p2pfed.errors import ConfigError, PolicyError
from p2pfed.identity.invite import NUMBER_BYTES, Invite, moment_text
from p2pfed.identity.keys import StewardKey, write_private

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Callable
    from typing import Any

__all__ = ["invite"]

LONGEST_DAYS = 90


def invite(parser: ArgumentParser) -> None:
    """Fill in the command group `invite`."""
    describe(
        parser,
        "Invite a hospital, and approve its answer; for stewards, works on files, offline. An\n"
        "invite is for one hospital and one use, and ends. Who holds it can ask to be let in in\n"
        "that hospital's name; it is you who lets in, after a call.",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def action(name: str, text: str, run: Callable[[Namespace], None]) -> ArgumentParser:
        made = actions.add_parser(name, help=text, description=text)
        made.add_argument("--key", required=True, metavar="KEYFILE", help="your steward key")
        with_json(made)
        made.set_defaults(run=run)
        return made

    create = action("create", "make an invite for one hospital", _create)
    create.add_argument("roster", metavar="ROSTER", help="the network's newest roster")
    create.add_argument(
        "--for", dest="name", required=True, metavar="NAME", help="its name in the roster"
    )
    create.add_argument("--ttl", default="7d", metavar="TIME", help="7d, 24h; 1h to 90d")
    create.add_argument("--out", metavar="FILE", help="write it there, to be mailed")

    action("list", "the invites made with a key, and what became of them", _list)

    revoke = action("revoke", "let an open invite be used no more", _revoke)
    revoke.add_argument("invite", metavar="NAME", help="whom it is for, or its number")

    approve_options(action("approve", "admit the hospitals that answered", approve))


# --- create, list, revoke ------------------------------------------------------------------------


def _create(args: Namespace) -> None:
    key, now = StewardKey.load(Path(args.key)), _now()
    file, lasts = RosterFile.read(args.roster), _lasting(args.ttl)
    check_base(file, key, now)
    if args.out and Path(args.out).exists():
        raise ConfigError(f"{args.out} exists already", "nothing is overwritten", "choose another")
    with open_record(Path(args.key), now) as writer:
        check_newest(file.roster, writer.record)
        check_name(file.roster, args.name, writer.record, now)
        made = Invite.make(
            key,
            network_id=file.roster.network_id,
            network=file.roster.network,
            name=args.name,
            number=os.urandom(NUMBER_BYTES),
            expires=now + lasts,
        )
        entry = Entry(made.number, made.name, made.network, made.network_id, now, made.expires)
        writer.write(writer.record.with_entry(entry))
        if args.out:
            write_private(Path(args.out), f"{made.encode()}\n".encode())
    data = {
        **_told(entry, now),
        "invite": made.encode(),
        "fingerprint": made.fingerprint,
    }
    emit(args, "invite", data, _created(args.out, made))


def _created(out: str | None, made: Invite) -> list[str]:
    return [
        f"invite   {out}" if out else made.encode(),
        f"for      {made.name}, into {made.network}; one use, until {moment_text(made.expires)}",
        f"phone    {made.fingerprint}   (read it to {made.name} when you call)",
        "next: send the invite to the hospital, which answers with what this prints:",
        "  p2pfed init --invite INVITE --task TASK --data PATH --epsilon E --samples N",
    ]


def _lasting(text: str) -> dt.timedelta:
    match = re.fullmatch(r"([1-9][0-9]{0,4})([hd])", text)
    hours = int(match[1]) * (24 if match[2] == "d" else 1) if match else 0
    if not 0 < hours <= 24 * LONGEST_DAYS:
        raise ConfigError(
            f"an invite cannot last {text!r}",
            f"1h at least, {LONGEST_DAYS}d at most: it is a key to your network's door",
            "write e.g. 7d or 24h",
        )
    return dt.timedelta(hours=hours)


def _list(args: Namespace) -> None:
    StewardKey.load(Path(args.key))
    entries, now = read_record(Path(args.key)).entries, _now()
    rows = [
        (e.name, e.network, e.state(now), moment_text(e.expires), e.number.hex(), e.peer_id or "-")
        for e in entries
    ]
    head = ("FOR", "NETWORK", "STATE", "UNTIL", "NUMBER", "PEER ID")
    lines = table(head, rows) if rows else ["no invite was made with this key"]
    emit(args, "invites", [_told(entry, now) for entry in entries], lines)


def _told(entry: Entry, now: dt.datetime) -> dict[str, Any]:
    return {
        "number": entry.number.hex(),
        "name": entry.name,
        "network": entry.network,
        "network_id": entry.network_id.hex(),
        "state": entry.state(now),
        "expires": entry.expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "peer_id": entry.peer_id or None,
    }


def _revoke(args: Namespace) -> None:
    now = _now()
    with open_record(Path(args.key)) as writer:  # also if the clock is wrong, or was
        entry = writer.record.found(args.invite, now)
        if entry.used is not None:
            raise PolicyError(
                f"the invite for {entry.name} was used at {moment_text(entry.used)}",
                "the node that used it stands in the roster",
                f'to put it out: p2pfed steward revoke ROSTER "{entry.name}" -h',
            )
        revoked = replace(entry, revoked=entry.revoked or now)
        writer.write(writer.record.with_entry(revoked))
    line = f"revoked: the invite for {entry.name}, number {entry.number.hex()}"
    emit(args, "invite", _told(revoked, now), [line])


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC).replace(microsecond=0)
