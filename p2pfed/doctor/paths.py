"""Ways to and from the others: where we listen, what we announce, whom we dial, who reaches us.

Judges only; what they judge is gathered by `ports` and told by the daemon (/v1/reachability).
"""

from __future__ import annotations

import errno
import ipaddress
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from p2pfed.doctor.finding import Finding, fail, ok, warn
from p2pfed.doctor.ports import Endpoint

__all__ = ["Dialled", "Port", "announce", "bootstrap", "is_within", "listen", "reach"]


@dataclass(frozen=True, slots=True)
class Port:
    """One address of `node.listen`.

    Attributes:
        address: As it is written.
        endpoint: What it says; None if it is no address.
        error: The system's error number when we tried to listen there; 0: it is free.
        holder: Who listens there (process id and name), if that can be seen.
    """

    address: str
    endpoint: Endpoint | None
    error: int = 0
    holder: tuple[int, str] | None = None


def listen(ports: Sequence[Port], daemon_pid: int | None) -> Iterator[Finding]:
    """Whether each address is free, or held by our own daemon."""
    if not ports:
        yield ok("listen", "on no address: this node only dials out and is reached through relays")
    good = []
    for port in ports:
        trouble = _port_trouble(port, daemon_pid)
        if trouble is None:
            good.append(port.address)
        else:
            yield trouble
    if good:
        who = f"held by the daemon (process {daemon_pid})" if daemon_pid else "free"
        yield ok("listen", f"{', '.join(good)}: {who}")


def _port_trouble(port: Port, daemon_pid: int | None) -> Finding | None:
    end, other = port.endpoint, "set node.listen in the configuration to another port"
    if end is None or end.peer is not None or end.is_name:
        return fail(
            "listen",
            f"{port.address!r} is no address to listen on",
            "write it like /ip4/0.0.0.0/tcp/4201 in node.listen",
        )
    if port.error == 0:
        if daemon_pid is None or end.port == 0:
            return None
        return fail(
            "listen",
            f"the daemon runs, and nobody listens on {port.address}",
            "node.listen was changed since its start: restart the daemon",
        )
    if port.error == errno.EADDRINUSE:
        return _taken(port, end, daemon_pid, other)
    if port.error in {errno.EACCES, errno.EPERM}:
        return fail("listen", f"{port.address}: ports below 1024 are not for every user", other)
    if port.error == errno.EADDRNOTAVAIL:
        return fail(
            "listen",
            f"{port.address}: this machine has no such address (see: ip addr)",
            f"write /ip4/0.0.0.0/tcp/{end.port} in node.listen",
        )
    return fail("listen", f"{port.address}: {os.strerror(port.error)}", other)


def _taken(port: Port, end: Endpoint, daemon_pid: int | None, other: str) -> Finding | None:
    if port.holder is None:  # another user's, and we may not see whose
        if daemon_pid is not None:
            return None
        return fail(
            "listen",
            f"{port.address} is in use by a process that you may not see",
            f"see who: sudo ss -ltnp 'sport = :{end.port}'; stop it, or {other}",
        )
    pid, name = port.holder
    if pid == daemon_pid:
        return None
    return fail(
        "listen", f"{port.address} is in use by {name} (process {pid})", f"stop it, or {other}"
    )


def announce(addresses: Sequence[str], listens: Sequence[Endpoint]) -> Iterator[Finding]:
    """Whether what others are told can lead here."""
    troubles = [found for address in addresses if (found := _told_trouble(address)) is not None]
    if troubles:
        yield from troubles
    elif addresses:
        yield ok("announce", ", ".join(addresses))
    elif listens and all(_stays_here(each.host) for each in listens):
        yield warn(
            "announce",
            "the node listens on loopback only: no other machine can dial it",
            "set node.listen to /ip4/0.0.0.0/tcp/PORT; behind NAT set node.announce too",
        )
    else:
        yield ok("announce", "the addresses that our connections come from; none is set")


def _told_trouble(address: str) -> Finding | None:
    end = Endpoint.read(address)
    example = "write the public one like /ip4/192.0.2.7/tcp/4201 in node.announce"
    if end is None or end.peer is not None:
        return fail("announce", f"{address!r} is no address to announce", example)
    if end.port == 0 or (not end.is_name and ipaddress.ip_address(end.host).is_unspecified):
        return fail("announce", f"{address} leads nowhere: others cannot dial it", example)
    if _stays_here(end.host):
        return warn("announce", f"{address} leads each of the others to itself", example)
    return None


def _stays_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True)
class Dialled:
    """One address of one bootstrap peer.

    Attributes:
        name: Of the peer.
        endpoint: Where.
        known: Whether its host's name is known here.
        allowed: Whether `network.allowed_networks` lets us dial it.
        problem: Why no TCP connection came about; None: not tried.
    """

    name: str
    endpoint: Endpoint
    known: bool
    allowed: bool
    problem: str | None


def is_within(hosts: Iterable[str], networks: Sequence[str]) -> bool:
    """Whether any of these IP addresses lies in one of the networks; without networks, always."""
    allowed = [ipaddress.ip_network(text) for text in networks]
    return not allowed or any(
        ipaddress.ip_address(host.partition("%")[0]) in network
        for host in hosts
        for network in allowed
    )


def bootstrap(
    tried: Sequence[Dialled], *, lists: int, connected: int, offline: bool
) -> Iterator[Finding]:
    """Whether the peers that are asked first have addresses, and answer.

    Args:
        tried: Every address of all of them, our own left out.
        lists: How many lists the configuration names.
        connected: How many peers the daemon is connected with.
        offline: Whether nobody was to be dialled.
    """
    if not tried:
        yield _nobody_to_ask(lists, connected)
        return
    for one in tried:
        trouble = _unusable(one)
        if trouble is not None:
            yield trouble
    peers = {one.name for one in tried}
    usable = [one for one in tried if one.known and one.allowed]
    reached = {one.name for one in usable if one.problem == ""}
    silent = {one.name: one for one in usable if one.name not in reached}
    if offline:
        yield ok("bootstrap", f"{len(peers)} peers listed; none was dialled (--offline)")
    elif reached and len(reached) == len(peers):
        yield ok("bootstrap", f"{', '.join(sorted(reached))}: TCP connection came about")
    else:
        yield from _silent(silent, reached=len(reached), of=len(peers), connected=connected)


def _nobody_to_ask(lists: int, connected: int) -> Finding:
    if connected:
        return ok("bootstrap", f"nobody else is listed; {connected} peers are connected")
    if lists:
        return ok("bootstrap", "the lists name nobody but this node: it waits for the others")
    return warn(
        "bootstrap",
        "no list of peers to ask first (network.bootstrap)",
        'ask a steward for one; then network.bootstrap = ["bootstrap.toml"]',
    )


def _unusable(one: Dialled) -> Finding | None:
    end = one.endpoint
    if not one.known:
        return fail(
            "bootstrap",
            f"{one.name}: the name {end.host} is not known here",
            f"see whether your DNS works: getent hosts {end.host}",
        )
    if not one.allowed:
        return fail(
            "bootstrap",
            f"{one.name}: {end.host} is outside network.allowed_networks",
            "add its network there, or take the peer out of the list",
        )
    return None


def _silent(
    silent: Mapping[str, Dialled], *, reached: int, of: int, connected: int
) -> Iterator[Finding]:
    for name, one in sorted(silent.items()):
        found = f"{name} at {one.endpoint.host}:{one.endpoint.port}: {one.problem}"
        allow = f"allow TCP out to {one.endpoint.host}:{one.endpoint.port}, or ask {name}"
        if reached or connected:
            yield warn("bootstrap", f"{found} ({reached} of {of} answer)", allow)
        else:
            yield fail("bootstrap", found, allow)


def reach(told: Mapping[str, Any] | None, ports: Iterable[int]) -> Finding:
    """Whether the others reach this node, as far as it has seen itself.

    Args:
        told: What /v1/reachability says; None without a daemon, or with one that is older.
        ports: Where we listen.
    """
    if told is None:
        return ok("reach", "not known until the daemon runs and peers are connected")
    links = told["connections"]
    inbound, relays = links["direct_in"], told["relays"]
    names = ", ".join(relay["name"] for relay in relays)
    if not sum(links.values()):
        return warn(
            "reach",
            "no peer is connected",
            "see the rows bootstrap and roster; then: p2pfed peers",
        )
    if told["visited"] == "outside":
        return ok("reach", f"members dial this node directly ({inbound} connected so)")
    if told["visited"] == "near" and not told["relay_wanted"]:
        return ok("reach", f"members of the same house dial it directly ({inbound} connected so)")
    if relays:
        return ok("reach", f"nobody has dialled it directly; reached through {names}")
    opened = ", ".join(str(port) for port in ports) or "PORT"
    if told["mode"] == "never":
        return warn(
            "reach",
            'nobody has dialled this node directly, and network.reach is "never"',
            f'open TCP {opened} inbound, or set network.reach = "auto"',
        )
    return warn(
        "reach",
        "nobody has dialled this node directly, and no relay has a place for it"
        f" ({told['possible_relays']} connected members may be relays)",
        f"open TCP {opened} inbound, or ask a reachable member to set network.relay = true",
    )
