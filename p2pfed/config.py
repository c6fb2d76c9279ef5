"""One TOML file, the environment and flags -> frozen typed settings; all mistakes reported at once.

Order of precedence: flag, then `P2PFED_SECTION__KEY` in the environment, then the file, then the
default here. An unknown key is an error. The privacy budget can be raised only in the file: the
environment and the admin socket cannot touch the section `[privacy]`.

Paths are relative to the file that names them. `ledger` does not default into `data_dir`: a new
data directory must not look like a new budget.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import pwd
import re
import tomllib
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
)

from p2pfed.errors import ConfigError
from p2pfed.small_files import read_small

__all__ = [
    "SOCKET_PATH_BYTES",
    "Admin",
    "Log",
    "Metrics",
    "Network",
    "Node",
    "Privacy",
    "Settings",
    "Train",
    "default_state_dir",
    "load_settings",
]

_ADDRESS = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/[^/\s]+/tcp/\d{1,5}(/p2p/\w+)?", re.ASCII)
_DECIMAL = re.compile(r"\d{1,20}(\.\d{1,30})?(e[+-]?\d{1,2})?", re.ASCII)  # 1e9999999 takes hours
# The sections that the environment may set: never the privacy budget.
_FROM_ENVIRONMENT = {"node", "network", "admin", "train", "log", "metrics"}
_PATHS = {  # relative to the file; network.bootstrap, a list of them, comes to these
    "node": ("data_dir", "key_file"),
    "admin": ("socket",),
    "train": ("data", "socket", "loop_socket", "state"),
    "privacy": ("ledger",),
    "log": ("file",),
}
SOCKET_PATH_BYTES = 107  # Linux: sizeof(sun_path) - 1


def default_state_dir() -> Path:
    """Where state lives that belongs to the hospital rather than to one node.

    `P2PFED_HOME`, else /var/lib/p2pfed for root, else `$XDG_STATE_HOME/p2pfed`.
    """
    home = os.environ.get("P2PFED_HOME")
    if home:
        return Path(home)
    if os.geteuid() == 0:
        return Path("/var/lib/p2pfed")
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "p2pfed"


def _exact(value: object) -> Fraction:
    if isinstance(value, Fraction):
        return value
    number = isinstance(value, int | float | str) and not isinstance(value, bool)
    if not number or not _DECIMAL.fullmatch(str(value)):
        raise ValueError("expected a number such as 3 or 0.5")
    return Fraction(str(value))


def _network(text: str) -> str:
    """A network that `ipaddress` understands, as it stands; told wrong with its own words."""
    ipaddress.ip_network(text)
    return text


def _address(text: str) -> str:
    """Only the form; what it names is judged where it is listened on."""
    if not _ADDRESS.fullmatch(text):
        raise ValueError("expected an address such as /ip4/192.0.2.1/tcp/4201")
    return text


def _no_flag(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")  # noqa: TRY004 - pydantic's way
    return value


Address = Annotated[str, AfterValidator(_address)]
Exact = Annotated[Fraction, BeforeValidator(_exact)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class Node(_Section):
    """This node: its name, its folder and where it listens."""

    name: str = Field(min_length=1, max_length=64)
    data_dir: Path
    key_file: Path | None = None  # default: data_dir/node.key
    listen: tuple[Address, ...] = ("/ip4/0.0.0.0/tcp/4201",)
    announce: tuple[Address, ...] = ()  # public addresses, when they differ from `listen`


class Network(_Section):
    """Which network, and whom to ask first."""

    id: str = Field(default="", pattern="^([0-9a-f]{64})?$")  # "" = from the first roster given
    bootstrap: tuple[Path, ...] = ()
    rejoin: bool = True  # after a crash or a reboot; `p2pfed leave` is remembered apart
    relay: bool = False  # lead members to those that can only dial out; it sees ciphertext only
    reach: Literal["auto", "always", "never"] = "auto"  # when others reach this node by relays too
    allowed_networks: tuple[Annotated[str, AfterValidator(_network)], ...] = ()  # CIDR; () = any
    upload_limit_mbit: float = Field(default=0, ge=0, le=1_000_000)  # a second, of bulk; 0 = none


class Admin(_Section):
    """The operator's socket; the caller's user id decides what it may do there."""

    socket: Path | None = None  # default: data_dir/admin.sock
    mode: Literal["0600", "0660"] = "0600"
    group: str = ""  # the socket's group with 0660: its members may read; "" = the daemon's own
    operators: tuple[str, ...] = ()  # users (names or numbers) who may change things too


class Train(_Section):
    """What this hospital trains on; `enabled = false` makes a bootstrap-only node."""

    enabled: bool = True
    task: str = ""  # or "loop": a training loop of the hospital's own joins (p2pfed.join)
    data: Path | None = None
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"
    gpus: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=1, le=64)], BeforeValidator(_no_flag)
    ] = "auto"  # with cpu: processes
    precision: Literal["auto", "float32", "bf16"] = "auto"
    options: dict[str, str | int | float] = Field(default_factory=dict)
    patience: Annotated[int, BeforeValidator(_no_flag)] = Field(
        default=0, ge=0, le=1_000_000
    )  # rounds without a better model; 0 = any
    longest_round: float = Field(default=86400.0, gt=0, le=31_536_000)  # seconds, then it is hung
    memory_gb: float = Field(default=0.0, ge=0, le=100_000)  # of the trainer; 0 = no limit
    user: str = ""  # the trainer is a service of this other user (`p2pfed trainer`); "" = a child
    socket: Path | None = None  # default: data_dir/trainer.sock
    loop_socket: Path | None = None  # default: data_dir/loop.sock
    state: Path | None = None  # the trainer's own files; default: data_dir/trainer


class Privacy(_Section):
    """The hospital's own limits; a run can only be stricter."""

    epsilon: Exact = Field(default=Fraction(0), ge=0, le=1000)  # lifetime, per data set
    delta: Exact = Field(default=Fraction(1, 100_000), gt=0, le=Fraction(1, 100))
    unit: Literal["patient", "hospital"] = "patient"  # the least that a run must protect
    allow_none: bool = False  # runs with mechanism "none" are refused unless this says so
    ledger: Path | None = None  # default: ledger.db in `default_state_dir()`
    share_metrics: Literal["off", "rounded"] = "off"  # to all members; outside ε


class Log(_Section):
    """What the daemon writes of itself."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "json"] = "auto"  # auto: text on a terminal, else JSON
    file: Path | None = None  # default: standard error


class Metrics(_Section):
    """Prometheus text, also at /v1/metrics of the admin socket."""

    listen: str = Field(default="", pattern=r"^(\S+:\d{1,5})?$")  # host:port; "" = socket only


class Settings(_Section):
    """All settings of one node."""

    node: Node
    network: Network = Network()
    admin: Admin = Admin()
    train: Train = Train()
    privacy: Privacy = Privacy()
    log: Log = Log()
    metrics: Metrics = Metrics()
    _file: Path = PrivateAttr(default=Path("p2pfed.toml"))
    _flags: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def file(self) -> Path:
        """The file that the settings were read from; the trainer reads it for itself."""
        return self._file

    def read_again(self) -> Settings:
        """The settings as the file says now, under the same flags; raises like `load_settings`."""
        return load_settings(self._file, flags=self._flags)

    @property
    def key_file(self) -> Path:
        """Path of the node's key: as named, else the service manager's credential, else usual."""
        credentials = os.environ.get("CREDENTIALS_DIRECTORY")
        handed = Path(credentials) / "node.key" if credentials else None
        if self.node.key_file is None and handed is not None and handed.exists():
            return handed
        return self.node.key_file or self.node.data_dir / "node.key"

    @property
    def admin_socket(self) -> Path:
        """Path of the admin socket."""
        return self.admin.socket or self.node.data_dir / "admin.sock"

    @property
    def trainer_socket(self) -> Path:
        """Path of the trainer's private socket."""
        return self.train.socket or self.node.data_dir / "trainer.sock"

    @property
    def loop_socket(self) -> Path:
        """Path of the socket that a training loop joins through."""
        return self.train.loop_socket or self.node.data_dir / "loop.sock"

    @property
    def trainer_account(self) -> tuple[int, int] | None:
        """User and group id of `train.user`, whose files the node cannot open; None without one.

        A number that the machine has no name for is a user with a group of the same number.
        """
        name = self.train.user
        if not name:
            return None
        try:
            found = pwd.getpwuid(int(name)) if _is_number(name) else pwd.getpwnam(name)
        except (KeyError, ValueError):  # ValueError: a zero byte in it
            return (int(name), int(name)) if _is_number(name) else (-1, -1)
        return found.pw_uid, found.pw_gid

    @property
    def trainer_state(self) -> Path:
        """Folder of the trainer's own files: what stays at home, tuned models, caches."""
        return self.train.state or self.node.data_dir / "trainer"

    @property
    def ledger_path(self) -> Path:
        """Path of the privacy ledger."""
        return self.privacy.ledger or default_state_dir() / "ledger.db"


def load_settings(path: Path, *, flags: Mapping[str, Any] | None = None) -> Settings:
    """Read and check a configuration file.

    Args:
        path: The TOML file.
        flags: Values from the command line by dotted key, e.g. `{"admin.socket": "/run/a.sock"}`.

    Raises:
        ConfigError: The file is missing or not TOML, or holds mistakes: every one is listed, with
            the nearest known key where a key is unknown.
    """
    try:
        data = tomllib.loads(read_small(path)[0].decode("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"no configuration at {path}",
            "the daemon does nothing without one",
            "run: p2pfed init --name NAME --dir DIR   (it writes one)",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}", str(error), _correct(path)) from error
    except (ValueError, RecursionError) as error:  # also endless numbers and endless brackets
        raise ConfigError(f"{path} is not TOML", str(error), _correct(path)) from error
    for dotted, value in [*_environment(), *(flags or {}).items()]:
        section, _, key = dotted.partition(".")
        table = data.setdefault(section, {})
        if isinstance(table, dict):  # what it is instead is told below
            table[key] = value
    try:
        settings = Settings.model_validate(data)
    except ValidationError as error:
        raise ConfigError(
            f"{path} has {error.error_count()} mistake{'s' * (error.error_count() > 1)}",
            "\n".join(_told(item) for item in error.errors()),
            _correct(path),
        ) from error
    settings = _anchored(settings, path.resolve().parent)
    settings._file = path.resolve()  # noqa: SLF001 - our own private attributes
    settings._flags = dict(flags or {})  # noqa: SLF001
    return _checked(settings, path)


def _correct(path: Path) -> str:
    return f"correct the file, then run: p2pfed config check {path}"


def _environment() -> list[tuple[str, str]]:
    found = []
    for name, value in os.environ.items():
        section, double, key = name.removeprefix("P2PFED_").lower().partition("__")
        if name.startswith("P2PFED_") and double and section in _FROM_ENVIRONMENT:
            found.append((f"{section}.{key}", value))
    return found


def _told(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        return f"{where}: {item['msg'].removeprefix('Value error, ')}"
    section, _, key = where.rpartition(".")
    model = (
        Settings.model_fields[section].annotation if section in Settings.model_fields else Settings
    )
    known = (
        list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
    )
    near = difflib.get_close_matches(key, known, n=1)
    return f"{where}: unknown key" + (f" (did you mean {near[0]!r}?)" if near else "")


def _anchored(settings: Settings, folder: Path) -> Settings:
    def at(path: Path | None) -> Path | None:
        try:
            return None if path is None else folder / path.expanduser()
        except RuntimeError as error:
            raise ConfigError(
                f"{path}: {error}", "there is no such user on this machine"
            ) from error

    sections = {}
    for name, keys in _PATHS.items():
        section = getattr(settings, name)
        sections[name] = section.model_copy(update={key: at(getattr(section, key)) for key in keys})
    first = tuple(at(path) for path in settings.network.bootstrap)
    sections["network"] = settings.network.model_copy(update={"bootstrap": first})
    return settings.model_copy(update=sections)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _is_missing(path: Path) -> bool:
    """Whether it is not there; what we may not look at is told by the one who needs it."""
    try:
        return not path.exists()
    except PermissionError:
        return False


def _checked(settings: Settings, path: Path) -> Settings:
    mistakes = []
    if settings.train.enabled:
        if not settings.train.task:
            mistakes.append("train.task: missing (or set train.enabled = false)")
        if settings.privacy.epsilon <= 0 and not settings.privacy.allow_none:
            mistakes.append("privacy.epsilon: missing; the lifetime budget has no default")
        account = settings.trainer_account
        if account == (-1, -1):
            mistakes.append(f"train.user: there is no user {settings.train.user!r} here")
        reads = account is None or account[0] == os.geteuid()  # else its data are not ours to see
        if settings.train.data is not None and reads and _is_missing(settings.train.data):
            mistakes.append(f"train.data: {settings.train.data} does not exist")
    mistakes.extend(
        f"{key}: {socket} has {len(os.fsencode(socket))} bytes; a Unix socket path may have"
        f" {SOCKET_PATH_BYTES}"
        for key, socket in (
            ("admin.socket", settings.admin_socket),
            ("train.socket", settings.trainer_socket),
            ("train.loop_socket", settings.loop_socket),
        )
        if len(os.fsencode(socket)) > SOCKET_PATH_BYTES
    )
    mistakes.extend(
        f"network.bootstrap: {file} does not exist"
        for file in settings.network.bootstrap
        if _is_missing(file)
    )
    if mistakes:
        raise ConfigError(
            f"{path} has {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}",
            "\n".join(mistakes),
            _correct(path),
        )
    return settings
