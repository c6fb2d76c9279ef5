"""A task's own words are never taken for the trainer's, and what is told of an error is ours.

The texts and types of our errors cross to the network process and steer it. Whatever a hospital's
task raises may have a patient's value, id or file name in its text, of whatever type it is: our own
errors too, for bundled tasks name folders and cells. So where the hospital's code runs,
`words_of_the_task` turns what it raises into a `TaskFailed`, and `failed` decides what crosses:

* of a `TaskFailed`, and of any error that is not ours: the class and what was being done, in fixed
  words;
* of our own errors from elsewhere (configuration, ledger, a view that does not fit, a run that is
  none): their three lines, which are made of public facts and paths of the configuration.

The whole text goes to `trainer.log` (0600) and, while the trainer lives, to its private socket.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2pfed.errors import P2PFedError, UpdateRejected
from p2pfed.privacy.units import Contributions
from p2pfed.training.control import Message
from p2pfed.training.hardware import is_out_of_memory

__all__ = ["OfTask", "TaskFailed", "failed", "words_of_the_task"]

_SEE = "see: p2pfed task log   (as the trainer's user; its own words do not leave the trainer)"
_LONGEST_NAME = 60


class TaskFailed(RuntimeError):
    """The hospital's own code raised something; its text is for the hospital's eyes.

    Args:
        error: What it raised.
        doing: What the trainer was doing, in our words: "training".
    """

    def __init__(self, error: Exception, doing: str) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.kind = type(error).__name__
        self.doing = doing


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
def words_of_the_task(
    doing: str = "training",
    *,
    skips: bool = False,
    kinds: type[Exception] = P2PFedError,
) -> Iterator[None]:
    """Turn what a task raises into a `TaskFailed`; memory that runs out is told as that.

    Args:
        doing: What is told of it.
        skips: Let an `UpdateRejected` pass.
        kinds: What is turned; of other errors the class alone is told anyway.

    Raises:
        TaskFailed: The task raised something of these kinds.
    """
    try:
        yield
    except kinds as error:
        passes = skips and isinstance(error, UpdateRejected)
        if passes or isinstance(error, TaskFailed) or is_out_of_memory(error):
            raise
        raise TaskFailed(error, doing) from error


def failed(error: Exception) -> Message:
    """What the network process may know of a failure; see the module docstring."""
    if isinstance(error, P2PFedError):
        told = {"what": error.what, "why": error.why, "do": error.do}
    elif is_out_of_memory(error):
        told = {"what": "the trainer ran out of memory", "why": "", "do": "use a smaller batch"}
    elif isinstance(error, TaskFailed):
        what = f"the task raised {error.kind[:_LONGEST_NAME]} while {error.doing}"
        told = {"what": what, "why": "", "do": _SEE}
    else:
        what = f"the task failed with {type(error).__name__[:_LONGEST_NAME]}"
        told = {"what": what, "why": "", "do": _SEE}
    return {"event": "failed", **told}
