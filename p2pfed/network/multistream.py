"""multistream-select 1.0, with a cap on every line and a mode that answers nothing.

Each stage of a libp2p connection (Noise on the socket, yamux on Noise, a protocol on a stream)
begins with this negotiation. The library's own reader believes any length prefix, before anybody
is authenticated; ours reads at most ``MAX_LINE`` bytes. It also always answers; ours can listen
silently, so that a peer which is not on the roster gets no byte of any protocol from us.

Source: libp2p/specs connections/README.md and multiformats/multistream-select; an opener that
sends header and protocol together is the specification's lazy form, which stock py-, go- and
js-libp2p accept.

Not here: what the protocols do; who may use them (``host``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2pfed.errors import NoCommonProtocol, RemoteProtocolError
from p2pfed.network.framing import read_exact

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from p2pfed.network.framing import ByteStream

__all__ = ["MAX_PROPOSALS", "accept", "announce", "propose"]

HEADER = "/multistream/1.0.0"
_NO = "na"
MAX_LINE = 127  # one-byte length prefix; our longest line is 20 bytes
# Stock openers propose at most a handful; somebody who goes on guessing is not one of ours.
MAX_PROPOSALS = 8


async def announce(stream: ByteStream, protocol: str) -> None:
    """Open ``protocol`` without waiting for an answer (a one-way stream needs none)."""
    await stream.write(_line(HEADER) + _line(protocol))


async def propose(stream: ByteStream, *protocols: str, stall: float) -> str:
    """Open the first of ``protocols`` that the peer agrees to.

    Returns:
        That protocol.

    Raises:
        NoCommonProtocol: The peer speaks none of them.
        RemoteProtocolError: The peer answered something else.
        PeerUnreachable: No answer.
    """
    await announce(stream, protocols[0])
    if await _read_line(stream, stall=stall) != HEADER:
        raise RemoteProtocolError(f"the peer does not speak {protocols[0]}")
    for number, protocol in enumerate(protocols):
        if number:
            await stream.write(_line(protocol))
        answer = await _read_line(stream, stall=stall)
        if answer == protocol:
            return protocol
        if answer != _NO:
            raise RemoteProtocolError(f"the peer does not speak {protocol}")
    raise NoCommonProtocol(f"the peer does not speak {' or '.join(protocols)}")


async def accept(
    stream: ByteStream,
    protocols: Collection[str],
    *,
    stall: float,
    silent: bool = False,
    refused: Callable[[str], None] = lambda _: None,
) -> str:
    """Answer an opener.

    Args:
        stream: The stream or connection it opened.
        protocols: What we speak here.
        stall: Seconds to wait for each piece.
        silent: Write nothing at all; then only an opener that does not wait for us gets through.
        refused: Is told of each protocol that was proposed and is not ours.

    Returns:
        The protocol agreed on.

    Raises:
        RemoteProtocolError: No multistream, no protocol of ours, or a line too long.
        PeerUnreachable: The peer went away.
    """
    if not silent:
        await stream.write(_line(HEADER))
    if await _read_line(stream, stall=stall) != HEADER:
        raise RemoteProtocolError("the peer does not speak multistream-select")
    for _ in range(1 if silent else MAX_PROPOSALS):
        wanted = await _read_line(stream, stall=stall)
        if wanted in protocols:
            if not silent:
                await stream.write(_line(wanted))
            return wanted
        refused(wanted)
        if not silent:
            await stream.write(_line(_NO))
    raise RemoteProtocolError("the peer asked for no protocol of ours")


def _line(text: str) -> bytes:
    body = text.encode() + b"\n"
    return bytes([len(body)]) + body


async def _read_line(stream: ByteStream, *, stall: float) -> str:
    (length,) = await read_exact(stream, 1, stall=stall)
    if not 0 < length <= MAX_LINE:
        raise RemoteProtocolError(f"a negotiation line may have 1 to {MAX_LINE} bytes")
    body = await read_exact(stream, length, stall=stall)
    if not body.endswith(b"\n"):
        raise RemoteProtocolError("a negotiation line does not end")
    return body[:-1].decode("utf-8", errors="replace")
