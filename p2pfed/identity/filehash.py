"""The name of a bulk file (a first model, a checkpoint): a hash over the hashes of its chunks.

A file of one chunk is named by its BLAKE2b-256, a longer one by a hash over its length and its
chunks' hashes. Whoever knows the name can check the list of hashes before a byte of the file has
come, and each chunk as it comes: a wrong chunk is found at once, with its sender, and the right
ones need never be fetched again, whoever gave them.

Invariant: two files with one name are equal (BLAKE2b has no known collisions; the two kinds of
names differ by personalisation).

Source: hash trees (Merkle 1987), of depth one: 32 bytes for each MiB are small enough to send.
Not here: the transfer (`network/blob`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import BinaryIO

from p2pfed.errors import FactRejected

__all__ = ["CHUNK_BYTES", "HASH_BYTES", "ChunkList", "chunk_hash", "file_hash"]

CHUNK_BYTES = 1 << 20
HASH_BYTES = 32
_PERSON = b"p2pfed-file"


def chunk_hash(chunk: bytes) -> bytes:
    """BLAKE2b-256 of one chunk."""
    return hashlib.blake2b(chunk, digest_size=HASH_BYTES).digest()


def file_hash(data: bytes) -> bytes:
    """The name of a file with this content, 32 bytes."""
    pieces = (data[i : i + CHUNK_BYTES] for i in range(0, max(1, len(data)), CHUNK_BYTES))
    return ChunkList(len(data), b"".join(map(chunk_hash, pieces))).name


@dataclass(frozen=True, slots=True)
class ChunkList:
    """A file's length and the hashes of its chunks, in order.

    Attributes:
        size: Length of the file, bytes.
        hashes: 32 bytes for each chunk of 1 MiB (the last may be shorter; an empty file has one).

    Raises:
        FactRejected: Not as many hashes as the length asks for.
    """

    size: int
    hashes: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if self.size < 0 or len(self.hashes) != HASH_BYTES * self.count(self.size):
            raise FactRejected(f"a list of {len(self.hashes)} bytes for a file of {self.size}")

    @staticmethod
    def count(size: int) -> int:
        """How many chunks a file of this length has."""
        return max(1, -(-size // CHUNK_BYTES))

    @property
    def name(self) -> bytes:
        """The name of the file, 32 bytes."""
        if len(self.hashes) == HASH_BYTES:
            return self.hashes
        whole = self.size.to_bytes(8, "little") + self.hashes
        return hashlib.blake2b(whole, digest_size=HASH_BYTES, person=_PERSON).digest()

    @classmethod
    def of(cls, file: BinaryIO) -> ChunkList:
        """Read a file from its beginning, a chunk at a time."""
        size, hashes = 0, bytearray()
        while (piece := file.read(CHUNK_BYTES)) or not hashes:
            size += len(piece)
            hashes += chunk_hash(piece)
        return cls(size, bytes(hashes))

    def __len__(self) -> int:
        return self.count(self.size)

    def length(self, index: int) -> int:
        """Length of one chunk, bytes."""
        return min(CHUNK_BYTES, self.size - index * CHUNK_BYTES)

    def fits(self, index: int, chunk: bytes) -> bool:
        """Whether this is that chunk of the file."""
        expected = self.hashes[HASH_BYTES * index : HASH_BYTES * (index + 1)]
        return len(chunk) == self.length(index) and chunk_hash(chunk) == expected

    def num_good(self, file: BinaryIO) -> int:
        """How many chunks at the beginning of a file are the right ones."""
        for index in range(len(self)):
            if not self.fits(index, file.read(self.length(index))):
                return index
        return len(self)
