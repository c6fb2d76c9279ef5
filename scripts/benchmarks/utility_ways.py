"""The ways to release that `utility` compares, and what was chosen for each.

Map: `WAYS` -> `CHOSEN` (per epsilon of `EPSILONS`) -> `COMPARISONS`; `EARLIER` is what a simulation
with float noise gave before the product was written.

`CHOSEN` comes from `utility --tune --seeds 3`, which looks at a quarter of the training records and
never at the test records; that is not privately accounted. The conv net without noise was chosen by
the mean alone, without taking off one sd. Two controls of conv (`mask-2` at 100, `top-4` at 30)
were tuned again, with eight runs per rate, after a first test had shown that some runs failed.
Where the largest learning rate was chosen, no larger one was tried.

Not here: training, accuracy tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from p2pfed.privacy.svt import Schedule

__all__ = ["CHOSEN", "COMPARISONS", "EARLIER", "EPSILONS", "WAYS", "Choice", "Way"]

EPSILONS = (3, 10, 30, 100)


@dataclass(frozen=True, slots=True)
class Way:
    """A way to release.

    Attributes:
        name: As the rows call it.
        kind: What it does.
        one_in: About one coordinate in so many is released.
        schedule: Of `svt`.
    """

    name: str
    kind: Literal["none", "gaussian", "top", "svt", "mask"]
    one_in: int = 1
    schedule: Schedule = "auto"

    @property
    def density_of(self) -> str:
        """The way at whose density this one releases; itself where it is free to choose."""
        return f"svt-{self.one_in}" if self.kind in {"top", "mask"} else self.name


WAYS = (  # a control comes after the way whose density it takes
    Way("none", "none"),
    Way("gaussian", "gaussian"),
    Way("svt-2", "svt", 2),
    Way("svt-2-sequential", "svt", 2, "sequential"),
    Way("mask-2", "mask", 2),
    Way("top-2", "top", 2),
    Way("svt-4", "svt", 4),
    Way("mask-4", "mask", 4),
    Way("top-4", "top", 4),
    Way("svt-10", "svt", 10),
    Way("svt-10-segmented", "svt", 10, "segmented"),
    Way("mask-10", "mask", 10),
    Way("top-10", "top", 10),
)
COMPARISONS = (
    *(("svt-2", other) for other in ("gaussian", "mask-2", "top-2", "svt-2-sequential")),
    *(("svt-4", other) for other in ("gaussian", "mask-4", "top-4")),
    *(("svt-10", other) for other in ("gaussian", "mask-10", "top-10", "svt-10-segmented")),
)

# The float simulation by which the design was chosen, each mechanism at its best of a larger grid.
EARLIER: dict[tuple[str, str], tuple[float, float, float, float]] = {
    ("digits", "none"): (0.928, 0.928, 0.928, 0.928),
    ("digits", "gaussian"): (0.889, 0.912, 0.925, 0.928),
    ("digits", "svt-2"): (0.892, 0.910, 0.909, 0.910),
    ("digits", "svt-4"): (0.881, 0.899, 0.904, 0.911),
    ("digits", "svt-10"): (0.857, 0.879, 0.892, 0.892),
    ("digits", "mask-2"): (0.895, 0.905, 0.911, 0.911),
    ("digits", "mask-4"): (0.871, 0.899, 0.902, 0.903),
    ("digits", "mask-10"): (0.854, 0.871, 0.875, 0.875),
    ("digits", "top-2"): (0.890, 0.908, 0.919, 0.925),
    ("conv", "none"): (0.903, 0.903, 0.903, 0.903),
    ("conv", "gaussian"): (0.871, 0.904, 0.904, 0.907),
    ("conv", "svt-2"): (0.838, 0.891, 0.890, 0.894),
    ("conv", "svt-4"): (0.855, 0.877, 0.877, 0.879),
    ("conv", "mask-2"): (0.826, 0.888, 0.893, 0.894),
    ("conv", "mask-4"): (0.846, 0.873, 0.874, 0.873),
}


class Choice(NamedTuple):
    """What --tune chooses."""

    rate: float
    select_share: float = 0.0


def _choices(rates: Sequence[float], shares: Sequence[float] = (0.0,) * 4) -> tuple[Choice, ...]:
    return tuple(map(Choice, rates, shares))


# Chosen by --tune, per epsilon: the learning rate, and for svt the share spent on choosing.
CHOSEN: dict[tuple[str, str], tuple[Choice, ...]] = {
    ("digits", "none"): _choices([12.8, 12.8, 12.8, 12.8]),
    ("digits", "gaussian"): _choices([0.4, 6.4, 6.4, 12.8]),
    ("digits", "svt-2"): _choices([1.6, 6.4, 12.8, 12.8], [0.1, 0.1, 0.1, 0.2]),
    ("digits", "svt-2-sequential"): _choices([3.2, 12.8, 12.8, 12.8], [0.3, 0.3, 0.3, 0.2]),
    ("digits", "mask-2"): _choices([1.6, 12.8, 12.8, 12.8]),
    ("digits", "top-2"): _choices([0.8, 12.8, 12.8, 6.4]),
    ("digits", "svt-4"): _choices([3.2, 12.8, 3.2, 12.8], [0.1, 0.1, 0.1, 0.2]),
    ("digits", "mask-4"): _choices([12.8, 6.4, 12.8, 12.8]),
    ("digits", "top-4"): _choices([0.8, 6.4, 12.8, 12.8]),
    ("digits", "svt-10"): _choices([6.4, 6.4, 6.4, 6.4], [0.1, 0.2, 0.2, 0.1]),
    ("digits", "svt-10-segmented"): _choices([6.4, 12.8, 12.8, 12.8], [0.3, 0.1, 0.3, 0.2]),
    ("digits", "mask-10"): _choices([6.4, 6.4, 12.8, 12.8]),
    ("digits", "top-10"): _choices([0.8, 1.6, 6.4, 12.8]),
    ("conv", "none"): _choices([3.2, 3.2, 3.2, 3.2]),
    ("conv", "gaussian"): _choices([0.4, 1.6, 3.2, 3.2]),
    ("conv", "svt-2"): _choices([1.6, 6.4, 6.4, 6.4], [0.2, 0.1, 0.1, 0.2]),
    ("conv", "svt-2-sequential"): _choices([3.2, 3.2, 6.4, 6.4], [0.2, 0.2, 0.2, 0.1]),
    ("conv", "mask-2"): _choices([0.8, 3.2, 6.4, 6.4]),
    ("conv", "top-2"): _choices([0.4, 3.2, 3.2, 3.2]),
    ("conv", "svt-4"): _choices([1.6, 6.4, 12.8, 12.8], [0.1, 0.1, 0.3, 0.1]),
    ("conv", "mask-4"): _choices([1.6, 3.2, 12.8, 12.8]),
    ("conv", "top-4"): _choices([0.4, 3.2, 3.2, 3.2]),
    ("conv", "svt-10"): _choices([6.4, 12.8, 12.8, 6.4], [0.1, 0.1, 0.3, 0.3]),
    ("conv", "svt-10-segmented"): _choices([6.4, 12.8, 12.8, 12.8], [0.1, 0.2, 0.2, 0.2]),
    ("conv", "mask-10"): _choices([6.4, 12.8, 12.8, 12.8]),
    ("conv", "top-10"): _choices([0.8, 3.2, 3.2, 3.2]),
}
