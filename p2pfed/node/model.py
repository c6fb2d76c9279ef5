"""The model of the current run: the fold in a worker thread, and the view for the trainer.

Folding is never done in the event loop. One fold runs at a time (the core sees to that); the state
in memory belongs to it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from p2pfed.errors import FactRejected
from p2pfed.gossip.events import Fold, Folded, FoldFellShort
from p2pfed.gossip.fold import ModelState, model_hash
from p2pfed.gossip.replay import Replay
from p2pfed.identity.run import Run
from p2pfed.node.checkpoints import DiskCheckpoints, read_genesis
from p2pfed.node.handover import Handover, Mean
from p2pfed.node.snapshot import Snapshot, Tally
from p2pfed.node.store import Store
from p2pfed.wire.payload import Payload, decode_payload

__all__ = ["Model"]


class Model:
    """The fold of one run on one node.

    Args:
        run: The run.
        genesis: File of its first model.
        checkpoints: Where states are kept.
        store: Where payloads are read from.
        view: Where the newest model is written for the trainer; None without one.

    Raises:
        FactRejected: The genesis file is not the run's.
    """

    def __init__(
        self, run: Run, genesis: Path, checkpoints: DiskCheckpoints, store: Store, view: Path | None
    ) -> None:
        self.checkpoints = checkpoints
        self._run = run
        self._store = store
        self._tally = Tally()
        self._state: ModelState | None = None
        self._view = None if view is None else Handover(view)
        corrects = view is not None and run.averaging.drift_correction
        self._mean = np.zeros(run.num_parameters, np.float32) if corrects else None
        read_genesis(genesis, run)  # refuse a wrong one now rather than in the middle of a run
        self._replay = Replay(run, lambda: read_genesis(genesis, run), checkpoints, self._payload)

    def _payload(self, fact: bytes) -> Payload:
        return decode_payload(
            self._store.payload(fact),
            num_parameters=self._run.num_parameters,
            max_released=self._run.max_released,
            width=self._run.encoding.values,
        )

    def fold(self, wanted: Fold) -> Folded | FoldFellShort:
        """Fold, write the view, and say what came out; blocks, for a worker thread.

        Raises:
            FactRejected: The genesis file was damaged since the start.
            ConfigError: A stored delta was, or there is no room for the view.
        """
        self._state = None  # a fold that fails half-way leaves none behind
        state = self._replayed(wanted)
        if state is None:
            return FoldFellShort()
        self._tally.take(wanted)
        self._state = state
        if self._view is not None:
            self._view.write(state.model, grid_bits=self._run.grid_bits, mean=self._newest_mean())
        return Folded(wanted.round, self._replay.chain, model_hash(state))

    def newest(self) -> Snapshot | None:
        """The model of the last fold, else of the newest checkpoint; None where there is neither.

        Blocks, for a worker thread; no fold may run meanwhile.
        """
        if self._state is not None:
            return self._tally.snapshot(self._state, self._replay.chain)
        for round_, chain in sorted(self.checkpoints.chains().items(), reverse=True):
            try:
                return Snapshot(self.checkpoints.load(round_), chain, None, 0)
            except FactRejected:
                continue  # damaged; it is gone now
        return None

    def _newest_mean(self) -> Mean | None:
        """With drift correction, the mean of the last round that was folded."""
        if self._mean is None or self._replay.mean_round is None:
            return None
        return Mean(self._replay.mean_round, self._mean)

    def _replayed(self, wanted: Fold) -> ModelState | None:
        while True:
            held = self.checkpoints.chains()
            try:
                return self._replay.fold(wanted, mean=self._mean)
            except FactRejected:
                if self.checkpoints.chains() == held:
                    raise  # the genesis, then
                # A damaged checkpoint is gone now; the fold starts from an older one.
