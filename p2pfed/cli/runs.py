"""run create, sign, show, accept, list: the run file's way from the stewards into a hospital.

`accept` verifies the file against the daemon's own roster, shows what will leave the building, and
asks once. The genesis file is copied beside the daemon's other blobs, as the user whom that folder
belongs to; nothing but its path is sent. Who may not write there names a file that the daemon reads
itself.

Not here: how `create` makes the file from its flags (`run_create`).
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from p2pfed.cli.approval import roster_text, run_text
from p2pfed.cli.files import as_owner, read_bytes, read_document, reading, replace_file
from p2pfed.cli.locate import admin_client, data_folder
from p2pfed.cli.options import confirmed, describe, with_json, with_socket
from p2pfed.cli.run_create import create, create_options
from p2pfed.cli.text import emit, number, size, table
from p2pfed.errors import FactRejected, PolicyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Callable, Iterator
    from typing import Any

    from p2pfed.identity.roster import Roster
    from p2pfed.identity.run import Run

__all__ = ["run"]


def run(parser: ArgumentParser) -> None:
    """Fill in the command group `run`."""
    describe(parser, "Training runs: the stewards create and sign one, each hospital accepts it.")
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def action(name: str, text: str, act: Callable[[Namespace], None]) -> ArgumentParser:
        made = actions.add_parser(name, help=text, description=text)
        made.set_defaults(run=act)
        return made

    create_options(action("create", "draft a run file and make its first model", create))

    sign = action("sign", "add one steward's signature to a run file, in place", _sign)
    sign.add_argument("file", metavar="FILE")
    sign.add_argument("--key", required=True, metavar="KEYFILE")
    sign.add_argument("--roster", metavar="FILE", help="to say how many signatures are missing")
    with_json(sign)

    show = action("show", "what a run file says, and what would leave the building", _show)
    show.add_argument("file", metavar="FILE", help="run file, or an approval that brings one")
    show.add_argument("--roster", required=True, metavar="FILE")
    with_json(show)

    accept = action("accept", "take part in a run, after being shown what leaves", _accept)
    accept.epilog = "endpoint: GET /v1/roster, POST /v1/runs"
    accept.add_argument("file", metavar="FILE", help="run file, or an approval that brings one")
    accept.add_argument("--genesis", metavar="FILE", help="the run's first model, if you have it")
    accept.add_argument("--yes", action="store_true", help="do not ask")
    with_socket(accept)

    listing = action("list", "runs that this node knows", _list)
    listing.epilog = "endpoint: GET /v1/runs"
    with_socket(listing)


# --- sign, show, list --------------------------------------------------------------------------


def _sign(args: Namespace) -> None:
    from p2pfed.identity.keys import StewardKey
    from p2pfed.identity.run import Run
    from p2pfed.identity.signing import RUN, SignedDocument

    with reading(args.file, "a run file"):
        document = SignedDocument.parse(read_bytes(args.file))
        made = Run.decode(document.payload)
    signed = document.signed_by(StewardKey.load(Path(args.key)).seed, RUN)
    have = signed.signers(RUN)
    count, lines = len(have), [f"signed run {made.name}: {args.file}"]
    if args.roster:
        roster = _roster(args.roster)
        count = len(have & {s.key for s in roster.stewards})
        lack = roster.threshold - count
        lines.append(
            f"{count} of {roster.threshold} signatures; {lack} more needed"
            if lack > 0
            else f"{_signatures(count)} enough; next: p2pfed run accept {args.file}"
        )
    else:
        lines.append(f"{count} signature{'s' * (count != 1)} now")
    replace_file(args.file, signed.encode())
    emit(args, "run-sign", {"run_id": made.run_id.hex(), "signatures": count}, lines)


def _show(args: Namespace) -> None:
    from p2pfed.identity.run import Run
    from p2pfed.identity.signing import RUN, SignedDocument

    roster = _roster(args.roster)
    with reading(args.file, "a run file, or an approval that brings one"):
        document = SignedDocument.parse(_part(args.file, run_text))
        made = Run.decode(document.payload)
    if made.network_id != roster.network_id:
        raise FactRejected(
            f"run {made.name!r} is not of the network {roster.network}",
            "its file names another network's id",
            "name the roster and the run file of one network",
        )
    signers = document.signers(RUN)
    names = [s.name for s in roster.stewards if s.key in signers]
    leaving = made.leaving(roster)
    data = {
        "run_id": made.run_id.hex(),
        "name": made.name,
        "task": made.task,
        "task_id": made.task_id.hex(),
        "genesis": made.genesis.hex(),
        "signed_by": names,
        "leaving": leaving,
    }
    lines = [
        f"run {made.name}   task {made.task}   id {made.run_id.hex()[:16]}…",
        f"signed by {', '.join(names) or 'nobody'}   ({roster.threshold} needed)",
        *_leaving(made, leaving),
    ]
    emit(args, "run", data, lines)


def _signatures(count: int) -> str:
    return "1 signature is" if count == 1 else f"{count} signatures are"


def _roster(file: str) -> Roster:
    from p2pfed.identity.roster import Roster
    from p2pfed.identity.signing import SignedDocument

    with reading(file, "a roster or an approval"):
        return Roster.decode(SignedDocument.parse(_part(file, roster_text)).payload)


def _part(file: str, part: Callable[[str], str]) -> bytes:
    """The bytes of a signed document, which may lie in an approval."""
    return read_document(file, part).encode()


def _leaving(made: Run, leaving: dict[str, Any]) -> list[str]:
    if made.mechanism == "none":
        protection = '  protection      NONE: mechanism "none", asked for by name'
        rate = "  privacy         no bound on what the updates reveal about a patient"
    else:
        relation = made.gate.relation(made.unit)
        protection = f"  protection      {made.mechanism}, of each {made.unit} ({relation})"
        if made.gate.patients_per_row > 1:
            protection += f", {made.gate.patients_per_row} patients to a contribution"
        rate = (
            f"  privacy         at most ε {number(leaving['epsilon'])}, "
            f"δ {number(leaving['delta'])} in all; one round alone: "
            f"about ε {number(leaving['epsilon_of_one_round'])}"
        )
    sent = (
        f"at most {size(leaving['bytes_per_round'])}: "
        f"{leaving['coordinates_per_round']} of {leaving['num_parameters']} values"
    )
    if made.averaging.mode == "pairwise":
        meetings = 2 * made.averaging.exchanges
        sent = (
            f"about {size(leaving['bytes_per_round'])}: this hospital's whole model, "
            f"in about {meetings} meetings with one peer each"
        )
    return [
        "what leaves the building:",
        f"  per round       {sent}",
        f"  rounds          {leaving['rounds']}",
        protection,
        rate,
        f"  receivers       {', '.join(leaving['receivers']) or 'nobody yet'}",
        "  what was received by them cannot be taken back; stop any time: p2pfed share off",
    ]


def _list(args: Namespace) -> None:
    found = admin_client(args).get("/v1/runs")
    keys = ("name", "task", "mechanism", "rounds", "active", "id")
    words = [{**item, "active": "yes" if item.get("active") else "no"} for item in found]
    rows = [tuple(str(item.get(key, "-")) for key in keys) for item in words]
    emit(args, "runs", found, table(tuple(key.upper() for key in keys), rows))


# --- accept ------------------------------------------------------------------------------------


def _accept(args: Namespace) -> None:
    from p2pfed.identity.roster import Roster
    from p2pfed.identity.run import check_signed_run
    from p2pfed.identity.signing import SignedDocument

    signed = read_document(args.file, run_text)
    client = admin_client(args, timeout=60.0)
    held = client.get("/v1/roster")
    roster = Roster.decode(SignedDocument.parse(held["signed"].encode()).payload)
    with reading(args.file, "a run file, or an approval that brings one"):
        made = check_signed_run(signed.encode(), roster)
    genesis = None if args.genesis is None else _genesis(args, made)
    if not args.json:
        lines = [
            *_leaving(made, made.leaving(roster)),
            *_of_hospital(client.get("/v1/privacy"), made),
        ]
        emit(args, "run-accept", None, [*lines, *_staying(args, made, roster)])
    if not confirmed(args, f"Take part in run {made.name}?"):
        raise PolicyError("the run was not accepted", "you said no", "nothing was changed")
    stored = None if genesis is None else str(_store(args, made, genesis))
    answer = client.post("/v1/runs", {"signed": signed, "genesis": stored})
    warning = (answer.get("archive") or {}).get("warning")
    lines = [f"accepted run {made.name}; watch it with: p2pfed status"]
    emit(args, "run-accept", answer, [*([f"warning: {warning}"] if warning else []), *lines])


def _of_hospital(own: dict[str, Any], made: Run) -> Iterator[str]:
    """What this hospital's own configuration adds; `own` is what GET /v1/privacy says."""
    limit = own.get("epsilon")
    if made.mechanism != "none" and limit is not None and 0 < limit < made.epsilon:
        own_limit = f"its own ε {number(limit)}, over all runs"
        yield f"  this hospital   stops at {own_limit} (privacy.epsilon)"
    if own.get("share_metrics") == "rounded":
        yield "  metric          the main one, two digits, to all members; outside ε"


def _staying(args: Namespace, made: Run, roster: Roster) -> list[str]:
    """How much of this disk the archive takes."""
    from p2pfed.node.archive import Archive, forecast

    folder = data_folder(args)
    if folder is None or not os.access(folder, os.F_OK):
        return [
            "what stays on this disk:",
            f"  archive         at most {size(forecast(made, roster))}",
        ]
    archive = Archive.of(made, roster, held_bytes=0, folder=folder)
    room = f"at most {size(archive.forecast_bytes)}; {size(archive.free_bytes)} are free"
    warning = [f"  warning: {archive.warning}"] if archive.warning else []
    return ["what stays on this disk:", f"  archive         {room}", *warning]


def _genesis(args: Namespace, made: Run) -> bytes:
    from p2pfed.identity.filehash import file_hash
    from p2pfed.node.genesis import most_bytes

    data = read_bytes(args.genesis, most_bytes(made))
    if file_hash(data) != made.genesis:
        raise FactRejected(
            f"{args.genesis} is not the first model of run {made.name}",
            f"its hash is {file_hash(data).hex()[:16]}…, the run names {made.genesis.hex()[:16]}…",
            "get the file that belongs to the run; without --genesis the daemon asks its peers",
        )
    return data


def _store(args: Namespace, made: Run, genesis: bytes) -> Path:
    """Put the first model where the daemon keeps files; else name the file, which it then reads."""
    folder = data_folder(args)
    if folder is not None and os.access(folder, os.F_OK):
        blob = (folder / "blobs" / made.genesis.hex()).absolute()
        with suppress(PermissionError), as_owner(folder):
            if os.access(blob.parent, os.W_OK | os.X_OK, effective_ids=True):
                replace_file(blob, genesis)
                return blob
    return Path(args.genesis).absolute()
