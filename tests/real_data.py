"""Real hospital data, which is not part of the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def real_data(name: str, sign: str) -> Path:
    """A folder of real data; the test is skipped where it is missing, and fails in CI.

    Args:
        name: Of the folder.
        sign: What must be in it.
    """
    root = Path(__file__).resolve().parent.parent
    data = Path(os.environ.get("P2PFED_DATA") or root.parent / "shared" / "data")
    folder = data / name
    if not (folder / sign).exists():
        reason = f"no {name} data in {data}; set P2PFED_DATA"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder
