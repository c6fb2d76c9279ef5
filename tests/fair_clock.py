"""Seconds of a machine that keeps up: for the bounds that tests hold real processes to.

A bound in seconds says nothing on a machine whose processors and disks are all taken: then the
product is late because it is not let run. The kernel adds up the time in which anything on the
machine had to wait for a processor or a disk (pressure stall information); what is left of the
time that passed is at least what a process could have used. On an idle machine that is all of it,
and the bound is as strict as it is written; where the kernel tells nothing, too.

Not here: bounds that only end a test which hangs (pytest's own timeout).
"""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

PRESSURE = Path("/proc/pressure")
ADDED_UP = 2.1  # seconds until the kernel has added up what it tells


def waited(pressure: Path = PRESSURE) -> dict[str, float]:
    """Seconds, ever, in which something waited for a processor, and for a disk."""
    seconds = {"cpu": 0.0, "io": 0.0}
    for resource in seconds:
        with contextlib.suppress(OSError):
            told = (pressure / resource).read_text("ascii")
            found = re.search(r"^some .* total=(\d+)$", told, re.MULTILINE)
            seconds[resource] = int(found[1]) / 1e6 if found else 0.0
    return seconds


class FairClock:
    """Runs from its making on."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._waited = waited()

    @property
    def elapsed(self) -> float:
        """Seconds by everybody's clock."""
        return time.monotonic() - self._began

    def within(self, seconds: float) -> bool:
        """Whether a machine that keeps up would have needed no longer than this."""
        elapsed = self.elapsed
        if elapsed <= seconds:
            return True
        time.sleep(ADDED_UP)
        now = waited()
        lost = max(now[resource] - before for resource, before in self._waited.items())
        return elapsed - lost <= seconds
