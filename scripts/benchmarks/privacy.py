"""Releases of the privacy gate: time and memory against numpy's Laplace and a float filter.

Sizes d = 10^6, 10^7, 2.5 10^7 and shares q = 10 %, 1 %, 0.01 %. All measures of one size and share
are taken in turn, and their medians compared. Baselines:

* `numpy-laplace`: `Generator.laplace(size=d)` and nothing else.
* `float-svt`: the textbook filter as one would write it in numpy: Laplace noise on |x|, one noisy
  threshold, at most c = q d random ones of those above, Laplace noise on these. It is asserted to
  take at most twice `numpy-laplace`. Its threshold is l2 ln(d / c) like ours, less l2 ln 2: Laplace
  noise has two sides, and without that it would release half as many. Both release within 10 % of
  the same number on average (asserted).

Ours starts where the filter starts, with the sum of the clipped contributions, and draws exactly:
`svt-textbook` in pure epsilon, and `svt`, the default, at the threshold that it steers itself to,
second clip of one contribution included. `/memory` is the peak beside what was given, against 8
bytes for every released number plus 2 MB; the one row of the second clip is the patient's chunk
and not counted.

`samplers`: millions of exact numbers a second, against numpy's float `laplace` and `normal`.
`contributions`: one vector per patient against one plain gradient of the same batch; `/sum` adds
clipping, rounding and the exact sum.
"""

from __future__ import annotations

import math
import time
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from rows import Row, interleaved, parser, show
from torch import Tensor, nn

from p2pfed.privacy.clipping import Ball, clipped_sum
from p2pfed.privacy.keystream import KeyStream
from p2pfed.privacy.mechanism import Mechanism
from p2pfed.privacy.noise import ExactNoise, discrete_gaussian, discrete_laplace
from p2pfed.privacy.svt import SvtPlan, next_threshold
from p2pfed.privacy.textbook import TextbookPlan
from p2pfed.privacy.units import Contributions, PatientRows
from p2pfed.training.contributions import PatientContributions
from p2pfed.training.local import initial_vector
from p2pfed.training.task import Options, Split, Task, TaskData

SIZES = (10**6, 10**7, 25 * 10**6)
SHARES = (0.1, 0.01, 1e-4)
PATIENTS = 1000
EPSILON = Fraction(4)
RHO = Fraction(1)
BLOCK = 32
DRAWS = 9  # the noise of one threshold alone moves the number by some percent


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that it holds at a time beside what was there."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def float_svt(
    x: np.ndarray, plan: TextbookPlan, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The textbook filter in floats, see the module docstring."""
    l1, l2, l3 = (float(scale) for scale in plan.scales)
    threshold = l2 * math.log(x.size / plan.cutoff / 2) + rng.laplace(scale=l1)
    noisy = rng.laplace(scale=l2, size=x.size)
    noisy += np.abs(x)
    accepted = np.flatnonzero(noisy >= threshold)
    if accepted.size > plan.cutoff:
        accepted = rng.choice(accepted, plan.cutoff, replace=False, shuffle=False)
        accepted.sort()
    return accepted, x[accepted] + rng.laplace(scale=l3, size=accepted.size)


class Many:
    """Stands for the patients that the sum is of; the textbook form reads their number alone."""

    num_patients = PATIENTS


def textbook_plan(size: int, share: float) -> TextbookPlan:
    """Numbers are cut at 1 grid unit, so that no noise leaves 32 bits."""
    return TextbookPlan(
        num_parameters=size, clip=1, bits=0, epsilon=EPSILON, cutoff=max(1, round(size * share))
    )


def default_plan(size: int, share: float, row: PatientRows) -> SvtPlan:
    """The default, at the threshold that it has steered itself to."""
    plan = SvtPlan.for_budget(
        RHO,
        num_parameters=size,
        clip=1,
        bits=16,
        shuffle_seed=b"bench",
        block_size=BLOCK,
        segment_blocks=round(1 / share),
    )
    total = plan.total(row)
    for _ in range(12):
        plan = plan.at_threshold(next_threshold(plan, plan.draw(total, row, ExactNoise())))
    return plan


def releases(times: int, sizes: tuple[int, ...]) -> list[Row]:
    """All rows of one release."""
    rng = np.random.default_rng(5)
    rows = []
    for size in sizes:
        row = PatientRows(
            rng.standard_t(
                3,
                (1, size),
            ).astype(np.float32)
        )
        row.rows[:] /= np.linalg.norm(row.rows)
        whole = np.rint(rng.standard_t(3, size) * math.sqrt(PATIENTS)).astype(np.int32)
        np.clip(whole, -PATIENTS, PATIENTS, out=whole)
        for share in SHARES:
            rows += one_release(rng, row, whole, share=share, times=times)
    return rows


def one_release(
    rng: np.random.Generator, row: PatientRows, whole: np.ndarray, *, share: float, times: int
) -> list[Row]:
    """The rows of one size and share."""
    size, floats = whole.size, whole.astype(np.float32)
    textbook, default = textbook_plan(size, share), default_plan(size, share, row)
    total = default.total(row)

    def draw(plan: Mechanism, total: np.ndarray, given: Contributions) -> int:
        return plan.draw(total, given, ExactNoise()).indices.size

    laplace, filtered, ours, ours_default = interleaved(
        [
            lambda: seconds(lambda: rng.laplace(size=size)),
            lambda: seconds(lambda: float_svt(floats, textbook, rng)),
            lambda: seconds(lambda: draw(textbook, whole, Many())),
            lambda: seconds(lambda: draw(default, total, row)),
        ],
        times,
    )
    assert filtered <= 2 * laplace, f"float-svt took {filtered / laplace:.2f} x numpy-laplace"
    theirs = np.mean([float_svt(floats, textbook, rng)[0].size for _ in range(DRAWS)])
    mine = np.mean([draw(textbook, whole, Many()) for _ in range(DRAWS)])
    assert abs(mine - theirs) <= 0.1 * theirs, f"{mine} and {theirs} were released"
    where = f"d={size:.3g}/q={share:g}".replace("e+0", "e")
    found = [
        Row(
            f"privacy/float-svt/{where}",
            1e3 * filtered,
            "ms",
            "numpy-laplace",
            filtered / laplace,
            "lower",
        ),
    ]
    for name, took in (("svt-textbook", ours), ("svt", ours_default)):
        for baseline, base in (("float-svt", filtered), ("numpy-laplace", laplace)):
            found.append(
                Row(
                    f"privacy/{name}/{where}",
                    1e3 * took,
                    "ms",
                    f"speed of {baseline}",
                    base / took,
                    "higher",
                )
            )
    for name, work, given in (
        ("svt-textbook", lambda: draw(textbook, whole, Many()), 0),
        ("svt", lambda: draw(default, total, row), 4),
    ):
        released = work()
        peak = peak_bytes(work) - given * released
        allowed = 8 * released + 2 * 10**6
        found.append(
            Row(
                f"privacy/{name}/{where}/memory",
                peak / 1e6,
                f"MB for {released} numbers",
                "8 bytes each + 2 MB",
                peak / allowed,
                "lower",
            )
        )
    return found


def samplers(times: int) -> list[Row]:
    """Millions a second."""
    rng, stream, count = np.random.default_rng(), KeyStream(), 10**6
    rows = []
    for name, exact, floats in (
        *(
            (
                f"laplace/scale={scale}",
                lambda s=Fraction(scale): discrete_laplace(stream, count, s),
                lambda: rng.laplace(size=count),
            )
            for scale in (3, 1000, 10**6)
        ),
        *(
            (
                f"gaussian/sigma={sigma}",
                lambda s=Fraction(sigma) ** 2: discrete_gaussian(stream, count, s),
                lambda: rng.normal(size=count),
            )
            for sigma in (3, 1000, 10**6)
        ),
    ):
        mine, theirs = interleaved([lambda w=exact: seconds(w), lambda w=floats: seconds(w)], times)
        rows.append(
            Row(
                f"privacy/samplers/{name}",
                count / mine / 1e6,
                "M/s",
                f"speed of numpy's float {name.partition('/')[0]}",
                theirs / mine,
                "higher",
            )
        )
    return rows


class Batch(Task):
    """A model on random records, one per patient."""

    def __init__(self, name: str, model: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
        self.label, self._model, self.shape = name, model, shape

    name = "batch"

    def model(self) -> nn.Module:
        """As it was given."""
        return self._model()

    def data(self, folder: Path | None, options: Options) -> TaskData:  # noqa: ARG002 - no files
        """Random records."""
        x = torch.randn(self.shape)
        split = Split(x, torch.randint(0, 10, (len(x),)), torch.arange(len(x)))
        return TaskData(split, split)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(output, target, reduction="none")

    def metrics(self, model: nn.Module, split: Split) -> dict[str, float]:  # noqa: ARG002
        """Nothing is measured."""
        return {}


def conv() -> nn.Module:
    """A small picture model."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(1568, 10),
    )


MODELS = (
    Batch("linear", lambda: nn.Linear(64, 10), (1024, 64)),
    Batch(
        "mlp", lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), (256, 64)
    ),
    Batch("conv", conv, (64, 1, 28, 28)),
    Batch(
        "mlp-large",
        lambda: nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10)),
        (64, 784),
    ),
)


def contributions(times: int) -> list[Row]:
    """One vector per patient against one gradient of the batch."""
    torch.manual_seed(0)
    rows = []
    for task in MODELS:
        split = task.data(None, {}).train
        vector = initial_vector(task, seed=0)
        mine, model = PatientContributions(task, vector, split), task.model()

        def plain(task: Task = task, split: Split = split, model: nn.Module = model) -> None:
            model.zero_grad(set_to_none=True)
            task.loss(model(split.x), split.y).mean().backward()

        def read(mine: PatientContributions = mine) -> None:
            for _ in mine.chunks():
                pass

        def add(mine: PatientContributions = mine) -> None:
            clipped_sum(mine, bound=Ball(1 << 16), bits=16)

        base, vectors, summed = interleaved(
            [lambda w=work: seconds(w) for work in (plain, read, add)], times
        )
        name = f"privacy/contributions/{task.label}/P={len(vector)}/patients={len(split.x)}"
        for label, took in ((name, vectors), (f"{name}/sum", summed)):
            rows.append(Row(label, 1e3 * took, "ms", "plain batch gradient", took / base, "lower"))
    return rows


def main() -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--times", type=int, default=5, help="measures per figure")
    arguments.add_argument("--quick", action="store_true", help="the smallest size only")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    for rows in (
        samplers(args.times),
        contributions(2 * args.times + 1),
        releases(args.times, SIZES[:1] if args.quick else SIZES),
    ):
        show(rows, as_json=args.json)


if __name__ == "__main__":
    main()
