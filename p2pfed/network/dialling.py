"""Dialling: keeps one connection to a member while that is wanted, by whatever way there is.

All ways are tried in a staggered race: direct addresses, circuits that the peer announced, and then
any two members at hand that may be relays, for the peer may have changed its own. A connection
through a relay is good until a direct one can be had, which is tried again and again.

Invariants: nobody is dialled who is not a member; every attempt has a deadline; the pause between
two attempts grows to ``redial_most`` and no further, with jitter, so that a partition heals within
seconds however long it lasted; to a member that said goodbye it grows to ``redial_left``.

Source: happy eyeballs (RFC 8305) for the race; back-off with jitter as AWS describes it (Brooker
2015). Not here: the handshake (``host``), which of two connections is kept (``session``).
"""

from __future__ import annotations

import logging
import random
from functools import partial
from typing import TYPE_CHECKING

import trio

from p2pfed.errors import ConfigError, P2PFedError, PeerUnreachable
from p2pfed.network.addresses import Circuit, Direct, parse_address
from p2pfed.network.circuit import HOP, connect
from p2pfed.network.framing import deadline

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from p2pfed.network.host import Gatekeeper, Host
    from p2pfed.network.limits import Limits
    from p2pfed.network.link import Link
    from p2pfed.network.session import Session

__all__ = ["Dialling"]

logger = logging.getLogger(__name__)

_STAGGER = 0.4  # seconds between two attempts of one race
_GUESSES = 2  # relays that are asked for a peer which did not name them

Way = Direct | Circuit


class Dialling:
    """See the module docstring.

    Args:
        host: Makes connections.
        gatekeeper: Says who is a member.
        limits: Bounds.
        begin: Runs a link in the background, to its end.
        link_to: The direct link to a member, if there is one.
        linked: The members that we have direct links to and that may be relays.
        rng: Chance for the jitter and for guessing relays.
    """

    def __init__(
        self,
        host: Host,
        gatekeeper: Gatekeeper,
        limits: Limits,
        *,
        begin: Callable[[Link], None],
        link_to: Callable[[str], Link | None],
        linked: Callable[[], list[str]],
        rng: random.Random,
    ) -> None:
        self._host = host
        self._gate = gatekeeper
        self._limits = limits
        self._begin = begin
        self._link_to = link_to
        self._linked = linked
        self._rng = rng
        self._turns: dict[str, trio.Lock] = {}  # one dials a peer at a time, whatever for

    async def keep(self, session: Session, scope: trio.CancelScope) -> None:
        """Connect to the session's peer again and again, until ``scope`` is cancelled."""
        limits = self._limits
        wait = limits.redial_first
        with scope:
            if session.has_left and session.link is None:
                wait = await self._pause(session, wait)
            while True:
                session.redial = trio.Event()
                if session.link is None:
                    await self._try(session, self._ways(session))
                began = trio.current_time()
                await self._stay(session)
                if trio.current_time() > began + limits.redial_most:
                    wait = limits.redial_first
                wait = await self._pause(session, wait)

    async def _pause(self, session: Session, wait: float) -> float:
        """Wait until it is time to dial again; returns for how long the next time."""
        limits = self._limits
        least, most = limits.redial_first, limits.redial_most
        if session.has_left:
            least, most = most, limits.redial_left
        wait = min(max(wait, least), most)
        # Jitter, so that two peers which lose each other do not dial in step.
        pause = limits.redial_unlike if session.is_unlike else wait
        with trio.move_on_after(pause * self._rng.uniform(0.5, 1.0)):
            await session.redial.wait()
        return 2 * wait

    async def _stay(self, session: Session) -> None:
        """Wait until there is no link; meanwhile look for a direct way if it is a circuit."""
        # Soon at first: a relay that comes back may reach us through another one before we dial
        # it, and it can be asked for a place on a direct link only.
        wait = self._limits.redial_first
        while (link := session.link) is not None:
            session.gone = trio.Event()
            if not link.is_relayed:
                await session.gone.wait()
                continue
            with trio.move_on_after(wait * self._rng.uniform(0.5, 1.0)):
                await session.gone.wait()
            wait = min(2 * wait, self._limits.direct_seconds)
            if session.link is link:
                direct = [way for way in self._ways(session) if isinstance(way, Direct)]
                await self._try(session, direct)

    def _ways(self, session: Session) -> list[Way]:
        ways: list[Way] = []
        for address in session.addresses:
            try:
                ways.append(parse_address(address, session.peer))
            except ConfigError as unusable:
                logger.warning("an address of peer %s is skipped: %s", session.peer, unusable)
        named = {way.relay for way in ways if isinstance(way, Circuit)} | {session.peer}
        others = [peer for peer in self._linked() if peer not in named]
        guesses = self._rng.sample(others, min(len(others), _GUESSES))
        ways += [Circuit(relay, session.peer) for relay in guesses]
        return sorted(ways, key=lambda way: isinstance(way, Circuit))

    async def _try(self, session: Session, ways: Sequence[Way]) -> None:
        """Race; run the winner, and return once it is known what became of it."""
        if not self._gate.is_member(session.peer):
            return
        async with self._turn(session.peer):
            link = await _race([partial(self._go, session.peer, way) for way in ways])
            if link is not None:
                self._begin(link)
                await link.settled.wait()

    def _turn(self, peer: str) -> trio.Lock:
        return self._turns.setdefault(peer, trio.Lock())

    async def _go(self, peer: str, way: Way) -> Link:
        if isinstance(way, Direct):
            return await self._host.dial(peer, way)
        relay = await self._relay(way)
        stream = await relay.open(HOP)
        try:
            await connect(stream, peer, seconds=2 * self._limits.dial_seconds)
            return await self._host.dial_through(stream, peer, way.relay)
        except BaseException:
            stream.discard()
            raise

    async def _relay(self, way: Circuit) -> Link:
        """The link to a relay; who needs it meanwhile waits for it, instead of a second one.

        Of doubled links one ends soon, and every circuit on it.
        """
        if (relay := self._link_to(way.relay)) is not None:
            return relay
        if way.through is None:
            raise PeerUnreachable(f"there is no connection to the relay {way.relay}")
        turn = self._turn(way.relay)
        # Two that are each other's relay would wait for each other for ever.
        with deadline(self._limits.dial_seconds, f"waiting for the relay {way.relay}"):
            await turn.acquire()
        try:
            relay = self._link_to(way.relay)
            if relay is None:
                relay = await self._host.dial(way.relay, way.through)
                self._begin(relay)
                await relay.settled.wait()
            return self._link_to(way.relay) or relay
        finally:
            turn.release()


async def _race(attempts: Sequence[Callable[[], Awaitable[Link]]]) -> Link | None:
    """Start each attempt when the one before has failed or is slow; the first success wins."""
    won: list[Link] = []

    async def attempt(go: Callable[[], Awaitable[Link]], failed: trio.Event) -> None:
        try:
            link = await go()
        except P2PFedError as why:
            logger.debug("dialling failed: %s", why)
            failed.set()
            return
        if won:
            link.abort()
        else:
            won.append(link)
            nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            for go in attempts:
                failed = trio.Event()
                nursery.start_soon(attempt, go, failed)
                with trio.move_on_after(_STAGGER):
                    await failed.wait()
    except BaseException:  # we are cancelled in the moment in which one has won
        for link in won:
            link.abort()
        raise
    return won[0] if won else None
