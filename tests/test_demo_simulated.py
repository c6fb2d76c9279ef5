"""Real hospitals without daemons: folded by hand, and on the simulated network."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from small_scenario import SMALL, scenario_of
from test_training_heterogeneity import run_of, unlike
from unlike_hospitals import FEATURES, Unlike

from p2pfed.cli.main import main
from p2pfed.demo.simulated import (
    SimulatedHospitals,
    federate,
    fitting,
    in_simulation,
    members_of,
)
from p2pfed.errors import ConfigError, UpdateRejected
from p2pfed.gossip.fold import genesis_state, view_of
from p2pfed.simulate.play import play
from p2pfed.training.local import initial_vector, train_local
from p2pfed.training.task import task_id

PLAIN = 'robust = "none"\n'


def hospitals_of(members, folder, **changes):
    names = [f"hospital {i}" for i in range(len(members))]
    run = run_of(members[0][0], rounds=3, **changes)
    return names, SimulatedHospitals(run, dict(zip(names, members, strict=True)), folder)


def test_a_release_is_the_change_by_local_training_on_the_runs_grid(tmp_path):
    members = unlike(Unlike, 1)
    [name], hospitals = hospitals_of(members, tmp_path)
    task, data = members[0]
    with hospitals:
        state = genesis_state(initial_vector(task, seed=0), hospitals.run)
        payload = hospitals.train(name, 0, state.model)
        again = hospitals.train(name, 0, state.model)
    start = view_of(state, hospitals.run.grid_bits)
    ways = [
        train_local(
            task,
            data.train,
            start,
            seed=seed,
        ).vector
        - start
        for seed in range(20)
    ]
    change = np.zeros(FEATURES + 1)
    change[payload.indices] = payload.values * 2.0**-hospitals.run.grid_bits
    typical = np.mean([np.linalg.norm(way) for way in ways])
    assert np.linalg.norm(change - np.mean(ways, axis=0)) < 0.5 * typical  # other batches
    assert np.array_equal(payload.values, again.values)  # a round never has two answers


def test_rounds_are_the_weighted_mean_of_what_all_released(tmp_path):
    members = [*unlike(Unlike, 1, patients=10), *unlike(Unlike, 2, patients=30)[1:]]
    names, hospitals = hospitals_of(members, tmp_path)
    heard = []
    with hospitals:
        genesis = initial_vector(members[0][0], seed=0)
        first = genesis_state(genesis, hospitals.run).model
        one, two = (
            dict(zip(p.indices.tolist(), p.values.tolist(), strict=True))
            for p in (hospitals.train(name, 0, first) for name in names)
        )
        federate(hospitals, names, genesis, heard=lambda state: heard.append(state.model.copy()))
    assert len(heard) == 3
    mean = [(10 * one.get(i, 0) + 30 * two.get(i, 0)) / 40 for i in range(FEATURES + 1)]
    assert np.array_equal(heard[0], first + np.rint(mean).astype(np.int32))


def test_hospitals_under_a_mechanism_spend_and_then_stop(tmp_path):
    private = {
        "mechanism": "gaussian",
        "unit": "patient",
        "epsilon": Fraction(5),
        "delta": Fraction(1, 100_000),
    }
    members = unlike(Unlike, 1)
    [name], hospitals = hospitals_of(members, tmp_path, **private)
    with hospitals:
        model = genesis_state(initial_vector(members[0][0], seed=0), hospitals.run).model
        for round_ in range(3):
            assert hospitals.train(name, round_, model).values.any()
        with pytest.raises(UpdateRejected, match="releases nothing in round 3"):
            hospitals.train(name, 3, model)


def test_a_run_is_fitted_to_the_task():
    [(task, _)] = unlike(Unlike, 1)
    run = fitting(run_of(task, rounds=1, num_parameters=5), task)
    assert (run.num_parameters, run.task_id) == (FEATURES + 1, task_id(task))


def test_members_are_the_sites_of_a_task():
    members = members_of("next-word", 3)
    assert [task.options["site"] for task, _ in members] == [0, 1, 2]
    assert all(task.options["sites"] == 3 for task, _ in members)


@pytest.mark.slow
def test_they_train_on_the_simulated_network_and_every_invariant_holds():
    text = SMALL.replace(
        "[timers]", f"{PLAIN}outer = {{ name = 'fedavg', learning_rate = 1.0 }}\n[timers]"
    )
    scenario = scenario_of(text)
    members = unlike(Unlike, scenario.members, patients=40)
    with in_simulation(scenario, members) as (played, bring):
        assert played.samples == (40, 40, 40)
        one, two = (play(played, 5, bring=bring) for _ in range(2))
        other = play(played, 6, bring=bring)
    assert (one.broken, other.broken) == ("", "")
    assert one.rounds == 6
    assert one.trace == two.trace != other.trace
    assert one.points[-1]["score_worst"] > 0.6


def test_a_scenario_of_another_size_is_refused():
    scenario = scenario_of(SMALL)
    with (
        pytest.raises(ConfigError, match="3 members, the task 2 hospitals"),
        in_simulation(scenario, unlike(Unlike, 2)),
    ):
        pass


def test_without_a_metric_of_which_more_is_better_there_is_no_score(tmp_path):
    members = unlike(Unlike, 1)
    members[0][0].larger_is_better = False
    _, hospitals = hospitals_of(members, tmp_path)
    with hospitals:
        assert hospitals.score(np.zeros(FEATURES + 1, np.int32)) is None


@pytest.mark.slow
def test_the_command_trains_a_task_and_tells_its_score(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = SMALL.replace("rounds = 6", f"rounds = 2\n{PLAIN}").replace(
        "until_s = 60", "until_s = 20"
    )
    (tmp_path / "small.toml").write_text(text, "utf-8")
    code = main(["simulate", "small.toml", "--task", "next-word"])
    told = capsys.readouterr()
    assert (code, told.err) == (0, "")
    assert ", score 0." in told.out
    assert main(["simulate", "small.toml", "--task", "nothing-of-the-kind"]) != 0
    assert "no task 'nothing-of-the-kind'" in capsys.readouterr().err
