"""From a run file to the public plans of its rounds: mechanism, cost, grid and worth gate.

Map: `Budgeted` (what one release may cost) -> `plan_for` (the mechanism's plan of one round) and
`worth_plan`; `contributions_of` is what a sum is divided by. Here a run file is only read: what
follows from its numbers is `privacy.shares`, which `p2pfed privacy plan` asks as well.

Invariant: everything here is computed from the run file, the round and the roster's number of
patients, all public, so every figure may be told, and the same round always has the same plan.
`releases` x `cost` stays within the run's epsilon.

Not here: contributions, the ledger, the threshold's steering (`round`).
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Self, cast

from p2pfed.identity.run import Run
from p2pfed.privacy.accountant import NANO
from p2pfed.privacy.mechanism import Mechanism
from p2pfed.privacy.mechanisms import MechanismName, make_plan
from p2pfed.privacy.shares import Share, clip_of_one, contributions, grid_bits
from p2pfed.privacy.units import PrivacyUnit, Unit
from p2pfed.privacy.worth import WorthPlan

__all__ = ["Budgeted", "contributions_of", "plan_for", "unit_of", "worth_plan"]


class Budgeted(Share):
    """What one release of a run may cost: equal shares of the run's budget."""

    __slots__ = ()

    @classmethod
    def of(cls, run: Run) -> Self:
        """The share of each of the run's releases; nothing with mechanism `none`."""
        return cls.of_budget(
            run.mechanism,
            epsilon=float(run.epsilon),
            delta=float(run.delta),
            releases=run.releases,
            asking=run.gate.worth_share if run.gate.worth_releases else Fraction(0),
        )


def unit_of(run: Run) -> Unit:
    """Whom the run protects; without a mechanism the hospital makes one contribution."""
    if run.unit == "none":
        return Unit("hospital")
    return Unit(cast(PrivacyUnit, run.unit), run.gate.patients_per_row)


def contributions_of(run: Run, samples: int) -> int:
    """How many contributions a hospital of `samples` patients makes; public.

    Args:
        run: The run.
        samples: The hospital's number of patients in the roster.
    """
    return contributions(unit_of(run), samples)


def plan_for(run: Run, samples: int, *, seed: bytes, threshold: int | None = None) -> Mechanism:
    """Return the plan of one round.

    Args:
        run: The run.
        samples: The hospital's number of patients in the roster: public.
        seed: Public, new in every round.
        threshold: Of `svt`, in grid units; None for a fair start.

    Raises:
        ValueError: The run's numbers make no plan.
    """
    if run.mechanism == "none":
        least = Fraction(1, run.num_parameters)
        return make_plan(
            "none",
            num_parameters=run.num_parameters,
            clip=run.clip,
            bits=run.grid_bits,
            budget=Fraction(0),
            shuffle_seed=seed,
            fraction=max(run.top_fraction, least),
        )
    reach, size = run.gate.block_reach, run.num_parameters
    clip = clip_of_one(run.mechanism, run.clip, block_reach=reach, num_parameters=size)
    return make_plan(
        cast(MechanismName, run.mechanism),
        num_parameters=size,
        clip=clip,
        bits=grid_bits(clip, contributions_of(run, samples)),
        budget=Budgeted.of(run).amount,
        shuffle_seed=seed,
        fraction=run.top_fraction if run.mechanism == "gaussian" else 1,
        unit=unit_of(run),
        **_more(run, threshold),
    )


def worth_plan(run: Run) -> WorthPlan | None:
    """Return the plan of the run's worth gate; None where every round is released."""
    worth_nano = Budgeted.of(run).worth_nano
    if not worth_nano:
        return None
    return WorthPlan(epsilon=Fraction(worth_nano, NANO), ratio=run.gate.worth_ratio)


def _more(run: Run, threshold: int | None) -> dict[str, Any]:
    if run.mechanism == "svt-textbook":
        return {"cutoff": run.cutoff, "select_share": run.select_share}
    if run.mechanism == "gaussian":
        return {}
    return {
        "block_size": run.block_size,
        "segment_blocks": run.segment_blocks,
        "select_share": run.select_share,
        "schedule": run.gate.schedule,
        "block_reach": run.gate.block_reach,
        "threshold": threshold,
    }
