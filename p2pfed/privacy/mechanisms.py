"""The mechanisms by name: from what a run says to one round's plan.

Map: `make_plan` -> a `mechanism.Mechanism`.

Not here: the mechanisms themselves, nor what they cost over a whole run (`accountant`).
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Final, Literal, get_args

from p2pfed.privacy.gaussian import GaussianPlan
from p2pfed.privacy.mechanism import Mechanism
from p2pfed.privacy.plain import PlainPlan
from p2pfed.privacy.svt import SvtPlan
from p2pfed.privacy.textbook import TextbookPlan
from p2pfed.privacy.units import PATIENT, Unit

__all__ = ["MECHANISMS", "MechanismName", "make_plan"]

MechanismName = Literal["svt", "svt-textbook", "gaussian", "none"]
MECHANISMS: Final[tuple[MechanismName, ...]] = get_args(MechanismName)


def make_plan(
    mechanism: MechanismName,
    *,
    num_parameters: int,
    clip: Fraction | float,
    bits: int,
    budget: Fraction,
    shuffle_seed: bytes,
    fraction: Fraction | float = Fraction(1),
    unit: Unit = PATIENT,
    **more: Any,
) -> Mechanism:
    """Return the plan of the named mechanism for one round.

    Args:
        mechanism: One of `MECHANISMS`.
        num_parameters: Length D of an update.
        clip: Bound of one contribution (L2; "svt-textbook": of each number); not used by "none".
        bits: The grid is 2^-bits.
        budget: What to spend at most: rho, or for "svt-textbook" epsilon; not used by "none".
        shuffle_seed: Public, new in every round; used by "svt" alone.
        fraction: Share sent by "gaussian" and "none".
        unit: Whom it protects; "none" protects nobody.
        **more: Further arguments of `SvtPlan.for_budget` or `TextbookPlan`.

    Raises:
        ValueError: A value is out of range or the mechanism is unknown.
    """
    shape: dict[str, Any] = {"num_parameters": num_parameters, "bits": bits}
    match mechanism:
        case "svt":
            return SvtPlan.for_budget(
                budget, clip=clip, shuffle_seed=shuffle_seed, unit=unit, **shape, **more
            )
        case "svt-textbook":
            return TextbookPlan(clip=clip, epsilon=budget, unit=unit, **shape, **more)
        case "gaussian":
            return GaussianPlan(clip=clip, rho=budget, fraction=fraction, unit=unit, **shape)
        case "none":
            return PlainPlan(fraction=fraction, **shape)
    raise ValueError(f"mechanism={mechanism!r} is unknown; there are: {', '.join(MECHANISMS)}")
