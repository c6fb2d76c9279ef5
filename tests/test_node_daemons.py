"""Real daemons with real trainers on loopback, and everything that may happen to them.

One federation for all tests of this file, in the order of the file: a node without data and three
hospitals. The last test waits for the end of the run and compares what is left on the disks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import gc
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import time
import warnings
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import trio
from consortium import STEWARD_SEEDS, Consortium
from reference_fold import reference_hash

from p2pfed.demo.federation import Daemon, Federation, wait_for
from p2pfed.demo.plan import Cast, Hospital, run_constants
from p2pfed.errors import AdminError
from p2pfed.identity.roster import Roster
from p2pfed.identity.signing import ROSTER, RUN, SignedDocument
from p2pfed.privacy.accountant import Cost, epsilon_spent, rho_nano_allowed
from p2pfed.privacy.ledger import Ledger

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
ROUNDS = 160  # the tests before the last one take 70 of them, on a busy machine 100
INTERVAL = 0.5
EPSILON = 10
THREE = 3  # releases that Brook's patients can pay for
PRIVATE = ("torch", "libp2p", "trio", "numpy", "pydantic")


class Net:
    """The federation of this file and what its tests ask of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.door = folder / "door"
        self.door.mkdir()
        sizes = {"North": 184, "South": 142, "Brook": 102}
        hospitals = [Hospital("Gate", 0)]
        for site, (name, size) in enumerate(sizes.items()):
            door = str(self.door if name == "North" else folder / "no door")
            hospitals.append(Hospital(name, size, {"site": site, "sites": 3, "door": door}))
        cast = Cast("held_task:HeldBreastCancer", None, tuple(hospitals), "", "", "")
        self.federation = Federation(folder / "nodes", cast, epsilon=str(EPSILON))
        self.gate, self.north, self.south, self.brook = self.federation.daemons.values()
        self._give_three_rounds(self.brook)
        constants = run_constants("svt", rounds=ROUNDS, epsilon=Fraction(EPSILON))
        constants |= {"deadline_s": 2.0, "min_round_interval_s": INTERVAL}
        self.run = self.federation.make_run("long", constants, seed=0)
        self.federation.write_bootstrap()

    def _give_three_rounds(self, daemon: Daemon) -> None:
        """A lifetime budget for three and a half rounds of the run."""
        of_one = rho_nano_allowed(EPSILON, 1e-5) // ROUNDS
        epsilon = epsilon_spent({Cost(int((THREE + 0.5) * of_one), None): 1}, 1e-5)
        file = daemon.folder / "p2pfed.toml"
        text = file.read_text()
        assert f'epsilon = "{EPSILON}"' in text
        file.write_text(text.replace(f'epsilon = "{EPSILON}"', f'epsilon = "{epsilon:.9f}"'))

    @property
    def all(self) -> list[Daemon]:
        return list(self.federation.daemons.values())

    @property
    def stewards(self) -> Any:
        return self.federation.stewards

    def start(self) -> None:
        roster = self.stewards.admit([d.member for d in self.all])
        for daemon in self.all:
            self.federation.start(daemon)
            self.federation.enrol(daemon, roster)

    def status(self, daemon: Daemon) -> dict[str, Any]:
        status = daemon.status()
        assert status is not None, f"{daemon.name} does not answer"
        return status

    def round(self, daemon: Daemon) -> int:
        status = daemon.status()
        return status["run"]["round"] if status and status["run"] else -1

    def wait(self, condition: Any, what: str, seconds: float = 60.0) -> None:
        wait_for(condition, seconds, what)

    def wait_for_rounds(self, more: int = 2) -> None:
        """All daemons live, and a further round begins at each."""
        before = {d.name: self.round(d) for d in self.all}
        for d in self.all:
            goal = min(ROUNDS, before[d.name] + more)
            self.wait(lambda d=d, goal=goal: self.round(d) >= goal, f"a round at {d.name}")
            assert d.runs

    def seen(self, by: Daemon, of: Daemon) -> str:
        return {p["name"]: p["state"] for p in by.client.get("/v1/peers")}[of.name]

    def events(self, daemon: Daemon, kind: str) -> list[dict[str, Any]]:
        found = daemon.client.stream("/v1/events?since=0&limit=20000")
        return [e["data"] for e in found if e["type"] == kind]

    def cli(self, daemon: Daemon, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "p2pfed", "--socket", str(daemon.client.path), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == code, done.stderr
        return done

    def trainer_pid(self, daemon: Daemon) -> int | None:
        status = daemon.status()
        ready = status is not None and status["trainer"]["state"] == "ready"
        return status["trainer"]["pid"] if ready else None

    def sign(self, payload: bytes, person: bytes, *by: int) -> str:
        document = SignedDocument(payload)
        for i in by:
            document = document.signed_by(self.stewards._keys[i].seed, person)
        return document.encode().decode()


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{HERE.parent}{os.pathsep}{HERE}"
    try:
        made = Net(tmp_path_factory.mktemp("daemons"))
        with made.federation.running():
            made.start()
            made.wait_for_rounds(1)
            yield made
        assert not any(d.runs for d in made.all)
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


# --- looking at it -----------------------------------------------------------------------------


def test_curl_lists_the_peers(net):
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("there is no curl on this machine")
    url = "http://p2pfed/v1/peers"
    command = [curl, "-sS", "--fail", "--unix-socket", net.north.client.path, url]
    told = subprocess.run(command, capture_output=True, check=True, timeout=20).stdout
    assert {p["name"] for p in json.loads(told)} == {"Gate", "South", "Brook"}


def test_peers_of_a_live_daemon_are_json_and_load_nothing_heavy(net):
    told = json.loads(net.cli(net.north, "peers", "--json").stdout)
    assert {p["name"] for p in told["data"]} == {"Gate", "South", "Brook"}
    command = [sys.executable, "-X", "importtime", "-m", "p2pfed"]
    command += ["--socket", net.north.client.path, "peers"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "South" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "p2pfed.admin.client" in loaded  # so that the next line can fail
    assert not {name for name in loaded if name.partition(".")[0] in PRIVATE}


def test_files_and_sockets_are_closed_to_others(net):
    for daemon in (net.gate, net.north):
        modes = {
            path: stat.S_IMODE(path.stat().st_mode)
            for path in (
                Path(daemon.client.path),
                daemon.folder / "store.db",
                daemon.folder / "store.db-wal",
                daemon.folder / "node.key",
                daemon.folder / "rosters",
                daemon.folder / "checkpoints",
            )
        }
        assert {mode & 0o077 for mode in modes.values()} == {0}
    assert stat.S_IMODE(Path(net.north.private.path).stat().st_mode) == 0o600


# --- a spent budget ----------------------------------------------------------------------------


def test_a_hospital_with_a_budget_for_three_rounds_stops_after_three_and_goes_on_receiving(net):
    brook = net.brook

    def spent() -> bool:
        return "budget" in net.status(brook)["contributing"]["reason"]

    net.wait(spent, "Brook's budget is spent")
    status = net.status(brook)
    assert not status["contributing"]["yes"]
    assert status["privacy"]["releases"] == THREE
    assert status["privacy"]["spent_epsilon"] <= status["privacy"]["epsilon"]
    assert status["run"]["own_deltas"] == THREE
    deltas = status["run"]["deltas"]
    text = net.cli(brook, "status").stdout
    assert "not contributing: the lifetime budget" in text
    assert "still receiving" in text
    told = json.loads(net.cli(brook, "status", "--json").stdout)["data"]
    assert told["contributing"] == status["contributing"]
    net.wait_for_rounds(3)
    later = net.status(brook)
    assert later["run"]["deltas"] > deltas
    assert later["run"]["own_deltas"] == THREE
    assert abs(later["run"]["round"] - net.round(net.north)) <= 2
    assert net.events(brook, "privacy.exhausted")


# --- the operator ------------------------------------------------------------------------------


def test_sharing_can_be_switched_off_and_on_again(net):
    south = net.south
    net.cli(south, "share", "off")
    status = net.status(south)
    assert status["contributing"] == {"yes": False, "reason": "sharing is switched off"}
    time.sleep(1.0)  # what was in training ends
    own = net.status(south)["run"]["own_deltas"]
    net.wait_for_rounds(2)
    assert net.status(south)["run"]["own_deltas"] == own
    net.cli(south, "share", "on")
    net.wait(lambda: net.status(south)["run"]["own_deltas"] > own, "South contributes again")


def test_who_leaves_is_left_and_not_away_and_comes_back(net):
    south = net.south
    net.cli(south, "leave")
    for other in (net.gate, net.north, net.brook):
        net.wait(lambda other=other: net.seen(other, south) == "left", f"{other.name} saw it go")
    assert not net.status(south)["present"]
    stood = net.round(south)
    north = net.round(net.north)
    net.wait(lambda: net.round(net.north) > north + 1, "the others go on")
    assert net.round(south) <= stood + 1
    assert "left" in {net.seen(other, south) for other in (net.gate, net.north, net.brook)}
    net.cli(south, "join")
    for other in (net.gate, net.north, net.brook):
        net.wait(lambda other=other: net.seen(other, south) == "alive", f"{other.name} saw it")
    net.wait_for_rounds(1)


def test_a_graceful_stop_is_a_goodbye_and_a_start_takes_the_work_up_again(net):
    brook = net.brook
    brook.process.send_signal(signal.SIGTERM)
    assert brook.process.wait(20) == 0
    for other in (net.gate, net.north, net.south):
        net.wait(lambda other=other: net.seen(other, brook) == "left", f"{other.name} saw it go")
    assert not Path(brook.client.path).exists()
    assert not Path(brook.private.path).exists()
    net.federation.start(brook)
    for other in (net.gate, net.north, net.south):
        net.wait(lambda other=other: net.seen(other, brook) == "alive", f"{other.name} saw it")
    net.wait_for_rounds(1)
    net.wait(
        lambda: "budget" in net.status(brook)["contributing"]["reason"],
        "Brook's budget is still spent",
    )
    assert net.status(brook)["run"]["own_deltas"] == THREE


# --- refusals ----------------------------------------------------------------------------------


def post(daemon: Daemon, path: str, body: Any) -> tuple[int, str, dict[str, Any]]:
    """Status, content type and body of a POST, by hand."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: p2pfed\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(daemon.client.path)
        client.sendall(head.encode() + data)
        answer = b""
        while piece := client.recv(65536):
            answer += piece
    headers, _, rest = answer.partition(b"\r\n\r\n")
    lines = headers.decode("latin1").lower().split("\r\n")
    kind = next(line for line in lines if line.startswith("content-type:")).partition(": ")[2]
    if "transfer-encoding: chunked" in lines:
        rest = rest.split(b"\r\n")[1]
    return int(lines[0].split()[1]), kind, json.loads(rest)


def refusals(net: Net) -> dict[str, tuple[str, dict[str, Any], int]]:
    """Bad requests by name: path, body, exit code of the refusal."""
    roster, run = net.stewards.roster, net.run
    draft = roster.next(expires=roster.expires + dt.timedelta(days=1)).encode()
    foreign = Consortium(2, network="another network")
    older = Roster.decode(foreign.rosters[0].encode())
    wrong = net.folder / "wrong.safetensors"
    wrong.write_bytes(b"wrong")
    first = net.stewards.roster  # its own version again, signed anew with another expiry
    same = dataclasses.replace(first, expires=first.expires + dt.timedelta(days=2)).encode()

    def changed(**constants: Any) -> bytes:
        return dataclasses.replace(run, **constants).encode()

    def accept(payload: bytes, *by: int, **more: str) -> tuple[str, dict[str, Any], int]:
        return "/v1/runs", {"signed": net.sign(payload, RUN, *by), **more}, 7

    strangers = SignedDocument(draft)
    for seed in STEWARD_SEEDS[:2]:
        strangers = strangers.signed_by(seed, ROSTER)
    without = run_constants("none", rounds=5, epsilon=Fraction(0))
    return {
        "no JSON": ("/v1/roster", "text", 2),  # type: ignore[dict-item]
        "no signed text": ("/v1/roster", {}, 2),
        "another key": ("/v1/share", {"on": True, "budget": 100}, 2),
        "a lone surrogate": ("/v1/roster", {"signed": "\ud800"}, 2),
        "unsigned roster": ("/v1/roster", {"signed": draft.decode()}, 7),
        "one signature": ("/v1/roster", {"signed": net.sign(draft, ROSTER, 1)}, 7),
        "strangers' signatures": ("/v1/roster", {"signed": strangers.encode().decode()}, 7),
        "signed as a run": ("/v1/roster", {"signed": net.sign(draft, RUN, 0, 1)}, 7),
        "same version": ("/v1/roster", {"signed": net.sign(same, ROSTER, 0, 1)}, 7),
        "other network": ("/v1/roster", {"signed": foreign.signed[-1].decode()}, 7),
        "join, other network": ("/v1/join", {"roster": foreign.signed[0].decode()}, 7),
        "run, unsigned": ("/v1/runs", {"signed": run.encode().decode()}, 7),
        "run, one signature": accept(changed(name="b"), 2),
        "run, other network": accept(changed(name="b", network_id=older.hash), 0, 1),
        "run, other task": accept(changed(name="b", task_id=bytes(32)), 0, 1),
        "run, wrong genesis": accept(changed(name="b"), 0, 1, genesis=str(wrong)),
        "run, no genesis": accept(changed(name="b"), 0, 1, genesis=str(net.folder / "no")),
        "run, not private": accept(changed(name="b", **without), 0, 1),
    }


def test_what_is_refused_is_a_problem_document_and_changes_nothing(net):
    north = net.north
    wanted = ("roster", "sharing", "present", "network", "name")
    files = {p.name for f in ("rosters", "runs", "blobs") for p in (north.folder / f).iterdir()}
    before = net.status(north)
    for name, (path, body, code) in refusals(net).items():
        status, kind, problem = post(north, path, body)
        assert 400 <= status < 500, name
        assert kind == "application/problem+json", name
        assert problem["exit_code"] == code, (name, problem)
        assert problem["title"], name
    after = net.status(north)
    assert {k: after[k] for k in wanted} == {k: before[k] for k in wanted}
    assert after["run"]["id"] == before["run"]["id"]
    assert after["privacy"]["epsilon"] == before["privacy"]["epsilon"]
    kept = {p.name for f in ("rosters", "runs", "blobs") for p in (north.folder / f).iterdir()}
    assert kept == files
    net.wait_for_rounds(1)


def test_on_an_expired_roster_a_node_receives_releases_nothing_and_says_so(net):
    stewards = net.stewards
    valid = stewards.roster.expires
    gone = dt.datetime.now(dt.UTC).replace(microsecond=0) - dt.timedelta(hours=1)
    stewards.roster, expired = stewards._signed(stewards.roster.next(expires=gone))
    net.gate.client.post("/v1/roster", {"signed": expired.decode()})
    for daemon in (net.north, net.south):
        net.wait(
            lambda d=daemon: "expired" in net.status(d)["contributing"]["reason"], "it spreads"
        )
        assert net.status(daemon)["roster"]["expired"]
        text = net.cli(daemon, "status").stdout
        assert "EXPIRED" in text
        assert "receiving, releasing nothing" in text
    time.sleep(1.0)
    own = {d.name: net.status(d)["run"]["own_deltas"] for d in net.all}
    time.sleep(4 * INTERVAL)
    assert {d.name: net.status(d)["run"]["own_deltas"] for d in net.all} == own
    assert net.seen(net.gate, net.north) == "alive"  # receiving goes on
    stewards.roster, renewed = stewards._signed(stewards.roster.next(expires=valid))
    net.north.client.post("/v1/roster", {"signed": renewed.decode()})
    for daemon in (net.north, net.south):
        net.wait(
            lambda d=daemon: net.status(d)["run"]["own_deltas"] > own[d.name],
            f"{daemon.name} releases again",
        )


# --- garbage and strangers ---------------------------------------------------------------------

GARBAGE = [
    b"",
    b"\0" * 4096,
    random.Random(7).randbytes(65536),
    b"\x13/multistream/1.0.0\n",
    b"\x13/multistream/1.0.0\n\x07/noise\n" + random.Random(8).randbytes(300),
    b"\xff" * 1_000_000,
    b"GET /v1/sta",
    b"GET /v1/status HTTP/1.1\r\nHost: p2pfed\r\n",
    b"GET /" + b"a" * 2_000_000,
    b"POST /v1/leave HTTP/1.1\r\nHost: p2pfed\r\nContent-Length: 1000000000000\r\n\r\n{",
    b"POST /v1/share HTTP/1.1\r\nHost: p2pfed\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/join HTTP/1.1\r\nHost: p2pfed\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /v1/status HTTP/9.9\r\n\r\n" * 500,
    b"\n" * 100_000,
]


def throw(family: int, address: Any, data: bytes) -> socket.socket:
    """Send what is taken within a moment; the socket stays open, half a request behind it."""
    client = socket.socket(family)
    client.settimeout(0.3)
    with contextlib.suppress(OSError):
        client.connect(address)
        client.sendall(data)
    return client


def test_garbage_and_half_requests_on_every_socket_leave_all_daemons_at_work(net):
    pids = {d.name: net.status(d)["pid"] for d in net.all}
    trainers = {d.name: net.trainer_pid(d) for d in net.all}
    open_sockets = []
    for daemon in (net.gate, net.north):
        for data in GARBAGE:
            open_sockets += [
                throw(socket.AF_INET, ("127.0.0.1", daemon.port), data),
                throw(socket.AF_UNIX, daemon.client.path, data),
            ]
            if daemon.hospital.trains:
                open_sockets.append(throw(socket.AF_UNIX, daemon.private.path, data))
    net.wait_for_rounds(1)  # with all of them still open
    for client in open_sockets:
        client.close()
    assert net.north.private.get("/v1/status")["device"] == "cpu"
    assert {d.name: net.status(d)["pid"] for d in net.all} == pids
    assert {d.name: net.trainer_pid(d) for d in net.all} == trainers
    assert net.status(net.north)["present"]
    assert net.status(net.north)["sharing"]
    net.wait_for_rounds(1)


async def test_a_stranger_with_the_stock_host_or_with_noise_alone_gets_no_application_byte(
    net, monkeypatch
):
    from libp2p import new_host
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.crypto.x25519 import create_new_key_pair as create_x25519
    from libp2p.io.trio import TrioTCPStream
    from libp2p.network.connection.raw_connection import RawConnection
    from libp2p.peer.id import ID
    from libp2p.peer.peerinfo import PeerInfo
    from libp2p.security.noise.transport import Transport as Noise
    from libp2p.stream_muxer.yamux.yamux import Yamux
    from multiaddr import Multiaddr

    from p2pfed.network.multistream import propose

    received: list[int] = []
    stock_read = Yamux._read_data_body

    async def counting(self, length):
        received.append(length)
        return await stock_read(self, length)

    monkeypatch.setattr(Yamux, "_read_data_body", counting)
    daemon = net.gate
    peer, where = ID.from_base58(daemon.key.peer_id), f"/ip4/127.0.0.1/tcp/{daemon.port}"
    host = new_host(key_pair=create_new_key_pair(os.urandom(32)))
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        for protocol in ("/p2pfed/gossip/1", "/ipfs/id/1.0.0"):
            opened = False
            with trio.move_on_after(6), contextlib.suppress(Exception):
                await host.connect(PeerInfo(peer, [Multiaddr(where)]))
                await host.new_stream(peer, [protocol])
                opened = True
            assert not opened, protocol
    del host
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    assert sum(received) == 0

    keys = create_new_key_pair(os.urandom(32))
    async with await trio.open_tcp_stream("127.0.0.1", daemon.port) as tcp:
        raw = RawConnection(TrioTCPStream(tcp), True)
        await propose(raw, "/noise", stall=5)
        noise = Noise(keys, noise_privkey=create_x25519().private_key)
        secure = await noise.secure_outbound(raw, peer)
        await propose(secure, "/yamux/1.0.0", stall=5)
        data = 0
        with trio.fail_after(30), contextlib.suppress(Exception):  # until the daemon hangs up
            while True:
                _, kind, _, _, length = struct.unpack("!BBHII", await secure.read(12))
                if kind == 0:
                    data += length
                    await secure.read(length)
    assert data == 0
    assert daemon.runs
    assert {p["name"] for p in daemon.client.get("/v1/peers")} == {"North", "South", "Brook"}


# --- crashes -----------------------------------------------------------------------------------


def test_a_killed_trainer_leaves_the_daemon_answering_and_is_started_again(net):
    south = net.south
    net.wait(lambda: net.trainer_pid(south) is not None, "South's trainer is ready")
    daemon, trainer = net.status(south)["pid"], net.trainer_pid(south)
    restarts = net.status(south)["trainer"]["restarts"]
    os.kill(trainer, signal.SIGKILL)
    net.wait(lambda: net.status(south)["trainer"]["restarts"] > restarts, "the crash is seen", 10)
    status = net.status(south)
    assert not status["contributing"]["yes"]
    assert "trainer" in status["contributing"]["reason"]
    assert any("-9" in line for line in status["health"])
    assert f"{restarts + 1} restarts" in net.cli(south, "status").stdout
    net.wait(lambda: net.trainer_pid(south) not in {None, trainer}, "it is started again")
    assert net.status(south)["pid"] == daemon
    own = net.status(south)["run"]["own_deltas"]
    net.wait(lambda: net.status(south)["run"]["own_deltas"] > own, "South contributes again")


def hold(net: Net) -> None:
    """Stop North's trainer between a debit and its release."""
    (net.door / "held").unlink(missing_ok=True)
    (net.door / "hold").touch()
    net.wait((net.door / "held").exists, "the gate is held between debit and release")


def let_go(net: Net) -> None:
    (net.door / "hold").unlink()


def test_a_trainer_killed_between_debit_and_release_and_at_random_goes_on(net):
    north, chance = net.north, random.Random(20_260)
    for delay in (None, chance.uniform(0, 1), None):
        net.wait(lambda: net.trainer_pid(north) is not None, "North's trainer is ready")
        pid = net.trainer_pid(north)
        if delay is None:
            hold(net)
        else:
            time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if delay is None:
            let_go(net)
        net.wait(lambda pid=pid: net.trainer_pid(north) != pid, "the crash is seen")
    own = net.status(north)["run"]["own_deltas"]
    net.wait(lambda: net.status(north)["run"]["own_deltas"] > own, "North contributes again")


def test_a_daemon_killed_at_any_moment_goes_on_from_its_own_store(net):
    north, south, chance = net.north, net.south, random.Random(4_711)
    for step, daemon in enumerate((south, north, south)):
        if daemon is north:
            hold(net)
        else:
            time.sleep(chance.uniform(0.0, 2 * INTERVAL))
        held = {s["run"]["deltas"] for s in [daemon.status()] if s and s["run"]}
        if step:
            net.federation.kill(daemon)
        else:  # the trainer outlives its daemon for a moment, and holds the ledger
            daemon.process.kill()
            daemon.process.wait()
        if daemon is north:
            let_go(net)
        net.federation.start(daemon)
        net.wait(lambda d=daemon: net.round(d) >= 0, f"{daemon.name} takes its run up again")
        assert net.status(daemon)["run"]["deltas"] >= max(held, default=0) - 3  # not from scratch
        own = net.status(daemon)["run"]["own_deltas"]
        net.wait(
            lambda d=daemon, own=own: net.status(d)["run"]["own_deltas"] > own,
            f"{daemon.name} contributes again ({step})",
        )
    net.wait_for_rounds(1)


# --- the end -----------------------------------------------------------------------------------


def stored(daemon: Daemon) -> list[tuple[int, str, bytes]]:
    with contextlib.closing(sqlite3.connect(daemon.folder / "store.db")) as db:
        assert db.execute("SELECT COUNT(*) FROM proofs").fetchone() == (0,)
        return db.execute("SELECT round, origin, fact FROM deltas").fetchall()


def test_at_the_end_all_hold_one_model_and_no_more_was_released_than_was_paid_for(net):
    def finished(status: dict[str, Any] | None) -> bool:
        run = status["run"] if status else None
        return bool(run and run["phase"] == "finished" and run["model_round"] == ROUNDS)

    def hashes() -> set[str]:
        return {net.status(d)["run"]["model_hash"] for d in net.all}

    net.wait(lambda: all(finished(d.status()) for d in net.all), "the run ends", 150)
    net.wait(lambda: len(hashes()) == 1, "all fold the same deltas", 30)
    (common,) = hashes()
    assert not any(net.events(d, "peer.equivocated") for d in net.all)
    for daemon in net.all:
        net.federation.stop(daemon)
    for daemon in net.all:
        assert reference_hash(daemon.folder) == common, daemon.name
    facts = {fact for daemon in net.all for fact in stored(daemon)}
    per_round = Counter((round_, origin) for round_, origin, _ in facts)
    assert set(per_round.values()) == {1}  # never two deltas of one origin for one round
    for daemon in (net.north, net.south, net.brook):
        released = [fact for fact in facts if fact[1] == daemon.key.peer_id]
        with Ledger.open(daemon.folder / "ledger.db") as ledger:
            kinds = Counter(entry.kind for entry in ledger.entries())
        assert kinds["debit"] >= kinds["output"] >= len(released) > 0, daemon.name
        assert kinds["debit"] <= ROUNDS
        if daemon is net.north:
            assert kinds["debit"] >= kinds["output"] + 3  # it was killed in between three times
        if daemon is net.brook:
            assert kinds["debit"] == kinds["output"] == len(released) == THREE


def test_nothing_of_it_is_left_running(net):
    net.federation.stop_all()
    mine = str(net.folder).encode()
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert mine not in process.read_bytes()
    for daemon in net.all:
        with pytest.raises(AdminError):
            daemon.client.get("/v1/status")
