"""bugreport: an archive for whoever helps, made only of what the public plane may know.

Map: `_gathered` (versions, what the daemon answers, events, configuration, doctor, log) ->
`_cleaned` (private texts cut out, pseudonyms where asked for) -> one zip, mode 0600.

Invariants: no key, no data, no ledger, no trainer.log and nothing of the private socket is opened;
what is left of a configuration names no folder of patients; nobody puts another file in the place
of the daemon's log: root reads it as the daemon's user, and a link or another user's file is left
out. A daemon that does not run leaves gaps, which the archive names.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from p2pfed import __version__
from p2pfed.cli.files import as_owner, read_text
from p2pfed.cli.locate import admin_client, config_path
from p2pfed.cli.options import describe, with_socket
from p2pfed.cli.text import emit, size
from p2pfed.errors import ConfigError, NotPermitted, P2PFedError
from p2pfed.small_files import open_regular

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Callable, Iterator
    from typing import Any

    from p2pfed.config import Settings

__all__ = ["bugreport"]

EVENTS = 1000
LOG_LINES = 1000
_LOG_BYTES = 1 << 20
ENDPOINTS = ("version", "status", "peers", "privacy", "runs", "reachability")

_README = """\
What is in this archive
=======================

Made by `p2pfed bugreport` of a node that trains a model together with others. It holds what the
node's network process knows, which the other members know too, for the most part.

{entries}

Not in it: patients' data, keys, the privacy ledger, trainer.log, measures of the local model,
pictures. Paths of data and ledger and the options of the task are cut out{anonymous}.
Read it before you send it.
"""


def bugreport(parser: ArgumentParser) -> None:
    """Fill in the command `bugreport`."""
    describe(
        parser,
        "Write an archive (0600) for whoever helps you: versions, status, peers, events, the\n"
        "configuration without paths of data, what the doctor found, the end of the daemon's log.\n"
        "Never in it: data, keys, ledger, trainer.log, private measures. Nothing is sent.",
        endpoint="GET /v1/version, /v1/status, /v1/peers, /v1/privacy, /v1/runs,"
        " /v1/reachability, /v1/events",
    )
    parser.add_argument(
        "-o", "--out", metavar="FILE.zip", help="default: p2pfed-bugreport-TIME.zip here"
    )
    parser.add_argument(
        "--anonymous",
        action="store_true",
        help="pseudonyms for members, network, addresses, users and this machine",
    )
    with_socket(parser)
    parser.set_defaults(run=_bugreport)


def _bugreport(args: Namespace) -> None:
    from datetime import UTC, datetime

    now = datetime.now(UTC)
    out = Path(args.out or f"p2pfed-bugreport-{now:%Y%m%d-%H%M%S}.zip")
    entries = _cleaned(_gathered(args), args)
    listing = "\n".join(f"  {name:<18} {text}" for name, text in _CONTENTS.items())
    more = ", names and addresses are pseudonyms" if args.anonymous else ""
    files = {"README.txt": _README.format(entries=listing, anonymous=more)}
    files |= {name: _encoded(name, value) for name, value in entries.items()}
    _written(out, files, now.timetuple()[:6])
    sizes = {name: len(text.encode()) for name, text in files.items()}
    emit(
        args,
        "bugreport",
        {"file": str(out), "entry_bytes": sizes, "anonymous": args.anonymous},
        [
            f"{out}, mode 0600; it holds:",
            *(f"  {name:<18} {size(count)}" for name, count in sizes.items()),
            "no data, keys, ledger, trainer.log or private measures; read it before you send it",
        ],
    )


# --- what is gathered --------------------------------------------------------------------------

_CONTENTS = {
    "versions.json": "of p2pfed, Python, the system and the libraries",
    "daemon.json": "the daemon's answers: " + ", ".join(ENDPOINTS),
    "events.json": f"its last {EVENTS} events",
    "config.json": "the configuration, redacted",
    "doctor.json": "what `p2pfed doctor` found, the private plane left out",
    "log.json": f"the last {LOG_LINES} lines of the daemon's log, where it can be found",
}


def _gathered(args: Namespace) -> dict[str, Any]:
    settings, mistakes = _settings(args)
    return {
        "versions.json": _versions(),
        "daemon.json": _answers(args),
        "events.json": _events(args),
        "config.json": _configuration(settings, mistakes),
        "doctor.json": _doctor(args),
        "log.json": _log(settings),
    }


def _settings(args: Namespace) -> tuple[Settings | None, list[str]]:
    """The settings, or which keys are wrong; never the wrong values."""
    from p2pfed.config import load_settings

    try:
        found = config_path(args)
        return (None, ["no configuration found"]) if found is None else (load_settings(found), [])
    except NotPermitted as error:
        return None, [error.what]
    except ConfigError as error:
        lines = error.why.splitlines() or [error.what]
        return None, [line.partition(":")[0] for line in lines]


def _versions() -> dict[str, Any]:
    import platform
    import sys

    return {
        "p2pfed": __version__,
        "python": sys.version,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "libraries": _libraries(),
    }


def _libraries() -> dict[str, dict[str, str | None]]:
    """Each library that the lock file pins, or else the package asks for: locked and installed."""
    import re
    from importlib.metadata import PackageNotFoundError, requires, version

    lock = Path(__file__).resolve().parent.parent.parent / "requirements.lock"
    try:
        text = lock.read_text("utf-8")
        locked = dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))
    except OSError:  # installed from a wheel
        locked = {}
    try:
        asked = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requires("p2pfed") or []]
    except PackageNotFoundError:
        asked = []

    def here(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    names = sorted({*locked, *asked}, key=str.lower)
    return {name: {"locked": locked.get(name), "installed": here(name)} for name in names}


def _answers(args: Namespace) -> dict[str, Any]:
    return {endpoint: _told(args, endpoint) for endpoint in ENDPOINTS}


def _told(args: Namespace, endpoint: str) -> Any:
    try:
        return admin_client(args, timeout=5.0).get(f"/v1/{endpoint}")
    except P2PFedError as error:
        return {"error": error.what}


def _events(args: Namespace) -> list[Any]:
    from collections import deque

    try:
        stream = admin_client(args, timeout=5.0).stream("/v1/events?since=0")
        return list(deque(stream, maxlen=EVENTS))
    except P2PFedError as error:
        return [{"error": error.what}]


def _configuration(settings: Settings | None, mistakes: list[str]) -> dict[str, Any]:
    from p2pfed.doctor.redaction import settings_without

    if settings is None:
        return {"mistakes_in": mistakes}
    return settings_without(settings.model_dump(mode="json"))


def _doctor(args: Namespace) -> dict[str, Any]:
    from p2pfed.cli.doctor import as_data
    from p2pfed.doctor.examine import examine

    try:
        found = config_path(args)
    except (ConfigError, NotPermitted):
        found = None
    flags = {"admin.socket": args.socket} if args.socket else None
    findings = examine(found, flags=flags, offline=True, task=False, private_plane=False)
    data = as_data(findings)
    if any(one.check == "config" and one.status == "FAIL" for one in findings):
        data["checks"] = "not made: the configuration has mistakes, see config.json"
    return data


def _log(settings: Settings | None) -> dict[str, Any]:
    file = None if settings is None else settings.log.file
    if settings is not None and file is not None:
        return {"from": "log.file", "lines": _tail(file, settings.node.data_dir)}
    text = _journal()
    if text is None:
        return {"from": None, "lines": [], "why": "no log.file, and no journal of p2pfed.service"}
    return {"from": "journal of p2pfed.service", "lines": text.splitlines()[-LOG_LINES:]}


def _tail(file: Path, data_dir: Path) -> list[str]:
    """The end of the daemon's log; its user may have put anything in that place."""
    try:
        with as_owner(data_dir):
            folder, owner = file.parent.stat(), data_dir.stat().st_uid
            descriptor, found = open_regular(file, os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as opened:
            is_roots_alone = folder.st_uid == 0 and not folder.st_mode & 0o022
            if found.st_uid not in {folder.st_uid, owner} and not is_roots_alone:
                return ["cannot be read: it is not of the user whose folder it lies in"]
            opened.seek(max(0, found.st_size - _LOG_BYTES))
            return opened.read().decode("utf-8", "replace").splitlines()[-LOG_LINES:]
    except OSError as error:
        return [f"cannot be read: {error.strerror}"]


def _journal() -> str | None:
    import shutil
    import subprocess

    if not shutil.which("journalctl"):
        return None
    command = ["journalctl", "--unit=p2pfed.service", f"--lines={LOG_LINES}", "--no-pager"]
    command += ["--output=short-iso", "--quiet", "--no-hostname"]
    try:
        done = subprocess.run(  # noqa: S603 - a program of the system
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = done.stdout.decode("utf-8", "replace")
    return text if done.returncode == 0 and text.strip() else None


# --- what is taken out -------------------------------------------------------------------------


def _cleaned(entries: dict[str, Any], args: Namespace) -> dict[str, Any]:
    from p2pfed.doctor.redaction import Pseudonyms, cut_out, every_text

    settings, _ = _settings(args)
    changes: list[Callable[[str], str]] = [cut_out(_private_texts(args, settings))]
    if args.anonymous:
        changes.append(Pseudonyms(_names(entries, settings)))
    for change in changes:
        entries = {name: every_text(value, change) for name, value in entries.items()}
    return entries


def _private_texts(args: Namespace, settings: Settings | None) -> dict[str, str]:
    """What stands instead of each path and option that is nobody's business, by that text."""
    said = _as_written(args)
    texts = {text: f"[{key}]" for key, text in said.items()}
    if settings is not None:
        paths = {
            "train.data": settings.train.data,
            "privacy.ledger": settings.ledger_path,
            "train.state": settings.train.state,
        }
        texts |= {str(path): f"[{key}]" for key, path in paths.items() if path is not None}
    return texts


def _as_written(args: Namespace) -> dict[str, str]:
    """The private texts of the file itself, which may be wrong in other places."""
    import tomllib

    try:
        found = config_path(args)
        data = {} if found is None else tomllib.loads(found.read_text("utf-8"))
    except (OSError, ValueError, ConfigError, NotPermitted):
        return {}
    train, privacy = data.get("train"), data.get("privacy")
    train = train if isinstance(train, dict) else {}
    privacy = privacy if isinstance(privacy, dict) else {}
    options = train.get("options")
    texts = {"train.data": train.get("data"), "train.state": train.get("state")}
    texts["privacy.ledger"] = privacy.get("ledger")
    if isinstance(options, dict):
        texts |= {f"train.options.{key}": value for key, value in options.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str) and len(text) > 3}


def _names(entries: dict[str, Any], settings: Settings | None) -> Iterator[str]:
    """Who is to have a pseudonym: members, the network, this machine and its users."""
    import contextlib
    import getpass
    import pwd
    import socket

    daemon = entries["daemon.json"]
    status, peers = daemon["status"], daemon["peers"]
    yield str(status.get("name") or "")
    yield str((status.get("network") or {}).get("name") or "")
    yield from (str(peer["name"]) for peer in peers if isinstance(peers, list))
    if settings is not None:
        yield settings.node.name
        yield from (*settings.admin.operators, settings.admin.group, settings.train.user)
        yield from _listed(settings)
    yield socket.gethostname()
    with contextlib.suppress(OSError, KeyError):
        yield getpass.getuser()
    people = range(1000, 60_000)  # of useradd; below are services, above nobody
    yield from (user.pw_name for user in pwd.getpwall() if user.pw_uid in people)
    yield from _writers(entries["events.json"])  # a directory service may not list its users


def _writers(events: list[Any]) -> Iterator[str]:
    """Who changed something here, but services."""
    for event in events:
        data = event.get("data") if event.get("type") == "admin.write" else None
        if isinstance(data, dict) and data.get("uid", 0) >= 1000:
            yield str(data.get("user", ""))


def _listed(settings: Settings) -> Iterator[str]:
    """Names in the bootstrap lists."""
    from p2pfed.identity.bootstrap import BootstrapList

    for file in settings.network.bootstrap:
        try:
            listed = BootstrapList.parse(read_text(file), str(file))
        except ConfigError:
            continue
        yield listed.network
        yield from (peer.name for peer in listed.peers)


# --- the archive -------------------------------------------------------------------------------


def _encoded(name: str, value: Any) -> str:
    if name == "events.json":  # one a line
        lines = ",\n".join(json.dumps(event, ensure_ascii=False) for event in value)
        return f"[\n{lines}\n]\n"
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def _written(out: Path, files: dict[str, str], date: tuple[int, ...]) -> None:
    import zipfile

    try:
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ConfigError(
            f"{out} exists already", "nothing is overwritten", "choose another name: -o FILE.zip"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot write {out}", error.strerror or str(error)) from error
    with (
        os.fdopen(descriptor, "wb") as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name, text in files.items():
            entry = zipfile.ZipInfo(name, date_time=(*date,)[:6])  # type: ignore[arg-type]
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o600 << 16
            archive.writestr(entry, text)
