"""A dry run names what is wrong with a task: one broken task per mistake."""

from __future__ import annotations

import broken_tasks
import pytest
import torch

from p2pfed.training.check import Subject, check
from p2pfed.training.check_steps import Bench, seconds, size
from p2pfed.training.check_training import steps_of


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows_of(task, **subject):
    """Rows by name; of several with one name the worst."""
    told = []
    bench = Bench(Subject(task, device="cpu", **subject), told.append)
    sound = check(bench, steps_of(bench), told.append)
    rows = [message["row"] for message in told if "row" in message]
    assert sound == all(row["status"] != "FAIL" for row in rows)
    worst = ("ok", "-", "warn", "FAIL")
    return {row["check"]: row for row in sorted(rows, key=lambda r: worst.index(r["status"]))}


def statuses(rows, status):
    return {name for name, row in rows.items() if row["status"] == status}


def test_a_sound_task_passes_and_its_figures_are_told():
    rows = rows_of("broken_tasks:Sound")
    assert statuses(rows, "ok") == set(rows)
    assert rows["model"]["facts"] == {"num_parameters": 4, "private_parameters": 0}
    assert len(rows["task id"]["facts"]["task_id"]) == 64
    assert "6 patients train (12 records), 3 test (6 records)" in rows["data"]["found"]
    assert rows["metrics"]["facts"] == {"metrics": ["accuracy"]}
    assert rows["privacy"]["facts"]["vectorised"]
    assert rows["time"]["facts"]["seconds_per_step"] > 0
    assert rows["exchange"]["facts"]["int16_dense"] == 16
    assert rows["exchange"]["facts"]["int8_dense"] == 12
    assert rows["memory"]["facts"]["peak_bytes"] > 1e8


# Task -> row, its status, part of what is found and of what to do.
MISTAKES = {
    "Nameless": ("task", "FAIL", "has no name", "name ="),
    "WithoutSteps": ("task", "FAIL", "local_steps is not above 0", "hyper"),
    "WithoutLoss": ("task", "FAIL", "abstract method", "correct the module"),
    "NoSuchTask": ("task", "FAIL", "no task", "train.task"),
    "ModelRaises": ("model", "FAIL", "RuntimeError: no weights here", "correct `model`"),
    "ModelIsNone": ("model", "FAIL", "model() gives a list", "nn.Module"),
    "ModelIsNan": ("model", "FAIL", "first values hold NaN", "correct `model`"),
    "ModelByChance": ("first model", "warn", "two first models of one seed differ", "generator"),
    "ModelWithTypo": ("model", "FAIL", "'haed.*', which fits no parameter", "0.weight"),
    "InHalves": ("first model", "warn", "0.bias is not float32", "float32"),
    "BatchNorm": ("buffers", "warn", "stay at home: 0.running_mean", "GroupNorm"),
    "AtHome": ("privacy", "warn", "the task keeps parameters at home", "no private_parameters"),
    "DataRaises": ("data", "FAIL", "(broken_tasks.py, line ", "correct `data`"),
    "DataIsMissing": ("data", "FAIL", "train.data is missing: it must name a folder", "set it"),
    "DataIsNoTaskData": ("data", "FAIL", "data() gives a tuple", "TaskData"),
    "DataHasNobody": ("data", "FAIL", "or there is none", "correct `data`"),
    "DataIsNan": ("records", "FAIL", "x holds NaN", "impute"),
    "PartsAreLists": ("data", "FAIL", "train is a list", "Split"),
    "InBothParts": ("patients", "FAIL", "3 are in train and in test", "by patient"),
    "OnePatient": ("patients", "warn", "one patient only", "more"),
    "Anonymous": ("patients", "warn", "no patient_ids", "record numbers"),
    "OneNameForAll": ("patients", "FAIL", "train: 5 patients have another one's name", "ids"),
    "LabelsOutOfRange": ("loss", "FAIL", "Target 2 is out of bounds", "0 to c - 1"),
    "LabelsOneTwo": ("loss", "warn", "labels go from 1 to 10", "range that the loss expects"),
    "LossRaises": ("loss", "FAIL", "ValueError: not today (broken_tasks.py", "correct `loss`"),
    "LossIsMean": ("loss", "FAIL", "gives shape () for 4 records", "shape (4,)"),
    "LossIsFloat": ("loss", "FAIL", "gives a float", "tensor"),
    "LossIsNan": ("loss", "FAIL", "NaN or infinite for 80 of 80", "scaled"),
    "LossOfOneIsScalar": ("loss", "FAIL", "a batch of one record: loss() gives shape ()", "(1,)"),
    "LossRaisesOnNan": ("loss", "FAIL", "raises ValueError where the model gives NaN", "let it"),
    "LossChangesTargets": ("loss", "FAIL", "changes the targets", "copy"),
    "LossChangesModel": ("loss", "FAIL", "changes the model: 0.bias", "look"),
    "LossOfTheBatch": ("loss", "warn", "depends on the records beside it", "by itself"),
    "Detached": ("gradient", "FAIL", "does not depend on the model's parameters", ".detach()"),
    "ZeroGradient": ("gradient", "FAIL", "zero everywhere", "output"),
    "NanGradient": ("gradient", "FAIL", "NaN or infinite for 0.weight", "sqrt"),
    "Unused": ("gradient", "warn", "none for 0.spare", "private_parameters"),
    "Exploding": ("time", "FAIL", "training ended in NaN or infinity", "lower the task's"),
    "MetricsRaise": ("metrics", "FAIL", "AttributeError", "correct `metrics`"),
    "MetricsAreNan": ("metrics", "FAIL", "accuracy is nan", "leave out"),
    "MetricsAreNumber": ("metrics", "FAIL", "metrics() gives a float", "return {"),
    "MonitorIsMissing": ("metrics", "FAIL", "'auc', the one that is watched", "accuracy"),
    "MetricsChangeModel": ("metrics", "FAIL", "changes the model: 0.weight", "look"),
    "OneByOne": ("privacy", "warn", "one patient after the other", "vectorise|control flow"),
    "AnotherEveryTime": ("contributions", "FAIL", "another one at the second", "reads twice"),
    "Exits": ("data", "FAIL", "ended the process: sys.exit(3) (broken_tasks.py", "raise an error"),
    "Interrupts": ("metrics", "FAIL", "KeyboardInterrupt", "correct `metrics`"),
    "EatsMemory": ("loss", "FAIL", "memory ran out (broken_tasks.py", "smaller batch"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_broken_task_is_told_by_the_name_of_what_is_wrong(name):
    check_name, status, found, do = MISTAKES[name]
    row = rows_of(f"broken_tasks:{name}")[check_name]
    assert row["status"] == status
    assert found in row["found"]
    assert any(part in row["do"] for part in do.split("|"))


def test_each_broken_task_is_sound_but_for_its_mistake():
    missing = {"Leaves", "Hangs", "Crashes", "IsKilled", "Prints", "LeavesAChild", "Sound"}
    here = {
        name
        for name, thing in vars(broken_tasks).items()
        if isinstance(thing, type) and issubclass(thing, broken_tasks.Task)
    } - {"Task"}
    assert here - missing == set(MISTAKES) - {"NoSuchTask"}


def test_what_a_failed_step_would_have_given_is_said_to_be_missing():
    rows = rows_of("broken_tasks:DataRaises")
    assert statuses(rows, "FAIL") == {"data"}
    assert statuses(rows, "-") == {"patients", "loss", "gradient", "metrics", "time", "privacy"}
    assert rows["loss"]["found"] == "not looked at: data comes first"
    assert rows["exchange"]["status"] == "ok"


def test_a_task_that_no_run_of_this_hospital_may_take_fails_and_with_another_floor_it_does_not():
    strict = rows_of("broken_tasks:BatchNorm", unit="patient")["privacy"]
    assert strict["status"] == "FAIL"
    assert "takes part in no other" in strict["found"]
    for other in ({"unit": "hospital"}, {"unit": "patient", "allow_none": True}):
        assert rows_of("broken_tasks:BatchNorm", **other)["privacy"]["status"] == "warn"


def test_a_device_that_is_not_there_is_told():
    told = []
    missing = next(n for n in ("cuda", "mps", "xpu") if not getattr(torch, n).is_available())
    bench = Bench(Subject("broken_tasks:Sound", device=missing), told.append)
    assert not check(bench, steps_of(bench), told.append)
    rows = {m["row"]["check"]: m["row"] for m in told if "row" in m}
    assert rows["device"]["status"] == "FAIL"
    assert rows["loss"]["status"] == "-"
    assert rows["data"]["status"] == "ok"


def test_of_a_loop_the_model_alone_is_checked(tmp_path, monkeypatch):
    (tmp_path / "net_of_a_loop.py").write_text(
        "import torch\nbuild = lambda: torch.nn.Linear(3, 1)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = rows_of("loop:net_of_a_loop:build")
    assert rows["model"]["facts"]["num_parameters"] == 4
    assert statuses(rows, "ok") == set(rows)
    assert "loss" not in rows


def test_a_part_that_takes_long_says_how_far_it_is():
    told = []
    bench = Bench(Subject("broken_tasks:Sound", device="cpu"), told.append)
    bench.watch.progress("reading", 3, 9)
    bench.watch.progress("reading", 4, 9)  # too soon to be told
    assert told == [{"progress": "reading", "done": 3, "of": 9}]


def test_figures_are_short():
    assert [size(n) for n in (9, 1234, 5e7, 2e12)] == ["9 B", "1.23 kB", "50 MB", "2 TB"]
    assert [seconds(s) for s in (0.0123, 0.5, 12.34, 345.6)] == ["12 ms", "0.5 s", "12 s", "346 s"]
