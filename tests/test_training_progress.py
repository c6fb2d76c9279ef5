"""How far a long look at the test patients is: told by the task, shown to who waits for it."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import broken_tasks
import pytest
import torch
from test_tasks_imaging_segmentation import Small

from p2pfed.training import place
from p2pfed.training.hardware import CPU
from p2pfed.training.home import NOTHING
from p2pfed.training.local import evaluate, initial_vector
from p2pfed.training.pictures import Picture
from p2pfed.training.tuning import tune
from p2pfed.training.verbs import pictures
from p2pfed.training.watch import Watch, telling


class Heard(Watch):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def progress(self, step, done, of):
        self.steps.append((step, done, of))
        super().progress(step, done, of)


@pytest.mark.slow
def test_an_imaging_task_tells_how_many_cases_it_has_judged_and_drawn():
    task, heard = Small(), Heard()
    test = task.data(None, {"phantoms": 8}).test
    view = initial_vector(task, seed=0)
    evaluate(task, view, test, watch=heard)
    cases = test.num_cases
    assert cases > 1
    judged = [("evaluation", number, cases) for number in range(cases)]
    assert heard.steps == [("evaluation", 0, 1), *judged]
    heard.steps.clear()
    with telling(task, heard, "pictures"), torch.no_grad():
        task.pictures(task.model(), test)
    assert heard.steps == [("pictures", number, cases) for number in range(cases)]


def test_tuning_tells_of_its_judging_too():
    task, heard = broken_tasks.Sound(), Heard()
    train = task.data(None, {}).train
    tune(task, initial_vector(task, seed=0), train, steps=2, seed=0, watch=heard)
    assert {step for step, _, _ in heard.steps} == {"local steps", "evaluation"}


class Slow(broken_tasks.Sound):
    """Says how far it is."""

    def metrics(self, model, patients):
        self.progress(2, 3)
        return {"accuracy": 0.5}

    def pictures(self, model, patients):
        self.progress(1, 3)
        label = torch.ones(3, 3, 3, dtype=torch.uint8).numpy()
        return [Picture("case", 0.5, label, label, label, (1.0, 1.0, 1.0))]


@pytest.fixture
def reported(monkeypatch):
    """What the commands on this machine have shown to who waits."""
    watches = []

    @contextmanager
    def reporting(watch):
        watches.append(watch)
        yield

    for module in (place, pictures):
        monkeypatch.setattr(module, "reporting", reporting)
    return lambda: watches[-1].shown


@pytest.fixture
def held():
    origin = SimpleNamespace(kind="mine", short="a model")
    return SimpleNamespace(vector=initial_vector(Slow(), seed=0), home=NOTHING, origin=origin)


@pytest.fixture
def here(held, monkeypatch):
    made = place.Place(None, "", Slow(), CPU)
    vars(made)["data"] = made.task.data(None, {})  # where the cached property keeps it
    monkeypatch.setattr(place.Place, "opened", lambda _: made)
    monkeypatch.setattr(place.Place, "held", lambda *_: held)
    return made


def test_model_evaluate_shows_how_far_it_is(here, held, reported):
    assert here.measured(held) == {"accuracy": 0.5}
    shown = reported()
    assert (shown["step"], shown["done"], shown["of"]) == ("evaluation", 2, 3)


def test_model_pictures_shows_how_far_it_is(here, reported):
    assert pictures._pictures(SimpleNamespace(model="m"))["model"] == "a model"
    shown = reported()
    assert (shown["step"], shown["done"], shown["of"]) == ("pictures", 1, 3)
