"""Hospitals that differ: momentum kept, FedProx, FedBN, private heads, and fine-tuning at home.

Every run is the product's own: local training, gate (mechanism `none`), grid and fold, FedAvg
weighted by patients, in one process without a network. All figures are on the hospitals' own test
patients. *Together* is the common model with what is at home, *tuned* that model after
training.tuning with up to 30 steps. *Alone* is the first model trained at the hospital, in the
better of two ways by the mean over hospitals and seeds: for as many steps as it trains together,
or as far as training.tuning goes with up to 100 steps. A seed fixes the first model and batches,
and for digits also who is where.

Heart disease needs the UCI files: --data is a folder with `heart_disease`; without it P2PFED_DATA,
else ../shared/data beside the repository. --table prints Markdown.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flamby import folder_of
from heterogeneity_digits import SCANNERS, ShiftedDigits, SkewedDigits
from plain import run_of
from rows import Row, parser, show

from p2pfed.demo.simulated import Member, SimulatedHospitals, federate, fitting
from p2pfed.identity.run import Outer
from p2pfed.tasks.drug_discovery import PARTNERS, DrugDiscovery
from p2pfed.tasks.heart_disease import TEST_ROWS, HeartDisease
from p2pfed.training.local import evaluate, initial_vector, train_local
from p2pfed.training.task import Options, Task
from p2pfed.training.tuning import tune

TUNING, ALONE = 30, 100  # local steps, at most
WAYS = ("alone", "together", "tuned")
FEDBN = ("norm*",)
LARGER = "skewed-digits-60"  # with 60 patients each; only where it is asked for

Metrics = Mapping[str, float]
Scores = dict[str, list[Metrics]]  # way -> by hospital


@dataclass(frozen=True)
class Case:
    """One consortium.

    Attributes:
        name: As rows call it.
        members: Its hospitals for a seed.
        hospitals: Their names.
        rounds: How many.
        measures: Which metrics are told; the first one counts.
        seeds: How many seeds, from 0.
    """

    name: str
    members: Callable[[int], list[Member]]
    hospitals: tuple[str, ...]
    rounds: int
    measures: tuple[str, ...]
    seeds: int


def cases(data: Path) -> dict[str, Case]:
    """All of them, by name."""
    heart = data / "heart_disease"

    def hearts(_seed: int) -> list[Member]:
        return [_member(HeartDisease(), {"site": site}, heart) for site in TEST_ROWS]

    def skewed(seed: int, twenties: int = 2) -> list[Member]:
        how = {"seed": seed, "twenties": twenties}
        return [_member(SkewedDigits(), {"site": i, **how}) for i in range(10)]

    def shifted(seed: int) -> list[Member]:
        return [_member(ShiftedDigits(), {"site": i, "seed": seed}) for i in range(len(SCANNERS))]

    def partners(_seed: int) -> list[Member]:
        return [_member(DrugDiscovery(), {"site": i}) for i in range(PARTNERS)]

    sites = tuple(site.capitalize() if site != "va" else "VA" for site in TEST_ROWS)
    frequent = tuple(f"{i} and {(i + 1) % 10}" for i in range(10))
    scanners = tuple(f"scanner {i}" for i in range(len(SCANNERS)))
    names = tuple(f"partner {i}" for i in range(PARTNERS))
    made = (
        Case("heart", hearts, sites, 30, ("accuracy", "auc"), seeds=5),
        Case("skewed-digits", skewed, frequent, 15, ("accuracy",), seeds=5),
        Case(LARGER, partial(skewed, twenties=3), frequent, 15, ("accuracy",), seeds=5),
        Case("shifted-digits", shifted, scanners, 20, ("accuracy",), seeds=5),
        Case("drug-discovery", partners, names, 40, ("auc",), seeds=3),
    )
    return {case.name: case for case in made}


# What is switched: on which case, for people, and how a task is changed.
SWITCHES: dict[str, tuple[str, Callable[[Task], None]]] = {
    "skewed-digits/kept": ("momentum kept", lambda task: _hyper(task, optimizer_state="kept")),
    "skewed-digits/fedprox-0.1": ("FedProx 0.1", lambda task: _hyper(task, proximal=0.1)),
    "skewed-digits/fedprox-1": ("FedProx 1", lambda task: _hyper(task, proximal=1.0)),
    "shifted-digits/fedbn": ("FedBN", lambda task: setattr(task, "private_parameters", FEDBN)),
}


def main() -> int:
    """Measure and print; returns the exit code."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, help="folder with heart_disease")
    options.add_argument("--table", action="store_true", help="print Markdown")
    options.add_argument("--only", help=f"one case, or {LARGER}")
    args = options.parse_args()
    torch.set_num_threads(1)
    chosen = cases(folder_of(args.data))
    wanted = [args.only] if args.only else [name for name in chosen if name != LARGER]
    chosen = {name: chosen[name] for name in wanted}
    compared = {name: compare(case) for name, case in chosen.items()}
    switched = {
        name: [together(case, seed, change) for seed in range(case.seeds)]
        for name, (_, change) in SWITCHES.items()
        if (case := chosen.get(name.partition("/")[0]))
    }
    if args.table:
        print(table(chosen, compared, switched))
    else:
        show(rows_of(chosen, compared, switched), as_json=args.json)
    return 0


def together(case: Case, seed: int, change: Callable[[Task], None] = lambda _task: None) -> Scores:
    """Train together, then tune at home."""
    members = case.members(seed)
    for task, _ in members:
        change(task)
    task = members[0][0]
    plain = run_of(
        1, Outer("fedavg", 1.0), rounds=case.rounds, grid_bits=12, name=f"{case.name}-{seed}"
    )
    peers = list(case.hospitals)
    run = fitting(plain, task)
    with SimulatedHospitals(run, dict(zip(peers, members, strict=True))) as hospitals:
        vector = federate(hospitals, peers, initial_vector(task, seed=seed))
        found = [hospitals.evaluate(peer, vector) for peer in peers]
        homes = [hospitals.home(peer) for peer in peers]
    tuned = [
        _tuned(member, vector, TUNING, seed, home=home)
        for member, home in zip(members, homes, strict=True)
    ]
    return {"together": found, "tuned": tuned}


def compare(case: Case) -> list[Scores]:
    """Alone, together and tuned, by seed."""
    runs = []
    for seed in range(case.seeds):
        members = case.members(seed)
        starts = [initial_vector(task, seed=seed) for task, _ in members]
        both = list(zip(members, starts, strict=True))
        steps = case.rounds * members[0][0].hyper.local_steps
        alone = {
            "to-the-end": [_trained(member, start, steps, seed) for member, start in both],
            "chosen": [_tuned(member, start, ALONE, seed) for member, start in both],
        }
        runs.append(alone | together(case, seed))
        print(f"{case.name} seed {seed}", file=sys.stderr, flush=True)
    better = max(
        ("to-the-end", "chosen"), key=lambda way: _mean(_means(runs, way, case.measures[0]))
    )
    return [run | {"alone": run[better]} for run in runs]


def rows_of(
    chosen: Mapping[str, Case],
    compared: Mapping[str, list[Scores]],
    switched: Mapping[str, list[Scores]],
) -> list[Row]:
    """Means over hospitals and seeds, and how many hospitals gain on average."""
    rows = []
    for name, runs in compared.items():
        case = chosen[name]
        for measure in case.measures:
            alone = _mean(_means(runs, "alone", measure))
            for way in WAYS:
                value = _mean(_means(runs, way, measure))
                row = Row(f"{name}/{measure}/{way}", value, measure, better="higher")
                if way != "alone":
                    row = replace(row, baseline="alone", ratio=value / alone)
                rows.append(row)
        for way in WAYS[1:]:
            unit = f"of {len(case.hospitals)} hospitals"
            gained = _gained(runs, way, "alone", case.measures[0])
            rows.append(Row(f"{name}/{way}_above_alone", gained, unit))
    for name, runs in switched.items():
        measure = chosen[name.partition("/")[0]].measures[0]
        for way in WAYS[1:]:
            value = _mean(_means(runs, way, measure))
            rows.append(Row(f"switch/{name}/{measure}/{way}", value, measure, better="higher"))
    return rows


def table(
    chosen: Mapping[str, Case],
    compared: Mapping[str, list[Scores]],
    switched: Mapping[str, list[Scores]],
) -> str:
    """Markdown: fine-tuning by hospital, then the switches."""
    lines = []
    for name, runs in compared.items():
        case = chosen[name]
        for measure in case.measures:
            lines += ["", f"{name}, {measure}, seeds 0 to {case.seeds - 1}", ""]
            lines += ["| hospital | alone | together | tuned |", "|---|---|---|---|"]
            means = [_means(runs, way, measure) for way in WAYS]
            for hospital, *values in zip(case.hospitals, *means, strict=True):
                lines.append(f"| {hospital} | {' | '.join(map(_short, values))} |")
            whole = " | ".join(_short(_mean(values)) for values in means)
            lines.append(f"| **mean** | {whole} |")
    if switched:
        lines += ["", "| data | switch | together | tuned |", "|---|---|---|---|"]
    for name in dict.fromkeys(one.partition("/")[0] for one in switched):
        lines.append(f"| {name} | none | {_spread(chosen[name], compared[name])} |")
        for switch, runs in switched.items():
            if switch.startswith(name):
                told = _spread(chosen[name], runs)
                lines.append(f"| {name} | {SWITCHES[switch][0]} | {told} |")
    return "\n".join(lines).strip()


def _spread(case: Case, runs: list[Scores]) -> str:
    """Mean and standard deviation, over the seeds, of the mean over the hospitals."""
    told = []
    for way in WAYS[1:]:
        by_seed = [_mean(run[way], case.measures[0]) for run in runs]
        told.append(f"{_short(_mean(by_seed))} ± {_short(statistics.stdev(by_seed))}")
    return " | ".join(told)


def _member(task: Task, options: Options, folder: Path | None = None) -> Member:
    task.options = options
    return task, task.data(folder, options)


def _hyper(task: Task, **changes: Any) -> None:
    setattr(task, "hyper", replace(task.hyper, **changes))  # noqa: B010 - of this one task


def _trained(member: Member, vector: Any, steps: int, seed: int) -> Metrics:
    task, data = member
    trained = train_local(
        task,
        data.train,
        vector,
        steps=steps,
        seed=seed,
    )
    return evaluate(task, trained.vector, data.test, home=trained.home)


def _tuned(member: Member, vector: Any, steps: int, seed: int, **home: Any) -> Metrics:
    task, data = member
    tuned = tune(task, vector, data.train, steps=steps, seed=seed, **home)
    return evaluate(task, tuned.vector, data.test, home=tuned.home)


def _means(runs: list[Scores], way: str, measure: str) -> list[float]:
    """By hospital, over the seeds."""
    by_hospital = zip(*(run[way] for run in runs), strict=True)
    return [statistics.mean(one[measure] for one in seeds) for seeds in by_hospital]


def _gained(runs: list[Scores], way: str, than: str, measure: str) -> int:
    pairs = zip(_means(runs, way, measure), _means(runs, than, measure), strict=True)
    return sum(one > other for one, other in pairs)


def _mean(values: Any, measure: str = "") -> float:
    return statistics.mean(one[measure] if measure else one for one in values)


def _short(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


if __name__ == "__main__":
    sys.exit(main())
