"""The common model of one round with what is publicly known of it, as one file.

The file is safetensors: `model`, float32, (P,), the bits of `fold.view_of`, and in the metadata
`p2pfed` one JSON object of facts. It has no name on the disk: who holds it open reads it, and it is
gone with them.

Invariant: model and facts are of one round. The file is made while no fold runs, and the deltas are
counted from the very plan that was folded.

Not here: which facts there are (`view`), the trainer's own way to the model (`handover`).
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from p2pfed.errors import ConfigError
from p2pfed.gossip.events import Fold
from p2pfed.gossip.fold import ModelState, model_hash
from p2pfed.node.tensorfile import FLOAT, header

__all__ = ["Snapshot", "Tally", "write_snapshot"]

_CHUNK = 1 << 18  # coordinates turned into float32 at a time


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A model and what it was made of; valid until the next fold.

    Attributes:
        state: The model before its round.
        chain: What it stands for, 32 bytes.
        origins: How many deltas of each peer id are in it; None where only the facts tell.
        known_from: Deltas of earlier rounds are in it too, inside a checkpoint that was believed;
            those that are not held are not counted.
    """

    state: ModelState
    chain: bytes
    origins: Counter[str] | None
    known_from: int


class Tally:
    """Whose deltas are in the last fold.

    A plan tells of all rounds from its first on, and begins later than with the genesis only at a
    state that an earlier plan has made: so what is known of the rounds before it stands.
    """

    def __init__(self) -> None:
        self._origins: dict[int, tuple[str, ...]] = {}
        self._known_from = 0

    def take(self, wanted: Fold) -> None:
        """A plan was folded."""
        self._known_from = wanted.adopted
        for round_ in [r for r in self._origins if r >= wanted.round]:
            del self._origins[round_]
        for round_ in range(wanted.first, wanted.round):
            self._origins[round_] = tuple(item.origin for item in wanted.deltas(round_))

    def snapshot(self, state: ModelState, chain: bytes) -> Snapshot:
        """The state that came out of the last plan, with its origins."""
        count = Counter(origin for each in self._origins.values() for origin in each)
        return Snapshot(state, chain, count, self._known_from)


def write_snapshot(
    snapshot: Snapshot, folder: Path, *, grid_bits: int, facts: Mapping[str, Any]
) -> BinaryIO:
    """Write a snapshot and its facts to a file without a name; blocks, for a worker thread.

    Args:
        snapshot: No fold runs meanwhile.
        folder: On which file system.
        grid_bits: The run's.
        facts: Can be written as JSON; `model_hash` is added.

    Returns:
        The file, at its beginning; the caller closes it.

    Raises:
        ConfigError: There is no room.
    """
    model = snapshot.state.model
    facts = {**facts, "model_hash": model_hash(snapshot.state).hex()}
    unit = np.float32(2.0**-grid_bits)
    file: BinaryIO = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - the caller's
    try:
        file.write(header(["model"], model.size, {"p2pfed": json.dumps(facts)}))
        for start in range(0, model.size, _CHUNK):
            part = model[start : start + _CHUNK].astype(FLOAT)
            part *= unit
            file.write(part.data)
        file.flush()
        file.seek(0)
    except OSError as error:
        file.close()
        raise ConfigError(
            f"cannot write a copy of the model, {4 * model.size} bytes in {folder}",
            error.strerror or str(error),
            "make room there",
        ) from error
    except BaseException:
        file.close()
        raise
    return file
