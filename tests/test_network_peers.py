"""Members on real loopback sockets, some of them in processes of their own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID

from p2pfed.errors import ConfigError, PeerUnreachable, RemoteProtocolError
from p2pfed.identity.filehash import ChunkList, file_hash
from p2pfed.network import (
    FrameReceived,
    Limits,
    PeerConnected,
    PeerDisconnected,
    open_network,
)
from p2pfed.network.framing import write_all
from p2pfed.wire.versions import gossip_protocol

pytestmark = pytest.mark.slow

LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]
QUICK = Limits(redial_first=0.05, redial_most=0.5, stall_seconds=2.0, grace_seconds=0.5)
SEEDS = {name: name.encode() * 32 for name in "abcdrs"}
IDS = {
    name: str(ID.from_pubkey(create_new_key_pair(seed).public_key)) for name, seed in SEEDS.items()
}


class Gate:
    """A roster that is a list of names, and a folder of files."""

    def __init__(self, members: str = "abcd", files: Path | None = None) -> None:
        self.members = {IDS[name] for name in members}
        self.files = files
        self.heard: list[tuple[str, bytes]] = []

    def is_member(self, peer: str) -> bool:
        return peer in self.members

    def current_roster(self) -> bytes:
        return b"roster"

    def consider_roster(self, peer: str, signed: bytes) -> bool:
        self.heard.append((peer, signed))
        return False

    def open_blob(self, peer: str, digest: bytes) -> Path | None:
        path = self.files / digest.hex() if self.files else None
        return path if path is not None and path.exists() else None


def member(name: str, gate: Gate | None = None, limits: Limits = QUICK, listen=LOOPBACK):
    return open_network(seed=SEEDS[name], listen=listen, gatekeeper=gate or Gate(), limits=limits)


async def event(network, kind, seconds: float = 10.0):
    """Return the next event, which must be of ``kind``."""
    with trio.fail_after(seconds):
        heard = await network.events.receive()
    assert isinstance(heard, kind), heard
    return heard


async def quiet(network, seconds: float) -> None:
    """Check that nothing happens for a while."""
    with trio.move_on_after(seconds):
        pytest.fail(f"unexpected {await network.events.receive()}")


@contextlib.asynccontextmanager
async def pair(left_gate=None, right_gate=None, limits: Limits = QUICK):
    async with member("a", left_gate, limits) as a, member("b", right_gate, limits) as b:
        a.keep_connected(b.peer_id, b.addresses())
        await event(a, PeerConnected)
        await event(b, PeerConnected)
        yield a, b


CHILD = """
import sys, trio
sys.path.insert(0, sys.argv[1])
from p2pfed.network import FrameReceived, Limits, open_network
class Gate:
    def is_member(self, peer): return True
    def current_roster(self): return b""
    def consider_roster(self, peer, signed): return True
    def open_blob(self, peer, digest): return None
async def main():
    async with open_network(seed=sys.argv[2].encode() * 32, listen=[sys.argv[3]],
                            gatekeeper=Gate()) as network:
        print(network.addresses()[0], flush=True)
        async for event in network.events:
            if isinstance(event, FrameReceived):
                network.send(event.peer, b"echo " + event.frame[:20])
trio.run(main)
"""


@contextlib.asynccontextmanager
async def child(name: str, listen: str = LOOPBACK[0]):
    """Run a member that echoes frames in a process of its own."""
    root = str(Path(__file__).parents[1])
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", CHILD, root, name, listen], stdout=subprocess.PIPE
    )
    try:
        with trio.fail_after(30):
            address = (await process.stdout.receive_some()).decode().strip()
        yield process, address
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        await process.stdout.aclose()


async def test_two_members_exchange_frames_both_ways():
    big = os.urandom(3 << 20)
    async with pair() as (a, b):
        assert a.send(b.peer_id, b"hello")
        assert b.send(a.peer_id, big)
        assert await event(b, FrameReceived) == FrameReceived(a.peer_id, b"hello")
        assert await event(a, FrameReceived) == FrameReceived(b.peer_id, big)
        stats = a.stats(b.peer_id)
        assert stats.direction == "outbound"
        assert stats.bytes_received > len(big)
        assert b.stats(a.peer_id).direction == "inbound"
        assert b.totals().bytes_sent > len(big)
        assert a.peer_id == IDS["a"]
        assert a.addresses()[0].endswith("/p2p/" + a.peer_id)


async def test_frames_of_one_peer_arrive_in_order():
    async with pair() as (a, b):
        for number in range(100):
            assert a.send(b.peer_id, b"%d" % number)
        got = [(await event(b, FrameReceived)).frame for _ in range(100)]
        assert got == [b"%d" % number for number in range(100)]


async def test_send_says_false_to_a_stranger_and_when_the_queue_is_full():
    limits = Limits(queue_frames=3, max_frame=100)
    async with pair(limits=limits) as (a, b):
        assert not a.send(IDS["c"], b"x")
        sent = 0
        while a.send(b.peer_id, b"x"):
            sent += 1
        assert sent == 3  # nothing ran in between
        with pytest.raises(ValueError, match="limit"):
            a.send(b.peer_id, bytes(101))


async def test_the_dialler_offers_its_roster_to_a_member():
    gate = Gate()
    async with pair(right_gate=gate) as (a, _):
        with trio.fail_after(30):
            while not gate.heard:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert gate.heard == [(a.peer_id, b"roster")]


async def test_a_member_that_is_not_on_our_roster_is_not_dialled():
    async with member("a", Gate("a")) as a, member("b") as b:
        a.keep_connected(b.peer_id, b.addresses())
        await quiet(a, 0.5)
        await quiet(b, 0.1)
        assert b.totals().refused == 0


async def test_simultaneous_dials_make_one_connection_in_the_nodes_eyes():
    for _ in range(5):
        async with member("a") as a, member("b") as b:
            a.keep_connected(b.peer_id, b.addresses())
            b.keep_connected(a.peer_id, a.addresses())
            await event(a, PeerConnected)
            await event(b, PeerConnected)
            for number in range(20):
                assert a.send(b.peer_id, b"a%d" % number)
                assert b.send(a.peer_id, b"b%d" % number)
                await trio.sleep(0.02)
            # A change of links may repeat a frame; none is lost and no other event occurs.
            for network, mark in ((a, b"b"), (b, b"a")):
                wanted = {mark + b"%d" % number for number in range(20)}
                while wanted:
                    wanted.discard((await event(network, FrameReceived, 3)).frame)
            await trio.sleep(1.0)
            assert a.stats(b.peer_id).direction != b.stats(a.peer_id).direction
            for network in (a, b):
                while True:
                    try:
                        assert isinstance(network.events.receive_nowait(), FrameReceived)
                    except trio.WouldBlock:
                        break


async def test_a_revoked_member_is_disconnected_by_recheck():
    gate = Gate()
    async with pair(left_gate=gate) as (a, b):
        gate.members.discard(b.peer_id)
        await a.recheck()
        assert await event(a, PeerDisconnected, 2) == PeerDisconnected(b.peer_id)
        await event(b, PeerDisconnected, 2)
        await quiet(a, 1.0)


async def test_disconnect_is_followed_by_a_new_dial_unless_dialling_was_stopped():
    async with pair() as (a, b):
        await a.disconnect(b.peer_id)
        await event(a, PeerDisconnected)
        await event(a, PeerConnected)
        a.stop_dialling(b.peer_id)
        assert a.stats(b.peer_id).direction == "outbound"
        await a.disconnect(b.peer_id)
        await event(a, PeerDisconnected)
        await quiet(a, 1.0)


async def test_a_killed_peer_is_noticed_at_once_and_reached_again_after_its_restart():
    async with member("a", limits=Limits()) as a:
        async with child("b") as (process, address):
            listen = address.partition("/p2p/")[0]
            a.keep_connected(IDS["b"], [address])
            await event(a, PeerConnected)
            assert a.send(IDS["b"], b"one")
            assert (await event(a, FrameReceived)).frame == b"echo one"
            process.send_signal(signal.SIGKILL)
            await event(a, PeerDisconnected, 2)
        assert not a.send(IDS["b"], b"nobody")
        await trio.sleep(2)
        async with child("b", listen):
            await event(a, PeerConnected, 6)
            assert a.send(IDS["b"], b"two")
            assert (await event(a, FrameReceived)).frame == b"echo two"


async def test_a_peer_that_was_down_when_first_dialled_is_reached_soon_after_it_starts():
    with trio.socket.socket() as reserved:
        await reserved.bind(("127.0.0.1", 0))
        listen = f"/ip4/127.0.0.1/tcp/{reserved.getsockname()[1]}"
    async with member("a", limits=Limits()) as a:
        a.keep_connected(IDS["b"], [listen])
        await trio.sleep(4)  # several failures, back-off near its most
        async with member("b", listen=[listen]):
            await event(a, PeerConnected, 6)


async def test_a_frozen_peer_blocks_neither_send_nor_disconnect():
    limits = Limits(queue_bytes=8 << 20, close_seconds=2.0)
    async with member("a", limits=limits) as a, child("b") as (process, address):
        a.keep_connected(IDS["b"], [address])
        await event(a, PeerConnected)
        process.send_signal(signal.SIGSTOP)
        with trio.fail_after(30):  # the socket fills, then the queue; nothing waits
            sent = 0
            while a.send(IDS["b"], bytes(1 << 20)):
                sent += 1
            await trio.sleep(0.5)
        assert sent == 8
        a.stop_dialling(IDS["b"])
        with trio.fail_after(30):
            await a.disconnect(IDS["b"])
        await event(a, PeerDisconnected, 1)
        process.send_signal(signal.SIGCONT)


async def test_a_frozen_peer_is_disconnected_when_it_is_silent_for_too_long():
    limits = Limits(idle_seconds=2.0)
    async with member("a", limits=limits) as a, child("b") as (process, address):
        a.keep_connected(IDS["b"], [address])
        await event(a, PeerConnected)
        process.send_signal(signal.SIGSTOP)
        await event(a, PeerDisconnected, 4)
        process.send_signal(signal.SIGCONT)


async def test_a_fetch_from_a_peer_that_is_cut_off_ends_at_once(tmp_path):
    patient = Limits(redial_first=0.05)  # would wait 30 s for a silent peer
    async with pair(right_gate=Gate(files=tmp_path), limits=patient) as (a, b):
        body = os.urandom(64 << 20)
        digest = file_hash(body)
        (tmp_path / digest.hex()).write_bytes(body)

        async def cut() -> None:
            with trio.fail_after(30):
                while a.stats(b.peer_id).bytes_received < 4 << 20:  # noqa: ASYNC110
                    await trio.sleep(0.001)
            await a.disconnect(b.peer_id)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut)
            with trio.fail_after(15), pytest.raises(PeerUnreachable):
                await a.fetch(b.peer_id, digest, tmp_path / "got", max_bytes=1 << 30)
        (kept,) = tmp_path.glob(".got*.part")
        held = kept.stat().st_size
        assert held >= 1 << 20
        await event(a, PeerDisconnected)
        await event(a, PeerConnected)
        before = a.stats(b.peer_id).bytes_received
        with trio.fail_after(60):
            await a.fetch(b.peer_id, digest, tmp_path / "got", max_bytes=1 << 30)
        assert (tmp_path / "got").read_bytes() == body
        assert a.stats(b.peer_id).bytes_received - before < len(body) * 1.01 - held


async def test_a_file_with_wrong_content_is_refused_and_its_sender_disconnected(tmp_path):
    async with pair(right_gate=Gate(files=tmp_path)) as (a, b):
        digest = file_hash(b"asked")
        (tmp_path / digest.hex()).write_bytes(b"given")
        right = ChunkList(5, digest)
        b._serving._blobs._lists[digest] = right  # the liar claims the right list
        with pytest.raises(RemoteProtocolError):
            await a.fetch(b.peer_id, digest, tmp_path / "got", max_bytes=1 << 20)
        assert not (tmp_path / "got").exists()
        await event(a, PeerDisconnected)
        assert a.stats(b.peer_id).breaches == 1


async def test_a_cancelled_fetch_leaves_the_connection_whole(tmp_path):
    async with pair(right_gate=Gate(files=tmp_path)) as (a, b):
        body = os.urandom(32 << 20)
        digest = file_hash(body)
        (tmp_path / digest.hex()).write_bytes(body)
        for number in range(10):
            with trio.move_on_after(0.03):
                await a.fetch(b.peer_id, digest, tmp_path / "got", max_bytes=1 << 30)
            assert a.send(b.peer_id, b"%d" % number)
            assert (await event(b, FrameReceived)).frame == b"%d" % number


async def test_a_file_nobody_holds_and_a_peer_that_is_not_there_are_unreachable(tmp_path):
    async with pair() as (a, b):
        with pytest.raises(PeerUnreachable, match="hold"):
            await a.fetch(b.peer_id, bytes(32), tmp_path / "got", max_bytes=1)
        with pytest.raises(PeerUnreachable, match="not connected"):
            await a.fetch(IDS["c"], bytes(32), tmp_path / "got", max_bytes=1)


@pytest.mark.parametrize("forgery", ["over the limit", "wrong digest", "wrong magic", "truncated"])
async def test_a_member_that_breaks_framing_is_disconnected_and_the_node_lives(forgery):
    frame = b"PF01\0\0\0\5hello" + hashlib.blake2b(b"hello", digest_size=32).digest()
    bad = {
        "over the limit": b"PF01\xff\xff\xff\xff",
        "wrong digest": frame[:-1] + b"!",
        "wrong magic": b"GET / HTTP/1.1\r\n\r\n",
        "truncated": frame[:-5],
    }[forgery]
    async with pair() as (a, b):
        (link,) = a._sessions[b.peer_id].links
        stream = await link.open(gossip_protocol(1))
        await write_all(stream, bad, stall=1)
        if forgery == "truncated":
            link.spawn(lambda: stream.finish(5))
        await event(b, PeerDisconnected, 3)
        await event(b, PeerConnected, 5)  # a dials again, and b still serves
        assert b.stats(a.peer_id).breaches == (forgery != "truncated")
        await event(a, PeerDisconnected)
        await event(a, PeerConnected)
        assert a.send(b.peer_id, b"still there")
        assert (await event(b, FrameReceived)).frame == b"still there"


async def test_what_waits_for_a_slow_node_is_bounded_by_bytes():
    limits = Limits()
    assert limits.events * limits.max_frame <= 128 << 20
    async with pair() as (a, b):
        for _ in range(100):
            assert a.send(b.peer_id, bytes(1000))
        await trio.sleep(0.2)
        assert b.events.statistics().current_buffer_used <= limits.events


async def test_a_node_that_reads_no_events_holds_back_its_peer_and_no_other():
    # The stock muxer gives a sender up after 5 s without credit; this ends before that.
    limits = Limits(events=4, queue_bytes=64 << 20)
    async with member("b") as b, member("c") as c, member("a", limits=limits) as a:
        for other in (b, c):
            other.keep_connected(a.peer_id, a.addresses())
            await event(other, PeerConnected)
        sent = 0
        for _ in range(32):
            sent += b.send(a.peer_id, os.urandom(1 << 20))
        await trio.sleep(1.5)
        held = a.stats(b.peer_id).bytes_received
        assert held < 30 << 20
        assert c.send(a.peer_id, b"small")
        frames = [a.events.receive_nowait() for _ in range(1)]
        assert isinstance(frames[0], PeerConnected)
        seen = set()
        with trio.fail_after(20):
            while len(seen) < sent + 1:
                got = await a.events.receive()
                if isinstance(got, FrameReceived):
                    seen.add(got.frame)
        assert b"small" in seen


@pytest.mark.parametrize(
    "address", ["", "nonsense", "/ip4/127.0.0.1/udp/1", "/ip4/127.0.0.1", "/ip4/1.2.3.4/tcp/1/ws"]
)
async def test_an_unusable_listening_address_is_a_config_error(address):
    with pytest.raises(ExceptionGroup) as caught:
        async with member("a", listen=[address]):
            pass
    assert caught.group_contains(ConfigError, match="not a usable address")


async def test_a_taken_port_is_a_config_error():
    async with member("a") as a:
        taken = a.addresses()[0].partition("/p2p/")[0]
        with pytest.raises(ExceptionGroup) as caught:
            async with member("b", listen=[taken]):
                pass
        assert caught.group_contains(ConfigError, match="cannot listen")


async def test_unusable_addresses_of_a_peer_are_skipped():
    async with member("a") as a, member("b") as b:
        wrong = [b.addresses()[0].replace(b.peer_id, IDS["c"]), "/x", "/dns4/no.invalid/tcp/1"]
        a.keep_connected(b.peer_id, [*wrong, *b.addresses()])
        await event(a, PeerConnected)


async def test_somebody_else_at_a_peers_address_is_not_taken_for_it():
    async with member("a") as a, member("c") as c:
        a.keep_connected(IDS["b"], [c.addresses()[0].partition("/p2p/")[0]])
        await quiet(a, 1.0)


async def test_new_addresses_are_dialled_at_once():
    async with member("a", limits=Limits(redial_first=30, redial_most=30)) as a, member("b") as b:
        a.keep_connected(b.peer_id, ["/ip4/127.0.0.1/tcp/1"])
        await trio.sleep(0.3)
        a.keep_connected(b.peer_id, b.addresses())
        await event(a, PeerConnected, 3)


async def test_announced_addresses_come_first():
    async with open_network(
        seed=SEEDS["a"], listen=LOOPBACK, gatekeeper=Gate(), announce=["/dns4/h.example/tcp/4001"]
    ) as a:
        assert a.addresses()[0] == f"/dns4/h.example/tcp/4001/p2p/{IDS['a']}"
        assert len(a.addresses()) == 2


def test_a_seed_of_the_wrong_length_is_the_callers_bug():
    async def run() -> None:
        async with open_network(seed=b"short", listen=[], gatekeeper=Gate()):
            pass

    with pytest.raises(ValueError, match="32"):
        trio.run(run)


def test_only_one_socket_listens(tmp_path):
    script = (
        "import sys, json, os, trio; sys.path.insert(0, sys.argv[1])\n"
        "from p2pfed.network import open_network\n"
        "async def main():\n"
        "    async with open_network(seed=bytes(range(32)), listen=['/ip4/127.0.0.1/tcp/0'],\n"
        "                            gatekeeper=None):\n"
        "        await trio.sleep(0.2)\n"
        "        fds = [os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')\n"
        "               if os.path.exists(f'/proc/self/fd/{n}')]\n"
        "        mine = {f[8:-1] for f in fds if f.startswith('socket:')}\n"
        "        rows = [l.split() for k in ('tcp', 'tcp6', 'udp', 'udp6')\n"
        "                for l in open(f'/proc/self/net/{k}').readlines()[1:]]\n"
        "        print(json.dumps([r[3] for r in rows if r[9] in mine]))\n"
        "trio.run(main)\n"
    )
    root = str(Path(__file__).parents[1])
    out = subprocess.run(
        [sys.executable, "-c", script, root], capture_output=True, check=True, timeout=60
    )
    assert json.loads(out.stdout) == ["0A"]  # one TCP socket, listening
