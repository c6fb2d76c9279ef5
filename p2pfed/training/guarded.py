"""A task's own words are never taken for the trainer's.

The texts and types of our errors cross to the network process and steer it. A hospital's task may
raise one of them too, with a patient's value in its text: here that becomes a RuntimeError, of
which the type alone is told.

Not here: what is told of errors (`process`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2pfed.errors import P2PFedError, UpdateRejected
from p2pfed.privacy.units import Contributions

__all__ = ["OfTask", "words_of_the_task"]


@dataclass(frozen=True, slots=True, eq=False)
class OfTask:
    """Contributions whose computing may raise anything, but never one of our own errors.

    Attributes:
        contributions: As they are.
        skips: An `UpdateRejected` may pass, for the round to be skipped.
    """

    contributions: Contributions
    skips: bool

    @property
    def num_patients(self) -> int:
        """As they say."""
        return self.contributions.num_patients

    @property
    def num_parameters(self) -> int:
        """As they say."""
        return self.contributions.num_parameters

    def chunks(self) -> Iterator[NDArray[np.float32]]:
        """Yield all rows."""
        with words_of_the_task(skips=self.skips):
            yield from self.contributions.chunks()


@contextmanager
def words_of_the_task(*, skips: bool = False) -> Iterator[None]:
    """Turn what a task raises, whatever its type, into a RuntimeError.

    Args:
        skips: Let an `UpdateRejected` pass.

    Raises:
        RuntimeError: The task raised one of our errors.
    """
    try:
        yield
    except P2PFedError as error:
        if skips and isinstance(error, UpdateRejected):
            raise
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
