"""From a run file to the public plans of its rounds: mechanism, cost, grid and worth gate.

Map: `Budgeted` (what one release may cost) -> `plan_for` (the mechanism's plan of one round) and
`worth_plan`; `contributions_of` is what a sum is divided by.

Invariant: everything here is computed from the run file, the round and the roster's number of
patients, all public, so every figure may be told, and the same round always has the same plan.
`releases` x `cost` stays within the run's epsilon.

Not here: contributions, the ledger, the threshold's steering (`round`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

from p2pfed.identity.run import Run
from p2pfed.privacy.accountant import NANO, Cost, pure_nano_allowed, rho_nano_allowed
from p2pfed.privacy.mechanism import Mechanism
from p2pfed.privacy.mechanisms import MechanismName, make_plan
from p2pfed.privacy.units import PrivacyUnit, Unit
from p2pfed.privacy.worth import WorthPlan

__all__ = ["Budgeted", "contributions_of", "plan_for", "unit_of", "worth_plan"]

_CLIP_BITS = 16  # a clipped row is 2^15 to 2^16 grid units long, shorter from 16384 patients on
_SUM_BITS = 30  # the sum of `samples` clipped rows; the gate allows twice that


@dataclass(frozen=True, slots=True)
class Budgeted:
    """What one release of a run may cost: equal shares of the run's budget.

    Attributes:
        cost: Of the release itself.
        amount: The same as `make_plan` takes it: rho, or epsilon under `svt-textbook`.
        worth_nano: Pure epsilon of asking whether it is worth it, in 1e-9; 0 where nobody asks.
    """

    cost: Cost
    amount: Fraction
    worth_nano: int = 0

    @classmethod
    def of(cls, run: Run) -> Budgeted:
        """The share of each of the run's releases; nothing with mechanism `none`."""
        if run.mechanism == "none":
            return cls(Cost.nothing(), Fraction(0))
        epsilon, delta = float(run.epsilon), float(run.delta)
        if run.mechanism == "svt-textbook":
            pure = Fraction(pure_nano_allowed(epsilon, delta, run.releases), NANO)
            return cls(Cost.pure(pure), pure)
        share = rho_nano_allowed(epsilon, delta) // run.releases
        if not run.gate.worth_releases:
            rho = Fraction(share, NANO)
            return cls(Cost.zcdp(rho), rho)
        asking = share * run.gate.worth_share  # rho; an epsilon costs epsilon^2 / 2
        rho = Fraction(share - math.ceil(asking), NANO)
        return cls(Cost.zcdp(max(rho, Fraction(0))), rho, math.isqrt(2 * math.floor(asking) * NANO))

    @property
    def is_enough(self) -> bool:
        """Whether the share is not below the smallest amounts that can be paid."""
        return self.amount >= Fraction(10, NANO)

    @property
    def together(self) -> Cost:
        """A bound on the whole cost of one release."""
        if not self.worth_nano:
            return self.cost
        worth = Cost.pure(Fraction(self.worth_nano, NANO))
        return Cost.zcdp(Fraction(self.cost.rho_nano + worth.rho_nano, NANO))


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
    return -(-samples // run.gate.patients_per_row) if run.unit == "patient" else 1


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
    clip, more = _clip(run), _more(run, threshold)
    clip_bits = min(_CLIP_BITS, _SUM_BITS - contributions_of(run, samples).bit_length())
    return make_plan(
        cast(MechanismName, run.mechanism),
        num_parameters=run.num_parameters,
        clip=clip,
        bits=max(0, math.floor(math.log2(2**clip_bits / clip))),
        budget=Budgeted.of(run).amount,
        shuffle_seed=seed,
        fraction=run.top_fraction if run.mechanism == "gaussian" else 1,
        unit=unit_of(run),
        **more,
    )


def worth_plan(run: Run) -> WorthPlan | None:
    """Return the plan of the run's worth gate; None where every round is released."""
    worth_nano = Budgeted.of(run).worth_nano
    if not worth_nano:
        return None
    return WorthPlan(epsilon=Fraction(worth_nano, NANO), ratio=run.gate.worth_ratio)


def _clip(run: Run) -> Fraction:
    """The clip of one contribution; in the textbook form of each of its numbers."""
    if run.mechanism != "svt-textbook":
        return run.clip
    even = Fraction(math.isqrt(run.num_parameters * NANO**2), NANO)  # a root, to 1e-9
    return min(run.clip, run.clip * run.gate.block_reach / even)


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
