"""FLamby's Fed-Heart-Disease without a server: our accuracies beside the published ones.

Protocol of FLamby (Ogier du Terrail et al. 2022, arXiv:2210.04620): four hospitals, logistic
regression on 13 features, 15 rounds of 100 SGD steps with batches of 4, weights by sample count,
seeds 42 to 46. Features and split are FLamby's (every hospital normalised by its own training
patients, "Pooled Test" by all training patients together); learning rates are those of its tuned
configuration, and a published figure is the mean over its result files, all read from --data.

Deltas, weights and outer optimisers are the product's own: every round is one `fold_round` over
dense int16 payloads with the constants of the published optimisers (beta2 .999, tau 1e-8, no bias
correction). `pairwise` are the product's meetings of pairs at FLamby's FedAvg rate, judged by the
mean over the models of the hospitals that are still there. `Scaffold` is the one that comes for
free: local steps corrected by the public mean delta, at a learning rate of .03 (FLamby's: .001).

Rows `/churn`: 20 % of the hospitals are offline in every round, and hospital 1 is gone for good at
half time. `/sd` is the standard deviation over the seeds. --data is a folder with `heart_disease`
and `flamby`; without it P2PFED_DATA, else ../shared/data beside the repository.
"""

from __future__ import annotations

import csv
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from plain import dense_delta, run_of
from rows import Row, parser, show

from p2pfed.gossip.fold import fold_round, genesis_state, view_of
from p2pfed.gossip.pairwise import exchange, from_grid, to_grid
from p2pfed.identity.run import Outer
from p2pfed.tasks.heart_disease import TEST_ROWS

ROUNDS, STEPS, BATCH = 15, 100, 4
SEEDS = range(42, 47)
FEATURES = 13
SITES = tuple(TEST_ROWS)
GRID_BITS = 14  # int16 holds deltas up to 2; the largest, Scaffold's, are near 1
PAIR_BITS = 20
GONE = 1  # the hospital that leaves at half time
FEDAVG = Outer("fedavg", 1.0)

Vector = NDArray[np.float32]
Rows = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class Hearts:
    """The data: features and labels by hospital, and the pooled test patients."""

    train: list[Rows]
    test: list[Rows]
    pooled: Rows


@dataclass(frozen=True)
class Strategy:
    """One line of the table.

    Attributes:
        name: Ours.
        published: Name of the published method; its baseline.
        learning_rate: Of local steps.
        outer: The outer optimiser.
        correct: Whether local steps are corrected by the public mean.
        meetings: Rounds of pairwise meetings in place of the fold; 0 is set mode.
    """

    name: str
    published: str
    learning_rate: float
    outer: Outer = FEDAVG
    correct: bool = False
    meetings: int = 0


def _published(name: str, learning_rate: float) -> Outer:
    return Outer(name, learning_rate, beta2=0.999, epsilon=1e-8, bias_correction=False)


STRATEGIES = (
    Strategy("FedAvg", "FedAvg100", 0.001),
    Strategy("FedAdam", "FedAdam100", 0.01, _published("fedadam", 0.01)),
    Strategy("FedYogi", "FedYogi100", 0.003162, _published("fedyogi", 0.01)),
    Strategy("FedAdagrad", "FedAdagrad100", 0.003162, _published("fedadagrad", 0.316228)),
    Strategy("Scaffold", "Scaffold100", 0.03, correct=True),
    Strategy("pairwise", "FedAvg100", 0.001, meetings=2),
)


# --- data --------------------------------------------------------------------------------------


def data_root(named: Path | None) -> Path:
    """Where all data sets are: as named, else P2PFED_DATA, else beside the repository."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    return named or Path(os.environ.get("P2PFED_DATA") or beside)


def folder_of(named: Path | None) -> Path:
    """Where the data is; ends the program with words if it is not there."""
    folder = data_root(named)
    needed = [folder / "heart_disease" / f"processed.{site}.data" for site in SITES]
    needed += [folder / "flamby" / f"heart_seed{seed}.csv" for seed in SEEDS]
    missing = [path for path in needed if not path.is_file()]
    if missing:
        sys.exit(
            f"{missing[0]} is missing\n  the folder must hold heart_disease/processed.*.data (UCI)"
            " and flamby/heart_seed*.csv (FLamby's results)\n  name it with --data or P2PFED_DATA"
        )
    return folder


def read_hearts(folder: Path) -> Hearts:
    """Rows, features, split and normalisation of FLamby's loader."""
    train, test = [], []
    for site in SITES:
        text = (folder / "heart_disease" / f"processed.{site}.data").read_text("ascii")
        kept = [[*row[:10], row[13]] for row in csv.reader(text.splitlines()) if row]
        rows = {i: [float(v) for v in row] for i, row in enumerate(kept) if "?" not in row}
        bits = TEST_ROWS[site][1]
        train.append(_features([row for i, row in rows.items() if not bits >> i & 1]))
        test.append(_features([row for i, row in rows.items() if bits >> i & 1]))
    everyone = np.concatenate([x for x, _ in train])
    pooled = (_normal(np.concatenate([x for x, _ in test]), everyone), _labels(test))
    return Hearts(
        [(_normal(x, x), y) for x, y in train],
        [(_normal(x, own), y) for (x, y), (own, _) in zip(test, train, strict=True)],
        pooled,
    )


def _features(rows: list[list[float]]) -> Rows:
    """Numbers as they are, chest pain (2-4) and ECG (1-2) as one column per level but the first."""
    table = np.array(rows)
    levels = [(2, 2.0), (2, 3.0), (2, 4.0), (6, 1.0), (6, 2.0)]
    numbers = table[:, [0, 1, 3, 4, 5, 7, 8, 9]]
    coded = [table[:, column] == level for column, level in levels]
    x = np.column_stack([numbers, *coded]).astype(np.float32)
    return x, (table[:, -1] > 0).astype(np.float32)


def _normal(x: NDArray[np.float32], by: NDArray[np.float32]) -> NDArray[np.float32]:
    return (x - by.mean(axis=0)) / (by.std(axis=0, ddof=1) + np.float32(1e-9))


def _labels(parts: list[Rows]) -> NDArray[np.float32]:
    return np.concatenate([y for _, y in parts])


def read_published(folder: Path) -> dict[tuple[str, str], tuple[float, float]]:
    """(method, "pooled" or "clients") -> mean and standard deviation over the seeds."""
    found: dict[tuple[str, str], list[float]] = {}
    for seed in SEEDS:
        text = (folder / "flamby" / f"heart_seed{seed}.csv").read_text("utf-8")
        by_method: dict[str, dict[str, float]] = {}
        for row in csv.DictReader(text.splitlines()):
            by_method.setdefault(row["Method"], {})[row["Test"]] = float(row["Metric"])
        for method, metrics in by_method.items():
            clients = [v for test, v in metrics.items() if test.startswith("client")]
            found.setdefault((method, "pooled"), []).append(metrics["Pooled Test"])
            found.setdefault((method, "clients"), []).append(statistics.mean(clients))
    return {key: (statistics.mean(v), statistics.stdev(v)) for key, v in found.items()}


# --- training ----------------------------------------------------------------------------------


class Hospital:
    """One hospital's patients in shuffled batches; an epoch goes on where the last round ended."""

    def __init__(self, rows: Rows, rng: np.random.Generator) -> None:
        self.x, self.y = rows
        self._rng = rng
        self._order: list[NDArray[np.int64]] = []

    def train(self, start: Vector, learning_rate: float, correction: Vector) -> Vector:
        """100 steps of SGD on the logistic loss; weights first, then the bias."""
        model = start.copy()
        for _ in range(STEPS):
            if not self._order:
                order = self._rng.permutation(self.y.size)
                self._order = np.array_split(order, range(BATCH, order.size, BATCH))[::-1]
            rows = self._order.pop()
            x, y = self.x[rows], self.y[rows]
            error = 1 / (1 + np.exp(-(x @ model[:-1] + model[-1]))) - y
            gradient = np.append(error @ x, error.sum()) / np.float32(rows.size)
            model -= np.float32(learning_rate) * (gradient + correction)
        return model


def accuracy(model: Vector, rows: Rows) -> float:
    """Share of patients on the right side."""
    x, y = rows
    return float(((x @ model[:-1] + model[-1] > 0) == (y > 0)).mean())


def first_model(seed: int) -> Vector:
    """The first model that torch makes from this seed, the same at all hospitals."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(FEATURES, 1)
    return torch.cat([model.weight[0], model.bias]).detach().numpy()


def presence(rng: np.random.Generator, *, churn: bool) -> list[list[int]]:
    """Which hospitals take part in each round."""
    table = rng.random((ROUNDS, len(SITES))) >= (0.2 if churn else 0.0)
    if churn:
        table[ROUNDS // 2 :, GONE] = False
    return [[int(i) for i in np.flatnonzero(row)] for row in table]


def train_set(hearts: Hearts, strategy: Strategy, seed: int, *, churn: bool) -> list[Vector]:
    """Set mode: every round is one fold; returns the model that all hospitals hold."""
    run = run_of(FEATURES + 1, strategy.outer, grid_bits=GRID_BITS, rounds=ROUNDS)
    rng = np.random.default_rng(seed)
    hospitals = [Hospital(rows, rng) for rows in hearts.train]
    state = genesis_state(first_model(seed), run)
    mean = np.zeros(FEATURES + 1, np.float32)
    corrections = [np.zeros_like(mean) for _ in hospitals]
    moved = strategy.learning_rate * STEPS
    for present in presence(np.random.default_rng(seed + 1), churn=churn):
        view = view_of(state, run.grid_bits)
        deltas, raw = [], {}
        for i in present:
            hospital = hospitals[i]
            delta = hospital.train(view, strategy.learning_rate, corrections[i]) - view
            deltas.append(dense_delta(delta, hospital.y.size, run))
            raw[i] = -delta / moved - corrections[i]
        fold_round(state, deltas, run, mean=mean)
        if strategy.correct:
            for i, gradient in raw.items():
                corrections[i] = -mean / moved - gradient
    return [view_of(state, run.grid_bits)]


def train_pairs(hearts: Hearts, strategy: Strategy, seed: int, *, churn: bool) -> list[Vector]:
    """Pairwise mode: meetings of random pairs after local training; returns their models."""
    run = run_of(FEATURES + 1, strategy.outer, grid_bits=PAIR_BITS, rounds=ROUNDS)
    rng = np.random.default_rng(seed)
    hospitals = [Hospital(rows, rng) for rows in hearts.train]
    genesis = from_grid(genesis_state(first_model(seed), run).model)
    models = [genesis.copy() for _ in hospitals]
    none = np.zeros(FEATURES + 1, np.float32)
    unit = np.float32(2.0**-PAIR_BITS)
    meet = np.random.default_rng(seed + 2)
    for present in presence(np.random.default_rng(seed + 1), churn=churn):
        for i in present:
            view = to_grid(models[i]).astype(np.float32) * unit
            step = hospitals[i].train(view, strategy.learning_rate, none) - view
            models[i] += from_grid(np.rint(step / unit).astype(np.int32))
        for _ in range(strategy.meetings):
            order = meet.permutation(present)
            for i, j in zip(order[::2], order[1::2], strict=False):
                sizes = hospitals[i].y.size, hospitals[j].y.size
                models[i], models[j] = exchange(
                    models[i], models[j], *sizes, genesis=genesis, chance=meet.bytes
                )
    there = [model for i, model in enumerate(models) if not (churn and i == GONE)]
    return [to_grid(model).astype(np.float32) * unit for model in there]


def figures(hearts: Hearts, strategy: Strategy, *, churn: bool) -> dict[str, list[float]]:
    """Accuracy by seed, on the pooled test and as mean over the hospitals' own tests."""
    train: Callable[..., list[Vector]] = train_pairs if strategy.meetings else train_set
    found: dict[str, list[float]] = {"pooled": [], "clients": []}
    for seed in SEEDS:
        models = train(hearts, strategy, seed, churn=churn)
        own = [accuracy(model, test) for model in models for test in hearts.test]
        found["pooled"].append(statistics.mean(accuracy(m, hearts.pooled) for m in models))
        found["clients"].append(statistics.mean(own))
    return found


def rows_of(hearts: Hearts, published: dict[tuple[str, str], tuple[float, float]]) -> list[Row]:
    """The table."""
    rows = []
    for strategy in STRATEGIES:
        for churn in (False, True):
            for test, values in figures(hearts, strategy, churn=churn).items():
                mean, sd = published[strategy.published, test]
                name = f"flamby/{strategy.name}{'/churn' if churn else ''}/{test}"
                value = statistics.mean(values)
                baseline = f"{mean:.3f} +- {sd:.3f} published for {strategy.published}"
                rows.append(Row(name, value, "accuracy", baseline, value / mean, "higher"))
                rows.append(Row(f"{name}/sd", statistics.stdev(values), "accuracy"))
    return rows


def main() -> None:
    """Read, train, print."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, help="folder with heart_disease and flamby")
    args = arguments.parse_args()
    folder = folder_of(args.data)
    show(rows_of(read_hearts(folder), read_published(folder)), as_json=args.json)


if __name__ == "__main__":
    main()
