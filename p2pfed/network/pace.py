"""An upload cap: so many bytes a second for bulk, over all connections of the node together.

What was sent is a debt that time pays off; bulk waits while there is one. Small urgent messages
never wait, but they count. Without a cap nothing ever waits.

Source: token bucket (Turner 1986), with sends that may overdraw it once.
Not here: which bytes are bulk (``yamux``), the waiting (``link``).
"""

from __future__ import annotations

__all__ = ["Pace"]


class Pace:
    """See the module docstring.

    Args:
        bytes_per_second: The cap; None for no cap.
    """

    def __init__(self, bytes_per_second: float | None = None) -> None:
        self._rate = bytes_per_second
        self._paid_at = float("-inf")  # when the debt is paid off

    @property
    def burst(self) -> float:
        """Bytes that a tenth of a second pays for: no more should be sent at once."""
        return float("inf") if self._rate is None else self._rate / 10

    def seconds(self, count: int) -> float:
        """How long so many bytes take at the cap; 0 without one."""
        return 0.0 if self._rate is None else count / self._rate

    def spend(self, count: int, now: float) -> None:
        """So many bytes are being sent."""
        if self._rate is not None:
            self._paid_at = max(self._paid_at, now) + count / self._rate

    def delay(self, now: float) -> float:
        """Seconds until bulk may be sent; 0 if it may."""
        return max(0.0, self._paid_at - now)
