"""What one release of a run gets: its share of the budget, its contributions and its grid.

Map: `Share.of_budget` (what it may cost) with `contributions`, `clip_of_one` and `grid_bits` (the
numbers that every plan starts from). `planning` tells with them what a run would do, and
`training.plans` does it.

Invariant: pure and computed from public numbers alone, exactly or rounded down, so that all members
and every plan made beforehand agree; the shares of all releases fit into the budget together.

Not here: what a mechanism makes of its share (`mechanisms`), what is really paid (`ledger`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Self

from p2pfed.privacy.accountant import NANO, Cost, pure_nano_allowed, rho_nano_allowed
from p2pfed.privacy.units import Unit

__all__ = ["Share", "clip_of_one", "contributions", "grid_bits"]

_LEAST: Final = Fraction(10, NANO)  # smaller amounts cannot be split
_CLIP_BITS: Final = 16  # a clipped row is 2^15 to 2^16 grid units long, shorter from 16384 rows on
_SUM_BITS: Final = 30  # the sum of all clipped rows; the gate allows twice that


@dataclass(frozen=True, slots=True)
class Share:
    """What one release may cost: the budget in equal parts.

    Attributes:
        cost: Of the release itself.
        amount: The same as `mechanisms.make_plan` takes it: rho, or epsilon under `svt-textbook`.
        worth_nano: Pure epsilon of asking whether it is worth it, in 1e-9; 0 where nobody asks.
    """

    cost: Cost
    amount: Fraction
    worth_nano: int = 0

    @classmethod
    def of_budget(
        cls,
        mechanism: str,
        *,
        epsilon: float,
        delta: float,
        releases: int,
        asking: Fraction = Fraction(0),
    ) -> Self:
        """Return the share of each release; of "none" it is nothing.

        Formal guarantee: `releases` times `together` is at most (epsilon, delta)-DP.

        Args:
            mechanism: Its name.
            epsilon: Of all releases together.
            delta: Likewise.
            releases: How many there are.
            asking: Part of the share that pays for asking; 0 without a worth gate and always under
                "svt-textbook", which has none.

        Raises:
            ValueError: A number is out of range.
        """
        if releases < 1 or not 0 <= asking < 1:
            raise ValueError(f"releases={releases} must be at least 1, asking={asking} in [0, 1)")
        if mechanism == "none":
            return cls(Cost.nothing(), Fraction(0))
        if mechanism == "svt-textbook":
            if asking:
                raise ValueError("svt-textbook has no worth gate")
            pure = Fraction(pure_nano_allowed(epsilon, delta, releases), NANO)
            return cls(Cost.pure(pure), pure)
        whole = rho_nano_allowed(epsilon, delta) // releases
        for_asking = whole * asking  # rho; a pure epsilon costs epsilon^2 / 2
        rho = Fraction(whole - math.ceil(for_asking), NANO)
        return cls(Cost.zcdp(rho), rho, math.isqrt(2 * math.floor(for_asking) * NANO))

    @property
    def is_enough(self) -> bool:
        """Whether it is not below the smallest amounts that can be paid."""
        return self.amount >= _LEAST

    @property
    def asking(self) -> Cost:
        """What asking costs."""
        return Cost.pure(Fraction(self.worth_nano, NANO))

    @property
    def together(self) -> Cost:
        """A bound on the whole cost of one release."""
        if not self.worth_nano:
            return self.cost
        return Cost.zcdp(Fraction(self.cost.rho_nano + self.asking.rho_nano, NANO))


def contributions(unit: Unit, patients: int) -> int:
    """Return M, how many contributions a hospital of so many patients makes."""
    return -(-patients // unit.patients_per_row) if unit.kind == "patient" else 1


def clip_of_one(
    mechanism: str, clip: Fraction, *, block_reach: Fraction, num_parameters: int
) -> Fraction:
    """Return the clip as `mechanisms.make_plan` takes it.

    Args:
        mechanism: Its name.
        clip: L2 bound of one contribution.
        block_reach: How many times its even share of the clip a block may have.
        num_parameters: Length D of an update.

    Returns:
        `clip`; under `svt-textbook` the bound of each number, as if blocks had one.
    """
    if mechanism != "svt-textbook":
        return clip
    even = Fraction(math.isqrt(num_parameters * NANO**2), NANO)  # a root, to 1e-9
    return min(clip, clip * block_reach / even)


def grid_bits(clip: Fraction, count: int) -> int:
    """Return the bits of the grid 2^-bits on which `count` contributions within `clip` are summed.

    As fine as fits: a contribution into 16 bits, the sum into 30.
    """
    clip_bits = min(_CLIP_BITS, _SUM_BITS - count.bit_length())
    return max(0, math.floor(math.log2(2**clip_bits / clip)))
