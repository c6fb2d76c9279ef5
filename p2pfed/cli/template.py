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
announce = {announce}                  # public multiaddrs, when they differ from `listen` (NAT)

[network]
id = {network_id}                        # 64 hex digits; "": that of the first roster
bootstrap = []                 # files with the peers to ask first
rejoin = true                  # after a crash or a reboot; a `p2pfed leave` is remembered apart
relay = false                  # true: lead members to those that can only dial out
reach = "auto"                 # by relays too: auto (while nobody dials us), always or never
allowed_networks = []          # e.g. ["10.0.0.0/8"]: nobody else is dialled or heard; [] is all
upload_limit_mbit = 0          # a second, for models and updates; 0 is no limit

[admin]
# socket = "admin.sock"        # default: data_dir/admin.sock; at most 107 bytes
mode = "0600"                  # "0660" lets the socket's group read
group = ""                     # the socket's group; "" is the daemon's own
operators = []                 # users who may change things as the daemon's user and root may

[train]
enabled = {enabled}
task = {task}                  # a task that is installed here, e.g. "heart-disease"
{data_line}
device = "auto"                # auto, cpu, cuda, mps or xpu
gpus = "auto"                  # how many of them one round is spread over; with cpu: processes
precision = "auto"             # bf16 where the device has it; or float32, bf16
{options_line}
patience = 0                   # stop releasing after so many rounds without a better model
longest_round = 86400.0        # seconds; a trainer that takes longer is taken for hung
memory_gb = 0.0                # limit of the trainer; 0 is none
user = ""                      # the trainer is a service of this other user; "" is a child
# socket = "trainer.sock"      # private: local measures and the ledger; default: in data_dir
# loop_socket = "loop.sock"    # where a training loop of your own joins, with task = "loop"
# state = "trainer"            # the trainer's own files: private parameters, tuned models, caches

[privacy]                      # this hospital's own limits; a run can only be stricter
{epsilon_line}
delta = 1e-5
unit = "patient"
allow_none = false             # true: also accept runs that release unprotected updates
{ledger_line}
share_metrics = "off"          # "rounded": the main metric, two digits, to all members; outside ε

[log]
level = "info"                 # debug, info, warning or error
format = "auto"                # text on a terminal, else JSON; or: text, json
# file = "p2pfed.log"          # default: standard error

[metrics]
listen = ""                    # host:port for Prometheus; "" is the admin socket only
"""


def configuration(
    *,
    name: str,
    listen: Sequence[str],
    announce: Sequence[str] = (),
    network_id: str = "",
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
        announce: Public multiaddrs.
        network_id: The network that the node is pinned to, 64 hex digits, or "".
        task: The task's name; "" makes a bootstrap-only node.
        data: Path of the hospital's data.
        epsilon: Lifetime budget as a decimal number.
        options: What the task wants to know of this hospital.
        ledger: Absolute path of the privacy ledger, written down so that no environment moves it.
    """
    return _TEMPLATE.format(
        name=_text(name),
        listen=_list(listen),
        announce=_list(announce),
        network_id=_text(network_id),
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


def _list(values: Sequence[str]) -> str:
    return "[" + ", ".join(map(_text, values)) + "]"


def _text(value: str) -> str:
    return json.dumps(value)  # a JSON string of printable characters is a TOML basic string
