"""Reading and writing the operator's files, with errors that name the file."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from p2pfed.errors import ConfigError, FactRejected
from p2pfed.small_files import MOST_BYTES, read_small

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

__all__ = [
    "as_owner",
    "parse_bootstrap",
    "read_bootstrap",
    "read_bytes",
    "read_document",
    "read_text",
    "reading",
    "replace_file",
    "write_new",
]


def read_bytes(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file of at most so many; raises ConfigError."""
    try:
        return read_small(path, most)[0]
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}",
            error.strerror or str(error),
            "name a file that is there and that you may read",
        ) from error


def read_document(path: str | Path, part: Callable[[str], str] = str) -> str:
    """The text of a signed document, which has at most 256 KiB; raises ConfigError.

    Args:
        path: The file.
        part: Takes the document out of what the file holds.
    """
    text = part(read_text(path))
    if len(text.encode()) > 1 << 18:
        raise ConfigError(
            f"{path} is no signed document",
            "those have at most 262144 bytes",
            "name the file that the stewards signed",
        )
    return text


def read_text(path: str | Path) -> str:
    """The text of a file; raises ConfigError."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text", str(error), "name the file as it was sent to you"
        ) from error


@contextmanager
def reading(path: str | Path, wanted: str) -> Iterator[None]:
    """Let what is wrong with a document name its file, and say which one is `wanted`."""
    try:
        yield
    except FactRejected as error:
        raise FactRejected(
            f"{path}: {error.what}", error.why, error.do or f"name {wanted}"
        ) from error


def read_bootstrap(path: str | Path) -> dict[str, Any]:
    """A parsed bootstrap list; what it says is checked by the daemon and `bootstrap check`."""
    return parse_bootstrap(read_text(path), path)


def parse_bootstrap(text: str, path: str | Path) -> dict[str, Any]:
    """The same of a text that was read from `path`; raises ConfigError."""
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{path} is not TOML", str(error), "correct the line named above"
        ) from error


def replace_file(path: str | Path, data: bytes) -> None:
    """Replace a file atomically and durably, keeping its mode; a new one is 0600.

    Raises:
        ConfigError: It cannot be written.
    """
    target = Path(path)
    try:
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o600
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _sync_folder(folder: Path) -> None:
    """Make a rename in it durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_new(path: str | Path, data: bytes) -> None:
    """Write a file that must not exist yet; raises ConfigError."""
    try:
        with Path(path).open("xb") as file:
            file.write(data)
    except FileExistsError as error:
        raise ConfigError(
            f"{path} exists already", "nothing is overwritten", "choose another name"
        ) from error
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: str | Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot write {path}",
        error.strerror or str(error),
        "make room there, or name a folder that you may write to",
    )


@contextmanager
def as_owner(folder: Path) -> Iterator[None]:
    """Be the user whom a folder belongs to, where we are root: no more than that user can happen.

    A file of root's among the daemon's own is one that the daemon cannot read; and in a folder of
    another user, root would follow whatever that user has put there.
    """
    owner = folder.stat()
    if os.geteuid() != 0 or owner.st_uid == 0:
        yield
        return
    groups, group = os.getgroups(), os.getegid()
    os.setgroups([])
    os.setegid(owner.st_gid)
    os.seteuid(owner.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)
