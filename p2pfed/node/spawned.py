"""A trainer that the node starts: a child process, asked over a socket pair.

Invariant: a child is gone when `end` returns, and every start is a process of its own; nothing of
one life is left to the next.

Not here: when the next one is started (`trainer`), what the process does (training room).
"""

from __future__ import annotations

import contextlib
import socket
import sys
from pathlib import Path

import trio

from p2pfed.errors import TrainerError

__all__ = ["Spawned"]

STOP_DEADLINE = 10.0
MOST_KILLABLE = "1000"  # of memory that runs out: the trainer goes first (proc(5))


class Spawned:
    """See the module docstring; a `trainer.Source`.

    Args:
        config: The node's configuration file; the trainer reads it for itself.
        exchange: Folder for views and payloads.
    """

    hint = ""
    comes_by_itself = True
    is_ours = True

    def __init__(self, config: Path, exchange: Path) -> None:
        self.awaited = "starting"
        self._config = config
        self._exchange = exchange

    async def next(self) -> _Child:
        """Start one.

        Raises:
            TrainerError: No memory or no process is left.
        """
        ours, theirs = socket.socketpair()
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        self.awaited = "restarting"
        try:
            with theirs:
                return _Child(stream, await self._started(theirs.fileno()))
        except OSError as error:
            await stream.aclose()
            raise TrainerError(str(error)) from error

    async def _started(self, control: int) -> trio.Process:
        command = [sys.executable, "-P", "-m", "p2pfed.training", "serve"]  # -P: no code from here
        command += ["--config", str(self._config), "--control-fd", str(control)]
        command += ["--exchange", str(self._exchange)]
        process = await trio.lowlevel.open_process(command, pass_fds=[control])
        _first_to_go(process.pid)
        return process

    def let_in(self, on: bool) -> None:
        """Nobody comes from outside; what comes after a pause is no restart."""
        if on:
            self.awaited = "starting"


def _first_to_go(pid: int) -> None:
    """When memory runs out. The trainer does so itself, but only once it has read torch.

    Until then the kernel might take the daemon for it, which is larger.
    """
    with contextlib.suppress(OSError):  # other systems have no such file
        Path(f"/proc/{pid}/oom_score_adj").write_text(MOST_KILLABLE, "ascii")


class _Child:
    def __init__(self, stream: trio.SocketStream, process: trio.Process) -> None:
        self.stream = stream
        self.pid: int | None = process.pid
        self._process = process

    async def ended(self) -> None:
        await self._process.wait()

    async def end(self) -> str:
        with contextlib.suppress(
            trio.BrokenResourceError,
            trio.ClosedResourceError,
            trio.BusyResourceError,  # it died while a question was on its way
        ):
            with trio.move_on_after(STOP_DEADLINE):  # it may not read
                await self.stream.send_all(b'{"op": "stop"}\n')
        await trio.aclose_forcefully(self.stream)
        with trio.move_on_after(STOP_DEADLINE):
            await self._process.wait()
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        return f"exit status {self._process.returncode}"
