"""A next-word model at 64 small clinics on the simulated network: together, tuned and alone.

The network is simulated (1 % of the frames are lost, a clinic crashes every three minutes), the
cores of the nodes and the training are real. A clinic sends a fifth of its change as int8 and keeps
the rest for the next round. *Together* is the common model on each clinic's own tests, *tuned* the
same after training.tuning, *alone* the first model after the same tuning with as many steps as the
clinic trained together. Means over clinics; tuned and alone over every eighth, as together-8 is.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import torch
from rows import Row, parser, show

from p2pfed.demo.simulated import Member, in_simulation, members_of
from p2pfed.simulate.play import Stage
from p2pfed.simulate.scenario import Scenario, read_scenario
from p2pfed.training.local import evaluate, initial_vector
from p2pfed.training.tuning import tune

CLINICS, SOME = 64, 8  # one in so many is tuned
TUNING = 50  # local steps, at most
MINUTE = 60  # of one round, at least
MEASURES = {"top1": "share", "top3": "share", "perplexity": "words"}
SCENARIO = """
title = "Small clinics of one region"
until_s = {end}
settle_s = 1800

[members]
count = {clinics}

[training]
seconds = [5, 20]

[run]
rounds = {rounds}
grid_bits = 12
outer = {{ name = "fedavg", learning_rate = 1.0 }}
robust = "none"
top_fraction = "0.2"
encoding = {{ values = "int8", error_feedback = true }}
deadline_s = 120
min_round_interval_s = 60

[network]
latency_s = [0.005, 0.08]
loss = 0.01

[timers]
tick_s = 5
sync_s = 30
beat_interval_s = 60
suspect_after_s = 200
away_after_s = 400
gossip_interval_s = 20
brisk_interval_s = 5
digest_interval_s = 60
address_interval_s = 120
patience_s = 15

[churn]
crash_every_s = 180
down_s = [60, 300]

[check]
full_fold_every = 16
every_s = 300
sample_s = 60
"""


def main() -> int:
    """Measure and print; returns the exit code."""
    options = parser(__doc__)
    options.add_argument("--clinics", type=int, default=CLINICS)
    options.add_argument("--rounds", type=int, default=24)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    torch.set_num_threads(1)
    members = members_of("next-word", args.clinics)
    text = SCENARIO.format(clinics=args.clinics, rounds=args.rounds, end=(args.rounds + 3) * MINUTE)
    rows = simulated(read_scenario(text, "clinics"), members, args.rounds, args.seed)
    show(rows, as_json=args.json)
    return 0


def simulated(scenario: Scenario, members: list[Member], rounds: int, seed: int) -> list[Row]:
    """Play one seed, and compare the model that all clinics end on."""
    with in_simulation(scenario, members, seed=seed) as (played, bring):
        stage = Stage(played, seed, traced=False, bring=bring)
        for minute in range(1, int(scenario.until_s) // MINUTE + 1):
            stage.run_until(float(minute * MINUTE))
            if minute % 5 == 0:
                _tell(stage)
        stage.settle()
        stage.run_until(stage.heap.now + MINUTE)  # the last folds
        nodes = stage.invariants.honest()
        if len({node.hash for node in nodes}) != 1:
            raise RuntimeError("the clinics did not end on one model")
        run = stage.heap.run
        vector = nodes[0].model.astype("float32") * 2.0**-run.grid_bits
        together = [evaluate(task, vector, data.test) for task, data in members]
    some = members[::SOME]
    steps = rounds * members[0][0].hyper.local_steps
    first = initial_vector(members[0][0], seed=seed)
    found = {
        "together": together,
        f"together-{len(some)}": together[::SOME],
        "tuned": [_tuned(member, vector, TUNING, seed) for member in some],
        "alone": [_tuned(member, first, steps, seed) for member in some],
    }
    point = stage.measures.points[-1]
    rows = [
        Row("text/clinics", len(members), "clinics"),
        Row("text/patients", sum(d.train.num_patients for _, d in members), "patients"),
        Row("text/parameters", run.num_parameters, "parameters"),
        Row("text/rounds", min(node.round for node in nodes), "rounds"),
        Row("text/received", point["bytes_per_round"] / 1e3, "KB per clinic and round"),
        Row("text/whole_model", 4e-3 * run.num_parameters, "KB"),
    ]
    for measure, unit in MEASURES.items():
        for way, values in found.items():
            rows.append(Row(f"text/{measure}/{way}", _mean(values, measure), unit))
    better = [c["top1"] > a["top1"] for c, a in zip(together[::SOME], found["alone"], strict=True)]
    rows.append(Row("text/better_than_alone", sum(better), f"of {len(better)} clinics"))
    return rows


def _tell(stage: Stage) -> None:
    point: dict[str, Any] = stage.measures.points[-1] if stage.measures.points else {}
    told = {key: point.get(key) for key in ("t", "round_median", "score_worst", "score_best")}
    print(told, file=sys.stderr, flush=True)


def _tuned(member: Member, vector: Any, steps: int, seed: int) -> dict[str, float]:
    task, data = member
    tuned = tune(task, vector, data.train, steps=steps, seed=seed)
    return evaluate(task, tuned.vector, data.test, home=tuned.home)


def _mean(values: list[dict[str, float]], measure: str) -> float:
    return statistics.mean(one[measure] for one in values)


if __name__ == "__main__":
    sys.exit(main())
