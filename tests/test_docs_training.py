"""The code of docs/training.md and imaging.md runs as it stands, the loop with real daemons."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from loop_daemon import has_trainer, loops_federation

from p2pfed.config import load_settings
from p2pfed.demo.federation import Daemon, wait_for
from p2pfed.demo.plan import run_constants
from p2pfed.privacy.ledger import Ledger
from p2pfed.training.contributions import PatientContributions
from p2pfed.training.local import evaluate, initial_vector, train_local
from p2pfed.training.task import load_task, task_id

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = [
    block
    for page in sorted((ROOT / "docs").glob("*.md"))
    for block in re.findall(
        r"^```(\w+)\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
]
PYTHON = {
    body.split("\n", 1)[0].removeprefix("# "): body for kind, body in BLOCKS if kind == "python"
}
[CSV] = [body for kind, body in BLOCKS if kind == "csv"]


def test_every_block_of_python_in_the_docs_is_run_by_a_test_of_this_file():
    assert set(PYTHON) == {"liver.py", "net.py", "train.py", "tumours.py"}


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text(PYTHON[name])


# --- the Task ----------------------------------------------------------------------------------


@pytest.fixture
def tumours(tmp_path, monkeypatch):
    write(tmp_path, "tumours.py")
    (tmp_path / "patients.csv").write_text(CSV)
    monkeypatch.syspath_prepend(tmp_path)
    yield load_task("tumours:Tumours")
    sys.modules.pop("tumours")


def test_the_task_trains_and_contributes_by_patient(tumours, tmp_path):
    data = tumours.data(tmp_path, {})
    everybody = {*data.train.patient_ids, *data.test.patient_ids}
    assert len(everybody) == data.train.num_patients + data.test.num_patients == 12
    first = initial_vector(tumours, seed=0)
    trained = train_local(
        tumours, data.train, first, steps=200, learning_rate=0.5, batch_size=4, seed=0
    )
    assert evaluate(tumours, trained.vector, data.train)["accuracy"] == 1.0
    assert set(evaluate(tumours, trained.vector, data.test)) == {"accuracy", "loss"}
    rows = PatientContributions(tumours, first, data.train)
    assert sum(len(chunk) for chunk in rows.chunks()) == data.train.num_patients
    assert len(task_id(tumours)) == 32


@pytest.mark.slow
def test_the_task_on_images_trains_is_judged_and_contributes_by_patient(tmp_path, monkeypatch):
    write(tmp_path, "liver.py")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        task = load_task("liver:Liver")
    finally:
        sys.modules.pop("liver", None)
    data = task.data(None, {"phantoms": 4})
    first = initial_vector(task, seed=0)
    trained = train_local(
        task, data.train, first, steps=1, learning_rate=1e-3, batch_size=1, seed=0
    )
    assert (trained.vector != first).any()
    values = evaluate(task, trained.vector, data.test)
    assert set(values) == {"dice", "dice_liver", "dice_tumour"}
    rows = PatientContributions(task, first, data.train.subset([0]))
    assert sum(len(chunk) for chunk in rows.chunks()) == 1


# --- the loop ----------------------------------------------------------------------------------


ROUNDS = 8


def program(folder: Path, daemon: Daemon) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(folder / "train.py")],
        env={**os.environ, "P2PFED_CONFIG": str(daemon.folder / "p2pfed.toml")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_the_loop_trains_with_real_daemons_to_the_end_of_the_run(tmp_path, monkeypatch):
    write(tmp_path, "net.py", "train.py")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    federation = loops_federation(tmp_path / "nodes", Anna=300, Ben=269)
    constants = run_constants("none", rounds=ROUNDS, epsilon=Fraction(0))
    constants |= {"min_live": 0.9, "deadline_s": 60.0}  # nobody is late for a run of seconds
    run = federation.make_run("loops", constants, seed=0)
    federation.write_bootstrap()
    daemons = list(federation.daemons.values())
    with federation.running():
        roster = federation.stewards.admit([d.member for d in daemons])
        for daemon in daemons:
            federation.start(daemon)
        loops = [program(tmp_path, daemon) for daemon in daemons]
        try:
            wait_for(lambda: all(map(has_trainer, daemons)), 120, "both loops join")
            for daemon in daemons:
                federation.enrol(daemon, roster)
            said = [loop.communicate(timeout=120)[0] for loop in loops]
        finally:
            for loop in loops:
                loop.kill()
                loop.communicate()
        wait_for(
            lambda: all(d.status()["run"]["round"] == ROUNDS for d in daemons), 30, "the run's end"
        )
        hashes = {d.status()["run"]["model_hash"] for d in daemons}
        own = [d.status()["run"]["own_deltas"] for d in daemons]
    assert [loop.returncode for loop in loops] == [0, 0], said
    assert said[0] == said[1]  # one common model, judged on the same cases
    assert re.fullmatch(r"the common model is right in (8|9)\d\.\d% of 569 cases\n", said[0])
    assert own == [ROUNDS, ROUNDS]
    assert len(hashes) == 1
    settings = load_settings(daemons[0].folder / "p2pfed.toml")
    with Ledger.open(settings.ledger_path) as ledger:
        assert [e.kind for e in ledger.entries()].count("output") == ROUNDS
        assert {e.detail["mechanism"] for e in ledger.entries() if e.kind == "debit"} == {"none"}
    assert run.rounds == ROUNDS
