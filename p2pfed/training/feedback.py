"""Mechanism `none` alone: the change by local training, and what the next round remembers of it.

* `LocalChange`: the hospital's one row for the gate; trained when the gate first reads it.
* `RawChange`: what training changed, neither clipped nor noised.
* `ErrorFeedback`: what top-k, the grid and 8 bits left out is added to the next round's change
  (Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847).
* `DriftCorrection`: each local step is shifted by c = (public mean step) - (own raw step) of the
  last round that this node took part in. This is Scaffold (Karimireddy et al. 2020,
  arXiv:1910.06378, option II) without its second message: everybody holds the mean anyway.

Invariant: both memories take a `RawChange` and nothing else, and only `LocalChange` makes one.
Patients' contributions and a gate's release are other types, which cannot be given to them: under
noise error feedback would feed the noise back, and both would carry patients into later rounds
unpaid.

Both live in the process's memory. A crash loses them, which is harmless: a residual that is lost
is a change that was not sent, and a correction of zero is ordinary training. A round that was
released before is not trained again, so it neither uses nor changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import final

import numpy as np

from p2pfed.identity.run import Run
from p2pfed.training.home import Home
from p2pfed.training.local import Trained
from p2pfed.training.vector import MeanDelta, Vector
from p2pfed.wire.payload import Payload

__all__ = ["DriftCorrection", "ErrorFeedback", "LocalChange", "LocalMemory", "RawChange"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class RawChange:
    """What local training changed; private.

    Attributes:
        round: The round that it is for.
        steps: In how many steps.
        values: Shape (P,), float32, in units of the parameters.
    """

    round: int
    steps: int
    values: Vector


@final
class LocalChange:
    """The change by ordinary local training, as the hospital's only row.

    Args:
        view: The public model, shape (P,).
        train: Gives what training makes of it, with a shift of every step or None.
        round_number: The round that it is for.
        steps: In how many steps it trains.
        memory: What earlier rounds left; read when the row is made.
        mean: The newest public mean delta, if known.

    Attributes:
        made: What training changed; None until the row was read.
        home: What training left at home; None until the row was read.
    """

    def __init__(
        self,
        view: Vector,
        train: Callable[[Vector | None], Trained],
        *,
        round_number: int,
        steps: int,
        memory: LocalMemory,
        mean: MeanDelta | None = None,
    ) -> None:
        self.made: RawChange | None = None
        self.home: Home | None = None
        self._view, self._train = view, train
        self._round, self._steps = round_number, steps
        self._memory = memory
        self._mean = mean

    @property
    def num_patients(self) -> int:
        """One: the hospital as a whole."""
        return 1

    @property
    def num_parameters(self) -> int:
        """P."""
        return int(self._view.size)

    def chunks(self) -> Iterator[Vector]:
        """The row, shape (1, P), float32: the change and what earlier rounds left out.

        Raises:
            UpdateRejected: Training ended in NaN or infinity.
        """
        if self.made is None:
            self.made = self._trained()
        feedback = self._memory.feedback
        row = self.made.values if feedback is None else feedback.added_to(self.made)
        yield row[None, :]

    def _trained(self) -> RawChange:
        drift = self._memory.drift
        trained = self._train(None if drift is None else drift.correction(self._mean))
        self.home = trained.home
        return RawChange(self._round, self._steps, trained.vector - self._view)


class ErrorFeedback:
    """What the encoding left out, in units of the parameters."""

    def __init__(self) -> None:
        self._left_out: Vector | None = None  # shape (P,); None before the first release

    def added_to(self, change: RawChange) -> Vector:
        """The change and what was left out before it: what is to be sent, shape (P,)."""
        return change.values if self._left_out is None else change.values + self._left_out

    def keep(self, change: RawChange, sent: Payload, *, unit: float) -> None:
        """Keep what was to be sent and was not.

        Args:
            change: What training changed.
            sent: What was sent instead of `added_to(change)`.
            unit: What one step of a sent value is worth, in units of the parameters.
        """
        left_out = self.added_to(change).copy()
        left_out[sent.indices] -= (sent.values * unit).astype(np.float32)
        self._left_out = left_out


class DriftCorrection:
    """How far this hospital's local steps point away from everybody's mean."""

    def __init__(self) -> None:
        self._shift: Vector | None = None
        self._own: tuple[int, int, Vector] | None = None  # round, steps, raw step (P,)

    def correction(self, mean: MeanDelta | None) -> Vector | None:
        """What is added to each local step, shape (P,); None for nothing.

        Args:
            mean: The newest public mean delta. It changes the correction once, and only if it is
                of the last round that this hospital trained in.
        """
        if mean is not None and self._own is not None and self._own[0] == mean.round:
            _, steps, raw = self._own
            self._shift = mean.values / np.float32(steps) - raw
            self._own = None
        return self._shift

    def keep(self, change: RawChange) -> None:
        """Remember the raw step, without the correction, of a round that was released."""
        raw = change.values / np.float32(change.steps)
        if self._shift is not None:
            raw -= self._shift
        self._own = (change.round, change.steps, raw)


@dataclass(slots=True)
class LocalMemory:
    """What a run without a mechanism remembers from round to round; both None where it does not.

    Attributes:
        feedback: With `encoding.error_feedback`.
        drift: With `averaging.drift_correction`.
    """

    feedback: ErrorFeedback | None = field(default=None)
    drift: DriftCorrection | None = field(default=None)

    @classmethod
    def of(cls, run: Run) -> LocalMemory:
        """An empty one for a run."""
        return cls(
            ErrorFeedback() if run.encoding.error_feedback else None,
            DriftCorrection() if run.averaging.drift_correction else None,
        )

    def keep(self, change: RawChange, sent: Payload, *, unit: float) -> None:
        """Remember a round that was released; see `ErrorFeedback.keep`."""
        if self.feedback is not None:
            self.feedback.keep(change, sent, unit=unit)
        if self.drift is not None:
            self.drift.keep(change)
