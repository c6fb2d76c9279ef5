"""Four real daemons train the segmentation of the hippocampus: Dice together, tuned and alone."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flamby import data_root
from numpy.typing import NDArray
from rows import Row, parser, show
from whole_run import whole_run

from p2pfed.demo.plan import Cast, Hospital, run_constants
from p2pfed.tasks.hippocampus import Hippocampus
from p2pfed.training.local import evaluate, initial_vector, train_local
from p2pfed.training.task import TaskData
from p2pfed.training.tuning import tune

NAMES = ("Ashford", "Birchwood", "Cedar Hill", "Dunmore")
ROUNDS = 15
TUNING = 100  # local steps, at most
DEADLINE = 3600.0
MEASURES = ("dice", "dice_anterior", "dice_posterior")

Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Site:
    """One hospital's data, to be loaded in another process."""

    folder: Path
    options: Mapping[str, Any]

    def load(self) -> tuple[Hippocampus, TaskData[Any]]:
        """The task and its patients."""
        torch.set_num_threads(1)
        task = Hippocampus()
        task.options = self.options
        return task, task.data(self.folder, self.options)


def main() -> int:
    """Measure and print; returns the exit code."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, help="folder with hippocampus")
    options.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1")
    options.add_argument("--rounds", type=int, default=ROUNDS)
    options.add_argument("--table", action="store_true", help="print Markdown")
    options.add_argument("--keep", type=Path, help="keep each seed's model here, for p2pfed model")
    args = options.parse_args()
    folder = folder_of(args.data)
    sites = [Site(folder, {"site": i, "sites": len(NAMES)}) for i in range(len(NAMES))]
    found = []
    for seed in range(args.seeds):
        found.append(one_seed(sites, args.rounds, seed, args.keep))
        print(f"seed {seed}: {_told(found[-1])}", file=sys.stderr, flush=True)
    if args.table:
        print(table(found, sites))
    else:
        show(rows_of(found), as_json=args.json)
    return 0


def folder_of(named: Path | None) -> Path:
    """Where the volumes are; ends the program with words if they are not there."""
    folder = data_root(named) / "hippocampus"
    if not (folder / "images").is_dir():
        sys.exit(
            f"{folder / 'images'} is missing\n  the folder must hold hippocampus/images and labels"
            " (Medical Segmentation Decathlon, Task 04)\n  name it with --data or P2PFED_DATA"
        )
    return folder


Scores = dict[str, dict[str, dict[str, float]]]  # hospital -> way -> metric -> value


def one_seed(sites: list[Site], rounds: int, seed: int, keep: Path | None) -> Scores:
    """Together with daemons, then every hospital alone and tuned, two at a time."""
    file = None
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        file = keep / f"seed-{seed}.safetensors"
    together = federate(sites, rounds, seed, file)
    with ProcessPoolExecutor(2) as pool:
        scored = pool.map(score, sites, [together] * len(sites), [rounds] * 4, [seed] * 4)
        return dict(zip(NAMES, scored, strict=True))


def score(site: Site, together: Vector, rounds: int, seed: int) -> dict[str, dict[str, float]]:
    """One hospital's Dice with each of its models, on its own test patients."""
    task, data = site.load()
    alone = train_local(
        task,
        data.train,
        initial_vector(task, seed=seed),
        steps=rounds * task.hyper.local_steps,
        seed=seed,
    )
    tuned = tune(task, together, data.train, steps=TUNING, seed=seed)
    ways = {"alone": alone.vector, "together": together, "tuned": tuned.vector}
    return {way: evaluate(task, vector, data.test) for way, vector in ways.items()}


def federate(sites: list[Site], rounds: int, seed: int, keep: Path | None) -> Vector:
    """One run of four daemons; the model that all of them end on."""
    cast = cast_of(sites)
    constants = {**run_constants("none", rounds=rounds, epsilon=None), "deadline_s": 600.0}
    constants |= {"quorum": 1.0}
    return whole_run(
        cast,
        constants,
        name=f"hippocampus-{seed}",
        seed=seed,
        epsilon="0",
        deadline=DEADLINE,
        keep=keep,
    ).model


def cast_of(sites: list[Site]) -> Cast:
    """Four hospitals whose numbers of patients are those of their data."""
    hospitals = []
    for name, site in zip(NAMES, sites, strict=True):
        _, data = site.load()
        hospitals.append(Hospital(name, data.train.num_patients, dict(site.options)))
    return Cast("hippocampus", sites[0].folder, tuple(hospitals), "", "", "")


def _told(scores: Scores) -> str:
    return ", ".join(
        f"{name} " + "/".join(f"{ways[way]['dice']:.3f}" for way in ("alone", "together", "tuned"))
        for name, ways in scores.items()
    )


def rows_of(found: list[Scores]) -> list[Row]:
    """Means over seeds; the ratio is to the hospital alone."""
    rows = []
    for name in NAMES:
        mean = {
            way: statistics.mean(scores[name][way]["dice"] for scores in found)
            for way in ("alone", "together", "tuned")
        }
        label = name.lower().replace(" ", "-")
        rows.append(Row(f"hippocampus/{label}/alone", mean["alone"], "Dice", better="higher"))
        rows += [
            Row(
                f"hippocampus/{label}/{w}",
                mean[w],
                "Dice",
                "alone",
                mean[w] / mean["alone"],
                "higher",
            )
            for w in ("together", "tuned")
        ]
    return rows


def table(found: list[Scores], sites: list[Site]) -> str:
    """The table of docs/imaging.md: mean and standard deviation over the seeds."""
    lines = ["| hospital | patients (train, test) | measure | alone | together | tuned |"]
    lines.append("|---|---|---|---|---|---|")
    for name, site in zip(NAMES, sites, strict=True):
        _, data = site.load()
        counts = f"{data.train.num_patients}, {data.test.num_patients}"
        for measure in MEASURES:
            cells = []
            for way in ("alone", "together", "tuned"):
                values = [scores[name][way][measure] for scores in found]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
            lines.append(f"| {name} | {counts} | {measure} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
