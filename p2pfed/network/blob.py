"""Bulk files between members: fetched in chunks, each checked as it comes, resumed anywhere.

Request: magic, name of the file (`identity/filehash`), first chunk (8 bytes), 1 if the list of
chunk hashes is wanted, else 0. Answer: length of the file (8 bytes; all ones = "I do not hold it"),
the list if it was wanted, then the chunks from that one on. The name commits to the list and the
list to the chunks, so a peer that lies is found out with its first wrong chunk, and a fetch goes on
where the last one ended: after a cut, after a restart, at another peer.

Invariants: ``destination`` either does not exist, is what it was, or is the whole file asked for.
What waits in the hidden siblings is always a beginning of the right file; they hold at most
``max_bytes`` and the list. Neither side keeps more than a chunk in memory, and the list.

Not here: who may ask (``host``), which file a name stands for (the node's ``Gatekeeper``), choosing
another peer after a failure (the node).
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections import OrderedDict
from typing import TYPE_CHECKING

import trio

from p2pfed.errors import FactRejected, PeerUnreachable, RemoteProtocolError
from p2pfed.identity.filehash import CHUNK_BYTES, HASH_BYTES, ChunkList
from p2pfed.network.framing import CHUNK, deadline, read_exact, write_all

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from p2pfed.network.framing import ByteStream

__all__ = ["BlobServer", "drop_partials", "receive_blob"]

_REQUEST = struct.Struct(f"!4s{HASH_BYTES}sQ?")
_TOTAL = struct.Struct("!Q")
_MAGIC = b"PFB2"
_ABSENT = 2**64 - 1
_LISTS = 8  # of files served lately; 640 KiB each at most (20 GiB)
_PACES = CHUNK_BYTES // CHUNK  # one chunk may take as long as so many pieces of the framing


class BlobServer:
    """Answers requests; remembers the lists of the files that were asked for last.

    Args:
        stall: Seconds a step may take.
    """

    def __init__(self, *, stall: float) -> None:
        self.stall = stall
        self._lists: OrderedDict[bytes, ChunkList] = OrderedDict()
        self._reading = trio.Lock()  # one file is hashed at a time, whoever asks

    async def serve(self, stream: ByteStream, find: Callable[[bytes], Path | None]) -> None:
        """Answer one request.

        Args:
            stream: The opened stream.
            find: Name to file, or None when we do not hold (or do not give) it.

        Raises:
            RemoteProtocolError: The request makes no sense.
            PeerUnreachable: The peer stopped taking bytes.
        """
        stall = self.stall
        request = await read_exact(stream, _REQUEST.size, stall=stall)
        magic, name, first, listed = _REQUEST.unpack(request)
        if magic != _MAGIC:
            raise RemoteProtocolError("a blob request does not begin with the magic bytes")
        path = find(name)
        chunks = None if path is None else await self._chunks(path, name)
        if path is None or chunks is None:
            await write_all(stream, _TOTAL.pack(_ABSENT), stall=stall)
            return
        await write_all(stream, _TOTAL.pack(chunks.size), stall=stall)
        if listed:
            await write_all(stream, chunks.hashes, stall=stall)
        async with await trio.open_file(path, "rb") as file:
            await file.seek(min(first * CHUNK_BYTES, chunks.size))
            while piece := await file.read(CHUNK):
                await write_all(stream, piece, stall=stall)

    async def _chunks(self, path: Path, name: bytes) -> ChunkList | None:
        """The list of a file; None if it is gone, or has rotted."""
        async with self._reading:
            if name not in self._lists:
                found = await trio.to_thread.run_sync(_list_of, path)
                if found is None or found.name != name:
                    return None
                self._lists[name] = found
                while len(self._lists) > _LISTS:
                    self._lists.popitem(last=False)
            self._lists.move_to_end(name)
            return self._lists[name]


def _list_of(path: Path) -> ChunkList | None:
    try:
        with path.open("rb") as file:
            return ChunkList.of(file)
    except OSError:
        return None


async def receive_blob(
    stream: ByteStream, name: bytes, destination: Path, *, max_bytes: int, stall: float
) -> None:
    """Fetch the file of this name into ``destination``.

    Args:
        stream: A stream on which the peer serves blobs.
        name: The hash that names the wanted file, 32 bytes.
        destination: Where the finished file appears, durably and at once.
        max_bytes: Longest file accepted.
        stall: Seconds without a byte after which the fetch is given up (what came is kept); a
            chunk as a whole may take four times as long.

    Raises:
        RemoteProtocolError: The file is longer than allowed, or the list or a chunk is not of the
            file asked for. The chunks before it are kept.
        PeerUnreachable: The peer does not hold it, went away or stood still.
        OSError: The disk failed, or is full.
    """
    partial = _Partial(destination, name)
    await trio.to_thread.run_sync(partial.load)
    listed = partial.chunks is None
    await write_all(stream, _REQUEST.pack(_MAGIC, name, partial.good, listed), stall=stall)
    (total,) = _TOTAL.unpack(await read_exact(stream, _TOTAL.size, stall=stall))
    if total == _ABSENT:
        raise PeerUnreachable("the peer does not hold this file")
    if total > max_bytes:
        raise RemoteProtocolError(f"the file has {total} bytes, the limit is {max_bytes}")
    if listed:
        hashes = await read_exact(stream, HASH_BYTES * ChunkList.count(total), stall=stall)
        partial.accept(ChunkList(total, hashes))
    chunks = partial.chunks
    assert chunks is not None
    if total != chunks.size:
        raise RemoteProtocolError(f"the file has {chunks.size} bytes, the peer says {total}")
    async with await trio.open_file(partial.data, "ab") as file:
        for index in range(partial.good, len(chunks)):
            with deadline(_PACES * stall, "fetching a chunk of a file"):
                chunk = await read_exact(stream, chunks.length(index), stall=stall)
            if not chunks.fits(index, chunk):
                if index == 0:
                    partial.drop()
                raise RemoteProtocolError(f"chunk {index} is not of the file asked for")
            await file.write(chunk)
    await trio.to_thread.run_sync(partial.publish)


class _Partial:
    """What an earlier fetch left of a file: its list, and the good chunks at its beginning."""

    def __init__(self, destination: Path, name: bytes) -> None:
        stem = f".{destination.name}.{name.hex()[:16]}"
        self.data = destination.with_name(f"{stem}.part")
        self.chunks: ChunkList | None = None
        self.good = 0
        self._list = destination.with_name(f"{stem}.list")
        self._destination = destination
        self._name = name

    def load(self) -> None:
        """Look at what is there; whatever does not verify is dropped."""
        with contextlib.suppress(FileNotFoundError, FactRejected):
            kept = self._list.read_bytes()
            chunks = ChunkList(int.from_bytes(kept[:8], "big"), kept[8:])
            self.chunks = chunks if len(chunks) > 1 and chunks.name == self._name else None
        if self.chunks is None:
            self.drop()
            return
        with contextlib.suppress(FileNotFoundError), self.data.open("r+b") as file:
            self.good = self.chunks.num_good(file)
            file.truncate(min(self.good * CHUNK_BYTES, self.chunks.size))

    def accept(self, chunks: ChunkList) -> None:
        """Keep the list; a torn write is dropped by the next `load`.

        That of a single chunk is not kept: its name does not hold the length that the peer says.

        Raises:
            RemoteProtocolError: It is the list of another file.
        """
        if chunks.name != self._name:
            raise RemoteProtocolError("the list of chunks is not of the file asked for")
        if len(chunks) > 1:
            self._list.write_bytes(chunks.size.to_bytes(8, "big") + chunks.hashes)
        self.chunks = chunks

    def drop(self) -> None:
        """Remove it."""
        self.data.unlink(missing_ok=True)
        self._list.unlink(missing_ok=True)

    def publish(self) -> None:
        """Make the file durable, then visible, then its name durable."""
        with self.data.open("rb") as file:
            os.fsync(file.fileno())
        self.data.replace(self._destination)
        self._list.unlink(missing_ok=True)
        directory = os.open(self._destination.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def drop_partials(folder: Path, *, keep: Path | None = None) -> None:
    """Remove what unfinished fetches left in a folder, but for the file at ``keep``."""
    for pattern in (".*.part", ".*.list"):
        for path in folder.glob(pattern):
            if keep is None or not path.name.startswith(f".{keep.name}."):
                path.unlink(missing_ok=True)
