"""Identify and ping over streams in memory: right answers, half messages, floods and silence."""

from __future__ import annotations

import contextlib

import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.identity.identify.identify import parse_identify_response
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.peer.id import ID
from multiaddr import Multiaddr
from trio.testing import memory_stream_pair

import p2pfed
from p2pfed.errors import PeerUnreachable, RemoteProtocolError
from p2pfed.network.identify import MAX_MESSAGE, identify_message, serve_identify
from p2pfed.network.ping import ping, serve_ping

KEYS = create_new_key_pair(b"a" * 32)
PEER = str(ID.from_pubkey(KEYS.public_key))
RELAY = str(ID.from_pubkey(create_new_key_pair(b"r" * 32).public_key))
PAYLOAD = bytes(range(32))


class Pipe:
    """One end of a stream in memory; reads may come in pieces of at most `piece` bytes."""

    def __init__(self, end: trio.StapledStream, piece: int = 1 << 20) -> None:
        self.end = end
        self.piece = piece

    async def read(self, n: int) -> memoryview:
        return memoryview(await self.end.receive_some(min(n, self.piece)))

    async def write(self, data: bytes | memoryview) -> None:
        try:
            await self.end.send_all(bytes(data))
        except trio.BrokenResourceError as gone:
            raise PeerUnreachable("the peer is gone") from gone


def pair(piece: int = 1 << 20) -> tuple[Pipe, Pipe]:
    one, other = memory_stream_pair()
    return Pipe(one, piece), Pipe(other, piece)


def message(**what) -> Identify:
    what = {"listen": [], "protocols": [], **what}
    told = Identify()
    told.ParseFromString(identify_message(PEER, **what))
    return told


# -- identify ----------------------------------------------------------------------------------


async def test_the_librarys_own_client_reads_our_answer():
    ours, theirs = pair()
    answer = identify_message(
        PEER,
        listen=["/ip4/192.0.2.1/tcp/4001", "/dns4/hospital.example/tcp/4001"],
        protocols=["/p2pfed/gossip/1", "/ipfs/ping/1.0.0"],
        observed="/ip6/2001:db8::1/tcp/50000",
    )
    await serve_identify(ours, answer, stall=1)
    await ours.end.send_eof()
    sent = bytearray()
    while piece := await theirs.read(4096):
        sent += piece
    told = parse_identify_response(bytes(sent))
    assert told.agent_version == f"p2pfed/{p2pfed.__version__}"
    assert told.public_key == KEYS.public_key.serialize()
    assert [str(Multiaddr(packed)) for packed in told.listen_addrs] == [
        "/ip4/192.0.2.1/tcp/4001",
        "/dns4/hospital.example/tcp/4001",
    ]
    assert str(Multiaddr(told.observed_addr)) == "/ip6/2001:db8::1/tcp/50000"
    assert list(told.protocols) == ["/p2pfed/gossip/1", "/ipfs/ping/1.0.0"]


def test_the_length_in_front_of_an_answer_is_a_varint():
    async def first_bytes(answer: bytes) -> bytes:
        ours, theirs = pair()
        await serve_identify(ours, answer, stall=1)
        return await theirs.read(2)

    assert trio.run(first_bytes, bytes(127))[:1] == b"\x7f"
    assert trio.run(first_bytes, bytes(300)) == b"\xac\x02"


def test_an_answer_tells_nothing_but_the_six_fields_named():
    told = message(listen=["/ip4/192.0.2.1/tcp/1"], protocols=["/a"], observed="/ip4/1.2.3.4/tcp/5")
    assert {field.name for field, _ in told.ListFields()} == {
        "protocol_version",
        "agent_version",
        "public_key",
        "listen_addrs",
        "observed_addr",
        "protocols",
    }


def test_where_no_address_is_known_none_is_told():
    told = message(listen=["not an address", "", "/ip4/192.0.2.1/tcp/1"], observed="neither")
    assert [str(Multiaddr(packed)) for packed in told.listen_addrs] == ["/ip4/192.0.2.1/tcp/1"]
    assert not told.HasField("observed_addr")
    assert not message().HasField("observed_addr")


def test_our_id_is_taken_off_an_address_and_a_relays_is_not():
    circuit = f"/ip4/192.0.2.1/tcp/1/p2p/{RELAY}/p2p-circuit"
    told = message(listen=[f"/ip4/192.0.2.2/tcp/2/p2p/{PEER}", f"{circuit}/p2p/{PEER}"])
    kept = [str(Multiaddr(packed)) for packed in told.listen_addrs]
    assert kept == ["/ip4/192.0.2.2/tcp/2", circuit]


def test_the_last_addresses_are_left_out_before_an_answer_is_longer_than_clients_read():
    listen = [f"/dns4/{n:03}{'.' + 'x' * 60}{'.' + 'y' * 60}.example/tcp/4001" for n in range(64)]
    packed = identify_message(PEER, listen=listen, protocols=["/p2pfed/gossip/1"])
    assert MAX_MESSAGE - 300 < len(packed) <= MAX_MESSAGE
    told = message(listen=listen, protocols=["/p2pfed/gossip/1"])
    kept = [str(Multiaddr(packed)) for packed in told.listen_addrs]
    assert kept == listen[: len(kept)]


def test_an_id_that_does_not_hold_its_key_is_the_callers_mistake():
    with pytest.raises(ValueError, match="Ed25519"):
        identify_message("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", listen=[], protocols=[])


async def test_a_peer_that_takes_no_answer_is_left(autojump_clock):
    class Full(Pipe):
        async def write(self, data: bytes) -> None:
            await trio.sleep_forever()

    with pytest.raises(PeerUnreachable, match="no progress"):
        await serve_identify(Full(pair()[0].end), b"x", stall=3)
    assert trio.current_time() == pytest.approx(3)


# -- ping --------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 31, 32, 33, 1000])
async def test_every_ping_is_echoed_whole_however_it_is_cut(piece, autojump_clock):
    ours, theirs = pair(piece)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve_ping(ours, stall=30))
        for _ in range(10):
            assert await ping(theirs, stall=1) < 1
        await theirs.end.send_eof()


async def test_the_time_of_a_ping_is_the_round_trip(autojump_clock):
    class Far(Pipe):
        async def write(self, data: bytes) -> None:
            await trio.sleep(0.2)
            await super().write(data)

    ours, theirs = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve_ping(Far(ours.end), stall=30))
        assert await ping(Far(theirs.end), stall=1) == pytest.approx(0.4)
        nursery.cancel_scope.cancel()


async def test_serving_ends_with_the_stream():
    ours, theirs = pair()
    await theirs.write(PAYLOAD)
    await theirs.end.send_eof()
    await serve_ping(ours, stall=1)
    assert await theirs.read(100) == PAYLOAD


async def test_half_a_ping_is_not_echoed(autojump_clock):
    for ends in (True, False):
        ours, theirs = pair()
        await theirs.write(PAYLOAD[:31])
        if ends:
            await theirs.end.send_eof()
        with pytest.raises(PeerUnreachable):
            await serve_ping(ours, stall=5)
        await ours.end.send_eof()
        assert await theirs.read(100) == b""


async def test_a_silent_stream_is_served_no_longer_than_the_stall(autojump_clock):
    ours, theirs = pair()
    await theirs.write(PAYLOAD)
    await serve_ping(ours, stall=7)
    assert trio.current_time() == pytest.approx(7)


async def test_a_flood_is_echoed_up_to_the_rate_and_then_no_more(autojump_clock):
    ours, theirs = pair()
    await theirs.write(PAYLOAD * 1000)
    await serve_ping(ours, stall=30, per_second=5)
    await ours.end.send_eof()
    assert await theirs.read(1 << 20) == PAYLOAD * 5
    assert trio.current_time() == 0


async def test_a_steady_client_at_the_rate_is_served_as_long_as_it_likes(autojump_clock):
    ours, theirs = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve_ping(ours, stall=30, per_second=10))
        for _ in range(300):
            await ping(theirs, stall=1)
            await trio.sleep(0.1)
        await theirs.end.send_eof()


async def test_a_client_that_is_a_little_too_fast_is_cut_off_in_the_end(autojump_clock):
    ours, theirs = pair()
    echoed = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve_ping(ours, stall=30, per_second=10))
        with contextlib.suppress(PeerUnreachable):
            while echoed < 1000:
                await ping(theirs, stall=1)
                echoed += 1
                await trio.sleep(1 / 12)
    assert 50 < echoed < 100  # ten at once and two a second too many


@pytest.mark.parametrize("answer", [bytes(32), PAYLOAD + bytes(99)])
async def test_another_answer_than_what_was_sent_is_a_breach(answer):
    ours, theirs = pair()
    await theirs.write(answer)
    with pytest.raises(RemoteProtocolError, match="changed"):
        await ping(ours, stall=1)


@pytest.mark.parametrize("answer", [b"", bytes(31)])
async def test_a_ping_that_never_comes_back_whole_is_given_up(answer, autojump_clock):
    for ends in (True, False):
        ours, theirs = pair()
        await theirs.write(answer)
        if ends:
            await theirs.end.send_eof()
        with pytest.raises(PeerUnreachable):
            await ping(ours, stall=4)
    assert trio.current_time() == pytest.approx(4)
