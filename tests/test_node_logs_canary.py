"""A daemon and its trainer whose every private fact is a mark: its log and metrics have none."""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path

import httpx
import pytest
from canary_task import MARKED
from prometheus_client.parser import text_string_to_metric_families as parsed
from test_privacy_canary import found

from p2pfed.demo.federation import Federation, _free_port, wait_for
from p2pfed.demo.plan import Cast, Hospital, run_constants

HERE = Path(__file__).resolve().parent
ROUNDS = 60


@pytest.fixture
def data(tmp_path):
    """The hospital's data: its folder and its files are named after a patient."""
    folder = tmp_path / f"{MARKED.patient(1)} data"
    folder.mkdir()
    (folder / f"{MARKED.patient(2)}.nii.gz").write_bytes(b"")
    return folder


@pytest.fixture
def federation(tmp_path, data, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{HERE.parent}{os.pathsep}{HERE}")
    monkeypatch.setenv("P2PFED_LOG__LEVEL", "debug")
    hospitals = (Hospital("Gate", 0), Hospital("North", 40, {"world": "small"}))
    cast = Cast("canary_task:Canary", data, hospitals, "", "", "")
    made = Federation(tmp_path / "nodes", cast, epsilon="10")
    constants = run_constants("svt", rounds=ROUNDS, epsilon=Fraction(10))
    made.make_run("canary", constants | {"deadline_s": 1.0, "min_round_interval_s": 0.2}, seed=0)
    made.write_bootstrap()
    listen = f"127.0.0.1:{_free_port()}"
    with (made.daemons["North"].folder / "p2pfed.toml").open("a") as file:
        file.write(f'[metrics]\nlisten = "{listen}"\n')
    made.metrics = f"http://{listen}/metrics"
    with made.running():
        made.start_all()
        yield made


def round_of(daemon):
    status = daemon.status()
    return status["run"]["round"] if status and status["run"] else -1


def wait_for_rounds(daemon, more):
    goal = round_of(daemon) + more
    wait_for(lambda: round_of(daemon) >= goal, 60, f"round {goal}")


@pytest.mark.slow
def test_no_log_or_metric_holds_a_value_a_file_name_or_a_patient_at_level_debug(federation, data):
    north = federation.daemons["North"]
    wait_for(lambda: round_of(north) >= 1, 60, "the first round")
    wait_for_rounds(north, 2)
    for mood in ("raise", "raise ConfigError", "no metrics"):
        (data / "mood").write_text(mood)
        wait_for_rounds(north, 2)
    (data / "mood").write_text("no data")
    north.client.post("/v1/task", {"paused": True})
    north.client.post("/v1/task", {"paused": False})
    wait_for(lambda: bool(north.status()["trainer"]["restarts"]), 60, "a trainer that cannot start")
    north.client.download("/v1/metrics", data / "metrics")
    socket = (data / "metrics").read_bytes()
    port = httpx.get(federation.metrics).content
    assert found(socket, port) == set()
    names = [{family.name for family in parsed(text.decode())} for text in (socket, port)]
    assert {"p2pfed_round", "p2pfed_events", "process_resident_memory_bytes"} <= names[0]
    assert names[0] == names[1]
    federation.stop_all()
    for daemon in federation.daemons.values():
        log = (daemon.folder / "daemon.log").read_bytes()
        records = [json.loads(line) for line in log.splitlines()]
        assert {record["level"] for record in records} >= {"debug", "info"}
        assert found(log) == set()
        assert str(data).encode() not in log
    told = (north.sockets / "trainer.log").read_bytes()
    assert {"name", "value"} <= found(told), "the task said nothing: nothing was shown"
