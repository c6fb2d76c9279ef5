"""whoami and id: who this node is on the network, and who the caller is on its socket."""

from __future__ import annotations

from p2pfed.cli.locate import admin_client
from p2pfed.cli.observe import field_lines
from p2pfed.cli.options import describe, with_socket
from p2pfed.cli.text import emit, printable
from p2pfed.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from typing import Any

__all__ = ["id", "whoami"]

_ENDPOINT = "GET /v1/status, GET /v1/version"


def whoami(parser: ArgumentParser) -> None:
    """Fill in the command `whoami`."""
    describe(
        parser,
        "Who this node is: name, peer id, addresses, network, roster. And who you are to it: your\n"
        "user and what it may do on this socket (all, write, read).",
        endpoint=_ENDPOINT,
    )
    with_socket(parser)
    parser.set_defaults(run=lambda args: _show(args, None))


def id(parser: ArgumentParser) -> None:  # noqa: A001 - the command's name
    """Fill in the command `id`."""
    describe(
        parser,
        "This node's peer id; with -f whatever you need of it, e.g.\n"
        "  p2pfed id -f '{name} {addresses}'",
        endpoint=_ENDPOINT,
    )
    parser.add_argument(
        "-f",
        "--format",
        default="{peer_id}",
        metavar="FORMAT",
        help="text with {name}, {peer_id}, {addresses}, {network}, {network_id}, {roster},"
        " {version}; \\n is a new line",
    )
    with_socket(parser)
    parser.set_defaults(run=lambda args: _show(args, args.format))


def _show(args: Namespace, form: str | None) -> None:
    client = admin_client(args)
    data = _identity(client.get("/v1/status"), client.get("/v1/version"))
    if form is None:
        shown = {key: value for key, value in data.items() if key != "you"}
        you = data["you"]
        told = {} if you is None else {"you": _you(you)}
        emit(args, "whoami", data, field_lines({**shown, **told}))
    else:
        emit(args, "whoami", data, _filled(form, data).split("\n"))


def _identity(status: dict[str, Any], version: dict[str, Any]) -> dict[str, Any]:
    network, roster = status.get("network") or {}, status.get("roster") or {}
    return {
        "name": status["name"],
        "peer_id": status["peer_id"],
        "addresses": status["addresses"],
        "network": network.get("name", ""),
        "network_id": network.get("id", ""),
        "roster": roster.get("version"),
        "version": version["version"],
        "you": version.get("you"),  # None: an older daemon does not tell
    }


def _you(you: dict[str, Any]) -> str:
    name = you.get("name") or "uid"
    return f"{name} ({you.get('uid')}), may {you.get('may')}"


def _filled(form: str, data: dict[str, Any]) -> str:
    """`form` with every {word} replaced; nothing else of Python's formats is understood."""
    import re

    known = {key: printable(_plain(value)) for key, value in data.items() if key != "you"}
    unknown = [key for key in re.findall(r"\{(.*?)\}", form) if key not in known]
    if unknown:
        raise ConfigError(
            f"cannot fill in {{{printable(unknown[0])}}}",
            f"known: {', '.join(f'{{{key}}}' for key in known)}",
            "e.g. p2pfed id -f '{name} {peer_id}'",
        )
    text = form.replace("\\n", "\n")
    return re.sub(r"\{(.*?)\}", lambda found: known[found[1]], text)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return "-" if value in {None, ""} else str(value)
