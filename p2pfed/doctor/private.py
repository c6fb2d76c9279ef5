"""The private plane from outside: data, ledger, task and trainer.

Nothing of a patient is read here: of the data only the rights are looked at, never a name in the
folder; the ledger is verified in a copy as an auditor would; the task runs in another process, as
the user who would run the trainer.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2pfed.doctor.finding import Finding, Mend, fail, ok, warn
from p2pfed.doctor.seen import Seen, User, as_user, look
from p2pfed.errors import ConfigError, LedgerCorrupt, P2PFedError, StateInUse

__all__ = [
    "Budget",
    "LedgerFacts",
    "data",
    "dry_step",
    "file_system",
    "ledger",
    "looked_over",
    "noted",
    "open_to_all",
    "task",
    "trainer",
]

# File systems that may not keep what fsync promised, or forget at a reboot.
_REMOTE = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "ceph", "fuse.glusterfs"}
_FORGETS = {"tmpfs", "ramfs", "overlay"}
_ESCAPES = {"\\040": " ", "\\011": "\t", "\\012": "\n", "\\134": "\\"}  # of mountinfo


# --- data --------------------------------------------------------------------------------------


def open_to_all(path: Path) -> bool:
    """Whether everybody on this machine can read a path: it, and the way to it, are open."""
    whole = path.resolve()
    way = all(look(parent).mode & 0o001 for parent in whole.parents)
    return way and bool(look(whole).mode & 0o004)


def data(
    seen: Seen | None, reader: User, *, readable: bool, exposed: bool, in_state: bool
) -> Finding:
    """What the task reads.

    Args:
        seen: The folder or file; None if the configuration names none.
        reader: Who runs the trainer.
        readable: Whether that user may read it.
        exposed: Whether everybody on this machine may.
        in_state: Whether it lies in the node's state folder.
    """
    if seen is None:
        return ok("data", "no folder is named (train.data)")
    path, who = shlex.quote(str(seen.path)), shlex.quote(reader.name)
    if seen.kind == "missing":
        return fail("data", f"there is no {seen.path}", "set train.data to where the data lie")
    if not readable:
        return fail(
            "data",
            f"{reader.name}, who runs the trainer, may not read {seen.path}",
            f"setfacl -R -m u:{who}:rX {path}   (or: chown -R {who} {path}; see its parents too)",
        )
    if exposed:
        return fail("data", f"everybody on this machine may read {seen.path}", f"chmod o= {path}")
    if in_state:
        return warn(
            "data",
            f"{seen.path} lies in the node's state folder: a copy of that takes patients along",
            "move it elsewhere, and set train.data",
        )
    return ok("data", f"{seen.path}, readable by {reader.name}, not by everybody")


# --- ledger ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Budget:
    """What the data set nearest to its limit has spent.

    Attributes:
        records: Of the whole ledger.
        spent: ε.
        limit: ε; None before the first debit.
        left: How many more releases like the newest fit; None where that says nothing.
    """

    records: int
    spent: float
    limit: float | None
    left: int | None


@dataclass(frozen=True, slots=True)
class LedgerFacts:
    """The ledger, looked at from outside.

    Attributes:
        seen: The file.
        system: The kind of file system that it lies on, or would.
        budget: What it says; None if it was not read.
        unread: Why it was not read, where that is no fault.
        damage: Why it does not verify.
    """

    seen: Seen
    system: str
    budget: Budget | None = None
    unread: str = ""
    damage: str = ""


def file_system(path: Path, table: str) -> str:
    """The kind of file system that holds a path.

    Args:
        path: Existing or not.
        table: The text of /proc/self/mountinfo.
    """
    whole = path.resolve()
    best, kind = -1, ""
    for line in table.splitlines():
        fields, _, rest = line.partition(" - ")
        mounted = fields.split(" ")[4]
        for code, character in _ESCAPES.items():
            mounted = mounted.replace(code, character)
        depth = len(Path(mounted).parts)
        if depth >= best and whole.is_relative_to(mounted):  # a later mount covers an earlier
            best, kind = depth, rest.split(" ")[0]
    return kind


def looked_over(path: Path, system: str) -> LedgerFacts:
    """Verify a ledger in a copy of it; the file is neither written nor locked."""
    from p2pfed.privacy.extract import read_ledger  # noqa: PLC0415 - numpy; not for every check
    from p2pfed.privacy.review import review  # noqa: PLC0415

    seen = look(path)
    if seen.kind != "file" or seen.mode & 0o077:
        return LedgerFacts(seen, system)
    if not os.access(path, os.R_OK, effective_ids=True):
        return LedgerFacts(seen, system, unread="it is not yours to read")
    try:
        extract = read_ledger(path)
        found = review(extract, name=str(path))
    except StateInUse:
        return LedgerFacts(seen, system, unread="the trainer has it open, and verified it then")
    except LedgerCorrupt as error:
        return LedgerFacts(seen, system, damage=error.why or error.what)
    except P2PFedError as error:
        return LedgerFacts(seen, system, unread=error.why or error.what)
    sets = [(one.epsilon, one.limit, one.left) for one in found.datasets]
    worst = max(sets, key=lambda one: one[0], default=(0.0, None, None))
    limit = None if worst[1] is None else float(worst[1].epsilon)
    return LedgerFacts(seen, system, budget=Budget(len(extract.records), worst[0], limit, worst[2]))


def ledger(facts: LedgerFacts) -> Iterator[Finding]:
    """Rights, place, integrity and what is left of the budget."""
    seen, path = facts.seen, shlex.quote(str(facts.seen.path))
    if facts.system in _REMOTE | _FORGETS:
        why = "may forget what was spent" if facts.system in _FORGETS else "may lose a debit"
        yield warn(
            "ledger",
            f"{seen.path} is on {facts.system}, which {why}",
            "set privacy.ledger to a local disk (and move the file there with the trainer stopped)",
        )
    if seen.is_there and seen.mode & 0o077:
        yield fail(
            "ledger",
            f"{seen.path} has mode {seen.mode:04o}: others could read or change it",
            f"chmod 600 {path}",
            Mend(seen.path, 0o600),
        )
    elif facts.damage:
        yield fail(
            "ledger",
            f"{seen.path} does not verify: {facts.damage}",
            "keep a copy, restore the newest backup: docs/operations.md, The ledger",
        )
    elif facts.budget is not None:
        yield _budget(facts.budget)
    elif seen.kind == "missing":
        yield ok("ledger", f"{seen.path} is made when the first trainer starts")
    elif seen.kind == "hidden":
        yield ok("ledger", f"{seen.path}: not yours to look at", "ask as the trainer's user")
    else:
        yield ok("ledger", f"{seen.path}, mode {seen.mode:04o}; {facts.unread or 'not read'}")


def _budget(found: Budget) -> Finding:
    told = f"verified, {found.records} records"
    if found.limit is None:
        return ok("ledger", f"{told}; nothing was spent yet")
    told += f"; ε {found.spent:.3g} of {found.limit:g} spent"
    if found.left == 0 or found.spent >= found.limit:
        return warn(
            "ledger",
            f"{told}: no further release fits, the node only receives",
            "so it is meant; only the hospital may raise privacy.epsilon, in the file",
        )
    return ok("ledger", f"{told}{'' if found.left is None else f', {found.left} releases left'}")


# --- task --------------------------------------------------------------------------------------


def dry_step(config: Path, reader: User, seconds: float) -> list[dict[str, Any]] | str:
    """Run `p2pfed task check` as the trainer's user; its rows, or why there are none."""
    command = [sys.executable, "-P", "-m", "p2pfed", "task", "check", "-c", str(config)]
    command += ["--json", "--limit", str(seconds)]
    environment = dict(os.environ)
    if as_user(reader):
        environment.pop("HOME", None)  # the libraries then ask for that user's own
    try:
        done = subprocess.run(  # type: ignore[call-overload]  # noqa: S603 - our own interpreter
            command,
            check=False,
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=20 * seconds,
            **as_user(reader),
        )
    except subprocess.TimeoutExpired:
        return f"it was not over after {20 * seconds:.0f} s"
    except OSError as error:
        why = f"{error.strerror} (may it read this installation?)"
        return f"it could not be started as {reader.name}: {why}"
    return _rows_in(done.stdout)


def _rows_in(output: bytes) -> list[dict[str, Any]] | str:
    try:
        answer = json.loads(output)
    except ValueError:
        return "it gave no answer"
    told = answer.get("data", {})
    if "rows" in told:
        return list(told["rows"])
    return " ".join(part for part in (told.get("title"), told.get("detail")) if part)


def task(rows: Sequence[Mapping[str, Any]] | str, name: str) -> Iterator[Finding]:
    """What the dry step of the task found; only its troubles, or that there are none."""
    if isinstance(rows, str):
        yield fail("task", f"{name}: {rows}", "see more: p2pfed task check -c FILE")
        return
    troubles = [row for row in rows if row["status"] in {"FAIL", "warn"}]
    for row in troubles:
        yield Finding(
            "task",
            row["status"],
            f"{name}, {row['check']}: {row['found']}",
            row["do"] or "see more: p2pfed task check -c FILE",
        )
    if not any(row["status"] == "FAIL" for row in troubles):
        yield ok("task", f"{name}: a dry step went well, the loss is finite")


# --- trainer -----------------------------------------------------------------------------------


def trainer(told: Mapping[str, Any] | None, problem: str, *, trains: bool, log: Path) -> Finding:
    """The trainer as the daemon sees it.

    Args:
        told: `trainer` of /v1/status; None without a daemon.
        problem: The last one, as far as it may be told.
        trains: Whether this node has a trainer at all.
        log: Where it prints.
    """
    if not trains:
        return ok("trainer", "none: train.enabled is false")
    if told is None:
        return ok("trainer", "it starts with the daemon")
    state, restarts = str(told["state"]), told["restarts"]
    look_at = f"read {log} as its user; then: p2pfed task check"
    if state == "paused":
        return warn("trainer", "training is paused", "p2pfed task resume")
    if state.startswith("waiting for"):  # one that comes by itself
        start = "start your loop, or the service: systemctl start p2pfed-trainer"
        return warn("trainer", state, start)
    problem = problem.replace("\n", "; ")
    story = f"{state}, {restarts} restarts{problem and f'; last problem: {problem}'}"
    if state != "ready" and (problem or restarts):
        return fail("trainer", story, look_at)
    if problem or restarts:
        return warn("trainer", story, look_at)
    return ok("trainer", state)


def noted(notes: Sequence[str]) -> Iterator[Finding]:
    """What the trainer noted of its own work; the newest of its notes.

    Args:
        notes: Of its private socket, oldest first.
    """
    if notes:
        yield warn("trainer", f"it notes: {notes[-1]}", "all of them: p2pfed task log")


def as_config_error(error: ConfigError) -> list[str]:
    """The mistakes of a configuration, one a line."""
    lines = [line for line in error.why.splitlines() if line.strip()]
    return lines or [error.what]
