"""How much of the disk a run's archive takes: a forecast, and what is there.

Every delta of a run is kept for as long as the run is (a late one is folded by replay, a member is
forgotten by replay), so the archive grows to rounds x members that release x the longest delta.
That is known when a run is accepted. Nothing is ever dropped to make room: a full disk stops the
daemon, so a shortage is told beforehand, at `run accept` and in the status.

Not here: the deltas (`store`), the models' checkpoints (a few, of known size).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from p2pfed.gossip.committee import seats
from p2pfed.identity.roster import Roster
from p2pfed.identity.run import Run

__all__ = ["Archive", "forecast"]

_ROW_BYTES = 512  # names, indices and page ends of one delta in the store
_CHECKPOINTS = 16  # at most so many are kept: ages 1, 2, 4, 8, … rounds
_PARAMETER_BYTES = 20  # of a checkpoint: the model and two moments
MARGIN = 1 << 28  # bytes that should stay free besides


def forecast(run: Run, roster: Roster) -> int:
    """Bytes that a run takes at worst, with the members of this roster."""
    releasing = seats(run, sum(member.trains for member in roster.members))
    deltas = run.rounds * releasing * (run.bytes_per_round + _ROW_BYTES)
    if run.averaging.mode == "pairwise":
        deltas = 0  # there are none
    return deltas + _CHECKPOINTS * _PARAMETER_BYTES * run.num_parameters


@dataclass(frozen=True, slots=True)
class Archive:
    """The archive of one run on one disk.

    Attributes:
        forecast_bytes: What it takes at worst when the run is over.
        held_bytes: What its deltas take now.
        free_bytes: What the disk has left.
    """

    forecast_bytes: int
    held_bytes: int
    free_bytes: int

    @classmethod
    def of(cls, run: Run, roster: Roster, *, held_bytes: int, folder: Path) -> Archive:
        """Look at the disk that holds `folder`."""
        return cls(forecast(run, roster), held_bytes, shutil.disk_usage(folder).free)

    @property
    def missing_bytes(self) -> int:
        """How much more room the run may need than there is; 0 if there is enough."""
        needed = max(0, self.forecast_bytes - self.held_bytes) + MARGIN
        return max(0, needed - self.free_bytes)

    @property
    def warning(self) -> str:
        """What to tell the operator; empty if there is room enough."""
        if not self.missing_bytes:
            return ""
        return (
            f"the run may need {_size(self.forecast_bytes)} on this disk and"
            f" {_size(self.free_bytes)} are free; a full disk stops the daemon"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
