"""Whether the boundary between network process and trainer holds on the disk, seen from this side.

Where `train.user` is another user, the rights of files keep this process from patients, ledger and
what stays at home; one wrong group undoes that. So the kernel is asked now and then what this
process could open, and what it could is said in status and log.

Invariant: nothing is opened, and no name below these folders is asked for.

Not here: the same judged from outside, with what to do about each (`p2pfed doctor`, check `users`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import trio

from p2pfed.config import Settings

__all__ = ["Boundary"]

logger = logging.getLogger(__name__)

LOOK_EVERY = 60.0  # seconds


class Boundary:
    """See the module docstring.

    Args:
        places: Configuration key -> what belongs to the trainer alone; empty where one user runs
            both, who has no boundary to keep.
    """

    def __init__(self, places: Mapping[str, Path]) -> None:
        self._places = places
        self._open: list[str] = []

    @classmethod
    def of(cls, settings: Settings) -> Boundary:
        """What a configuration keeps from this process."""
        account, data = settings.trainer_account, settings.train.data
        if not settings.train.enabled or account is None or account[0] == os.geteuid():
            return cls({})
        places = {"privacy.ledger": settings.ledger_path, "train.state": settings.trainer_state}
        return cls(places if data is None else {"train.data": data, **places})

    def look(self) -> None:
        """Ask for each whether this process may read or write it."""
        found = [
            key
            for key, path in self._places.items()
            if os.access(path, os.R_OK) or os.access(path, os.W_OK)
        ]
        before, self._open = self._open, found
        if found != before:
            logger.warning("%s", *(self.health() or ["the boundary of train.user holds again"]))

    async def watch(self) -> None:
        """Look now and every minute, until cancelled."""
        while self._places:
            # In a thread: a file system that does not answer holds up nothing else.
            await trio.to_thread.run_sync(
                self.look,
                abandon_on_cancel=True,  # type: ignore[call-arg] # the stubs are older
            )
            await trio.sleep(LOOK_EVERY)

    def health(self) -> list[str]:
        """Lines for the status."""
        if not self._open:
            return []
        return [
            f"the network process could open {', '.join(self._open)}: the boundary of train.user"
            " does not hold; run: p2pfed doctor"
        ]
