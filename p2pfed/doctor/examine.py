"""Asks every check in turn: gathers what it judges, and keeps going whatever it meets.

Map: `examine` -> the settings (all mistakes at once) -> `scene` -> `_ASKED`, one function for each
check, in the order of `CHECKS`.

Invariant: a check that cannot look (rights, a stuck file system) says so as a warning; it never
ends the others. Their own errors hold no more than what the operator's own files are called.
"""

from __future__ import annotations

import datetime as dt
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from p2pfed import __version__
from p2pfed.config import Settings, load_settings
from p2pfed.doctor import agreed, machine, own, paths, private, ways
from p2pfed.doctor.finding import CHECKS, Finding, ok, warn
from p2pfed.doctor.left import left_folders
from p2pfed.doctor.ports import Endpoint
from p2pfed.doctor.scene import Scene, held_run, lock_of, set_scene, vouched
from p2pfed.doctor.seen import answers, look, may
from p2pfed.errors import ConfigError, P2PFedError

__all__ = ["examine"]

_STEP = 60.0  # seconds for each step of the task's dry run
_LOOP = "loop"  # the value of train.task where a training loop joins
_TORCH = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"

Say = Callable[[str], None]


def examine(
    config: Path | None,
    *,
    flags: Mapping[str, Any] | None = None,
    offline: bool = False,
    task: bool | None = None,
    private_plane: bool = True,
    say: Say = lambda _: None,
) -> list[Finding]:
    """Look at a node from its configuration on.

    Args:
        config: The configuration; None: there is none.
        flags: As `config.load_settings` takes them.
        offline: Look up no name and dial nobody.
        task: Whether the task takes its dry step; None: only if no trainer has it loaded.
        private_plane: Whether ledger, task and trainer may be asked; what is found then belongs to
            the hospital.
        say: Told what takes long.

    Returns:
        At least one finding for each check that could be asked, in the order of `CHECKS`.
    """
    now = dt.datetime.now(dt.UTC)
    try:
        settings = _settings(config, flags)
    except ConfigError as error:
        fix = error.do or "correct the file, then run: p2pfed config check"
        broken = [Finding("config", "FAIL", line, fix) for line in private.as_config_error(error)]
        return [*broken, machine.clock(machine.clock_state((), now.timestamp()))]
    scene = set_scene(settings, offline=offline, private=private_plane, now=now)
    findings = []
    for check in CHECKS:
        asked = _ASKED[check] if check != "task" else partial(_task, wanted=task, say=say)
        findings += _asked(check, asked, scene)
    return findings


def _settings(config: Path | None, flags: Mapping[str, Any] | None) -> Settings:
    if config is None:
        raise ConfigError(
            "no configuration here, in ~/.config/p2pfed or in /etc/p2pfed",
            "",
            "p2pfed init --name NAME --dir DIR   (or name one: -c FILE)",
        )
    return load_settings(config, flags=flags)


def _asked(check: str, ask: Callable[[Scene], Iterator[Finding]], scene: Scene) -> list[Finding]:
    try:
        return list(ask(scene))
    except (OSError, P2PFedError, subprocess.SubprocessError) as error:
        told = error.what if isinstance(error, P2PFedError) else type(error).__name__
        return [warn(check, f"could not be looked at: {told}", "run the doctor as root")]


# --- own files ---------------------------------------------------------------------------------


def _config(scene: Scene) -> Iterator[Finding]:
    yield ok("config", f"{scene.config}, {scene.settings.node.name}")


def _key(scene: Scene) -> Iterator[Finding]:
    file, user = scene.key_file, scene.node_user
    yield own.key(
        look(file),
        scene.key_problem,
        user,
        readable=may(user, file, "r"),
        runs=scene.status is not None,
        handed=scene.key_handed,
    )


def _folder(scene: Scene) -> Iterator[Finding]:
    nearest = next(parent for parent in scene.state.parents if look(parent).is_there)
    writable = may(scene.node_user, nearest, "wx")
    yield own.folder(look(scene.state), scene.node_user, parent_writable=writable)


def _daemon(scene: Scene) -> Iterator[Finding]:
    status = ""
    if scene.status is not None:
        hours = float(scene.status["uptime_s"]) / 3600
        status = f"runs (process {scene.pid}, for {hours:.1f} h)"
    yield own.daemon(status, scene.silence, lock_of(scene), scene.config)


def _sockets(scene: Scene) -> Iterator[Finding]:
    settings = scene.settings
    mode = int(settings.admin.mode, 8)
    group = settings.admin.group if mode & 0o060 else ""
    wide = 0o660 if settings.train.user else 0o600  # two users meet at it
    places = [("admin.socket", settings.admin_socket, mode, group)]
    if settings.train.enabled:
        places += [("train.socket", settings.trainer_socket, wide, "")]
    if settings.train.task == _LOOP or settings.train.user:
        places += [("train.loop_socket", settings.loop_socket, wide, "")]
    facts = []
    for name, path, most, wanted in places:
        seen = look(path)
        listening = answers(path) if seen.kind == "socket" else None
        facts.append(own.SocketFacts(name, seen, most, wanted, listening))
    yield from own.sockets(facts)


def _users(scene: Scene) -> Iterator[Finding]:
    settings, exposed = scene.settings, []
    if settings.train.user:
        places = {
            "privacy.ledger": settings.ledger_path,
            "train.data": settings.train.data,
            "train.state": settings.trainer_state,
        }
        exposed = [
            key
            for key, path in places.items()
            if path is not None
            and look(path).kind != "missing"
            and (may(scene.node_user, path, "r") or may(scene.node_user, path, "w"))
        ]
    yield own.users(scene.node_user, settings.train.user, scene.trainer_user, open_to_node=exposed)


# --- ways --------------------------------------------------------------------------------------


def _clock(scene: Scene) -> Iterator[Finding]:
    files = [scene.key_file, scene.state / "store.db", scene.state / "lock"]
    files += (scene.state / "rosters").glob("v*.json")
    yield machine.clock(machine.clock_state(files, scene.now.timestamp()))


def _listens(scene: Scene) -> list[Endpoint]:
    read = map(Endpoint.read, scene.settings.node.listen)
    return [each for each in read if each is not None and not each.is_name]


def _listen(scene: Scene) -> Iterator[Finding]:
    yield from paths.listen(ways.ports_of(scene.settings.node.listen), scene.pid)


def _announce(scene: Scene) -> Iterator[Finding]:
    yield from paths.announce(scene.settings.node.announce, _listens(scene))


def _bootstrap(scene: Scene) -> Iterator[Finding]:
    lists = ways.lists_of(scene.settings.network.bootstrap)
    wanted = ways.addresses(lists, but=scene.peer_id)
    networks = scene.settings.network.allowed_networks
    tried = ways.not_dialled(wanted) if scene.offline else ways.dialled(wanted, networks)
    yield from paths.bootstrap(
        tried, lists=len(lists), connected=scene.connected, offline=scene.offline
    )


def _reach(scene: Scene) -> Iterator[Finding]:
    yield paths.reach(scene.reach, [end.port for end in _listens(scene)])


# --- what was agreed ---------------------------------------------------------------------------


def _roster(scene: Scene) -> Iterator[Finding]:
    yield from agreed.roster(
        scene.book.current,
        scene.roster_problem,
        scene.peer_id,
        scene.now,
        vouched=vouched(scene),
    )


def _run(scene: Scene) -> Iterator[Finding]:
    yield agreed.run(held_run(scene), trains=scene.settings.train.enabled)


def _versions(scene: Scene) -> Iterator[Finding]:
    daemon = None if scene.status is None else str(scene.status["version"])
    yield from agreed.versions(__version__, daemon, scene.peers, agreed.missing_pins())


# --- the machine -------------------------------------------------------------------------------


def _disk(scene: Scene) -> Iterator[Finding]:
    place = next(path for path in (scene.state, *scene.state.parents) if look(path).is_there)
    yield machine.disk(shutil.disk_usage(place).free, _still_needed(scene), scene.state)


def _still_needed(scene: Scene) -> int:
    """Bytes that the accepted run may still take."""
    run = (scene.status or {}).get("run") or {}
    if run.get("archive"):
        return max(0, int(run["archive"]["forecast_bytes"]) - int(run["archive"]["held_bytes"]))
    held = held_run(scene)
    if held is None or held.run is None or scene.book.current is None:
        return 0
    from p2pfed.node.archive import forecast  # noqa: PLC0415 - numpy; not for every check

    taken = _size(scene.state / "store.db")
    return max(0, forecast(held.run, scene.book.current) - taken)


def _size(file: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _memory(scene: Scene) -> Iterator[Finding]:
    train = scene.settings.train
    yield machine.memory(machine.memory_bytes(), train.memory_gb, trains=train.enabled)
    yield from machine.left(left_folders())


def _gpu(scene: Scene) -> Iterator[Finding]:
    train = scene.settings.train
    if not train.enabled:
        yield ok("gpu", "none is needed: this node does not train")
        return
    wanted = train.device in {"auto", "cuda"} and scene.private
    asks = wanted and (train.device == "cuda" or shutil.which("nvidia-smi") is not None)
    command = [sys.executable, "-P", "-c", _TORCH] if asks else None
    told = _private_status(scene)
    yield machine.gpu(machine.gpus(command, str(told.get("device", ""))), train.device)


def _open_files(scene: Scene) -> Iterator[Finding]:
    current = scene.book.current
    members = 0 if current is None else len(current.members)
    yield machine.open_files(machine.limit_of_files(scene.pid), members)


def _service(scene: Scene) -> Iterator[Finding]:
    found = machine.unit("p2pfed.service")
    if not scene.settings.train.enabled and not found.loaded:
        bootstrap = machine.unit("p2pfed-bootstrap.service")
        found = bootstrap if bootstrap.loaded else found
    yield machine.service(found)
    train = scene.settings.train
    if found.loaded and train.enabled and train.user and train.task != _LOOP:
        yield machine.service(machine.unit("p2pfed-trainer.service"))


# --- the private plane -------------------------------------------------------------------------


def _private_status(scene: Scene) -> dict[str, Any]:
    """What the trainer's own socket says of it; nothing where we may not or cannot ask."""
    from p2pfed.admin.client import Client  # noqa: PLC0415 - beside its only use

    path = scene.settings.trainer_socket
    if not scene.private or scene.status is None or look(path).kind != "socket":
        return {}
    try:
        return dict(Client(path, 3.0).get("/v1/status"))
    except P2PFedError:
        return {}


def _data(scene: Scene) -> Iterator[Finding]:
    train = scene.settings.train
    if not train.enabled or train.data is None:
        yield private.data(None, scene.node_user, readable=True, exposed=False, in_state=False)
        return
    reader = scene.trainer_user or scene.node_user
    seen = look(train.data)
    yield private.data(
        seen,
        reader,
        readable=may(reader, train.data, "rx" if seen.kind == "folder" else "r"),
        exposed=private.open_to_all(train.data),
        in_state=train.data.resolve().is_relative_to(scene.state.resolve()),
    )


def _ledger(scene: Scene) -> Iterator[Finding]:
    if not scene.settings.train.enabled:
        yield ok("ledger", "none is needed: this node does not train")
        return
    path = scene.settings.ledger_path
    table = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape")
    system = private.file_system(path, table)
    if scene.private:
        yield from private.ledger(private.looked_over(path, system))
    else:
        yield from private.ledger(private.LedgerFacts(look(path), system))


def _task(scene: Scene, *, wanted: bool | None, say: Say) -> Iterator[Finding]:
    train = scene.settings.train
    told = scene.status["trainer"] if scene.status is not None else {}
    if not train.enabled:
        yield ok("task", "none: this node does not train")
    elif train.task == _LOOP:
        yield ok("task", "a training loop of the hospital's own joins")
    elif wanted is False or not scene.private:
        yield ok("task", f"{train.task}: not tried")
    elif wanted is None and told.get("state") == "ready":
        yield ok("task", f"{train.task}: the trainer has it loaded", "a dry step too: --task")
    else:
        say(f"task {train.task}: one dry step (leave it out: --no-task)")
        reader = scene.trainer_user or scene.node_user
        yield from private.task(private.dry_step(scene.config, reader, _STEP), train.task)


def _trainer(scene: Scene) -> Iterator[Finding]:
    told = None if scene.status is None else scene.status["trainer"]
    health = [] if scene.status is None else scene.status.get("health", [])
    public = [line.removeprefix("trainer: ") for line in health if line.startswith("trainer: ")]
    own_words = _private_status(scene)
    problem = str(own_words.get("problem") or "") or "; ".join(public)
    log = scene.settings.trainer_socket.with_name("trainer.log")
    yield private.trainer(told, problem, trains=scene.settings.train.enabled, log=log)
    yield from private.noted(own_words.get("notes") or ())


_ASKED: dict[str, Callable[[Scene], Iterator[Finding]]] = {
    "config": _config,
    "key": _key,
    "folder": _folder,
    "daemon": _daemon,
    "sockets": _sockets,
    "users": _users,
    "clock": _clock,
    "listen": _listen,
    "announce": _announce,
    "bootstrap": _bootstrap,
    "reach": _reach,
    "roster": _roster,
    "run": _run,
    "versions": _versions,
    "disk": _disk,
    "memory": _memory,
    "gpu": _gpu,
    "open-files": _open_files,
    "service": _service,
    "data": _data,
    "ledger": _ledger,
    "trainer": _trainer,
}
