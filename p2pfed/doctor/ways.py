"""Tries the ways that `paths` judges: our own ports, and the peers that are asked first.

Every name is looked up and every peer dialled at once, so that many dead ones take no longer than
one. A TCP connection is opened and closed again; nothing is said on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from p2pfed.doctor import ports
from p2pfed.doctor.paths import Dialled, Port, is_within
from p2pfed.doctor.ports import Endpoint
from p2pfed.identity.bootstrap import BootstrapList
from p2pfed.small_files import read_small

__all__ = ["addresses", "dialled", "lists_of", "not_dialled", "ports_of"]

_CONNECT = 3.0  # seconds for a TCP connection
_LOOK_UP = 6.0  # seconds for names; a resolver that is down takes longer
_Wanted = list[tuple[str, Endpoint]]  # name of a peer, one of its addresses


def ports_of(listen: Iterable[str]) -> list[Port]:
    """Try each address of `node.listen`, and see who holds those that are taken."""
    found = []
    for address in listen:
        end = Endpoint.read(address)
        if end is None or end.is_name or end.peer:
            found.append(Port(address, end))
            continue
        error = ports.free_to_listen(end)
        found.append(Port(address, end, error, ports.holder(end.port) if error else None))
    return found


def lists_of(files: Iterable[Path]) -> list[BootstrapList]:
    """Read bootstrap lists; raises ConfigError and OSError."""
    return [BootstrapList.parse(read_small(file)[0].decode(), str(file)) for file in files]


def addresses(lists: Iterable[BootstrapList], *, but: str) -> _Wanted:
    """All addresses of all peers in some lists, but one peer's (our own)."""
    return [
        (peer.name or peer.peer_id, end)
        for listed in lists
        for peer in listed.peers
        if peer.peer_id != but
        for end in map(Endpoint.read, peer.addresses)
        if end is not None
    ]


def not_dialled(wanted: _Wanted) -> list[Dialled]:
    """What is known of addresses without the network."""
    return [Dialled(name, end, known=True, allowed=True, problem=None) for name, end in wanted]


def dialled(wanted: _Wanted, networks: Sequence[str]) -> list[Dialled]:
    """Look up and dial addresses, all at once.

    Args:
        wanted: The addresses.
        networks: `network.allowed_networks`.
    """
    ends = [end for _, end in wanted]
    nobody: list[str] = []
    found = ports.at_once([partial(ports.resolved, end) for end in ends], _LOOK_UP, nobody)
    calls = [partial(ports.connects, end, _CONNECT) for end in ends]
    problems = ports.at_once(calls, _CONNECT + 1, f"no answer within {_CONNECT:g} s")
    return [
        Dialled(name, end, bool(hosts), is_within(hosts, networks), problem)
        for (name, end), hosts, problem in zip(wanted, found, problems, strict=True)
    ]
