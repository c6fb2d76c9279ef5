"""The approval: one file that brings a new member all it needs from the stewards.

A JSON object with the signed roster, a bootstrap list and a signed run file, each as the exact text
of its own file; the last two may be missing. It is not signed itself: roster and run are, and a
bootstrap list needs no signature (`identity.bootstrap`).

Invariant: every command that reads a roster or run file from disk takes an approval as well, by
`roster_text` and `run_text`; what is no approval is handed through unread.

Not here: what the parts mean.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from p2pfed.errors import ConfigError, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Approval", "roster_text", "run_text"]

KIND = "p2pfed.approval/1"
MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Approval:
    """The parts of an approval file.

    Attributes:
        roster: Text of the signed roster.
        bootstrap: Text of a bootstrap list (TOML), or None.
        run: Text of the signed run file, or None.
    """

    roster: str
    bootstrap: str | None = None
    run: str | None = None

    def encode(self) -> bytes:
        """The file."""
        parts = {"type": KIND, "roster": self.roster, "bootstrap": self.bootstrap, "run": self.run}
        return (json.dumps(parts, indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def parse(cls, text: str) -> Approval | None:
        """Read an approval, or None if `text` is something else.

        Raises:
            ConfigError: It is one, but malformed.
        """
        if KIND not in text[:64] or len(text) > MOST_BYTES:
            return None
        try:
            data: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _malformed(str(error)[:120]) from error
        if not isinstance(data, dict) or set(data) != {"type", "roster", "bootstrap", "run"}:
            raise _malformed("it holds a roster, a bootstrap list and a run file, nothing else")
        optional = (data["bootstrap"], data["run"])
        if not isinstance(data["roster"], str) or not all(
            part is None or isinstance(part, str) for part in optional
        ):
            raise _malformed("each part must be a text")
        try:  # JSON can name halves of characters, which no file holds
            "".join(part for part in (data["roster"], *optional) if part).encode()
        except UnicodeEncodeError as error:
            raise _malformed("a part holds what is no text") from error
        return cls(data["roster"], *optional)


def roster_text(text: str) -> str:
    """The roster in an approval; anything else as it is."""
    approval = Approval.parse(text)
    return text if approval is None else approval.roster


def run_text(text: str) -> str:
    """The run file in an approval; anything else as it is.

    Raises:
        NotFound: The approval brings no run.
    """
    approval = Approval.parse(text)
    if approval is None:
        return text
    if approval.run is None:
        raise NotFound(
            "this approval brings no run",
            "the stewards gave none to `invite approve --run`",
            "ask them for the run file, then: p2pfed run accept FILE",
        )
    return approval.run


def _malformed(why: str) -> ConfigError:
    return ConfigError("the approval is malformed", why, "ask the steward to send it once more")
