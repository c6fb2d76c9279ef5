"""What was asked of whom, so that no payload is sent twice.

A key is the name of a fact, or the (round, origin) of a delta. It is asked of one peer at a time:
of somebody else after `patience` seconds and as long as all that is asked for takes to arrive over
a link of 100 Mbit/s, at once when that peer is gone.

Invariants: a peer that offers and never sends does not keep a fact from us (it has its turn, then
somebody else); made-up keys fill a bounded table and starve nobody (`MAX_WANTED` per peer).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

__all__ = ["MAX_WANTED", "PATIENCE", "Asked", "Key"]

PATIENCE = 2.0  # seconds
MAX_WANTED = 1024  # per peer: a round of the largest roster
LINK_BYTES_PER_S = 12_500_000
LONGEST_TRANSFER = 30.0  # seconds; made-up keys must not make us wait for ever

Key = bytes | tuple[int, str]


class Asked:
    """See the module docstring.

    Args:
        patience: Seconds until a key is asked of somebody else, if it is small.

    Attributes:
        most_bytes: Size of the largest delta, bytes.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self.patience = patience
        self.most_bytes = 0
        self._until: dict[Key, tuple[float, str]] = {}
        self._of: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._until)

    def may_ask(self, key: Key, peer: str, now: float) -> bool:
        """Whether this peer may be asked for it now."""
        held = self._until.get(key)
        if held is None:
            return True
        until, of = held
        # It had its turn; somebody else may have it now.
        return (until + self.patience if of == peer else until) <= now

    def room(self, peer: str) -> int:
        """How many more keys this peer may be asked for."""
        return max(0, MAX_WANTED - self._of[peer])

    def ask(self, keys: Iterable[Key], peer: str, now: float) -> None:
        """They are asked of this peer now."""
        asked = list(keys)
        transfer = (len(self._until) + len(asked)) * self.most_bytes / LINK_BYTES_PER_S
        until = now + self.patience + min(transfer, LONGEST_TRANSFER)
        for key in asked:
            self.arrived(key)
            self._until[key] = (until, peer)
            self._of[peer] += 1

    def arrived(self, key: Key) -> None:
        """It is here; nobody needs to be asked for it."""
        held = self._until.pop(key, None)
        if held is not None:
            self._of[held[1]] -= 1
            if not self._of[held[1]]:
                del self._of[held[1]]

    def gone(self, peer: str) -> None:
        """The connection is gone: what it was asked for may be asked of others at once."""
        if self._of[peer]:
            for key in [k for k, (_, of) in self._until.items() if of == peer]:
                self.arrived(key)

    def forget_stale(self, now: float) -> None:
        """Drop questions that were never answered, so that the table stays bounded."""
        for key in [k for k, (until, _) in self._until.items() if until + self.patience <= now]:
            self.arrived(key)
