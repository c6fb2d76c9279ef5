"""When a hospital stops releasing because its own metric gets no better.

Only with mechanism `none`: that a node stops is seen by its peers, and under a privacy mechanism it
would tell of the patients who decided it, unpaid. It counts anew after a restart.
"""

from __future__ import annotations

import math

__all__ = ["Plateau"]


class Plateau:
    """Counts evaluations without a better value.

    Args:
        patience: So many in a row are enough; 0 never is.
        larger_is_better: In which direction the metric gets better.
    """

    def __init__(self, patience: int, *, larger_is_better: bool) -> None:
        self._patience = patience
        self._sign = 1.0 if larger_is_better else -1.0
        self._best = -math.inf
        self._without = 0

    def begin(self) -> None:
        """Forget what was seen: another run has another model."""
        self._best, self._without = -math.inf, 0

    def saw(self, value: float | None) -> None:
        """Take in the metric of one more model; None where the task does not have it."""
        if value is None:
            return
        better = self._sign * value > self._best
        self._best = self._sign * value if better else self._best
        self._without = 0 if better else self._without + 1

    @property
    def reached(self) -> bool:
        """Whether it is time to stop."""
        return 0 < self._patience <= self._without

    @property
    def reason(self) -> str:
        """Why, in words that hold no figure of a patient."""
        return f"early stop: no better model for {self._patience} rounds (train.patience)"
