"""What we say on a link to a member: our roster, the versions we speak, and the frames that wait.

Who dialled offers its roster ahead of everything else, so that a peer behind us can let us in. Then
the highest common version is agreed on, and frames go out in two lanes: the stream of short ones
is there from the beginning, that of long ones once there is one.

Invariant: a step of a short frame is bounded by ``stall_seconds``; of a long one by what our own
cap on bulk may add to that.

Not here: which link carries the frames (``session``), what is served to the member (``serving``).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import trio

from p2pfed.errors import NoCommonProtocol, PeerUnreachable
from p2pfed.network.framing import write_frame
from p2pfed.network.host import ROSTER
from p2pfed.network.session import Lane
from p2pfed.wire.versions import gossip_protocol, version_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from p2pfed.network.host import Gatekeeper
    from p2pfed.network.limits import Limits
    from p2pfed.network.link import Link, Stream
    from p2pfed.network.session import Session

__all__ = ["Speaking"]


class Speaking:
    """See the module docstring.

    Args:
        gatekeeper: Gives the roster that is offered.
        limits: Bounds.
        bulk_stall: Seconds that a step of a long frame may take.
        versions: Of the gossip, that we speak.
    """

    def __init__(
        self,
        gatekeeper: Gatekeeper,
        limits: Limits,
        *,
        bulk_stall: float,
        versions: Sequence[int],
    ) -> None:
        self._gate = gatekeeper
        self._limits = limits
        self._bulk_stall = bulk_stall
        self._versions = tuple(sorted(versions, reverse=True))

    def allow_stall(self, seconds: float) -> None:
        """Have a step of a long frame take so long at most, from the next frame on."""
        self._bulk_stall = seconds

    async def begin(self, link: Link) -> Stream | None:
        """Offer our roster, agree on a version (``link.version``), open the stream of short frames.

        Returns:
            The stream, or None if no version is common.

        Raises:
            PeerUnreachable: The link ended, or the member took or answered nothing in time.
            RemoteProtocolError: What it answered is no answer.
        """
        if not link.inbound:
            await self._offer_roster(link)
        try:
            out, protocol = await link.open_first(
                [gossip_protocol(version) for version in self._versions], urgent=True
            )
        except NoCommonProtocol:
            link.nothing_common = True
            await trio.sleep(self._limits.grace_seconds)  # its own proposals are on their way
            return None
        link.version = version_of(protocol) or 0
        return out

    async def write(self, session: Session, link: Link, out: Stream) -> None:
        """Write the member's frames until another link carries them.

        Args:
            session: The member, whose frames wait in it.
            link: The link that carries them.
            out: The stream that :meth:`begin` opened on it.

        Raises:
            PeerUnreachable: The link ended, or a step took too long.
        """
        link.spawn(functools.partial(self._write_bulk, session, link))
        await self._write_frames(session, link, Lane.URGENT, out)

    async def _offer_roster(self, link: Link) -> None:
        signed = self._gate.current_roster()
        if signed:
            stream = await link.open(ROSTER, one_way=True)
            await write_frame(stream, signed, stall=self._limits.open_seconds)
            link.spawn(functools.partial(stream.finish, self._limits.open_seconds))

    async def _write_bulk(self, session: Session, link: Link) -> None:
        """Open the second stream when there is something for it."""
        try:
            if await session.next_frame(link, Lane.BULK) is not None:
                out = await link.open(gossip_protocol(link.version))
                await self._write_frames(session, link, Lane.BULK, out)
        except PeerUnreachable:
            link.abort()  # a peer that takes no frames is not connected
            raise

    async def _write_frames(self, session: Session, link: Link, lane: Lane, out: Stream) -> None:
        while (frame := await session.next_frame(link, lane)) is not None:
            stall = self._limits.stall_seconds if lane is Lane.URGENT else self._bulk_stall
            await write_frame(out, frame, stall=stall)
            session.written(link, lane)
