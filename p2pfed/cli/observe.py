"""status, peers, version: one GET each, joined with the trainer's private socket.

The network process never relays what the private socket says; it is read here, on the client side,
and silently left out where the caller may not read it.
"""

from __future__ import annotations

from p2pfed import __version__
from p2pfed.cli.locate import admin_client, private_data
from p2pfed.cli.options import describe, with_socket
from p2pfed.cli.text import emit, number, short_id, size, span, table
from p2pfed.errors import P2PFedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Iterator
    from typing import Any

__all__ = ["field_lines", "peers", "privacy_line", "status", "version"]


# --- status ------------------------------------------------------------------------------------


def status(parser: ArgumentParser) -> None:
    """Fill in the command `status`."""
    describe(
        parser,
        "What this node does, on one screen. Lines with # are warnings. Measures of the local\n"
        "model appear where you may read the trainer's private socket.",
        endpoint="GET /v1/status   (and GET /v1/metrics, /v1/ledger of the private socket)",
    )
    with_socket(parser)
    parser.set_defaults(run=_status)


def _status(args: Namespace) -> None:
    data = admin_client(args).get("/v1/status")
    private = _private(args, "metrics", "ledger")
    if args.json:
        data = {**data, "private": private}
    emit(args, "status", data, _status_lines(data, private))


def _private(args: Namespace, *endpoints: str) -> dict[str, Any]:
    read = {name: private_data(args, name) for name in endpoints}
    return {name: value for name, value in read.items() if value is not None}


def _status_lines(data: dict[str, Any], private: dict[str, Any]) -> Iterator[str]:
    me = f"{data['name']}  {short_id(data['peer_id'])}  up {span(data['uptime_s'])}"
    yield f"{me}   {_network(data)}"
    yield f"run       {_run(data.get('run'))}"
    yield f"sharing   {_contributing(data)}"
    yield f"privacy   {privacy_line(data['privacy'])}"
    measured = _last_measures(private.get("metrics"))
    if measured:
        yield f"private   {measured}   (stays on this machine)"
    counts = [f"{n} {state}" for state, n in data["peers"].items() if n or state == "alive"]
    traffic = data["traffic"]
    yield (
        f"peers     {' · '.join(counts)}      "
        f"traffic  ↑{size(traffic['sent_bytes'])} ↓{size(traffic['received_bytes'])}"
    )
    relay = data.get("relay") or {}
    if relay.get("circuits") or relay.get("relayed_bytes"):
        circuits, passed = relay["circuits"], size(relay["relayed_bytes"])
        yield f"relay     {circuits} circuits, {passed} passed on, unread"
    trainer = data["trainer"]
    restarts = f", {trainer['restarts']} restarts" if trainer.get("restarts") else ""
    yield f"trainer   {trainer['state']}{restarts}"
    yield from (f"# warning: {warning}" for warning in data["health"])
    if data["version"] != __version__:
        yield f"# warning: this is p2pfed {__version__}, the daemon is {data['version']}"


def _network(data: dict[str, Any]) -> str:
    network, roster = data.get("network"), data.get("roster")
    if not roster:
        return "no roster yet: p2pfed join --roster FILE"
    until = f"expires {roster['expires'][:10]}" if not roster["expired"] else "EXPIRED"
    return (
        f"network {network['name'] if network else '-'}  roster v{roster['version']} "
        f"({roster['threshold']} of {roster['stewards']} stewards, {roster['members']} members, "
        f"{until})"
    )


def _run(run: dict[str, Any] | None) -> str:
    if not run:
        return "none; see: p2pfed run list"
    model = f"model {run['model_hash'][:12]} after round {run['model_round']}, "
    return (
        f"{run['name']} ({run['task']})   round {run['round']}/{run['rounds']}   {run['phase']}   "
        f"{model if run['model_hash'] else ''}{run['deltas']} deltas"
    )


def _contributing(data: dict[str, Any]) -> str:
    contributing = data["contributing"]
    if contributing["yes"]:
        return "contributing"
    reason = contributing["reason"] or ("" if data["sharing"] else "sharing is off")
    return f"not contributing{': ' if reason else ''}{reason}; still receiving"


def privacy_line(privacy: dict[str, Any]) -> str:
    """What GET /v1/privacy says, on one line."""
    mechanism = privacy.get("mechanism")
    if mechanism is None:
        return "nothing is released yet"
    if mechanism == "none":
        return 'mechanism "none": UPDATES LEAVE THIS HOSPITAL UNPROTECTED'
    unit = f" per {privacy['unit']}" if privacy.get("unit") else ""
    unit += f" ({privacy['relation']})" if privacy.get("relation") else ""
    spent, limit = number(privacy["spent_epsilon"]), number(privacy["epsilon"])
    text = (
        f"{mechanism}{unit}   ε {spent} of {limit} spent (δ {number(privacy['delta'])})   "
        f"{privacy['releases']} releases"
    )
    forecast = privacy.get("forecast_round")
    return text if forecast is None else f"{text}   stops by itself at round ≈ {forecast}"


def _last_measures(answer: Any) -> str:
    """The newest line of the private socket's `{"metrics": [{"round", "values"}, ...]}`."""
    try:
        last = answer["metrics"][-1]
        values = "  ".join(f"{key} {number(value)}" for key, value in last["values"].items())
        return f"{values}  after round {last['round']}"
    except (TypeError, KeyError, IndexError, AttributeError, ValueError):
        return ""


# --- peers -------------------------------------------------------------------------------------


def peers(parser: ArgumentParser) -> None:
    """Fill in the command `peers`."""
    describe(
        parser,
        "The other members and what this node has seen of them; with PEER all about one.",
        endpoint="GET /v1/peers, GET /v1/peers/{id}",
    )
    parser.add_argument("peer", nargs="?", help="name, peer id, or a unique beginning of it")
    with_socket(parser)
    parser.set_defaults(run=_peers)


def _peers(args: Namespace) -> None:
    client = admin_client(args)
    if args.peer is not None:
        from urllib.parse import quote

        peer = client.get(f"/v1/peers/{quote(args.peer, safe='')}")
        emit(args, "peer", peer, field_lines(peer))
        return
    found = client.get("/v1/peers")
    head = ("NAME", "STATE", "ROUND", "RTT", "PATH", "SENT", "RECV", "MODEL", "SEEN", "ROLES")
    emit(args, "peers", found, table(head, [_peer_row(peer) for peer in found]))


def _peer_row(peer: dict[str, Any]) -> tuple[str, ...]:
    rtt = peer.get("rtt_ms")
    return (
        peer["name"],
        peer["state"],
        _or_dash(peer.get("round")),
        "-" if rtt is None else f"{rtt:.3g} ms",
        _or_dash(peer.get("path")),
        size(peer.get("sent_bytes")),
        size(peer.get("received_bytes")),
        _or_dash(peer.get("model_hash"))[:12],
        span(peer.get("seen_s")),
        ",".join(peer.get("roles") or ()),
    )


def _or_dash(value: Any) -> str:
    return "-" if value in {None, ""} else str(value)


def field_lines(data: dict[str, Any]) -> list[str]:
    """One line per field, aligned."""
    width = max(map(len, data), default=0)
    return [f"{key:<{width}}  {_plain(value)}" for key, value in data.items()]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(_plain(item) for item in value) or "-"
    if isinstance(value, dict):
        return "  ".join(f"{key}={_plain(item)}" for key, item in value.items()) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, float) else _or_dash(value)


# --- version -----------------------------------------------------------------------------------


def version(parser: ArgumentParser) -> None:
    """Fill in the command `version`."""
    describe(
        parser,
        "The version of this program, and of the daemon where one answers.",
        endpoint="GET /v1/version",
    )
    with_socket(parser)
    parser.set_defaults(run=_version)


def _version(args: Namespace) -> None:
    try:
        daemon = admin_client(args, timeout=3.0).get("/v1/version")["version"]
    except P2PFedError:
        daemon = None
    emit(
        args,
        "version",
        {"client": __version__, "daemon": daemon},
        [f"p2pfed {__version__}", *([f"daemon {daemon}"] if daemon else [])],
    )
