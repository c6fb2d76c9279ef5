"""model and predict: what they ask of daemon and private plane, print, and leave behind."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from imaging_files import affine_of, series, write_nifti
from model_files import write_common, write_config

from p2pfed.cli import model as cli_model
from p2pfed.cli import predict as cli_predict
from p2pfed.cli import private_plane
from p2pfed.cli.main import main
from p2pfed.errors import PolicyError, TrainerError
from p2pfed.tasks.phantoms import phantom
from p2pfed.training.answering import _told
from p2pfed.training.pictures import Picture
from p2pfed.training.private_socket import serve_private_socket
from p2pfed.training.record import pictures_as_json
from p2pfed.training.task import load_task

_spec = importlib.util.spec_from_file_location(
    "admin_fakes", Path(__file__).with_name("admin_fakes.py")
)
fakes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fakes)

ROOT = Path(__file__).resolve().parent.parent
TABULAR = ("breast-cancer", "site = 0\nsites = 5")
IMAGING = ("hippocampus", "phantoms = 8")
WHERE = ["--config", "p2pfed.toml"]

# A task whose metrics do what an option says.
ODD_TASK = """
import os, signal, sys
from p2pfed.tasks.breast_cancer import BreastCancer

class Odd(BreastCancer):
    name = "odd"
    def metrics(self, model, patients):
        print('{"data": "from the task"}')
        match self.options["how"]:
            case "exit": sys.exit(0)
            case "die": os.kill(os.getpid(), signal.SIGKILL)
        return {"loss": float("nan")}
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    with fakes.empty_home(monkeypatch) as path:
        monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{path}")
        yield path


@pytest.fixture
def hospital(folder):
    """A configuration of the tabular task, and the common model as its daemon would give it."""
    write_config(folder, *TABULAR)
    write_common(folder / "common.safetensors", load_task(TABULAR[0]))
    return folder


@pytest.fixture
def daemon(hospital):
    backend = fakes.FakeBackend()
    backend.model_bytes = (hospital / "common.safetensors").read_bytes()
    with fakes.daemon(backend, hospital / "admin.sock"):
        yield backend


class Asked:
    """Stands for the private plane: remembers what it was asked for, and gives `answer`."""

    def __init__(self, answer: dict) -> None:
        self.answer, self.calls, self.models = answer, [], []

    def __call__(self, verb: str, flags: list[str]) -> dict:
        self.calls.append((verb, flags))
        file = Path(flags[flags.index("--model") + 1])
        self.models.append(file.read_bytes() if file.exists() else None)
        return self.answer


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def picture(case: str = "case_1") -> Picture:
    label = np.zeros((6, 7, 8), np.uint8)
    label[2:4, 2:5, 2:5] = 1
    return Picture(case, 0.75, label * 99, label, label, (1.0, 1.0, 1.0))


# --- fetch -------------------------------------------------------------------------------------


def test_fetch_writes_the_daemons_model_as_it_comes_and_says_what_it_is(capsys, daemon, folder):
    code, out, err = run(capsys, "model", "fetch", "-o", "m.safetensors")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "run heart-1 after 3 of 60 rounds: m.safetensors",
        "31 parameters, hash 3f3f3f3f…3f3f",
    ]
    assert (folder / "m.safetensors").read_bytes() == daemon.model_bytes
    assert stat.S_IMODE((folder / "m.safetensors").stat().st_mode) == 0o600


def test_fetch_for_programs_gives_the_facts(capsys, daemon):
    _, out, _ = run(capsys, "model", "fetch", "-o", "m", "--json")
    data = json.loads(out)["data"]
    assert data["file"] == "m"
    assert data["deltas"] == {"Oslo": 3, "Kyoto": 2}


def test_fetch_overwrites_nothing(capsys, daemon, folder):
    (folder / "m").write_text("mine")
    code, _, err = run(capsys, "model", "fetch", "-o", "m")
    assert (code, err.splitlines()[0]) == (2, "m exists already")
    assert (folder / "m").read_text() == "mine"


def test_fetch_from_a_node_without_a_run_gives_the_daemons_words(capsys, daemon, folder):
    daemon.model_bytes = None
    code, _, err = run(capsys, "model", "fetch", "-o", "m")
    assert code == 5
    assert "takes part in no run" in err
    assert not (folder / "m").exists()


def test_fetch_without_a_daemon_says_so(capsys, hospital):
    code, _, err = run(capsys, "model", "fetch", "-o", "m")
    assert code == 3
    assert len(err.splitlines()) == 3


def test_fetch_tells_what_is_no_model(capsys, daemon):
    daemon.model_bytes = b"something else"
    code, _, err = run(capsys, "model", "fetch", "-o", "m")
    assert code == 8
    assert "not the model file" in err


# --- which model goes to the private plane -----------------------------------------------------


def test_the_daemons_model_is_handed_over_in_a_file_that_is_gone_afterwards(
    capsys, daemon, monkeypatch
):
    asked = Asked(
        {"model": "common model", "folder": "out", "files": [], "mine": False, "left_out": []}
    )
    monkeypatch.setattr(cli_model, "ask", asked)
    assert run(capsys, "model", "export", "--out", "out", "--onnx")[0] == 0
    [(verb, flags)] = asked.calls
    handed = flags[flags.index("--model") + 1]
    assert verb == "export"
    assert flags == [*WHERE, "--model", handed, "--out", "out", "--onnx"]
    assert asked.models == [daemon.model_bytes]
    assert not Path(handed).parent.exists()


@pytest.mark.parametrize(
    ("choice", "flags"),
    [(["--from", "some.file"], ["--model", "some.file"]), (["--tuned"], ["--model", "tuned"])],
)
def test_a_file_or_the_tuned_model_needs_no_daemon(capsys, hospital, monkeypatch, choice, flags):
    asked = Asked({"model": "m", "monitor": "loss", "larger_is_better": False, "rows": []})
    monkeypatch.setattr(cli_model, "ask", asked)
    assert run(capsys, "model", "evaluate", *choice, "--against-alone")[0] == 0
    assert asked.calls == [("evaluate", [*WHERE, *flags, "--against-alone"])]


def test_without_a_daemon_or_a_file_it_is_said_that_a_file_would_do(capsys, hospital):
    code, _, err = run(capsys, "model", "evaluate")
    assert code == 3
    assert "or name a file of p2pfed model fetch" in err


def test_without_a_configuration_it_is_said_what_is_missing(capsys):
    code, _, err = run(capsys, "model", "evaluate", "--from", "m")
    assert code == 2
    assert "cannot tell which task" in err.splitlines()[0]


def test_a_task_can_be_named_instead(capsys, monkeypatch):
    asked = Asked({"model": "m", "folder": "o", "files": [], "mine": True, "left_out": []})
    monkeypatch.setattr(cli_model, "ask", asked)
    code, out, _ = run(
        capsys, "model", "export", "--out", "o", "--from", "m", "--task", "t", "--mine"
    )
    assert code == 0
    assert asked.calls == [("export", ["--task", "t", "--model", "m", "--out", "o", "--mine"])]
    assert "must not be given away" in out


def test_an_output_that_exists_is_refused_before_anything_is_asked(capsys, hospital, monkeypatch):
    asked = Asked({})
    monkeypatch.setattr(cli_model, "ask", asked)
    (hospital / "out").mkdir()
    for action in ("export", "pictures"):
        code, _, err = run(capsys, "model", action, "--out", "out")
        assert (code, err.splitlines()[0]) == (2, "out exists already")
    assert asked.calls == []


@pytest.mark.parametrize("steps", ["0", "-3", "many"])
def test_tuning_takes_a_positive_number_of_steps(capsys, hospital, steps):
    code, _, err = run(capsys, "model", "tune", "--from", "m", "--steps", steps)
    assert code == 2
    assert "--steps" in err


# --- the private plane's answers ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("no luck\nat all"), "the task failed: ValueError: no luck"),
        (MemoryError(), "memory ran out"),
        (PolicyError("refused", "so", "do"), "refused"),
    ],
)
def test_what_a_task_raises_becomes_an_answer_of_three_lines(error, told):
    def failing():
        raise error

    answer, code = _told(failing)
    assert code == (7 if told == "refused" else 1)
    assert answer["error"]["exit_code"] == code
    assert answer["error"]["what"] == told
    assert all("\n" not in answer["error"][key] for key in ("what", "why", "do"))


@pytest.mark.slow
def test_a_process_that_says_nothing_is_an_error():
    with pytest.raises(TrainerError, match="without an answer, with exit code 2"):
        private_plane.ask("no-such-verb", [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "told"),
    [
        ("exit", 1, "the task failed: SystemExit: 0"),
        ("die", 1, "ended without an answer, by SIGKILL"),
    ],
)
def test_a_task_that_fails_is_told_in_three_lines(capfd, hospital, how, code, told):
    (hospital / "odd_task.py").write_text(ODD_TASK)
    write_config(hospital, "odd_task:Odd", f'{TABULAR[1]}\nhow = "{how}"')
    sys.path.insert(0, str(hospital))
    try:
        write_common(hospital / "m", load_task("odd_task:Odd", {"how": how}))
    finally:
        sys.path.remove(str(hospital))
        sys.modules.pop("odd_task", None)
    assert main(["model", "evaluate", "--from", "m"]) == code
    seen = capfd.readouterr()
    assert seen.out == ""
    assert told in seen.err
    assert "Traceback" not in seen.err
    assert len(seen.err[seen.err.index(told[:9]) :].splitlines()) <= 3


@pytest.mark.slow
def test_what_a_task_prints_is_not_taken_for_the_answer_and_nan_is_no_number(capfd, hospital):
    (hospital / "odd_task.py").write_text(ODD_TASK)
    write_config(hospital, "odd_task:Odd", f'{TABULAR[1]}\nhow = "print"')
    sys.path.insert(0, str(hospital))
    try:
        write_common(hospital / "m", load_task("odd_task:Odd", {"how": "print"}))
    finally:
        sys.path.remove(str(hospital))
        sys.modules.pop("odd_task", None)
    assert main(["model", "evaluate", "--from", "m", "--json"]) == 0
    seen = capfd.readouterr()
    rows = json.loads(seen.out)["data"]["rows"]
    assert [row["metrics"] for row in rows] == [{"loss": None}] * 2
    assert "from the task" in seen.err


# --- evaluate, tune, export for real -----------------------------------------------------------


@pytest.mark.slow
def test_the_common_model_is_judged_against_none_and_against_training_alone(capfd, daemon):
    assert main(["model", "evaluate", "--against-alone"]) == 0
    head, columns, *rows = capfd.readouterr().out.splitlines()
    assert "after 3 of 60 rounds" in head
    assert columns.split()[:3] == ["model", "loss", "↓"]
    assert [row.split("  ")[0] for row in rows] == ["common", "first, untrained", "alone, 60 steps"]


@pytest.mark.slow
def test_a_tuned_model_is_kept_at_home_and_not_exported(capfd, daemon, hospital):
    assert main(["model", "tune", "--steps", "40", "--json"]) == 0
    data = json.loads(capfd.readouterr().out)["data"]
    common, tuned = (row["metrics"]["loss"] for row in data["rows"])
    assert tuned < common
    kept = Path(data["file"])
    assert kept == hospital / "trainer" / f"tuned-{'01' * 16}.safetensors"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700

    assert main(["model", "evaluate", "--tuned", "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)["data"]["rows"]
    assert rows[0]["model"] == "tuned"
    assert rows[0]["metrics"]["loss"] == pytest.approx(tuned)

    assert main(["model", "export", "--out", "mine", "--from", str(kept)]) == 2
    assert "function of this hospital's patients" in capfd.readouterr().err
    assert not (hospital / "mine").exists()


@pytest.mark.slow
def test_a_model_of_another_task_is_refused_by_name(capfd, hospital):
    write_common(hospital / "other", load_task("heart-disease"))
    assert main(["model", "evaluate", "--from", "other"]) == 2
    assert "other is a model of the task 'heart-disease'" in capfd.readouterr().err


# --- pictures ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_pictures_come_from_the_running_trainer_and_are_the_hospitals_own(capsys, hospital):
    shown = {"round": 4, "pictures": pictures_as_json([picture("a"), picture("b\x1b[2J")])}
    with serve_private_socket(hospital / "trainer.sock", {"/v1/pictures": lambda: shown}):
        code, out, err = run(capsys, "model", "pictures", "--out", "pics")
    assert (code, err) == (0, "")
    assert "before round 4" in out
    assert "keep them here" in out
    assert "\x1b" not in out
    assert stat.S_IMODE((hospital / "pics").stat().st_mode) == 0o700
    assert sorted(p.name for p in (hospital / "pics").iterdir()) == [
        "best.png",
        "median.png",
        "sheet.png",
        "worst.png",
    ]


@pytest.mark.parametrize("shown", [{}, {"round": 4, "pictures": {}}, {"problem": "ValueError: x"}])
def test_where_the_trainer_shows_none_they_are_computed(
    capsys, daemon, hospital, monkeypatch, shown
):
    made = {"model": "m", "monitor": "dice", "pictures": pictures_as_json([picture()])}
    asked = Asked(made)
    monkeypatch.setattr(cli_model, "ask", asked)
    monkeypatch.setattr("p2pfed.report.three_planes.draw_pictures", lambda *_, **__: [])
    with serve_private_socket(hospital / "trainer.sock", {"/v1/pictures": lambda: shown}):
        assert run(capsys, "model", "pictures", "--out", "pics")[0] == 0
    assert [verb for verb, _ in asked.calls] == ["pictures"]


# --- predict -----------------------------------------------------------------------------------


def test_predict_takes_the_common_model_unless_it_is_told_another(capsys, daemon, monkeypatch):
    asked = Asked({"model": "m", "files": ["out/a.nii.gz"]})
    monkeypatch.setattr(cli_predict, "ask", asked)
    for choice, last in (([], None), (["--model", "tuned"], "tuned"), (["--model", "f"], "f")):
        code, out, _ = run(capsys, "predict", *choice, "--in", "a", "--in", "b", "--out", "out")
        assert (code, out) == (0, "1 file: out\n")
        verb, flags = asked.calls[-1]
        assert verb == "predict"
        assert flags[:8] == [*WHERE, "--out", "out", "--in", "a", "--in", "b"]
        assert last is None or flags[-1] == last
    assert asked.models == [daemon.model_bytes, None, None]


@pytest.mark.slow
def test_new_images_become_masks_on_their_own_grid(capfd, folder):
    write_config(folder, *IMAGING)
    write_common(folder / "m", load_task(IMAGING[0], {"phantoms": 8}))
    first, second, third = (phantom(n)[0][0].voxels for n in range(3))
    turned = affine_of("LPS", (1.0, 1.0, 1.0))
    write_nifti(folder / "one.nii.gz", first, turned)
    write_nifti(folder / "many" / "two.nii.gz", second)
    series(folder / "scan", third.clip(0).astype(np.uint16))
    inputs = ["--in", "one.nii.gz", "--in", "many", "--in", "scan"]
    assert main(["predict", "--model", "m", *inputs, "--out", "out"]) == 0
    assert "case 1 of 1" in capfd.readouterr().err
    assert sorted(p.name for p in (folder / "out").iterdir()) == [
        "one.nii.gz",
        "scan.nii.gz",
        "two.nii.gz",
    ]
    mask = nib.load(folder / "out" / "one.nii.gz")
    assert mask.shape == first.shape
    np.testing.assert_allclose(mask.affine, turned)
    assert stat.S_IMODE((folder / "out").stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in (folder / "out").iterdir()} == {0o600}

    assert main(["predict", "--model", "m", "--in", "one.nii.gz", "--out", "out"]) == 2
    assert "out exists already" in capfd.readouterr().err
    (folder / "broken.nii.gz").write_bytes(b"\x1f\x8b no")
    assert main(["predict", "--model", "m", "--in", "broken.nii.gz", "--out", "new"]) == 2
    assert "case 1 of 1" in capfd.readouterr().err
    assert not (folder / "new").exists()


@pytest.mark.slow
def test_a_task_that_cannot_predict_says_so(capfd, hospital):
    arguments = ["--model", "common.safetensors", "--in", "p2pfed.toml", "--out", "out"]
    assert main(["predict", *arguments]) == 2
    assert "'breast-cancer' cannot predict" in capfd.readouterr().err
    assert not (hospital / "out").exists()
    assert main(["predict", *arguments[:2], "--in", "nothing", "--out", "out"]) == 2
    assert "nothing at nothing" in capfd.readouterr().err
