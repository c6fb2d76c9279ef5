"""What one check says: how it stands, what was found, and the line that mends it.

Invariant: a finding that is not `ok` has a fix. `docs/doctor.md` has a row for each name in
`CHECKS`, and a test holds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["CHECKS", "Finding", "Mend", "Status", "fail", "ok", "warn"]

Status = Literal["ok", "warn", "FAIL"]

# In the order in which they are asked.
CHECKS = (
    "config",
    "key",
    "folder",
    "daemon",
    "sockets",
    "users",
    "clock",
    "listen",
    "announce",
    "bootstrap",
    "reach",
    "roster",
    "run",
    "versions",
    "disk",
    "memory",
    "gpu",
    "open-files",
    "service",
    "data",
    "ledger",
    "task",
    "trainer",
)


@dataclass(frozen=True, slots=True)
class Mend:
    """A repair that is safe to do by itself.

    Attributes:
        path: Of the file or folder.
        mode: The mode it gets; None: it is a stale socket and is removed.
    """

    path: Path
    mode: int | None


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table.

    Attributes:
        check: One of `CHECKS`.
        status: ok, warn or FAIL.
        found: What was found, one line.
        fix: How to mend it, one line; a command to paste where there is one.
        mend: What `--fix` may do about it.
    """

    check: str
    status: Status
    found: str
    fix: str = ""
    mend: Mend | None = None

    def __post_init__(self) -> None:
        assert self.check in CHECKS, self.check
        assert self.status == "ok" or self.fix, f"{self.check} fails without a fix"


def ok(check: str, found: str, fix: str = "") -> Finding:
    """All is well; `fix` may say what comes next."""
    return Finding(check, "ok", found, fix)


def warn(check: str, found: str, fix: str, mend: Mend | None = None) -> Finding:
    """It works, but should be looked after."""
    return Finding(check, "warn", found, fix, mend)


def fail(check: str, found: str, fix: str, mend: Mend | None = None) -> Finding:
    """The node cannot do its work, or something is open that must be closed."""
    return Finding(check, "FAIL", found, fix, mend)
