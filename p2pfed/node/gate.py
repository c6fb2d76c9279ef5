"""Whom the network lets in: the roster, asked anew each time."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

import trio

from p2pfed.errors import FactRejected
from p2pfed.gossip.events import RosterOffered
from p2pfed.gossip.guard import BLOBS, Bucket
from p2pfed.node.directory import DataDirectory
from p2pfed.node.shell import Shell

__all__ = ["RosterGate", "blocked_lines"]

logger = logging.getLogger(__name__)


def blocked_lines(shell: Shell) -> list[str]:
    """A reminder for each member that the operator has blocked, with what undoes it."""
    roster = shell.core.book.current
    members = [] if roster is None else [m for m in roster.members if m.peer_id in shell.blocked]
    return [
        f"{member.name} is blocked here; to undo: p2pfed unblock {shlex.quote(member.name)}"
        for member in members
    ]


class RosterGate:
    """The network room's gatekeeper; `shell` is set once the node is composed."""

    def __init__(self, directory: DataDirectory) -> None:
        self.shell: Shell | None = None
        self._directory = directory
        self._asked: dict[str, Bucket] = {}  # members only, so as many as a roster lists

    def is_member(self, peer: str) -> bool:
        """Whether the newest roster lists the peer; nobody is let in after `leave`.

        Nor is anybody whom the operator blocked.
        """
        shell = self.shell
        if shell is None or not shell.present or shell.core.book.current is None:
            return False
        if peer in shell.blocked:
            return False
        return shell.core.book.current.member(peer) is not None

    def current_roster(self) -> bytes:
        """The newest signed roster, to be shown to a peer that may hold an older one."""
        book = self.shell.core.book if self.shell is not None else None
        if book is None or book.current is None:
            return b""
        return book.signed(book.current.hash) or b""

    def consider_roster(self, peer: str, signed: bytes) -> bool:
        """Believe a roster if it verifies; whether the peer is a member then.

        A node that holds no roster yet learns none from strangers: the first comes from its
        operator.
        """
        if self.shell is None or not self.shell.present or self.shell.core.book.current is None:
            return False
        try:
            self.shell.core.book.check(signed)
        except FactRejected as error:
            logger.info("a roster offered by %s is rejected: %s", peer, error.what)
            return self.is_member(peer)
        self.shell.feed(RosterOffered(signed))
        return self.is_member(peer)

    def open_blob(self, peer: str, digest: bytes) -> Path | None:
        """A genesis or a checkpoint, by its hash; nothing else is ever served.

        Nor is anything to who asks too often: that reads as "not held".
        """
        if self.shell is None or not self.is_member(peer):
            return None
        now = trio.current_time()
        if not self._asked.setdefault(peer, Bucket.full(BLOBS, now)).take(1, now):
            return None
        genesis = self._directory.blob(digest)
        if genesis.exists():
            return genesis
        return self.shell.model.checkpoints.find(digest) if self.shell.model is not None else None
