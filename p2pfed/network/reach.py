"""How others reach us: the addresses that we announce, and the reservations we keep at relays.

Where we listen on all interfaces, the address is the one that our own connections to members come
from: it is known to lead to us from there, and it changes when the machine moves. Nodes that nobody
can dial keep reservations at members that run as relays, and announce the ways through them.

Invariant: what is announced leads to us as far as can be known here: no wildcard, and no circuit
through a relay that has not promised a place on a link that still lives.

Not here: which relay is asked when (``reservations``), the exchange itself (``circuit``).
"""

from __future__ import annotations

import functools
import ipaddress
import logging
from typing import TYPE_CHECKING

import trio

from p2pfed.errors import P2PFedError
from p2pfed.network.addresses import parse_direct
from p2pfed.network.circuit import HOP, reserve
from p2pfed.network.events import AddressesChanged, Reached
from p2pfed.network.reservations import Reservations, Uplink

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable, Sequence

    from p2pfed.network.addresses import Direct
    from p2pfed.network.events import NetworkEvent
    from p2pfed.network.limits import Limits
    from p2pfed.network.link import Link
    from p2pfed.network.reservations import Mode

__all__ = ["Reach"]

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 5.0  # addresses of interfaces change without a sign


class Reach:
    """See the module docstring.

    Args:
        us: Our own peer id.
        announce: Addresses that the operator knows to lead here; always announced.
        mode: When relays are asked for a reservation.
        links: The links that carry frames now.
        limits: Bounds.
        rng: Chance for choosing relays.
    """

    def __init__(
        self,
        us: str,
        *,
        announce: Sequence[str],
        mode: Mode,
        links: Callable[[], Iterable[Link]],
        limits: Limits,
        rng: random.Random,
    ) -> None:
        self._us = us
        self._announce = tuple(announce)
        self._links = links
        self._limits = limits
        self._reservations = Reservations(us, mode=mode, rng=rng)
        self._bound: tuple[Direct, ...] = ()
        self._changed = trio.Event()

    def bind(self, bound: Iterable[str]) -> None:
        """We listen on these addresses."""
        self._bound = tuple(map(parse_direct, bound))

    def look(self) -> None:
        """Links have come or gone."""
        self._changed.set()

    def holds(self, relay: str) -> bool:
        """Whether a peer has promised to lead others to us."""
        return relay in self._reservations.holders

    def own_addresses(self) -> tuple[str, ...]:
        """Where we are reached without a relay: announced by the operator, or listened on."""
        direct = dict.fromkeys((*self._announce, *self._direct()))
        return tuple(f"{address}/p2p/{self._us}" for address in direct)

    def addresses(self) -> tuple[str, ...]:
        """All our addresses, those through relays last."""
        return (*self.own_addresses(), *self._reservations.addresses(trio.current_time()))

    def possible_relays(self) -> list[str]:
        """Members on a direct link that have not said that they are no relays."""
        return [x.peer for x in self._links() if not x.is_relayed and HOP not in x.unspoken]

    def seen(self) -> Reached:
        """How others reach us, as far as we can tell."""
        links = list(self._links())
        direct = [link for link in links if not link.is_relayed]
        num_inbound = sum(link.inbound for link in direct)
        return Reached(
            visited=self._reservations.visited,
            relay_wanted=self._reservations.is_wanted,
            relays=self._reservations.holders,
            possible_relays=tuple(self.possible_relays()),
            direct_in=num_inbound,
            direct_out=len(direct) - num_inbound,
            relayed=len(links) - len(direct),
        )

    async def keep(self, tell: trio.MemorySendChannel[NetworkEvent]) -> None:
        """Keep reservations, and tell the node whenever our addresses change; never returns."""
        told = self.addresses()
        while True:
            self._changed = trio.Event()
            now = trio.current_time()
            self._reservations.see(map(_uplink, self._links()))
            for uplink in self._reservations.to_ask(now):
                link: Link = uplink.link  # type: ignore[assignment]  # what _uplink put there
                link.spawn(functools.partial(self._reserve, link))
            if told != (told := self.addresses()):
                await tell.send(AddressesChanged(told))
            due = self._reservations.next_at()
            until = now + _LOOK_SECONDS if due is None else min(due, now + _LOOK_SECONDS)
            with trio.move_on_after(max(until - trio.current_time(), 0.05)):
                await self._changed.wait()

    async def _reserve(self, link: Link) -> None:
        try:
            stream = await link.open(HOP)
            try:
                granted = await reserve(stream, seconds=self._limits.open_seconds)
            finally:
                stream.discard()
        except P2PFedError as refused:  # most members are no relays
            logger.debug("no reservation at %s: %s", link.peer, refused)
            self._reservations.failed(link, trio.current_time())
        else:
            self._reservations.granted(link, granted, trio.current_time())
        self.look()

    def _direct(self) -> list[str]:
        """Where we listen, wildcards replaced by the addresses that our connections have."""
        found = []
        local = {link.wire.local_host for link in self._links()} - {""}
        if any(not _is_loopback(host) for host in local):
            local = {host for host in local if not _is_loopback(host)}
        for direct in self._bound:
            if not direct.is_wildcard:
                found.append(str(direct))
                continue
            for host in sorted(local):
                version = ipaddress.ip_address(host).version
                if version == 4 or direct.kind == "ip6":
                    found.append(f"/ip{version}/{host}/tcp/{direct.port}")
        return found


def _uplink(link: Link) -> Uplink:
    return Uplink(
        link,
        link.peer,
        link.inbound,
        relayed=link.is_relayed,
        is_relay=HOP not in link.unspoken,
        is_near=_is_near(link.wire.remote_host),
    )


def _is_near(host: str) -> bool:
    return host != "" and not ipaddress.ip_address(host).is_global


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback
