"""Random words for privacy noise: AES-256 in counter mode, one fresh key of the system per release.

Invariant: no word is given twice, by no process. There is no key, seed or state to hand over.

Source: NIST SP 800-38A, section 6.5 (counter mode). Not here: what is drawn from the words
(`noise`).
"""

from __future__ import annotations

import os
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

__all__ = ["KeyStream", "RandomWords"]

_ZEROS = bytes(1 << 16)  # the plaintext whose encryption is the key stream
_ROOM = 16  # the cipher wants room for a block's end
_forks: list[None] = []  # as many as there were forks on the way to this process
os.register_at_fork(after_in_child=lambda: _forks.append(None))


class RandomWords(Protocol):
    """A source of independent uniform bits; none is ever given twice."""

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return `count` fresh 64-bit words."""
        ...

    def octets(self, count: int) -> NDArray[np.uint8]:
        """Return `count` fresh bytes; the next call of `octets` overwrites them."""
        ...


class KeyStream:
    """AES-256 in counter mode under a fresh key of the operating system; one per release.

    There is deliberately no way to give it a key or a seed. A forked child never continues its
    parent's stream: it draws a new key at its first word.
    """

    __slots__ = ("_buffer", "_encryptor", "_process")

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)
        self._rekey()

    def _rekey(self) -> None:
        self._process = os.getpid(), len(_forks)
        self._encryptor = Cipher(AES(os.urandom(32)), CTR(bytes(16))).encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return `count` fresh uniform 64-bit words."""
        raw = np.empty(count + 2, np.uint64)
        self._fill(raw.view(np.uint8), 8 * count)
        return raw[:count]

    def octets(self, count: int) -> NDArray[np.uint8]:
        """Return `count` fresh uniform bytes; the next call of `octets` overwrites them."""
        if self._buffer.size < count + _ROOM:
            self._buffer = np.empty(count + _ROOM, np.uint8)
        self._fill(self._buffer, count)
        return self._buffer[:count]

    def _fill(self, raw: NDArray[np.uint8], size: int) -> None:
        """Fill the first bytes; `raw` has `_ROOM` more."""
        if (os.getpid(), len(_forks)) != self._process:  # a number may come again, both will not
            self._rekey()
        for start in range(0, size, len(_ZEROS)):
            length = min(len(_ZEROS), size - start)
            self._encryptor.update_into(_ZEROS[:length], raw.data[start : start + length + 15])
