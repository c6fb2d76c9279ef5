"""Fixtures that more than one room's tests use."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples on every run and machine; no clock decides whether a test passes.
settings.register_profile("p2pfed", derandomize=True, deadline=None, database=None)
settings.load_profile("p2pfed")

# A shell starts background jobs with SIGINT ignored, and children inherit that; the programs that
# the tests interrupt must be able to hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def heart_folder() -> Path:
    """The four UCI heart disease files; skipped where they are missing, a failure in CI."""
    root = Path(__file__).resolve().parent.parent
    data = Path(os.environ.get("P2PFED_DATA") or root.parent / "shared" / "data")
    folder = data / "heart_disease"
    if not (folder / "processed.cleveland.data").is_file():
        reason = f"no heart disease data in {data}; set P2PFED_DATA"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder
