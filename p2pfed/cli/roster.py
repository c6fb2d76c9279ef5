"""roster show, verify, diff, publish: what the members know of who may join.

`show` and `diff` read files, or ask the daemon; `verify` reads files only; `publish` hands a newer
roster to one node, which hands it on. An approval can stand wherever a roster file can.

Not here: making and signing rosters (`steward`, `invite`), what they say (`roster_file`).
"""

from __future__ import annotations

from p2pfed.cli.approval import roster_text
from p2pfed.cli.files import read_document
from p2pfed.cli.locate import admin_client
from p2pfed.cli.options import describe, with_json, with_socket
from p2pfed.cli.text import emit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from p2pfed.cli.roster_file import RosterFile

__all__ = ["roster"]


def roster(parser: ArgumentParser) -> None:
    """Fill in the command group `roster`."""
    describe(parser, "Who may join: show, check and compare rosters, and hand on a newer one.")
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    show = actions.add_parser("show", help="what a roster says: the daemon's, or a file")
    show.epilog = "endpoint: GET /v1/roster   (without FILE)"
    show.add_argument("file", nargs="?", metavar="FILE", help="roster or approval")
    with_socket(show)
    show.set_defaults(run=_show)

    verify = actions.add_parser("verify", help="check signatures and expiry of a file")
    verify.add_argument("file", metavar="FILE", help="roster or approval")
    verify.add_argument("--against", metavar="OLD", help="the roster that is believed already")
    with_json(verify)
    verify.set_defaults(run=_verify)

    diff = actions.add_parser("diff", help="what changes from one roster to another")
    diff.description = (
        "What changes from OLD to NEW, in words; with one file: from the daemon's to it."
    )
    diff.epilog = "endpoint: GET /v1/roster   (with one file)"
    diff.add_argument("files", nargs="+", metavar="[OLD] NEW", help="rosters or approvals")
    with_socket(diff)
    diff.set_defaults(run=_diff)

    publish = actions.add_parser("publish", help="hand a newer roster to the daemon")
    publish.description = (
        "Hand a newer roster to the daemon, which believes it if the stewards of its own signed\n"
        "it. One node is enough: the members hand it on to each other."
    )
    publish.epilog = "endpoint: POST /v1/roster"
    publish.add_argument("file", metavar="FILE", help="roster or approval")
    with_socket(publish)
    publish.set_defaults(run=_publish)


def _held(args: Namespace) -> RosterFile:
    """The roster that the daemon holds."""
    from p2pfed.cli.roster_file import RosterFile

    signed: str = admin_client(args).get("/v1/roster")["signed"]
    return RosterFile.of(signed.encode())


def _show(args: Namespace) -> None:
    from p2pfed.cli.roster_file import RosterFile, shown, summary

    file = RosterFile.read(args.file) if args.file else _held(args)
    emit(args, "roster", summary(file.roster, file.document), shown(file))


def _verify(args: Namespace) -> None:
    from p2pfed.cli.roster_file import RosterFile, summary, verified

    file = RosterFile.read(args.file)
    older = RosterFile.read(args.against) if args.against else None
    emit(args, "roster", summary(file.roster, file.document), verified(file, older))


def _diff(args: Namespace) -> None:
    from p2pfed.cli.roster_file import RosterFile, differences
    from p2pfed.errors import ConfigError

    if len(args.files) > 2:
        raise ConfigError("two rosters are compared", f"{len(args.files)} were given", "give two")
    old = RosterFile.read(args.files[0]) if len(args.files) == 2 else _held(args)
    new = RosterFile.read(args.files[-1])
    changes = differences(old.roster, new.roster)
    head = f"{new.roster.network}: roster v{old.roster.version} -> v{new.roster.version}"
    lines = [f"  {change['text']}" for change in changes] or ["  they say the same"]
    data = {
        "network": new.roster.network,
        "from_version": old.roster.version,
        "to_version": new.roster.version,
        "changes": changes,
    }
    emit(args, "roster-diff", data, [head, *lines])


def _publish(args: Namespace) -> None:
    signed = read_document(args.file, roster_text)
    data = admin_client(args, timeout=60.0).post("/v1/roster", {"signed": signed})
    line = (
        f"roster v{data['version']} is in force here; the members hand it on"
        if data["changed"]
        else f"nothing changed: roster v{data['version']} is in force here already"
    )
    emit(args, "roster-publish", data, [line])
