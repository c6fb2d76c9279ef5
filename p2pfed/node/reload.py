"""Reading the configuration again while the daemon runs: what may change, and what came of it.

`changes` compares two sets of settings and is pure; `read_anew` reads everything that the file
names, so that from there on nothing can fail; `Reloading` applies it.

Reading happens in a thread with a time limit: a pipe in place of the file is refused
(`small_files`), and a file system that does not answer holds up neither the next reload nor the
daemon's end.

Invariants. A file that cannot be read or is wrong changes nothing: the settings from before stay in
force, and the answer, the event log and a line of the status say so until a good reload. What is
not in `LIVE` is never half in force: it waits for a new trainer, or for a start of the daemon, and
the answer names it. The privacy budget is the trainer's to read: a change of it in the file counts
from the trainer's next start, and no request to this process can make one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from p2pfed.admin.rights import operator_ids
from p2pfed.config import Settings
from p2pfed.errors import ConfigError
from p2pfed.identity.bootstrap import BootstrapList
from p2pfed.network import PeerNetwork
from p2pfed.node.eventlog import EventLog
from p2pfed.node.logs import begin_logging
from p2pfed.node.logtap import let_through
from p2pfed.small_files import read_small

__all__ = ["LIVE", "OF_TRAINER", "Anew", "Changes", "Reloading", "changes", "read_bootstrap"]

READ_SECONDS = 5.0  # for the file and all that it names
READERS = 4  # threads that may wait for a file system; one that is given up cannot be ended

LIVE = frozenset(
    {
        "admin.operators",
        "log.file",
        "log.format",
        "log.level",
        "network.allowed_networks",
        "network.bootstrap",
        "network.upload_limit_mbit",
    }
)
# The trainer reads these at its start.
OF_TRAINER = frozenset(
    {
        "privacy.allow_none",
        "privacy.delta",
        "privacy.epsilon",
        "privacy.ledger",
        "privacy.share_metrics",
        "privacy.unit",
        "train.data",
        "train.device",
        "train.gpus",
        "train.memory_gb",
        "train.options",
        "train.patience",
        "train.precision",
        "train.state",
    }
)


@dataclass(frozen=True, slots=True)
class Changes:
    """Dotted keys whose values differ, sorted.

    Attributes:
        live: In force at once.
        of_trainer: In force when the trainer starts anew.
        at_start: In force when the daemon starts anew.
    """

    live: tuple[str, ...]
    of_trainer: tuple[str, ...]
    at_start: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Anew:
    """What the configuration says now, with all that it names read and found right."""

    settings: Settings
    operators: frozenset[int]
    bootstrap: list[BootstrapList]


def changes(old: Settings, new: Settings) -> Changes:
    """What differs between two sets of settings."""
    differing = sorted(
        f"{section}.{key}"
        for section in Settings.model_fields
        for key in type(getattr(old, section)).model_fields
        if getattr(getattr(old, section), key) != getattr(getattr(new, section), key)
    )
    return Changes(
        live=tuple(key for key in differing if key in LIVE),
        of_trainer=tuple(key for key in differing if key in OF_TRAINER),
        at_start=tuple(key for key in differing if key not in LIVE | OF_TRAINER),
    )


def with_values_of(old: Settings, new: Settings, keys: tuple[str, ...]) -> Settings:
    """The old settings, with the new values of some dotted keys."""
    sections = {}
    for section in {key.partition(".")[0] for key in keys}:
        fresh = getattr(new, section)
        names = [key.partition(".")[2] for key in keys if key.partition(".")[0] == section]
        values = {name: getattr(fresh, name) for name in names}
        sections[section] = getattr(old, section).model_copy(update=values)
    return old.model_copy(update=sections)


def read_bootstrap(settings: Settings) -> list[BootstrapList]:
    """The bootstrap lists that the configuration names.

    Raises:
        ConfigError: One cannot be read, or is wrong.
    """
    return [BootstrapList.parse(_text(path), str(path)) for path in settings.network.bootstrap]


def read_anew(settings: Settings) -> Anew:
    """Read the file that these settings came from, and what it names; takes time.

    Raises:
        ConfigError: Something is wrong with it.
    """
    new = settings.read_again()
    return Anew(new, operator_ids(new.admin.operators), read_bootstrap(new))


class Reloading:
    """Reads and applies; remembers a reload that failed.

    Args:
        network: Is told of limits.
        log: Is told what came of it.
    """

    def __init__(self, network: PeerNetwork, log: EventLog) -> None:
        self._network = network
        self._log = log
        self._problem = ""
        self._waiting = Changes((), (), ())
        self._turn = trio.Lock()
        self._readers = trio.CapacityLimiter(READERS)

    def health(self) -> list[str]:
        """Lines for the status."""
        lines = []
        if self._problem:
            lines.append(
                f"the configuration was not read again, the one from before is in force:"
                f" {self._problem}; run: p2pfed config check"
            )
        if self._waiting.at_start:
            told = ", ".join(self._waiting.at_start)
            lines.append(f"restart the daemon for changes in its configuration: {told}")
        return lines

    async def read(self, in_force: Callable[[], Settings]) -> tuple[Anew, Changes]:
        """Read everything again.

        Args:
            in_force: Gives the settings in force; asked when it is this reload's turn.

        Raises:
            ConfigError: Something is wrong; nothing has changed.
        """
        async with self._turn:
            settings = in_force()
            try:
                anew = await self._read_in_time(settings)
            except ConfigError as error:
                self._problem = error.what
                self._log.add("config.refused", {"reason": error.what})
                raise ConfigError(
                    f"{error.what}: nothing was changed, the settings from before stay in force",
                    error.why,
                    error.do or "correct the file, then run: p2pfed config reload",
                ) from error
        found = changes(settings, anew.settings)
        self._problem, self._waiting = "", found
        return anew, found

    async def _read_in_time(self, settings: Settings) -> Anew:
        with trio.move_on_after(READ_SECONDS):
            return await trio.to_thread.run_sync(
                read_anew,
                settings,
                abandon_on_cancel=True,  # type: ignore[call-arg] # the stubs are older
                limiter=self._readers,
            )
        raise ConfigError(
            f"{settings.file} could not be read within {READ_SECONDS:g} s",
            "its file system does not answer, or a file that it names is none",
            "see that it can be read: p2pfed config check; then run: p2pfed config reload",
        )

    def apply(self, anew: Anew, found: Changes) -> dict[str, Any]:
        """Put what may change at once in force, but operators and bootstrap, which are the node's.

        Returns:
            `applied`, `restart_trainer` and `restart_daemon`, each a list of dotted keys.
        """
        new = anew.settings
        if any(key.startswith("log.") for key in found.live):
            begin_logging(new)
            let_through()
        if "network.upload_limit_mbit" in found.live:
            self._network.limit_upload(new.network.upload_limit_mbit * 125_000 or None)
        if "network.allowed_networks" in found.live:
            self._network.allow(new.network.allowed_networks)
        told = {
            "applied": list(found.live),
            "restart_trainer": list(found.of_trainer),
            "restart_daemon": list(found.at_start),
        }
        self._log.add("config.reloaded", told)
        return told


def _text(path: Path) -> str:
    try:
        return read_small(path)[0].decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the bootstrap list {path}",
            getattr(error, "strerror", "") or str(error),
            "correct the file, or take it out of network.bootstrap",
        ) from error
