"""The node's own files: key, state folder, lock, sockets, and the two users.

Every function here judges facts that `seen` gathered; only `lock_holder` reads by itself.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from p2pfed.doctor.finding import Finding, Mend, fail, ok, warn
from p2pfed.doctor.seen import Seen, User, group_name, user_of
from p2pfed.errors import DaemonNotRunning, NotPermitted, P2PFedError

__all__ = ["SocketFacts", "daemon", "folder", "key", "lock_holder", "sockets", "users"]

_LOCKS = Path("/proc/locks")


def quoted(path: Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def key(
    seen: Seen, problem: str, node_user: User, *, readable: bool, runs: bool, handed: bool = False
) -> Finding:
    """The node's key.

    Args:
        seen: The file.
        problem: Why it is not a key; empty if it is one, or we cannot read it.
        node_user: Who runs the daemon.
        readable: Whether that user may read it.
        runs: Whether the daemon runs, and so has its key.
        handed: Whether the service hands that file to the node, whose user need not read it.
    """
    path = quoted(seen.path)
    if seen.is_there and seen.mode & 0o077:
        return fail(
            "key",
            f"{seen.path} has mode {seen.mode:04o}: others can speak in this hospital's name",
            f"chmod 600 {path}   (and make a new key if someone else may have read it)",
            Mend(seen.path, 0o600),
        )
    if problem:
        return fail("key", problem, "put your copy in place; without one see: docs/operations.md")
    if runs and not readable:
        return ok("key", "the daemon runs with its key (handed to it by the service)")
    if seen.kind == "missing":
        return fail(
            "key",
            f"there is no key at {seen.path}",
            "put your copy in place; for a new identity: p2pfed init --name NAME --dir NEW",
        )
    if handed:
        return ok("key", f"{seen.path}, which p2pfed.service hands to the node")
    if not readable:
        return fail(
            "key",
            f"{node_user.name}, who runs the node, may not read {seen.path}",
            f"chown {shlex.quote(node_user.name)} {path}",
        )
    return ok("key", f"{seen.path}, mode {seen.mode:04o}, owner {user_of(seen.uid).name}")


def folder(seen: Seen, node_user: User, *, parent_writable: bool) -> Finding:
    """The state folder (`node.data_dir`)."""
    path, name = quoted(seen.path), shlex.quote(node_user.name)
    if seen.kind == "missing" and parent_writable:
        return ok("folder", f"{seen.path} is made at the first start")
    if seen.kind == "missing":
        return fail(
            "folder",
            f"there is no {seen.path}, and {node_user.name} cannot make it",
            f"install -d -m 700 -o {name} {path}",
        )
    if seen.kind == "hidden":
        return warn("folder", f"you may not look at {seen.path}", "run the doctor as its owner")
    if seen.kind != "folder":
        return fail("folder", f"{seen.path} is no folder", "set node.data_dir to a folder")
    if seen.mode & 0o077:
        return fail(
            "folder",
            f"{seen.path} has mode {seen.mode:04o}: others could look into it",
            f"chmod 700 {path}",
            Mend(seen.path, 0o700),
        )
    if seen.uid != node_user.uid:
        return fail(
            "folder",
            f"{seen.path} belongs to {user_of(seen.uid).name}, the node runs as {node_user.name}",
            f"chown -R {name} {path}",
        )
    return ok("folder", f"{seen.path}, mode {seen.mode:04o}, owner {node_user.name}")


def lock_holder(path: Path) -> int | None:
    """The process that holds the lock file; 0 if one holds it and cannot be named; None: nobody.

    The system's own table is read: trying the lock would hold it for a moment, in which a daemon
    that starts would be refused.
    """
    try:
        inode = path.stat().st_ino
        table = _LOCKS.read_text("ascii")
    except OSError:
        return None
    for line in table.splitlines():
        fields = line.split()
        if len(fields) == 8 and fields[5].rpartition(":")[2] == str(inode):
            return max(0, int(fields[4]))
    return None


def daemon(status: str, silence: P2PFedError | None, holder: int | None, config: Path) -> Finding:
    """Whether the daemon runs and answers.

    Args:
        status: How it presents itself; empty if it did not answer.
        silence: Why it did not.
        holder: Who holds the folder's lock.
        config: The configuration.
    """
    problem = "" if silence is None else silence.what
    if status:
        return ok("daemon", status)
    if isinstance(silence, NotPermitted):
        return warn("daemon", problem, silence.do or "run the doctor as the daemon's user")
    if holder is not None:
        who = f"process {holder}" if holder else "a process that cannot be named from here"
        return fail(
            "daemon",
            f"{who} holds the state folder and does not answer ({problem})",
            f"look at its log; then end it: kill {holder or 'PID'}",
        )
    if silence is None or isinstance(silence, DaemonNotRunning):
        return ok("daemon", "does not run", f"start it: p2pfed node -c {quoted(config)}")
    return warn("daemon", problem, silence.do or "look at the daemon's log")


@dataclass(frozen=True, slots=True)
class SocketFacts:
    """One socket file.

    Attributes:
        name: The key of the configuration that says where it lies.
        seen: The file.
        most: The widest mode it may have.
        group: The group it should have; empty: any.
        answers: Whether somebody listens; None: cannot be told.
    """

    name: str
    seen: Seen
    most: int
    group: str
    answers: bool | None


def sockets(facts: Iterable[SocketFacts]) -> Iterator[Finding]:
    """Rights of the sockets, and whether somebody listens on them."""
    there = [one for one in facts if one.seen.kind not in {"missing", "hidden"}]
    troubles = [found for one in there if (found := _socket_trouble(one)) is not None]
    if troubles:
        yield from troubles
    else:
        names = ", ".join(f"{one.name} {one.seen.mode:04o}" for one in there)
        yield ok("sockets", names or "none yet: they are made at the start")


def _socket_trouble(one: SocketFacts) -> Finding | None:
    seen, path = one.seen, quoted(one.seen.path)
    if seen.kind != "socket":
        return fail("sockets", f"{one.name}: {seen.path} is no socket", f"mv {path} {path}.aside")
    if one.answers is False:
        return warn(
            "sockets",
            f"{one.name}: nobody listens on {seen.path}, a process that was killed left it",
            f"rm {path}   (the next start replaces it anyway)",
            Mend(seen.path, None),
        )
    if seen.mode & ~one.most:
        return fail(
            "sockets",
            f"{one.name}: {seen.path} has mode {seen.mode:04o}, at most {one.most:04o} is meant",
            f"chmod {one.most:04o} {path}",
        )
    if one.group and group_name(seen.gid) != one.group:
        return warn(
            "sockets",
            f"{one.name}: {seen.path} has the group {group_name(seen.gid)}, not {one.group}",
            "restart the daemon: it sets the group at its start",
        )
    return None


def users(
    node_user: User, wanted: str, trainer_user: User | None, *, open_to_node: list[str]
) -> Finding:
    """Whether network process and trainer are two users, and kept apart.

    Args:
        node_user: Who runs the daemon.
        wanted: `train.user` of the configuration.
        trainer_user: That user; None if there is no such user.
        open_to_node: What of the private plane the node's user may read or write.
    """
    if not wanted:
        return ok(
            "users",
            f"one user, {node_user.name}: network process and trainer share all files",
            "for a boundary between them: train.user and the service's two units",
        )
    if trainer_user is None:
        return fail(
            "users",
            f"there is no user {wanted} (train.user)",
            f"useradd --system --no-create-home {shlex.quote(wanted)}",
        )
    if trainer_user.uid == node_user.uid:
        return fail(
            "users",
            f"the daemon runs as {wanted}, who is the trainer's user (train.user)",
            "run the daemon as another user: User= in p2pfed.service",
        )
    if open_to_node:
        narrow = f"take it away: chown -R {shlex.quote(wanted)}: PATH && chmod -R go= PATH"
        leave_root = (
            "root reads everything: run the daemon as a user of its own (User= in its unit)"
        )
        return fail(
            "users",
            f"{node_user.name}, who runs the network process, has access to "
            + ", ".join(open_to_node),
            narrow if node_user.uid else leave_root,
        )
    return ok("users", f"network process {node_user.name}, trainer {wanted}: kept apart")
