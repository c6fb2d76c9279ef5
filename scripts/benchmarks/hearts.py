"""Heart disease, four hospitals, real daemons: what privacy costs, beside FLamby's DP figures.

Every figure is the accuracy of the common model after 30 rounds of four daemons on loopback, on all
hospitals' test patients pooled and as mean over the hospitals' own tests; mean and standard
deviation over the seeds. A seed fixes the first model; the noise is new in every run. All daemons
must end on one model hash, and no hospital may spend more than its budget. Unit patient
(zero-out: a patient's whole contribution is replaced by zeros), delta 1e-5, each hospital pays for
its own patients. The constants are those of `p2pfed demo` for every mechanism and epsilon; none was
chosen for this table. Its run without privacy has FedAvg and the private ones FedAdam, so there is
a second line without privacy, `none-fedadam`, with theirs.

FLamby (Ogier du Terrail et al. 2022, arXiv:2210.04620) published the mean over the hospitals' own
tests of FedAvg whose hospitals run DP-SGD (one record is one patient; seeds 42 to 46) for deltas
down to 1e-4. It normalises by each hospital's own mean and deviation, which that epsilon does not
cover; the task here uses public constants, so its figures without privacy differ too.

--data is a folder with `heart_disease` and `flamby`; without it P2PFED_DATA, else ../shared/data
beside the repository. --table prints Markdown.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from flamby import folder_of
from rows import Row, parser, show
from whole_run import whole_run

from p2pfed.demo.plan import Cast, heart_disease, run_constants
from p2pfed.gossip.fold import genesis_state, model_hash
from p2pfed.training.local import evaluate
from p2pfed.training.task import Split, Task, load_task

ROUNDS = 30
DEADLINE = 300.0
TESTS = {"pooled": "all tests pooled", "hospitals": "mean over hospitals"}
DELTA_PUBLISHED = 1e-4  # the smallest that FLamby has


@dataclass(frozen=True)
class Way:
    """One line of the table.

    Attributes:
        mechanism: Of the run.
        epsilon: Of the run and of every hospital for life; 0 without privacy.
        as_private: Whether a run without privacy has the outer optimiser of the private ones.
    """

    mechanism: str
    epsilon: int
    as_private: bool = False

    @property
    def label(self) -> str:
        """As the table calls it."""
        return f"{self.mechanism}-fedadam" if self.as_private else self.mechanism

    @property
    def name(self) -> str:
        """As rows call it."""
        return f"{self.label}/epsilon={self.epsilon}" if self.epsilon else self.label

    @property
    def constants(self) -> dict[str, Any]:
        """The demo's constants of such a run."""
        made = run_constants(self.mechanism, rounds=ROUNDS, epsilon=Fraction(self.epsilon))
        if self.as_private:
            like = run_constants("gaussian", rounds=ROUNDS, epsilon=Fraction(5))
            made["outer"] = like["outer"]
        return {**made, "min_round_interval_s": 0.2}  # nobody is watching


WAYS = (
    Way("none", 0),
    Way("none", 0, as_private=True),
    Way("gaussian", 5),
    Way("svt", 5),
    Way("svt", 50),
)


def main() -> int:
    """Measure and print; returns the exit code."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, help="folder with heart_disease and flamby")
    options.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1")
    options.add_argument("--table", action="store_true", help="print Markdown")
    args = options.parse_args()
    if args.seeds < 2:
        options.error("--seeds must be at least 2: the table has standard deviations")
    folder = folder_of(args.data)
    published = read_published(folder / "flamby" / "dp_heart.csv")
    whole = heart_disease(folder / "heart_disease")
    cast = replace(whole, hospitals=tuple(h for h in whole.hospitals if h.trains))
    found: dict[Way, list[dict[str, float]]] = {way: [] for way in WAYS}
    for seed in range(args.seeds):  # seed by seed: a slow hour touches all ways alike
        for way in WAYS:
            found[way].append(federate(cast, way, seed))
            told = ", ".join(f"{k} {v:.3f}" for k, v in found[way][-1].items())
            print(f"seed {seed} {way.name}: {told}", file=sys.stderr, flush=True)
    nobody = constant(cast)
    if args.table:
        print(table(found, published, nobody))
    else:
        show(rows_of(found, published, nobody), as_json=args.json)
    return 0


def federate(cast: Cast, way: Way, seed: int) -> dict[str, float]:
    """One run of real daemons; the accuracies of the model that all of them end on.

    Raises:
        TimedOut: The daemons did not end on one model.
        RuntimeError: A hospital spent more than its budget, or the model's file is another.
    """
    ended = whole_run(
        cast,
        way.constants,
        name=f"hearts-{way.label}-{seed}",
        seed=seed,
        epsilon=str(way.epsilon),
        deadline=DEADLINE,
    )
    states, model = ended.states, ended.model
    spent = max(state["privacy"]["spent_epsilon"] for state in states)
    if model_hash(genesis_state(model, ended.run)).hex() != states[0]["run"]["model_hash"]:
        raise RuntimeError("the model on disk is not the one whose hash the daemons tell")
    if way.epsilon and spent > way.epsilon:
        raise RuntimeError(f"epsilon {spent} was spent, the budget is {way.epsilon}")
    releases = min(state["run"]["own_deltas"] for state in states)
    own_spent = {"spent": spent if way.epsilon else 0.0, "releases": float(releases)}
    return {**_accuracies(cast, lambda task, test: evaluate(task, model, test)), **own_spent}


def constant(cast: Cast) -> dict[str, float]:
    """The accuracies of the answer "ill" for everybody, which needs no patient."""
    return _accuracies(cast, lambda _, test: {"accuracy": float((test.y > 0).float().mean())})


def _accuracies(
    cast: Cast, measured: Callable[[Task, Split], dict[str, float]]
) -> dict[str, float]:
    task = load_task(cast.task)
    tests = [task.data(cast.data, hospital.options).test for hospital in cast.hospitals]
    own = [measured(task, test)["accuracy"] for test in tests]
    sizes = [len(test.x) for test in tests]
    pooled = sum(value * size for value, size in zip(own, sizes, strict=True)) / sum(sizes)
    return {"pooled": pooled, "hospitals": statistics.mean(own)}


def read_published(path: Path) -> dict[int, list[float]]:
    """Epsilon of our runs (0: without privacy) -> FLamby's figures by seed, smallest delta."""
    found: dict[int, list[float]] = {way.epsilon: [] for way in WAYS}
    for row in csv.DictReader(path.read_text("utf-8").splitlines()):
        epsilon, delta = float(row["e"] or 0), float(row["d"] or DELTA_PUBLISHED)
        if epsilon in found and delta == DELTA_PUBLISHED:
            found[int(epsilon)].append(float(row["perf"]))
    return found


def rows_of(
    found: dict[Way, list[dict[str, float]]],
    published: dict[int, list[float]],
    nobody: dict[str, float],
) -> list[Row]:
    """The figures as rows; those that FLamby has too beside its own."""
    rows = [Row(f"hearts/always-ill/{test}", nobody[test], "accuracy") for test in TESTS]
    for way, runs in found.items():
        for test in TESTS:
            values = [one[test] for one in runs]
            name, value = f"hearts/{way.name}/{test}", statistics.mean(values)
            row = Row(name, value, "accuracy", better="higher")
            if test == "hospitals":
                theirs = published[way.epsilon]
                mean, sd = statistics.mean(theirs), statistics.stdev(theirs)
                how = "FedAvg with DP-SGD" if way.epsilon else "FedAvg"
                baseline = f"{mean:.3f} +- {sd:.3f} published for {how}"
                row = replace(row, baseline=baseline, ratio=value / mean)
            rows += [row, Row(f"{name}/sd", statistics.stdev(values), "accuracy")]
        if way.epsilon:
            spent = max(one["spent"] for one in runs)
            rows.append(Row(f"hearts/{way.name}/spent", spent, "epsilon", better="lower"))
            fewest = min(one["releases"] for one in runs)
            rows.append(Row(f"hearts/{way.name}/fewest_releases", fewest, "rounds"))
    return rows


def table(
    found: dict[Way, list[dict[str, float]]],
    published: dict[int, list[float]],
    nobody: dict[str, float],
) -> str:
    """The figures as Markdown."""
    seeds = f"0 to {len(next(iter(found.values()))) - 1}"
    heads = ("who", "mechanism", "ε", "δ", "unit", *TESTS.values(), "seeds")
    lines = [heads, ("---",) * len(heads)]
    lines.append(("-", 'always "ill"', *"---", *(f"{nobody[test]:.3f}" for test in TESTS), "-"))
    for way, runs in found.items():
        paid = (str(way.epsilon), "1e-5", "patient") if way.epsilon else ("no privacy", "-", "-")
        cells = [_spread([one[test] for one in runs]) for test in TESTS]
        lines.append(("p2pfed", f"`{way.label}`", *paid, *cells, seeds))
    for epsilon, values in published.items():
        paid = (str(epsilon), "1e-4", "record") if epsilon else ("no privacy", "-", "-")
        how = "FedAvg, DP-SGD" if epsilon else "FedAvg"
        lines.append(("FLamby", how, *paid, "-", _spread(values), "42 to 46"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    sys.exit(main())
