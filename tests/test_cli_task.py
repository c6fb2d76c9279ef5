"""`p2pfed task new` and `task check`, with real processes; each template runs as it stands."""

from __future__ import annotations

import io
import json
import os
import select
import subprocess
import sys
import time
import tokenize
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from imaging_files import phantom_folder, write_bundle
from loop_daemon import LoopDaemon, a_run

from p2pfed.cli.main import main
from p2pfed.training.local import initial_vector
from p2pfed.training.loop_task import load_loop

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TEMPLATES = ("tabular", "imaging", "loop")


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{HERE}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in [n for n in os.environ if n.startswith("P2PFED_") and n != "P2PFED_DATA"]:
        monkeypatch.delenv(name)


def run(capsys, *arguments):
    code = main(["task", *map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


def checked(capsys, *arguments):
    """Exit code and rows by name, the worst of those with one name."""
    code, out, err = run(capsys, "check", *arguments, "--json")
    answer = json.loads(out)
    assert "Traceback" not in out + err
    assert answer["schema"] == "p2pfed.task-check/1"
    assert answer["ok"] == (code == 0)
    worst = ("ok", "-", "warn", "FAIL")
    rows = sorted(answer["data"]["rows"], key=lambda row: worst.index(row["status"]))
    return code, {row["check"]: row for row in rows}


# --- new ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_new_task_passes_its_check_as_it_stands(capsys, tmp_path, template):
    code, out, _ = run(capsys, "new", "lung_nodules", "--template", template)
    assert code == 0
    assert "p2pfed task check lung_nodules" in out
    code, rows = checked(capsys, "lung_nodules")
    assert code == 0
    assert {row["status"] for row in rows.values()} == {"ok"}
    if template != "loop":
        assert rows["privacy"]["facts"]["vectorised"]


def lines_of_code(path: Path) -> int:
    """Lines that a person must read: with code, not counting comments and docstrings."""
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    found, fresh = set(), True
    for token in tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline):
        if token.type in (*nothing, tokenize.ENDMARKER):
            fresh = fresh or token.type == tokenize.NEWLINE
            continue
        if not (fresh and token.type == tokenize.STRING):
            found |= set(range(token.start[0], token.end[0] + 1))
        fresh = False
    return len(found)


@pytest.mark.parametrize(
    ("template", "file", "most"),
    [("tabular", "task.py", 18), ("imaging", "task.py", 18), ("loop", "model.py", 3)],
)
def test_what_is_to_be_written_is_short(capsys, template, file, most):
    assert run(capsys, "new", "mine", "--template", template)[0] == 0
    assert lines_of_code(Path("mine/mine") / file) <= most


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_new_project_is_whole_and_has_its_own_names(capsys, template):
    code, out, _ = run(capsys, "new", "lung_nodules", "--template", template, "--json")
    assert code == 0
    files = json.loads(out)["data"]["files"]
    assert sorted(files) == sorted(str(p) for p in Path("lung_nodules").rglob("*") if p.is_file())
    for file in map(Path, files):
        text = file.read_text("utf-8")
        assert "$" not in text
        assert all(len(line) <= 100 for line in text.splitlines()) or file.suffix == ".md"
        if file.suffix == ".py":
            compile(text, file.name, "exec")
    project = tomllib.loads(Path("lung_nodules/pyproject.toml").read_text("utf-8"))
    assert project["project"]["name"] == "lung_nodules"
    assert "lung_nodules." in project["tool"]["p2pfed"]["task"]
    readme = Path("lung_nodules/README.md").read_text("utf-8")
    assert readme.count("\np2pfed ") + readme.count("\npip ") == 3


@pytest.mark.slow
def test_the_commands_of_a_new_projects_readme_are_ones_that_the_program_takes(capsys):
    # `run create` is the one with flags that could be wrong.
    for template in TEMPLATES:
        run(capsys, "new", f"my_{template}", "--template", template)
        text = Path(f"my_{template}/README.md").read_text("utf-8")
        line = next(each for each in text.splitlines() if each.startswith("p2pfed run create"))
        code = main(line.split()[1:])
        assert code == 2
        assert "cannot read roster.json" in capsys.readouterr().err


@pytest.mark.slow
def test_the_loop_of_a_new_project_joins_a_daemon_and_trains(capsys, tmp_path, monkeypatch):
    run(capsys, "new", "mine_in_a_loop", "--template", "loop")
    monkeypatch.syspath_prepend(tmp_path / "mine_in_a_loop")
    task = load_loop("loop:mine_in_a_loop.model:build")
    first = initial_vector(task, seed=0)
    daemon = LoopDaemon(tmp_path)
    daemon.serve(lambda call: call.round(a_run(task, first.size), 0, first))
    environment = {**os.environ, "P2PFED_CONFIG": str(daemon.config)}
    try:
        done = subprocess.run(
            [sys.executable, "train.py"],
            cwd="mine_in_a_loop",
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        daemon.done()
    finally:
        daemon.close()
    [answer] = daemon.answers
    assert answer["event"] == "released"
    assert "TrainerError" in done.stderr  # the script of the daemon was over


def test_a_folder_that_is_not_empty_is_left_alone(capsys):
    Path("mine").mkdir()
    assert run(capsys, "new", "mine")[0] == 0  # empty is well
    before = {p: p.stat().st_mtime_ns for p in Path("mine").rglob("*")}
    code, _, err = run(capsys, "new", "mine", "--template", "loop")
    assert code == 2
    assert err.splitlines() == [
        "mine is not empty",
        "nothing is overwritten",
        "choose another folder",
    ]
    assert before == {p: p.stat().st_mtime_ns for p in Path("mine").rglob("*")}


@pytest.mark.parametrize("name", ["lung-nodules", "3d", "class", "größe", "torch", "json", "tests"])
def test_a_name_that_no_module_can_have_is_refused_and_nothing_is_written(capsys, tmp_path, name):
    code, _, err = run(capsys, "new", name)
    assert code == 2
    assert len(err.splitlines()) == 3
    assert "lung_nodules" in err
    assert not (tmp_path / name).exists()


def test_a_place_where_nothing_can_be_written_is_told(capsys):
    Path("file").write_text("")
    code, _, err = run(capsys, "new", "file/mine")
    assert code == 2
    assert "cannot write" in err


def test_every_template_file_goes_with_the_package():
    import configparser

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", "utf-8")
    patterns = setup["options.package_data"]["p2pfed"].split()
    files = [p for p in (ROOT / "p2pfed/tasks/templates").rglob("*") if p.is_file()]
    assert len(files) >= 10
    for file in files:
        relative = str(file.relative_to(ROOT / "p2pfed"))
        depth = relative.count("/")
        assert any(fnmatch(relative, p) and p.count("/") == depth for p in patterns), relative


# --- check: what is checked --------------------------------------------------------------------


def node(folder: Path, task: str, more: str = "") -> Path:
    file = folder / "p2pfed.toml"
    file.write_text(
        f'[node]\nname = "h"\ndata_dir = "."\n[train]\ntask = "{task}"\n{more}\n'
        '[privacy]\nepsilon = "3"\n'
    )
    return file


@pytest.mark.slow
def test_a_nodes_task_is_checked_on_its_own_data_and_policy(capsys, tmp_path):
    file = node(tmp_path, "breast-cancer", "options = { site = 1, sites = 3 }")
    code, rows = checked(capsys, "-c", file)
    assert code == 0
    assert "patients train" in rows["data"]["found"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p2pfed.toml"]  # no ledger, no state
    node(tmp_path, "broken_tasks:BatchNorm")
    code, rows = checked(capsys)  # the configuration of this folder
    assert code == 1
    assert "this hospital takes part in no other" in rows["privacy"]["found"]


@pytest.mark.slow
def test_flags_go_before_what_the_configuration_says(capsys, tmp_path):
    file = node(tmp_path, "breast-cancer", "options = { site = 9, sites = 3 }")
    code, rows = checked(capsys, "-c", file)
    assert (code, rows["data"]["status"]) == (1, "FAIL")
    assert "train.options.site is 9" in rows["data"]["found"]
    assert checked(capsys, "-c", file, "--option", "site=2", "--device", "cpu")[0] == 0


@pytest.mark.slow
def test_people_get_a_table_with_what_to_do_under_what_failed(capsys):
    code, out, err = run(capsys, "check", "--task", "broken_tasks:MonitorIsMissing")
    assert code == 1
    assert err == ""
    lines = out.splitlines()
    assert lines[0].split() == ["RESULT", "CHECK", "FOUND"]
    [at] = [n for n, line in enumerate(lines) if line.startswith("FAIL")]
    assert lines[at].split()[1] == "metrics"
    assert lines[at + 1].strip() == "-> set monitor to one of: accuracy"
    assert lines[-1] == "failed: metrics"


@pytest.mark.slow
def test_a_bundle_on_a_folder_without_patients_csv_passes_and_the_ledgers_doubt_is_told(
    capsys, tmp_path
):
    bundle, data = write_bundle(tmp_path / "bundle"), phantom_folder(tmp_path / "data", 8)
    options = ("--option", f"bundle={bundle}", "--option", "cache=disk")
    arguments = ("--task", "bundle", *options, "--data", data)
    code, rows = checked(capsys, *arguments)
    assert code == 0
    assert rows["task"]["found"].startswith("bundle-")
    assert {name for name, row in rows.items() if row["status"] != "ok"} == {"patients"}
    assert "known by the files' name" in rows["patients"]["found"]
    assert list(tmp_path.rglob("*.safetensors")) == []  # nothing of a patient is left behind
    lines = [f"phantom_{n:03d},R-{n},{'train' if n % 4 else 'test'}" for n in range(8)]
    (data / "patients.csv").write_text("\n".join(["case,patient,part", *lines]))
    code, rows = checked(capsys, *arguments)
    assert {row["status"] for row in rows.values()} == {"ok"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "which task?"),
        (["--task", "loop"], "the loop's own program makes its model"),
        (["--task", "a:B", "--option", "site"], "--option 'site'"),
        (["-c", "none.toml"], "no configuration at none.toml"),
        (["nowhere"], "cannot read nowhere/pyproject.toml"),
        (["--task", "a:B", "--limit", "soon"], "--limit"),
    ],
)
def test_a_wrong_flag_is_told_before_anything_is_started(capsys, arguments, told):
    code, _, err = run(capsys, "check", *arguments)
    assert code == 2
    assert told in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[tool.p2pfed]\n", "names no task"),
        ("[tool.p2pfed]\ntask = 'a:B'\npath = 'x'\n", "unknown key 'path'"),
        ("[tool", "is not TOML"),
    ],
)
def test_a_project_that_does_not_say_its_task_is_refused(capsys, text, told):
    Path("pyproject.toml").write_text(text)
    code, _, err = run(capsys, "check", ".")
    assert code == 2
    assert told in err


def test_a_node_without_training_has_nothing_to_check(capsys, tmp_path):
    file = node(tmp_path, "", "enabled = false")
    code, _, err = run(capsys, "check", "-c", file)
    assert code == 2
    assert "this node does not train" in err


@pytest.mark.slow
def test_a_module_that_only_this_folder_has_is_not_found_as_the_trainer_would_not(capsys, tmp_path):
    (tmp_path / "only_here.py").write_text("from broken_tasks import Sound\n")
    code, rows = checked(capsys, "--task", "only_here:Sound")
    assert code == 1
    assert "No module named 'only_here'" in rows["task"]["found"]


# --- check: a task that ends the process -------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "step", "found"),
    [
        ("Leaves", "data", "the task ended the process (exit code 4)"),
        ("Crashes", "metrics", "the process crashed (SIGSEGV) (broken_tasks.py, line "),
        ("IsKilled", "loss", "the process was killed (SIGKILL)"),
        ("Exits", "data", "the task ended the process: sys.exit(3)"),
    ],
)
def test_a_task_that_ends_the_process_is_told_by_its_step(capsys, name, step, found):
    code, rows = checked(capsys, "--task", f"broken_tasks:{name}")
    assert code == 1
    assert rows[step]["status"] == "FAIL"
    assert found in rows[step]["found"]
    assert rows[step]["do"]
    assert rows["model"]["status"] == "ok"  # what was found before is told


@pytest.mark.slow
def test_a_task_that_never_ends_is_ended(capsys):
    began = time.monotonic()
    code, rows = checked(capsys, "--task", "broken_tasks:Hangs", "--limit", "2")
    assert code == 1
    assert rows["loss"]["found"] == "nothing came of it in 2 s: the process was ended"
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_what_a_task_prints_is_counted_and_not_shown(capsys):
    code, out, err = run(capsys, "check", "--task", "broken_tasks:Prints")
    assert code == 0
    assert "R-100" not in out + err
    assert "2 lines to standard output; in a run they go to trainer.log" in out


@pytest.mark.slow
def test_processes_that_a_task_leaves_behind_are_ended_and_not_waited_for(capsys, tmp_path):
    place = tmp_path / "pid"
    arguments = ("--task", "broken_tasks:LeavesAChild", "--option", f"place={place}")
    assert checked(capsys, *arguments)[0] == 0
    try:
        left = os.pidfd_open(int(place.read_text()))
    except ProcessLookupError:
        return
    ended, _, _ = select.select([left], [], [], 30)
    os.close(left)
    assert ended, "it still runs"


@pytest.mark.slow
def test_a_check_that_does_not_begin_is_an_error_of_three_lines(capsys, monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart is missing')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    code, _, err = run(capsys, "check", "--task", "breast-cancer")
    assert code == 1
    assert err.splitlines()[:2] == ["the check did not begin", "OSError: libcudart is missing"]
    assert len(err.splitlines()) == 3


@pytest.mark.slow
def test_on_a_terminal_one_sees_the_step_at_hand(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    main(["task", "check", "--task", "broken_tasks:Hangs", "--limit", "1.5"])
    assert "loss, 0 s" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")
