"""Independent clients: a js-libp2p node and a stock py-libp2p host as members among ours.

Both are child processes that obey the same few commands (`interop/node.mjs`, `interop/stock.py`).
The JavaScript side has formats and hashes of its own (`interop/wire.mjs`); its packages are pinned
in `interop/package-lock.json` and installed once, beside the Python packages that run the tests.
Without Node 20 or a package registry its half is skipped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

import p2pfed
from p2pfed.identity.filehash import file_hash
from p2pfed.network import FrameReceived, PeerConnected, open_network
from p2pfed.network.identify import IDENTIFY
from p2pfed.network.ping import PING, ping

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

SOURCES = Path(__file__).parent / "interop"
LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]
INSTALL_SECONDS = 300
FILE_BYTES = 64 << 20


# -- the clients -------------------------------------------------------------------------------


def installed_packages() -> Path:
    """A folder `node_modules` with the pinned packages; made once, skips where it cannot be."""
    lock = (SOURCES / "package-lock.json").read_bytes()
    folder = Path(sys.prefix) / "interop" / hashlib.sha256(lock).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as waiting:  # other workers want the same folder
            fcntl.flock(waiting, fcntl.LOCK_EX)
            if not (folder / "done").exists():
                for name in ("package.json", "package-lock.json"):
                    shutil.copy(SOURCES / name, folder)
                subprocess.run(
                    ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
                    cwd=folder,
                    check=True,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    timeout=INSTALL_SECONDS,
                )
                (folder / "done").touch()
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm ci was not done after {INSTALL_SECONDS} s")
    except subprocess.CalledProcessError as failed:
        pytest.skip(f"npm ci failed: {failed.stderr[-300:]}")
    except OSError as failed:
        pytest.skip(f"the packages cannot be installed in {folder}: {failed}")
    return folder / "node_modules"


@pytest.fixture(scope="session")
def js_member(tmp_path_factory) -> list[str]:
    """The command that starts a js-libp2p member."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("there is no node and npm on this machine")
    version = subprocess.run(["node", "--version"], check=True, capture_output=True, text=True)
    if int(version.stdout.lstrip("v").partition(".")[0]) < 20:
        pytest.skip(f"node {version.stdout.strip()} is older than 20")
    # Modules are looked for beside the importing file, so the sources go where the packages are.
    folder = tmp_path_factory.mktemp("interop")
    (folder / "node_modules").symlink_to(installed_packages())
    for source in SOURCES.glob("*.mjs"):
        shutil.copy(source, folder)
    return ["node", "--import", str(folder / "poly.mjs"), str(folder / "node.mjs")]


@pytest.fixture(params=["js-libp2p", "py-libp2p"])
def member(request) -> list[str]:
    if request.param == "js-libp2p":
        return request.getfixturevalue("js_member")
    return [sys.executable, str(SOURCES / "stock.py")]


class Client:
    """A started client: its id and address, and the way to tell it what to do."""

    def __init__(self, process: trio.Process) -> None:
        self.peer = self.address = ""
        self._process = process
        self._held = bytearray()

    async def ask(self, command: str, **what):
        """Give a command and return what came of it."""
        answer = await self.attempt(command, **what)
        assert "done" in answer, f"{command}: {answer}"
        return answer["done"]

    async def attempt(self, command: str, **what) -> dict:
        """Give a command that may fail."""
        line = json.dumps({"command": command, **what}) + "\n"
        await self._process.stdin.send_all(line.encode())
        return await self.answer()

    async def answer(self) -> dict:
        """The next line it prints."""
        while b"\n" not in self._held:
            piece = await self._process.stdout.receive_some()
            assert piece, "the client died; what it said is on standard error above"
            self._held += piece
        line, _, rest = self._held.partition(b"\n")
        self._held = rest
        return json.loads(line)


@asynccontextmanager
async def started(command: list[str]):
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "LC_ALL": "C"}
    )
    try:
        client = Client(process)
        with trio.fail_after(60):
            hello = await client.answer()
        client.peer, client.address = hello["peer"], hello["address"]
        yield client
    finally:
        with trio.CancelScope(shield=True):
            await process.stdin.aclose()  # its sign to end
            with trio.move_on_after(5):
                await process.wait()
            process.kill()
            await process.wait()
            await process.stdout.aclose()


# -- the meeting -------------------------------------------------------------------------------


class Gate:
    """Everybody named is a member; files by their names."""

    def __init__(self) -> None:
        self.members: set[str] = set()
        self.files: dict[bytes, Path] = {}

    def is_member(self, peer: str) -> bool:
        return peer in self.members

    def current_roster(self) -> bytes:
        return b""

    def consider_roster(self, peer: str, signed: bytes) -> bool:
        return False

    def open_blob(self, peer: str, digest: bytes) -> Path | None:
        return self.files.get(digest)


@asynccontextmanager
async def meeting(command: list[str], dialler: str, gate: Gate | None = None):
    """Our network and a client, connected by the one who dials; ends with an error in 200 s."""
    gate = gate or Gate()
    with trio.fail_after(200):
        async with (
            started(command) as them,
            open_network(seed=b"i" * 32, listen=LOOPBACK, gatekeeper=gate) as us,
        ):
            gate.members = {us.peer_id, them.peer}
            if dialler == "we dial":
                us.keep_connected(them.peer, [them.address])
            else:
                assert await them.ask("dial", address=us.addresses()[0]) == us.peer_id
            assert await us.events.receive() == PeerConnected(them.peer)
            yield us, them


@pytest.fixture(params=["we dial", "they dial"])
def dialler(request) -> str:
    return request.param


async def test_a_client_identifies_us_and_learns_what_members_know(member, dialler):
    async with meeting(member, dialler) as (us, them):
        told = await them.ask("identify", peer=us.peer_id)
    assert told["agent"] == f"p2pfed/{p2pfed.__version__}"
    assert told["peer"] == us.peer_id
    assert told["listen"] == [address.partition("/p2p/")[0] for address in us.addresses()]
    assert told["observed"].startswith("/ip4/127.0.0.1/tcp/")
    assert {IDENTIFY, PING, "/p2pfed/gossip/1", "/p2pfed/blob/1"} <= set(told["protocols"])


async def test_pings_pass_both_ways(member, dialler):
    async with meeting(member, dialler) as (us, them):
        for _ in range(3):
            assert 0 <= await them.ask("ping", peer=us.peer_id) < 5
        stream = await us._sessions[them.peer].link.open(PING)
        for _ in range(3):
            assert 0 < await ping(stream, stall=5) < 5
        await stream.finish(1)
        assert us.stats(them.peer).breaches == 0


async def test_frames_pass_both_ways(member, dialler):
    async with meeting(member, dialler) as (us, them):
        for size in (0, 1, 1000, 1 << 20):
            frame = os.urandom(size)
            await them.ask("send", peer=us.peer_id, payload=frame.hex())
            assert await us.events.receive() == FrameReceived(them.peer, frame)
            assert us.send(them.peer, frame)
            assert bytes.fromhex(await them.ask("hear")) == frame
        assert us.stats(them.peer).breaches == 0


async def test_a_file_of_64_mib_arrives_whole_both_ways(member, dialler, tmp_path):
    gate = Gate()
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    body = os.urandom(FILE_BYTES)
    ours.write_bytes(body)
    gate.files[file_hash(body)] = ours
    async with meeting(member, dialler, gate) as (us, them):
        got = await them.ask("fetch", peer=us.peer_id, name=file_hash(body).hex())
        assert got == {"bytes": FILE_BYTES, "sha256": hashlib.sha256(body).hexdigest()}
        offered = await them.ask("offer", bytes=FILE_BYTES)
        name = bytes.fromhex(offered["name"])
        await us.fetch(them.peer, name, theirs, max_bytes=FILE_BYTES)
        assert us.stats(them.peer).breaches == 0
    body = theirs.read_bytes()
    assert hashlib.sha256(body).hexdigest() == offered["sha256"]
    assert file_hash(body) == name
    for path in (ours, theirs):
        path.unlink()  # pytest keeps the folders of several runs


@pytest.mark.parametrize("command", ["identify", "ping"])
async def test_a_client_that_is_no_member_is_told_nothing_until_it_is_one(member, command):
    gate = Gate()
    with trio.fail_after(100):
        async with (
            started(member) as them,
            open_network(seed=b"i" * 32, listen=LOOPBACK, gatekeeper=gate) as us,
        ):
            await them.attempt("dial", address=us.addresses()[0])
            answer = await them.attempt(command, peer=us.peer_id)
            assert "failed" in answer, answer
            while us.totals().refused == 0:  # noqa: ASYNC110
                await trio.sleep(0.05)
            gate.members = {us.peer_id, them.peer}
            us.keep_connected(them.peer, [them.address])
            assert await us.events.receive() == PeerConnected(them.peer)
            await them.ask(command, peer=us.peer_id)


def test_the_pinned_packages_name_no_registry():
    lock = json.loads((SOURCES / "package-lock.json").read_text())
    packages = {name: one for name, one in lock["packages"].items() if name}
    assert packages
    assert all("integrity" in one and "resolved" not in one for one in packages.values())
