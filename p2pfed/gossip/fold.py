"""The fold: genesis, then for each round the weighted mean of its deltas and an outer step.

Invariant: the result is a function of the set of (payload, weight) of each round, bit for bit, on
every machine and in whatever order the deltas are given. Why that holds:

* the weighted sum is a sum of integers. |q| <= 2**15, weights are below 2**20 + 1 (the roster's
  limit) and a round has at most 2**10 deltas, so |sum| <= 2**45: no int64 overflow, and its
  conversion to float64 is exact;
* the outer step uses only + - * / and sqrt on float64, elementwise, in one fixed order. IEEE
  754-2019 (section 5.4.1) rounds each of them correctly, so no library, vector width or fused
  operation may change a bit; there is no BLAS, no `pow`, no reduction over floats. beta**t is a
  running product that is part of the state;
* the result is rounded to the run's grid (half to even) and kept as int32.

Source: FedAvg and FedAdam are Algorithm 2 of Reddi et al. 2021 (arXiv:2003.00295) without a server;
FedAdam here has Adam's bias correction (Kingma and Ba 2015, arXiv:1412.6980, Algorithm 1).

Memory: the state (20 bytes a parameter with `fedadam`, 4 with `fedavg`), one int64 sum, one
payload; the outer step goes through the state once per round, in chunks. Which deltas count is
decided in `facts`, clipping in `robust`; reading payloads and writing checkpoints is the caller's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from p2pfed.gossip.robust import UNCLIPPED, median_factors, scaled, square_norm
from p2pfed.identity.roster import MAX_MEMBERS, MAX_SAMPLES
from p2pfed.identity.run import Outer, Run
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

CHUNK = 1 << 16  # parameters per pass: three float64 arrays of it fit in a 2 MB cache
MAX_WEIGHT = MAX_SAMPLES
MAX_DELTAS = MAX_MEMBERS
_INT32 = np.iinfo(np.int32)


class Contribution(Protocol):
    """One delta as the fold sees it."""

    @property
    def payload(self) -> Payload:
        """What it says; may be read from disk at each access."""

    @property
    def weight(self) -> int:
        """What it weighs, an integer >= 1."""


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
    moments = run.num_parameters if run.outer.name == "fedadam" else 0
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


def fold_round(state: ModelState, deltas: Sequence[Contribution], run: Run) -> None:
    """Fold one round into `state`, in place, and advance it by one round.

    A round without deltas changes nothing but the round number: no outer step is taken.

    Args:
        state: The state before the round.
        deltas: The round's deltas, in any order.
        run: Gives the outer optimiser, the grid and the robust rule.
    """
    state.round += 1
    if not deltas:
        return
    if len(deltas) > MAX_DELTAS or any(not 1 <= d.weight <= MAX_WEIGHT for d in deltas):
        raise ValueError("more deltas or larger weights than the exact sum allows")
    factors = [UNCLIPPED] * len(deltas)
    if run.robust == "clip-median":
        factors = median_factors([square_norm(delta.payload) for delta in deltas])
    sums = np.zeros(state.model.size, np.int64)
    for delta, factor in zip(deltas, factors, strict=True):  # one payload in memory at a time
        payload = scaled(delta.payload, factor)
        sums[payload.indices] += payload.values.astype(np.int64) * delta.weight
    _step(state, sums, float(sum(delta.weight for delta in deltas)), run)


def _step(state: ModelState, sums: NDArray[np.int64], total: float, run: Run) -> None:
    state.beta1_power *= run.outer.beta1
    state.beta2_power *= run.outer.beta2
    for start in range(0, state.model.size, CHUNK):
        stop = min(start + CHUNK, state.model.size)
        mean = np.ldexp(sums[start:stop].astype(np.float64) / total, -run.grid_bits)
        step = _outer_step(state, mean, run.outer, slice(start, stop))
        moved = state.model[start:stop] + np.rint(np.ldexp(step, run.grid_bits))
        state.model[start:stop] = np.clip(moved, _INT32.min, _INT32.max).astype(np.int32)


def _outer_step(
    state: ModelState, mean: NDArray[np.float64], outer: Outer, part: slice
) -> NDArray[np.float64]:
    if outer.name == "fedavg":
        return outer.learning_rate * mean
    first, second = state.first[part], state.second[part]
    first *= outer.beta1
    first += (1.0 - outer.beta1) * mean
    second *= outer.beta2
    second += (1.0 - outer.beta2) * (mean * mean)
    first_hat = first / (1.0 - state.beta1_power) if outer.beta1 else first
    second_hat = second / (1.0 - state.beta2_power) if outer.beta2 else second
    root: NDArray[np.float64] = np.sqrt(second_hat) + outer.epsilon
    return outer.learning_rate * first_hat / root
