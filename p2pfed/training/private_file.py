"""Files of the hospital's own: 0600 in a 0700 folder, there whole or not at all, and durably."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["write_privately"]


def write_privately(path: Path, data: bytes) -> None:
    """Put `data` in the place of what was there.

    Raises:
        OSError: It cannot be written; what was there stays.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb", opener=_own) as file:  # Path.open has no opener
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _own(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
