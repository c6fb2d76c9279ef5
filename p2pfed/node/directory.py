"""The data directory: one daemon at a time, signed documents as files, durable small writes.

    node.key               the node's identity, 0600 (made by `p2pfed init`)
    rosters/               every believed roster, exact signed bytes, named by version and hash
    runs/                  the accepted run files, exact signed bytes, named by run id
    blobs/                 genesis files, named by their hash
    checkpoints/<run id>/  model states
    store.db               deltas, proofs, events
    lock                   held by the living daemon, names its process

Invariant: a file appears under its name whole or not at all (write aside, fsync, rename, fsync
folder).
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from p2pfed.errors import ConfigError, FactRejected, StateInUse
from p2pfed.identity.filehash import ChunkList

__all__ = ["DataDirectory", "file_digest", "write_durably"]


def write_durably(path: Path, data: bytes) -> None:
    """Put `data` at `path`, whole or not at all, and on the disk when this returns."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> bytes:
    """The hash that names a file (`identity/filehash`), 32 bytes."""
    with path.open("rb") as file:
        return ChunkList.of(file).name


class DataDirectory:
    """Paths of one node's data directory; makes the folders, with mode 0700."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in ("rosters", "runs", "blobs", "checkpoints"):
                (root / name).mkdir(mode=0o700, exist_ok=True)
            mode = stat.S_IMODE(root.stat().st_mode)
        except OSError as error:
            raise ConfigError(
                f"cannot use the data directory {root}", error.strerror or str(error)
            ) from error
        if mode & 0o077:
            raise ConfigError(
                f"the data directory {root} has mode {mode:04o}",
                "others on this machine could look into it",
                f"run: chmod 700 {root}",
            )

    @property
    def store(self) -> Path:
        """The SQLite store."""
        return self.root / "store.db"

    def checkpoints(self, run_id: bytes) -> Path:
        """The folder of a run's checkpoints."""
        path = self.root / "checkpoints" / run_id.hex()
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    def blob(self, digest: bytes) -> Path:
        """Where the file with this hash lies, or would lie."""
        return self.root / "blobs" / digest.hex()

    # --- signed documents ----------------------------------------------------------------------

    def rosters(self) -> list[bytes]:
        """Every kept roster, oldest version first."""
        return [p.read_bytes() for p in sorted((self.root / "rosters").glob("v*.json"))]

    def keep_roster(self, version: int, roster_hash: bytes, signed: bytes) -> None:
        """Keep a believed roster."""
        name = f"v{version:010d}-{roster_hash.hex()[:16]}.json"
        write_durably(self.root / "rosters" / name, signed)

    def run(self, run_id: bytes) -> bytes:
        """The signed bytes of an accepted run.

        Raises:
            FactRejected: It was never accepted here.
        """
        path = self.root / "runs" / f"{run_id.hex()}.json"
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            raise FactRejected(f"run {run_id.hex()[:16]}… was never accepted here") from error

    def runs(self) -> list[bytes]:
        """Every accepted run."""
        return [p.read_bytes() for p in sorted((self.root / "runs").glob("*.json"))]

    def keep_run(self, run_id: bytes, signed: bytes) -> None:
        """Keep an accepted run."""
        write_durably(self.root / "runs" / f"{run_id.hex()}.json", signed)

    # --- the lock ------------------------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process.

        Raises:
            StateInUse: Another living daemon holds it.
            ConfigError: The lock file cannot be written.
        """
        path = self.root / "lock"
        try:
            opened = path.open("a+", encoding="ascii")
        except OSError as error:
            raise ConfigError(f"cannot write {path}", error.strerror or str(error)) from error
        with opened as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise StateInUse(
                    f"another daemon uses {self.root}",
                    f"its process id is {file.read().strip() or 'unknown'}",
                    "stop it first, or give this node its own data_dir",
                ) from error
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield
