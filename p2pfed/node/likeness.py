"""How others differ from this node in what they speak and hold, and what they let all members know.

Invariant: what a peer says is shown as what it says: a measure counts for the run and the rounds
that this node knows, and is nobody's word but the peer's.

Not here: agreeing on a version (`network/speaking`), the beat that carries a measure (`wire/beat`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from p2pfed.gossip.local_rounds import LocalRounds
from p2pfed.gossip.membership import Peer, State
from p2pfed.identity.run import Run
from p2pfed.node.pairing import PairModel
from p2pfed.wire.versions import VERSIONS, speaks

__all__ = ["measure_of", "meetings_of", "speech_of", "unlike_lines"]


def unlike_lines(peers: Iterable[Peer], ours: tuple[int, ...] = VERSIONS) -> list[str]:
    """One line for each member with which this node has no version of the wire in common."""
    return [
        _unlike_line(p.name, p.speaks, ours)
        for p in peers
        if p.speaks is not None and p.state is not State.REVOKED
    ]


def _unlike_line(name: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> str:
    if not theirs:
        return f"{name} speaks no wire version that this node speaks ({speaks(ours)}); update both"
    behind = name if max(theirs) < min(ours) else "this node"
    return f"{name} speaks wire version {speaks(theirs)}, this node {speaks(ours)}; update {behind}"


def speech_of(peer: Peer) -> dict[str, Any]:
    """The version spoken with a peer, and what it speaks where there is none in common."""
    return {
        "wire_version": peer.version if peer.connected else None,
        "speaks": None if peer.speaks is None else list(peer.speaks),
    }


def measure_of(peer: Peer, run: Run | None) -> dict[str, Any] | None:
    """What a peer says of its newest evaluation in our run: `name`, `round`, `value`."""
    beat = peer.beat
    if beat is None or beat.measure is None or run is None or beat.run_id != run.run_id:
        return None
    return beat.measure.as_json() if beat.measure.round <= run.rounds else None


def meetings_of(progress: object, model: object) -> dict[str, Any]:
    """In pairwise mode: the meetings begun since the start, and how far models are apart."""
    if not isinstance(progress, LocalRounds):
        return {}
    meetings = progress.meetings
    return {
        "meetings": {"begun": meetings.met, "failed": meetings.failed},
        "consensus_distance": model.consensus_distance if isinstance(model, PairModel) else None,
    }
