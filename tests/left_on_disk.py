"""What stopped daemons have left on their disks, judged without them.

Invariants that are looked at: both databases are whole; every stored delta verifies (signature and
payload) and all nodes hold the same ones; no origin signed two for one round, and no proof says so;
every ledger verifies, and its outputs were debited and its releases drawn; an independent fold of
what each node holds gives the model that the daemons said.
"""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from reference_fold import reference_hash

from p2pfed.demo.federation import Daemon
from p2pfed.errors import P2PFedError
from p2pfed.node.store import Store
from p2pfed.privacy.ledger import Ledger
from p2pfed.wire.delta import Delta

__all__ = ["faults_on_disk"]

Held = set[tuple[int, str, bytes]]  # round, origin and name of each delta


def faults_on_disk(daemons: list[Daemon], run_id: bytes, rounds: int, model: str) -> list[str]:
    """What is wrong with what stopped daemons have left on their disks; a sentence each.

    Args:
        daemons: All of one run, each of which has released something.
        run_id: The run.
        rounds: How many rounds the last model has in it.
        model: The hash of that model, as the daemons said.
    """
    wrong, deltas = [], {}
    for daemon in daemons:
        torn = [f"{daemon.name}: {fault}" for fault in _torn(daemon.folder)]
        wrong += torn
        if torn:
            continue
        deltas[daemon.name], told = _verified(daemon, run_id)
        wrong += told
        wrong += _ledger(daemon, {d for d in deltas[daemon.name] if d[1] == daemon.key.peer_id})
        if (found := reference_hash(daemon.folder, rounds)) != model:
            wrong.append(f"{daemon.name}: its deltas give the model {found}, it said {model}")
    if len({frozenset(held) for held in deltas.values()}) != 1:
        wrong.append("not all hold the same deltas")
    twice = Counter((r, o) for r, o, _ in set().union(*deltas.values()))
    wrong += [f"two deltas of {o} for round {r}" for (r, o), count in twice.items() if count > 1]
    return wrong


def _torn(folder: Path) -> Iterator[str]:
    """What SQLite finds wrong with its files."""
    for name in ("store.db", "ledger.db"):
        try:
            with contextlib.closing(sqlite3.connect(folder / name)) as db:
                [(said,)] = db.execute("PRAGMA integrity_check").fetchmany(1)
        except sqlite3.DatabaseError as error:
            said = str(error)
        if said != "ok":
            yield f"{name}: {said}"


def _verified(daemon: Daemon, run_id: bytes) -> tuple[Held, list[str]]:
    """All deltas that a node has stored, with round and origin, and what is wrong with them."""
    wrong, held = [], set()
    with contextlib.closing(Store(daemon.folder / "store.db")) as store:
        [(rows,)] = store._read("SELECT COUNT(*) FROM deltas")
        try:
            for signed in store.headers(run_id):
                delta = Delta.decode(store.delta(signed.fact).encode())
                held.add((delta.header.round, delta.header.origin, delta.fact))
        except P2PFedError as error:
            wrong.append(f"{daemon.name}: a stored delta does not verify: {error}")
        if len(held) != rows:
            wrong.append(f"{daemon.name}: {rows} deltas are stored, {len(held)} verify")
        wrong += [f"{daemon.name} holds a proof of equivocation" for _ in store.proofs(run_id)]
    return held, wrong


def _ledger(daemon: Daemon, released: Held) -> list[str]:
    file = daemon.folder / "ledger.db"
    command = [sys.executable, "-m", "p2pfed", "privacy", "ledger", str(file), "--json"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    if told.returncode:
        return [f"{daemon.name}: the ledger does not verify: {told.stderr.strip()}"]
    with Ledger.open(file) as ledger:
        kinds = Counter(entry.kind for entry in ledger.entries())
    if not kinds["debit"] >= kinds["output"] >= len(released) > 0:
        counts = f"{kinds['debit']} debits, {kinds['output']} outputs, {len(released)} released"
        return [f"{daemon.name}: {counts}"]
    return []
