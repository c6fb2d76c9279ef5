"""The model of the current run: the fold in a worker thread, and the view for the trainer.

Folding is never done in the event loop. One fold runs at a time (the core sees to that); the state
in memory belongs to it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from p2pfed.errors import FactRejected
from p2pfed.gossip.events import Fold, Folded, FoldFellShort
from p2pfed.gossip.fold import ModelState, model_hash, view_of
from p2pfed.gossip.replay import Replay
from p2pfed.identity.run import Run
from p2pfed.node.checkpoints import DiskCheckpoints, read_genesis
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
        self._view = view
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
            ConfigError: A stored delta was.
        """
        state = self._state(wanted)
        if state is None:
            return FoldFellShort()
        if self._view is not None:
            self._write(self._view, state)
        return Folded(wanted.round, self._replay.chain, model_hash(state))

    def _write(self, view: Path, state: ModelState) -> None:
        """Write what the trainer starts from: the model, and with drift correction the mean."""
        tensors, named = {"model": view_of(state, self._run.grid_bits)}, None
        if self._mean is not None and self._replay.mean_round is not None:
            tensors["mean"] = self._mean
            named = {"mean_round": str(self._replay.mean_round)}
        aside = view.with_suffix(".tmp")
        save_file(tensors, aside, metadata=named)
        aside.replace(view)

    def _state(self, wanted: Fold) -> ModelState | None:
        while True:
            held = self.checkpoints.chains()
            try:
                return self._replay.fold(wanted, mean=self._mean)
            except FactRejected:
                if self.checkpoints.chains() == held:
                    raise  # the genesis, then
                # A damaged checkpoint is gone now; the fold starts from an older one.
