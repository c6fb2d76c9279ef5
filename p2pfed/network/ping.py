"""Ping: 32 bytes there and back, as standard libp2p clients do it, answered to members only.

Our own nodes know from the gossip's beats who is alive; this is for independent clients, and for
measuring the path to one peer without the gossip above it.

Invariants: an echo is what was sent, whole; a stream on which more than ``per_second`` pings come
in a second, or none for ``stall`` seconds, is served no longer. So it costs us at most some
kilobytes a second, and a forgotten stream does not keep its place.

Source: libp2p/specs ping/ping.md. Not here: how many streams a peer may have, who may ask
(``peers``), what a slow answer means (the gossip's membership).
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import trio

from p2pfed.errors import RemoteProtocolError
from p2pfed.network.framing import read_exact, write_all
from p2pfed.network.pace import Pace

if TYPE_CHECKING:
    from p2pfed.network.framing import ByteStream

__all__ = ["PING", "ping", "serve_ping"]

PING = "/ipfs/ping/1.0.0"
_BYTES = 32
_PER_SECOND = 32.0  # go and js ask once a second; a burst by hand on a fast network still passes


async def serve_ping(stream: ByteStream, *, stall: float, per_second: float = _PER_SECOND) -> None:
    """Echo until the peer ends the stream, falls silent or asks too often; the caller ends it.

    Args:
        stream: The opened stream.
        stall: Seconds without a ping after which the stream is given up.
        per_second: Pings answered in a second; as many may come at once after a pause.

    Raises:
        PeerUnreachable: The stream ended or stood still within a ping, or takes no echo.
    """
    pace = Pace(per_second, credit=1.0)
    while True:
        first = b""
        with trio.move_on_after(stall):
            first = bytes(await stream.read(_BYTES))
        if not first:
            return
        now = trio.current_time()
        pace.spend(1, now)
        if pace.delay(now):
            return
        rest = await read_exact(stream, _BYTES - len(first), stall=stall)
        await write_all(stream, first + rest, stall=stall)


async def ping(stream: ByteStream, *, stall: float) -> float:
    """Measure one round trip on a stream on which the peer serves pings.

    Args:
        stream: The stream; it can be used again and is the caller's to end.
        stall: Seconds to wait for each piece.

    Returns:
        The round-trip time, seconds.

    Raises:
        RemoteProtocolError: Something else came back.
        PeerUnreachable: The stream ended or stood still before that.
    """
    sent, began = secrets.token_bytes(_BYTES), trio.current_time()
    await write_all(stream, sent, stall=stall)
    if await read_exact(stream, _BYTES, stall=stall) != sent:
        raise RemoteProtocolError("a ping came back changed")
    return trio.current_time() - began
