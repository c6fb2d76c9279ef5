"""What every check starts from: the settings, what the daemon tells, and who runs what.

Invariant: a daemon that is not there, or is older, leaves gaps and no error.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2pfed.admin.client import Client
from p2pfed.config import Settings
from p2pfed.doctor import own
from p2pfed.doctor.agreed import HeldRun, accepted, believed
from p2pfed.doctor.seen import User, look, may, user_named, user_of
from p2pfed.doctor.unit import NodeUnit, node_unit
from p2pfed.errors import ConfigError, P2PFedError
from p2pfed.identity.book import RosterBook
from p2pfed.identity.filehash import ChunkList
from p2pfed.identity.invited import is_invited
from p2pfed.identity.keys import NodeKey

__all__ = ["Scene", "held_run", "lock_of", "set_scene", "vouched"]

_SECONDS = 5.0  # for an answer of the daemon


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Everything that more than one check needs.

    Attributes:
        settings: Of the node.
        offline: Whether nobody is to be dialled.
        private: Whether the private plane may be asked.
        now: The time.
        status: What /v1/status says; None without a daemon.
        silence: Why it said nothing.
        peers: What /v1/peers says.
        reach: What /v1/reachability says; None without.
        pid: Of the daemon.
        key_file: Where its key lies.
        key_handed: Whether the service hands that to the node (`LoadCredential=`).
        node_user: Who runs the daemon, or would.
        trainer_user: Who runs the trainer, or would; None: there is no such user.
        peer_id: This node's; empty if it cannot be told.
        key_problem: Why the key file is none.
        book: The rosters that verify.
        roster_problem: Why another does not.
    """

    settings: Settings
    offline: bool
    private: bool
    now: dt.datetime
    status: dict[str, Any] | None
    silence: P2PFedError | None
    peers: list[dict[str, Any]] = field(default_factory=list)
    reach: dict[str, Any] | None = None
    pid: int | None
    key_file: Path
    key_handed: bool
    node_user: User
    trainer_user: User | None
    peer_id: str
    key_problem: str
    book: RosterBook
    roster_problem: str

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.settings.file

    @property
    def state(self) -> Path:
        """The state folder."""
        return self.settings.node.data_dir

    @property
    def connected(self) -> int:
        """How many peers the daemon has a connection with."""
        return sum(peer.get("path") is not None for peer in self.peers)


def set_scene(settings: Settings, *, offline: bool, private: bool, now: dt.datetime) -> Scene:
    """Ask the daemon if there is one, and read what is signed.

    Args:
        settings: Of the node.
        offline: Whether nobody is to be dialled.
        private: Whether the private plane may be asked.
        now: The time.
    """
    client = Client(settings.admin_socket, _SECONDS)
    status, silence = _told(client, "status")
    pid = None if status is None else int(status.get("pid") or 0) or None
    unit = node_unit(settings.file)
    node_user = _node_user(settings, pid, unit)
    handed = None if unit is None or settings.node.key_file is not None else unit.key
    key_file = handed or settings.key_file
    peer_id, key_problem = _identity(key_file, status)
    peers, _ = _told(client, "peers") if status is not None else (None, None)
    reach, _ = _told(client, "reachability") if status is not None else (None, None)
    book, roster_problem = believed(_rosters(settings, client, status), settings.network.id)
    wanted = settings.train.user
    return Scene(
        settings=settings,
        offline=offline,
        private=private,
        now=now,
        status=status,
        silence=silence,
        peers=peers or [],
        reach=reach,
        pid=pid,
        key_file=key_file,
        key_handed=handed is not None,
        node_user=node_user,
        trainer_user=user_named(wanted) if wanted else node_user,
        peer_id=peer_id,
        key_problem=key_problem,
        book=book,
        roster_problem=roster_problem,
    )


def _told(client: Client, endpoint: str) -> tuple[Any, P2PFedError | None]:
    try:
        return client.get(f"/v1/{endpoint}"), None
    except P2PFedError as error:
        return None, error


def _node_user(settings: Settings, pid: int | None, unit: NodeUnit | None) -> User:
    places = [Path("/proc", str(pid))] if pid else []
    places += [settings.node.data_dir]
    if not any(look(place).is_there for place in places) and unit is not None:
        named = user_named(unit.user or "root")
        if named is not None:
            return named
    places += [settings.key_file, settings.file]
    found = [seen for place in places if (seen := look(place)).is_there]
    return user_of(found[0].uid if found else os.geteuid())


def _identity(key: Path, status: dict[str, Any] | None) -> tuple[str, str]:
    """Our peer id, and why the key file is none (one with open rights still is a key)."""
    told = "" if status is None else str(status["peer_id"])
    seen = look(key)
    if seen.kind != "file" or seen.mode & 0o077 or key.suffix == ".cred":  # encrypted
        return told, ""
    try:
        return NodeKey.load(key).peer_id, ""
    except ConfigError as error:
        unreadable = isinstance(error.__cause__, PermissionError)
        return told, "" if unreadable else error.what


def _rosters(settings: Settings, client: Client, status: dict[str, Any] | None) -> list[bytes]:
    folder = settings.node.data_dir / "rosters"
    try:
        kept = [path.read_bytes() for path in sorted(folder.glob("v*.json"))]
    except OSError:
        kept = []
    if kept or status is None:
        return kept
    told, _ = _told(client, "roster")  # the folder is not ours to read
    return [told["signed"].encode()] if told else []


def vouched(scene: Scene) -> bool:
    """Whether an invite, or the configuration, said which network is the right one."""
    if scene.settings.network.id or is_invited(scene.state):
        return True
    return not _remembered(scene, "unvouched")


def _accepted_run(scene: Scene) -> bytes | None:
    """The signed run that the node takes part in, from its folder; None if there is none."""
    run_id = _active_of(scene)
    if not run_id:
        return None
    try:
        return (scene.state / "runs" / f"{run_id}.json").read_bytes()
    except OSError:
        return b""  # named, and not there: that does not verify


def held_run(scene: Scene) -> HeldRun | None:
    """The accepted run, verified, and its first model; None if there is none."""
    signed = _accepted_run(scene)
    if signed is None:
        return None
    made, problem = accepted(signed, scene.book.newest_first())
    if made is None:
        return HeldRun(None, problem, genesis=False)
    blob, user = scene.state / "blobs" / made.genesis.hex(), scene.node_user
    closed = look(blob).is_there and not may(user, blob, "r")
    return HeldRun(
        made,
        "",
        genesis=_is_whole(blob, made.genesis),
        closed_to=user.name if closed else "",
        file=blob,
    )


def _is_whole(blob: Path, digest: bytes) -> bool:
    """Whether the file with this hash is there."""
    try:
        with blob.open("rb") as file:
            return ChunkList.of(file).name == digest
    except OSError:
        return False


def _active_of(scene: Scene) -> str:
    if scene.status is not None and scene.status.get("run"):
        return str(scene.status["run"]["id"])
    return str(_remembered(scene, "run") or "")


def _remembered(scene: Scene, key: str) -> Any:
    """What the node's store keeps under a name; None where there is nothing, or not for us."""
    store = scene.state / "store.db"
    try:
        if not store.exists():
            return None
        with contextlib.closing(_opened(store)) as db:
            rows = db.execute("SELECT value FROM remembered WHERE key = ?", (key,)).fetchall()
        return json.loads(rows[0][0]) if rows else None
    except (OSError, sqlite3.Error, ValueError):
        return None


def _opened(store: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{store.absolute().as_uri()}?mode=ro", uri=True, timeout=1.0)


def lock_of(scene: Scene) -> int | None:
    """Who holds the state folder, see `own.lock_holder`."""
    return own.lock_holder(scene.state / "lock")
