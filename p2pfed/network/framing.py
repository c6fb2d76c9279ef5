"""Framing: whole messages over a byte stream, and the deadlines every reader and writer keeps.

Frame: magic ``PF01``, 4-byte big-endian length, payload, BLAKE2b-256 of the payload. The length is
checked against the caller's limit before a byte of payload is read or room for it is made. Noise
already authenticates the bytes; the digest guards against what it cannot see, a muxer that
reports a killed peer as a clean end (py-libp2p 0.8.1 does) or loses its place.

Invariant: :func:`read_frame` returns a payload only when all of it and its digest have arrived;
the end of a stream never means that a message is complete. Deadlines are on *progress*: a slow
peer may take long, a silent one may not.

Not here: what a frame means (the wire room), streams and connections (``host``), blobs (``blob``).
"""

from __future__ import annotations

import hashlib
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import trio

from p2pfed.errors import PeerUnreachable, RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from p2pfed.network.wire import Buffer

__all__ = ["CHUNK", "DIGEST_BYTES", "ByteStream", "deadline", "read_exact", "read_frame"]
__all__ += ["write_all", "write_frame"]

MAGIC = b"PF01"
DIGEST_BYTES = 32
# One read or write between two looks at the clock: 256 KiB in 30 s is 70 kbit/s, the slowest
# line that still counts as progress.
CHUNK = 256 * 1024
_HEADER = struct.Struct("!4sI")
_SHORT = 32 * 1024  # such a frame is written at once


class ByteStream(Protocol):
    """What framing needs of a stream; a yamux stream, or memory in a test."""

    async def read(self, n: int) -> Buffer:
        """Return 1 to ``n`` bytes, or ``b""`` when the peer has ended the stream."""

    async def write(self, data: Buffer) -> None:
        """Write all of ``data``."""


@contextmanager
def deadline(seconds: float, doing: str) -> Iterator[None]:
    """Bound one step of a conversation.

    Args:
        seconds: The step's time.
        doing: What was being done, for the message.

    Raises:
        PeerUnreachable: The step took longer.
    """
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise PeerUnreachable(f"no progress for {seconds:g} s while {doing}")


async def read_exact(stream: ByteStream, count: int, *, stall: float) -> bytes:
    """Read exactly ``count`` bytes.

    Raises:
        PeerUnreachable: The stream ended or stood still for ``stall`` seconds before that.
    """
    held = bytearray()
    while len(held) < count:
        with deadline(stall, "reading"):
            piece = await stream.read(min(count - len(held), CHUNK))
        if not piece:
            raise PeerUnreachable(f"the stream ended after {len(held)} of {count} bytes")
        held += piece
    return bytes(held)


async def write_all(stream: ByteStream, data: bytes | memoryview, *, stall: float) -> None:
    """Write ``data``, each chunk within ``stall`` seconds.

    Raises:
        PeerUnreachable: A chunk took longer, or the stream is gone.
    """
    view = memoryview(data)
    for start in range(0, len(view), CHUNK):
        with deadline(stall, "writing"):
            await stream.write(view[start : start + CHUNK])


async def write_frame(stream: ByteStream, payload: bytes, *, stall: float) -> None:
    """Write one frame.

    Args:
        stream: Where to.
        payload: The message; the caller has kept it under the peers' common limit.
        stall: Seconds a chunk may take.

    Raises:
        PeerUnreachable: The peer took no bytes for ``stall`` seconds, or is gone.
    """
    head, digest = _HEADER.pack(MAGIC, len(payload)), _digest(payload)
    parts = (head + payload + digest,) if len(payload) < _SHORT else (head, payload, digest)
    for part in parts:
        await write_all(stream, part, stall=stall)


async def read_frame(stream: ByteStream, *, max_bytes: int, stall: float) -> bytes:
    """Read one frame; waits for its first byte without limit, for each later one ``stall`` seconds.

    Args:
        stream: Where from.
        max_bytes: Longest payload accepted.
        stall: Seconds without a byte after which a started frame is given up.

    Returns:
        The payload, complete and with the right digest.

    Raises:
        RemoteProtocolError: Wrong magic, a length over the limit or a wrong digest.
        PeerUnreachable: The stream ended (also between two frames) or stood still.
    """
    first = await stream.read(1)
    if not first:
        raise PeerUnreachable("the peer ended the stream")
    rest = await read_exact(stream, _HEADER.size - 1, stall=stall)
    magic, length = _HEADER.unpack(bytes(first) + rest)
    if magic != MAGIC:
        raise RemoteProtocolError("a frame does not begin with the magic bytes")
    if length > max_bytes:
        raise RemoteProtocolError(f"a frame claims {length} bytes, the limit is {max_bytes}")
    payload = await read_exact(stream, length, stall=stall)
    if await read_exact(stream, DIGEST_BYTES, stall=stall) != _digest(payload):
        raise RemoteProtocolError(f"the digest of a {length}-byte frame is wrong")
    return payload


def _digest(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=DIGEST_BYTES).digest()
