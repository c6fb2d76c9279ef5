"""A pace: so many a second of whatever is counted, bytes sent by us or messages taken from a peer.

What was spent is a debt that time pays off. Who has been quiet may run ahead by ``credit`` seconds.
Without a rate nothing ever waits.

As upload cap it counts the bytes of all connections of the node together: bulk waits while there is
a debt; small urgent messages never wait, but they count.

Source: token bucket (Turner 1986), with sends that may overdraw it once.
Not here: which bytes are bulk (``yamux``), the waiting (``link``, ``serving``, ``ping``).
"""

from __future__ import annotations

__all__ = ["Pace"]


class Pace:
    """See the module docstring.

    Args:
        per_second: The rate; None for no bound.
        credit: Seconds' worth that may be spent at once after a pause.
    """

    def __init__(self, per_second: float | None = None, *, credit: float = 0.0) -> None:
        self._rate = per_second
        self._credit = credit
        self._paid_at = float("-inf")  # when the debt is paid off

    def change(self, per_second: float | None) -> None:
        """Have another rate from now on; None for no bound."""
        self._rate = per_second

    @property
    def burst(self) -> float:
        """What a tenth of a second pays for: no more should be sent at once."""
        return float("inf") if self._rate is None else self._rate / 10

    def seconds(self, count: int) -> float:
        """How long so many take at the rate; 0 without one."""
        return 0.0 if self._rate is None else count / self._rate

    def spend(self, count: int, now: float) -> None:
        """So many are being sent, or taken."""
        if self._rate is not None:
            self._paid_at = max(self._paid_at, now - self._credit) + count / self._rate

    def delay(self, now: float) -> float:
        """Seconds until the debt is paid off; 0 if there is none."""
        return max(0.0, self._paid_at - now)
