"""One run of real daemons from the first model to the last, for the benchmarks of learning."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfed.demo.federation import Daemon, Federation, wait_for
from p2pfed.demo.plan import Cast
from p2pfed.identity.run import Run

__all__ = ["Ended", "whole_run"]


@dataclass(frozen=True, slots=True, eq=False)
class Ended:
    """What a run ended with.

    Attributes:
        run: The run.
        model: That all daemons end on, shape (P,).
        states: Each daemon's status then.
    """

    run: Run
    model: NDArray[np.float32]
    states: list[dict[str, Any]]


def whole_run(
    cast: Cast,
    constants: dict[str, Any],
    *,
    name: str,
    seed: int,
    epsilon: str,
    deadline: float,
    keep: Path | None = None,
) -> Ended:
    """Start daemons, wait until all have folded the last round and say the same hash.

    Args:
        cast: The hospitals.
        constants: Of the run.
        name: The run's.
        seed: Of the first model.
        epsilon: Each hospital's limit.
        deadline: Seconds, for the daemons to be ready and for the run.
        keep: A file for the last model, as `p2pfed model fetch` writes it.

    Raises:
        TimedOut: They did not within `deadline` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="p2pfed-bench-") as folder:
        federation = Federation(Path(folder) / "nodes", cast, epsilon=epsilon)
        daemons = list(federation.daemons.values())
        with federation.running():
            run = federation.make_run(name, constants, seed=seed)
            federation.write_bootstrap()
            roster = federation.stewards.admit([daemon.member for daemon in daemons])
            for daemon in daemons:
                federation.start(daemon)
            wait_for(lambda: all(map(_ready, daemons)), deadline, "the trainers are ready")
            for daemon in daemons:
                federation.enrol(daemon, roster)
            wait_for(lambda: _agree(daemons, run.rounds), deadline, "all end on one model")
            if keep is not None:
                federation.first.client.download("/v1/model", keep)
            states = [daemon.client.get("/v1/status") for daemon in daemons]
            return Ended(run, federation.final_model(federation.first, run), states)


def _ready(daemon: Daemon) -> bool:
    status = daemon.status()
    return status is not None and status["trainer"]["state"] == "ready"


def _agree(daemons: list[Daemon], rounds: int) -> bool:
    runs: list[dict[str, Any]] = [(daemon.status() or {}).get("run") or {} for daemon in daemons]
    ended = all(r.get("phase") == "finished" and r.get("model_round") == rounds for r in runs)
    return ended and len({run["model_hash"] for run in runs}) == 1
