"""Bulk files between members: named by their digest, resumed after a cut, never half visible.

Request: magic, BLAKE2b-256 of the file, offset (8 bytes). Answer: total length (8 bytes; all ones
= "I do not hold it"), then the bytes from the offset to the end. The name is the check: no other
digest travels.

Invariant: ``destination`` either does not exist, is what it was, or is the whole file with the
asked-for digest. Bytes received so far wait in a hidden sibling named after the digest and are
counted again by the next call; they are dropped as soon as the whole turns out wrong.

Not here: who may ask (``host``), which file a digest names (the node's ``Gatekeeper``), choosing
another peer after a failure (the node).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from typing import TYPE_CHECKING

import trio

from p2pfed.errors import PeerUnreachable, RemoteProtocolError
from p2pfed.network.framing import CHUNK, DIGEST_BYTES, deadline, read_exact, write_all

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from p2pfed.network.framing import ByteStream

__all__ = ["receive_blob", "serve_blob"]

_REQUEST = struct.Struct(f"!4s{DIGEST_BYTES}sQ")
_TOTAL = struct.Struct("!Q")
_MAGIC = b"PFB1"
_ABSENT = 2**64 - 1


async def serve_blob(
    stream: ByteStream, find: Callable[[bytes], Path | None], *, stall: float
) -> None:
    """Answer one request.

    Args:
        stream: The opened stream.
        find: Digest to file, or None when we do not hold (or do not give) it.
        stall: Seconds a step may take.

    Raises:
        RemoteProtocolError: The request makes no sense.
        PeerUnreachable: The peer stopped taking bytes.
    """
    magic, digest, offset = _REQUEST.unpack(await read_exact(stream, _REQUEST.size, stall=stall))
    if magic != _MAGIC:
        raise RemoteProtocolError("a blob request does not begin with the magic bytes")
    path = find(digest)
    if path is None:
        await write_all(stream, _TOTAL.pack(_ABSENT), stall=stall)
        return
    async with await trio.open_file(path, "rb") as file:
        total = await file.seek(0, os.SEEK_END)
        await write_all(stream, _TOTAL.pack(total), stall=stall)
        await file.seek(offset)
        while piece := await file.read(CHUNK):
            await write_all(stream, piece, stall=stall)


async def receive_blob(
    stream: ByteStream, digest: bytes, destination: Path, *, max_bytes: int, stall: float
) -> None:
    """Fetch the file named ``digest`` into ``destination``.

    Args:
        stream: A stream on which the peer serves blobs.
        digest: BLAKE2b-256 of the wanted file, 32 bytes.
        destination: Where the finished file appears, durably and at once.
        max_bytes: Longest file accepted.
        stall: Seconds without a byte after which the fetch is given up (what came is kept).

    Raises:
        RemoteProtocolError: The file is longer than allowed, or is not the one asked for.
        PeerUnreachable: The peer does not hold it, went away or stood still, or bytes left by an
            earlier fetch turned out wrong (they are dropped, and this peer is not to blame).
    """
    partial = destination.with_name(f".{destination.name}.{digest.hex()[:16]}.part")
    hasher, start = await trio.to_thread.run_sync(_hash_held, partial)
    held = start
    await write_all(stream, _REQUEST.pack(_MAGIC, digest, held), stall=stall)
    (total,) = _TOTAL.unpack(await read_exact(stream, _TOTAL.size, stall=stall))
    if total == _ABSENT:
        raise PeerUnreachable("the peer does not hold this file")
    if total > max_bytes:
        raise RemoteProtocolError(f"the file has {total} bytes, the limit is {max_bytes}")
    async with await trio.open_file(partial, "ab") as file:
        while held < total:
            with deadline(stall, "fetching a file"):
                piece = await stream.read(min(total - held, CHUNK))
            if not piece:
                raise PeerUnreachable(f"the file was cut off after {held} of {total} bytes")
            await file.write(piece)
            hasher.update(piece)
            held += len(piece)
    if held != total or hasher.digest() != digest:
        partial.unlink()
        if start:  # the wrong bytes may be an earlier peer's
            raise PeerUnreachable("what an earlier fetch left was wrong; the next starts afresh")
        raise RemoteProtocolError("the file received is not the one asked for")
    await trio.to_thread.run_sync(_publish, partial, destination)


def _hash_held(partial: Path) -> tuple[hashlib.blake2b, int]:
    """Return the running digest and length of what an earlier fetch left."""
    hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)
    held = 0
    with contextlib.suppress(FileNotFoundError), partial.open("rb") as file:
        while piece := file.read(1 << 20):
            hasher.update(piece)
            held += len(piece)
    return hasher, held


def _publish(partial: Path, destination: Path) -> None:
    """Make the file durable, then visible, then its name durable."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(destination)
    directory = os.open(destination.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
