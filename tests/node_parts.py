"""What the node's own tests share: a network that only remembers, and a node composed around it."""

from __future__ import annotations

import datetime as dt
import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import trio
from consortium import Consortium, key_of, peer_of
from safetensors.numpy import save_file

from p2pfed.config import load_settings
from p2pfed.errors import PeerUnreachable
from p2pfed.gossip.core import Core
from p2pfed.gossip.events import Fold
from p2pfed.identity.book import RosterBook
from p2pfed.identity.signing import DELTA, sign
from p2pfed.network import FrameReceived, PeerConnected
from p2pfed.network.events import NetworkTotals, PeerStats
from p2pfed.node.directory import DataDirectory, file_digest
from p2pfed.node.eventlog import EventLog
from p2pfed.node.gate import RosterGate
from p2pfed.node.operator import Operator
from p2pfed.node.shell import Shell
from p2pfed.node.store import Store
from p2pfed.wire.messages import Beat, encode_message

NOON = dt.datetime(2026, 6, 1, 12, tzinfo=dt.UTC)


class FakeNetwork:
    """Remembers what it was asked; `files` are what peers would give, `figures` what it tells."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.files: dict[tuple[str, bytes], bytes] = {}
        self.figures: dict[str, PeerStats] = {}
        self.tell, self.events = trio.open_memory_channel[Any](1000)
        self.on_send = lambda peer, frame: None

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [asked[1:] for asked in self.asked if asked[0] == kind]

    def send(self, peer: str, frame: bytes) -> bool:
        self.on_send(peer, frame)
        self.asked.append(("send", peer, frame))
        return True

    def keep_connected(
        self, peer: str, addresses: Sequence[str], *, has_left: bool = False
    ) -> None:
        self.asked.append(("keep seldom" if has_left else "keep", peer, tuple(addresses)))

    def limit_upload(self, bytes_per_second: float | None) -> None:
        self.asked.append(("limit_upload", bytes_per_second))

    def allow(self, networks: Sequence[str]) -> None:
        self.asked.append(("allow", tuple(networks)))

    def stop_dialling(self, peer: str) -> None:
        self.asked.append(("stop", peer))

    async def disconnect(self, peer: str) -> None:
        self.asked.append(("disconnect", peer))

    async def recheck(self) -> None:
        self.asked.append(("recheck",))

    async def fetch(self, peer: str, digest: bytes, destination: Path, *, max_bytes: int) -> None:
        self.asked.append(("fetch", peer, digest))
        await trio.lowlevel.checkpoint()
        data = self.files.get((peer, digest))
        if data is None or len(data) > max_bytes:
            raise PeerUnreachable("the peer does not hold this file")
        await trio.Path(destination).write_bytes(data)

    def stats(self, peer: str) -> PeerStats:
        return self.figures.get(peer, PeerStats(0, 0, None, None, "", None, 0))

    def totals(self) -> NetworkTotals:
        return NetworkTotals(0, 0, 0, 0, 0, 0, 0)


class FakeTrainer:
    """Gives prepared answers; a callable makes one from the request."""

    def __init__(self, exchange: Path, *answers: Any) -> None:
        self.exchange = exchange
        self.requests: list[dict[str, Any]] = []
        self.answers = list(answers)
        self.state, self.problem, self.restarts, self.pid = "ready", "", 0, 1234
        self.paused, self.hint = False, ""
        self.left: list[str] = []

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(request)
        await trio.lowlevel.checkpoint()
        if request["op"] == "evaluate" or not self.answers:
            return {"event": "evaluated"}
        answer = self.answers.pop(0)
        if callable(answer):
            answer = answer(request)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def pause(self) -> None:
        await trio.lowlevel.checkpoint()
        self.paused, self.state = True, "paused"

    def resume(self) -> None:
        self.paused, self.state = False, "ready"

    def leave_round(self, why: str) -> None:
        self.left.append(why)


class Node:
    """Hospital 0 of a consortium, composed as the daemon composes it, without sockets."""

    def __init__(
        self,
        folder: Path,
        nursery: trio.Nursery,
        *,
        consortium: Consortium,
        trains: bool,
        config: str,
    ) -> None:
        self.folder = folder
        self.consortium = consortium
        folder.mkdir(mode=0o700, exist_ok=True)
        self.file = folder / "p2pfed.toml"
        train = 'task = "breast-cancer"' if trains else "enabled = false"
        self.file.write_text(
            '[node]\nname = "h0"\ndata_dir = "."\n'
            f'[train]\n{train}\n[privacy]\nepsilon = "10"\n{config}'
        )
        self.directory = DataDirectory(folder)
        self.store = Store(self.directory.store)
        self.network = FakeNetwork()
        self.log = EventLog(self.store, lambda: NOON)
        self.book = RosterBook()
        for signed in self.directory.rosters():
            self.book.restore(signed)
        self.core = Core(
            own_id=peer_of(0),
            sign=lambda data: sign(key_of(0).seed, DELTA, data),
            book=self.book,
            rng=random.Random(1),
            addresses=(f"/ip4/192.0.2.1/tcp/4201/p2p/{peer_of(0)}",),
            has_trainer=trains,
        )
        self.gate = RosterGate(self.directory)
        self.wall = NOON
        self.shell = Shell(
            self.core,
            directory=self.directory,
            store=self.store,
            log=self.log,
            network=self.network,
            nursery=nursery,
            wall=lambda: self.wall,
        )
        self.gate.shell = self.shell
        self.operator = Operator(load_settings(self.file), self.shell, self.directory, [])
        self.genesis = folder / "first.safetensors"
        save_file({"model": np.linspace(-1, 1, 40, dtype=np.float32)}, self.genesis)

    def signed_run(self, *by: int, **constants: Any) -> bytes:
        constants.setdefault("genesis", file_digest(self.genesis))
        return self.consortium.signed_run(*by, **constants)

    async def with_run(self, **constants: Any) -> None:
        """Hold the roster and take part in a run."""
        await self.operator.join(roster=self.consortium.signed[-1], bootstrap=[])
        await self.operator.accept_run(self.signed_run(**constants), self.genesis)
        await self.until(lambda: self.shell.run is not None)

    async def until(self, condition: Any) -> None:
        with trio.fail_after(20):
            while not condition():  # noqa: ASYNC110 - of threads nobody is told
                await trio.sleep(0.005)

    def kinds(self) -> list[str]:
        return [event["type"] for event in self.log.since(0, 1000)[0]]

    def public_state(self) -> str:
        """All that a refused action must leave as it is."""
        status = self.operator.status()
        del status["uptime_s"]
        if status["run"] and status["run"]["archive"]:
            del status["run"]["archive"]["free_bytes"]  # others write to this disk too
        rows = self.store._db.execute("SELECT * FROM remembered ORDER BY key").fetchall()
        files = sorted(
            (str(p.relative_to(self.folder)), p.read_bytes().hex())
            for p in self.folder.rglob("*")
            if p.is_file() and p.parent.name in {"rosters", "runs", "blobs"}
        )
        addresses = self.store.addresses()
        return json.dumps([status, self.operator.runs(), rows, files, addresses])

    def beat_of(self, i: int, **changes: Any) -> None:
        """Hospital i connects and beats."""
        run = self.shell.run
        values: dict[str, Any] = {
            "sequence": 1,
            "network_id": self.book.network_id,
            "run_id": run.run_id if run else b"",
            "task_id": b"",
            "round": 0,
            "contributes": True,
            "model_round": 0,
            "model_hash": b"",
            "documents": bytes(16),
            "addresses": (),
        }
        frame = encode_message(Beat(**values | changes))
        for event in (PeerConnected(peer_of(i)), FrameReceived(peer_of(i), frame)):
            self.network.tell.send_nowait(event)


@asynccontextmanager
async def a_node(
    folder: Path, *, consortium: Consortium | None = None, trains: bool = False, config: str = ""
) -> AsyncIterator[Node]:
    """A node that hears its network; the block ends with all of its tasks gone."""
    with ExitStack() as after:  # what a task still does in a thread is done before the store closes
        async with trio.open_nursery() as nursery:
            node = Node(
                folder,
                nursery,
                consortium=consortium or Consortium(3),
                trains=trains,
                config=config,
            )
            after.callback(node.store.close)
            nursery.start_soon(node.shell.hear_for_ever)
            try:
                yield node
            finally:
                nursery.cancel_scope.cancel()


def plan(node, round_: int) -> Fold:
    """The fold of a node's rounds before this one, from the facts that it holds."""
    facts = node.core.facts
    return Fold(
        round_,
        tuple(facts.chain(r) for r in range(round_ + 1)),
        tuple(facts.counted(r) for r in range(round_)),
    )
