"""Questions and answers with a trainer, as lines of JSON over one stream.

The trainer speaks first (its greeting); from then on each of its lines answers a question. `hear`
reads all the time, so that the end of the stream is seen at once and not with the next question.

Invariant: the first thing that is wrong ends the conversation, and `breach` says what it was; a
stream on which question and answer may be out of step is never used again.

Not here: deadlines and what follows from an end (`trainer`), what the lines say (`shell`, and
`training/control.py` at the other end).
"""

from __future__ import annotations

import json
from typing import Any

import trio

from p2pfed.errors import TrainerError

__all__ = ["DIED", "MAX_LINE", "Conversation"]

MAX_LINE = 1 << 20
DIED = "the trainer died while it was working"
_PIECE = 1 << 16


class Conversation:
    """See the module docstring.

    Args:
        stream: Connected to the trainer; closed by its owner.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self.breach = ""  # why it is over; empty while it is not
        self.over = trio.Event()
        self._stream = stream
        self._expect()

    def _expect(self) -> None:
        self._answer: dict[str, Any] | None = None
        self._news = trio.Event()

    async def hear(self) -> None:
        """Take in lines until the conversation is over."""
        try:
            await self._hear_for_ever()
        except TrainerError as error:
            self.end(error.what)
        finally:
            self.end(DIED)

    async def _hear_for_ever(self) -> None:
        buffer = bytearray()
        while True:
            buffer += await self._piece()
            while (end := buffer.find(b"\n")) >= 0:
                self._take(bytes(buffer[:end]))
                del buffer[: end + 1]
            if len(buffer) > MAX_LINE:
                raise TrainerError("the trainer sent a line that is too long")

    async def _piece(self) -> bytes:
        try:
            received = await self._stream.receive_some(_PIECE)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise TrainerError(DIED) from error
        if not received:
            raise TrainerError(DIED)
        return bytes(received)

    def _take(self, line: bytes) -> None:
        if self._news.is_set():
            raise TrainerError("the trainer spoke without being asked")
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TrainerError("the trainer sent something that is not JSON") from error
        if not isinstance(answer, dict):
            raise TrainerError("the trainer sent something that is not an object")
        self._answer = answer
        self._news.set()

    def end(self, breach: str) -> None:
        """Let nobody wait any more; the first reason stands."""
        self.breach = self.breach or breach
        self.over.set()
        self._news.set()

    async def greeting(self) -> dict[str, Any]:
        """The trainer's first line.

        Raises:
            TrainerError: It is over before.
        """
        return await self._told()

    async def _told(self) -> dict[str, Any]:
        await self._news.wait()
        if self._answer is None:
            raise TrainerError(self.breach)
        return self._answer

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One question, one answer; one call at a time.

        Raises:
            TrainerError: The conversation is over.
        """
        if self.breach:
            raise TrainerError(self.breach)
        self._expect()
        try:
            await self._stream.send_all(json.dumps(request).encode() + b"\n")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.end(DIED)
        return await self._told()
