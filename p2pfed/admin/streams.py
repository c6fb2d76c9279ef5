"""Answers that are sent piece by piece: lines as they happen, and files.

Starlette's StreamingResponse cancels its own last send when hypercorn reports the end of the
exchange as a disconnect; the connection then stays open (seen with 1.10 on 0.18). Here the last
send lies outside of what a disconnect cancels.

Invariants: one piece is in memory at a time; a source is closed when it or its client ends; reading
a file never holds up the event loop.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import BinaryIO

import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

__all__ = ["Download", "Lines"]

_PIECE = 1 << 19  # a client that takes less in a write's time (server.Limits) is dropped


class Lines(Response):
    """A stream of lines that ends when its source or its client does.

    Args:
        lines: The source, a generator.
    """

    media_type: str | None = "application/x-ndjson"

    def __init__(self, lines: AsyncIterator[bytes]) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._pieces = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, as an ASGI application."""
        del scope
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        gone = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_until_gone, receive, nursery.cancel_scope)
            async with aclosing(self._pieces):  # type: ignore[type-var] # it is our generator
                async for piece in self._pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            gone = False
            nursery.cancel_scope.cancel()
        if not gone:
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class Download(Lines):
    """A file with its length, so that a client knows whether it got the whole.

    Args:
        file: Open for reading, at its beginning; closed here.
        sent: Called when it is over.
    """

    media_type: str | None = "application/octet-stream"

    def __init__(self, file: BinaryIO, sent: Callable[[], object] = lambda: None) -> None:
        super().__init__(_pieces_of(file))
        self._sent = sent
        self.headers["content-length"] = str(os.fstat(file.fileno()).st_size)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, as an ASGI application."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._sent()


async def _pieces_of(file: BinaryIO) -> AsyncGenerator[bytes, None]:
    try:
        while piece := await trio.to_thread.run_sync(file.read, _PIECE):
            yield piece
    finally:
        file.close()


async def _until_gone(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
