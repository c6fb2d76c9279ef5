"""The fold: genesis, then for each round the weighted mean of its deltas and an outer step.

Invariant: the result is a function of the set of (payload, weight) of each round, bit for bit, on
every machine and in whatever order the deltas are given. Why that holds:

* the weighted sum is a sum of integers, with integer coefficients from a rule that sees integers
  only. |q| <= 2**15, weights are at most 2**20 (the roster's limit), factors at most 2**16 and a
  round has at most 2**10 deltas, so |sum| <= 2**61: no int64 overflow. It becomes a float64 once;
* the outer step is elementwise float64 arithmetic that IEEE 754 defines to the last bit (`outer`);
* the result is rounded to the run's grid (half to even) and kept as int32.

Source: FedAvg (McMahan et al. 2017, arXiv:1602.05629) and its adaptive relatives (Reddi et al.
2021, arXiv:2003.00295) without a server.

Memory: the state (20 bytes a parameter with an adaptive optimiser, 4 with `fedavg`), and the
round's payloads up to 256 MiB. Rounds that do not fit cost 8 bytes a parameter more and read their
payloads twice; `centred-clipping` 2 bytes a parameter more. Sums and outer step go through the
state once, in pieces that stay in cache.

Which deltas count is decided in `facts`, what a member weighs in `weights`, how much of a delta
enters in `robust`; sums are in `sums`. Reading payloads and writing checkpoints is the caller's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2pfed.gossip.outer import OuterStep, check_arithmetic
from p2pfed.gossip.robust import mix
from p2pfed.gossip.sums import CHUNK, Contribution, Payloads
from p2pfed.identity.roster import MAX_MEMBERS, MAX_SAMPLES
from p2pfed.identity.run import Run
from p2pfed.wire.payload import Payload

__all__ = [
    "Contribution",
    "ModelState",
    "Weighted",
    "fold_round",
    "genesis_state",
    "model_hash",
    "view_of",
]

MAX_WEIGHT = MAX_SAMPLES
MAX_DELTAS = MAX_MEMBERS
_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True, slots=True)
class Weighted:
    """A contribution that is at hand."""

    payload: Payload
    weight: int


@dataclass(slots=True, eq=False)
class ModelState:
    """The model and the outer optimiser's state before round `round`.

    Attributes:
        round: The first round that is not folded in.
        model: Multiples of the grid, shape (P,), int32.
        first: First moment, shape (P,) float64; shape (0,) for `fedavg`.
        second: Second moment, likewise.
        beta1_power: Product of beta1 over the steps taken.
        beta2_power: Product of beta2 over the steps taken.
    """

    round: int
    model: NDArray[np.int32]
    first: NDArray[np.float64]
    second: NDArray[np.float64]
    beta1_power: float = 1.0
    beta2_power: float = 1.0

    def copy(self) -> ModelState:
        """An independent copy."""
        return ModelState(
            self.round,
            self.model.copy(),
            self.first.copy(),
            self.second.copy(),
            self.beta1_power,
            self.beta2_power,
        )


def genesis_state(genesis: NDArray[np.float32], run: Run) -> ModelState:
    """The state before round 0: the genesis vector rounded to the grid.

    Args:
        genesis: The first model, shape (P,).
        run: Gives P, the grid and the outer optimiser.

    Raises:
        ValueError: Wrong shape, not finite, or too large for the grid.
    """
    if genesis.shape != (run.num_parameters,) or not np.isfinite(genesis).all():
        raise ValueError(f"genesis must be {run.num_parameters} finite values")
    model = np.empty(run.num_parameters, np.int32)
    for start in range(0, model.size, CHUNK):
        part = slice(start, start + CHUNK)
        on_grid = np.rint(np.ldexp(genesis[part].astype(np.float64), run.grid_bits))
        if np.abs(on_grid).max() > _INT32.max:
            raise ValueError(f"genesis does not fit the grid of 2**-{run.grid_bits}")
        model[part] = on_grid
    moments = run.num_parameters if run.outer.is_adaptive else 0
    return ModelState(0, model, np.zeros(moments), np.zeros(moments))


def model_hash(state: ModelState) -> bytes:
    """BLAKE2b-256 of the model's int32 values, little endian: what hospitals compare."""
    digest = hashlib.blake2b(digest_size=32)
    digest.update(np.ascontiguousarray(state.model, "<i4").data)
    return digest.digest()


def view_of(state: ModelState, grid_bits: int) -> NDArray[np.float32]:
    """The model as float32 parameters, shape (P,), to train on or to evaluate."""
    view = state.model.astype(np.float32)
    view *= np.float32(2.0**-grid_bits)
    return view


def fold_round(
    state: ModelState,
    deltas: Sequence[Contribution],
    run: Run,
    *,
    mean: NDArray[np.float32] | None = None,
) -> None:
    """Fold one round into `state`, in place, and advance it by one round.

    A round without deltas changes nothing but the round number: no outer step is taken.

    Args:
        state: The state before the round.
        deltas: The round's deltas, in any order.
        run: Gives the outer optimiser, the grid and the robust rule.
        mean: Shape (P,); filled with the mean delta of the round in units of the parameters, zeros
            if there are no deltas.

    Raises:
        ValueError: More deltas or larger weights than the exact sum allows.
    """
    state.round += 1
    if not deltas:
        if mean is not None:
            mean[:] = 0
        return
    weights = [delta.weight for delta in deltas]
    if len(deltas) > MAX_DELTAS or not 1 <= min(weights) <= max(weights) <= MAX_WEIGHT:
        raise ValueError("more deltas or larger weights than the exact sum allows")
    check_arithmetic()
    state.beta1_power *= run.outer.beta1
    state.beta2_power *= run.outer.beta2
    step = OuterStep.after(run.outer, state.beta1_power, state.beta2_power, grid_bits=run.grid_bits)
    payloads = Payloads(deltas, state.model.size)
    mixture = mix(payloads, weights, run.robust, state.model.size)
    scale = float(mixture.total << run.grid_bits)  # at most 46 digits and zeros: exact
    piece, spare = np.empty((2, min(CHUNK, state.model.size)))
    for part, sums in payloads.weighted(mixture.coefficients):
        moved, room = piece[: sums.size], spare[: sums.size]
        np.divide(sums, scale, out=moved)
        if mean is not None:
            mean[part] = moved
        step.take(moved, state.first[part], state.second[part], room)
        np.rint(moved, out=moved)
        moved += state.model[part]
        np.clip(moved, _INT32.min, _INT32.max, out=moved)
        state.model[part] = moved
