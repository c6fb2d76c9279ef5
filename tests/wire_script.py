"""A peer that says what it was given, whatever it hears: a byte stream for tests of formats."""

from __future__ import annotations

import trio


class Script:
    """Reads come from the script and end with it.

    Attributes:
        written: All that was written to the peer.
    """

    def __init__(self, said: bytes) -> None:
        self.written = b""
        self._said = said

    async def read(self, n: int) -> bytes:
        await trio.lowlevel.checkpoint()
        taken, self._said = self._said[:n], self._said[n:]
        return taken

    async def write(self, data) -> None:
        await trio.lowlevel.checkpoint()
        self.written += bytes(data)
