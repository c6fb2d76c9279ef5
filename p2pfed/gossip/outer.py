"""Outer optimisers: how the round's mean delta moves the model, the same on every node.

FedAvg, FedAdagrad, FedAdam and FedYogi as in Algorithm 2 of Reddi et al. 2021 (arXiv:2003.00295),
without a server; with `bias_correction` FedAdam and FedYogi correct their moments as Adam does, in
the cheaper form of Kingma and Ba 2015 (arXiv:1412.6980, end of section 2), where the correction is
two numbers a round. The second moment begins at 0, as in the published runs of FLamby (Ogier du
Terrail et al. 2022, arXiv:2210.04620), not at tau**2 as in the paper's analysis.

Invariant: bit-exact across machines. Every operation is one elementwise + - * / or
sqrt of float64, which IEEE 754-2019 (section 5.4.1) defines to the last bit, or takes a sign, which
is exact; numpy rounds after each of them, so neither the vector width nor a fused multiply-add can
show. There is no `pow` (beta**t is a running product in the state), no reduction and no BLAS. What
is left is the processor's mode: `check_arithmetic` refuses one that drops subnormal numbers.

Memory: the arrays are pieces of the state that stay in cache while a piece is computed, so that
the state passes through memory once a round; see `fold`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2pfed.identity.rules import Outer

__all__ = ["OuterStep", "check_arithmetic"]

Array = NDArray[np.float64]
_CORRECTED = ("fedadam", "fedyogi")


@dataclass(frozen=True, slots=True)
class OuterStep:
    """One round's step: the optimiser and what it takes from the number of steps.

    Attributes:
        outer: The optimiser.
        rate: Learning rate, bias correction included, times what a step is measured in.
        epsilon: What is added to the root of the second moment, likewise.
    """

    outer: Outer
    rate: float
    epsilon: float

    @classmethod
    def after(
        cls, outer: Outer, beta1_power: float, beta2_power: float, *, grid_bits: int = 0
    ) -> OuterStep:
        """The step after which the running products of the betas are these.

        Args:
            outer: The optimiser.
            beta1_power: beta1 to the number of steps, this one included.
            beta2_power: Likewise.
            grid_bits: Steps come in multiples of 2**-grid_bits.
        """
        rate, epsilon = outer.learning_rate, outer.epsilon
        if outer.bias_correction and outer.name in _CORRECTED:
            root = math.sqrt(1.0 - beta2_power)
            rate, epsilon = rate * root / (1.0 - beta1_power), epsilon * root
        return cls(outer, rate * 2.0**grid_bits, epsilon)

    def take(self, mean: Array, first: Array, second: Array, spare: Array) -> None:
        """Turn the mean delta into the step, in place, and update the moments, in place.

        Args:
            mean: Mean delta, shape (n,); holds the step afterwards.
            first: First moment, shape (n,); not looked at by `fedavg`.
            second: Second moment, likewise.
            spare: Scratch, shape (n,).
        """
        if not self.outer.is_adaptive:
            np.multiply(mean, self.rate, out=mean)
            return
        first *= self.outer.beta1
        np.multiply(mean, 1.0 - self.outer.beta1, out=spare)
        first += spare
        np.multiply(mean, mean, out=mean)
        self._update_second(second, mean, spare)
        np.sqrt(second, out=spare)
        spare += self.epsilon
        np.divide(first, spare, out=mean)
        mean *= self.rate

    def _update_second(self, second: Array, square: Array, spare: Array) -> None:
        """The second moment, from the square of the mean delta (which is overwritten)."""
        if self.outer.name == "fedadagrad":
            second += square
        elif self.outer.name == "fedadam":
            second *= self.outer.beta2
            square *= 1.0 - self.outer.beta2
            second += square
        else:  # fedyogi: towards the square by a share of the square
            np.subtract(second, square, out=spare)
            np.sign(spare, out=spare)
            square *= 1.0 - self.outer.beta2
            square *= spare
            second -= square


def check_arithmetic() -> None:
    """Refuse a thread whose processor drops subnormal numbers.

    A library built with -ffast-math switches that on for the whole process; moments that have
    nearly decayed would then differ from those of other hospitals.

    Raises:
        RuntimeError: It does.
    """
    smallest = np.nextafter(0.0, 1.0)
    if smallest * np.float64(1.0) == 0.0:
        raise RuntimeError("a library switched this process to inexact arithmetic (flush to zero)")
