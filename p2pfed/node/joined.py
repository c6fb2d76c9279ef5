"""A trainer that comes by itself, through a socket: a service of another user, or a person's loop.

With `train.task = "loop"` or `train.user` the node starts no process. It listens on a Unix socket
(0600; where `train.user` is set 0660 and of that user's group) and takes one training process at a
time. Each is told one line: `{"op": "welcome", "exchange": FOLDER, ...}`, after which it greets and
is asked like a trainer that the node starts; or `{"op": "busy"}` (there is one already) or
`{"op": "refused"}`, with what, why and do, and the end of the stream.

Invariants: only the daemon's own user, root and `train.user` are let in, by the kernel's word and
whatever the file's mode has become; a process that joins can end nothing but its own connection;
the place is free again as soon as the connection of the one that had it has ended.

Not here: greeting, asking and deadlines (`trainer`), the other end (`training/loop_link.py` and
`training/service.py`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket as sockets
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio

from p2pfed.admin.binding import bound_socket
from p2pfed.node.trainer import give_to_group

__all__ = ["Joined", "credentials"]

logger = logging.getLogger(__name__)

WRITE_DEADLINE = 5.0  # seconds for one line to somebody who does not read
_HUNG_UP = select.POLLHUP | getattr(select, "POLLRDHUP", 0)
_UCRED = struct.Struct("3i")  # pid, uid, gid


def credentials(connected: Any) -> tuple[int | None, int | None]:
    """Process and user at the other end of a Unix socket, by the kernel's word.

    Args:
        connected: A connected socket.

    Returns:
        Process id and user id; None where the system does not say (then the file's mode decides).
    """
    option = getattr(sockets, "SO_PEERCRED", None)
    if option is None:
        return None, None
    pid, uid, _ = _UCRED.unpack(connected.getsockopt(sockets.SOL_SOCKET, option, _UCRED.size))
    return pid, uid


class Joined:
    """See the module docstring; a `trainer.Source`.

    Args:
        path: Where to listen.
        welcome: What a process that is taken is told besides `op`.
        account: User and group id of another user who may join.
        service: What is expected is p2pfed's own trainer, not a loop.
    """

    comes_by_itself = False

    def __init__(
        self,
        path: Path,
        welcome: Mapping[str, Any],
        *,
        account: tuple[int, int] | None = None,
        service: bool = False,
    ) -> None:
        self.is_ours = service
        self.awaited = f"waiting for {'the trainer' if service else 'a training loop'} to join"
        self.hint = (
            "start the trainer's service: systemctl start p2pfed-trainer"
            f"   (or: p2pfed trainer -c FILE; it joins through {path})"
            if service
            else f"start your training loop on this machine: p2pfed.join(...), through {path}"
        )
        self._path = path
        self._account = account
        self._turned_away = ""  # for what reason the last one was, so that it is logged once
        self._welcome = {"op": "welcome", **welcome}
        self._open = True
        self._loop: _Loop | None = None  # who has the place
        self._waits = False  # whether it has not been fetched by `next`
        self._news = trio.Event()

    async def listen(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Let processes join until cancelled.

        Raises:
            ConfigError: The socket cannot be made, or not be given to the trainer's group.
            StateInUse: Another daemon listens there.
        """
        with bound_socket(self._path, mode=0o600, key="train.loop_socket") as listening:
            if self._account is not None:
                give_to_group(self._path, self._account[1], 0o660)
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
            task_status.started()
            await trio.serve_listeners(self._met, [listener])

    async def next(self) -> _Loop:
        """Wait until a process has joined."""
        while True:
            if self._loop is not None and self._waits:
                self._waits = False
                return self._loop
            self._news = trio.Event()
            await self._news.wait()

    def let_in(self, on: bool) -> None:
        """Whether a process may join now; one that was not fetched yet is sent away."""
        self._open = on
        if not on and self._loop is not None and self._waits:
            self._loop.left.set()

    async def _met(self, stream: trio.SocketStream) -> None:
        """One connection; whatever is wrong with it is the end of it alone."""
        try:
            await self._let_the_dead_go()
            pid, user = credentials(stream.socket)
            loop, refusal = _Loop(stream, pid), self._why_not(user)
            if loop.is_gone:
                return
            if refusal is None:
                self._turned_away = ""
                await self._hold(loop)
            else:
                new = refusal["what"] != self._turned_away  # a service asks again and again
                self._turned_away = refusal["what"]
                level = logging.WARNING if new else logging.DEBUG
                logger.log(level, "process %s may not join: %s", pid, refusal["what"])
                await _tell(stream, refusal)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            logger.info("a process that wanted to join has gone: %s", error)
        except Exception:
            logger.exception("bug while a process joins; hanging up")

    async def _let_the_dead_go(self) -> None:
        """Who has the place and has ended leaves it at once: wait for that, in bounded time."""
        with trio.move_on_after(WRITE_DEADLINE):
            while self._loop is not None and self._loop.is_gone:
                await self._loop.freed.wait()

    async def _hold(self, loop: _Loop) -> None:
        self._loop = loop  # before the first wait: nobody else gets the place
        try:
            if await _tell(loop.stream, self._welcome) and self._open:  # no pause meanwhile
                self._waits = True
                self._news.set()
                await loop.left.wait()
        finally:
            self._loop, self._waits = None, False
            loop.freed.set()

    def _why_not(self, user: int | None) -> dict[str, str] | None:
        named = None if self._account is None else self._account[0]
        if user not in {None, 0, os.geteuid(), named}:
            others = "" if named is None else f", and train.user is {named}"
            return {
                "op": "refused",
                "what": "this process may not train for this node",
                "why": f"it runs as user {user}, the daemon as user {os.geteuid()}{others}",
                "do": "run the training loop as the daemon's user",
            }
        if not self._open:
            return {
                "op": "refused",
                "what": "training is paused at this node",
                "why": "its operator has paused it",
                "do": "run: p2pfed task resume   (then start the loop again)",
            }
        if self._loop is not None:
            return {
                "op": "busy",
                "what": f"another {'trainer' if self.is_ours else 'training loop'} has joined this"
                " node",
                "why": f"a node has one trainer at a time; process {self._loop.pid} has the place",
                "do": "end that one first; a second loop on other patients needs a node of its own",
            }
        return None


class _Loop:
    """A training loop that has joined."""

    def __init__(self, stream: trio.SocketStream, pid: int | None) -> None:
        self.stream = stream
        self.pid = pid
        self.left = trio.Event()  # the node has let go of it
        self.freed = trio.Event()  # its place is free

    @property
    def is_gone(self) -> bool:
        """Whether its end of the stream is closed."""
        descriptor = self.stream.socket.fileno()
        if descriptor < 0:
            return True  # the node has closed it
        poll = select.poll()
        poll.register(descriptor, _HUNG_UP)
        return bool(poll.poll(0))

    async def ended(self) -> None:
        await trio.sleep_forever()  # it is not our child: the end of the stream tells

    async def end(self) -> str:
        with contextlib.suppress(
            trio.BrokenResourceError,
            trio.ClosedResourceError,
            trio.BusyResourceError,  # it went while a question was on its way
        ):
            await _tell(self.stream, {"op": "stop"})
        await trio.aclose_forcefully(self.stream)
        self.left.set()
        return "the training loop has left"


async def _tell(stream: trio.SocketStream, message: Mapping[str, Any]) -> bool:
    """Send one line; False to somebody who does not read."""
    with trio.move_on_after(WRITE_DEADLINE) as limit:
        await stream.send_all(json.dumps(message).encode() + b"\n")
    return not limit.cancelled_caught
