"""Binds a Unix socket: with its rights from the first instant, over nothing that lives.

Invariants. The socket has its final mode and group before anybody can connect; a live daemon's
socket is never taken over, a dead one's is replaced; at exit only our own file is removed. A path
that Linux cannot bind, a group that is unknown or not ours are told in words.

Not here: what is spoken on it (`server`, and `node/joined` for a training loop's).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket as sockets
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from p2pfed.admin.rights import group_number
from p2pfed.errors import ConfigError, StateInUse

__all__ = ["SOCKET_PATH_BYTES", "bind_socket", "bound_socket"]

SOCKET_PATH_BYTES = 107  # Linux: sizeof(sun_path) - 1
_QUEUE = 1024  # connections that the kernel holds; it cuts this to net.core.somaxconn
_umask_lock = threading.Lock()


@contextlib.contextmanager
def bound_socket(path: Path, *, mode: int, key: str, group: str = "") -> Iterator[sockets.socket]:
    """Bind and listen at `path` while the context is open; then remove the file, if it is ours.

    Args and errors: as for `bind_socket`.
    """
    listening = bind_socket(path, mode=mode, key=key, group=group)
    identity = _identity(path)
    try:
        yield listening
    finally:
        listening.close()
        _remove(path, identity)


def bind_socket(
    path: Path, *, mode: int, key: str = "admin.socket", group: str = ""
) -> sockets.socket:
    """Bind and listen at `path` with exactly these permission bits.

    Args:
        path: Where.
        mode: 0o600 or 0o660.
        key: What the path is called in the configuration.
        group: Whose it is, where the mode lets a group in; empty: the process's own.

    Raises:
        ConfigError: The path is too long, is something else than a socket, or cannot be bound; the
            group is unknown, or we are not of it.
        StateInUse: Another daemon listens there.
    """
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_BYTES:
        raise ConfigError(
            f"the socket path {path} has {length} bytes",
            f"a Unix socket path may have {SOCKET_PATH_BYTES}",
            f"set {key} to a shorter path, e.g. in /run/p2pfed",
        )
    gid = group_number(group) if group and mode & 0o060 else None
    _make_way(path, key)
    listening = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    try:
        with _umask_lock:
            before = os.umask(0o777 & ~mode)
            try:
                listening.bind(os.fspath(path))
            finally:
                os.umask(before)
        if gid is not None:
            _give_to(path, group, gid)  # nobody can connect before it listens
        listening.listen(_QUEUE)
        listening.setblocking(False)
    except ConfigError:
        listening.close()
        path.unlink(missing_ok=True)
        raise
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise _in_use(path) from error
        raise ConfigError(
            f"cannot make the socket {path}",
            error.strerror or "",
            f"create its folder, owned by the daemon's user, or set {key}",
        ) from error
    return listening


def _give_to(path: Path, group: str, gid: int) -> None:
    try:
        os.chown(path, -1, gid, follow_symlinks=False)
    except OSError as error:
        raise ConfigError(
            f"admin.group: cannot give the socket {path} to the group {group!r}",
            f"{error.strerror}: only root, or a member of the group, can do that",
            f"run: sudo usermod -aG {group} USER   (USER runs the daemon; then start it again)",
        ) from error


def _make_way(path: Path, key: str) -> None:
    """Remove the socket of a dead daemon; refuse to touch anything else."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(
                f"{path} is not a socket",
                "it is a file of someone else and is left alone",
                f"move it away, or set {key} to another path",
            )
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"cannot look at {path}", error.strerror or "") from error
    probe = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    probe.setblocking(False)
    try:
        probe.connect(os.fspath(path))
    except ConnectionRefusedError:
        path.unlink(missing_ok=True)
    except FileNotFoundError:
        return
    except BlockingIOError as error:  # its queue is full: it is alive
        raise _in_use(path) from error
    except OSError as error:
        raise ConfigError(f"cannot ask who owns {path}", error.strerror or "") from error
    else:
        raise _in_use(path)
    finally:
        probe.close()


def _in_use(path: Path) -> StateInUse:
    return StateInUse(
        f"another daemon is listening on {path}",
        "two daemons cannot share one socket",
        "stop the other one, or give this one its own data_dir",
    )


def _remove(path: Path, identity: tuple[int, int] | None) -> None:
    if identity is not None and _identity(path) == identity:  # not if someone replaced it
        path.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
