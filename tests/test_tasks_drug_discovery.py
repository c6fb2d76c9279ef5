"""Drug discovery: 17 partners with heads of different shapes, one trunk, and labels with holes."""

from __future__ import annotations

import math

import pytest
import torch

from p2pfed.errors import ConfigError
from p2pfed.tasks.drug_discovery import (
    NOT_MEASURED,
    PARTNERS,
    TESTED,
    DrugDiscovery,
    targets_of,
)
from p2pfed.tasks.measures import area_under_curve
from p2pfed.training.home import taken
from p2pfed.training.local import evaluate, initial_vector, train_local
from p2pfed.training.task import Split, load_task, task_id


def partner(site):
    return load_task("drug-discovery", {"site": site})


def test_partners_have_three_to_twelve_targets_and_all_numbers_occur():
    assert {targets_of(site) for site in range(PARTNERS)} == set(range(3, 13))
    for site in range(PARTNERS):
        task = partner(site)
        data = task.data(None, task.options)
        assert data.train.y.shape == (data.train.num_patients, targets_of(site))
        assert data.test.y.shape == (TESTED, targets_of(site))


@pytest.mark.slow
def test_heads_differ_in_shape_and_the_task_is_the_same_everywhere():
    tasks = [partner(site) for site in range(PARTNERS)]
    assert len({task.model().head.weight.shape for task in tasks}) == 10
    assert len({task_id(task) for task in tasks}) == 1
    vectors = {initial_vector(task, seed=0).tobytes() for task in tasks}
    assert len(vectors) == 1  # what is shared is the trunk alone, and it begins alike


def test_the_head_stays_at_home():
    task = partner(3)
    home = taken(task.model(), task.private_parameters)
    assert set(home.model) == {"head.weight", "head.bias"}
    trunk = sum(p.numel() for p in task.model().trunk.parameters())
    assert initial_vector(task, seed=0).size == trunk


def test_partners_have_other_compounds_and_the_same_ones_every_time():
    one, again = (partner(4).data(None, {"site": 4}) for _ in range(2))
    other = partner(5).data(None, {"site": 5})
    assert torch.equal(one.train.x, again.train.x)
    assert torch.equal(one.train.y, again.train.y)
    ids = [*one.train.patient_ids, *one.test.patient_ids, *other.train.patient_ids]
    assert len(set(ids)) == len(ids)
    assert not torch.equal(one.train.x[:60], other.train.x[:60])


def test_what_was_not_measured_does_not_count():
    task = partner(0)
    output = torch.tensor([[0.0, 5.0, -5.0], [1.0, 2.0, 3.0]])
    target = torch.tensor([[1.0, NOT_MEASURED, NOT_MEASURED], [NOT_MEASURED] * 3])
    loss = task.loss(output, target)
    assert loss[0].item() == pytest.approx(math.log(2))
    assert loss[1].item() == 0.0
    moved = task.loss(output + torch.tensor([0.0, 100.0, 100.0]), target)
    assert torch.equal(loss, moved)


def test_the_share_of_measured_pairs_is_about_three_in_five():
    y = partner(16).data(None, {"site": 16}).test.y
    assert set(y.unique().tolist()) == {NOT_MEASURED, 0.0, 1.0}
    assert (y != NOT_MEASURED).float().mean().item() == pytest.approx(0.6, abs=0.05)


@pytest.mark.slow
def test_the_area_under_the_curve_is_that_of_scikit_learn():
    from sklearn.metrics import roc_auc_score

    chance = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 9, (50,), generator=chance).float()  # with ties
    labels = torch.randint(0, 2, (50,), generator=chance).float()
    expected = roc_auc_score(labels.numpy(), scores.numpy())
    assert area_under_curve(scores, labels) == pytest.approx(expected)


def test_a_target_of_one_kind_alone_has_no_curve():
    task = partner(0)
    nobody = torch.full((4, 3), NOT_MEASURED)
    nobody[:, 0] = 1.0
    only = Split(torch.zeros(4, 256), nobody, torch.arange(4))
    assert math.isnan(task.metrics(task.model(), only)["auc"])
    nobody[:, 1] = torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert task.metrics(task.model(), only)["auc"] == 0.5


@pytest.mark.slow
def test_a_partner_alone_learns_its_targets():
    task = partner(14)
    data = task.data(None, task.options)
    start = initial_vector(task, seed=0)
    trained = train_local(task, data.train, start, steps=100, seed=0)
    assert evaluate(task, trained.vector, data.test, home=trained.home)["auc"] > 0.62
    assert evaluate(task, start, data.test)["auc"] < 0.58


@pytest.mark.parametrize("site", [-1, PARTNERS, "0", 1.0])
def test_a_partner_that_does_not_exist_is_refused(site):
    with pytest.raises(ConfigError, match=r"train\.options\.site"):
        DrugDiscovery().data(None, {"site": site})
