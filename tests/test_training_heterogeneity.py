"""Hospitals that differ: what stays at home, what pulls to the common model, what tuning gains."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

import numpy as np
import pytest
import torch
from unlike_hospitals import Unlike, Unscaled

from p2pfed.demo.simulated import SimulatedHospitals, federate, fitting, members_of
from p2pfed.identity.run import Outer
from p2pfed.simulate.constants import DEFAULT
from p2pfed.training.home import NOTHING
from p2pfed.training.local import evaluate, initial_vector, train_local
from p2pfed.training.tuning import tune


def run_of(task, *, rounds, **changes):
    plain = replace(DEFAULT, rounds=rounds, outer=Outer("fedavg", 1.0), robust="none", **changes)
    return fitting(plain, task)


def unlike(kind, count, **options):
    members = []
    for site in range(count):
        task = kind()
        task.options = {**options, "site": site, "sites": count}
        members.append((task, task.data(None, task.options)))
    return members


def trained_together(members, folder, *, rounds, seed=0):
    """The common model, and the hospitals as they are after the last round."""
    names = [f"hospital {i}" for i in range(len(members))]
    task = members[0][0]
    run = run_of(task, rounds=rounds)
    with SimulatedHospitals(run, dict(zip(names, members, strict=True)), folder) as hospitals:
        vector = federate(hospitals, names, initial_vector(task, seed=seed))
        return vector, [hospitals.home(name) for name in names]


def alone(task, data, steps, seed=0):
    """Trained at one hospital from the first model on, its test patients, and what is at home."""
    trained = train_local(
        task,
        data.train,
        initial_vector(task, seed=seed),
        steps=steps,
        seed=seed,
    )
    return trained.vector, data.test, trained.home


@pytest.mark.slow
def test_fine_tuning_lifts_every_hospital_over_training_alone_and_all_over_the_common_model(
    tmp_path,
):
    """The direction is learned together, the threshold at home; 60 patients know too little."""
    members = unlike(Unlike, 8, patients=60)
    vector, homes = trained_together(members, tmp_path, rounds=12)
    gained, gained_on_common = [], []
    for (task, data), home in zip(members, homes, strict=True):
        tuned = tune(task, vector, data.train, steps=50, seed=0, home=home)
        own = evaluate(task, tuned.vector, data.test, home=tuned.home)["accuracy"]
        gained.append(own - evaluate(task, *alone(task, data, steps=60)[:2])["accuracy"])
        gained_on_common.append(own - evaluate(task, vector, data.test)["accuracy"])
    assert min(gained) > 0, gained
    assert mean(gained) > 0.02
    assert mean(gained_on_common) > 0


def test_heads_of_any_shape_stay_at_home(tmp_path):
    members = members_of("drug-discovery", 3)
    vector, homes = trained_together(members, tmp_path, rounds=2)
    shapes = {home.model["head.weight"].shape for home in homes}
    assert shapes == {(3, 32), (10, 32), (7, 32)}
    assert vector.size == sum(p.numel() for p in members[0][0].model().trunk.parameters())
    for (task, _), home in zip(members, homes, strict=True):
        assert not torch.equal(home.model["head.bias"], task.model().head.bias)


@pytest.mark.slow
def test_a_trunk_learned_by_17_partners_is_worth_more_than_one_of_ones_own():
    members = members_of("drug-discovery", 17)
    vector, homes = initial_vector(members[0][0], seed=0), [NOTHING] * 17
    sizes = np.array([data.train.num_patients for _, data in members])
    for round_ in range(16):
        ends = [
            train_local(
                task,
                data.train,
                vector,
                steps=task.hyper.local_steps,
                learning_rate=task.hyper.learning_rate,
                batch_size=task.hyper.batch_size,
                seed=round_,
                home=home,
            )
            for (task, data), home in zip(members, homes, strict=True)
        ]
        homes = [end.home for end in ends]
        vector = np.average([end.vector for end in ends], axis=0, weights=sizes).astype(np.float32)
    together, by_oneself = [], []
    for (task, data), home in zip(members, homes, strict=True):
        together.append(evaluate(task, vector, data.test, home=home)["auc"])
        own, test, at_home = alone(task, data, steps=160)
        by_oneself.append(evaluate(task, own, test, home=at_home)["auc"])
    assert mean(together) > mean(by_oneself) + 0.02


@pytest.mark.slow
def test_a_norm_of_ones_own_fits_scanners_that_differ(tmp_path):
    """FedBN: scale and offset of every norm belong to the hospital, not only its statistics."""
    found = {}
    for way, private in (("shared", ()), ("own", ("1.*",))):
        members = unlike(Unscaled, 3)
        for task, _ in members:
            task.private_parameters = private
        vector, homes = trained_together(members, tmp_path / way, rounds=15)
        found[way] = [
            evaluate(task, vector, data.test, home=home)["accuracy"]
            for (task, data), home in zip(members, homes, strict=True)
        ]
        assert all("1.running_mean" in home.model for home in homes)
        kept = [home.model["1.weight"] for home in homes if "1.weight" in home.model]
        assert len(kept) == (3 if private else 0)
        if private:
            assert not torch.equal(kept[0], kept[1])
    assert mean(found["own"]) > mean(found["shared"]) + 0.02


def test_fedprox_holds_local_training_near_the_common_model(tmp_path):
    distances = []
    for proximal in (0.0, 0.5, 5.0):
        [(task, data), *_] = unlike(Unlike, 1)
        task.hyper = replace(task.hyper, proximal=proximal)
        start = initial_vector(task, seed=0)
        end = train_local(
            task, data.train, start, steps=20, learning_rate=0.1, batch_size=8, seed=0
        ).vector
        distances.append(float(np.linalg.norm(end - start)))
    assert distances[0] > distances[1] > distances[2] > 0


def test_momentum_goes_on_from_round_to_round_only_where_it_is_kept(tmp_path):
    ends = {}
    for state in ("fresh", "kept"):
        members = unlike(Unlike, 2)
        for task, _ in members:
            task.hyper = replace(task.hyper, optimizer="momentum", optimizer_state=state)
        ends[state], homes = trained_together(members, tmp_path / state, rounds=2)
        assert all(bool(home.optimizer) == (state == "kept") for home in homes)
    assert not np.array_equal(ends["fresh"], ends["kept"])
