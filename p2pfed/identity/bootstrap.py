"""Bootstrap lists: addresses plus identities of the peers that a node asks first.

A list grants no membership and is not signed: whom it names is checked by the handshake, who may
join by the roster. So an address without `/p2p/ID` is refused, and a forged list can only waste
time.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from p2pfed.errors import ConfigError, FactRejected
from p2pfed.identity.keys import public_key_of

__all__ = ["BootstrapList", "BootstrapPeer"]

_ADDRESS = re.compile(r"/(?:ip4|ip6|dns|dns4|dns6)/[^/\s]+/tcp/(\d{1,5})/p2p/([^/\s]+)")


@dataclass(frozen=True, slots=True)
class BootstrapPeer:
    """One peer to ask first.

    Attributes:
        name: For people.
        peer_id: Who must answer there.
        addresses: Multiaddrs with `/p2p/ID`.
    """

    name: str
    peer_id: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BootstrapList:
    """One bootstrap file.

    Attributes:
        network: Name of the network, for people.
        network_id: Hash of the network's first roster, 64 hex digits, or empty.
        peers: The peers, in the order of the file.
    """

    network: str
    network_id: str
    peers: tuple[BootstrapPeer, ...]

    @classmethod
    def parse(cls, text: str, where: str) -> BootstrapList:
        """Read a bootstrap file.

        Args:
            text: The TOML text.
            where: Name of the file, for errors.

        Raises:
            ConfigError: Not TOML, an unknown key, or an address without an identity.
        """
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{where} is not TOML", str(error)) from error
        return cls.of(data, where)

    @classmethod
    def of(cls, data: Mapping[str, Any], where: str) -> BootstrapList:
        """Check an already decoded bootstrap file; raises ConfigError."""
        unknown = sorted(set(data) - {"version", "network", "network_id", "peer"})
        peers = data.get("peer", [])
        if unknown or data.get("version") != 1 or not isinstance(peers, list):
            raise ConfigError(
                f"{where} is not a bootstrap list",
                f"unknown key {unknown[0]!r}" if unknown else "it must say version = 1",
                "see bootstrap/example.toml",
            )
        network_id = data.get("network_id", "")
        if not isinstance(network_id, str) or not re.fullmatch("([0-9a-f]{64})?", network_id):
            raise ConfigError(f"{where}: network_id must be 64 hex digits")
        return cls(
            str(data.get("network", "")), network_id, tuple(_read_peer(p, where) for p in peers)
        )


def _read_peer(data: Any, where: str) -> BootstrapPeer:
    addresses = data.get("addrs") if isinstance(data, dict) else None
    if not addresses or not isinstance(addresses, list) or not set(data) <= {"name", "addrs"}:
        raise ConfigError(f"{where}: each [[peer]] has `name` and `addrs`, and nothing else")
    found = set()
    for address in addresses:
        match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
        if match is None or not 0 < int(match[1]) < 1 << 16:
            raise ConfigError(
                f"{where}: {address!r:.120} is not a usable address",
                "without an identity anyone could answer there",
                "write e.g. /dns4/p2p.example.org/tcp/4201/p2p/12D3KooW…",
            )
        found.add(match[2])
    try:
        for peer_id in found:
            public_key_of(peer_id)
    except FactRejected as error:
        raise ConfigError(f"{where}: {error.what}", error.why) from error
    if len(found) != 1:
        raise ConfigError(f"{where}: the addresses of one peer name {len(found)} identities")
    return BootstrapPeer(str(data.get("name", "")), found.pop(), tuple(addresses))
