"""Reading a file that a person names: a regular one, and no longer than it may be.

A pipe would be waited for as long as nobody writes, a device has no end, and of a file of gigabytes
nothing is a key, a roster or a configuration.

Invariant: neither opening nor reading waits for anybody, and no more than `most` bytes are held.
What is refused is an OSError whose `strerror` says why, as for a file that is not there.

Not here: what the file says, and in which words its reader complains.
"""

from __future__ import annotations

import errno
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["MOST_BYTES", "open_regular", "read_small"]

MOST_BYTES = 1 << 20


def open_regular(path: str | Path, flags: int = 0) -> tuple[int, os.stat_result]:
    """Open a regular file for reading.

    Args:
        path: The file.
        flags: More of them for `os.open`.

    Returns:
        A descriptor, to be closed by the caller, and what it is a descriptor of.

    Raises:
        OSError: It cannot be opened, or is a folder, a pipe, a socket or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode):
        return descriptor, found
    os.close(descriptor)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is a pipe or a device, and no regular file", str(path))


def read_small(path: str | Path, most: int = MOST_BYTES) -> tuple[bytes, os.stat_result]:
    """The bytes of a regular file, and what it is.

    Args:
        path: The file.
        most: How many bytes it may have.

    Raises:
        OSError: As of `open_regular`, or it is longer than that.
    """
    descriptor, found = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        data = b"" if found.st_size > most else file.read(most + 1)
    if found.st_size > most or len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
    return data, found
