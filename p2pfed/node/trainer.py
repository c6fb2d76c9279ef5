"""Parent end of the trainer process: start it, ask it, restart it when it dies.

What crosses: JSON lines over a socket pair, vectors as files in a private folder on tmpfs where
there is one. Only what the gate released comes back; a view is a function of public facts.

Invariant: whatever the trainer does (crash, hang, run out of memory, talk nonsense) ends as one
`TrainerError` for the request that was outstanding, and as a restart with back-off. The node lives
on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from p2pfed.errors import TrainerError

__all__ = ["Trainer", "exchange_folder"]

logger = logging.getLogger(__name__)

FIRST_BACKOFF = 1.0
MOST_BACKOFF = 60.0
START_DEADLINE = 300.0  # importing torch and reading a hospital's data may take minutes
ANSWER_DEADLINE = 86400.0  # of a large model a round may take hours; longer is a hang
STOP_DEADLINE = 10.0
MAX_LINE = 1 << 20
LOST_AFTER = 3  # short lives in a row; from then on nobody need wait for this node
_DIED = "the trainer died while it was working"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the folder made in it is private


@contextmanager
def exchange_folder(data_dir: Path) -> Iterator[Path]:
    """A folder (0700) for views and payloads, in memory where the system has a tmpfs.

    Its name follows from the data directory, whose lock the caller holds: what a killed daemon left
    there is removed by the next one.
    """
    name = hashlib.blake2b(os.fsencode(data_dir.resolve()), digest_size=12).hexdigest()
    folder = _SHARED_MEMORY / f"p2pfed-{os.geteuid()}-{name}"
    try:
        if folder.exists():
            shutil.rmtree(folder)  # fails if it is a link or somebody else's
        folder.mkdir(mode=0o700)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="exchange-", dir=data_dir))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Trainer:
    """The trainer of one node.

    Args:
        config: The node's configuration file; the trainer reads it for itself.
        exchange: Folder for views and payloads.
        on_ready: Called with the trainer's first message after every start.
        on_gone: Called whenever it has ended, with whether it fails again and again.
    """

    def __init__(
        self,
        config: Path,
        exchange: Path,
        *,
        on_ready: Callable[[dict[str, Any]], None],
        on_gone: Callable[[bool], None],
    ) -> None:
        self.exchange = exchange
        self.state = "starting"
        self.restarts = 0
        self.failures = 0  # short lives in a row
        self.problem = ""
        self.pid: int | None = None
        self._config = config
        self._on_ready = on_ready
        self._on_gone = on_gone
        self._stream: trio.SocketStream | None = None
        self._buffer = bytearray()
        self._turn = trio.Lock()
        self._life = trio.CancelScope()
        self._breach = ""

    async def run(self) -> None:
        """Keep a trainer alive until cancelled."""
        backoff = FIRST_BACKOFF
        while True:
            started = trio.current_time()
            await self._one_life()
            self.failures += 1
            if trio.current_time() - started > MOST_BACKOFF:
                backoff, self.failures = FIRST_BACKOFF, 0
            self.state = "restarting"
            self._on_gone(self.failures >= LOST_AFTER)
            self.restarts += 1
            logger.warning("the trainer ended (%s); restart in %.0f s", self.problem, backoff)
            await trio.sleep(backoff)
            backoff = min(2 * backoff, MOST_BACKOFF)

    async def _one_life(self) -> None:
        ours, theirs = socket.socketpair()
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        try:
            with theirs:
                process = await self._started(theirs.fileno())
        except OSError as error:  # no memory or no process left: the node lives on
            self.problem = str(error)
            await stream.aclose()
            return
        self.pid = process.pid
        self._buffer.clear()
        self._life, self._breach = trio.CancelScope(), ""
        problem = "it did not start in time"
        try:
            with trio.move_on_after(START_DEADLINE):
                problem = await self._greeting(stream)
            if not problem:
                with self._life:
                    await process.wait()
        finally:
            self._stream = None
            await self._end(process, stream)
            self.pid = None
        self.problem = problem or self._breach or f"exit status {process.returncode}"

    async def _started(self, control: int) -> trio.Process:
        command = [sys.executable, "-P", "-m", "p2pfed.training", "serve"]  # -P: no code from here
        command += [
            "--config",
            str(self._config),
            "--control-fd",
            str(control),
            "--exchange",
            str(self.exchange),
        ]
        return await trio.lowlevel.open_process(command, pass_fds=[control])

    async def _greeting(self, stream: trio.SocketStream) -> str:
        """Empty once it is ready, else what is wrong."""
        try:
            hello = await self._line(stream)
        except TrainerError as error:
            return error.what
        if hello.get("event") != "ready":
            told = [str(hello.get(key, "")) for key in ("what", "why", "do")]
            return "; ".join(text for text in told if text) or "it said nothing of use"
        if not re.fullmatch("[0-9a-f]{64}", str(hello.get("task_id"))):
            return "it did not say which task it has"
        self._stream = stream
        self.state, self.problem = "ready", ""
        self._on_ready(hello)
        return ""

    async def _end(self, process: trio.Process, stream: trio.SocketStream) -> None:
        with trio.CancelScope(shield=True):
            with contextlib.suppress(
                trio.BrokenResourceError,
                trio.ClosedResourceError,
                trio.BusyResourceError,  # it died while a question was on its way
            ):
                await stream.send_all(b'{"op": "stop"}\n')
            await stream.aclose()
            with trio.move_on_after(STOP_DEADLINE):
                await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request, one answer.

        Raises:
            TrainerError: The trainer is not there, died, or talks nonsense.
        """
        async with self._turn:
            stream = self._stream
            if stream is None:
                raise TrainerError("the trainer is not running", self.problem)
            try:
                with trio.fail_after(ANSWER_DEADLINE):
                    return await self._answer(stream, request)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self._end_life("")
                raise TrainerError(_DIED) from error
            except trio.TooSlowError as error:
                self._end_life("it did not answer in time")
                raise TrainerError("the trainer did not answer in time") from error
            except TrainerError as error:
                self._end_life(error.what)
                raise

    async def _answer(self, stream: trio.SocketStream, request: dict[str, Any]) -> dict[str, Any]:
        if self._buffer:
            raise TrainerError("the trainer spoke without being asked")
        await stream.send_all(json.dumps(request).encode() + b"\n")
        return await self._line(stream)

    def _end_life(self, breach: str) -> None:
        """Question and answer may be out of step from here on: only a new process helps."""
        self._stream = None
        self.state = "restarting"
        self._breach = "" if breach == _DIED else breach
        self._life.cancel()

    async def _line(self, stream: trio.SocketStream) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            try:
                received = await stream.receive_some(65536)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise TrainerError(_DIED) from error
            self._buffer += received
            if not received:
                raise TrainerError(_DIED)
            if len(self._buffer) > MAX_LINE:
                raise TrainerError("the trainer sent a line that is too long")
        line, _, rest = self._buffer.partition(b"\n")
        self._buffer = bytearray(rest)
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TrainerError("the trainer sent something that is not JSON") from error
        if not isinstance(answer, dict):
            raise TrainerError("the trainer sent something that is not an object")
        return answer
