"""Is this round's update worth its budget? A sparse vector technique over rounds.

Map: `WorthPlan` (public) -> `WorthGate.open` (threshold noise; its cost was debited) ->
`WorthGate.ask` (once a round; "no" is free) -> the first "yes" closes the gate.

One instance is one AboveThreshold: T = threshold + Geo(l1) is drawn when it opens; round t gets
"yes" if floor(||s_t||) + Geo(l2) >= T. The threshold is a public multiple of the length of the
noise that the release would carry, so "yes" says that there is about so much signal in the update.

Formal guarantee: between neighbours (`units.Unit`) each query moves by at most M = sensitivity + 1,
the one for the floor. With l1, l2 such that M (1/l1 + 2/l2) = epsilon, and the same M for all
rounds, all answers of one instance together are epsilon-differentially private (Lemma 1 of `svt`: L
<= D-/l1 + (D- + delta_k)/l2 with D-, delta_k <= M), however many "no" come first. Later queries may
depend on what others release meanwhile: the answers so far are always "no", so they tell nothing
that is not fixed. Releases of other runs in between compose concurrently as if one after another
(Vadhan, Wang, "Concurrent Composition of Differential Privacy", TCC 2021; Lyu, "Composition
Theorems for Interactive Differential Privacy", NeurIPS 2022).

Invariant: the threshold's noise is in this process's memory only, in no file and in no message. A
"yes" or the end of the process ends the instance; a new one needs a new debit.

Not here: the debit and what is released after "yes" (`gate`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfed.privacy.accountant import NANO, Cost
from p2pfed.privacy.gaussian import GaussianPlan
from p2pfed.privacy.mechanism import Mechanism
from p2pfed.privacy.noise import NoiseSource
from p2pfed.privacy.svt import SvtPlan

__all__ = ["WORTH", "WorthGate", "WorthPlan"]

WORTH = "worth-gate"
"""What the ledger calls the debit of an instance."""

_THRESHOLD_SHARE = Fraction(1000, 2587)  # as in `svt`: the variance-optimal split


@dataclass(frozen=True, slots=True, kw_only=True)
class WorthPlan:
    """Everything about one instance, all of it public.

    Attributes:
        epsilon: Paid for the whole instance, at least 1e-9.
        ratio: How many times the length of its noise an update must have.

    Raises:
        ValueError: A value is out of range.
    """

    epsilon: Fraction
    ratio: Fraction

    def __post_init__(self) -> None:
        if self.epsilon < Fraction(1, NANO):
            raise ValueError(f"epsilon={self.epsilon} must be at least 1e-9")
        if not 0 <= self.ratio <= 1 << 20:
            raise ValueError(f"ratio={self.ratio} must be 0 to 2^20")

    @property
    def cost(self) -> Cost:
        """What the instance costs, all its answers included."""
        return Cost.pure(self.epsilon)

    def scales(self, plan: GaussianPlan | SvtPlan) -> tuple[Fraction, Fraction]:
        """(l1, l2) in grid units for updates under `plan`."""
        moved = Fraction(plan.unit.moves * plan.limit + 1)
        share = _THRESHOLD_SHARE * self.epsilon
        return moved / share, 2 * moved / (self.epsilon - share)

    def threshold(self, plan: GaussianPlan | SvtPlan) -> int:
        """Public threshold in grid units: `ratio` times the expected length of the noise."""
        released = plan.outlook().released
        sigma2 = plan.sigma2 if isinstance(plan, GaussianPlan) else plan.sigma2(released)
        return math.floor(self.ratio * math.isqrt(math.floor(sigma2 * released)))


class WorthGate:
    """One instance; not open at first.

    Args:
        plan: Public.
    """

    __slots__ = ("_noise", "_scales", "plan")

    def __init__(self, plan: WorthPlan) -> None:
        self.plan = plan
        self._noise: int | None = None  # of the threshold: never stored, never told
        self._scales = (Fraction(0), Fraction(0))

    @property
    def is_open(self) -> bool:
        """Whether a debit was made for an instance that has not said "yes" yet."""
        return self._noise is not None

    def open(self, mechanism: Mechanism, noise: NoiseSource) -> None:
        """Draw the threshold's noise; call it only when the cost is durably debited."""
        self._scales = self.plan.scales(_gated(mechanism))
        self._noise = int(noise.geometric(1, self._scales[0])[0])

    def ask(self, mechanism: Mechanism, total_D: NDArray[Any], noise: NoiseSource) -> bool:
        """Tell whether the update is worth its budget; "yes" closes the gate.

        Args:
            mechanism: The round's plan; with the same sensitivity in all rounds of an instance.
            total_D: (D,) what `mechanism.total` returned.
            noise: Fresh noise.

        Raises:
            RuntimeError: The gate is not open, or was opened for another sensitivity.
        """
        if self._noise is None:
            raise RuntimeError("the gate is not open: its cost is not debited")
        plan = _gated(mechanism)
        if self.plan.scales(plan) != self._scales:
            raise RuntimeError("the gate was opened for another sensitivity: its cost is not this")
        query = math.isqrt(_squares(total_D))
        noisy = query + int(noise.geometric(1, self._scales[1])[0])
        yes = noisy >= self.plan.threshold(plan) + self._noise
        if yes:
            self._noise = None
        return yes


def _gated(mechanism: Mechanism) -> GaussianPlan | SvtPlan:
    if not isinstance(mechanism, GaussianPlan | SvtPlan):
        raise TypeError(f"mechanism {mechanism.name!r} has no bound on the length of an update")
    return mechanism


def _squares(total_D: NDArray[Any]) -> int:
    """The exact square of the length: parts of at most 2^16 squares below 2^62 each."""
    parts = np.array_split(total_D, -(-total_D.size // (1 << 16)))
    return sum(_square(part.astype(np.int64)) for part in parts)


def _square(part: NDArray[np.int64]) -> int:
    high, low = np.divmod(part, 1 << 16)  # |high| <= 2^15: no sum below passes 2^63
    squares = int(high @ high) << 32, int(high @ low) << 17, int(low @ low)
    return sum(squares)
