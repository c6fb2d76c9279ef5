"""bootstrap list, add, rm, check: files that say which peers to ask first.

A list is addresses plus identities and grants no membership: an address without /p2p/ID is refused.
Editing keeps comments: a block is appended or cut out as text.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

from p2pfed.cli.files import read_text, replace_file, write_new
from p2pfed.cli.locate import admin_client
from p2pfed.cli.options import describe, with_json, with_socket
from p2pfed.cli.text import emit, table
from p2pfed.errors import ConfigError, NotFound
from p2pfed.identity.bootstrap import BootstrapList

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Sequence
    from typing import Any

__all__ = ["add_peer", "bootstrap"]


def bootstrap(parser: ArgumentParser) -> None:
    """Fill in the command group `bootstrap`."""
    describe(parser, "Lists of the peers that a node asks first. They grant no membership.")
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    listing = actions.add_parser("list", help="the peers in a file, or those the daemon uses")
    listing.epilog = "endpoint: GET /v1/bootstrap   (without FILE)"
    listing.add_argument("file", nargs="?", metavar="FILE")
    with_socket(listing)
    listing.set_defaults(run=_list)

    add = actions.add_parser("add", help="add a peer to a file, which is made if need be")
    add.add_argument("file", metavar="FILE")
    add.add_argument("--name", required=True)
    add.add_argument(
        "--addr", required=True, action="append", metavar="MULTIADDR", help="with /p2p/ID"
    )
    add.add_argument("--network", default="", help="for a new file: the network's name")
    add.add_argument("--network-id", default="", metavar="HEX", help="for a new file: its id")
    with_json(add)
    add.set_defaults(run=_add)

    remove = actions.add_parser("rm", help="remove a peer from a file")
    remove.add_argument("file", metavar="FILE")
    remove.add_argument("name", metavar="NAME")
    with_json(remove)
    remove.set_defaults(run=_remove)

    check = actions.add_parser("check", help="is the file right?")
    check.add_argument("file", metavar="FILE")
    with_json(check)
    check.set_defaults(run=_check)


def _list(args: Namespace) -> None:
    peers = _peers(args.file) if args.file else admin_client(args).get("/v1/bootstrap")
    rows = [(peer["name"], " ".join(peer["addrs"])) for peer in peers]
    emit(args, "bootstrap", peers, table(("NAME", "ADDRESSES"), rows))


def _add(args: Namespace) -> None:
    add_peer(args.file, args.name, args.addr, network=args.network, network_id=args.network_id)
    emit(args, "bootstrap-file", {"file": args.file}, [f"added {args.name} to {args.file}"])


def add_peer(
    file: str, name: str, addresses: Sequence[str], *, network: str, network_id: str
) -> None:
    """Add a peer to a bootstrap list, which is made if need be.

    Args:
        file: The list.
        name: The peer's name.
        addresses: Its multiaddrs, with `/p2p/ID`.
        network: For a new file: the network's name.
        network_id: For a new file: its id, 64 hex digits or "".

    Raises:
        ConfigError: The peer is in it already, or a node would refuse the list.
    """
    path = Path(file)
    block = (
        f"\n[[peer]]\nname = {json.dumps(name)}\n"
        f"addrs = {json.dumps(list(addresses), ensure_ascii=False)}\n"
    )
    if path.exists():
        if any(peer["name"] == name for peer in _peers(file)):
            raise ConfigError(
                f"{name} is in {file} already",
                "a name stands once in a list",
                "take it off first: p2pfed bootstrap rm FILE NAME",
            )
        before = read_text(path)
    else:
        before = (
            f"version = 1\nnetwork = {json.dumps(network)}\nnetwork_id = {json.dumps(network_id)}\n"
        )
    after = before + ("" if before.endswith("\n") else "\n") + block
    BootstrapList.parse(after, file)  # nothing is written that a node would refuse
    if path.exists():
        replace_file(path, after.encode())
    else:
        write_new(path, after.encode())


def _remove(args: Namespace) -> None:
    _peers(args.file)
    first, *blocks = re.split(r"(?m)^(?=[ \t]*\[\[peer\]\])", read_text(args.file))
    kept = [b for b in blocks if tomllib.loads(b)["peer"][0].get("name") != args.name]
    if len(kept) == len(blocks):
        raise NotFound(
            f"{args.name} is not in {args.file}",
            "a peer is taken off by the exact name that the list gives it",
            f"see: p2pfed bootstrap list {args.file}",
        )
    after = "".join([first, *kept])
    BootstrapList.parse(after, args.file)  # nothing is written that a node would refuse
    replace_file(args.file, after.encode())
    emit(args, "bootstrap-file", {"file": args.file}, [f"removed {args.name} from {args.file}"])


def _check(args: Namespace) -> None:
    peers = _peers(args.file)
    emit(args, "bootstrap", peers, [f"ok, peers: {len(peers)}, in {args.file}"])


def _peers(file: str) -> list[dict[str, Any]]:
    listed = BootstrapList.parse(read_text(file), file)
    return [
        {"name": peer.name, "peer_id": peer.peer_id, "addrs": list(peer.addresses)}
        for peer in listed.peers
    ]
