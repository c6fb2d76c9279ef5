"""The two bundled tasks on real patients: counts, features, split and independence of patients."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from p2pfed.errors import ConfigError
from p2pfed.tasks import BUNDLED
from p2pfed.tasks.breast_cancer import BreastCancer
from p2pfed.tasks.heart_disease import SCALES, TEST_ROWS, HeartDisease
from p2pfed.training.local import evaluate, initial_vector, train_local
from p2pfed.training.task import Split, load_task

SITES = {"cleveland": (199, 104), "hungarian": (172, 89), "switzerland": (30, 16), "va": (85, 45)}


def raw_rows(folder, site):
    rows = list(csv.reader((folder / f"processed.{site}.data").read_text().splitlines()))
    used = {i: [*row[:10], row[13]] for i, row in enumerate(rows) if row}
    return {i: [float(v) for v in row] for i, row in used.items() if "?" not in row}


@pytest.mark.parametrize("site", SITES)
def test_each_heart_hospital_has_the_benchmarks_patients(heart_folder, site):
    data = HeartDisease().data(heart_folder, {"site": site})
    assert (data.train.num_patients, data.test.num_patients) == SITES[site]
    assert data.train.x.shape[1] == 13
    assert not set(data.train.patient_ids) & set(data.test.patient_ids)


@pytest.mark.slow
def test_the_written_down_split_is_that_of_the_benchmark(heart_folder):
    from sklearn.model_selection import train_test_split

    for site, (_, test_bits) in TEST_ROWS.items():
        rows = raw_rows(heart_folder, site)
        labels = np.array([row[-1] > 0 for row in rows.values()])
        few = min((labels == v).sum() for v in np.unique(labels)) <= 2
        _, test = train_test_split(
            np.array(list(rows)),
            test_size=1 - 0.66,
            train_size=0.66,
            random_state=43,
            stratify=None if few or len(np.unique(labels)) < 2 else labels,
        )
        assert sum(1 << int(i) for i in test) == test_bits


def test_features_are_those_of_dummies_over_all_hospitals(heart_folder):
    """Undoing the public scaling gives pandas' get_dummies(columns=[2, 6], drop_first=True)."""
    pooled = {site: raw_rows(heart_folder, site) for site in SITES}
    every = np.array([row for rows in pooled.values() for row in rows.values()])
    levels = [(c, v) for c in (2, 6) for v in np.unique(every[:, c])[1:]]
    for site, rows in pooled.items():
        table = np.array(list(rows.values()))
        plain = [table[:, c] for c in (0, 1, 3, 4, 5, 7, 8, 9)]
        expected = np.stack([*plain, *(table[:, c] == v for c, v in levels)], axis=1)
        data = HeartDisease().data(heart_folder, {"site": site})
        order = [int(i.rsplit(b"/")[-1]) for i in data.train.patient_ids + data.test.patient_ids]
        found = torch.cat([data.train.x, data.test.x]).double().numpy()[np.argsort(order)]
        for k, (_, reference, scale) in enumerate(SCALES):
            found[:, k] = found[:, k] * scale + reference
        found[:, 8:] = (found[:, 8:] + 1) / 2
        unmeasured = np.zeros_like(expected, dtype=bool)
        unmeasured[:, [2, 3]] = expected[:, [2, 3]] == 0
        np.testing.assert_allclose(found[~unmeasured], expected[~unmeasured], atol=1e-4)


def test_one_heart_patient_moves_no_other_patients_features(heart_folder, tmp_path):
    before = HeartDisease().data(heart_folder, {"site": "va"})
    shutil.copy(heart_folder / "processed.va.data", tmp_path)
    path = tmp_path / "processed.va.data"
    lines = path.read_text().splitlines()
    first = int(before.train.patient_ids[0].rsplit(b"/")[-1])
    lines[first] = "99,0,1,300,900,1,2,70,1,9,1,1,7,0"
    path.write_text("\n".join(lines))
    after = HeartDisease().data(tmp_path, {"site": "va"})
    assert not torch.equal(before.train.x[0], after.train.x[0])
    assert torch.equal(before.train.x[1:], after.train.x[1:])
    assert torch.equal(before.test.x, after.test.x)
    assert before.train.patient_ids == after.train.patient_ids


def test_a_damaged_heart_file_is_named_without_a_patients_value(heart_folder, tmp_path):
    text = (heart_folder / "processed.va.data").read_text().splitlines()
    for broken in ([*text[:-1]], ["secret77" + text[0][2:], *text[1:]], ["\0", *text[1:]]):
        (tmp_path / "processed.va.data").write_text("\n".join(broken))
        with pytest.raises(ConfigError) as caught:
            HeartDisease().data(tmp_path, {"site": "va"})
        assert "processed.va.data" in str(caught.value)
        assert "secret77" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"site": "london"}, {"site": 3}])
def test_an_unknown_heart_hospital_is_refused(tmp_path, options):
    with pytest.raises(ConfigError, match="cleveland, hungarian, switzerland, va"):
        HeartDisease().data(tmp_path, options)


def test_a_missing_heart_folder_or_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.data"):
        HeartDisease().data(None, {"site": "va"})
    with pytest.raises(ConfigError, match="cannot read"):
        HeartDisease().data(tmp_path, {"site": "va"})


@pytest.mark.parametrize("sites", [1, 4, 5, 16])
def test_breast_cancer_hospitals_are_unequal_and_share_no_patient(sites):
    parts = [BreastCancer().data(None, {"site": i, "sites": sites}) for i in range(sites)]
    names = [n for p in parts for n in (*p.train.patient_ids, *p.test.patient_ids)]
    assert len(names) == len(set(names)) == 569
    sizes = [p.train.num_patients + p.test.num_patients for p in parts]
    assert sizes == sorted(sizes, reverse=True)
    if sites > 1:
        assert sizes[0] > 1.8 * sizes[-1]
    for part, size in zip(parts, sizes, strict=True):
        assert part.test.num_patients == round(size / 4)
        assert 0.1 < float(part.train.y.mean()) < 0.7


@pytest.mark.parametrize(
    "options", [{}, {"site": 5}, {"site": -1}, {"site": "x"}, {"site": 0, "sites": 0}]
)
def test_wrong_breast_cancer_options_are_refused(options):
    with pytest.raises(ConfigError, match=r"train\.options"):
        BreastCancer().data(None, options)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_tasks_load_by_their_name(name):
    assert load_task(name).name == name


@pytest.mark.slow
def test_training_on_real_patients_learns(heart_folder):
    for task, folder, options, least in (
        (HeartDisease(), heart_folder, {"site": "cleveland"}, 0.7),
        (BreastCancer(), None, {"site": 0}, 0.93),
    ):
        data = task.data(folder, options)
        start = initial_vector(task, seed=0)
        trained = train_local(
            task, data.train, start, steps=400, learning_rate=0.05, batch_size=16, seed=0
        ).vector
        assert evaluate(task, trained, data.test)["accuracy"] > least


def test_auc_counts_pairs_in_the_right_order():
    task = BreastCancer()
    split = Split(
        torch.tensor([[1.0], [2.0], [2.0], [3.0]]), torch.tensor([0.0, 0, 1, 1]), torch.arange(4)
    )
    values = task.metrics(torch.nn.Flatten(0), split)
    assert values["auc"] == pytest.approx(3.5 / 4)
    one_class = replace(split, y=torch.ones(4))
    assert "auc" not in task.metrics(torch.nn.Flatten(0), one_class)
