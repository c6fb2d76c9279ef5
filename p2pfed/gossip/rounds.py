"""When a round starts and ends: no barrier, nobody waits longer than the deadline.

Pure functions over weights; the state is in `core`. Weights are public sample counts of the newest
roster.

* A round starts when at least `min_live` of the weight that has not left is alive: a node alone
  with the network cut off does not burn its budget on rounds of its own.
* It ends when deltas of `quorum` of the *live contributing* weight are in, or at the deadline, and
  not before `min_round_interval_s`.
* A node behind the others jumps to round r only when members with more than a third of the weight
  hold deltas of rounds >= r: no single member can drag the others along.

Source: the quorum and the harmlessness of lateness were measured (one round late costs 0 to 2
points of accuracy); the third is the usual bound of Byzantine members.
"""

from __future__ import annotations

from collections.abc import Mapping

from p2pfed.identity.roster import Roster
from p2pfed.identity.run import Run

__all__ = ["AHEAD", "enough_alive", "furthest_round", "quorum_reached", "weights_of"]

AHEAD = 2  # deltas further ahead than this are set aside until a third of the weight is there


def weights_of(roster: Roster) -> dict[str, int]:
    """Weight of every member that trains."""
    return {m.peer_id: m.samples for m in roster.members if m.trains}


def _sum(weights: Mapping[str, int], peers: set[str]) -> int:
    return sum(weights.get(peer, 0) for peer in peers)


def enough_alive(weights: Mapping[str, int], *, alive: set[str], left: set[str], run: Run) -> bool:
    """Whether a round may start.

    Args:
        weights: Weight by peer id.
        alive: Present members, this node included.
        left: Members that said goodbye; they do not count in the whole.
        run: Gives `min_live`.
    """
    whole = _sum(weights, set(weights) - left)
    return whole > 0 and _sum(weights, alive) >= run.min_live * whole


def quorum_reached(
    weights: Mapping[str, int], *, contributing: set[str], arrived: set[str], run: Run
) -> bool:
    """Whether deltas of enough of the live contributing weight are in.

    Args:
        weights: Weight by peer id.
        contributing: Present members that say they contribute, this node included if it does.
        arrived: Origins whose delta for the round is held.
        run: Gives `quorum`.
    """
    waited_for = _sum(weights, contributing)
    return bool(arrived) and _sum(weights, arrived & contributing) >= run.quorum * waited_for


def furthest_round(weights: Mapping[str, int], newest: Mapping[str, int]) -> int:
    """The highest round r such that more than a third of the weight has a delta of a round >= r.

    Args:
        weights: Weight by peer id.
        newest: Round of each origin's newest held delta.

    Returns:
        The round, or 0.
    """
    third, reached = sum(weights.values()) / 3, 0
    for round_, weight in sorted(((newest[p], weights.get(p, 0)) for p in newest), reverse=True):
        reached += weight
        if reached > third:
            return round_
    return 0
