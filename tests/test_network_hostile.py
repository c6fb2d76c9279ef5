"""Peers that are slow on purpose, that flood, steal and lie, on real loopback sockets.

What a stranger gets and what garbage does is in `test_network_gate`; here it is about time: what
bounds each level of a connection, and that another member is served meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import struct
from pathlib import Path

import pytest
import trio
from consortium import Consortium, hospital, key_of, peer_of
from fair_clock import FairClock
from libp2p.crypto.ed25519 import create_new_key_pair
from test_network_gate import (
    IDS,
    LOOPBACK,
    SEEDS,
    Gate,
    data_until_the_end,
    node,
    opening,
    port_of,
    stranger,
    yamux,
)

from p2pfed.errors import FactRejected, PeerError, RemoteProtocolError
from p2pfed.network import FrameReceived, Limits, PeerConnected, PeerDisconnected, open_network
from p2pfed.network.multistream import announce
from p2pfed.network.noise import Handshake

pytestmark = pytest.mark.slow

GOSSIP = "/p2pfed/gossip/2"
HELLO = opening("/noise")


async def dial_tcp(a) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", port_of(a))


async def drip(send, body: bytes, every: float = 1.0) -> None:
    """One byte at a time, until the other side has had enough."""
    with contextlib.suppress(Exception):
        for byte in body:
            await send(bytes([byte]))
            await trio.sleep(every)


async def closed(tcp: trio.SocketStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError):
        while await tcp.receive_some():
            pass


async def is_served_quickly(a) -> None:
    """Member b is let in and heard within a second; on a busy machine it has three tries."""
    for attempt in range(3):
        async with node("b") as b:
            with trio.move_on_after(1.0 if attempt < 2 else 1.5) as scope:
                b.keep_connected(a.peer_id, a.addresses())
                assert await b.events.receive() == PeerConnected(a.peer_id)
                assert b.send(a.peer_id, b"served?")
                while await a.events.receive() != FrameReceived(b.peer_id, b"served?"):
                    pass
        if not scope.cancelled_caught:
            with trio.fail_after(30):
                while await a.events.receive() != PeerDisconnected(b.peer_id):
                    pass
            return
        while a.stats(b.peer_id).direction is not None:  # noqa: ASYNC110
            await trio.sleep(0.05)
    pytest.fail("a member was not served within a second")


# -- slowly, slowly --------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["negotiation", "noise message", "noise, after a whole message"])
async def test_a_handshake_that_drips_ends_after_three_seconds_at_every_level(level):
    async with node("a") as a, await dial_tcp(a) as tcp, trio.open_nursery() as nursery:
        clock = FairClock()
        if level == "negotiation":
            body = HELLO
        else:
            await tcp.send_all(HELLO)
            body = b"\x00\x20" + bytes(32) if level == "noise message" else b"\x00\x50" + bytes(80)
            if level.endswith("whole message"):
                await tcp.send_all(b"\x00\x20" + b"\x09" + bytes(31))  # an ephemeral key
        nursery.start_soon(drip, tcp.send_all, body)
        nursery.start_soon(is_served_quickly, a)
        with trio.fail_after(30):
            await closed(tcp)
        assert clock.elapsed > 2.0
        assert clock.within(4.0)
        nursery.cancel_scope.cancel()


async def test_the_choice_of_yamux_that_drips_ends_with_the_handshakes_three_seconds():
    async with node("a") as a, stranger(a, muxed=False) as secure, trio.open_nursery() as nursery:
        clock = FairClock()
        nursery.start_soon(drip, secure.write, opening("/yamux/1.0.0"))
        await data_until_the_end(secure)
        assert clock.within(4.0)
        nursery.cancel_scope.cancel()


async def test_a_strangers_roster_that_drips_ends_after_three_seconds():
    gate = Gate()
    async with node("a", gate) as a, stranger(a) as secure, trio.open_nursery() as nursery:
        clock = FairClock()
        frame = b"PF01" + struct.pack("!I", 1000) + bytes(1000)
        await secure.write(yamux(1, 1, 1) + yamux(0, 0, 1, opening("/p2pfed/roster/1")))

        async def send(byte: bytes) -> None:
            await secure.write(yamux(0, 0, 1, byte))

        nursery.start_soon(drip, send, frame, 0.2)
        assert await data_until_the_end(secure) == 0
        assert clock.elapsed > 2.0
        assert clock.within(4.0)
        assert gate.heard == []
        nursery.cancel_scope.cancel()


async def test_a_member_that_drips_a_yamux_header_is_cut_when_our_streams_opening_is_overdue():
    """It is connected only once it agreed to our stream, which it has `open_seconds` for."""
    limits = Limits(open_seconds=3.0)
    async with node("a", Gate("abx"), limits) as a, stranger(a) as secure:
        clock = FairClock()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip, secure.write, yamux(1, 1, 1) * 9)
            nursery.start_soon(is_served_quickly, a)
            await data_until_the_end(secure)
            assert clock.elapsed > 2.5
            assert clock.within(4.5)
            nursery.cancel_scope.cancel()
        assert a.totals().connected == 0


@contextlib.asynccontextmanager
async def connected_by_hand(a):
    """Member x, byte by byte: it agrees to a's gossip stream and opens its own."""
    async with stranger(a) as secure:
        await secure.write(
            yamux(0, 2, 2, opening(GOSSIP)) + yamux(1, 1, 1) + yamux(0, 0, 1, opening(GOSSIP))
        )
        with trio.fail_after(30):
            assert await a.events.receive() == PeerConnected(IDS["x"])
        yield secure


async def test_a_message_that_drips_holds_nobody_up_and_ends_when_it_stands_still():
    """A slow peer may take long; what it holds is its own bytes, and silence ends it."""
    limits = Limits(stall_seconds=2.0)
    async with node("a", Gate("abx"), limits) as a, connected_by_hand(a) as secure:
        head = b"PF01" + struct.pack("!I", limits.max_frame)

        async def send(data: bytes) -> None:
            await secure.write(yamux(0, 0, 1, data))

        await is_served_quickly(a)
        await send(head)
        before = resident()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip, send, bytes(5))
            await trio.sleep(1)
            await is_served_quickly(a)
        assert a.stats(IDS["x"]).direction == "inbound"  # five seconds of one byte each
        assert resident() - before < 8 << 20
        clock = FairClock()
        await data_until_the_end(secure)
        assert clock.within(3.5)
        assert await a.events.receive() == PeerDisconnected(IDS["x"])


async def test_a_member_is_served_within_a_second_among_200_connections_that_stand_still():
    async with (
        node("a", limits=Limits(upgrade_seconds=20.0)) as a,
        contextlib.AsyncExitStack() as held,
    ):
        for number in range(200):
            tcp = await held.enter_async_context(await dial_tcp(a))
            with contextlib.suppress(trio.BrokenResourceError):
                await tcp.send_all(
                    (b"", HELLO[:9], HELLO, HELLO + b"\x00\x20" + bytes(31))[number % 4]
                )
        await is_served_quickly(a)


# -- floods ----------------------------------------------------------------------------------------


def resident() -> int:
    pages = Path("/proc/self/statm").read_text("ascii").split()[1]
    return int(pages) * resource.getpagesize()


def num_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read memory from")
async def test_after_a_thousand_quick_connections_nothing_is_left_of_them():
    async with node("a") as a:

        async def once(number: int) -> None:
            with contextlib.suppress(OSError, trio.BrokenResourceError):
                async with await dial_tcp(a) as tcp:
                    await tcp.send_all((b"", HELLO, HELLO + os.urandom(200))[number % 3])

        async def wave(numbers: range) -> None:
            async with trio.open_nursery() as nursery:
                for number in numbers:
                    nursery.start_soon(once, number)

        await wave(range(50))
        await settled(a, 50)
        await is_served_quickly(a)
        files, memory = num_files(), resident()
        for start in range(50, 1050, 50):
            await wave(range(start, start + 50))
        await settled(a, 1050)
        await is_served_quickly(a)
        assert num_files() <= files
        assert resident() - memory < 16 << 20
        assert not a._host._half_open


async def settled(a, refused: int) -> None:
    with trio.fail_after(20):
        while a.totals().refused < refused or a._host._half_open:  # noqa: ASYNC110
            await trio.sleep(0.05)


async def test_a_member_that_floods_tiny_frames_is_taken_at_the_rate_and_no_faster():
    limits = Limits(frames_per_second=50.0)
    gate = Gate("abx")
    async with node("a", gate, limits) as a, connected_by_hand(a) as secure:
        digest = hashlib.blake2b(b"tiny", digest_size=32).digest()
        frame = b"PF01" + struct.pack("!I", 4) + b"tiny" + digest
        count = 0

        async def hear() -> None:
            nonlocal count
            async for event in a.events:
                count += event == FrameReceived(IDS["x"], b"tiny")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hear)
            await secure.write(yamux(0, 0, 1, frame * 1000))
            await secure.write(yamux(0, 0, 1, frame * 1000))
            await trio.sleep(3.0)
            nursery.cancel_scope.cancel()
        assert 100 <= count <= 50 + 4 * 50  # the burst, and the rate for at most four seconds
        assert a.stats(IDS["x"]).direction == "inbound"
        await is_served_quickly(a)


# -- lies ------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def listener(answer):
    """A TCP server that hands each connection to ``answer``; gives its address."""
    async with trio.open_nursery() as nursery:
        [held] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, answer, [held])
        yield f"/ip4/127.0.0.1/tcp/{held.socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("offer", [b"\x11/plaintext/2.0.0\n", b"\x03na\n", b"\x0b/tls/1.0.0\n"])
async def test_who_answers_with_something_weaker_than_noise_gets_no_further_byte(offer):
    heard = bytearray()

    async def answer(tcp: trio.SocketStream) -> None:
        await tcp.send_all(b"\x13/multistream/1.0.0\n" + offer)
        async for data in tcp:
            heard.extend(data)

    async with listener(answer) as address, node("a") as a:
        with trio.fail_after(30), pytest.raises(RemoteProtocolError, match="does not speak"):
            await a._host.dial(IDS["b"], address)
        await trio.sleep(0.1)
        assert bytes(heard) == HELLO


async def test_who_has_another_key_than_the_member_dialled_gets_no_byte_of_any_protocol():
    gate = Gate("abx")
    async with node("x", gate) as x, node("a", Gate(offer=b"our roster")) as a:
        address = x.addresses()[0].partition("/p2p/")[0]
        with trio.fail_after(30), pytest.raises(PeerError, match="handshake failed"):
            await a._host.dial(IDS["b"], address)
        await trio.sleep(0.2)
        assert gate.heard == []
        assert x.totals().connected == 0


class Book(Gate):
    """A gate whose members are those of a real roster book."""

    def __init__(self, net: Consortium, *versions: int) -> None:
        super().__init__("")
        self.book = net.book(*versions)

    def is_member(self, peer: str) -> bool:
        return self.book.current.member(peer) is not None

    def consider_roster(self, peer: str, signed: bytes) -> bool:
        with contextlib.suppress(FactRejected):
            self.book.add(signed)
        return self.is_member(peer)


async def present(a, seed: bytes, roster: bytes) -> float:
    """Connect with this key, present this roster; seconds until the door was shut."""
    keys = create_new_key_pair(seed)
    tcp = await dial_tcp(a)

    class Raw:
        async def read(self, n: int) -> bytes:
            held = b""
            while len(held) < n and (piece := await tcp.receive_some(n - len(held))):
                held += piece
            return held

        async def write(self, data: bytes) -> None:
            await tcp.send_all(data)

    async with tcp:
        raw = Raw()
        await announce(raw, "/noise")
        assert await raw.read(len(HELLO)) == HELLO
        handshake = Handshake(keys)
        session = await handshake._transport.secure_outbound(raw, _id_of(a))
        digest = hashlib.blake2b(roster, digest_size=32).digest()
        frame = b"PF01" + struct.pack("!I", len(roster)) + roster + digest
        body = (
            opening("/yamux/1.0.0") + yamux(1, 1, 1) + yamux(0, 0, 1, opening("/p2pfed/roster/1"))
        )
        await session.write(body + yamux(0, 0, 1, frame))
        began = trio.current_time()
        await session.read(len(opening("/yamux/1.0.0")))
        assert await data_until_the_end(session) == 0
        return trio.current_time() - began


def _id_of(a):
    from libp2p.peer.id import ID

    return ID.from_base58(a.peer_id)


def a_node_of(net: Consortium, gate: Book):
    return open_network(seed=key_of(0).seed, listen=LOOPBACK, gatekeeper=gate)


async def test_a_stranger_with_a_stolen_newer_roster_is_turned_away_and_its_news_are_kept():
    net = Consortium(2)
    gate = Book(net, 1, 2)
    newer = net.grow(hospital(5))
    async with a_node_of(net, gate) as a:
        assert await present(a, SEEDS["x"], newer) < 1.5
        assert gate.book.current.version == 3  # it is valid, whoever brought it
        assert a.totals().refused == 1
        assert a.totals().connected == 0


async def test_a_former_member_with_the_old_roster_that_lists_it_is_turned_away():
    net = Consortium(3)
    old = net.signed[1]
    net.publish(net.roster.revoke(peer_of(2), reason="left", from_round=0))
    gate = Book(net)
    assert not gate.is_member(peer_of(2))
    async with a_node_of(net, gate) as a:
        assert await present(a, key_of(2).seed, old) < 1.5
        assert gate.book.current.version == 3
        assert a.totals().refused == 1


async def test_a_forged_roster_opens_nothing():
    net, other = Consortium(2), Consortium(2)
    forged = other.grow(hospital(9, name="forged"))
    stranger_key = key_of(9)
    gate = Book(net, 1, 2)
    async with a_node_of(net, gate) as a:
        broken = forged.replace(b'"forged"', b'"f0rged"')
        assert await present(a, stranger_key.seed, broken) < 1.5
        assert gate.book.current.version == 2
        assert a.totals().refused == 1


# -- revocation ------------------------------------------------------------------------------------


async def test_a_revoked_members_connection_is_dropped_at_once():
    gate = Gate("ab")
    async with node("a", gate) as a, node("b") as b:
        b.keep_connected(a.peer_id, a.addresses())
        with trio.fail_after(30):
            assert await a.events.receive() == PeerConnected(b.peer_id)
            assert await b.events.receive() == PeerConnected(a.peer_id)
        gate.members.discard(b.peer_id)
        with trio.fail_after(30):
            await a.recheck()
            assert await a.events.receive() == PeerDisconnected(b.peer_id)
            assert await b.events.receive() == PeerDisconnected(a.peer_id)
        assert not b.send(a.peer_id, b"x")
        with trio.move_on_after(2):
            pytest.fail(f"unexpected {await a.events.receive()}")


async def test_a_revoked_member_that_reads_nothing_is_dropped_all_the_same():
    gate = Gate("abx")
    async with node("a", gate) as a, connected_by_hand(a) as secure:
        assert a.send(IDS["x"], bytes(8 << 20))  # more than its socket takes
        await trio.sleep(0.3)
        gate.members.discard(IDS["x"])
        with trio.fail_after(30):
            await a.recheck()
            assert await a.events.receive() == PeerDisconnected(IDS["x"])
        await data_until_the_end(secure)


async def test_a_revoked_member_that_opens_a_stream_before_we_looked_is_cut():
    """The gatekeeper is asked again with each stream."""
    gate = Gate("abx")
    async with node("a", gate) as a, connected_by_hand(a) as secure:
        gate.members.discard(IDS["x"])
        await secure.write(yamux(1, 1, 3) + yamux(0, 0, 3, opening("/p2pfed/blob/1")))
        with trio.fail_after(30):
            assert await a.events.receive() == PeerDisconnected(IDS["x"])
        assert gate.asked_for_blobs == 0
