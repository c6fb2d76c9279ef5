"""join, leave, share, block, unblock: one POST each."""

from __future__ import annotations

from p2pfed.cli.approval import Approval, roster_text
from p2pfed.cli.files import parse_bootstrap, read_bootstrap, read_document, read_text
from p2pfed.cli.locate import admin_client
from p2pfed.cli.options import describe, with_socket
from p2pfed.cli.text import emit
from p2pfed.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

__all__ = ["block", "join", "leave", "share", "unblock"]


def join(parser: ArgumentParser) -> None:
    """Fill in the command `join`."""
    describe(
        parser,
        "Join the network: hand the running daemon what you got from the stewards, an approval,\n"
        "or a signed roster and lists of peers to ask first. A node that was invited takes only a\n"
        "first roster that the inviting steward signed. Without files: join again after a leave.",
        endpoint="POST /v1/join",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("file", nargs="?", metavar="FILE", help="approval, or signed roster")
    source.add_argument("--roster", metavar="FILE", help="the same")
    parser.add_argument(
        "--bootstrap", metavar="FILE", action="append", default=[], help="list of first peers"
    )
    with_socket(parser)
    parser.set_defaults(run=_join)


def _join(args: Namespace) -> None:
    lists = [read_bootstrap(file) for file in args.bootstrap]
    file, roster = args.file or args.roster, None
    _check_no_line(file or "")
    if file is not None:
        roster = read_document(file, roster_text)
        approval = Approval.parse(read_text(file))
        if approval is not None and approval.bootstrap is not None:
            lists.append(parse_bootstrap(approval.bootstrap, file))
    body = {"roster": roster, "bootstrap": lists}
    # The daemon may dial before it answers.
    data = admin_client(args, timeout=60.0).post("/v1/join", body)
    lines = ["joining; watch it with: p2pfed status, p2pfed events -f"]
    if data.get("member") is False:
        lines = [
            f"roster v{data['roster_version']} of {data['network']} does not list this node yet",
            "nobody on it will let this node in; ask a steward to add it, then join once more",
        ]
    elif data.get("peers") and data.get("dialled") == 0:
        lines.append(
            "# no address of another member is known, so they must dial this node; or, with a list"
            " from the stewards: p2pfed join --bootstrap FILE"
        )
    if data.get("vouched") is False:
        lines.append(
            "# warning: nothing vouched for this first roster (no invite, no network.id): compare"
            " its network's id with a steward,"
        )
        lines.append(f'# then set network.id = "{data["network_id"]}" in the configuration')
    emit(args, "join", data, lines)


def _check_no_line(given: str) -> None:
    """Raise ConfigError for a line of the ceremony in place of a file."""
    if given.startswith("p2pfed1-"):
        raise ConfigError(
            f"this is an invite: {given[:16]}…",
            "an invite is answered first; what a node joins with is the approval that comes back",
            "run: p2pfed init --invite INVITE   (then send the request that it prints)",
        )
    if given.startswith("p2pfedreq1-"):
        raise ConfigError(
            f"this is a request: {given[:16]}…",
            "the steward approves it, and sends back what a node joins with",
            "at the steward: p2pfed invite approve REQUEST -h",
        )


def leave(parser: ArgumentParser) -> None:
    """Fill in the command `leave`."""
    describe(
        parser,
        "Leave the network: the peers are told and stop waiting for this node. The daemon\n"
        "runs on, and remembers not to join again by itself until `p2pfed join`.",
        endpoint="POST /v1/leave",
    )
    with_socket(parser)
    parser.set_defaults(run=_leave)


def _leave(args: Namespace) -> None:
    data = admin_client(args, timeout=60.0).post("/v1/leave")
    emit(args, "leave", data, ["left; to come back: p2pfed join"])


def share(parser: ArgumentParser) -> None:
    """Fill in the command `share`."""
    describe(
        parser,
        "Start (on) or stop (off) releasing updates of this hospital. With `off` the node goes on\n"
        "receiving and computing the common model. What was released cannot be taken back.",
        endpoint="POST /v1/share",
    )
    parser.add_argument("what", choices=("on", "off"), metavar="on|off")
    with_socket(parser)
    parser.set_defaults(run=_share)


def _share(args: Namespace) -> None:
    data = admin_client(args).post("/v1/share", {"on": args.what == "on"})
    lines = {"on": "sharing is on", "off": "sharing is off; this node goes on receiving"}
    emit(args, "share", data, [lines[args.what]])


def block(parser: ArgumentParser) -> None:
    """Fill in the command `block`."""
    describe(
        parser,
        "Have no connection with a member, e.g. while its machine is under suspicion. The others\n"
        "are not told; what it signed still arrives through them and counts. To put a member out\n"
        "for everyone, the stewards revoke it.",
        endpoint="POST /v1/block",
    )
    _peer(parser, on=True)


def unblock(parser: ArgumentParser) -> None:
    """Fill in the command `unblock`."""
    describe(parser, "Have connections with a blocked member again.", endpoint="POST /v1/block")
    _peer(parser, on=False)


def _peer(parser: ArgumentParser, *, on: bool) -> None:
    parser.add_argument("peer", metavar="PEER", help="name or peer id")
    with_socket(parser)
    parser.set_defaults(run=lambda args: _block(args, on=on))


def _block(args: Namespace, *, on: bool) -> None:
    data = admin_client(args).post("/v1/block", {"peer": args.peer, "on": on})
    line = f"{args.peer} is blocked; to undo: p2pfed unblock {args.peer}"
    emit(args, "block", data, [line if on else f"{args.peer} is not blocked any more"])
