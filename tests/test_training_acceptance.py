"""What may stay at home depends on whom a run protects: the policy, and rounds with what stays."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from test_training_round import NONE, SAMPLES, hospital_with, make_run  # noqa: F401 - a fixture
from torch import nn

from p2pfed.tasks.breast_cancer import BreastCancer
from p2pfed.training.home import NOTHING, HomeFolder
from p2pfed.training.local import initial_vector
from p2pfed.training.round import Refused, Released
from p2pfed.training.task import task_id

HOSPITAL = {"unit": "hospital", "mechanism": "gaussian", "epsilon": Fraction(100)}


class Bodied(BreastCancer):
    """A shared trunk and a head; a subclass says what stays."""

    def model(self):
        return nn.Sequential(nn.Linear(30, 4), nn.BatchNorm1d(4), nn.Linear(4, 1), nn.Flatten(0))


class HeadAtHome(Bodied):
    private_parameters = ("2.*",)

    def model(self):
        return nn.Sequential(nn.Linear(30, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))


def fitting(task, **changes):
    size = initial_vector(task, seed=1).size
    return make_run(task_id=task_id(task), num_parameters=size, **changes)


@pytest.mark.parametrize(
    ("task", "words"), [(Bodied(), "the buffer '1.running_mean'"), (HeadAtHome(), "at home")]
)
def test_formal_guarantee_nothing_that_stays_at_home_enters_a_patients_contribution(
    hospital_with,  # noqa: F811
    task,
    words,
):
    hospital = hospital_with(task)
    result = hospital.run_round(fitting(task), 0, initial_vector(task, seed=1), samples=SAMPLES)
    assert isinstance(result, Refused)
    assert words in result.reason
    assert hospital.spent.debits == 0


@pytest.mark.parametrize("terms", [NONE, HOSPITAL], ids=["none", "hospital"])
@pytest.mark.parametrize("task", [Bodied(), HeadAtHome()], ids=["batch-norm", "head"])
def test_where_the_hospital_is_one_row_they_go_on_from_round_to_round(
    hospital_with,  # noqa: F811
    task,
    terms,
):
    hospital, run = hospital_with(task, epsilon="1000", allow_none=True), fitting(task, **terms)
    view = initial_vector(task, seed=1)
    homes = []
    for number in range(2):
        assert isinstance(hospital.run_round(run, number, view, samples=SAMPLES), Released)
        homes.append(hospital.homes.of(run.run_id).model)
    assert homes[0].keys() == homes[1].keys() != set()
    assert any(not np.array_equal(homes[0][name], homes[1][name]) for name in homes[0])


def test_a_full_disk_for_what_stays_at_home_does_not_cost_the_release(hospital_with, tmp_path):  # noqa: F811
    """It is paid for by then; the next round goes on from memory."""
    task = HeadAtHome()
    hospital, run = hospital_with(task, allow_none=True), fitting(task, **NONE)
    (tmp_path / "a file").write_text("")
    hospital.homes = HomeFolder(tmp_path / "a file" / "state", hospital.task_id)
    view = initial_vector(task, seed=1)
    for number in range(2):
        assert isinstance(hospital.run_round(run, number, view, samples=SAMPLES), Released)
    assert "memory only" in hospital.watch.notes[-1]


def test_a_round_that_was_released_before_does_not_move_what_stays_at_home(hospital_with):  # noqa: F811
    task = HeadAtHome()
    hospital, run = hospital_with(task, allow_none=True), fitting(task, **NONE)
    view = initial_vector(task, seed=1)
    first = hospital.run_round(run, 0, view, samples=SAMPLES)
    home = hospital.homes.of(run.run_id)
    assert home is not NOTHING
    assert hospital.run_round(run, 0, view, samples=SAMPLES).payload == first.payload
    assert hospital.homes.of(run.run_id) is home
