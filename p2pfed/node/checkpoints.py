"""Model states on disk: one safetensors file for each kept round.

Invariants: a file is whole or absent; its bytes are a function of the state and its chain, so that
equal states have equal digests on all nodes and a joiner can compare them. A file that does not
match its name, its shape or its metadata is ignored and deleted, never trusted: the fold makes it
again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from p2pfed.errors import FactRejected
from p2pfed.gossip.fold import ModelState
from p2pfed.identity.run import Run
from p2pfed.node.directory import file_digest, sync_directory
from p2pfed.wire.messages import CheckpointOffer

__all__ = ["DiskCheckpoints", "read_genesis"]

_NAME = re.compile(r"(\d{10})-([0-9a-f]{64})\.safetensors")


class DiskCheckpoints:
    """The checkpoints of one run in one folder.

    Args:
        folder: Where they lie.
        run: Gives the shapes.
    """

    def __init__(self, folder: Path, run: Run) -> None:
        self._folder = folder
        self._run = run
        self._digests: dict[int, bytes] = {}

    def _files(self) -> dict[int, tuple[bytes, Path]]:
        found = {}
        for path in self._folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match:
                found[int(match[1])] = (bytes.fromhex(match[2]), path)
        return found

    def _path(self, round_: int, chain: bytes) -> Path:
        return self._folder / f"{round_:010d}-{chain.hex()}.safetensors"

    def chains(self) -> Mapping[int, bytes]:
        """Round -> chain of every checkpoint."""
        return {round_: chain for round_, (chain, _) in self._files().items()}

    def load(self, round_: int) -> ModelState:
        """The state at a round.

        Raises:
            FactRejected: The file is not a checkpoint of this run; it is deleted.
        """
        chain, path = self._files()[round_]
        try:
            return self._read(path, round_, chain)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            path.unlink(missing_ok=True)
            raise FactRejected(
                f"the checkpoint {path.name} is damaged", str(error), "it will be made again"
            ) from error

    def _read(self, path: Path, round_: int, chain: bytes) -> ModelState:
        size = self._run.num_parameters
        moments = size if self._run.outer.name == "fedadam" else 0
        with safe_open(path, framework="numpy") as file:
            said = json.loads((file.metadata() or {})["p2pfed"])
            state = ModelState(
                round_,
                file.get_tensor("model"),
                file.get_tensor("first"),
                file.get_tensor("second"),
                float.fromhex(said["beta1_power"]),
                float.fromhex(said["beta2_power"]),
            )
        _check(state.model, size, "int32")
        _check(state.first, moments, "float64")
        _check(state.second, moments, "float64")
        if said["round"] != round_ or said["chain"] != chain.hex():
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
        path = self._path(state.round, chain)
        aside = path.with_suffix(".tmp")
        tensors: dict[str, NDArray[Any]] = {
            "model": state.model,
            "first": state.first,
            "second": state.second,
        }
        save_file(tensors, aside, {"p2pfed": json.dumps(said, sort_keys=True)})
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        old = self._files().get(state.round)
        aside.replace(path)
        if old is not None and old[1] != path:
            old[1].unlink(missing_ok=True)
        sync_directory(self._folder)
        self._digests[state.round] = file_digest(path)

    def prune(self, keep: frozenset[int]) -> None:
        """Delete checkpoints of other rounds."""
        for round_, (_, path) in self._files().items():
            if round_ not in keep:
                path.unlink(missing_ok=True)
                self._digests.pop(round_, None)

    def offers(self) -> tuple[CheckpointOffer, ...]:
        """The checkpoints as they are offered to joiners."""
        offers = []
        for round_, (chain, path) in sorted(self._files().items()):
            if round_ not in self._digests:
                self._digests[round_] = file_digest(path)
            offers.append(
                CheckpointOffer(round_, chain, self._digests[round_], path.stat().st_size)
            )
        return tuple(offers)

    def find(self, digest: bytes) -> Path | None:
        """The file with this BLAKE2b-256."""
        return next(
            (path for r, (_, path) in self._files().items() if self._digests.get(r) == digest), None
        )

    def place_for(self, offer: CheckpointOffer) -> Path:
        """Where a fetched checkpoint belongs."""
        return self._path(offer.round, offer.chain)


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
    except (SafetensorError, OSError) as error:
        raise FactRejected(f"the genesis of run {run.name!r} is unreadable", str(error)) from error
    if vector.shape != (run.num_parameters,) or vector.dtype != np.float32:
        raise FactRejected(
            f"the genesis of run {run.name!r} has shape {vector.shape} and type {vector.dtype}",
            f"the run says {run.num_parameters} float32 parameters",
        )
    if not np.isfinite(vector).all():
        raise FactRejected(f"the genesis of run {run.name!r} holds NaN or infinity")
    return vector
