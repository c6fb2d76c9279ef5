"""The JSON of the commands that need no daemon but work: on tasks, models, the ledger, the machine.

The other half of test_cli_schemas, which says what a pin is.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import admin_fakes as fakes
import pytest
from imaging_files import affine_of, write_nifti
from json_pins import asking, pinned, read_line
from model_files import write_common, write_config
from sound_node import sound_node
from test_cli_model import picture

from p2pfed.audit import enumeration
from p2pfed.audit.findings import Finding
from p2pfed.cli.text import envelope
from p2pfed.tasks.phantoms import phantom
from p2pfed.training.private_socket import serve_private_socket
from p2pfed.training.record import pictures_as_json
from p2pfed.training.task import load_task

HERE = Path(__file__).resolve().parent


@pytest.fixture
def answer(capfd):
    """Runs a command with --json, and gives its envelope."""
    return asking(capfd)


@pytest.fixture
def folder(monkeypatch):
    with fakes.empty_home(monkeypatch) as path:
        monkeypatch.setenv("P2PFED_HOME", str(path / "state"))
        monkeypatch.setenv("PYTHONPATH", f"{HERE.parent}{os.pathsep}{HERE}")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        yield path


@pytest.fixture
def node(folder):
    with sound_node() as made:
        yield made


# --- the task and its models -------------------------------------------------------------------


@pytest.mark.slow
def test_a_task_that_is_tried(folder, answer):
    tried = "task check --task broken_tasks:Sound --data . --device cpu"
    pinned("task-check", answer(tried))


@pytest.mark.slow
def test_what_is_done_with_a_model_at_home(folder, answer):
    write_config(folder, "breast-cancer", "site = 0\nsites = 5")
    write_common(folder / "m", load_task("breast-cancer"))
    pinned("model-evaluate", answer("model evaluate --from m"))
    pinned("model-tune", answer("model tune --from m --steps 5"))
    pinned("model-export", answer("model export --from m --out given"))


@pytest.mark.slow
def test_pictures_of_the_running_trainer(folder, answer):
    write_config(folder, "hippocampus", "phantoms = 8")
    shown = {"round": 4, "pictures": pictures_as_json([picture("a"), picture("b")])}
    with serve_private_socket(folder / "trainer.sock", {"/v1/pictures": lambda: shown}):
        pinned("model-pictures", answer("model pictures --out pictures"))


@pytest.mark.slow
def test_new_cases(folder, answer):
    write_config(folder, "hippocampus", "phantoms = 8")
    write_common(folder / "m", load_task("hippocampus", {"phantoms": 8}))
    write_nifti(folder / "one.nii.gz", phantom(0)[0][0].voxels, affine_of("LPS", (1.0, 1.0, 1.0)))
    pinned("predict", answer("predict --model m --in one.nii.gz --out masks"))


# --- runs --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_from_draft_to_signature(folder, answer):
    answer("steward key new a.key")
    answer("steward found --network n --steward a=a.key --threshold 1 --out roster")
    answer("steward sign --key a.key roster")
    draft = "run create --roster roster --task breast-cancer --out run --genesis first"
    pinned("run-create", answer(draft))
    pinned("run-sign", answer("run sign run --key a.key --roster roster"))
    pinned("run-show", answer("run show run --roster roster"))


# --- privacy -----------------------------------------------------------------------------------


def test_a_ledger_in_a_file(node, answer):
    told = answer("privacy ledger", node.ledger)
    pinned("privacy-ledger", told)


def test_an_option_without_protection_has_no_epsilon_in_a_plan(answer):
    told = answer("privacy plan --patients 300 --parameters 1000 --epsilon 8 --rounds 5")
    pinned("privacy-plan", told)
    by_name = {option["mechanism"]: option for option in told["data"]["options"]}
    assert (by_name["none"]["epsilon"], by_name["none"]["epsilon_once"]) == (None, None)
    assert 0 < by_name["gaussian"]["epsilon"] <= 8


@pytest.mark.parametrize("passed", [True, False])
def test_an_audit_is_ok_where_all_its_claims_held(answer, monkeypatch, passed):
    found = Finding("law", "it must hold", "it was measured", passed)
    monkeypatch.setattr(enumeration, "findings", lambda quick: [found])
    pinned("privacy-audit", answer("privacy audit --only law", code=0 if passed else 1))


# --- the machine -------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_the_doctor_finds(node, answer):
    look = f"doctor -c {node.config} --offline --no-task"
    pinned("doctor", answer(look))
    node.key.chmod(0o644)
    pinned("doctor", answer(look, code=9))
    pinned("doctor", answer(f"{look} --fix --yes"))


@pytest.mark.slow
def test_what_goes_into_a_report_of_a_fault(node, answer):
    pinned("bugreport", answer(f"bugreport -c {node.config} -o", node.folder / "r.zip"))


# --- what any reader of JSON takes -------------------------------------------------------------


def test_a_number_that_is_not_finite_is_null_and_whatever_is_not_ascii_is_escaped():
    told = {"loss": math.nan, "all": [math.inf, (1.5, -math.inf)], "name": "Charité \x9b2J\u2028"}
    data = read_line(envelope("x", told))["data"]
    assert data == {"loss": None, "all": [None, [1.5, None]], "name": told["name"]}
