"""Strangers, garbage and silence at the door, on real loopback sockets."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import struct

import pytest
import trio
from fair_clock import FairClock
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.security.tls.transport import PROTOCOL_ID as TLS
from libp2p.security.tls.transport import TLSTransport
from libp2p.stream_muxer.mplex.mplex import MPLEX_PROTOCOL_ID, Mplex
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from p2pfed.network import FrameReceived, Limits, PeerConnected, open_network
from p2pfed.network.multistream import propose

pytestmark = pytest.mark.slow

LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]
SEEDS = {name: name.encode() * 32 for name in "abx"}
IDS = {
    name: str(ID.from_pubkey(create_new_key_pair(seed).public_key)) for name, seed in SEEDS.items()
}
PROTOCOLS = [
    "/ipfs/id/1.0.0",
    "/ipfs/id/push/1.0.0",
    "/ipfs/ping/1.0.0",
    "/p2pfed/gossip/1",
    "/p2pfed/blob/1",
    "/p2pfed/roster/1",
    "ls",
]


class Gate:
    """Knows a and b; a roster that reads ``list X`` lists X too."""

    def __init__(self, members: str = "ab", offer: bytes = b"") -> None:
        self.members = {IDS[name] for name in members}
        self.offer = offer
        self.heard: list[bytes] = []
        self.asked_for_blobs = 0

    def is_member(self, peer: str) -> bool:
        return peer in self.members

    def current_roster(self) -> bytes:
        return self.offer

    def consider_roster(self, peer: str, signed: bytes) -> bool:
        self.heard.append(signed)
        word, _, name = signed.decode("utf-8", errors="replace").partition(" ")
        if word == "list":
            self.members.add(name)
        return peer in self.members

    def open_blob(self, peer: str, digest: bytes) -> None:
        self.asked_for_blobs += 1


def node(name: str, gate: Gate | None = None, limits: Limits | None = None):
    return open_network(seed=SEEDS[name], listen=LOOPBACK, gatekeeper=gate or Gate(), limits=limits)


def port_of(network) -> int:
    return int(network.addresses()[0].split("/")[4])


async def serves_a_member(a, seconds: float = 2.0) -> None:
    """Check that member b is let in and heard within ``seconds``."""
    async with node("b") as b:
        clock = FairClock()
        with trio.fail_after(30):
            b.keep_connected(a.peer_id, a.addresses())
            assert isinstance(await b.events.receive(), PeerConnected)
            assert b.send(a.peer_id, b"served?")
            assert await a.events.receive() == PeerConnected(b.peer_id)
            assert await a.events.receive() == FrameReceived(b.peer_id, b"served?")
        assert clock.within(seconds)


@pytest.fixture
def stranger_data(monkeypatch):
    """Count every byte of every stream that a stock yamux receives."""
    counted = []
    stock = Yamux._read_data_body

    async def counting(self, length):
        if type(self) is Yamux:
            counted.append(length)
        return await stock(self, length)

    monkeypatch.setattr(Yamux, "_read_data_body", counting)
    return counted


async def test_the_byte_counter_counts_what_a_stock_host_sends(stranger_data):
    async with stock() as one, stock() as two:
        await one.connect(PeerInfo(two.get_id(), two.get_transport_addrs()))
        await one.new_stream(two.get_id(), ["/ipfs/ping/1.0.0"])
    assert sum(stranger_data) > 0


async def listen_for_ever(stream) -> None:
    await trio.sleep_forever()


@contextlib.asynccontextmanager
async def stock(**options):
    """Run a stock libp2p host with its default handlers."""
    options.setdefault("key_pair", create_new_key_pair(os.urandom(32)))
    host = new_host(**options)
    async with host.run(listen_addrs=[Multiaddr(LOOPBACK[0])]):
        yield host
    # The stock host forgets the sockets of failed handshakes, and of connections that we ended.
    for forgotten in [each for each in gc.get_objects() if type(each) is TrioTCPStream]:
        forgotten.stream.socket.close()


async def connect(host, network) -> None:
    where = Multiaddr(network.addresses()[0].partition("/p2p/")[0])
    await host.connect(PeerInfo(ID.from_base58(network.peer_id), [where]))


async def test_a_stock_host_as_a_stranger_gets_no_byte_of_any_protocol(stranger_data):
    gate = Gate()
    async with node("a", gate, Limits(stranger_seconds=0.8)) as a:
        for protocol in PROTOCOLS:
            async with stock() as host:
                with contextlib.suppress(Exception):
                    await connect(host, a)
                clock = FairClock()
                with trio.move_on_after(6), contextlib.suppress(Exception):
                    await host.new_stream(ID.from_base58(a.peer_id), [protocol])
                    pytest.fail(f"{protocol} was opened")
                while host.get_network().connections:
                    await trio.sleep(0.02)
                    assert clock.within(1.5)
        await serves_a_member(a)
    assert sum(stranger_data) == 0
    assert gate.heard == []
    assert gate.asked_for_blobs == 0


async def test_a_stock_host_that_is_a_member_may_open_our_protocols_and_no_others(stranger_data):
    gate = Gate("abx")
    async with node("a", gate) as a, stock(key_pair=create_new_key_pair(SEEDS["x"])) as host:
        host.set_stream_handler("/p2pfed/gossip/1", listen_for_ever)
        await connect(host, a)
        assert await a.events.receive() == PeerConnected(IDS["x"])
        peer = ID.from_base58(a.peer_id)
        stream = await host.new_stream(peer, ["/p2pfed/blob/1"])
        await stream.write(b"PFB2" + bytes(41))
        assert await stream.read(8) == b"\xff" * 8
        assert gate.asked_for_blobs == 1
        with pytest.raises(Exception, match="failed to open a stream"):
            await host.new_stream(peer, ["/ipfs/kad/1.0.0"])
    assert sum(stranger_data) > 0


@contextlib.asynccontextmanager
async def stranger(a, name: str = "x", *, muxed: bool = True):
    """Speak TCP, Noise and (unless told not to) agree on yamux; nothing more."""
    keys = create_new_key_pair(SEEDS[name])
    async with await trio.open_tcp_stream("127.0.0.1", port_of(a)) as tcp:
        raw = RawConnection(TrioTCPStream(tcp), True)
        await propose(raw, "/noise", stall=2)
        noise = NoiseTransport(keys, noise_privkey=create_x25519_key_pair().private_key)
        secure = await noise.secure_outbound(raw, ID.from_base58(a.peer_id))
        if muxed:
            await propose(secure, "/yamux/1.0.0", stall=2)
        yield secure


async def data_until_the_end(secure) -> int:
    """Count the stream bytes received until the other side closes, which it must."""
    data = 0
    with trio.fail_after(30), contextlib.suppress(Exception):
        while True:
            _, kind, _, _, length = struct.unpack("!BBHII", await secure.read(12))
            if kind == 0:
                data += length
                await secure.read(length)
    return data


def yamux(kind: int, flags: int, stream: int, body: bytes = b"", length: int | None = None):
    size = len(body) if length is None else length
    return struct.pack("!BBHII", 0, kind, flags, stream, size) + body


def opening(protocol: str, body: bytes = b"") -> bytes:
    lines = b"".join(
        bytes([len(text) + 1]) + text.encode() + b"\n" for text in ("/multistream/1.0.0", protocol)
    )
    return lines + body


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_stranger_speaking_noise_and_raw_yamux_gets_no_stream_byte(protocol):
    async with node("a") as a, stranger(a) as secure:
        streams = [yamux(1, 1, 1) + yamux(0, 0, 1, opening(protocol, b"\x03ls\n"))]
        streams += [
            yamux(1, 1, other) + yamux(0, 0, other, opening("/p2pfed/blob/1"))
            for other in range(3, 13, 2)
        ]
        await secure.write(b"".join(streams))
        assert await data_until_the_end(secure) == 0
        assert a.totals().refused == 1
        await serves_a_member(a)


async def test_a_stranger_that_says_nothing_after_noise_is_closed_within_three_seconds():
    async with node("a") as a, stranger(a, muxed=False) as secure:
        clock = FairClock()
        await data_until_the_end(secure)
        assert clock.within(3.5)


async def test_a_stranger_that_opens_no_stream_is_closed_within_three_seconds():
    async with node("a") as a, stranger(a) as secure:
        clock = FairClock()
        assert await data_until_the_end(secure) == 0
        assert clock.within(3.5)


async def test_a_stranger_that_sends_more_than_it_may_is_closed_at_once():
    async with node("a") as a, stranger(a) as secure:
        clock = FairClock()
        with contextlib.suppress(Exception):
            half = opening("/p2pfed/roster/1", b"PF01" + struct.pack("!I", 60_000))
            await secure.write(yamux(1, 1, 1) + yamux(0, 0, 1, half) + yamux(1, 1, 3))
            for _ in range(40):
                await secure.write(yamux(0, 0, 3, bytes(60_000)))
        await data_until_the_end(secure)
        assert clock.within(2)
        await serves_a_member(a)


async def test_a_roster_longer_than_the_limit_is_refused_before_it_is_read():
    gate = Gate()
    async with node("a", gate) as a, stranger(a) as secure:
        head = b"PF01" + struct.pack("!I", Limits().max_roster + 1)
        clock = FairClock()
        await secure.write(yamux(1, 1, 1) + yamux(0, 0, 1, opening("/p2pfed/roster/1", head)))
        assert await data_until_the_end(secure) == 0
        assert clock.within(1)
        assert gate.heard == []


async def test_a_stranger_with_a_newer_roster_is_admitted():
    gate = Gate("a")
    async with node("a", gate) as a, node("b", Gate("ab", b"list " + IDS["b"].encode())) as b:
        b.keep_connected(a.peer_id, a.addresses())
        with trio.fail_after(30):
            assert await a.events.receive() == PeerConnected(b.peer_id)
            assert await b.events.receive() == PeerConnected(a.peer_id)
            assert b.send(a.peer_id, b"in")
            assert await a.events.receive() == FrameReceived(b.peer_id, b"in")
            assert a.send(b.peer_id, b"too")
            assert await b.events.receive() == FrameReceived(a.peer_id, b"too")
        assert len(gate.heard) == 1


@pytest.mark.parametrize("offer", [b"list somebody else", os.urandom(60_000), b""])
async def test_a_stranger_whose_roster_does_not_list_it_is_closed_and_never_connected(offer):
    limits = Limits(redial_first=30, redial_most=30)
    door = Limits(stranger_seconds=0.8)
    async with node("a", Gate("a"), door) as a, node("b", Gate("ab", offer), limits) as b:
        b.keep_connected(a.peer_id, a.addresses())
        with trio.move_on_after(1.2):
            pytest.fail(f"unexpected {await b.events.receive()}")
        assert a.totals().refused == 1
        assert b._sessions[a.peer_id].links == set()
        with pytest.raises(trio.WouldBlock):
            a.events.receive_nowait()


async def test_a_gatekeeper_that_fails_admits_nobody_and_the_node_lives():
    class Broken(Gate):
        def consider_roster(self, peer: str, signed: bytes) -> bool:
            raise RuntimeError("a bug in the roster room")

    limits = Limits(redial_first=30, redial_most=30)
    async with node("a", Broken("a")) as a, node("b", Gate("ab", b"list me"), limits) as b:
        b.keep_connected(a.peer_id, a.addresses())
        with trio.move_on_after(1):
            pytest.fail(f"unexpected {await b.events.receive()}")
        assert b._sessions[a.peer_id].links == set()


@pytest.mark.parametrize("kind", ["plaintext", "tls", "mplex"])
async def test_only_noise_and_yamux_are_spoken(kind):
    keys = create_new_key_pair(SEEDS["b"])  # even a member's
    options = {
        "plaintext": {"sec_opt": {PLAINTEXT_PROTOCOL_ID: InsecureTransport(keys)}},
        "tls": {"sec_opt": {TLS: TLSTransport(keys)}},
        "mplex": {"muxer_opt": {MPLEX_PROTOCOL_ID: Mplex}},
    }[kind]
    async with node("a") as a, stock(key_pair=keys, **options) as host:
        with trio.fail_after(20), pytest.raises(Exception, match="unable to connect"):
            await connect(host, a)
        assert not host.get_network().connections


GARBAGE = {
    "nothing": b"",
    "zeros": bytes(4096),
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "tls": bytes.fromhex("16030100c8010000c40303") + bytes(200),
    "ssh": b"SSH-2.0-OpenSSH_9.6\r\n",
    "random": os.urandom(100_000),
    "endless length": b"\xff" * 64,
    "header only": b"\x13/multistream/1.0.0\n",
    "plaintext": b"\x13/multistream/1.0.0\n\x11/plaintext/2.0.0\n",
    "noise, then junk": b"\x13/multistream/1.0.0\n\x07/noise\n\xff\xff" + os.urandom(65535),
    "noise, empty message": b"\x13/multistream/1.0.0\n\x07/noise\n\0\0\0\0",
    "noise, small key": b"\x13/multistream/1.0.0\n\x07/noise\n\0\x20" + bytes(32) + b"\0\x10" * 99,
    "half a line": b"\x13/multistr",
    "not utf-8": b"\x05\xff\xfe\xfd\xfc\n",
    "guesses": b"\x13/multistream/1.0.0\n" + b"\x03ls\n" * 500,
}


async def test_garbage_and_silence_on_the_port_leave_the_node_serving_members():
    async with node("a") as a, contextlib.AsyncExitStack() as open_sockets:
        for body in GARBAGE.values():
            for ends in (True, False):
                tcp = await trio.open_tcp_stream("127.0.0.1", port_of(a))
                await open_sockets.enter_async_context(tcp)
                with contextlib.suppress(trio.BrokenResourceError):
                    await tcp.send_all(body)
                    if ends:
                        await tcp.aclose()
        await serves_a_member(a)
        with trio.fail_after(30):
            while a.totals().refused < 2 * len(GARBAGE):  # noqa: ASYNC110
                await trio.sleep(0.05)


async def test_yamux_garbage_from_an_admitted_member_ends_its_link_and_nothing_else():
    frames = {
        "unknown version": b"\x07" * 12,
        "random": os.urandom(4096),
        "huge frame": yamux(0, 0, 1, length=0xFFFFFFFF),
        "window overflow": yamux(1, 1, 1) + yamux(1, 0, 1, length=0xFFFFFFFF) * 9,
        "go away": yamux(3, 0, 0),
        "same stream twice": yamux(1, 1, 1) * 50,
        "many streams": b"".join(yamux(1, 1, number) for number in range(1, 999, 2)),
        "our parity": yamux(1, 1, 2) + yamux(0, 0, 2, os.urandom(999)),
    }
    async with node("a", Gate("abx")) as a:
        for body in frames.values():
            async with stranger(a) as secure:
                with contextlib.suppress(Exception):
                    await secure.write(body)
                    await secure.write(body)
                with trio.move_on_after(0.2), contextlib.suppress(Exception):
                    while True:
                        await secure.read(12)
        await trio.sleep(0.2)
        assert a.totals().connected == 0
        await serves_a_member(a)


async def test_a_member_that_ignores_flow_control_is_cut_before_it_fills_the_memory():
    frame = b"PF01\0\0\0\5hello" + hashlib.blake2b(b"hello", digest_size=32).digest()
    async with node("a", Gate("abx")) as a, stranger(a) as secure:
        # This member never answers our gossip stream, so its first frame is not handed out, and
        # what follows on the stream is not read.
        await secure.write(yamux(1, 1, 1) + yamux(0, 0, 1, opening("/p2pfed/gossip/1", frame)))
        sent = 0
        with trio.fail_after(30), contextlib.suppress(ConnectionClosedError):
            while True:
                await secure.write(yamux(0, 0, 1, bytes(60_000)))
                sent += 60_000
        assert a.stats(IDS["x"]).bytes_received < 1 << 20
        assert a.stats(IDS["x"]).breaches == 1
        assert sent >= 240_000  # one window
        await serves_a_member(a)


async def test_silent_sockets_are_closed_and_a_member_is_served_among_hundreds():
    async with node("a") as a:
        silent = [await trio.open_tcp_stream("127.0.0.1", port_of(a)) for _ in range(400)]
        await serves_a_member(a, 2.0)
        assert len(a._host._half_open) <= Limits().half_open
        clock = FairClock()
        for number, tcp in enumerate(silent):
            with trio.fail_after(30), contextlib.suppress(trio.BrokenResourceError):
                while await tcp.receive_some():
                    pass
            await tcp.aclose()
            if number == 300:  # they made room long before their three seconds were over
                assert clock.within(1)
        assert clock.within(4)


async def test_our_own_key_at_the_other_end_is_refused():
    async with node("a") as a:
        async with stranger(a, "a") as secure:
            await data_until_the_end(secure)
        assert a.totals().refused == 1
