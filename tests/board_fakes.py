"""Five hospitals as one daemon's sockets would tell of them, for the dashboard and the report."""

from __future__ import annotations

import base64
import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from admin_fakes import FakeBackend, daemon, short_folder

from p2pfed.training.private_socket import serve_private_socket

HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
OWN = "12D3KooWAbcdefghijklmnop"
HASH, OTHER = "3f" * 32, "77" * 32
ROUND, ROUNDS = 42, 100
SECRET = 0.8731  # the hospital's own measure: must not be in a report by default


def peer(name: str, letter: str, **facts: Any) -> dict[str, Any]:
    return {
        "name": name,
        "peer_id": f"12D3KooW{letter * 8}",
        "state": "alive",
        "round": ROUND,
        "rtt_ms": 31.0,
        "path": "direct",
        "sent_bytes": 420_000_000,
        "received_bytes": 380_000_000,
        "model_hash": HASH,
        "model_round": ROUND - 1,
        "seen_s": 0.8,
        "roles": ["train"],
        "samples": 303,
        "addresses": ["/ip4/192.0.2.77/tcp/4201"],
        "blocked": False,
        "measure": None,
        **facts,
    }


def peers() -> list[dict[str, Any]]:
    away = {"state": "away", "round": 31, "model_round": 30, "seen_s": 8100.0, "path": None}
    left = {"state": "left", "round": 20, "seen_s": 90000.0, "path": None, "model_round": 19}
    measure = {"round": ROUND - 1, "value": 0.8412, "name": "accuracy"}
    return [
        peer("Oslo University Hospital", "B", measure=measure, roles=["train", "relay"]),
        peer("Klinikum München", "C", path="relay Oslo University Hospital", rtt_ms=88.4,
             sent_bytes=120_000_000, received_bytes=90_000_000),
        peer("Hôpital de Genève", "D", **away, sent_bytes=60_000_000, received_bytes=75_000_000),
        peer(HOSTILE, "E", **left, sent_bytes=9_000_000, received_bytes=7_000_000),
    ]  # fmt: skip


def history(first: int = 0) -> dict[str, Any]:
    members = [OWN, *(p["peer_id"] for p in peers())]
    lines = []
    for r in range(ROUND + 1):
        origins = [0, 1] + [2] * (r >= 8) + [3] * (r < 31 and r != 12) + [4] * (r < 20)
        if r == ROUND:
            origins = [0]
        lines.append({
            "round": r, "origins": origins, "model_hash": HASH if r == ROUND - 1 else None,
            "seconds": 61.0 + r % 3, "released": True, "epsilon": 3.2 * math.sqrt((r + 1) / 43),
        })  # fmt: skip
    shown = lines[first:]
    return {"run": "01" * 32, "round": ROUND, "rounds": ROUNDS, "members": members,
            "history": shown}  # fmt: skip


class Board(FakeBackend):
    """A daemon amid a run of five hospitals; one away, one left, one behind a relay."""

    def __init__(self) -> None:
        super().__init__()
        self.round = ROUND
        self.alive = 2
        self.make_peers = peers
        self.health = ["Hôpital de Genève is away since 2 h"]
        for r in range(36, ROUND + 1):
            self.emit("round.started", round=r)
            self.emit("delta.released", round=r, bytes=812_345, releases=r + 1)
            self.emit("round.finished", round=r, deltas=3, missing=[])
        self.emit("peer.left", peer="12D3KooWEEEEEEEE", name=HOSTILE)
        self.emit("node.addresses", addresses=["/ip4/192.0.2.77/tcp/4201"])

    def status(self) -> dict[str, Any]:
        told = super().status()
        told["run"] |= {"round": self.round, "model_hash": HASH, "model_round": ROUND - 1}
        told["peers"] = {"alive": 2, "suspect": 0, "away": 1, "left": 1, "revoked": 0}
        told["addresses"] = ["/ip4/192.0.2.77/tcp/4201"]
        return told

    def privacy(self) -> dict[str, Any]:
        return {**super().privacy(), "epsilon": 8.0, "run_epsilon": 6.0, "forecast_round": 100}

    def events(self, since: int, limit: int, **chosen: Any) -> Any:
        found = [event for event in self.log if event["seq"] > since][:limit]
        return found, 0, found[-1]["seq"] if found else since

    async def history(self, first: int, limit: int) -> dict[str, Any]:
        return history(first)


def pictures() -> dict[str, Any]:
    """Spheres: what an imaging task's trainer would show."""

    def array(values: list[list[int]]) -> dict[str, Any]:
        flat = bytes(v for row in values for v in row)
        shape = [len(values), len(values[0])]
        return {"shape": shape, "data": base64.b64encode(flat).decode()}

    def disc(w: int, h: int, r: float, value: int, dx: float = 0.0) -> list[list[int]]:
        def at(i: int, j: int) -> int:
            return value if (i - w / 2 - dx) ** 2 + (j - h / 2) ** 2 < r * r else 0

        return [[at(i, j) for j in range(h)] for i in range(w)]

    def grey(w: int, h: int) -> list[list[int]]:
        return [
            [min(255, 40 + 3 * i + 2 * ((i * j) % 7) + (j * 90) // h) for j in range(h)]
            for i in range(w)
        ]

    def one(name: str, score: float, shift: float) -> dict[str, Any]:
        w, h = 36, 48
        planes = {
            plane: {
                "spacing": [1.0, 1.0],
                "image": array(grey(w, h)),
                "target": array(disc(w, h, 11, 1)),
                "predicted": array(disc(w, h, 10.4, 1, shift)),
                "stack": [
                    {
                        "image": array(grey(w, h)),
                        "target": array(disc(w, h, r, 1)),
                        "predicted": array(disc(w, h, r - 0.6, 1, shift)),
                    }
                    for r in (5.0, 9.0, 11.0, 9.0, 5.0)
                ],
            }
            for plane in ("sagittal", "coronal", "axial")
        }
        return {"case": name, "score": score, "planes": planes}

    return {
        "round": ROUND - 1,
        "pictures": {
            "best": one("P-0042", 0.94, 0.3),
            "median": one("P-0007", 0.88, 2.0),
            "worst": one("P-0013", 0.61, 6.0),
        },
    }


def private_views() -> dict[str, Any]:
    metrics = [
        {"round": r, "values": {
            "accuracy": SECRET if r == ROUND - 1 else 0.87 - 0.3 * math.exp(-r / 9),
            "auc": 0.93 - 0.3 * math.exp(-r / 7),
        }}
        for r in range(1, ROUND)
    ]  # fmt: skip
    ledger = {"spent": {"epsilon": 3.2}, "limit": {"epsilon": 8.0}, "releases": 41, "entries": []}
    status = {"rounds": [{"round": ROUND - 1, "seconds": {"compute": 40.0, "peers": 20.0}}]}
    return {
        "/v1/metrics": lambda: {"metrics": metrics},
        "/v1/status": lambda: {"progress": None, **status},
        "/v1/ledger": lambda: ledger,
        "/v1/pictures": pictures,
    }


@contextlib.contextmanager
def sockets(backend: Board, *, private: bool = True) -> Iterator[tuple[Path, Any]]:
    """The two sockets of one daemon in a short folder; gives the admin socket and a trio token."""
    with short_folder() as folder, contextlib.ExitStack() as stack:
        token = stack.enter_context(daemon(backend, folder / "admin.sock"))
        if private:
            stack.enter_context(serve_private_socket(folder / "trainer.sock", private_views()))
        yield folder / "admin.sock", token
