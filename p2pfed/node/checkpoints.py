"""Model states on disk: one safetensors file for each kept round.

Invariants: a file is whole or absent; its bytes are a function of the state and its chain, so that
equal states have equal digests on all nodes and a joiner can compare them. The name of a file holds
its round, its chain and its BLAKE2b-256. A file that does not match its name, its shape or its
metadata is ignored and deleted, never trusted: the fold makes it again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from p2pfed.errors import FactRejected
from p2pfed.gossip.fold import ModelState
from p2pfed.identity.run import Run
from p2pfed.network.blob import drop_partials
from p2pfed.node.directory import file_digest, sync_directory
from p2pfed.wire.messages import CheckpointOffer

__all__ = ["DiskCheckpoints", "read_genesis"]

_NAME = re.compile(r"(\d{10})-([0-9a-f]{64})-([0-9a-f]{64})\.safetensors")


@dataclass(frozen=True, slots=True)
class _File:
    round: int
    chain: bytes
    digest: bytes
    path: Path


class DiskCheckpoints:
    """The checkpoints of one run in one folder.

    Args:
        folder: Where they lie.
        run: Gives the shapes.
    """

    def __init__(self, folder: Path, run: Run) -> None:
        self._folder = folder
        self._run = run

    def _files(self) -> list[_File]:
        """All that is there; a killed `save` may have left two files of one round."""
        matches = (_NAME.fullmatch(path.name) for path in sorted(self._folder.iterdir()))
        return [
            _File(int(m[1]), bytes.fromhex(m[2]), bytes.fromhex(m[3]), self._folder / m[0])
            for m in matches
            if m is not None
        ]

    def _path(self, round_: int, chain: bytes, digest: bytes) -> Path:
        return self._folder / f"{round_:010d}-{chain.hex()}-{digest.hex()}.safetensors"

    def chains(self) -> Mapping[int, bytes]:
        """Round -> chain of every checkpoint."""
        return {file.round: file.chain for file in self._files()}

    def load(self, round_: int) -> ModelState:
        """The state at a round.

        Raises:
            FactRejected: The file is gone, or not a checkpoint of this run; it is deleted.
        """
        file = {file.round: file for file in self._files()}.get(round_)
        if file is None:
            raise FactRejected(f"there is no checkpoint of round {round_}")
        try:
            return self._read(file)
        except (
            SafetensorError,
            OSError,
            ValueError,
            KeyError,
            TypeError,
            OverflowError,  # a peer wrote it: 0x1p99999
            RecursionError,  # and a thousand brackets
        ) as error:
            file.path.unlink(missing_ok=True)
            raise FactRejected(
                f"the checkpoint {file.path.name} is damaged", str(error), "it will be made again"
            ) from error

    def _read(self, checkpoint: _File) -> ModelState:
        if file_digest(checkpoint.path) != checkpoint.digest:
            raise ValueError("its bytes have another hash")
        size = self._run.num_parameters
        moments = size if self._run.outer.is_adaptive else 0
        with safe_open(checkpoint.path, framework="numpy") as file:
            said = json.loads((file.metadata() or {})["p2pfed"])
            state = ModelState(
                checkpoint.round,
                file.get_tensor("model"),
                file.get_tensor("first"),
                file.get_tensor("second"),
                float.fromhex(said["beta1_power"]),
                float.fromhex(said["beta2_power"]),
            )
        _check(state.model, size, "int32")
        _check(state.first, moments, "float64")
        _check(state.second, moments, "float64")
        if not all(0 <= power <= 1 for power in (state.beta1_power, state.beta2_power)):
            raise ValueError("a decay's power is not from 0 to 1")
        if (state.second < 0).any():
            raise ValueError("a mean of squares is negative")
        if said["round"] != checkpoint.round or said["chain"] != checkpoint.chain.hex():
            raise ValueError("its metadata names another round or chain")
        return state

    def save(self, state: ModelState, chain: bytes) -> None:
        """Write a state; another one of the same round is replaced."""
        said: dict[str, Any] = {
            "round": state.round,
            "chain": chain.hex(),
            "beta1_power": state.beta1_power.hex(),
            "beta2_power": state.beta2_power.hex(),
        }
        aside = self._folder / f"{state.round:010d}.tmp"
        tensors: dict[str, NDArray[Any]] = {
            "model": state.model,
            "first": state.first,
            "second": state.second,
        }
        save_file(tensors, aside, {"p2pfed": json.dumps(said, sort_keys=True)})
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        path = self._path(state.round, chain, file_digest(aside))
        aside.replace(path)
        for old in self._files():
            if old.round == state.round and old.path != path:
                old.path.unlink(missing_ok=True)
        sync_directory(self._folder)

    def prune(self, keep: frozenset[int]) -> None:
        """Delete checkpoints of other rounds, and what a killed `save` or fetch left behind."""
        for file in self._files():
            if file.round not in keep:
                file.path.unlink(missing_ok=True)
        for aside in self._folder.glob("*.tmp"):
            aside.unlink(missing_ok=True)
        drop_partials(self._folder)

    def offers(self) -> tuple[CheckpointOffer, ...]:
        """The checkpoints as they are offered to joiners."""
        return tuple(
            CheckpointOffer(file.round, file.chain, file.digest, file.path.stat().st_size)
            for file in self._files()
        )

    def find(self, digest: bytes) -> Path | None:
        """The file with this BLAKE2b-256."""
        return next((file.path for file in self._files() if file.digest == digest), None)

    def place_for(self, offer: CheckpointOffer) -> Path:
        """Where a fetched checkpoint belongs."""
        return self._path(offer.round, offer.chain, offer.digest)


def _check(tensor: NDArray[Any], size: int, kind: str) -> None:
    if tensor.shape != (size,) or tensor.dtype != kind or not np.isfinite(tensor).all():
        raise ValueError(f"a tensor of shape {tensor.shape} and type {tensor.dtype}")


def read_genesis(path: Path, run: Run) -> NDArray[np.float32]:
    """The first model of a run, shape (P,), from its safetensors file.

    Raises:
        FactRejected: The file is not the one that the run names, or not P finite values.
    """
    if file_digest(path) != run.genesis:
        raise FactRejected(
            f"{path} is not the genesis of run {run.name!r}",
            "its hash is not the one that the stewards signed",
            "fetch the file again from whoever made the run",
        )
    try:
        with safe_open(path, framework="numpy") as file:
            vector: NDArray[np.float32] = file.get_tensor("model")
    except (SafetensorError, OSError, TypeError) as error:
        raise FactRejected(f"the genesis of run {run.name!r} is unreadable", str(error)) from error
    if vector.shape != (run.num_parameters,) or vector.dtype != np.float32:
        raise FactRejected(
            f"the genesis of run {run.name!r} has shape {vector.shape} and type {vector.dtype}",
            f"the run says {run.num_parameters} float32 parameters",
        )
    if not np.isfinite(vector).all():
        raise FactRejected(f"the genesis of run {run.name!r} holds NaN or infinity")
    if np.abs(vector).max() >= 2.0 ** (31 - run.grid_bits):
        raise FactRejected(
            f"the genesis of run {run.name!r} does not fit its grid",
            f"the model is kept in multiples of 2**-{run.grid_bits}, 32 bits each",
            "choose fewer grid bits, or a smaller first model",
        )
    return vector
