"""How well this node itself keeps up: 1 if it does, up to 8 if it is slow.

A node that is slow takes others for silent. So it looks for signs that the fault is its own, and
multiplies its timeouts by what it finds: its tick comes late; the answers of most peers come late
in the same second; most peers say at once that they do not hear it. Each second without such a sign
in which an answer came in time takes one off.

Answers that are *missing* are no sign: a node that is cut off misses them all, and would take eight
times as long to see it. They count when they come after all; and after some seconds without any,
what was found before fades too. A single peer can raise nothing.

Invariants: `factor` is in [1, 8]; one sign of a second adds 1, a late tick 1 for each beat that it
missed.

Source: local health multiplier (LHM) of Lifeguard (Dadgar, Phillips, Currey 2018, section IV.A,
arXiv 1707.00788), here for beats that go to all instead of probes of one at a time.
"""

from __future__ import annotations

__all__ = ["LocalHealth"]

MOST = 8
SEVERAL = 2  # that many peers at least, or it may be them
UNANSWERED = 5  # beat intervals after which nothing that was found before is believed any more
USUAL_SHARE = 0.125  # of the newest gap in what is usual


class LocalHealth:
    """See the module docstring.

    Args:
        beat_interval: Seconds between two beats: how late a tick is late.

    Attributes:
        factor: What timeouts are multiplied by.
    """

    def __init__(self, beat_interval: float) -> None:
        self.factor = 1
        self._beat_interval = beat_interval
        self._ticked_at: float | None = None
        self._usual: float | None = None
        self._next_judgement = self._slept_at = float("-inf")
        self._in_time: set[str] = set()
        self._late: set[str] = set()
        self._doubters: set[str] = set()
        self._unanswered = 0  # beat intervals in a row

    def tick(self, now: float) -> float:
        """Time passed; returns for how many seconds this node stood still, usually 0.

        Nobody was silent in that time: what others said waits to be read.
        """
        before, self._ticked_at = self._ticked_at, now
        if now >= self._next_judgement:
            self._next_judgement = now + self._beat_interval
            self._judge()
        if before is None:
            return 0.0
        gap = now - before
        usual = gap if self._usual is None else self._usual
        self._usual = usual + USUAL_SHARE * (min(gap, 2 * usual) - usual)
        if gap - usual <= self._beat_interval:
            return 0.0
        self._slept_at = now
        self._add(int((gap - usual) / self._beat_interval))
        return gap - usual

    def keeps_up(self, now: float) -> bool:
        """Whether what is read now was said now: nothing waits from a time when we stood still."""
        ticked_at = now if self._ticked_at is None else self._ticked_at
        slack = 2 * self._beat_interval + (self._usual or 0.0)
        return now - ticked_at <= slack and now - self._slept_at > slack

    def answered(self, peer: str, *, in_time: bool) -> None:
        """A peer answered a beat."""
        (self._in_time if in_time else self._late).add(peer)

    def doubted(self, peer: str) -> None:
        """A peer says that it does not hear us."""
        self._doubters.add(peer)

    def _judge(self) -> None:
        """A beat interval is over."""
        in_time, late, doubters = len(self._in_time), len(self._late), len(self._doubters)
        if late >= max(SEVERAL, in_time) or doubters >= max(SEVERAL, (in_time + late) / 2):
            self._add(1)
        elif in_time or self._unanswered >= UNANSWERED:
            self._add(-1)
        self._unanswered = 0 if in_time or late or doubters else self._unanswered + 1
        for signs in (self._in_time, self._late, self._doubters):
            signs.clear()

    def _add(self, steps: int) -> None:
        self.factor = min(MOST, max(1, self.factor + steps))
