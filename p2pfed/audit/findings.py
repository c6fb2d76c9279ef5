"""What a check of the audit found, in words for people and a verdict for programs.

Not here: the checks, and how findings are printed (`cli.audit`).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Finding"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One claim, and whether it held on this machine.

    Attributes:
        name: Which check, e.g. "membership/svt/epsilon=1".
        claim: What must hold, in one sentence with its numbers.
        found: What was measured, with its numbers.
        passed: Whether the claim held.
    """

    name: str
    claim: str
    found: str
    passed: bool
