"""Finds the daemon's sockets without loading the configuration library.

Order: --socket, P2PFED_SOCKET, then `[admin] socket` or `data_dir/admin.sock` of the configuration,
which is -c FILE, P2PFED_CONFIG, or the first that exists of ./p2pfed.toml,
~/.config/p2pfed/p2pfed.toml and /etc/p2pfed/p2pfed.toml. Where none was named and none can be read
it is the service's socket, if we may see it: its group may ask the daemon and may not read the
configuration. The trainer's private socket lies where `[train] socket` says, else beside the admin
socket. The daemon reads the same keys with `p2pfed.config`.

Paths are texts here where every command passes, and a plain configuration is read without tomllib:
either would cost a command a fifth of its start.
"""

from __future__ import annotations

import os

from p2pfed.admin.client import Client
from p2pfed.cli.plain_toml import plain_toml
from p2pfed.errors import ConfigError, DaemonNotRunning, NotPermitted, P2PFedError
from p2pfed.places import SERVICE_PRIVATE, SERVICE_SOCKET, is_there, usual_place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from pathlib import Path
    from typing import Any

__all__ = [
    "admin_client",
    "config_path",
    "data_folder",
    "private_data",
    "trainer_log",
    "trainer_user",
]


def admin_client(args: Namespace, *, timeout: float = 10.0) -> Client:
    """A client of the admin socket that the arguments, environment or configuration name."""
    return Client(_sockets(args)[0], timeout)


def private_data(args: Namespace, endpoint: str, *, timeout: float = 3.0) -> Any:
    """What the trainer's private socket says, or None where we may not or cannot read it."""
    private = _sockets(args)[1]
    if not os.access(private, os.F_OK):
        return None
    try:
        return Client(private, timeout).get(f"/v1/{endpoint}")
    except P2PFedError:
        return None


def trainer_log(args: Namespace) -> Path:
    """The trainer's own log, which lies beside its private socket."""
    from pathlib import Path

    return Path(_sockets(args)[1]).with_suffix(".log")


def data_folder(args: Namespace) -> Path | None:
    """The daemon's data directory; None where no configuration says it, nor the socket's place."""
    from pathlib import Path

    admin = Path(_sockets(args)[0])
    if not _named_socket(args):
        try:
            found = _config(args)
            folder = None if found is None else Path(_data_dir(_read(found), found))
        except NotPermitted:
            folder = None
        if folder is not None:
            return folder
    return admin.parent if os.access(admin.parent / "store.db", os.F_OK) else None


def trainer_user(config: Path) -> str:
    """`train.user` of a configuration; empty if the trainer is the node's own child."""
    return _value(_read(str(config)), "train", "user") or ""


def config_path(args: Namespace) -> Path | None:
    """The configuration in use.

    Raises:
        ConfigError: One was named that does not exist.
        NotPermitted: It lies in a folder that is closed to us.
    """
    from pathlib import Path

    found = _config(args)
    return None if found is None else Path(found)


def _config(args: Namespace) -> str | None:
    named: str | None = args.config or os.environ.get("P2PFED_CONFIG")
    if named:
        if not is_there(named):
            raise ConfigError(
                f"no configuration at {named}",
                "-c or P2PFED_CONFIG names it",
                "run: p2pfed init --name NAME --dir DIR",
            )
        return named
    return usual_place()


def _named_socket(args: Namespace) -> str | None:
    return args.socket or (None if args.config else os.environ.get("P2PFED_SOCKET"))


def _sockets(args: Namespace) -> tuple[str, str]:
    """The admin and the private socket."""
    named = _named_socket(args)
    if named:
        return named, _beside(named)
    try:
        found = _config(args)
        data = None if found is None else _read(found)
    except NotPermitted as error:
        if args.config or os.environ.get("P2PFED_CONFIG"):
            raise
        if not _of_service():
            raise NotPermitted(
                error.what,
                f"nor is {SERVICE_SOCKET} to be seen: the service does not run, or you are not of"
                " its group",
                "see: systemctl status p2pfed; id   (root may; or name one: --socket PATH)",
            ) from error
        found = data = None
    if found is None or data is None:
        if _of_service():
            return SERVICE_SOCKET, SERVICE_PRIVATE
        raise DaemonNotRunning(
            "cannot tell where the daemon's socket is",
            "no --socket, no P2PFED_SOCKET, and no p2pfed.toml here or in the usual places",
            "name one: p2pfed --socket PATH ...   or: p2pfed -c FILE ...",
        )
    folder = _folder_of(found)

    def at(section: str, default: str) -> str:
        value = _value(data, section, "socket")
        if value:
            return _under(folder, value)
        return _under(_data_dir(data, found), default)

    return at("admin", "admin.sock"), at("train", "trainer.sock")


def _beside(admin: str) -> str:
    if admin == SERVICE_SOCKET:  # of two users
        return SERVICE_PRIVATE
    return os.path.join(os.path.dirname(admin), "trainer.sock")  # noqa: PTH118, PTH120


def _of_service() -> bool:
    """Whether the service's socket is there, and we may look at it."""
    return os.access(SERVICE_SOCKET, os.F_OK)


def _data_dir(data: dict[str, Any], file: str) -> str:
    value = _value(data, "node", "data_dir")
    if not value:
        raise ConfigError(
            f"{file} has no node.data_dir",
            "the daemon's socket is in there",
            f"correct the file, then run: p2pfed config check {file}",
        )
    return _under(_folder_of(file), value)


def _folder_of(file: str) -> str:
    return os.path.dirname(os.path.join(os.getcwd(), file))  # noqa: PTH109, PTH118, PTH120


def _under(folder: str, value: str) -> str:
    """A path of the configuration as pathlib joins it: `..` stays, a link may lie before it."""
    whole = os.path.join(folder, os.path.expanduser(value))  # noqa: PTH111, PTH118
    return "/" + "/".join(part for part in whole.split("/") if part not in {"", "."})


def _value(data: dict[str, Any], section: str, key: str) -> str | None:
    value = os.environ.get(f"P2PFED_{section}__{key}".upper())
    if value is None and isinstance(data.get(section), dict):
        value = data[section].get(key)
    return value if isinstance(value, str) else None


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            text = file.read()
        said = plain_toml(text)
        return _whole_toml(text) if said is None else said
    except PermissionError as error:
        raise NotPermitted(
            f"cannot read {path}: permission denied",
            "it says where the daemon's sockets and files are",
            "run it as root; or name the socket, if the group may use it: p2pfed --socket PATH ...",
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read {path}",
            str(error),
            f"correct the file, then run: p2pfed config check {path}",
        ) from error


def _whole_toml(text: str) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(text)
