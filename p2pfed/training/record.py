"""What the hospital alone may see of its trainer; written by it, read by the private socket.

Pages: `status` (device, step at hand, rounds with their time by kind, notes, the last problem in
full), `metrics`, `ledger`, and `pictures` of the newest model, which are computed when they are
asked for.

Invariant: nothing of it is ever part of an answer to the network process.
"""

from __future__ import annotations

import base64
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfed.privacy.accountant import Budget
from p2pfed.privacy.ledger import Ledger, Spent
from p2pfed.training.pictures import Picture, chosen, slices, stacks
from p2pfed.training.watch import Watch

__all__ = ["Record", "pictures_as_json"]

_KEPT_ROUNDS = 1000


class Record:
    """See the module docstring.

    Args:
        device: What the trainer computes with.
        watch: Progress and notes.
    """

    def __init__(self, device: str, watch: Watch) -> None:
        self._device = device
        self._watch = watch
        self._rounds: deque[dict[str, Any]] = deque(maxlen=_KEPT_ROUNDS)
        self._metrics: deque[dict[str, Any]] = deque(maxlen=_KEPT_ROUNDS)
        self._ledger: dict[str, Any] = {}
        self._problem = ""
        self._picture: Callable[[], Mapping[str, Any]] = dict
        self._lock = threading.Lock()
        self._drawing = threading.Lock()  # one picture at a time; it may take long

    @property
    def views(self) -> Mapping[str, Callable[[], Mapping[str, Any]]]:
        """The pages by their path."""
        return {
            "/v1/status": self._status,
            "/v1/metrics": lambda: {"metrics": self._copied(self._metrics)},
            "/v1/ledger": lambda: self._ledger,
            "/v1/pictures": self._pictures,
        }

    def add_round(self, facts: Mapping[str, Any]) -> None:
        """A round has been answered."""
        with self._lock:
            self._rounds.append({**facts, "seconds": self._watch.taken()})

    def add_metrics(self, round_number: int, values: Mapping[str, float]) -> None:
        """A model was evaluated on the hospital's own test patients."""
        with self._lock:
            self._metrics.append({"round": round_number, "values": dict(values)})

    def set_pictures(self, draw: Callable[[], Mapping[str, Any]]) -> None:
        """What makes the pictures of the newest model when they are asked for."""
        self._picture = draw

    def set_problem(self, error: BaseException) -> None:
        """Keep the whole text of what went wrong; answers have only its public part."""
        with self._lock:
            self._problem = f"{type(error).__name__}: {error}"

    def set_ledger(self, ledger: Ledger, spent: Spent, budget: Budget) -> None:
        """Show the ledger as it is now."""
        shown = {
            "spent": {"nano_rho": spent.rho_nano, "epsilon": spent.epsilon},
            "limit": {"nano_rho": budget.rho_nano, "epsilon": budget.epsilon},
            "delta": budget.delta,
            "releases": spent.releases,
            "unprotected": spent.unprotected,
            "head": spent.head.hex(),
            "entries": [
                {"seq": e.seq, "kind": e.kind, "at": e.at, "chain": e.chain.hex(), **e.detail}
                for e in ledger.entries()
            ],
        }
        with self._lock:
            self._ledger = shown

    def _status(self) -> dict[str, Any]:
        with self._lock:
            return {
                "device": self._device,
                "rounds": list(self._rounds),
                "problem": self._problem,
                "progress": self._watch.shown,
                "notes": self._watch.notes,
            }

    def _pictures(self) -> Mapping[str, Any]:
        with self._drawing:
            try:
                return self._picture()
            except Exception as error:  # noqa: BLE001 - a task's pictures() may raise anything
                self.set_problem(error)
                return {"problem": f"{type(error).__name__}: {error}"}

    def _copied(self, shown: deque[dict[str, Any]]) -> list[dict[str, Any]]:
        with self._lock:
            return list(shown)


def pictures_as_json(pictures: list[Picture]) -> dict[str, Any]:
    """Best, median and worst of some cases, each in three planes, as JSON.

    Arrays are base64 of uint8 in C order with their `shape`. Each plane has the slice through the
    middle, a `stack` of slices over what is marked, and in `middle` which of these it is.
    """

    def array(values: NDArray[Any]) -> dict[str, Any]:
        data = np.ascontiguousarray(values, dtype=np.uint8)
        return {"shape": list(data.shape), "data": base64.b64encode(data.tobytes()).decode()}

    def plane(parts: Mapping[str, Any]) -> dict[str, Any]:
        return {k: list(v) if k == "spacing" else array(v) for k, v in parts.items()}

    def planes(picture: Picture) -> dict[str, Any]:
        stacked = stacks(picture)
        return {
            name: {
                **plane(parts),
                "middle": stacked[name].middle,
                "stack": [plane(one) for one in stacked[name].slices],
            }
            for name, parts in slices(picture).items()
        }

    if not pictures:
        return {}
    return {
        rank: {
            "case": pictures[number].case,
            "score": pictures[number].score,
            "planes": planes(pictures[number]),
        }
        for rank, number in chosen([p.score for p in pictures]).items()
    }
