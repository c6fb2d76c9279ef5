"""The three mechanisms, one sum type: `svt`, `gaussian` and `none`.

Map: `make_plan` (by name) -> a public plan -> `clipped_total` (validation; spends nothing) ->
`draw` (the randomised release).

Invariant: a release is a function of the plan, the clipped contributions and fresh random words;
`draw` must run only after its cost is durably debited (`gate`).

Not here: the proofs of the sparse vector technique (`svt`), budgets (`ledger`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal, assert_never

import numpy as np
from numpy.typing import NDArray

from p2pfed.errors import UpdateRejected
from p2pfed.privacy.accountant import NANO, Cost, rho_nano_cost
from p2pfed.privacy.noise import RandomWords, discrete_gaussian
from p2pfed.privacy.svt import Release, SvtPlan, release_values, select
from p2pfed.privacy.units import Contributions, clipped_sum, grid_limit

__all__ = [
    "GaussianPlan",
    "MechanismName",
    "NoPrivacyPlan",
    "Plan",
    "clipped_total",
    "draw",
    "make_plan",
    "top_k",
]

MechanismName = Literal["svt", "gaussian", "none"]

_MAX_GRID = 1 << 53  # every integer up to here is a float64


@dataclass(frozen=True, slots=True, kw_only=True)
class GaussianPlan:
    """Discrete Gaussian noise on every coordinate; the accuracy reference.

    Formal guarantee: under zero-out of one patient the sum moves by at most `limit` in L2, the
    noise has variance parameter limit^2 / (2 rho), so a release is rho-zCDP (Canonne et al. 2020,
    Theorem 14). Keeping the largest *noisy* values is post-processing and costs nothing.

    Attributes:
        num_parameters: Length D of an update.
        clip: L2 bound of one patient's contribution, in the update's own units.
        bits: The grid is 2^-bits.
        rho: zCDP paid, at least 1e-9.
        fraction: Share of the noisy values that is sent, in (0, 1].

    Raises:
        ValueError: A value is out of range.
    """

    mechanism: ClassVar[Literal["gaussian"]] = "gaussian"

    num_parameters: int
    clip: Fraction | float
    bits: int
    rho: Fraction
    fraction: Fraction | float = Fraction(1)

    def __post_init__(self) -> None:
        _check(self.num_parameters, self.fraction)
        grid_limit(self.clip, self.bits)
        if self.rho < Fraction(1, NANO):  # keeps the noise scale in range
            raise ValueError(f"rho={self.rho} must be at least 1e-9")

    @property
    def limit(self) -> int:
        """L2 bound of one contribution in grid units."""
        return grid_limit(self.clip, self.bits)

    @property
    def rho_nano(self) -> int:
        """The cost in nano-rho, rounded up."""
        return rho_nano_cost(self.rho)

    @property
    def cost(self) -> Cost:
        """What a release costs."""
        return Cost.zcdp(self.rho)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoPrivacyPlan:
    """No privacy at all: the largest coordinates of the true sum leave as they are.

    Formal guarantee: none. Sparsity does not protect patients.

    Attributes:
        num_parameters: Length D of an update.
        bits: The grid is 2^-bits.
        fraction: Share of the coordinates that is sent, in (0, 1].

    Raises:
        ValueError: A value is out of range.
    """

    mechanism: ClassVar[Literal["none"]] = "none"
    rho_nano: ClassVar[int] = 0

    num_parameters: int
    bits: int
    fraction: Fraction | float = Fraction(1)

    def __post_init__(self) -> None:
        _check(self.num_parameters, self.fraction)
        if not 0 <= self.bits <= 52:
            raise ValueError(f"bits={self.bits} must be 0 to 52")

    @property
    def cost(self) -> Cost:
        """Nothing: no budget covers it."""
        return Cost.nothing()


Plan = SvtPlan | GaussianPlan | NoPrivacyPlan


def make_plan(
    mechanism: MechanismName,
    *,
    num_parameters: int,
    clip: Fraction | float,
    bits: int,
    rho: Fraction,
    shuffle_seed: bytes,
    fraction: Fraction | float = Fraction(1),
    **svt: Any,
) -> Plan:
    """Return the plan of the named mechanism for one round.

    Args:
        mechanism: "svt", "gaussian" or "none".
        num_parameters: Length D of an update.
        clip: L2 bound of one contribution; not used by "none".
        bits: The grid is 2^-bits.
        rho: zCDP to spend at most; not used by "none".
        shuffle_seed: Public, new in every round; used by "svt" alone.
        fraction: Share sent by "gaussian" and "none"; "svt" sends about 1 in `segment_blocks`.
        **svt: Further arguments of `SvtPlan.for_budget`.

    Raises:
        ValueError: A value is out of range or the mechanism is unknown.
    """
    match mechanism:
        case "svt":
            return SvtPlan.for_budget(
                rho,
                num_parameters=num_parameters,
                clip=clip,
                bits=bits,
                shuffle_seed=shuffle_seed,
                **svt,
            )
        case "gaussian":
            return GaussianPlan(
                num_parameters=num_parameters, clip=clip, bits=bits, rho=rho, fraction=fraction
            )
        case "none":
            return NoPrivacyPlan(num_parameters=num_parameters, bits=bits, fraction=fraction)
    raise ValueError(f"mechanism={mechanism!r} is unknown; use 'svt', 'gaussian' or 'none'")


def clipped_total(plan: Plan, contributions: Contributions) -> NDArray[np.int64]:
    """Validate the contributions and return their exact clipped sum; spends nothing.

    Args:
        plan: The public plan.
        contributions: One row per patient.

    Returns:
        (D,) int64 in grid units; private, must not leave.

    Raises:
        UpdateRejected: NaN, infinity, wrong shape, no patient, or too large for the grid.
    """
    if contributions.num_parameters != plan.num_parameters:
        raise UpdateRejected(
            f"an update of {contributions.num_parameters} parameters",
            f"the model has {plan.num_parameters}",
        )
    if isinstance(plan, NoPrivacyPlan):
        return _plain_sum(plan, contributions)
    return clipped_sum(contributions, limit=plan.limit, bits=plan.bits)


def draw(
    plan: Plan, total_D: NDArray[np.int64], contributions: Contributions, stream: RandomWords
) -> Release:
    """Draw the release; call it only when its cost is durably debited.

    Args:
        plan: The public plan.
        total_D: (D,) what `clipped_total` returned.
        contributions: One row per patient; "svt" reads them a second time.
        stream: Fresh random words.

    Returns:
        What may leave.

    Raises:
        UpdateRejected: The second reading holds NaN, infinity or has the wrong shape.
    """
    match plan:
        case SvtPlan():
            return release_values(plan, contributions, select(plan, total_D, stream), stream)
        case GaussianPlan():
            sigma2 = Fraction(plan.limit**2) / (2 * plan.rho)
            return top_k(total_D + discrete_gaussian(stream, total_D.size, sigma2), plan.fraction)
        case NoPrivacyPlan():
            return top_k(total_D, plan.fraction)
        case _:
            assert_never(plan)


def top_k(update_D: NDArray[np.int64], fraction: Fraction | float) -> Release:
    """Keep the largest values by magnitude, at least one.

    Private only if `update_D` already is (post-processing); applied to a true update it protects
    nobody.

    Args:
        update_D: (D,) int64.
        fraction: Share to keep, in (0, 1].
    """
    keep = math.ceil(Fraction(fraction) * update_D.size)
    if keep == update_D.size:
        return Release(np.arange(keep), update_D)
    largest = np.argpartition(-np.abs(update_D), keep - 1)[:keep]
    indices = np.sort(largest)
    return Release(indices, update_D[indices])


def _plain_sum(plan: NoPrivacyPlan, contributions: Contributions) -> NDArray[np.int64]:
    total_D = np.zeros(plan.num_parameters)
    for rows_ND in contributions.chunks():
        if rows_ND.ndim != 2 or rows_ND.shape[1] != plan.num_parameters:
            raise UpdateRejected(
                f"contributions of shape {rows_ND.shape}", f"expected (any, {plan.num_parameters})"
            )
        with np.errstate(invalid="ignore", over="ignore"):  # refused below
            total_D += rows_ND.sum(axis=0, dtype=np.float64)
    grid_D = total_D * 2.0**plan.bits
    if not (np.abs(grid_D) < _MAX_GRID).all():  # NaN fails as well
        raise UpdateRejected(
            "an update holds NaN, infinity or a number too large for the grid",
            "it cannot be averaged, so nothing was released",
            "Look at the learning rate and at the data of this hospital.",
        )
    return np.rint(grid_D).astype(np.int64)


def _check(num_parameters: int, fraction: Fraction | float) -> None:
    if num_parameters < 1:
        raise ValueError(f"num_parameters={num_parameters} must be at least 1")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} must be in (0, 1]")
