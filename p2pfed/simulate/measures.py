"""What a simulated run is measured by: consensus, coverage, bytes, rounds.

Consensus is how many different models the honest nodes hold, and how good the worst and the best
are where the training can say. Coverage is the share of (delta, node) pairs that arrived, of all
nodes that had been started by the release, by gossip intervals since then. Plain numbers, ready for
JSON.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from p2pfed.gossip.events import Effect, StoreDelta
from p2pfed.simulate.node import SimulatedNode
from p2pfed.simulate.training import Training

__all__ = ["Measures"]

LONGEST = 256  # gossip intervals; what comes later is counted in the last one


class Measures:
    """See the module docstring.

    Args:
        interval: Of gossip, seconds.
        training: Gives scores.
    """

    def __init__(self, interval: float, training: Training) -> None:
        self.points: list[dict[str, Any]] = []
        self._interval = interval
        self._training = training
        self._released: dict[bytes, tuple[float, int]] = {}  # name -> (when, its number)
        self._held: dict[int, int] = {}  # node -> bits: which releases arrived, so that none counts
        self._arrived = [0] * (LONGEST + 1)  # twice after a crash that lost it
        self._expected = 0
        self._scores: dict[bytes, float | None] = {}

    def watch(
        self, node: SimulatedNode, now: float, effects: Iterable[Effect], started: int
    ) -> None:
        """Take in what a node stored.

        Args:
            node: The node.
            now: The true time.
            effects: What it did.
            started: How many nodes were ever started.
        """
        for effect in effects:
            if not isinstance(effect, StoreDelta):
                continue
            fact = effect.delta.fact
            if effect.own:
                if fact not in self._released:
                    self._released[fact] = (now, len(self._released))
                    self._expected += started - 1
            elif fact in self._released:
                self._arrive(node, now, *self._released[fact])

    def _arrive(self, node: SimulatedNode, now: float, released: float, number: int) -> None:
        held = self._held.get(node.index, 0)
        if node.born_at <= released and not held >> number & 1:
            self._held[node.index] = held | 1 << number
            self._arrived[min(int((now - released) / self._interval), LONGEST)] += 1

    def sample(self, now: float, nodes: list[SimulatedNode]) -> None:
        """One point of every curve."""
        if not nodes:
            return
        rounds = sorted(node.round for node in nodes)
        scores = [s for node in nodes if (s := self._score(node)) is not None]
        done = max(1, rounds[len(rounds) // 2])
        received = [node.bytes_received / done for node in nodes]
        facts = [node.fact_bytes_received / done for node in nodes]
        self.points.append(
            {
                "t": round(now, 3),
                "nodes": len(nodes),
                "models": len({node.hash for node in nodes}),
                "round_least": rounds[0],
                "round_median": rounds[len(rounds) // 2],
                "round_most": rounds[-1],
                "score_worst": min(scores, default=None),
                "score_best": max(scores, default=None),
                "bytes_per_round": round(statistics.median(received)),
                "fact_bytes_per_round": round(statistics.median(facts)),
            }
        )

    def _score(self, node: SimulatedNode) -> float | None:
        if not node.hash:
            return None
        if node.hash not in self._scores:
            if len(self._scores) > 1 << 12:
                self._scores.clear()
            self._scores[node.hash] = self._training.score(node.model)
        return self._scores[node.hash]

    def coverage(self) -> list[float]:
        """Share of what was released that had arrived, by gossip intervals since the release."""
        shares, total = [], 0
        for count in self._arrived:
            total += count
            shares.append(round(total / max(1, self._expected), 6))
        last = next((i for i, s in enumerate(shares) if s == shares[-1]), 0)
        return shares[: last + 1]
