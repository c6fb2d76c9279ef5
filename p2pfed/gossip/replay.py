"""Replay: bring the model to a round from the newest state that stands for the right facts.

A state at round r may be continued if its chain equals the plan's chain for r: then it folded
exactly what the plan counts before r. A late delta, a revocation or a proof changes the chains from
its round on, so that newer states stop matching and the replay starts from an older checkpoint, at
worst from the genesis. Nobody has to remember what is dirty. A plan need not begin with the
genesis: one that begins later relies on a state that is at hand, and if it is not, says so.

Pure except for the two protocols: where payloads come from and where checkpoints are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from p2pfed.gossip.events import Fold
from p2pfed.gossip.facts import Counted
from p2pfed.gossip.fold import ModelState, fold_round, genesis_state
from p2pfed.gossip.joining import checkpoint_interval, kept_rounds
from p2pfed.identity.run import Run
from p2pfed.wire.payload import Payload

__all__ = ["CheckpointStore", "MemoryCheckpoints", "Replay"]


class CheckpointStore(Protocol):
    """Keeps states by round, each with the chain that it stands for."""

    def chains(self) -> Mapping[int, bytes]:
        """Round -> chain of every checkpoint."""

    def load(self, round_: int) -> ModelState:
        """An independent copy of the state at a round."""

    def save(self, state: ModelState, chain: bytes) -> None:
        """Keep a state durably, replacing one of the same round."""

    def prune(self, keep: frozenset[int]) -> None:
        """Drop checkpoints of other rounds."""


class MemoryCheckpoints:
    """Checkpoints in memory, for simulation."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[ModelState, bytes]] = {}

    def chains(self) -> Mapping[int, bytes]:
        """Round -> chain of every checkpoint."""
        return {r: chain for r, (_, chain) in self.held.items()}

    def load(self, round_: int) -> ModelState:
        """An independent copy of the state at a round."""
        return self.held[round_][0].copy()

    def save(self, state: ModelState, chain: bytes) -> None:
        """Keep a copy of a state."""
        self.held[state.round] = (state.copy(), chain)

    def prune(self, keep: frozenset[int]) -> None:
        """Drop checkpoints of other rounds."""
        self.held = {r: kept for r, kept in self.held.items() if r in keep}


@dataclass(frozen=True, slots=True)
class _Stored:
    """A contribution whose payload is read when it is needed, and not kept."""

    counted: Counted
    read: Callable[[bytes], Payload]

    @property
    def payload(self) -> Payload:
        return self.read(self.counted.fact)

    @property
    def weight(self) -> int:
        return self.counted.weight


class Replay:
    """The model of one run on one node.

    Args:
        run: The run.
        genesis: Reads the first model, shape (P,), float32.
        checkpoints: Where states are kept.
        payload_of: Reads the payload of a delta by its name.

    Attributes:
        mean_round: The round whose mean delta the last `fold` with a `mean` left there; None for
            none.
    """

    def __init__(
        self,
        run: Run,
        genesis: Callable[[], NDArray[np.float32]],
        checkpoints: CheckpointStore,
        payload_of: Callable[[bytes], Payload],
    ) -> None:
        self._run = run
        self._genesis = genesis
        self._checkpoints = checkpoints
        self._payload_of = payload_of
        self._state: ModelState | None = None
        self._chain = run.run_id
        self.mean_round: int | None = None

    @property
    def chain(self) -> bytes:
        """What the last fold stands for; empty if the adopted checkpoint it needed was lost."""
        return self._chain

    def fold(self, wanted: Fold, *, mean: NDArray[np.float32] | None = None) -> ModelState | None:
        """The state before round `wanted.round`; valid until the next call.

        Takes one pass over the state for each round that has to be replayed.

        Args:
            wanted: What to fold.
            mean: Shape (P,), the same at every call; filled with the mean delta of the last round
                that is folded, which `mean_round` names.

        Returns:
            The state, or None if no state is held that the plan could be continued from.
        """
        kept = kept_rounds(wanted.round, checkpoint_interval(self._run.num_parameters))
        kept |= {wanted.adopted}
        state = self._rewound(wanted)
        if state is None:
            return None
        has_holes = state.round < wanted.adopted
        while state.round < wanted.round:
            deltas = [_Stored(item, self._payload_of) for item in wanted.deltas(state.round)]
            self.mean_round = None  # until the round is whole
            fold_round(state, deltas, self._run, mean=mean)
            self.mean_round = state.round - 1 if deltas else None
            doubtful = has_holes and state.round >= wanted.adopted
            self._chain = b"" if doubtful else wanted.chain(state.round) or b""
            if state.round in kept and not doubtful:
                self._checkpoints.save(state, self._chain)
        self._checkpoints.prune(kept)
        self._state = state
        return state

    def _rewound(self, wanted: Fold) -> ModelState | None:
        """The newest state that stands for the right facts, if there is one in the plan."""
        state, self._state = self._state, None  # a fold that fails half-way leaves none behind
        stands_for = (
            state is not None and self._chain != b"" and wanted.chain(state.round) == self._chain
        )
        best = state.round if state is not None and stands_for else -1
        for round_, chain in self._checkpoints.chains().items():
            if best < round_ and wanted.chain(round_) == chain:
                best = round_
        if state is not None and stands_for and best == state.round:
            return state
        del state  # two states at once would double the memory
        if best >= 0:
            self._chain = wanted.chain(best) or b""
            return self._checkpoints.load(best)
        if wanted.first > 0:
            return None
        self._chain = self._run.run_id
        return genesis_state(self._genesis(), self._run)
