"""Task, split and task id."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from p2pfed.errors import ConfigError
from p2pfed.tasks.breast_cancer import BreastCancer
from p2pfed.training.task import HyperParameters, Split, load_task, task_id

SOURCE = """
from torch import nn
from p2pfed.training.task import Task
class Own(Task):
    name = "own"
    def model(self): return nn.Linear({width}, 1)
    def data(self, folder, options): raise NotImplementedError
    def loss(self, output, target): return output
    def metrics(self, model, split): return {{}}
NOT_A_TASK = 3
"""


def split(x, y, patient, **more):
    return Split(torch.tensor(x), torch.tensor(y), torch.tensor(patient), **more)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "y"])
def test_nan_or_infinity_in_the_data_is_refused_and_its_place_named(bad, where):
    x, y = [[1.0], [2.0]], [0.0, 1.0]
    if where == "x":
        x[1][0] = bad
    else:
        y[1] = bad
    with pytest.raises(ConfigError, match=f"NaN or infinity, in {where}"):
        split(x, y, [0, 1])


@pytest.mark.parametrize(
    ("x", "y", "patient"),
    [
        ([[1.0]], [1.0, 2.0], [0]),
        ([[1.0]], [1.0], [0, 0]),
        ([[1.0], [1.0]], [1.0, 0.0], [0, 2]),
        ([[1.0], [1.0]], [1.0, 0.0], [1, 1]),
        ([[1.0], [1.0]], [1.0, 0.0], [0.0, 1.0]),
    ],
)
def test_records_without_target_or_patient_are_refused(x, y, patient):
    with pytest.raises(ConfigError):
        split(x, y, patient)


def test_an_empty_split_is_refused():
    with pytest.raises(ConfigError, match="none"):
        Split(torch.zeros(0, 2), torch.zeros(0), torch.zeros(0, dtype=torch.int64))


def test_all_records_of_a_patient_belong_together():
    data = split([[1.0], [2.0], [3.0]], [0.0, 1.0, 0.0], [1, 0, 1])
    assert [rows.tolist() for rows in data.records_of] == [[1], [0, 2]]
    assert data.num_patients == 2


def test_a_patients_record_bytes_do_not_depend_on_order():
    one = split([[1.0], [2.0], [3.0]], [0.0, 1.0, 0.0], [1, 0, 1])
    other = split([[3.0], [1.0], [2.0]], [0.0, 0.0, 1.0], [0, 0, 1])
    assert one.patient_records() == tuple(reversed(other.patient_records()))


def test_given_patient_names_are_used_and_must_be_distinct():
    named = split([[1.0], [2.0]], [0.0, 1.0], [0, 1], patient_ids=(b"a", b"b"))
    assert named.patient_records() == (b"a", b"b")
    for wrong in ((b"a", b"a"), (b"a",)):
        with pytest.raises(ConfigError, match="patient_ids"):
            replace(named, patient_ids=wrong)


def test_the_task_id_follows_code_hyper_parameters_and_shapes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    ids = []
    for name, text in (
        ("own_a", SOURCE.format(width=3)),
        ("own_b", SOURCE.format(width=3)),
        ("own_c", SOURCE.format(width=4)),
        ("own_d", SOURCE.format(width=3) + "\n# another comment"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
        ids.append(task_id(load_task(f"{name}:Own")))
        sys.modules.pop(name)
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3


def test_the_task_id_follows_the_hyper_parameters(monkeypatch):
    before = task_id(BreastCancer())
    monkeypatch.setattr(BreastCancer, "hyper", HyperParameters(local_steps=3))
    assert task_id(BreastCancer()) != before


def test_the_task_id_covers_the_code_it_inherits(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    child = "from {base} import Own as Base\nclass Child(Base):\n    name = 'child'\n"
    ids = []
    for k, extra in enumerate(("", "\n# changed")):
        (tmp_path / f"base_{k}.py").write_text(SOURCE.format(width=3) + extra)
        (tmp_path / f"child_{k}.py").write_text(child.format(base="base_" + str(k)))
        ids.append(load_task(f"child_{k}:Child"))
    assert type(ids[0]).__mro__[1].__module__ == "base_0"
    hashed = [task_id(task) for task in ids]
    (tmp_path / "child_1.py").write_text(child.format(base="base_0"))  # same child, other base
    assert task_id(ids[1]) != hashed[0] != hashed[1]


@pytest.mark.parametrize(
    "spec", ["no-such", "no_such_module:X", "json:Nothing", "json:dumps", ":", "json:"]
)
def test_an_unknown_task_is_refused(spec):
    with pytest.raises(ConfigError):
        load_task(spec)
