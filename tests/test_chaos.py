"""Five real daemons are killed and frozen at random while they train; see scripts/chaos.

One run for all tests of this file; the last ones damage a copy of what it left, to see that the
judge of the disks can say no.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from left_on_disk import faults_on_disk

from p2pfed.identity.keys import NodeKey

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "chaos.py"
LIMIT = 30.0  # seconds until a node must be back; on a machine with nothing else to do: 10


class Done:
    """The finished run: its folder, its result, its output."""

    def __init__(self, folder: Path) -> None:
        self.folder, told = folder / "nodes", folder / "chaos.json"
        command = [sys.executable, str(SCRIPT), "--kills", "5", "--freezes", "2", "--seed", "205"]
        command += ["--most-gap", "1.5", "--most-frozen", "8", "--limit", str(LIMIT)]
        command += ["--json", str(told), "--folder", str(self.folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            try:
                self.output = process.communicate(timeout=220)[0].decode()
            finally:
                process.terminate()  # not SIGKILL: it has daemons to stop
        self.code = process.returncode
        self.result: dict[str, Any] = json.loads(told.read_text()) if told.exists() else {}

    def copy(self, folder: Path) -> list[SimpleNamespace]:
        shutil.copytree(self.folder, folder)
        return [
            SimpleNamespace(name=f.parent.name, folder=f.parent, key=NodeKey.load(f))
            for f in sorted(folder.glob("*/node.key"))
        ]

    def faults(self, nodes: list[SimpleNamespace]) -> list[str]:
        run, rounds, model = (self.result[key] for key in ("run", "rounds", "model"))
        return faults_on_disk(nodes, bytes.fromhex(run), rounds, model)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return Done(tmp_path_factory.mktemp("chaos"))


def change(node: SimpleNamespace, statement: str, file: str = "store.db") -> None:
    with contextlib.closing(sqlite3.connect(node.folder / file)) as db:
        assert db.execute(statement).rowcount == 1
        db.commit()


def test_after_five_kills_and_two_freezes_all_are_back_and_hold_one_model(done):
    assert done.code == 0, done.output
    assert done.output.splitlines()[-1].endswith("rounds: one model")
    events = done.result["events"]
    kills = [event["part"] for event in events if event["what"] == "kill"]
    assert len(kills) == 5
    assert set(kills) == {"network", "both", "trainer"}
    assert all(event["back"] is not None for event in events)
    assert all(event["seen"] for event in events if event["what"] == "freeze")
    assert done.result["rounds"] > 5


def test_a_delta_that_one_node_lost_is_found(done, tmp_path):
    nodes = done.copy(tmp_path / "nodes")
    assert done.faults(nodes) == []
    change(nodes[1], "DELETE FROM deltas WHERE fact = (SELECT fact FROM deltas LIMIT 1)")
    faults = done.faults(nodes)
    assert "not all hold the same deltas" in faults
    assert any(nodes[1].name in fault and "give the model" in fault for fault in faults)


def test_a_payload_that_was_changed_is_found(done, tmp_path):
    nodes = done.copy(tmp_path / "nodes")
    other = "CAST(SUBSTR(payload, 1, LENGTH(payload) - 1) || X'7F' AS BLOB)"
    last = "(SELECT MAX(fact) FROM deltas)"
    change(nodes[2], f"UPDATE deltas SET payload = {other} WHERE fact = {last}")
    assert any(nodes[2].name in f and "does not verify" in f for f in done.faults(nodes))


def test_a_record_of_a_ledger_that_was_changed_is_found(done, tmp_path):
    nodes = done.copy(tmp_path / "nodes")
    wipe = "UPDATE entries SET body = ZEROBLOB(LENGTH(body)) WHERE seq = 3"
    change(nodes[3], wipe, "ledger.db")
    assert any(nodes[3].name in f and "ledger does not verify" in f for f in done.faults(nodes))


def test_a_torn_database_is_found(done, tmp_path):
    nodes = done.copy(tmp_path / "nodes")
    store = nodes[0].folder / "store.db"
    store.write_bytes(store.read_bytes()[:-4096])
    assert any(fault.startswith(f"{nodes[0].name}: store.db:") for fault in done.faults(nodes))
