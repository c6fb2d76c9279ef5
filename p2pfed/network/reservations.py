"""Reservations: which relays a hospital that can only dial out asks, when, and what it announces.

A state machine without I/O. The owner tells it which links are up and how its requests went; it
says which links to ask now (:meth:`Reservations.to_ask`), when to look again (:meth:`next_at`) and
under which circuit addresses we are reached (:meth:`addresses`). Time and chance come from outside.

Invariants: at most ``keep`` relays are held or being asked; a reservation lives no longer than the
link it was granted on; it is renewed before half of its time is over; a relay that refused is left
alone for a while, at most ``MOST_BACK_OFF``, while one whose reservation ended with its link is
replaced at once. An announced address leads through a relay that has promised us a place.

Source: libp2p/specs relay/circuit-v2.md, section "Reservation"; back-off with jitter as AWS
describes it (Brooker 2015). Not here: asking (``circuit``), dialling through a relay (``host``).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from p2pfed.errors import ConfigError
from p2pfed.network.addresses import Circuit, unpack

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Iterator

    from p2pfed.network.circuit import Reservation

__all__ = ["KEEP", "MOST_BACK_OFF", "Mode", "Reservations", "Uplink"]

Mode = Literal["auto", "always", "never"]

KEEP = 2  # one may die, and we are reached through the other while it is replaced
FIRST_BACK_OFF, MOST_BACK_OFF = 2.0, 60.0  # seconds


@dataclass(frozen=True, slots=True)
class Uplink:
    """A link that is up, as far as it matters here.

    Attributes:
        link: The link itself; only its identity is used.
        peer: Who is at its other end, base58.
        inbound: Whether the peer dialled us.
        relayed: Whether it runs through a circuit.
        is_relay: Whether the peer may be a relay.
        is_near: Whether the peer's address is one of no public network.
    """

    link: object
    peer: str
    inbound: bool
    relayed: bool
    is_relay: bool
    is_near: bool = False


@dataclass(slots=True)
class _Relay:
    """What is known of one peer that may be a relay.

    Attributes:
        rank: Drawn once, so that hospitals spread over the relays and each keeps its choice.
        uplink: The link it was asked on, or the reservation is on.
        asking: Whether a request is under way.
        expires_at: When the reservation ends; None: there is none.
    """

    rank: float
    uplink: Uplink | None = None
    asking: bool = False
    renew_at: float = 0.0
    expires_at: float | None = None
    circuits: list[Circuit] = field(default_factory=list)
    refusals: int = 0
    not_before: float = 0.0

    def forget(self) -> None:
        self.uplink = None
        self.asking = False
        self.expires_at = None
        self.circuits = []


class Reservations:
    """The choice of relays.

    Args:
        us: Our own peer id, base58.
        mode: ``auto``: while nobody has reached us directly since we last had no link at all;
            ``always``; ``never``.
        rng: The source of chance.
        keep: How many reservations to have.
    """

    def __init__(self, us: str, *, mode: Mode, rng: random.Random, keep: int = KEEP) -> None:
        self._us = us
        self._mode = mode
        self._rng = rng
        self._keep = keep
        self._was_reached = self._was_reached_near = False
        self._uplinks: tuple[Uplink, ...] = ()
        self._relays: dict[str, _Relay] = {}

    # -- what happened -------------------------------------------------------------------------

    def see(self, uplinks: Iterable[Uplink]) -> None:
        """Take in all links that are up now, of members only; what was on others is gone."""
        self._uplinks = tuple(uplinks)
        # In ``auto``, one direct visitor shows that the firewall lets members in; one from our own
        # house does only as long as nobody is outside. Who has no link at all may be elsewhere by
        # the time it has one.
        visitors = [each for each in self._uplinks if each.inbound and not each.relayed]
        self._was_reached &= bool(self._uplinks)
        self._was_reached_near &= bool(self._uplinks)
        self._was_reached |= any(not each.is_near for each in visitors)
        self._was_reached_near |= bool(visitors)
        up = {id(each.link) for each in self._uplinks}
        for relay in self._relays.values():
            if relay.uplink is not None and id(relay.uplink.link) not in up:
                relay.forget()

    def granted(self, link: object, reservation: Reservation, now: float) -> None:
        """Take in that the relay at the other end of ``link`` gave a reservation."""
        relay = self._asked(link)
        if relay is None or relay.uplink is None:
            return  # the link ended meanwhile
        seconds = reservation.expires_in
        relay.asking = False
        relay.refusals = 0
        relay.renew_at = now + seconds * self._rng.uniform(0.4, 0.5)
        relay.expires_at = now + seconds
        relay.circuits = list(self._circuits(relay.uplink.peer, reservation))

    def failed(self, link: object, now: float) -> None:
        """Take in that the request on ``link`` was refused, or not answered."""
        relay = self._asked(link)
        if relay is None:
            return
        relay.forget()
        most = min(FIRST_BACK_OFF * 2.0 ** min(relay.refusals, 10), MOST_BACK_OFF)
        relay.refusals += 1
        relay.not_before = now + most * self._rng.uniform(0.5, 1.0)

    # -- what to do ----------------------------------------------------------------------------

    def to_ask(self, now: float) -> list[Uplink]:
        """Return the links to ask for a reservation now.

        Each counts as asked until :meth:`granted`, :meth:`failed`, or its link is gone.
        """
        self._expire(now)
        if not self.is_wanted:
            return []
        asked = []
        for relay in self._relays.values():
            if relay.uplink and not relay.asking and relay.renew_at <= now:
                relay.asking = True
                asked.append(relay.uplink)
        for uplink, relay in self._idle():
            if self._num_busy() >= self._keep:
                break
            if relay.not_before <= now:
                relay.uplink = uplink
                relay.asking = True
                asked.append(uplink)
        return asked

    def next_at(self) -> float | None:
        """Return when :meth:`to_ask` or :meth:`addresses` changes if nothing happens; or None."""
        times = [r.expires_at for r in self._relays.values() if r.expires_at is not None]
        if self.is_wanted:
            held = (r for r in self._relays.values() if r.uplink and not r.asking)
            times += [relay.renew_at for relay in held]
            if self._num_busy() < self._keep:
                times += [relay.not_before for _, relay in self._idle()]
        return min(times, default=None)

    def addresses(self, now: float) -> tuple[str, ...]:
        """Return the circuit addresses to announce now."""
        self._expire(now)
        return tuple(
            str(circuit) for relay in self._by_rank(self._relays) for circuit in relay.circuits
        )

    @property
    def is_wanted(self) -> bool:
        """Whether we want to be reached through relays; what we hold otherwise runs out."""
        if self._mode != "auto":
            return self._mode == "always"
        all_near = all(each.is_near or each.relayed for each in self._uplinks)
        return not (self._was_reached or (self._was_reached_near and all_near))

    @property
    def visited(self) -> Literal["outside", "near", ""]:
        """From where members have dialled us directly since we last had no link at all."""
        return "outside" if self._was_reached else "near" if self._was_reached_near else ""

    @property
    def holders(self) -> tuple[str, ...]:
        """The relays that have promised us a place."""
        return tuple(p for p, relay in self._relays.items() if relay.expires_at is not None)

    # -- inside --------------------------------------------------------------------------------

    def _asked(self, link: object) -> _Relay | None:
        for relay in self._relays.values():
            if relay.uplink is not None and relay.uplink.link is link and relay.asking:
                return relay
        return None

    def _idle(self) -> list[tuple[Uplink, _Relay]]:
        """The direct links to relays that are neither asked nor held, the best first.

        A relay that we have dialled is certainly reached from outside; one that dialled us may
        only believe so.
        """
        found: dict[str, Uplink] = {}
        for uplink in self._uplinks:
            if uplink.is_relay and not uplink.relayed:
                found.setdefault(uplink.peer, uplink)
        for peer in found:
            if peer not in self._relays:
                self._relays[peer] = _Relay(rank=self._rng.random())
        idle = [(up, self._relays[peer]) for peer, up in found.items()]
        idle = [(up, relay) for up, relay in idle if relay.uplink is None]
        return sorted(idle, key=lambda pair: (pair[0].inbound, pair[1].rank))

    def _num_busy(self) -> int:
        return sum(relay.uplink is not None for relay in self._relays.values())

    def _expire(self, now: float) -> None:
        for relay in self._relays.values():
            if relay.expires_at is not None and relay.expires_at <= now:
                relay.forget()

    def _circuits(self, relay: str, reservation: Reservation) -> Iterator[Circuit]:
        """The ways to us through a relay; without an address of its own, for who knows it."""
        directs = []
        for packed in reservation.addresses:
            with suppress(ConfigError):
                direct = replace(unpack(packed, relay), peer=relay)
                if not direct.is_wildcard and direct not in directs:
                    directs.append(direct)
        for direct in directs:
            yield Circuit(relay, self._us, direct)
        if not directs:
            yield Circuit(relay, self._us)

    @staticmethod
    def _by_rank(relays: dict[str, _Relay]) -> list[_Relay]:
        return sorted(relays.values(), key=lambda relay: relay.rank)
