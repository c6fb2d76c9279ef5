"""A network of real daemons in one folder: keys, rosters, run, configurations, processes, sockets.

Everything is what a consortium would do, with the stewards' three keys at hand: found a roster, add
members, sign by two of three, write a run file, accept it at every node through its admin socket.

Invariant: whatever ends the demo, `stop_all` leaves no process behind: every daemon leads a process
group, which is told to stop and then killed.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfed.admin.client import Client
from p2pfed.demo.plan import Cast, Hospital
from p2pfed.errors import AdminError, P2PFedError, TimedOut
from p2pfed.gossip.fold import view_of
from p2pfed.identity.keys import NodeKey, StewardKey
from p2pfed.identity.roster import Member, Roster, Steward
from p2pfed.identity.run import Run
from p2pfed.identity.signing import ROSTER, RUN, SignedDocument
from p2pfed.node.checkpoints import DiskCheckpoints

__all__ = ["Daemon", "Federation", "Stewards", "wait_for"]

START_DEADLINE = 90.0
POLL = 0.2
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stewards:
    """Three stewards, of whom two must sign."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True)
        self._keys = [StewardKey.create(folder / f"steward-{i}.key") for i in (1, 2, 3)]
        expires = dt.datetime.now(dt.UTC).replace(microsecond=0) + dt.timedelta(days=30)
        stewards = [Steward(f"steward-{i}", k.public_key) for i, k in enumerate(self._keys, 1)]
        draft = Roster.found("demo", stewards=stewards, threshold=2, expires=expires)
        self.roster, self.signed = self._signed(draft)

    def _signed(self, draft: Roster) -> tuple[Roster, bytes]:
        document = self._sign(draft.encode(), ROSTER)
        return Roster.decode(document.payload), document.encode()

    def _sign(self, payload: bytes, person: bytes) -> SignedDocument:
        document = SignedDocument(payload)
        for key in self._keys[:2]:
            document = document.signed_by(key.seed, person)
        return document

    def admit(self, members: Sequence[Member]) -> bytes:
        """Sign the next roster with these members added; returns its bytes."""
        draft = self.roster.next(members=[*self.roster.members, *members])
        self.roster, self.signed = self._signed(draft)
        return self.signed

    def sign_run(self, run: Run) -> bytes:
        """Sign a run file; returns its bytes."""
        return self._sign(run.encode(), RUN).encode()


@dataclass(slots=True)
class Daemon:
    """One node of the demo and its process.

    Attributes:
        hospital: Who it is.
        folder: Its folder.
        key: Its identity.
        port: Where it listens on loopback.
        sockets: Where its sockets are; a short path, because a socket's may have 107 bytes.
        process: The daemon, while it runs.
    """

    hospital: Hospital
    folder: Path
    key: NodeKey
    port: int
    sockets: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        """Name of the hospital."""
        return self.hospital.name

    @property
    def client(self) -> Client:
        """Client of its admin socket."""
        return Client(self.sockets / "admin.sock")

    @property
    def private(self) -> Client:
        """Client of its trainer's private socket."""
        return Client(self.sockets / "trainer.sock")

    @property
    def address(self) -> str:
        """Where it can be dialled."""
        return f"/ip4/127.0.0.1/tcp/{self.port}/p2p/{self.key.peer_id}"

    @property
    def member(self) -> Member:
        """Its line of the roster."""
        roles = ("train",) if self.hospital.trains else ("bootstrap",)
        return Member(self.name, self.key.peer_id, roles, self.hospital.samples)

    def status(self) -> dict[str, Any] | None:
        """Its status, or None if it cannot be asked."""
        try:
            status: dict[str, Any] = self.client.get("/v1/status")
        except AdminError:
            return None
        return status

    @property
    def runs(self) -> bool:
        """Whether the process is alive."""
        return self.process is not None and self.process.poll() is None


class Federation:
    """Daemons of one cast in one folder.

    Args:
        folder: Where everything lies; must not exist.
        cast: Who takes part.
        epsilon: Lifetime budget of every hospital, as text; "0" allows runs without privacy only.
    """

    def __init__(self, folder: Path, cast: Cast, *, epsilon: str) -> None:
        self.folder = folder
        self.cast = cast
        self._sockets = Path(tempfile.mkdtemp(prefix="p2pfed-"))
        self.stewards = Stewards(folder / "stewards")
        self.daemons = {h.name: self._prepare(h, epsilon) for h in cast.hospitals}
        self.first = self.daemons[cast.hospitals[0].name]
        self._signed_run = b""
        self._genesis: Path | None = None

    def _prepare(self, hospital: Hospital, epsilon: str) -> Daemon:
        folder = self.folder / hospital.name.lower().replace(" ", "-")
        folder.mkdir(mode=0o700)
        sockets = self._sockets / str(len(list(self._sockets.iterdir())))
        sockets.mkdir(mode=0o700)
        key = NodeKey.create(folder / "node.key")
        daemon = Daemon(hospital, folder, key, _free_port(), sockets)
        train = [f"enabled = {json.dumps(hospital.trains)}"]
        if hospital.trains:
            train += [f"task = {json.dumps(self.cast.task)}"]
            train += (
                [f"data = {json.dumps(str(self.cast.data.resolve()))}"] if self.cast.data else []
            )
            train += [f"options = {_toml(hospital.options)}"]
        lines = [
            "[node]",
            f"name = {json.dumps(hospital.name)}",
            'data_dir = "."',
            f'listen = ["/ip4/127.0.0.1/tcp/{daemon.port}"]',
            "[network]",
            f'id = "{self.stewards.roster.network_id.hex()}"',
            'bootstrap = ["bootstrap.toml"]',
            "[admin]",
            f"socket = {json.dumps(str(sockets / 'admin.sock'))}",
            "[train]",
            f"socket = {json.dumps(str(sockets / 'trainer.sock'))}",
            *train,
            "[privacy]",
            f"epsilon = {json.dumps(epsilon)}",
            f"allow_none = {json.dumps(epsilon == '0')}",
            'ledger = "ledger.db"  # five hospitals share this machine: each has its own',
        ]
        (folder / "p2pfed.toml").write_text("\n".join(lines) + "\n", "utf-8")
        return daemon

    def write_bootstrap(self) -> None:
        """One bootstrap list for all, naming the first node."""
        text = (
            "version = 1\n"
            'network = "demo"\n'
            f'network_id = "{self.stewards.roster.network_id.hex()}"\n'
            "[[peer]]\n"
            f"name = {json.dumps(self.first.name)}\n"
            f"addrs = [{json.dumps(self.first.address)}]\n"
        )
        for daemon in self.daemons.values():
            (daemon.folder / "bootstrap.toml").write_text(text, "utf-8")

    def make_run(self, name: str, constants: dict[str, Any], *, seed: int) -> Run:
        """Make the genesis and the signed run file."""
        self._genesis = self.folder / "genesis.safetensors"
        command = [sys.executable, "-m", "p2pfed.training", "describe", self.cast.task]
        command += ["--genesis", str(self._genesis), "--seed", str(seed)]
        told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)  # noqa: S603
        draft = Run(
            name=name,
            network_id=self.stewards.roster.network_id,
            task=told["task"],
            task_id=bytes.fromhex(told["task_id"]),
            genesis=bytes.fromhex(told["genesis"]),
            num_parameters=told["num_parameters"],
            **constants,
        )
        self._signed_run = self.stewards.sign_run(draft)
        (self.folder / "run.json").write_bytes(self._signed_run)
        return Run.decode(draft.encode())

    # --- processes -----------------------------------------------------------------------------

    def start(self, daemon: Daemon) -> None:
        """Start a daemon and wait until its socket answers."""
        with (daemon.folder / "daemon.log").open("ab") as log, _undisturbed():
            daemon.process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "p2pfed", "node", "-c", str(daemon.folder / "p2pfed.toml")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is ours; and the group can be ended as one
            )
        wait_for(
            lambda: daemon.status() is not None or not daemon.runs,
            START_DEADLINE,
            f"{daemon.name} starts",
        )
        if not daemon.runs:
            raise P2PFedError(
                f"the daemon of {daemon.name} ended at its start",
                _last_line(daemon.folder / "daemon.log"),
                f"see {daemon.folder / 'daemon.log'}",
            )

    def final_model(self, daemon: Daemon, run: Run) -> NDArray[np.float32]:
        """The model that a node's newest checkpoint holds, shape (P,)."""
        checkpoints = DiskCheckpoints(daemon.folder / "checkpoints" / run.run_id.hex(), run)
        return view_of(checkpoints.load(max(checkpoints.chains())), run.grid_bits)

    def enrol(self, daemon: Daemon, roster: bytes) -> None:
        """Give a daemon the roster, and the run."""
        daemon.client.post("/v1/join", {"roster": roster.decode("utf-8")})
        body = {"signed": self._signed_run.decode("utf-8")}
        if daemon is self.first:  # the others fetch it from there
            body["genesis"] = str(self._genesis)
        daemon.client.post("/v1/runs", body)

    def start_all(self) -> None:
        """Start every daemon and enrol it, one after the other, under one roster of them all."""
        roster = self.stewards.admit([daemon.member for daemon in self.daemons.values()])
        for daemon in self.daemons.values():
            self.start(daemon)
            self.enrol(daemon, roster)

    def kill(self, daemon: Daemon) -> None:
        """SIGKILL, trainer included: what a power cut does."""
        _signal_group(daemon, signal.SIGKILL)
        if daemon.process is not None:
            daemon.process.wait()

    def stop(self, daemon: Daemon) -> None:
        """Stop a daemon gracefully."""
        if daemon.process is not None and daemon.runs:
            daemon.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.process.wait(15)
        _signal_group(daemon, signal.SIGKILL)

    def stop_all(self) -> None:
        """Stop every daemon; none is left when this returns."""
        for daemon in self.daemons.values():
            if daemon.process is not None and daemon.runs:
                daemon.process.terminate()
        for daemon in self.daemons.values():
            self.stop(daemon)

    @contextmanager
    def running(self) -> Iterator[Federation]:
        """Stop everything at the end, whatever the end is."""
        try:
            yield self
        finally:
            # A second Ctrl-C must not stop this.
            before = {number: signal.signal(number, signal.SIG_IGN) for number in _STOPS}
            try:
                self.stop_all()
                shutil.rmtree(self._sockets, ignore_errors=True)
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put off Ctrl-C for a moment: a process that has begun must be known before we unwind."""
    arrived: list[int] = []
    before = {n: signal.signal(n, lambda number, _: arrived.append(number)) for n in _STOPS}
    try:
        yield
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)
    for late in arrived:
        signal.raise_signal(late)


def _signal_group(daemon: Daemon, number: signal.Signals) -> None:
    if daemon.process is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(daemon.process.pid, number)


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll until a condition holds.

    Raises:
        TimedOut: It did not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimedOut(
                f"waited {seconds:.0f} s: {what}",
                "it did not happen in that time",
                "see the nodes' logs beside their configurations",
            )
        time.sleep(POLL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _toml(options: dict[str, str | int]) -> str:
    return "{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in options.items()) + " }"


def _last_line(path: Path) -> str:
    lines = path.read_text("utf-8", "replace").strip().splitlines()
    return lines[-1][:300] if lines else "it wrote nothing"
