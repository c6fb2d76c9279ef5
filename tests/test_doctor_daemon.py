"""The doctor, its endpoint and the bug report beside real daemons that train, and after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from fractions import Fraction
from pathlib import Path

import pytest

from p2pfed.demo.federation import Federation, wait_for
from p2pfed.demo.plan import Cast, Hospital, run_constants

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """A node without data and one hospital, which have met."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{HERE.parent}{os.pathsep}{HERE}"
    try:
        cast = Cast(
            "broken_tasks:Sound", None, (Hospital("Gate", 0), Hospital("North", 6)), "", "", ""
        )
        folder = tmp_path_factory.mktemp("doctor")
        federation = Federation(folder / "nodes", cast, epsilon="8")
        with federation.running():
            federation.make_run("r", run_constants("svt", rounds=50, epsilon=Fraction(8)), seed=0)
            federation.write_bootstrap()
            federation.start_all()
            north = federation.daemons["North"]
            wait_for(lambda: _connected(north), 60, "the two have met")
            yield federation
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _connected(daemon) -> bool:
    status = daemon.status()
    ready = status is not None and status["trainer"]["state"] == "ready"
    return ready and any(peer["path"] == "direct" for peer in daemon.client.get("/v1/peers"))


def cli(daemon, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "p2pfed", "-c", str(daemon.folder / "p2pfed.toml"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def rows(daemon, *flags: str) -> tuple[int, dict[str, dict[str, str]]]:
    done = cli(daemon, "doctor", "--json", *flags)
    assert done.stdout, done.stderr
    order = ("ok", "warn", "FAIL")
    found = json.loads(done.stdout)["data"]["checks"]
    found.sort(key=lambda row: order.index(row["status"]))
    return done.returncode, {row["check"]: row for row in found}


def test_a_node_tells_how_it_is_reached(net):
    north = net.daemons["North"].client.get("/v1/reachability")
    gate = net.daemons["Gate"].client.get("/v1/reachability")
    assert sum(north["connections"].values()) == sum(gate["connections"].values()) == 1
    assert {north["visited"], gate["visited"]} == {"near", ""}  # one has dialled the other
    inbound = north if north["visited"] else gate
    assert inbound["connections"]["direct_in"] == 1
    assert not inbound["relay_wanted"]
    assert inbound["mode"] == "auto"
    assert inbound["addresses"]


def test_beside_a_daemon_that_trains_nothing_fails(net):
    for name, daemon in net.daemons.items():
        code, found = rows(daemon)
        failed = {check: row for check, row in found.items() if row["status"] == "FAIL"}
        assert (code, failed) == (0, {}), name
        assert f"process {daemon.process.pid}" in found["daemon"]["found"]
        assert f"held by the daemon (process {daemon.process.pid})" in found["listen"]["found"]
        assert "lists this node" in found["roster"]["found"]
        assert found["trainer"]["status"] == "ok"
    assert "the trainer has it loaded" in found["task"]["found"]
    assert "the trainer computes on cpu" in found["gpu"]["found"]
    assert "the trainer has it open" in found["ledger"]["found"]


def test_the_report_of_a_running_node_holds_its_answers_and_no_path_of_its_ledger(net, tmp_path):
    out = tmp_path / "r.zip"
    daemon = net.daemons["North"]
    done = cli(daemon, "bugreport", "-o", str(out), "--anonymous")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(out) as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    told = json.loads(files["daemon.json"])
    assert not [endpoint for endpoint, answer in told.items() if "error" in answer]
    assert len(json.loads(files["events.json"])) > 2
    whole = "\n".join(files.values())
    assert str(daemon.folder / "ledger.db") not in whole
    assert "North" not in whole and daemon.key.peer_id not in whole


def test_what_a_killed_daemon_leaves_is_found_and_removed(net):
    daemon = net.daemons["North"]
    net.kill(daemon)
    _, found = rows(daemon, "--no-task")
    assert found["daemon"]["found"] == "does not run"
    assert found["sockets"]["status"] == "warn"
    assert found["sockets"]["fix"].startswith("rm ")
    done = cli(daemon, "doctor", "--no-task", "--fix", "--yes")
    assert done.returncode == 0, done.stdout
    assert "done: rm " in done.stdout
    assert rows(daemon, "--no-task")[1]["sockets"]["status"] == "ok"
    net.start(daemon)
    assert rows(daemon)[1]["daemon"]["found"].startswith("runs")
