"""Whole runs: one seed is one trace wherever it is played, and what comes with p2pfed holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small_scenario import ROUGH, SMALL, scenario_of

from p2pfed.identity.keys import NodeKey, peer_id_of
from p2pfed.simulate.cast import Cast
from p2pfed.simulate.play import Stage, play
from p2pfed.simulate.scenario import load_scenario, read_scenario

ROOT = Path(__file__).resolve().parent.parent
SHORT = (
    "clocks equivocator far-ahead flapping forget frozen leavers one-way partition-long"
    " partition-short rollback rosters slow"
)


def test_a_quiet_network_plays_every_round_and_ends_with_one_model():
    result = play(scenario_of(), 1)
    assert result.broken == ""
    assert (result.rounds, result.releases) == (6, 18)
    assert len(bytes.fromhex(result.model)) == 32
    assert result.coverage[-1] == 1.0
    assert result.node_hours == pytest.approx(3 * result.at_s / 3600)
    assert {point["models"] for point in result.points[-3:]} == {1}


def test_one_seed_is_one_trace_and_another_seed_another():
    traces = [play(scenario_of(until_s="20", rounds="3"), seed).trace for seed in (5, 5, 6)]
    assert traces[0] == traces[1] != traces[2]
    assert len(bytes.fromhex(traces[0])) == 16


def test_without_a_trace_the_same_happens():
    scenario = scenario_of(until_s="20", rounds="3")
    traced, plain = (play(scenario, 5, traced=traced) for traced in (True, False))
    assert plain.trace == ""
    assert (plain.events, plain.model, plain.points) == (traced.events, traced.model, traced.points)


@pytest.mark.slow
def test_the_library_of_folds_gives_the_models_that_folds_in_full_give():
    # In this seed the member that is revoked had all rounds before; else there is no common model.
    whole = play(scenario_of(ROUGH), 6)
    shared = play(read_scenario(f"{ROUGH}\n[check]\nfull_fold_every = 4\n", "small"), 6)
    assert whole.broken == shared.broken == ""
    assert whole.model
    assert (whole.model, whole.releases) == (shared.model, shared.releases)
    assert whole.folds[1] == 0 < shared.folds[1]


def test_the_progress_that_is_told_grows_to_the_end_of_the_scenario():
    told: list[float] = []
    play(scenario_of(until_s="20", rounds="3"), 0, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 20


@pytest.mark.parametrize("kind", ["quadratic", "softmax"])
def test_a_training_that_looks_at_the_model_gets_better(kind):
    text = f"{SMALL}\n[training]\nkind = '{kind}'\n"
    points = [p for p in play(read_scenario(text, "small"), 1).points if p["score_best"]]
    assert points[-1]["score_worst"] == points[-1]["score_best"] > points[0]["score_best"]


def test_the_cast_is_a_function_of_the_seed_and_its_ids_are_those_of_its_keys():
    scenario = scenario_of(ROUGH)
    one, same, other = (Cast(scenario, seed) for seed in (1, 1, 2))
    assert (one.peers, one.signed, one.samples) == (same.peers, same.signed, same.samples)
    assert set(one.peers).isdisjoint(other.peers)
    assert one.peers == [peer_id_of(NodeKey(seed).public_key) for seed in one.seeds]
    assert one.public_keys == [NodeKey(seed).public_key for seed in one.seeds]


def test_who_is_listed_is_not_added_again_and_who_was_revoked_does_not_come_back():
    cast = Cast(scenario_of(ROUGH), 1)
    cast.add([0, 5])
    assert [len(r.members) for r in cast.rosters] == [0, 5, 6]
    cast.add([5])
    cast.revoke([5], 0)
    cast.add([5])
    assert [len(r.members) for r in cast.rosters] == [0, 5, 6, 5]


def test_the_seed_chooses_at_most_as_many_members_as_there_are():
    text = "[[event]]\nat_s = 5\ndo = 'crash'\nmembers = { some = 3 }\ndown_s = 2\n"
    scenario = scenario_of(SMALL + text, count="3\nlate = ['h2']")
    stage = Stage(scenario, 0)
    stage.run_until(6)
    assert stage.timeline.up == 0
    stage.run_until(10)
    assert stage.timeline.up == 2


def test_everything_is_healed_in_the_end():
    stage = Stage(scenario_of(ROUGH), 2)
    stage.run_until(25)
    stage.timeline.heal_everything()
    stage.run_until(29)
    assert stage.timeline.up == 6
    assert not stage.timeline.is_rough
    assert {stage.timeline.island_of(node.peer_id) for node in stage.invariants.honest()} == {0}


# --- many seeds, many processes ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_every_invariant_holds_when_everything_goes_wrong_at_once(seed):
    result = play(scenario_of(ROUGH), seed)
    assert result.broken == "", f"seed {seed}: {result.broken}\n{result.detail}"
    assert result.rounds == 10


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT.split())
def test_a_short_bundled_scenario_holds_every_invariant(name):
    result = play(load_scenario(name), 0)
    assert result.broken == "", f"{name}: {result.broken}\n{result.detail}"
    assert result.releases > 0


def _trace(arguments: tuple[str, int]) -> str:
    file, hash_seed = arguments
    done = subprocess.run(
        [sys.executable, "-m", "p2pfed", "simulate", file, "--seed", "4", "--json", "-"],
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    [seed] = json.loads(done.stdout)["data"]["seeds"]
    return seed["trace"]


@pytest.mark.slow
def test_one_seed_is_one_trace_in_20_processes_with_20_hash_seeds(tmp_path):
    file = tmp_path / "rough.toml"
    file.write_text(ROUGH, "utf-8")
    with ThreadPoolExecutor(2) as pool:
        traces = set(pool.map(_trace, [(str(file), n) for n in range(20)]))
    assert traces == {play(load_scenario(str(file)), 4).trace}
