"""Where a model comes from: the facts that go with a snapshot, for its reader's eyes and programs.

Names and numbers come from signed documents and this node's own believed facts. What was spent is
this node's own figure, as `status` shows it.

Not here: the model itself (`snapshot`), a model card (`p2pfed model export`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from p2pfed import __version__
from p2pfed.gossip.core import Core
from p2pfed.identity.book import RosterBook
from p2pfed.identity.run import Run
from p2pfed.node.snapshot import Snapshot

__all__ = ["FORMAT", "provenance"]

FORMAT = 1


def provenance(
    run: Run, snapshot: Snapshot, core: Core, node: str, spent: Mapping[str, Any]
) -> dict[str, Any]:
    """The facts of a snapshot, as a JSON object.

    Args:
        run: The run.
        snapshot: The model; no fold has run since.
        core: The node's core.
        node: The node's name.
        spent: What the trainer said it has spent so far.

    Returns:
        Among others `deltas`: how many deltas of each hospital are in the model, None where this is
        not known (a restarted node whose facts have changed since its last fold). A node that
        joined late counts what it holds of the rounds before `deltas_known_from`.
    """
    roster = core.book.current
    origins = _origins(snapshot, core)
    return {
        "v": FORMAT,
        "p2pfed": __version__,
        "run": run.name,
        "run_id": run.run_id.hex(),
        "task": run.task,
        "task_id": run.task_id.hex(),
        "num_parameters": run.num_parameters,
        "round": snapshot.state.round,
        "rounds": run.rounds,
        "chain": snapshot.chain.hex(),
        "averaging": run.averaging.mode,
        "deltas": None if origins is None else _by_name(origins, core.book),
        "deltas_known_from": snapshot.known_from,
        "mechanism": run.mechanism,
        "unit": run.unit,
        "relation": run.gate.relation(run.unit),
        "epsilon": float(run.epsilon),
        "delta": float(run.delta),
        "spent_epsilon": spent.get("spent_epsilon", 0.0),
        "releases": spent.get("releases", 0),
        "network": roster.network if roster is not None else "",
        "network_id": run.network_id.hex(),
        "roster_version": roster.version if roster is not None else 0,
        "roster_hash": roster.hash.hex() if roster is not None else "",
        "node": node,
        "peer_id": core.own_id,
    }


def _origins(snapshot: Snapshot, core: Core) -> Mapping[str, int] | None:
    """Deltas by peer id; of a model from a checkpoint, where it stands for the facts of now."""
    facts, round_ = core.facts, snapshot.state.round
    if snapshot.origins is not None:
        return snapshot.origins
    if facts is None or facts.chain(round_) != snapshot.chain:
        return None
    return Counter(delta.origin for r in range(round_) for delta in facts.counted(r))


def _by_name(origins: Mapping[str, int], book: RosterBook) -> dict[str, int]:
    """Counts by hospital; by peer id where no roster knows it, or two have one name."""
    names: dict[str, str] = {}
    for roster in book.newest_first():
        for member in roster.members:
            names.setdefault(member.peer_id, member.name)
    called = {origin: names.get(origin, origin) for origin in sorted(origins)}
    often = Counter(called.values())
    return {
        (name if often[name] == 1 else origin): origins[origin] for origin, name in called.items()
    }
