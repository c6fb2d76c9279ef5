"""The node's end of its trainer: greet it, ask it, let go of it, take the next one.

What crosses: JSON lines over a stream, vectors as files in a private folder on tmpfs where there is
one. Only what the gate released comes back; a view is a function of public facts.

Where a trainer comes from is a `Source`: a child that the node starts (`spawned`), or one that
joins through a socket (`joined`): a service of another user, or a training loop of the hospital's
own.

Invariant: whatever the trainer does (crash, hang, run out of memory, talk nonsense) ends as one
`TrainerError` for the request that was outstanding, and as a wait for the next trainer. The node
lives on.

Not here: the lines (`conversation`).
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import trio

from p2pfed.errors import ConfigError, TrainerError
from p2pfed.node.conversation import DIED, Conversation

__all__ = ["Attached", "Source", "Trainer", "exchange_folder", "give_to_group"]

logger = logging.getLogger(__name__)

FIRST_BACKOFF = 1.0
MOST_BACKOFF = 60.0
START_DEADLINE = 300.0  # at least: importing torch, and reading a hospital's data
LAST_WORDS = 0.5  # seconds for what a process that has ended sent before
LOST_AFTER = 3  # short lives in a row; from then on nobody need wait for this node
_ROOM = 1 << 30  # four views of a large model
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the folder made in it is private


@contextmanager
def exchange_folder(
    data_dir: Path, *, group: int | None = None, spare: Path | None = None
) -> Iterator[Path]:
    """A folder (0700) for views and payloads, in memory where the system has a tmpfs with room.

    Its name follows from the data directory, whose lock the caller holds: what a killed daemon left
    there is removed by the next one.

    Args:
        data_dir: The node's.
        group: Of a trainer that is another user: the folder becomes 2770 and this group's, and what
            is made in it is the group's too.
        spare: Where the folder is made if the tmpfs has no room; default: in `data_dir`.

    Raises:
        ConfigError: The group is not ours to give.
    """
    name = hashlib.blake2b(os.fsencode(data_dir.resolve()), digest_size=12).hexdigest()
    folder = _SHARED_MEMORY / f"p2pfed-{os.geteuid()}-{name}"
    try:
        if folder.exists():
            shutil.rmtree(folder)  # fails if it is a link or somebody else's
        scarce = shutil.disk_usage(_SHARED_MEMORY).free < _ROOM  # 64 MB in a usual container
        if not scarce:
            folder.mkdir(mode=0o700)
    except OSError:
        scarce = True
    if scarce:
        folder = (spare or data_dir) / f"exchange-{name}"
        if folder.exists():
            shutil.rmtree(folder)  # of a killed daemon
        folder.mkdir(mode=0o700)
    try:
        if group is not None:
            give_to_group(folder, group, 0o2770)
        with _marked_as_held(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _marked_as_held(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, by which the doctor tells it from one that a killed daemon left."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # the doctor may hold it for a moment
        yield
    finally:
        os.close(descriptor)


def give_to_group(path: Path, group: int, mode: int) -> None:
    """Let a group have a file or folder of ours.

    Raises:
        ConfigError: We are not in the group.
    """
    try:
        os.chown(path, -1, group)
        path.chmod(mode)
    except OSError as error:
        raise ConfigError(
            f"cannot give {path} to the trainer's group {group}",
            error.strerror or str(error),
            "put the daemon's user into it: usermod -aG GROUP USER   (then start the daemon again)",
        ) from error


class Attached(Protocol):
    """A trainer that has come.

    Attributes:
        stream: The lines to and from it.
        pid: Its process, where that is known.
    """

    stream: trio.SocketStream
    pid: int | None

    async def ended(self) -> None:
        """Return once it has ended by itself; may wait for ever where only the stream tells."""

    async def end(self) -> str:
        """Close the stream, see to it that it ends, and say how; in bounded time."""


class Source(Protocol):
    """Where trainers come from, one at a time.

    Attributes:
        awaited: The trainer's state while there is none.
        hint: What a person can do so that one comes; empty if nothing.
        comes_by_itself: Whether the node starts the next one itself.
        is_ours: Whether it is p2pfed's own trainer process, which reads the hospital's data before
            it greets and ends a round that nobody wants any more; or a person's program.
    """

    awaited: str
    hint: str
    comes_by_itself: bool
    is_ours: bool

    async def next(self) -> Attached:
        """Wait for a trainer.

        Raises:
            TrainerError: None can be had now.
        """

    def let_in(self, on: bool) -> None:
        """Whether one may come now."""


class Trainer:
    """The trainer of one node.

    Args:
        source: Where it comes from.
        exchange: Folder for views and payloads.
        on_ready: Called with the trainer's first message after every start.
        on_gone: Called whenever it has ended, with whether nobody need wait for the next.
        longest_answer: Seconds; what takes longer is taken for hung.
        paused: Start without a trainer.
    """

    def __init__(
        self,
        source: Source,
        exchange: Path,
        *,
        on_ready: Callable[[dict[str, Any]], None],
        on_gone: Callable[[bool], None],
        longest_answer: float,
        paused: bool = False,
    ) -> None:
        self.exchange = exchange
        self.state = "paused" if paused else source.awaited
        self.restarts = 0
        self.failures = 0  # short lives in a row
        self.problem = ""
        self.pid: int | None = None
        self.paused = paused
        self._source = source
        self._on_ready = on_ready
        self._on_gone = on_gone
        self._longest_answer = longest_answer
        self._life: Conversation | None = None  # with the one that is there, greeted or not
        self._talk: Conversation | None = None  # with the one that may be asked
        self._turn = trio.Lock()
        self._asked = False
        self._keeping = trio.CancelScope()
        self._stopped, self._resumed = trio.Event(), trio.Event()
        source.let_in(not paused)

    @property
    def hint(self) -> str:
        """What a person can do so that a trainer comes; empty if nothing is missing."""
        return self._source.hint if self.state == self._source.awaited else ""

    # --- one trainer after the other -----------------------------------------------------------

    async def run(self) -> None:
        """Keep a trainer alive until cancelled, except while paused."""
        while True:
            with trio.CancelScope() as self._keeping:
                if not self.paused:
                    await self._keep_one()
            self.state, self.problem = "paused", ""
            self._on_gone(True)
            self._stopped.set()
            await self._resumed.wait()
            self.state, self.failures = self._source.awaited, 0
            self._on_gone(not self._source.comes_by_itself)  # it is awaited, and has not failed

    async def pause(self) -> None:
        """End the trainer and start none; returns when it has ended."""
        if not self.paused:
            self.paused = True
            self._stopped.set()  # whoever waits for an earlier pause waits no more
            self._stopped, self._resumed = trio.Event(), trio.Event()
            self._source.let_in(False)
            self._let_go("training was paused")
            self._keeping.cancel()
        await self._stopped.wait()

    def resume(self) -> None:
        """Have a trainer again."""
        self.paused = False
        self._source.let_in(True)
        self._resumed.set()

    def leave_round(self, why: str) -> None:
        """Let go of a training loop that works for a run that is over.

        A trainer of our own ends its round first: it is kept, and its work is dropped.
        """
        if self._asked and not self._source.is_ours:
            self._let_go(why)

    async def _keep_one(self) -> None:
        backoff, self.failures = FIRST_BACKOFF, 0
        while True:
            started = trio.current_time()
            await self._one_life()
            self.failures += 1
            if trio.current_time() - started > MOST_BACKOFF:
                backoff, self.failures = FIRST_BACKOFF, 0
            self.state = self._source.awaited
            by_itself = self._source.comes_by_itself
            self._on_gone(self.failures >= LOST_AFTER or not by_itself)
            self.restarts += 1
            logger.warning("the trainer ended (%s); next one in %.0f s", self.problem, backoff)
            await trio.sleep(backoff)
            if by_itself:
                backoff = min(2 * backoff, MOST_BACKOFF)

    async def _one_life(self) -> None:
        try:
            attached = await self._source.next()
        except TrainerError as error:
            self.problem = error.what
            return
        self.pid = attached.pid
        problem = ""
        try:
            problem = await self._lived(attached)
        finally:
            self._life = self._talk = None
            self.state = self._source.awaited
            with trio.CancelScope(shield=True):
                fate = await attached.end()
            self.pid = None
        self.problem = problem or fate

    async def _lived(self, attached: Attached) -> str:
        """From the greeting to the end; what was wrong, or empty where it simply ended."""
        talk = self._life = Conversation(attached.stream)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk.hear)
            nursery.start_soon(_end_with, attached, talk)
            wrong = await self._greeting(talk)
            if wrong:
                talk.end(wrong)
            await talk.over.wait()
            nursery.cancel_scope.cancel()
        problem = wrong or talk.breach
        return "" if problem == DIED else problem

    @property
    def _start_deadline(self) -> float:
        """Seconds to the greeting: a trainer of ours reads the hospital's data before it."""
        ours = self._source.is_ours
        return max(START_DEADLINE, self._longest_answer) if ours else START_DEADLINE

    async def _greeting(self, talk: Conversation) -> str:
        """Empty once it is ready, else what is wrong."""
        try:
            with trio.fail_after(self._start_deadline):
                hello = await talk.greeting()
        except trio.TooSlowError:
            return "it did not start in time"
        except TrainerError as error:
            return error.what
        if hello.get("event") != "ready":
            told = [str(hello.get(key, "")) for key in ("what", "why", "do")]
            return "; ".join(text for text in told if text) or "it said nothing of use"
        if not re.fullmatch("[0-9a-f]{64}", str(hello.get("task_id"))):
            return "it did not say which task it has"
        self._talk = talk
        self.state, self.problem = "ready", ""
        self._on_ready(hello)
        return ""

    # --- asking --------------------------------------------------------------------------------

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request, one answer; requests of several tasks take turns.

        Raises:
            TrainerError: The trainer is not there, died, did not answer in time, or talks nonsense.
        """
        async with self._turn:
            talk = self._talk
            if talk is None:
                raise TrainerError(
                    "the trainer is not running",
                    self.problem or f"it is {self.state}",
                    "see: p2pfed status, p2pfed task log",
                )
            self._asked = True
            try:
                with trio.fail_after(self._longest_answer):
                    return await talk.ask(request)
            except trio.TooSlowError as error:
                self._let_go("it did not answer in time")
                raise TrainerError(
                    "the trainer did not answer in time",
                    f"it had {self._longest_answer:g} s",
                    "if a round may take longer, set train.longest_round",
                ) from error
            except TrainerError as error:
                self._let_go(error.what)
                raise
            finally:
                self._asked = False

    def _let_go(self, breach: str) -> None:
        """End the trainer that is there, if one is: only another one helps."""
        self._talk = None
        if self._life is not None:
            self._life.end(breach)
        if not self.paused:
            self.state = self._source.awaited


async def _end_with(attached: Attached, talk: Conversation) -> None:
    """End a conversation whose process has ended, though its children may hold the stream."""
    await attached.ended()
    with trio.move_on_after(LAST_WORDS):
        await talk.over.wait()
    talk.end(DIED)
