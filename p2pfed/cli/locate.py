"""Finds the daemon's sockets without loading the configuration library.

Order: --socket, P2PFED_SOCKET, then `[admin] socket` or `data_dir/admin.sock` of the configuration,
which is -c FILE, P2PFED_CONFIG, or the first that exists of ./p2pfed.toml,
~/.config/p2pfed/p2pfed.toml and /etc/p2pfed/p2pfed.toml. The trainer's private socket lies where
`[train] socket` says, else beside the admin socket. The daemon reads the same keys with
`p2pfed.config`.
"""

from __future__ import annotations

import os
from pathlib import Path

from p2pfed.admin.client import Client
from p2pfed.errors import ConfigError, DaemonNotRunning, NotPermitted, P2PFedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any

__all__ = ["admin_client", "config_path", "data_folder", "private_data"]

_PLACES = ("p2pfed.toml", "~/.config/p2pfed/p2pfed.toml", "/etc/p2pfed/p2pfed.toml")


def admin_client(args: Namespace, *, timeout: float = 10.0) -> Client:
    """A client of the admin socket that the arguments, environment or configuration name."""
    return Client(_sockets(args)[0], timeout)


def private_data(args: Namespace, endpoint: str) -> Any:
    """What the trainer's private socket says, or None where we may not or cannot read it."""
    private = _sockets(args)[1]
    if not private.exists():
        return None
    try:
        return Client(private, 3.0).get(f"/v1/{endpoint}")
    except P2PFedError:
        return None


def data_folder(args: Namespace) -> Path:
    """The daemon's data directory; beside the admin socket where no configuration says it."""
    admin = _sockets(args)[0]
    found = None if _named_socket(args) else config_path(args)
    return admin.parent if found is None else _data_dir(_read(found), found.parent)


def config_path(args: Namespace) -> Path | None:
    """The configuration in use.

    Raises:
        ConfigError: One was named that does not exist.
    """
    named = args.config or os.environ.get("P2PFED_CONFIG")
    if named:
        path = Path(named)
        if not path.exists():
            raise ConfigError(
                f"no configuration at {path}", "", "run: p2pfed init --name NAME --dir DIR"
            )
        return path
    places = (Path(place).expanduser() for place in _PLACES)
    return next((place for place in places if os.access(place, os.F_OK)), None)


def _named_socket(args: Namespace) -> str | None:
    return args.socket or (None if args.config else os.environ.get("P2PFED_SOCKET"))


def _sockets(args: Namespace) -> tuple[Path, Path]:
    named = _named_socket(args)
    if named:
        return Path(named), Path(named).parent / "trainer.sock"
    found = config_path(args)
    if found is None:
        raise DaemonNotRunning(
            "cannot tell where the daemon's socket is",
            "no --socket, no P2PFED_SOCKET, and no p2pfed.toml here or in the usual places",
            "name one: p2pfed --socket PATH ...   or: p2pfed -c FILE ...",
        )
    data = _read(found)
    folder = found.absolute().parent

    def at(section: str, default: str) -> Path:
        value = _value(data, section, "socket")
        if value:
            return folder / Path(value).expanduser()
        return _data_dir(data, folder) / default

    return at("admin", "admin.sock"), at("train", "trainer.sock")


def _data_dir(data: dict[str, Any], folder: Path) -> Path:
    value = _value(data, "node", "data_dir")
    if not value:
        raise ConfigError("the configuration has no node.data_dir", "", "run: p2pfed config check")
    return folder.absolute() / Path(value).expanduser()


def _value(data: dict[str, Any], section: str, key: str) -> str | None:
    value = os.environ.get(f"P2PFED_{section}__{key}".upper())
    if value is None and isinstance(data.get(section), dict):
        value = data[section].get(key)
    return value if isinstance(value, str) else None


def _read(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text("utf-8"))
    except PermissionError as error:
        raise NotPermitted(
            f"cannot read {path}: permission denied",
            "it says where the daemon's socket is",
            "name the socket: p2pfed --socket PATH ...",
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}", str(error), "run: p2pfed config check") from error
