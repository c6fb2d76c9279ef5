"""Addresses: where a member is reached, through whom, and from where others may come. Pure.

Direct: ``/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT[/p2p/PEER]``. Circuit: ``DIRECT/p2p/RELAY/p2p-circuit
[/p2p/PEER]``, or without DIRECT for who has a link to the relay already. Networks: CIDR lists.

Invariants: what parses, parses to the same value again from its text; an address names nobody but
the peer it leads to and the relay it goes through; there is no circuit within a circuit. Every
mistake is a :class:`ConfigError`. An IPv4 address and its IPv6 form (``::ffff:192.0.2.1``, as a
socket for both families reports it) are one address.

Source: multiformats/multiaddr; libp2p/specs addressing/README.md and relay/circuit-v2.md; RFC 4291
section 2.5.5.2. Not here: names looked up and sockets (``host``), choosing a relay
(``reservations``).
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from p2pfed.errors import ConfigError, FactRejected
from p2pfed.identity.keys import public_key_of

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Circuit", "Direct", "Networks", "pack", "parse_address", "parse_direct", "unpack"]

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_HOSTS = ("ip4", "ip6", "dns", "dns4", "dns6")
_LONGEST = 1024  # characters; a name has at most 253, two peer ids 52 each


@dataclass(frozen=True, slots=True)
class Direct:
    """A TCP endpoint.

    Attributes:
        kind: ``ip4``, ``ip6``, ``dns``, ``dns4`` or ``dns6``.
        host: The address or name.
        port: The TCP port; 0 only makes sense for listening.
        peer: Who answers there (base58), if the address says so.
    """

    kind: str
    host: str
    port: int
    peer: str | None = None

    def __str__(self) -> str:
        named = "" if self.peer is None else f"/p2p/{self.peer}"
        return f"/{self.kind}/{self.host}/tcp/{self.port}{named}"

    @property
    def is_wildcard(self) -> bool:
        """Whether it is one to listen on and not one to dial."""
        if self.port == 0:
            return True
        return self.kind in ("ip4", "ip6") and ipaddress.ip_address(self.host).is_unspecified


@dataclass(frozen=True, slots=True)
class Circuit:
    """A way through a relay.

    Attributes:
        relay: The relay's peer id, base58.
        target: The peer id at the other end, base58.
        through: Where the relay is; None for whoever has a link to it already.
    """

    relay: str
    target: str
    through: Direct | None = None

    def __str__(self) -> str:
        first = f"/p2p/{self.relay}" if self.through is None else str(self.through)
        return f"{first}/p2p-circuit/p2p/{self.target}"


def parse_direct(address: str, peer: str | None = None) -> Direct:
    """Read an address to listen on or to dial.

    Args:
        address: Its text.
        peer: The peer that it may name; None: it names nobody.

    Raises:
        ConfigError: It is no such address, or names somebody else.
    """
    parts = _parts(address)
    direct = _direct(parts[:2])
    if direct is not None and not parts[2:]:
        return direct
    if direct is not None and peer is not None and parts[2:] == [("p2p", peer)]:
        return Direct(direct.kind, direct.host, direct.port, peer)
    raise ConfigError(
        f"{address!r} is not a usable address",
        "Noise and yamux run over TCP, and an address may name only the peer it leads to.",
        "Write it like /ip4/192.0.2.1/tcp/4001 or /dns4/hospital.example/tcp/4001.",
    )


def parse_address(address: str, peer: str) -> Direct | Circuit:
    """Read an address under which ``peer`` is said to be reached, directly or through a relay.

    Raises:
        ConfigError: It is no such address, or leads to somebody else.
    """
    parts = _parts(address)
    if all(name != "p2p-circuit" for name, _ in parts):
        return parse_direct(address, peer)
    through, rest = _direct(parts[:2]), parts
    if through is not None:
        rest = parts[2:]
    match rest:
        case [("p2p", relay), ("p2p-circuit", _), *target] if (
            target in ([], [("p2p", peer)]) and relay != peer and _is_peer(relay)
        ):
            if through is not None:
                through = Direct(through.kind, through.host, through.port, relay)
            return Circuit(relay, peer, through)
    raise ConfigError(
        f"{address!r} is not a usable address",
        "It must name one relay, once, and lead to the peer it is given for and no other.",
        "Write it like /ip4/192.0.2.1/tcp/4001/p2p/RELAY/p2p-circuit/p2p/PEER.",
    )


def pack(address: Direct) -> bytes:
    """Return the binary form, as relays send it."""
    return bytes(Multiaddr(str(address)).to_bytes())


def unpack(data: bytes, peer: str) -> Direct:
    """Read the binary form of an address of ``peer``.

    Raises:
        ConfigError: It is no direct address, or one of somebody else.
    """
    try:
        text = str(Multiaddr(data)) if len(data) <= _LONGEST else ""
    except Exception as garbage:  # arbitrary bytes make the library raise anything
        raise ConfigError(f"{data[:40].hex()} is not an address in binary form") from garbage
    return parse_direct(text, peer)


def _parts(address: str) -> list[tuple[str, str]]:
    """Split into protocols and values; nothing if it is no multiaddr at all."""
    if len(address) > _LONGEST:
        return []
    try:
        return [(part.name, str(value)) for part, value in Multiaddr(address).items()]
    except (MultiaddrError, ValueError):
        return []


def _direct(parts: list[tuple[str, str]]) -> Direct | None:
    match parts:
        case [(kind, host), ("tcp", port)] if kind in _HOSTS:
            return Direct(kind, host, int(port))
    return None


def _is_peer(text: str) -> bool:
    try:
        public_key_of(text)
    except FactRejected:
        return False
    return True


class Networks:
    """A list of networks, such as ``10.0.0.0/8`` or ``2001:db8::/32``; empty, it holds no address.

    Args:
        networks: In CIDR notation; a single address is a network of one.
        key: The setting it comes from, for the message.

    Raises:
        ConfigError: Some are wrong; all of them are named.
    """

    def __init__(self, networks: Iterable[str], *, key: str = "allowed_networks") -> None:
        found: list[_Network] = []
        wrong: list[str] = []
        for text in networks:
            try:
                found.append(_plain_network(ipaddress.ip_network(text)))
            except ValueError as why:
                wrong.append(f"{text!r} ({why})")
        if wrong:
            raise ConfigError(
                f"{key} holds what is not a network: {'; '.join(wrong)}",
                "Each entry is an address and a prefix length, with no bit set after the prefix.",
                "Write it like 192.0.2.0/24 or 2001:db8::/32.",
            )
        self._networks = tuple(found)

    def __bool__(self) -> bool:
        return bool(self._networks)

    def __str__(self) -> str:
        return ", ".join(map(str, self._networks))

    def contains(self, address: str) -> bool:
        """Say whether an IP address, as a socket reports it, lies in one of the networks.

        What is no IP address lies in none.
        """
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        return any(ip in network for network in self._networks)


def _plain_network(network: _Network) -> _Network:
    """Turn a network of IPv4 addresses in IPv6 form into the plain one."""
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.IPv4Network((mapped, network.prefixlen - 96))
    return network
