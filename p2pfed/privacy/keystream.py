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


class RandomWords(Protocol):
    """A source of independent uniform 64-bit words."""

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return `count` fresh words; no word is ever given twice."""
        ...


class KeyStream:
    """AES-256 in counter mode under a fresh key of the operating system; one per release.

    There is deliberately no way to give it a key or a seed. A forked child never continues its
    parent's stream: it draws a new key at its first word.
    """

    __slots__ = ("_encryptor", "_pid")

    def __init__(self) -> None:
        self._rekey()

    def _rekey(self) -> None:
        self._pid = os.getpid()
        self._encryptor = Cipher(AES(os.urandom(32)), CTR(bytes(16))).encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return `count` fresh uniform 64-bit words."""
        if os.getpid() != self._pid:
            self._rekey()
        size = 8 * count
        raw = bytearray(size + 15)  # update_into wants room for a block's end
        view = memoryview(raw)
        for start in range(0, size, len(_ZEROS)):
            length = min(len(_ZEROS), size - start)
            self._encryptor.update_into(_ZEROS[:length], view[start : start + length + 15])
        return np.frombuffer(raw, np.uint64, count)
