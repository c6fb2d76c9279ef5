"""When a round starts and ends: no barrier, nobody waits longer than the deadline.

Pure functions over weights; the state is in `progress`. Weights are those of the newest roster
(`weights`); only members with a seat in the round release (`committee`).

* A round starts when at least `min_live` of the weight that has not left is alive: a node alone
  with the network cut off does not burn its budget on rounds of its own.
* It ends when deltas of `quorum` of the *live contributing* weight are in, or at the deadline, and
  not before `min_round_interval_s`.
* A node behind the others jumps to round r only when deltas of rounds >= r are there from more than
  a third of the weight that has a seat in r, and deltas of about that round from more than a third
  of all weight: no single member can drag the others along.

Source: the quorum and the harmlessness of lateness were measured (one round late costs 0 to 2
points of accuracy); the third is the usual bound of Byzantine members.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from collections.abc import Set as AbstractSet

from p2pfed.identity.run import Run

__all__ = ["AHEAD", "enough_alive", "furthest_round", "quorum_reached"]

AHEAD = 2  # deltas further ahead than this are set aside until a third of the weight is there


def _sum(weights: Mapping[str, int], peers: Collection[str]) -> int:
    return sum(weights.get(peer, 0) for peer in peers)


def enough_alive(
    weights: Mapping[str, int], *, alive: AbstractSet[str], left: AbstractSet[str], run: Run
) -> bool:
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
    weights: Mapping[str, int],
    *,
    contributing: AbstractSet[str],
    arrived: AbstractSet[str],
    run: Run,
) -> bool:
    """Whether deltas of enough of the live contributing weight are in.

    Args:
        weights: Weight by peer id.
        contributing: Present members with a seat that say they contribute, this node included.
        arrived: Origins whose delta for the round is held.
        run: Gives `quorum`.
    """
    waited_for = _sum(weights, contributing)
    return bool(arrived) and _sum(weights, arrived & contributing) >= run.quorum * waited_for


def furthest_round(
    weights: Mapping[str, int],
    newest: Mapping[str, int],
    seated: Callable[[int], Collection[str]] | None = None,
    *,
    beyond: int = 0,
    slack: int = 0,
) -> int:
    """The highest round r such that more than a third of r's weight has a delta of a round >= r.

    Args:
        weights: Weight by peer id.
        newest: Round of each origin's newest held delta.
        seated: Who has a seat in a round; everybody, if None.
        beyond: Only rounds after this one are of interest.
        slack: With committees a few liars may have a third of some far round's seats. So more than
            a third of the whole weight must have a delta of a round >= r - slack as well, which is
            about two turns of the committee.

    Returns:
        The round, or 0.
    """
    for round_ in sorted({r for r in newest.values() if r > beyond}, reverse=True):
        seats = weights if seated is None else seated(round_)
        there = [peer for peer in seats if newest.get(peer, -1) >= round_]
        near = [peer for peer, newest_round in newest.items() if newest_round >= round_ - slack]
        enough = 3 * _sum(weights, near) > sum(weights.values())
        if enough and 3 * _sum(weights, there) > _sum(weights, seats):
            return round_
    return 0
