"""The record layer: against the library's own, against a peer that changes bits, and its memory."""

from __future__ import annotations

import contextlib
import importlib.metadata
import random
import struct

import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.peer.id import ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from memory_wire import KEYS, channels, wires

from p2pfed.errors import RemoteProtocolError
from p2pfed.network.noise import MAX_PLAINTEXT, TAG, Handshake, Opener, Sealer

SEEDS = (b"a" * 32, b"b" * 32)
IDS = [str(ID.from_pubkey(create_new_key_pair(seed).public_key)) for seed in SEEDS]
CHECK = (
    "p2pfed/network/noise.py uses the library's inside (`Handshake.agree`): after a change of "
    "version look at NoiseTransport, SecureSession.conn and noise_protocol, run this file, "
    "tests/test_network_gate.py and tests/test_network_interop.py, and only then change this test"
)
KEY = KEYS[0]


def sealed(*bodies: bytes, nonce: int = 0) -> bytes:
    return bytes(Sealer(KEY, nonce).seal([(b"", body) for body in bodies]))


def feed(opener: Opener, data: bytes, piece: int = 1 << 30) -> list[bytes]:
    """Give it the bytes as a socket would, at most ``piece`` at a time."""
    opened, view = [], memoryview(data)
    while view:
        room = opener.room()
        assert room
        count = min(len(room), len(view), piece)
        room[:count] = view[:count]
        view = view[count:]
        opened += map(bytes, opener.filled(count))
    return opened


# -- the library -----------------------------------------------------------------------------------


def test_the_library_is_the_version_whose_inside_is_used():
    assert importlib.metadata.version("libp2p") == "0.8.1", CHECK


def library(seed: bytes) -> NoiseTransport:
    keys = create_new_key_pair(seed)
    return NoiseTransport(keys, noise_privkey=create_x25519_key_pair().private_key)


async def with_the_library(*, we_dial: bool):
    """Shake hands with a stock transport in memory: our channel, its session."""
    ours, theirs = wires()
    done = {}

    async def we() -> None:
        handshake = Handshake(create_new_key_pair(SEEDS[0]))
        done["channel"] = await handshake.agree(ours, IDS[1] if we_dial else None)

    async def it() -> None:
        stock = library(SEEDS[1])
        if we_dial:
            done["session"] = await stock.secure_inbound(theirs)
        else:
            done["session"] = await stock.secure_outbound(theirs, ID.from_base58(IDS[0]))

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(we)
            nursery.start_soon(it)
    return done["channel"], done["session"]


async def test_the_attributes_that_agree_reads_are_there():
    """Two stock sessions; ours is not involved."""
    one, other = wires()
    found = []

    async def listen() -> None:
        found.append(await library(SEEDS[1]).secure_inbound(other))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        found.append(await library(SEEDS[0]).secure_outbound(one, ID.from_base58(IDS[1])))
    for session in found:
        ciphers = session.conn.noise_state.noise_protocol
        for cipher in (ciphers.cipher_state_encrypt, ciphers.cipher_state_decrypt):
            assert isinstance(cipher.k, bytes) and len(cipher.k) == 32, CHECK
            assert cipher.n == 0, CHECK
        assert str(session.get_remote_peer()) in IDS, CHECK


@pytest.mark.parametrize("we_dial", [True, False])
async def test_our_records_and_the_librarys_are_the_same_both_ways(we_dial):
    channel, session = await with_the_library(we_dial=we_dial)
    assert channel.peer == IDS[1]
    rng = random.Random(1)
    for size in (1, 100, 65_518, MAX_PLAINTEXT, 200_000):
        data = rng.randbytes(size)
        pieces = [data[at : at + MAX_PLAINTEXT] for at in range(0, size, MAX_PLAINTEXT)]
        await channel.send([(piece[:12], piece[12:]) for piece in pieces])
        got = b""
        while len(got) < size:
            got += await session.read(size - len(got))
        assert got == data
        await session.write(data)
        got = b""
        while len(got) < size:
            got += b"".join(await channel.receive())
        assert got == data


async def test_somebody_else_than_the_dialled_peer_is_refused():
    ours, theirs = wires()
    handshake = Handshake(create_new_key_pair(SEEDS[0]))
    async with trio.open_nursery() as nursery:

        async def listen() -> None:
            with contextlib.suppress(Exception):
                await library(SEEDS[1]).secure_inbound(theirs)

        nursery.start_soon(listen)
        with trio.fail_after(30), pytest.raises(Exception, match="does not correspond"):
            await handshake.agree(ours, IDS[0])
        ours.abort()


async def test_two_channels_of_ours_understand_each_other_at_once():
    one, other = wires()
    made = []

    async def dial() -> None:
        made.append(await Handshake(create_new_key_pair(SEEDS[0])).agree(one, IDS[1]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(dial)
        listening = await Handshake(create_new_key_pair(SEEDS[1])).agree(other, None)
    [dialling] = made
    await dialling.write(b"there")
    await listening.write(b"back")
    assert await listening.read(99) == b"there"
    assert await dialling.read(99) == b"back"
    assert (dialling.peer, listening.peer) == (IDS[1], IDS[0])


# -- records ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_property_records_come_out_as_they_went_in_however_they_are_cut(seed):
    rng = random.Random(seed)
    sealer, opener = Sealer(KEY), Opener(KEY)
    for _ in range(30):
        bodies = [
            rng.randbytes(rng.choice([1, 12, 5000, MAX_PLAINTEXT]))
            for _ in range(rng.randint(1, 5))
        ]
        cuts = [rng.choice([0, 0, min(12, len(body))]) for body in bodies]
        data = sealer.seal(
            [(body[:cut], body[cut:]) for body, cut in zip(bodies, cuts, strict=True)]
        )
        assert feed(opener, bytes(data), rng.choice([1000, 20_000, 1 << 30])) == bodies
        if rng.random() < 0.3:
            sealer.rest()


def test_a_record_may_be_split_at_every_byte():
    data = sealed(b"first", b"second")
    for cut in range(len(data) + 1):
        opener = Opener(KEY)
        assert feed(opener, data[:cut]) + feed(opener, data[cut:]) == [b"first", b"second"]
    assert feed(Opener(KEY), data, piece=1) == [b"first", b"second"]


def test_a_record_of_nothing_is_skipped_and_counted():
    assert feed(Opener(KEY), sealed(b"", b"after")) == [b"after"]


def test_the_largest_record_passes_the_quiet_buffer_in_pieces():
    body = bytes(MAX_PLAINTEXT)
    assert feed(Opener(KEY), sealed(body, body, body), piece=4096) == [body] * 3


def test_every_changed_bit_is_seen():
    data = sealed(b"a record")
    for bit in range(16, 8 * len(data)):  # after the length
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RemoteProtocolError, match="authenticate"):
            feed(Opener(KEY), bytes(changed))


def test_a_changed_length_is_seen_or_waits_for_ever():
    data = sealed(b"a record")
    for bit in range(16):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        (length,) = struct.unpack("!H", changed[:2])
        opener = Opener(KEY)
        if length > len(data) - 2:
            assert feed(opener, bytes(changed)) == []
            with pytest.raises(RemoteProtocolError):
                feed(opener, bytes(65_536))
        else:
            with pytest.raises(RemoteProtocolError):
                feed(opener, bytes(changed))


ONE, TWO, THREE = (sealed(body, nonce=nonce) for nonce, body in enumerate((b"one", b"two", b"3")))


@pytest.mark.parametrize(
    ("data", "good"),
    [
        (ONE + THREE, 1),  # dropped
        (ONE + ONE, 1),  # doubled
        (TWO + ONE, 0),  # swapped
        (ONE + TWO + ONE, 2),  # played again
        (ONE + bytes(Sealer(KEYS[1], 1).seal([(b"", b"x")])), 1),  # of another key
        (struct.pack("!H", TAG - 1) + bytes(TAG - 1), 0),  # too short to be one
        (struct.pack("!H", 0) * 9, 0),
    ],
)
def test_a_record_that_is_dropped_doubled_swapped_or_forged_ends_the_connection(data, good):
    opener = Opener(KEY)
    whole = data[: sum(map(len, (ONE, TWO)[:good]))]
    assert len(feed(opener, whole)) == good
    with pytest.raises(RemoteProtocolError):
        feed(opener, data[len(whole) :], piece=1)


def test_head_and_body_of_a_record_need_no_joining_by_the_caller():
    assert feed(Opener(KEY), bytes(Sealer(KEY).seal([(b"head ", memoryview(b"and body"))]))) == [
        b"head and body"
    ]


def test_a_batch_is_one_buffer_and_the_next_one_uses_it_again():
    sealer, opener = Sealer(KEY), Opener(KEY)
    first = sealer.seal([(b"", b"1"), (b"", b"2")])
    assert feed(opener, bytes(first)) == [b"1", b"2"]
    second = sealer.seal([(b"", b"3"), (b"", b"4")])
    assert second.obj is first.obj
    assert feed(opener, bytes(second)) == [b"3", b"4"]


# -- channels --------------------------------------------------------------------------------------


def held_by(channel) -> int:
    return len(channel._sealer._out) + len(channel._opener._in) + len(channel._early)


async def test_a_channel_that_is_quiet_after_much_traffic_holds_little():
    one, other = channels()
    assert held_by(one) < 20_000
    for _ in range(3):
        await one.send([(b"", bytes(MAX_PLAINTEXT))] * 4)
        count = 0
        while count < 4 * MAX_PLAINTEXT:
            count += sum(map(len, await other.receive()))
    assert held_by(one) > 200_000
    await one.send([(b"", b"a ping")])
    one.rest()
    assert await other.receive() == [b"a ping"]
    assert held_by(one) < 20_000
    assert held_by(other) < 20_000


async def test_the_end_of_the_connection_is_no_record():
    one, other = channels()
    await one.write(b"last")
    one.wire.abort()
    assert await other.receive() == [b"last"]
    assert await other.receive() == []
    assert await other.read(5) == b""


async def test_what_was_not_read_as_bytes_comes_as_the_first_record():
    one, other = channels()
    await one.send([(b"", b"negotiation"), (b"", b"frames")])
    assert await other.read(11) == b"negotiation"
    assert await other.receive() == [b"frames"]


async def test_bytes_on_the_wire_are_counted_with_their_records():
    one, other = channels()
    await one.send([(b"", bytes(100)), (b"", bytes(50))])
    await other.receive()
    assert one.wire.sent == other.wire.received == 150 + 2 * (2 + TAG)
