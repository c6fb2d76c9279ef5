"""`p2pfed run create --option`: a task that needs options, with the real description of it."""

from __future__ import annotations

import json
import shutil

import pytest
from imaging_files import write_bundle

from p2pfed.cli.main import main
from p2pfed.identity.run import Run
from p2pfed.identity.signing import SignedDocument
from p2pfed.training.task import load_task, task_id


@pytest.fixture
def desk(tmp_path, monkeypatch, capsys):
    """Runs a command in a folder with the roster of one steward."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main([*map(str, arguments)])
        told = capsys.readouterr()
        return code, told.out, told.err

    made = run("steward", "key", "new", "a.key", "--json")
    key = json.loads(made[1])["data"]["public_key"]
    found = ("steward", "found", "--network", "n", f"--steward=a={key}", "--threshold", "1")
    assert run(*found, "--expires", "30d", "--out", "roster.json")[0] == 0
    assert run("steward", "sign", "roster.json", "--key", "a.key")[0] == 0
    return run


def create(desk, task, *more):
    files = ("--roster", "roster.json", "--out", "run.json", "--genesis", "first.safetensors")
    return desk("run", "create", *files, "--task", task, *more)


@pytest.mark.slow
def test_a_run_of_a_bundle_is_made_and_the_place_of_its_folder_is_no_part_of_it(desk, tmp_path):
    bundle = write_bundle(tmp_path / "at_st_anna")
    code, out, err = create(desk, "bundle", "--option", f"bundle={bundle}", "--name", "livers")
    assert (code, err) == (0, "")
    assert "run livers" in out
    document = SignedDocument.parse((tmp_path / "run.json").read_bytes())
    run = Run.decode(document.payload)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(bundle, elsewhere)
    assert run.task == "bundle"
    assert run.task_id == task_id(load_task("bundle", {"bundle": str(elsewhere)}))
    assert b"at_st_anna" not in document.payload
    assert b"at_st_anna" not in (tmp_path / "first.safetensors").read_bytes()


@pytest.mark.slow
def test_what_an_option_lacks_or_names_wrongly_is_told(desk, tmp_path):
    code, _, err = create(desk, "bundle")
    assert code != 0
    assert "train.options.bundle is missing" in err
    code, _, err = create(desk, "loop:net:build", "--option", "bundle=x")
    assert "takes no options" in err
    assert not (tmp_path / "run.json").exists()


def test_an_option_that_is_no_pair_is_told_before_the_task_is_loaded(desk):
    code, _, err = create(desk, "no:Task", "--option", "bundle")
    assert code == 2
    assert "--option 'bundle'" in err
