"""Secret keys on disk, and the libp2p peer id that names a node.

Invariant: a key file is created with mode 0600 and refused if anyone but its owner could read it
(a credential of the service manager, `$CREDENTIALS_DIRECTORY`, may show its access list's mask).
The peer id is the identity multihash of the libp2p public key (libp2p specs, peer-ids), so the
Ed25519 public key can be read back out of it: whoever knows a peer id can verify its signatures.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import base58
from nacl.signing import SigningKey

from p2pfed.errors import ConfigError, FactRejected
from p2pfed.small_files import read_small

__all__ = ["NodeKey", "StewardKey", "peer_id_of", "public_key_of", "write_private"]

# Identity multihash (0x00, length 36) of the protobuf {type: Ed25519, data: 32 bytes}.
_PEER_ID_PREFIX = bytes.fromhex("002408011220")


def peer_id_of(public_key: bytes) -> str:
    """The libp2p peer id, base58 text `12D3Koo…`, of an Ed25519 public key (32 bytes)."""
    return base58.b58encode(_PEER_ID_PREFIX + public_key).decode("ascii")


def public_key_of(peer_id: str) -> bytes:
    """The Ed25519 public key (32 bytes) inside a peer id.

    Raises:
        FactRejected: The text is not the peer id of an Ed25519 key, in its one spelling (base58
            decoders skip blanks at the end: one key would have many names).
    """
    try:
        raw = base58.b58decode(peer_id) if len(peer_id) <= 64 else b""
    except ValueError:
        raw = b""
    if len(raw) != 38 or raw[:6] != _PEER_ID_PREFIX or peer_id_of(raw[6:]) != peer_id:
        raise FactRejected(
            f"{peer_id[:80]!r} is not a peer id",
            "a node is named by the libp2p id of an Ed25519 key (12D3Koo…)",
        )
    return raw[6:]


def write_private(path: Path, data: bytes) -> None:
    """Create `path` with mode 0600 and these bytes, durably; an existing file is never replaced.

    Raises:
        ConfigError: The file exists already or the folder cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ConfigError(
            f"{path} exists already",
            "a key is never overwritten: who has lost it has lost its identity",
            "move it away first, or choose another folder",
        ) from error
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}",
            error.strerror or str(error),
            "name a folder that is there and that you may write to",
        ) from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _is_credential(path: Path, found: os.stat_result) -> bool:
    """Whether the service manager handed this file to this process alone.

    systemd puts credentials into a folder that no other service sees and gives our user an entry in
    the access list, whose mask shows as read permission of the group. Anything wider is refused.
    """
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    handed = folder is not None and path.parent == Path(folder)
    narrow = not stat.S_IMODE(found.st_mode) & 0o037
    return handed and narrow and stat.S_ISREG(found.st_mode) and found.st_uid in {0, os.geteuid()}


def _read_private(path: Path, header: str, make: str) -> bytes:
    try:
        data, found = read_small(path)
        mode = stat.S_IMODE(found.st_mode)
        text = data.decode("ascii")
    except FileNotFoundError as error:
        raise ConfigError(
            f"no key at {path}",
            "it was not made yet, or lies elsewhere",
            f"name its file, or make one: {make}",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the key {path}",
            getattr(error, "strerror", None) or str(error),
            f"name the file that was made by: {make}",
        ) from error
    if mode & 0o077 and not _is_credential(path, found):
        raise ConfigError(
            f"the key {path} has mode {mode:04o}",
            "others on this machine could read it and sign in its owner's name",
            f"run: chmod 600 {path}   (and make a new key if someone else may have read it)",
        )
    lines = text.split()
    try:
        seed = bytes.fromhex(lines[1]) if lines[:1] == [header] and len(lines) == 2 else b""
    except ValueError:
        seed = b""
    if len(seed) != 32:
        raise ConfigError(
            f"{path} is not a key file",
            f"expected the line {header!r} and 64 hex digits",
            f"name the file that was made by: {make}",
        )
    return seed


@dataclass(frozen=True, slots=True)
class _Key:
    seed: bytes = field(repr=False)

    @property
    def public_key(self) -> bytes:
        """Ed25519 public key, 32 bytes."""
        return bytes(SigningKey(self.seed).verify_key)


@dataclass(frozen=True, slots=True)
class NodeKey(_Key):
    """The secret key of one node; its public half is the node's libp2p identity."""

    HEADER: ClassVar[str] = "p2pfed-node-key-1"
    MADE_BY: ClassVar[str] = "p2pfed init"

    @property
    def peer_id(self) -> str:
        """The name of this node on the network."""
        return peer_id_of(self.public_key)

    @classmethod
    def create(cls, path: Path) -> NodeKey:
        """Make a new key file; raises ConfigError if one is there."""
        key = cls(os.urandom(32))
        write_private(path, f"{cls.HEADER}\n{key.seed.hex()}\n".encode())
        return key

    @classmethod
    def load(cls, path: Path) -> NodeKey:
        """Read a key file; raises ConfigError if it is missing, malformed or readable by others."""
        return cls(_read_private(path, cls.HEADER, cls.MADE_BY))


@dataclass(frozen=True, slots=True)
class StewardKey(_Key):
    """The secret key of one steward; it signs rosters and run files, and never runs a node."""

    HEADER: ClassVar[str] = "p2pfed-steward-key-1"
    MADE_BY: ClassVar[str] = "p2pfed steward key new FILE"

    @classmethod
    def create(cls, path: Path) -> StewardKey:
        """Make a new key file; raises ConfigError if one is there."""
        key = cls(os.urandom(32))
        write_private(path, f"{cls.HEADER}\n{key.seed.hex()}\n".encode())
        return key

    @classmethod
    def load(cls, path: Path) -> StewardKey:
        """Read a key file; raises ConfigError if it is missing, malformed or readable by others."""
        return cls(_read_private(path, cls.HEADER, cls.MADE_BY))
