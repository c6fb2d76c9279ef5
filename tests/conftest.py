"""Fixtures that more than one room's tests use."""

from __future__ import annotations

import logging
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from real_data import real_data

from p2pfed.cli.main import three_lines
from p2pfed.errors import P2PFedError

# The same examples on every run and machine; no clock decides whether a test passes.
settings.register_profile("p2pfed", derandomize=True, deadline=None, database=None)
settings.load_profile("p2pfed")

# A shell starts background jobs with SIGINT ignored, and children inherit that; the programs that
# the tests interrupt must be able to hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Side by side, files with slow tests begin first: what fills the end is quick."""
    if hasattr(config, "workerinput"):
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """A test that begins a log leaves none behind: the next one would write to it."""
    root = logging.getLogger()
    known = [one for one in root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    levels, handlers = [(one, one.level) for one in (root, *known)], list(root.handlers)
    yield
    logging.captureWarnings(False)
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)
        handler.close()
    for one, level in levels:
        if one.level != level:  # setting it empties a cache of all loggers
            one.setLevel(level)


@pytest.fixture(autouse=True)
def three_lines_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever error a command tells in a test, it says what, why and what to do.

    Only `why` may have more than one line: one for each mistake of a configuration.
    """

    def held(error: P2PFedError, arguments: list[str]) -> P2PFedError:
        told = three_lines(error, arguments)
        several = re.search(r"[2-9] (mistakes|unknown users)", error.what)
        assert str(told).count("\n") == 2 or several, f"not three lines:\n{told}"
        assert told.what and told.why and told.do, f"not three lines:\n{told}"
        return told

    monkeypatch.setattr("p2pfed.cli.main.three_lines", held)


@pytest.fixture(scope="session")
def heart_folder() -> Path:
    """The four UCI heart disease files; skipped where they are missing, a failure in CI."""
    return real_data("heart_disease", "processed.cleveland.data")
