"""Runs without noise, and vectors on their grid, for the benchmarks that fold by themselves."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfed.gossip.fold import Weighted
from p2pfed.identity.run import Outer, Run
from p2pfed.wire.payload import Payload

__all__ = ["dense_delta", "run_of"]


def run_of(num_parameters: int, outer: Outer, **constants: Any) -> Run:
    """A run with mechanism `none` that sends everything; any constant can be replaced."""
    defaults: dict[str, Any] = {
        "name": "benchmark",
        "network_id": bytes(32),
        "task": "benchmark",
        "task_id": bytes(32),
        "genesis": bytes(32),
        "rounds": 100,
        "grid_bits": 14,
        "mechanism": "none",
        "unit": "none",
        "epsilon": Fraction(0),
        "delta": Fraction(0),
        "clip": Fraction(1),
        "block_size": 1,
        "segment_blocks": 1,
        "select_share": Fraction(0),
        "top_fraction": Fraction(1),
        "robust": "none",
        "quorum": 0.8,
        "min_live": 0.5,
        "deadline_s": 1.0,
        "min_round_interval_s": 0.0,
    }
    return Run(num_parameters=num_parameters, outer=outer, **(defaults | constants))


def dense_delta(vector: NDArray[np.float32], weight: int, run: Run) -> Weighted:
    """All of a vector, rounded to the run's grid.

    Raises:
        OverflowError: A value does not fit int16 on this grid.
    """
    values = np.rint(vector.astype(np.float64) * 2.0**run.grid_bits)
    if np.abs(values).max() > 32767:
        raise OverflowError(f"a delta does not fit the grid of 2**-{run.grid_bits}")
    return Weighted(Payload.dense(values.astype(np.int16)), weight)
