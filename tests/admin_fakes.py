"""A backend that a test can steer, and a daemon of it in a thread with a real socket."""

from __future__ import annotations

import contextlib
import datetime as dt
import fnmatch
import os
import shutil
import tempfile
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import trio

from p2pfed.admin.server import Limits, serve_admin
from p2pfed.errors import NotFound, PolicyError

PEER = {
    "name": "Oslo",
    "peer_id": "12D3KooWOslo",
    "state": "alive",
    "round": 42,
    "rtt_ms": 31.0,
    "path": "direct",
    "sent_bytes": 420_000_000,
    "received_bytes": 400_000_000,
    "model_hash": "ab" * 32,
    "seen_s": 2.0,
    "roles": ["train", "relay"],
    "samples": 303,
    "addresses": ["/ip4/127.0.0.1/tcp/4201"],
}


class FakeBackend:
    """Answers from plain attributes; remembers the actions it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.log: list[dict[str, Any]] = []
        self.lost_before = 0
        self.grown = trio.Event()
        self.signed_roster = ""
        self.alive = 1
        self.mechanism: str | None = "svt"
        self.contributing = {"yes": True, "reason": ""}
        self.relay = {"circuits": 0, "relayed_bytes": 0}
        self.health: list[str] = []
        self.closed_generators = 0
        self.make_peers = lambda: [PEER]
        self.model_bytes: bytes | None = None
        self.opened: BinaryIO | None = None
        self.operators: frozenset[int] = frozenset()
        self.written: list[tuple[int, str, str, str]] = []
        self.records: list[dict[str, Any]] = []

    def emit(self, kind: str, **data: Any) -> None:
        seq = self.lost_before + len(self.log) + 1
        self.log.append(
            {"v": 1, "seq": seq, "ts": "2026-01-02T03:04:05Z", "type": kind, "data": data}
        )
        self.grown.set()
        self.grown = trio.Event()

    def status(self) -> dict[str, Any]:
        return {
            "name": "St Mary",
            "peer_id": "12D3KooWAbcdefghijklmnop",
            "version": "0.1.0",
            "pid": 1,
            "uptime_s": 273_600,
            "addresses": [],
            "network": {"name": "cardio-eu", "id": "cd" * 32},
            "roster": {
                "version": 7,
                "hash": "ef" * 32,
                "expires": "2027-01-31T00:00:00Z",
                "expired": False,
                "threshold": 2,
                "stewards": 3,
                "members": 5,
            },
            "run": {
                "id": "01" * 32,
                "name": "heart-1",
                "task": "heart-disease",
                "mechanism": self.mechanism,
                "unit": "patient",
                "round": 42,
                "rounds": 100,
                "phase": "training",
                "model_hash": "3f" * 32,
                "model_round": 41,
                "deltas": 160,
            },
            "sharing": True,
            "contributing": self.contributing,
            "privacy": self.privacy(),
            "peers": {"alive": self.alive, "suspect": 0, "away": 1, "left": 1, "revoked": 0},
            "traffic": {"sent_bytes": 1_200_000_000, "received_bytes": 1_100_000_000},
            "relay": self.relay,
            "trainer": {"state": "running", "restarts": 0},
            "health": self.health,
        }

    def peers(self) -> list[dict[str, Any]]:
        return self.make_peers()

    def peer(self, peer: str) -> dict[str, Any]:
        if peer not in {"Oslo", "12D3KooWOslo", "a/b c"}:
            raise NotFound(f"no peer {peer}", "", "see: p2pfed peers")
        return PEER

    def privacy(self) -> dict[str, Any]:
        return {
            "mechanism": self.mechanism,
            "unit": "patient",
            "relation": "zero-out",
            "epsilon": 8.0,
            "delta": 1e-5,
            "spent_epsilon": 3.2,
            "releases": 41,
            "forecast_round": 260,
        }

    def roster(self) -> dict[str, Any]:
        return {"signed": self.signed_roster}

    def bootstrap(self) -> list[dict[str, Any]]:
        return [{"name": "Oslo", "addrs": ["/ip4/127.0.0.1/tcp/4201/p2p/12D3KooWOslo"]}]

    def runs(self) -> list[dict[str, Any]]:
        return []

    def events(
        self, since: int, limit: int, *, kind: str = "", after: dt.datetime | None = None
    ) -> tuple[list[dict[str, Any]], int, int]:
        lost = max(0, self.lost_before - since)
        begin = "" if after is None else after.strftime("%Y-%m-%dT%H:%M:%SZ")
        found = [
            event
            for event in self.log
            if event["seq"] > since
            and event["ts"] >= begin
            and fnmatch.fnmatchcase(event["type"], kind or "*")
        ][:limit]
        whole = max(since + lost, self.log[-1]["seq"] if self.log else 0)
        return found, lost, found[-1]["seq"] if len(found) == limit else whole

    def before_newest(self, count: int, kind: str) -> int:
        seqs = [e["seq"] for e in self.log if fnmatch.fnmatchcase(e["type"], kind or "*")]
        return seqs[-count] - 1 if count <= len(seqs) else 0

    def note_write(self, uid: int, user: str, endpoint: str, outcome: str) -> None:
        self.written.append((uid, user, endpoint, outcome))

    async def logs(self, level: str) -> AsyncGenerator[dict[str, Any], None]:
        for record in self.records:
            yield {**record, "level": level}

    async def reload(self) -> dict[str, Any]:
        self.asked.append(("reload", None))
        return {"applied": ["log.level"], "restart_trainer": [], "restart_daemon": []}

    async def next_event(self, since: int) -> None:
        try:
            while not any(event["seq"] > since for event in self.log):
                await self.grown.wait()
        finally:
            self.closed_generators += 1

    async def model(self) -> BinaryIO:
        if self.model_bytes is None:
            raise NotFound("this node takes part in no run", "", "p2pfed run accept FILE")
        self.opened = tempfile.TemporaryFile()  # noqa: SIM115 - the server closes it
        self.opened.write(self.model_bytes)
        self.opened.seek(0)
        return self.opened

    async def pause(self, on: bool) -> dict[str, Any]:
        self.asked.append(("pause", on))
        return {"paused": on}

    async def join(
        self, *, roster: bytes | None, bootstrap: list[dict[str, Any]]
    ) -> dict[str, Any]:
        self.asked.append(("join", (roster, bootstrap)))
        return {"joined": True}

    async def leave(self) -> dict[str, Any]:
        self.asked.append(("leave", None))
        return {}

    async def share(self, on: bool) -> dict[str, Any]:
        self.asked.append(("share", on))
        return {"sharing": on}

    async def block(self, peer: str, on: bool) -> dict[str, Any]:
        self.asked.append(("block", (peer, on)))
        return {"peer_id": peer, "blocked": on}

    async def accept_run(self, signed: bytes, genesis: Path | None) -> dict[str, Any]:
        self.asked.append(("run", (signed, genesis)))
        return {"accepted": True}

    async def offer_roster(self, signed: bytes) -> dict[str, Any]:
        self.asked.append(("roster", signed))
        raise PolicyError("roster v3 is not newer", "a roster is never rolled back", "sign v8")


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A folder whose sockets' paths are short enough (pytest's own may not be)."""
    folder = Path(tempfile.mkdtemp(prefix="p2pfed-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def empty_home(monkeypatch: Any) -> Iterator[Path]:
    """A short folder that is the current one and the home, with no P2PFED variable set."""
    with short_folder() as path:
        monkeypatch.chdir(path)
        monkeypatch.setenv("HOME", str(path))
        for name in [n for n in os.environ if n.startswith("P2PFED_")]:
            monkeypatch.delenv(name)
        yield path


@contextlib.contextmanager
def daemon(
    backend: FakeBackend,
    socket: Path,
    *,
    limits: Limits | None = None,
    mode: int = 0o600,
    group: str = "",
) -> Iterator[trio.lowlevel.TrioToken]:
    """Serve `backend` on a real socket from a thread; the block ends with the server gone."""
    ready, state = threading.Event(), {}

    async def serving() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(
                lambda task_status: serve_admin(
                    backend,
                    socket=socket,
                    mode=mode,
                    group=group,
                    limits=limits or Limits(),
                    task_status=task_status,
                )
            )
            state["scope"], state["token"] = (
                nursery.cancel_scope,
                trio.lowlevel.current_trio_token(),
            )
            ready.set()

    def main() -> None:
        try:
            trio.run(serving)
        except BaseException as error:
            state["error"] = error
            raise
        finally:
            ready.set()

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield state["token"]
    finally:
        state["token"].run_sync_soon(state["scope"].cancel)
        thread.join(10)
        assert not thread.is_alive(), "the server did not end"
        assert "error" not in state
