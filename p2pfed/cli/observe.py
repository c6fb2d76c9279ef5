"""status, peers, version: one GET each, joined with the trainer's private socket.

The network process never relays what the private socket says; it is read here, on the client side,
and silently left out where the caller may not read it.
"""

from __future__ import annotations

from p2pfed import __version__
from p2pfed.cli.locate import admin_client, private_data
from p2pfed.cli.options import describe, with_socket
from p2pfed.cli.text import columns, cut, emit, number, short_id, size, span, table, took
from p2pfed.errors import P2PFedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Iterator
    from typing import Any

    from p2pfed.admin.client import Client

__all__ = [
    "agrees",
    "field_lines",
    "model_word",
    "peer_row",
    "peers",
    "privacy_words",
    "status",
    "time_split",
    "version",
]

STATES = ("alive", "suspect", "away", "left", "revoked", "unknown")


# --- status ------------------------------------------------------------------------------------


def status(parser: ArgumentParser) -> None:
    """Fill in the command `status`."""
    describe(
        parser,
        "What this node does, on one screen. Lines with # are warnings. Measures of the local\n"
        "model appear where you may read the trainer's private socket. Exit 1 where the node has\n"
        "left the network, 3 where no daemon runs.",
        endpoint="GET /v1/status, GET /v1/peers, and of the private socket\n"
        "  GET /v1/metrics, GET /v1/status, GET /v1/ledger",
    )
    with_socket(parser)
    parser.set_defaults(run=_status)


def _status(args: Namespace) -> int:
    client = admin_client(args)
    data = client.get("/v1/status")
    private = _private(args, "metrics", "status", "ledger")
    run = data.get("run")
    agreement = _agreement(run, client.get("/v1/peers")) if run and run["model_hash"] else None
    if args.json:
        data = {**data, "private": private, "agreement": agreement}
    present = bool(data.get("present", True))
    emit(args, "status", data, _status_lines(data, private, agreement), ok=present)
    return 0 if present else 1


def _private(args: Namespace, *endpoints: str) -> dict[str, Any]:
    read = {name: private_data(args, name) for name in endpoints}
    return {name: value for name, value in read.items() if value is not None}


def _agreement(run: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Names of the peers that hold our model of our round, and of those that hold another."""
    told: dict[str, list[str]] = {"same": [], "differ": []}
    for peer in found:
        verdict = agrees(peer, run)
        if verdict is not None:
            told["same" if verdict else "differ"].append(peer["name"])
    return told


def agrees(peer: dict[str, Any], run: dict[str, Any] | None) -> bool | None:
    """Whether a peer holds the model that we hold; None where it is not of the same round."""
    if not run or not run.get("model_hash") or not peer.get("model_hash"):
        return None
    if peer.get("model_round") != run["model_round"]:
        return None
    return bool(peer["model_hash"] == run["model_hash"])


def _status_lines(
    data: dict[str, Any], private: dict[str, Any], agreement: dict[str, list[str]] | None
) -> Iterator[str]:
    yield f"{data['name']}   {short_id(data['peer_id'])}   up {span(data['uptime_s'])}"
    yield f"network   {_network(data)}"
    yield f"run       {_run(data.get('run'))}"
    if agreement is not None:
        yield f"model     {_model(data['run'], agreement)}"
    yield f"sharing   {_contributing(data)}"
    spent, forecast = privacy_words(data["privacy"], (data.get("run") or {}).get("rounds"))
    yield f"privacy   {spent}"
    if forecast:
        yield f"          {forecast}"
    shared = _shared_measure(data)
    if shared:
        yield f"measure   {shared}"
    measured = _last_measures(private.get("metrics"))
    if measured:
        stays = "only as above leaves" if shared else "stays on this machine"
        yield f"private   {measured}   ({stays})"
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
    at_hand, split = _at_hand(private.get("status")), time_split(private.get("status"))
    yield f"trainer   {trainer['state']}{restarts}{at_hand}"
    if split:
        yield f"time      {split}"
    yield from (f"# warning: {warning}" for warning in data["health"])
    note = _newest_note(private.get("status"))
    if note:
        yield f"# the trainer notes: {note}"
    if data["version"] != __version__:
        yield f"# warning: this is p2pfed {__version__}, the daemon is {data['version']}"


def _shared_measure(data: dict[str, Any]) -> str:
    if data["privacy"].get("share_metrics") != "rounded":
        return ""
    told = data.get("measure")
    if told is None:
        return "metric shared with all members, outside ε: none yet"
    value = f"{told['name']} {number(told['value'])} after round {told['round']}"
    return f"{value}   (shared with all members, outside ε)"


def _network(data: dict[str, Any]) -> str:
    network, roster = data.get("network"), data.get("roster")
    if not roster:
        return "no roster yet: p2pfed join --roster FILE"
    until = f"until {roster['expires'][:10]}" if not roster["expired"] else "EXPIRED"
    return (
        f"{network['name'] if network else '-'}   roster v{roster['version']}, {until}   "
        f"{roster['members']} members, {roster['threshold']} of {roster['stewards']} stewards"
    )


def _run(run: dict[str, Any] | None) -> str:
    if not run:
        return "none; see: p2pfed run list"
    return (
        f"{run['name']} ({run['task']})   round {run['round']}/{run['rounds']}   {run['phase']}   "
        f"{run['deltas']} deltas"
    )


def _model(run: dict[str, Any], agreement: dict[str, list[str]]) -> str:
    same, differ = agreement["same"], agreement["differ"]
    text = f"{run['model_hash'][:12]} after round {run['model_round']}"
    if same or differ:
        text += f"   {len(same)} of {len(same) + len(differ)} peers at this round hold the same"
    return f"{text}; NOT: {', '.join(differ)}" if differ else text


def _contributing(data: dict[str, Any]) -> str:
    contributing = data["contributing"]
    if contributing["yes"]:
        return "contributing"
    reason = contributing["reason"] or ("" if data["sharing"] else "sharing is off")
    still = "; still receiving" if data.get("present", True) else ""
    return f"not contributing{': ' if reason else ''}{reason}{still}"


def privacy_words(privacy: dict[str, Any], rounds: int | None = None) -> tuple[str, str]:
    """What GET /v1/privacy says: what was spent, and the forecast (may be empty).

    Args:
        privacy: The answer.
        rounds: How many the run has, where that is known.
    """
    mechanism = privacy.get("mechanism")
    if mechanism is None:
        return "nothing is released yet", ""
    if mechanism == "none":
        return 'mechanism "none": UPDATES LEAVE THIS HOSPITAL UNPROTECTED', ""
    unit = f" per {privacy['unit']}" if privacy.get("unit") else ""
    unit += f" ({privacy['relation']})" if privacy.get("relation") else ""
    spent, limit = number(privacy["spent_epsilon"]), number(privacy["epsilon"])
    text = (
        f"{mechanism}{unit}   ε {spent} of {limit} spent (δ {number(privacy['delta'])})   "
        f"{privacy['releases']} releases"
    )
    forecast = privacy.get("forecast_round")
    if forecast is None:
        return text, ""
    if rounds is not None and forecast >= rounds:
        return text, "lasts to the end of the run"
    return text, f"stops by itself at round ≈ {forecast}"


def _last_measures(answer: Any) -> str:
    """The newest line of the private socket's `{"metrics": [{"round", "values"}, ...]}`."""
    try:
        last = answer["metrics"][-1]
        values = "  ".join(f"{key} {number(value)}" for key, value in last["values"].items())
        return f"{values}  after round {last['round']}"
    except (TypeError, KeyError, IndexError, AttributeError, ValueError):
        return ""


def _at_hand(answer: Any) -> str:
    """The step that the trainer is at, from `progress` of its private status."""
    try:
        now = answer["progress"]
        return f"   {now['step']} {now['done']}/{now['of']}, {span(now['seconds'])} so far"
    except (TypeError, KeyError, ValueError):
        return ""


def _newest_note(answer: Any) -> str:
    """The last of `notes` of the trainer's private status, and how many there are besides."""
    try:
        *others, newest = answer["notes"]
        return f"{newest}{f'   ({len(others)} more: p2pfed task log)' if others else ''}"
    except (TypeError, KeyError, ValueError):
        return ""


def time_split(answer: Any) -> str:
    """What the last round's time went to, from `rounds` of the trainer's private status."""
    try:
        last = answer["rounds"][-1]
        whole = sum(last["seconds"].values())
        parts = sorted(last["seconds"].items(), key=lambda item: -item[1])
        shares = (f"{kind} {seconds / whole:.0%}" for kind, seconds in parts)
        failed = ", which failed" if last.get("event") == "failed" else ""
        return f"{'  '.join(shares)}   of {took(whole)}, round {last['round']}{failed}"
    except (TypeError, KeyError, IndexError, AttributeError, ValueError, ZeroDivisionError):
        return ""


# --- peers -------------------------------------------------------------------------------------


def peers(parser: ArgumentParser) -> None:
    """Fill in the command `peers`."""
    describe(
        parser,
        "The other members and what this node has seen of them; with PEER all about one. MODEL is\n"
        "`same` where a peer holds the model that this node holds, ≠ and its hash where it holds\n"
        "another of the same round, else the round that its model is of.",
        endpoint="GET /v1/peers, GET /v1/peers/{id}, GET /v1/status",
    )
    parser.add_argument("peer", nargs="?", help="name, peer id, or a unique beginning of it")
    parser.add_argument("--state", choices=STATES, help="only those in this state")
    parser.add_argument("-w", "--watch", action="store_true", help="go on until interrupted")
    parser.add_argument("--interval", default="2", metavar="TIME", help="with -w; default: 2 s")
    with_socket(parser)
    parser.set_defaults(run=_peers)


def _peers(args: Namespace) -> None:
    client = admin_client(args)
    if args.peer is not None:
        from urllib.parse import quote

        peer = client.get(f"/v1/peers/{quote(args.peer, safe='')}")
        emit(args, "peer", peer, field_lines(peer))
    elif args.watch:
        from p2pfed.cli.redraw import redraw

        redraw(args, lambda: _peers_now(args, client))
    else:
        data, lines = _peers_now(args, client)
        emit(args, "peers", data, lines)


def _peers_now(args: Namespace, client: Client) -> tuple[list[dict[str, Any]], list[str]]:
    found = [peer for peer in client.get("/v1/peers") if args.state in {None, peer["state"]}]
    if args.json:
        return found, []
    return found, _peer_table(found, client.get("/v1/status").get("run"))


def _peer_table(found: list[dict[str, Any]], run: dict[str, Any] | None) -> list[str]:
    """At most as wide as the terminal: names give way."""
    names = {peer["measure"]["name"] for peer in found if peer.get("measure")}
    metric = cut(names.pop().upper(), 8) if len(names) == 1 else "METRIC"
    head = ("NAME", "STATE", "ROUND", "RTT", "PATH", "SENT", "RECV", "MODEL", metric, "SEEN")
    rows = [peer_row(peer, run) for peer in found]
    lines = table(head, rows)
    over = max(map(len, lines)) - columns()
    if over > 0:
        longest = max(len(row[0]) for row in rows)
        width = max(6, longest - over)
        lines = table(head, [(cut(row[0], width), *row[1:]) for row in rows])
    return lines


def peer_row(peer: dict[str, Any], run: dict[str, Any] | None) -> tuple[str, ...]:
    """Name, state, round, round-trip time, path, sent, received, model, metric, seen."""
    rtt, measure = peer.get("rtt_ms"), peer.get("measure")
    return (
        peer["name"],
        peer["state"],
        _or_dash(peer.get("round")),
        "-" if rtt is None else f"{rtt:.3g} ms",
        _or_dash(peer.get("path")).partition(" ")[0],  # which relay: see p2pfed peers PEER
        size(peer.get("sent_bytes")),
        size(peer.get("received_bytes")),
        model_word(peer, run),
        number(measure["value"]) if measure else "-",
        _ago(peer.get("seen_s")),
    )


def _ago(seconds: float | None) -> str:
    """A span in its greatest unit alone: the second would not fit."""
    text = span(seconds)
    return text if seconds is None or seconds < 3600 else text.partition(" ")[0]


def model_word(peer: dict[str, Any], run: dict[str, Any] | None) -> str:
    """How a peer's model stands to ours, in at most 7 characters."""
    verdict = agrees(peer, run)
    if verdict is not None:
        return "same" if verdict else f"≠{peer['model_hash'][:6]}"
    if not peer.get("model_hash"):
        return "-"
    of = peer.get("model_round")
    return peer["model_hash"][:7] if of is None else f"of {of}"


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
