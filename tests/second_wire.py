"""The second implementation, 6: frames, files and seats (sections 5 and 6 of `docs/protocol.md`).

Nothing of p2pfed is imported.

Invariant: what is read here has the digest, the name or the form that the document demands.

Not here: what the messages in the frames mean (`second_peer.py`), serving files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from second_formats import h, require
from second_muxer import Connection
from second_transport import Pipe

BLOB = "/p2pfed/blob/1"
CHUNK = 1 << 20
NOT_HELD = (1 << 64) - 1


# --- frames and files --------------------------------------------------------------------------


def frame(payload: bytes) -> bytes:
    return b"PF01" + len(payload).to_bytes(4, "big") + payload + h(payload)


async def read_frame(pipe: Pipe) -> bytes:
    """The payload of the next frame.

    Raises:
        Ended: There is none.
        Wrong: It is not a frame.
    """
    head = await pipe.read(8)
    length = int.from_bytes(head[4:], "big")
    require(head[:4] == b"PF01" and length <= 16 << 20, "no frame")
    payload = await pipe.read(length)
    require(await pipe.read(32) == h(payload), "a frame with another digest")
    return payload


def file_name(length: int, hashes: list[bytes]) -> bytes:
    """The name of a file of these chunks."""
    if len(hashes) == 1:
        return hashes[0]
    return h(struct.pack("<Q", length) + b"".join(hashes), b"p2pfed-file")


async def fetch_file(connection: Connection, name: bytes) -> bytes:
    """A whole file, each chunk checked as it comes.

    Raises:
        Wrong: The peer does not hold it, or sends something else.
    """
    stream, _ = await connection.open(BLOB)
    await stream.write(b"PFB2" + name + (0).to_bytes(8, "big") + b"\1")
    length = int.from_bytes(await stream.read(8), "big")
    require(length != NOT_HELD, "the peer does not hold the file")
    hashes = [await stream.read(32) for _ in range(max(1, -(-length // CHUNK)))]
    require(file_name(length, hashes) == name, "the chunks of another file")
    data = b""
    for expected in hashes:
        chunk = await stream.read(min(CHUNK, length - len(data)))
        require(h(chunk) == expected, "a wrong chunk")
        data += chunk
    await stream.finish()
    return data


# --- seats -------------------------------------------------------------------------------------


def read_seats(packed: bytes, members: int) -> set[int]:
    """The seats of a set, written in one of three ways."""
    kind, rest = packed[0], packed[1:]
    if kind == 0:
        return {8 * i + bit for i, byte in enumerate(rest) for bit in range(8) if byte >> bit & 1}
    listed, at = set(), 0
    for skipped in rest:
        at += skipped
        if skipped < 255:
            listed.add(at)
            at += 1
    return listed if kind == 1 else set(range(members)) - listed


def write_seats(seats: set[int], members: int) -> bytes:
    """The shortest of the three ways."""

    def gaps(listed: Iterable[int]) -> bytes:
        out, at = b"", 0
        for seat in sorted(listed):
            more, less = divmod(seat - at, 255)
            out += b"\xff" * more + bytes([less])
            at = seat + 1
        return out

    field = sum(1 << seat for seat in seats).to_bytes((members + 7) // 8, "little")
    others = set(range(members)) - seats
    return min(b"\0" + field, b"\1" + gaps(seats), b"\2" + gaps(others), key=len)
