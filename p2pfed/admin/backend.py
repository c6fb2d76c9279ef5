"""What the node offers to its operator, as the admin room sees it: `AdminBackend`.

The node room implements it (`node/operator`, `node/view`); a test fakes it. Nothing in it can raise
a privacy budget.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from p2pfed.admin.prometheus import Measured
from p2pfed.admin.reachability import Reached

__all__ = ["AdminBackend"]


class AdminBackend(Measured, Reached, Protocol):
    """What the node offers to its operator; every value can be written as JSON, but the model.

    Any method may raise a P2PFedError, which the caller of the endpoint is told.

    Attributes:
        operators: User ids that may write, besides root and the daemon's own.
    """

    @property
    def operators(self) -> frozenset[int]:
        """User ids that may write, besides root and the daemon's own."""

    def note_write(self, uid: int, user: str, endpoint: str, outcome: str) -> None:
        """Keep in the event log who wrote, or tried to.

        Args:
            uid: The caller's user id, as the kernel says.
            user: Its name.
            endpoint: Method and path.
            outcome: `done`, or the kind of the refusal (`web-page` where a browser may have sent
                it); `cancelled` where the caller went before it was over.
        """

    def status(self) -> dict[str, Any]:
        """What `p2pfed status` shows."""

    async def model(self) -> BinaryIO:
        """The common model as one safetensors file, at its beginning; the caller closes it."""

    def peers(self) -> list[dict[str, Any]]:
        """All members that this node knows, with what it has seen of them."""

    def peer(self, peer: str) -> dict[str, Any]:
        """One member by peer id, by a unique beginning of it, or by name; raises NotFound."""

    def privacy(self) -> dict[str, Any]:
        """Mechanism, ceiling and what was spent, as far as the public plane knows it."""

    def roster(self) -> dict[str, Any]:
        """The roster in force; `signed` holds the exact text of the document."""

    def bootstrap(self) -> list[dict[str, Any]]:
        """The peers that are asked first."""

    def runs(self) -> list[dict[str, Any]]:
        """The runs that are known, and whether this hospital accepted them."""

    def events(
        self, since: int, limit: int, *, kind: str = "", after: dt.datetime | None = None
    ) -> tuple[list[dict[str, Any]], int, int]:
        """Events with seq > since, oldest first; how many before them are lost; where to go on.

        Args:
            since: Only events with a higher number.
            limit: The most that are given.
            kind: Only events whose type matches this pattern; empty for all.
            after: Only from the first event on that happened then or later.
        """

    def before_newest(self, count: int, kind: str) -> int:
        """The number after which the newest `count` events of a kind come; 0 if there are fewer.

        Args:
            count: At least 1.
            kind: Only events whose type matches this pattern; empty for all.
        """

    async def next_event(self, since: int) -> None:
        """Return once an event with seq > since exists."""

    def logs(self, level: str) -> AsyncGenerator[dict[str, Any], None]:
        """Log records of at least this level from now on; a line of type `gap` tells of a loss."""

    async def reload(self) -> dict[str, Any]:
        """Read the configuration file again; says what came of each change."""

    async def join(
        self, *, roster: bytes | None, bootstrap: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Join the network, given a signed roster and bootstrap lists (each a parsed file)."""

    async def leave(self) -> dict[str, Any]:
        """Leave the network for good, telling the peers."""

    async def share(self, on: bool) -> dict[str, Any]:
        """Start or stop releasing deltas; receiving goes on."""

    async def pause(self, on: bool) -> dict[str, Any]:
        """End the trainer and start none, or have one again; receiving goes on."""

    async def block(self, peer: str, on: bool) -> dict[str, Any]:
        """Have no connection with a member, or have one again."""

    async def accept_run(self, signed: bytes, genesis: Path | None) -> dict[str, Any]:
        """Accept a signed run file; `genesis` is a local copy of its first model."""

    async def offer_roster(self, signed: bytes) -> dict[str, Any]:
        """Take a newer signed roster from the operator's hand."""
