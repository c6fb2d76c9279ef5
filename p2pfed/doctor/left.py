"""Models in shared memory that a killed daemon left: the exchange folders that nobody holds.

A daemon holds a lock (flock) on its folder as long as it lives (`node.trainer`). The system's table
of locks is read first; it hides those of other process namespaces, so that one which nobody seems
to hold is tried, for a moment. Folders that we may not look into are not ours to judge.
"""

from __future__ import annotations

import fcntl
import os
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SHARED_MEMORY", "LeftFolder", "left_folders"]

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - only looked at
_LOCKS = Path("/proc/locks")
_A_NODES = re.compile(r"p2pfed-\d+-[0-9a-f]{24}")


@dataclass(frozen=True, slots=True)
class LeftFolder:
    """A folder that nobody holds.

    Attributes:
        path: Where.
        size: Bytes in it.
    """

    path: Path
    size: int


def left_folders(within: Path = SHARED_MEMORY) -> list[LeftFolder]:
    """The exchange folders of daemons that live no more, by name.

    Args:
        within: Where they are made.
    """
    try:
        fields = [line.split() for line in _LOCKS.read_text("ascii").splitlines()]
    except OSError:
        fields = []
    held = {line[5] for line in fields if len(line) == 8}
    found = []
    for path in sorted(within.glob("p2pfed-*")):
        if not _A_NODES.fullmatch(path.name):
            continue
        try:
            if _is_left(path, held):
                found.append(LeftFolder(path, _size(path)))
        except OSError:  # held, gone, no folder, or not for us
            continue
    return found


def _is_left(path: Path, held: set[str]) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        seen = os.fstat(descriptor)
        device = f"{os.major(seen.st_dev):02x}:{os.minor(seen.st_dev):02x}"
        if f"{device}:{seen.st_ino}" in held:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)
    return True


def _size(folder: Path) -> int:
    seen = [path.lstat() for path in folder.iterdir()]
    files = {
        (one.st_dev, one.st_ino): one.st_size for one in seen
    }  # one with two names counts once
    return sum(files.values())
