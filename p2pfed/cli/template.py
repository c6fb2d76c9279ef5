"""The configuration that `p2pfed init` writes: every key of `p2pfed.config`, with a comment.

Invariant: what it returns loads with `load_settings`, and names every key (held by a test).
"""

from __future__ import annotations

import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["configuration"]

_TEMPLATE = """\
# p2pfed node. Check it with: p2pfed config check FILE
# Flags and P2PFED_SECTION__KEY in the environment go before this file; [privacy] is set here only.
# Paths are relative to this file.

[node]
name = {name}
data_dir = "."                 # key, rosters, runs, deltas, sockets; must be 0700
# key_file = "node.key"        # default: data_dir/node.key; must be 0600
listen = {listen}              # libp2p multiaddrs, TCP
announce = []                  # public multiaddrs, when they differ from `listen` (NAT)

[network]
id = ""                        # 64 hex digits; "" takes it from the first roster you join with
bootstrap = []                 # files with the peers to ask first
rejoin = true                  # after a crash or a reboot; a `p2pfed leave` is remembered apart
relay = false                  # true: lead members to those that can only dial out
reach = "auto"                 # by relays too: auto (while nobody dials us), always or never
allowed_networks = []          # e.g. ["10.0.0.0/8"]: nobody else is dialled or heard; [] is all
upload_limit_mbit = 0          # a second, for models and updates; 0 is no limit

[admin]
# socket = "admin.sock"        # default: data_dir/admin.sock; at most 107 bytes
mode = "0600"                  # "0660" lets the socket's group in

[train]
enabled = {enabled}
task = {task}                  # a task that is installed here, e.g. "heart-disease"
{data_line}
device = "auto"                # auto, cpu or cuda
# socket = "trainer.sock"      # private: local measures and the ledger; default: in data_dir
{options_line}

[privacy]                      # this hospital's own limits; a run can only be stricter
{epsilon_line}
delta = 1e-5
unit = "patient"
allow_none = false             # true: also accept runs that release unprotected updates
{ledger_line}

[log]
level = "info"                 # debug, info, warning or error
"""


def configuration(
    *,
    name: str,
    listen: Sequence[str],
    task: str,
    data: str | None,
    epsilon: str | None,
    options: Mapping[str, str | int],
    ledger: str | None,
) -> str:
    """The text of a new configuration.

    Args:
        name: The node's name.
        listen: Multiaddrs.
        task: The task's name; "" makes a bootstrap-only node.
        data: Path of the hospital's data.
        epsilon: Lifetime budget as a decimal number.
        options: What the task wants to know of this hospital.
        ledger: Absolute path of the privacy ledger, written down so that no environment moves it.
    """
    return _TEMPLATE.format(
        name=_text(name),
        listen="[" + ", ".join(_text(address) for address in listen) + "]",
        enabled="true" if task else "false",
        task=_text(task),
        data_line=(
            '# data = "/path"               # folder or file with this hospital\'s patients'
            if data is None
            else f"data = {_text(data)}"
        ),
        options_line="options = {"
        + ", ".join(f"{_text(key)} = {json.dumps(value)}" for key, value in options.items())
        + "}   # what the task wants to know of this hospital",
        epsilon_line=(
            "# epsilon = 8                  # lifetime budget of the data set; there is no default"
            if epsilon is None
            else f"epsilon = {_text(epsilon)}   # lifetime budget of the data set, over all runs"
        ),
        ledger_line=(
            '# ledger = "/var/lib/p2pfed/ledger.db"'
            if ledger is None
            else f"ledger = {_text(ledger)}"
        )
        + "   # one per data set, shared by all nodes that train on it",
    )


def _text(value: str) -> str:
    return json.dumps(value)  # a JSON string of printable characters is a TOML basic string
