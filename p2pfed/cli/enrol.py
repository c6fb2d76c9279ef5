"""The hospital's half of joining: what `init` makes of an invite, and what comes after it.

Beside the key it leaves `request.txt`, the line for the steward, and `invited.json`, with which the
daemon judges its first roster (`identity.invited`). Neither is secret.

Not here: the steward's half (`invite`), the bytes (`identity.invite`).
"""

from __future__ import annotations

import datetime as dt
import shlex
from pathlib import Path

from p2pfed.cli.files import read_text
from p2pfed.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

    from p2pfed.identity.invite import Invite
    from p2pfed.identity.keys import NodeKey

__all__ = ["line_of", "next_steps", "read_invite", "write_request"]

REQUEST_FILE = "request.txt"
_TRAINS_NOT = (
    "  (a bootstrap-only node: it asks for no weight and trains on nothing; to train: init --task)"
)
_LONGEST_PATH = 200  # every line is longer; and a name of more than 255 bytes cannot be looked for


def line_of(given: str) -> str:
    """An invite or a request: the line itself, or the text of the file that is named."""
    if len(given) > _LONGEST_PATH or not Path(given).is_file():
        return given
    return read_text(given)


def read_invite(given: str, name: str | None) -> Invite:
    """The invite that a person gave, if it is good today.

    Args:
        given: The line, or a file that holds it.
        name: The name that was asked for, or None.

    Raises:
        ConfigError: It is no invite, has a typo, or is for another name.
        FactRejected: It was changed on its way.
        PolicyError: It has ended.
    """
    from p2pfed.identity.invite import Invite

    invite = Invite.parse(line_of(given))
    invite.check_date(dt.datetime.now(dt.UTC))
    if name is not None and name != invite.name:
        raise ConfigError(
            f"the invite is for {invite.name}, not for {name}",
            "the steward who made it named whom it is for",
            "leave --name out; or ask the steward for an invite in the right name",
        )
    return invite


def write_request(
    folder: Path, invite: Invite, key: NodeKey, *, samples: int, trains: bool, at: Sequence[str]
) -> dict[str, str]:
    """Answer an invite with this node's key, and keep what the daemon will need.

    Args:
        folder: The node's folder.
        invite: The invite.
        key: The node's key.
        samples: Patients that it trains on.
        trains: Whether it trains at all.
        at: Multiaddrs where others can dial it.

    Returns:
        `request` (the line), `request_file`, and `network_fingerprint`, `node_fingerprint`: the
        numbers to compare over the phone.
    """
    from p2pfed.identity.invite import Request
    from p2pfed.identity.invited import Invited
    from p2pfed.identity.keys import write_private

    roles = ("train", "relay") if trains else ("bootstrap", "relay")
    request = Request.make(
        invite, key.seed, key.public_key, samples=samples, roles=roles, addresses=at
    )
    line = request.encode()
    write_private(folder / REQUEST_FILE, f"{line}\n".encode())
    Invited(invite.network, invite.network_id, invite.steward).write(folder)
    return {
        "network": invite.network,
        "network_id": invite.network_id.hex(),
        "request": line,
        "request_file": str(folder / REQUEST_FILE),
        "network_fingerprint": invite.fingerprint,
        "node_fingerprint": request.fingerprint,
    }


def next_steps(args: Namespace, made: dict[str, str]) -> list[str]:
    """What a person does after `init`, as lines; `made` is what the command prints as JSON."""
    config = shlex.quote(made["config"])
    invited = "request" in made
    samples = ("N" if args.samples is None else str(args.samples)) if args.task else "0"
    return [
        f"peer id  {made['peer_id']}",
        f"key      {made['key']}   (0600; keep a copy in a safe)",
        f"config   {made['config']}",
        *(_for_the_steward(made) if invited else _for_the_stewards(args, made, samples)),
        "Then:",
        *([] if args.task else [_TRAINS_NOT]),
        f"  p2pfed node -c {config}",
        f"  p2pfed -c {config} join APPROVAL   (the file from the steward)"
        if invited
        else f"  p2pfed -c {config} join --roster FILE --bootstrap FILE   (both from the stewards)",
        *([f"  p2pfed -c {config} run accept APPROVAL"] if invited else []),
    ]


def _for_the_steward(made: dict[str, str]) -> list[str]:
    return [
        f"request  {made['request_file']}",
        "",
        f"Send this line, or that file, to the steward of {made['network']} who invited you:",
        f"  {made['request']}",
        "Call the steward, on a number that you know, and compare:",
        f"  {made['network_fingerprint']}   (the steward reads this to you)",
        f"  {made['node_fingerprint']}   (you read this to the steward)",
    ]


def _for_the_stewards(args: Namespace, made: dict[str, str], samples: str) -> list[str]:
    roles = "train,relay" if args.task else "bootstrap,relay"
    many = " (N = the number of patients that you train on)" if samples == "N" else ""
    return [
        "",
        f"Send this line to the stewards{many}:",
        f"  p2pfed steward add ROSTER --name {shlex.quote(args.name)} --peer-id {made['peer_id']}"
        f" --roles {roles} --samples {samples} --out NEXT",
    ]
