"""Reading and writing the operator's files, with errors that name the file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from p2pfed.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = [
    "read_bootstrap",
    "read_bytes",
    "read_document",
    "read_text",
    "replace_file",
    "write_new",
]


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file; raises ConfigError."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}", error.strerror or str(error)) from error


def read_document(path: str | Path) -> str:
    """The text of a signed document, which has at most 256 KiB; raises ConfigError."""
    text = read_text(path)
    if len(text.encode()) > 1 << 18:
        raise ConfigError(f"{path} is no signed document", "those have at most 262144 bytes")
    return text


def read_text(path: str | Path) -> str:
    """The text of a file; raises ConfigError."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text", str(error)) from error


def read_bootstrap(path: str | Path) -> dict[str, Any]:
    """A parsed bootstrap list; what it says is checked by the daemon and `bootstrap check`."""
    import tomllib

    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{path} is not TOML", str(error), "correct the line named above"
        ) from error


def replace_file(path: str | Path, data: bytes) -> None:
    """Replace a file atomically and durably, keeping its mode; raises ConfigError."""
    target = Path(path)
    try:
        mode = target.stat().st_mode & 0o777
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
    except OSError as error:
        raise ConfigError(f"cannot write {path}", error.strerror or str(error)) from error


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
        raise ConfigError(f"cannot write {path}", error.strerror or str(error)) from error
