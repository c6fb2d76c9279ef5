"""What privacy costs in accuracy, at a total epsilon: sparse vector technique, dense, controls.

Five hospitals train on scikit-learn's digits: a softmax (650 parameters, 10 rounds) and a small
convolutional net (1370 parameters, 15 rounds). One record is one patient, whose contribution is
one clipped gradient. The budget (epsilon, delta = 1e-5, for all rounds together) is shared equally
over the rounds. Every hospital releases through the product's own plans, with exact noise of its
own; the server adds the releases up and keeps momentum, which is public.

The ways:
- `none`: clipped, without noise. `gaussian`: dense discrete Gaussian.
- `svt-2`, `svt-4`, `svt-10`: about one coordinate in so many, in the schedule that the plan takes
  for the cheaper one; `svt-2-sequential`, `svt-10-segmented`: in the other one. The threshold is
  steered by `next_threshold` from released rounds only.
- `mask-2` and so on: the control for the *choice*. A public random mask of the density at which
  `svt-2` released on average, then the same values clipped again, with the whole budget for them.
- `top-2` and so on: the control for the *sparsity*. Dense noise, then the largest noisy
  coordinates at the same density, which is free post-processing.

Learning rates and the share of the budget that chooses were found by --tune on a quarter of the
training records; the normal run refits on all of them and tests once. *Tuning is not privately
accounted*: the table shows what the mechanisms can do, not what a run may claim.

sd is over runs, which differ by noise, first parameters and public orders; the split is one. Noise
has no seed, so no two runs of this script agree to the digit. A difference below twice its own sd
(the root of the two variances added, of single runs) is called none. 360 test records leave every
figure a standard error of about .015 of its own, most of it common to all rows.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import numpy as np
from rows import Row, parser, show
from utility_data import TASKS, Split, Task, split
from utility_ways import CHOSEN, COMPARISONS, EARLIER, EPSILONS, WAYS, Choice, Way

from p2pfed.privacy.accountant import NANO, rho_nano_allowed
from p2pfed.privacy.gaussian import GaussianPlan
from p2pfed.privacy.mechanism import Release
from p2pfed.privacy.noise import ExactNoise
from p2pfed.privacy.svt import SvtPlan, next_threshold
from p2pfed.privacy.units import PatientRows

DELTA = 1e-5
BITS = 14  # a clipped gradient is about 2^15.6 grid units long
MOMENTUM = 0.9
LARGEST = 20.0  # no parameter leaves this range
RATES = (0.4, 0.8, 1.6, 3.2, 6.4, 12.8)
SELECT_SHARES = (0.1, 0.2, 0.3)
LEAST = Fraction(1, NANO)  # a plan wants some budget for choosing; a mask never chooses


class Outcome(NamedTuple):
    """Of one run."""

    accuracy: float
    density: float  # share of the coordinates that a release held, on average


@dataclass(frozen=True, slots=True)
class Round:
    """What one hospital's release depends on beside its patients: all of it public.

    Attributes:
        task: What is trained.
        rho: What the release may cost.
        seed: New in every round and hospital.
        density: Share to release, where the way does not find its own.
        threshold: Of svt; None at first.
    """

    task: Task
    rho: Fraction
    seed: tuple[int, int, int]
    density: float
    threshold: int | None


def noise() -> ExactNoise:
    """The source of privacy randomness, new for every release."""
    return ExactNoise()


def release_of(
    way: Way, choice: Choice, now: Round, rows: PatientRows
) -> tuple[Release, int | None]:
    """Release one hospital's sum; returns the release and its next threshold."""
    size, clip = now.task.model.size, now.task.clip
    kept = max(1, round(now.density * size))
    if way.kind in {"none", "gaussian", "top"}:
        plan = GaussianPlan(
            num_parameters=size,
            clip=clip,
            bits=BITS,
            rho=now.rho,
            fraction=Fraction(kept, size) if way.kind == "top" else Fraction(1),
        )
        total = plan.total(rows)
        if way.kind == "none":
            return Release(np.arange(size, dtype=np.int32), total), None
        return plan.draw(total, rows, noise()), None
    seed = b"%d %d %d" % now.seed
    if way.kind == "mask":
        values = SvtPlan(
            num_parameters=size,
            clip=clip,
            bits=BITS,
            rho_select=LEAST,
            rho_values=now.rho,
            shuffle_seed=seed,
        )
        mask = np.random.default_rng(now.seed).permutation(size)[:kept].astype(np.int32)
        return values.values(rows, np.sort(mask), noise()), None
    svt = SvtPlan.for_budget(
        now.rho,
        num_parameters=size,
        clip=clip,
        bits=BITS,
        shuffle_seed=seed,
        segment_blocks=way.one_in,
        select_share=Fraction(str(choice.select_share)),
        schedule=way.schedule,
        threshold=now.threshold,
    )
    release = svt.draw(svt.total(rows), rows, noise())
    return release, next_threshold(svt, release)


def train(
    task: Task,
    data: Split,
    way: Way,
    choice: Choice,
    *,
    epsilon: float,
    seed: int,
    density: float = 1.0,
) -> Outcome:
    """Train once and test.

    Args:
        task: What is trained.
        data: Who has which records.
        way: How hospitals release.
        choice: Learning rate and the share spent on choosing.
        epsilon: Of all rounds together.
        seed: Of the first parameters and of what is public; the noise has none.
        density: Share to release, where the way does not find its own.
    """
    rho = Fraction(rho_nano_allowed(epsilon, DELTA) // task.rounds, NANO)
    weights = task.model.first(np.random.default_rng(seed))
    velocity = np.zeros(task.model.size)
    thresholds: list[int | None] = [None] * len(data.train)
    released = 0
    for number in range(task.rounds):
        total = np.zeros(task.model.size)
        for i, hospital in enumerate(data.train):
            rows = PatientRows(task.model.gradients(weights, hospital.x, hospital.y))
            now = Round(task, rho, (seed, number, i), density, thresholds[i])
            release, thresholds[i] = release_of(way, choice, now, rows)
            total[release.indices] += release.values / 2.0**BITS
            released += release.indices.size
        velocity = MOMENTUM * velocity + total / data.patients
        weights = np.clip(weights - choice.rate * velocity, -LARGEST, LARGEST)
    right = task.model.scores(weights, data.test.x).argmax(axis=1) == data.test.y
    releases = task.rounds * len(data.train) * task.model.size
    return Outcome(float(right.mean()), released / releases)


class Cell(NamedTuple):
    """Of several runs."""

    mean: float
    sd: float
    density: float


Table = dict[tuple[str, str, int], Cell]
"""By task, way and epsilon."""


def cell_of(outcomes: Sequence[Outcome]) -> Cell:
    """Summarise the runs."""
    accuracy, density = zip(*outcomes, strict=True)
    sd = statistics.stdev(accuracy)
    return Cell(statistics.fmean(accuracy), sd, statistics.fmean(density))


def measure(tasks: Iterable[Task], seeds: int) -> Table:
    """Refit on all training records with what was chosen, and test."""
    table: Table = {}
    for task in tasks:
        data = split(task.model, tuning=False)
        for way in WAYS:
            for epsilon, choice in zip(EPSILONS, CHOSEN[task.name, way.name], strict=True):
                if way.kind == "none" and epsilon != EPSILONS[0]:  # nothing depends on it
                    table[task.name, way.name, epsilon] = table[task.name, way.name, EPSILONS[0]]
                    continue
                same = table.get((task.name, way.density_of, epsilon))
                run = partial(train, task, data, way, choice, epsilon=epsilon)
                table[task.name, way.name, epsilon] = cell_of(
                    [run(seed=seed, density=same.density if same else 1.0) for seed in range(seeds)]
                )
            print(f"{task.name} {way.name}", file=sys.stderr, flush=True)
    return table


def tune(tasks: Iterable[Task], seeds: int) -> None:
    """Print the choices that are best on the validation quarter, in the form of `CHOSEN`."""
    for task in tasks:
        data = split(task.model, tuning=True)
        table: Table = {}
        for way in WAYS:
            chosen = []
            for epsilon in EPSILONS:
                same = table.get((task.name, way.density_of, epsilon))
                density = same.density if same else 1.0
                run = partial(train, task, data, way, epsilon=epsilon, density=density)
                choice, table[task.name, way.name, epsilon] = best_of(run, way, seeds)
                chosen.append(choice)
            figures = [f"{table[task.name, way.name, epsilon].mean:.3f}" for epsilon in EPSILONS]
            columns = [list(column) for column in zip(*chosen, strict=True)]
            lists = ", ".join(map(str, columns if way.kind == "svt" else columns[:1]))
            print(f"{(task.name, way.name)}: _choices({lists}),  # {' '.join(figures)}", flush=True)


def best_of(run: Callable[..., Outcome], way: Way, seeds: int) -> tuple[Choice, Cell]:
    """Choose the learning rate, and then, for svt, the share spent on choosing coordinates.

    The best has the highest mean less one sd: a rate at which some runs fail is no choice.
    """
    middle = SELECT_SHARES[1] if way.kind == "svt" else 0.0
    tried: dict[Choice, Cell] = {}

    def best() -> Choice:
        return max(tried, key=lambda choice: tried[choice].mean - tried[choice].sd)

    def try_all(choices: Iterable[Choice]) -> None:
        for choice in choices:
            if choice not in tried:
                runs = [run(choice=choice, seed=1000 + seed) for seed in range(seeds)]
                tried[choice] = cell_of(runs)

    try_all(Choice(rate, middle) for rate in RATES)
    if way.kind == "svt":
        rate = best().rate
        try_all(Choice(rate, share) for share in SELECT_SHARES)
    return best(), tried[best()]


def difference(one: Cell, other: Cell) -> float | None:
    """By how much one is better; None where twice the difference's own sd is more than that."""
    apart = one.mean - other.mean
    return None if abs(apart) < 2 * math.hypot(one.sd, other.sd) else apart


def rows_of(table: Table) -> list[Row]:
    """Means against the dense reference, their sd and how much was released."""
    rows = []
    for (task, way, epsilon), cell in table.items():
        name = f"utility/{task}/{way}/eps={epsilon}"
        dense = table[task, "gaussian", epsilon].mean
        baseline = f"{dense:.3f} gaussian"
        rows.append(Row(name, cell.mean, "accuracy", baseline, cell.mean / dense, "higher"))
        rows.append(Row(f"{name}/sd", cell.sd, "accuracy"))
        rows.append(Row(f"{name}/density", cell.density, "of coordinates"))
    return rows


def markdown(table: Table, tasks: Iterable[Task]) -> str:
    """The tables of accuracies and of differences."""
    lines = []
    heads = " | ".join(f"ε = {epsilon}" for epsilon in EPSILONS)
    for task in tasks:
        lines += [f"| {task.name}, {task.model.size} parameters | released | {heads} |"]
        lines += ["|---" * (2 + len(EPSILONS)) + "|"]
        for way in WAYS:
            cells = [table[task.name, way.name, epsilon] for epsilon in EPSILONS]
            density = [round(100 * cell.density) for cell in cells]
            spread = "-".join(str(share) for share in sorted({min(density), max(density)}))
            figures = " | ".join(f"{cell.mean:.3f} ± {cell.sd:.3f}" for cell in cells)
            lines += [f"| `{way.name}` | {spread} % | {figures} |"]
        lines += ["", f"| {task.name}: better by | {heads} |", "|---" * (1 + len(EPSILONS)) + "|"]
        for one, other in COMPARISONS:
            apart = [
                difference(table[task.name, one, e], table[task.name, other, e]) for e in EPSILONS
            ]
            figures = " | ".join("none" if by is None else f"{by:+.3f}" for by in apart)
            lines += [f"| `{one}` than `{other}` | {figures} |"]
        lines += [""]
    return "\n".join(lines)


def against_earlier(table: Table) -> str:
    """Say where a figure is below the simulation's, and by how much at worst."""
    lags = {}
    for (task, way), figures in EARLIER.items():
        for epsilon, figure in zip(EPSILONS, figures, strict=True):
            if (task, way, epsilon) in table:
                lags[task, way, epsilon] = figure - table[task, way, epsilon].mean
    worst = max(lags, key=lambda key: lags[key])
    over = [f"{'/'.join(map(str, key))} {-lag:+.3f}" for key, lag in lags.items() if lag > 0.03]
    return (
        f"Against the simulation: at worst {-lags[worst]:+.3f} ({'/'.join(map(str, worst))}); "
        f"further than .030 below: {', '.join(over) or 'nothing'}."
    )


def main() -> None:
    """Train and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, default=5, help="runs of each cell")
    arguments.add_argument("--quick", action="store_true", help="digits alone, two runs")
    arguments.add_argument("--table", action="store_true", help="print markdown")
    arguments.add_argument("--tune", action="store_true", help="choose on validation data")
    arguments.add_argument("--task", choices=[task.name for task in TASKS], help="one alone")
    args = arguments.parse_args()
    if args.seeds < 2:
        arguments.error("--seeds must be at least 2: one run has no sd")
    tasks = [task for task in TASKS if args.task in {None, task.name}]
    tasks, seeds = (tasks[:1], 2) if args.quick else (tasks, args.seeds)
    if args.tune:
        tune(tasks, seeds)
        return
    table = measure(tasks, seeds)
    if args.table:
        print(markdown(table, tasks))
        print(against_earlier(table))
        return
    show(rows_of(table), as_json=args.json)


if __name__ == "__main__":
    main()
