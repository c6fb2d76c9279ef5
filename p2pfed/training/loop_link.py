"""The loop's end of its daemon's socket: connect, be welcomed, read requests, send answers.

The daemon of a node whose `train.task` is "loop" listens on `settings.loop_socket` and takes one
process at a time. It sends one line first, a welcome that names the exchange folder or why it takes
nobody; from then on the lines are those of a spawned trainer (`control`).

Invariant: what is sent is what the caller gives; a daemon that has gone is told by the end of the
stream and never raises from `send`. Processes that the user's program forks (DataLoader workers) do
not hold the connection: the daemon sees at once when the program itself has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import stat
import struct
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from p2pfed.errors import (
    DaemonNotRunning,
    NotPermitted,
    P2PFedError,
    PolicyError,
    StateInUse,
    TrainerError,
    VersionMismatch,
)
from p2pfed.training.control import MOST_LINE_BYTES, Message, lines, send

__all__ = ["Link"]

_AGAIN_S = 0.2
_GREETING_S = 10.0
_UCRED = struct.Struct("3i")  # pid, uid, gid
_KINDS: dict[str, type[P2PFedError]] = {"busy": StateInUse, "refused": PolicyError}


class Link:
    """See the module docstring.

    Args:
        path: The daemon's socket.
        wait: Seconds to wait for a daemon that is not there.
    """

    def __init__(self, path: Path, wait: float) -> None:
        self._path = path
        self._wait = wait
        self._socket: socket.socket | None = None
        self._stream: BinaryIO | None = None
        self._lines: Iterator[bytes | None] = iter(())
        self.exchange = Path()

    def connect(self) -> None:
        """Reach the daemon and be welcomed; waits for one that is not there.

        Raises:
            DaemonNotRunning: Nothing listens, or not for `wait` seconds.
            NotPermitted: The socket is not ours to use.
            StateInUse: Another training loop has joined; in the daemon's words.
            PolicyError: Nobody may join: training is paused, or we are another user; in its words.
            TrainerError: It said something else, or nothing, or named a folder that is not its own.
            VersionMismatch: It greets in another way.
        """
        self.close()
        connected = self._reached()
        self._socket = connected
        _OPEN.add(self)
        try:
            connected.settimeout(_GREETING_S)
            self._stream = connected.makefile("rb")
            self.exchange = _welcomed(self._stream.readline(MOST_LINE_BYTES))
            _check_owner(self.exchange, connected)
            connected.settimeout(None)
        except TimeoutError as error:
            self.close()
            raise TrainerError(
                f"the daemon behind {self._path} does not greet",
                f"nothing came for {_GREETING_S:.0f} s",
                "see its log, and start it anew",
            ) from error
        except BaseException:
            self.close()
            raise
        self._lines = lines(self._stream)

    def _reached(self) -> socket.socket:
        until = time.monotonic() + self._wait
        while True:
            try:
                return self._connected()
            except DaemonNotRunning:
                if time.monotonic() >= until:
                    raise
            time.sleep(_AGAIN_S)

    def _connected(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        try:
            made.connect(str(self._path))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            made.close()
            raise DaemonNotRunning(
                f"no daemon takes training loops at {self._path}",
                "it is not running, or it read another configuration",
                "start it: p2pfed node -c FILE   or let p2pfed.join(..., wait=600) wait for it",
            ) from error
        except PermissionError as error:
            made.close()
            raise NotPermitted(
                f"the socket {self._path} is not ours to use",
                "it belongs to the daemon's user",
                "run the training loop as that user",
            ) from error
        except BaseException:
            made.close()
            raise
        return made

    def read(self) -> bytes | None:
        """The next request; None for one that is too long, b"" when the daemon has gone."""
        try:
            return next(self._lines, b"")
        except OSError:  # reset: it was killed while a line was on its way
            return b""
        except BaseException:  # an interrupt ends the generator, not the daemon
            if self._stream is not None:
                self._lines = lines(self._stream)
            raise

    def send(self, message: Message) -> bool:
        """Send one line; False when the daemon has gone."""
        return self._socket is not None and send(self._socket, message)

    def give_away(self) -> socket.socket:
        """The connection, for another process to go on with; the caller closes it here.

        Only right after `connect`: the daemon says nothing before it is greeted.
        """
        given = self._socket
        assert given is not None, "nothing is connected"
        self._socket = None
        self.close()
        return given

    @property
    def is_gone(self) -> bool:
        """Whether the daemon has closed its end, or nothing is connected."""
        if self._socket is None:
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP | select.POLLHUP)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Let go of the daemon; it may be reached again."""
        _OPEN.discard(self)
        self._lines = iter(())
        for held in (self._stream, self._socket):
            if held is not None:
                held.close()
        self._stream = self._socket = None

    def let_go_in_child(self) -> None:
        """Close the descriptor that a forked process has of the same connection."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                os.close(self._socket.detach())


def _welcomed(line: bytes) -> Path:
    """The exchange folder that a welcome names."""
    if not line:
        raise TrainerError(
            "the daemon closed the connection without a word",
            "it takes processes of its own user, of train.user and of root only",
            "see its log",
        )
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        said = None
    said = said if isinstance(said, dict) else {}
    if said.get("op") == "welcome" and isinstance(said.get("exchange"), str):
        return Path(said["exchange"])
    if "what" in said:
        told = [str(said.get(key, "")) for key in ("what", "why", "do")]
        kind = _KINDS.get(str(said.get("op")), TrainerError)
        raise kind(*told)
    raise VersionMismatch(
        "the daemon greets in another way than this p2pfed expects",
        "",
        "install the same version for the daemon and for the training loop",
    )


def _check_owner(exchange: Path, daemon: socket.socket) -> None:
    """Raise TrainerError unless a folder is of the daemon's user, by the kernel's word.

    Where that is another user it could name our own folders: the patients', the ledger's.
    """
    _, user, _ = _UCRED.unpack(
        daemon.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    )
    try:
        found = exchange.lstat()
        is_its_own = stat.S_ISDIR(found.st_mode) and found.st_uid == user
    except (OSError, ValueError):
        is_its_own = False
    if not is_its_own:
        raise TrainerError(
            "the daemon's folder for models is none of its own",
            f"it must be a folder of user {user}, and no link",
            "see the daemon's log, and start it anew",
        )


_OPEN: weakref.WeakSet[Link] = weakref.WeakSet()


def _let_go() -> None:
    for link in _OPEN:
        link.let_go_in_child()


os.register_at_fork(after_in_child=_let_go)
