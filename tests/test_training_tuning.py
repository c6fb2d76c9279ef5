"""Fine-tuning at home: it is kept only where it helps patients who did not train."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from p2pfed.errors import ConfigError
from p2pfed.training.local import evaluate, initial_vector
from p2pfed.training.task import HyperParameters, Split, Task
from p2pfed.training.tuning import Trial, _best, _goals, _held_out, tune


class Line(Task):
    """y = w x; the common model may be right or wrong for this hospital."""

    name = "line"
    hyper = HyperParameters(batch_size=8, learning_rate=0.3)

    def model(self):
        return nn.Sequential(nn.Linear(1, 1, bias=False), nn.Flatten(0))

    def data(self, folder, options):
        raise NotImplementedError

    def loss(self, output, target):
        return (output - target).square()

    def metrics(self, model, patients):
        return {"loss": float(self.loss(model(patients.x), patients.y).mean())}


def hospital(slope, count=40, noise=0.01):
    chance = torch.Generator().manual_seed(3)
    x = torch.randn(count, 1, generator=chance)
    y = slope * x[:, 0] + noise * torch.randn(count, generator=chance)
    return Split(x, y, torch.arange(count), tuple(b"%d" % i for i in range(count)))


def test_tuning_finds_the_hospitals_own_slope():
    common = np.array([1.0], np.float32)
    tuned = tune(Line(), common, hospital(2.0), steps=50, seed=0)
    assert tuned.vector[0] == pytest.approx(2.0, abs=0.05)
    assert tuned.chosen.steps > 0
    before = evaluate(Line(), common, hospital(2.0))["loss"]
    assert evaluate(Line(), tuned.vector, hospital(2.0))["loss"] < before / 100


def test_a_common_model_that_is_better_than_any_tuning_is_left_as_it_is():
    """Labels are noise around the common line: whatever is learned is wrong for the held out."""
    common = np.array([1.0], np.float32)
    few = hospital(1.0, count=5, noise=3.0)
    tuned = tune(Line(), common, few, steps=50, seed=1)
    assert tuned.chosen.steps == 0
    assert min(trial.value for trial in tuned.trials) == tuned.chosen.value
    assert np.array_equal(tuned.vector, common)


def test_a_rate_that_is_too_high_does_not_end_the_tuning():
    class Steep(Line):
        hyper = HyperParameters(batch_size=8, learning_rate=1e38)

    class Mixed(Steep):
        def optimizer(self, parameters, *, learning_rate, fused):
            rate = 0.3 if learning_rate < 5e37 else 1e38
            return torch.optim.SGD(parameters, lr=rate)

    tuned = tune(Mixed(), np.array([1.0], np.float32), hospital(2.0), steps=50, seed=0)
    assert tuned.vector[0] == pytest.approx(2.0, abs=0.05)


def test_no_tuning_is_chosen_among_equals():
    trials = [Trial(0, 0, 0.8), Trial(0.1, 10, 0.8), Trial(0.3, 10, 0.7)]
    assert _best(trials, larger=True) == trials[0]
    assert _best(trials, larger=False) == trials[2]
    assert _best([Trial(0, 0, 0.5), Trial(1, 1, float("nan"))], larger=True).steps == 0


def test_who_is_held_out_does_not_train():
    held, kept = _held_out(23, seed=5)
    assert len(held) == 4
    assert sorted(held + kept) == list(range(23))
    assert _held_out(2, seed=0)[0] != []


def test_one_patient_is_not_tuned_on():
    with pytest.raises(ConfigError, match="one patient alone"):
        tune(Line(), initial_vector(Line(), seed=0), hospital(1.0, count=1), steps=5, seed=0)


def test_a_task_whose_monitor_is_no_metric_is_told_so():
    class Unwatched(Line):
        monitor = "dice"

    with pytest.raises(ConfigError, match="'dice'"):
        tune(Unwatched(), np.ones(1, np.float32), hospital(1.0), steps=5, seed=0)


@pytest.mark.parametrize(("steps", "goals"), [(1, [1]), (3, [1, 2, 3]), (50, [10, 20, 30, 40, 50])])
def test_models_are_looked_at_on_the_way(steps, goals):
    assert _goals(steps) == goals


def test_a_subset_keeps_patients_with_their_records_and_names():
    x = torch.arange(6.0)[:, None]
    split = Split(x, x[:, 0], torch.tensor([2, 0, 1, 2, 0, 1]), (b"a", b"b", b"c"))
    some = split.subset([0, 2])
    assert some.x[:, 0].tolist() == [0, 1, 3, 4]
    assert some.patient.tolist() == [1, 0, 1, 0]
    assert some.patient_ids == (b"a", b"c")
