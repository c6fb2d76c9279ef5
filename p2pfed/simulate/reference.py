"""The model that a node's stored facts make, folded in one go from the genesis.

A second way to the same result: no checkpoint, no plan that begins later, nothing shared with what
the node has folded before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2pfed.gossip.events import Fold
from p2pfed.gossip.facts import RunFacts
from p2pfed.gossip.fold import ModelState
from p2pfed.gossip.replay import MemoryCheckpoints, Replay
from p2pfed.identity.book import RosterBook
from p2pfed.wire.delta import Proof

if TYPE_CHECKING:
    from p2pfed.simulate.heap import EventHeap
    from p2pfed.simulate.node import SimulatedNode

__all__ = ["fold_from_genesis"]


def fold_from_genesis(
    node: SimulatedNode, heap: EventHeap, round_: int
) -> tuple[ModelState, bytes]:
    """Fold all that a node has stored up to a round.

    Returns:
        The state, and the chain that it stands for.
    """
    book = RosterBook()
    for signed in node.disk.rosters:
        book.restore(signed)
    facts = RunFacts(heap.run, book)
    for delta in reversed(node.disk.deltas.values()):
        facts.add(delta.signed)
    for proof in node.disk.proofs:
        facts.add_proof(Proof.decode(proof))
    plan = Fold(
        round_,
        tuple(facts.chain(r) for r in range(round_ + 1)),
        tuple(facts.counted(r) for r in range(round_)),
    )
    replay = Replay(
        heap.run,
        lambda: heap.genesis,
        MemoryCheckpoints(),
        lambda fact: heap.folds.decode(node.disk.deltas[fact].payload),
    )
    state = replay.fold(plan)
    assert state is not None
    return state, plan.chains[-1]
