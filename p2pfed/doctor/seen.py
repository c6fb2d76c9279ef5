"""Files, users and sockets as they are on this machine; nothing is changed.

Whether *another* user may read a path is asked of the system where we are root (a child that turns
into that user, so that ACLs count too), else computed from the mode bits along the path.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import shutil
import socket
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Seen", "User", "answers", "as_user", "look", "may", "user_named", "user_of"]

Kind = Literal["file", "folder", "socket", "other", "missing", "hidden"]
_SECONDS = 2.0  # until a local socket counts as stuck


@dataclass(frozen=True, slots=True)
class Seen:
    """A path as it was found.

    Attributes:
        path: Where.
        kind: `hidden`: this user may not even look whether it is there.
        mode: Permission bits.
        uid: Its owner.
        gid: Its group.
    """

    path: Path
    kind: Kind
    mode: int = 0
    uid: int = -1
    gid: int = -1

    @property
    def is_there(self) -> bool:
        """Whether there is something that we can look at."""
        return self.kind not in {"missing", "hidden"}


def look(path: Path) -> Seen:
    """Look at a path, following links."""
    try:
        found = path.stat()
    except PermissionError:
        return Seen(path, "hidden")
    except OSError:
        return Seen(path, "missing")
    kinds: list[tuple[bool, Kind]] = [
        (stat.S_ISREG(found.st_mode), "file"),
        (stat.S_ISDIR(found.st_mode), "folder"),
        (stat.S_ISSOCK(found.st_mode), "socket"),
    ]
    kind: Kind = next((name for is_it, name in kinds if is_it), "other")
    return Seen(path, kind, stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid)


@dataclass(frozen=True, slots=True)
class User:
    """A user of this machine.

    Attributes:
        name: Or the number, where there is no name.
        uid: User id.
        gid: Its first group.
        groups: All its groups.
    """

    name: str
    uid: int
    gid: int
    groups: frozenset[int]


def user_of(uid: int) -> User:
    """The user with a number; one without a name has no groups."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return User(str(uid), uid, uid, frozenset({uid}))
    groups = frozenset(os.getgrouplist(entry.pw_name, entry.pw_gid))
    return User(entry.pw_name, uid, entry.pw_gid, groups)


def user_named(name: str) -> User | None:
    """The user with a name or number; None where there is no such name."""
    if name.isascii() and name.isdigit() and len(name) < 10:
        return user_of(int(name))
    try:
        return user_of(pwd.getpwnam(name).pw_uid)
    except KeyError:
        return None


def group_name(gid: int) -> str:
    """Name of a group, or its number."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def as_user(user: User) -> dict[str, object]:
    """What makes `subprocess` turn into a user; nothing where we are that user or cannot."""
    if os.geteuid() != 0 or user.uid == 0:
        return {}
    return {"user": user.uid, "group": user.gid, "extra_groups": sorted(user.groups)}


def may(user: User, path: Path, rights: str) -> bool:
    """Whether a user has all of these rights on a path.

    Args:
        user: Who.
        path: On what.
        rights: Out of `r`, `w` and `x`.
    """
    if user.uid == os.geteuid():
        bits = {"r": os.R_OK, "w": os.W_OK, "x": os.X_OK}
        return all(os.access(path, bits[right], effective_ids=True) for right in rights)
    test = shutil.which("test")
    if os.geteuid() == 0 and test:
        return all(_passes(user, [test, f"-{right}", str(path)]) for right in rights)
    return _by_mode(user, path, rights)


def _passes(user: User, command: list[str]) -> bool:
    done = subprocess.run(  # noqa: S603 - `test` of the system
        command,
        check=False,
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=10,
        user=user.uid,
        group=user.gid,
        extra_groups=sorted(user.groups),
    )
    return done.returncode == 0


def _by_mode(user: User, path: Path, rights: str) -> bool:
    if user.uid == 0:
        return True
    whole = path.absolute()
    steps = [(parent, "x") for parent in reversed(whole.parents)]
    for place, needed in [*steps, (whole, rights)]:
        found = look(place)
        if not found.is_there:
            return False
        shift = 6 if found.uid == user.uid else 3 if found.gid in user.groups else 0
        wanted = sum({"r": 4, "w": 2, "x": 1}[right] for right in needed)
        if found.mode >> shift & wanted != wanted:
            return False
    return True


def answers(path: Path) -> bool | None:
    """Whether somebody listens on a Unix socket; None where that cannot be told."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_SECONDS)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            return False
        except OSError as error:
            return True if error.errno == errno.EAGAIN else None  # its queue is full
    return True
