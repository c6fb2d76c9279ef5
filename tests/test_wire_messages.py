"""Messages: one encoding each, limits before decoding, nothing but RemoteProtocolError."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import msgpack
import pytest
from consortium import Consortium, peer_of, some_payload
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfed.errors import RemoteProtocolError
from p2pfed.wire.codec import MAX_FRAME, MAX_ITEMS, pack, unpack
from p2pfed.wire.delta import Delta, Proof
from p2pfed.wire.messages import (
    DOCUMENTS,
    MAX_NAMES,
    MAX_RANGES,
    Ack,
    Addresses,
    AskCheckpoints,
    AskWitness,
    Beat,
    CheckpointOffer,
    Checkpoints,
    Digest,
    Facts,
    Have,
    Leave,
    Range,
    Want,
    Witness,
    decode_message,
    encode_message,
)
from p2pfed.wire.spreading import (
    MAX_AGE,
    MAX_ASKED,
    AskHeard,
    Claims,
    Crowded,
    Doubted,
    Heard,
    Held,
    Ping,
    Portion,
    Wanted,
)

H4 = st.binary(min_size=4, max_size=4)
H8 = st.binary(min_size=8, max_size=8)
SEATS = st.binary(max_size=129)
H16 = st.binary(min_size=16, max_size=16)
H32 = st.binary(min_size=32, max_size=32)
MAYBE32 = st.one_of(st.just(b""), H32)
ROUNDS = st.integers(0, 1 << 31)
NAMES = st.lists(H16, max_size=5).map(b"".join)
BLOBS = st.lists(st.binary(max_size=40), max_size=4).map(tuple)
TEXTS = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), max_size=30)
ADDRESSES = st.lists(TEXTS, max_size=16).map(tuple)
RANGES = st.builds(
    lambda level, at, digest: Range(at << level, 1 << level, digest),
    st.integers(0, 20),
    st.integers(0, 1 << 10),
    H16,
)
OFFERS = st.builds(CheckpointOffer, ROUNDS, H32, H32, st.integers(1, 1 << 40))

MESSAGES = st.one_of(
    st.builds(
        Beat,
        sequence=st.integers(0, (1 << 63) - 1),
        network_id=H32,
        run_id=MAYBE32,
        task_id=MAYBE32,
        round=ROUNDS,
        contributes=st.booleans(),
        model_round=ROUNDS,
        model_hash=MAYBE32,
        documents=H16,
        addresses=ADDRESSES,
    ),
    st.builds(Ack, st.integers(0, (1 << 63) - 1)),
    st.just(Leave()),
    st.builds(Addresses, st.lists(st.tuples(TEXTS, ADDRESSES), max_size=3).map(tuple)),
    st.builds(Digest, H32, ROUNDS, st.lists(RANGES, max_size=4).map(tuple)),
    st.builds(
        Held, H4, H4, st.booleans(), st.lists(st.builds(Portion, ROUNDS, SEATS, H4)).map(tuple)
    ),
    st.builds(Wanted, H4, H4, st.lists(st.builds(Portion, ROUNDS, SEATS)).map(tuple)),
    st.builds(Claims, H4, H8, st.lists(st.tuples(H4, SEATS)).map(tuple)),
    st.builds(Ping, st.integers(0, (1 << 63) - 1)),
    st.builds(
        AskHeard, st.integers(0, (1 << 63) - 1), st.lists(TEXTS, max_size=MAX_ASKED).map(tuple)
    ),
    st.builds(
        Heard,
        st.integers(0, (1 << 63) - 1),
        st.lists(st.tuples(TEXTS, st.integers(0, MAX_AGE)), max_size=MAX_ASKED).map(tuple),
    ),
    st.builds(Doubted, st.booleans()),
    st.builds(Have, H32, st.integers(DOCUMENTS, 1 << 31), st.booleans(), NAMES),
    st.builds(Want, H32, NAMES),
    st.builds(Facts, BLOBS, BLOBS, BLOBS),
    st.builds(AskCheckpoints, H32),
    st.builds(Checkpoints, H32, st.lists(OFFERS, max_size=4).map(tuple)),
    st.just(AskWitness()),
    st.builds(
        Witness,
        st.lists(
            st.tuples(st.binary(max_size=1024), st.binary(min_size=64, max_size=64)), max_size=3
        ).map(tuple),
    ),
)

BEAT = Beat(7, b"n" * 32, b"r" * 32, b"", 3, True, 2, b"h" * 32, b"d" * 16, ("/ip4/10.0.0.1",))
ONE_OF_EACH = [
    BEAT,
    Ack(7),
    Leave(),
    Addresses(((peer_of(0), ("/ip4/10.0.0.1/tcp/4201", "/dns4/a/tcp/1")),)),
    Digest(b"r" * 32, 9, (Range(0, 8, b"d" * 16), Range(8, 1, b"e" * 16))),
    Have(b"r" * 32, DOCUMENTS, True, b"a" * 16 + b"b" * 16),
    Want(b"r" * 32, b"a" * 16),
    Facts((b"delta",), (b"roster", b"roster 2"), (b"proof",)),
    AskCheckpoints(b"r" * 32),
    Checkpoints(b"r" * 32, (CheckpointOffer(8, b"c" * 32, b"d" * 32, 12345),)),
    AskWitness(),
    Witness(((b"header", b"s" * 64), (b"another", b"t" * 64))),
    Held(b"r" * 4, b"o" * 4, False, (Portion(3, b"\x00\x05", b"d" * 4), Portion(4, b"\x01"))),
    Wanted(b"r" * 4, b"o" * 4, (Portion(3, b"\x01\x02"),)),
    Claims(b"o" * 4, b"d" * 8, ((b"r" * 4, b"\x00\x05\x01\x81\x01"), (b"", b"\x02\x04"))),
    Crowded(),
    Ping(7),
    AskHeard(7, (peer_of(0), peer_of(1))),
    Heard(7, ((peer_of(0), 2600), (peer_of(1), 0))),
    Doubted(True),
]


@settings(max_examples=40)
@given(MESSAGES)
def test_decode_of_encode_is_the_message_itself(message):
    assert decode_message(encode_message(message)) == message


@pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda m: type(m).__name__)
def test_every_truncation_of_a_message_is_refused(message):
    frame = encode_message(message)
    for length in range(len(frame)):
        with pytest.raises(RemoteProtocolError):
            decode_message(frame[:length])


@pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("extra", [None, 0, b"", ()])
def test_one_item_more_than_the_message_has_is_refused(message, extra):
    items = msgpack.unpackb(encode_message(message), use_list=False)
    with pytest.raises(RemoteProtocolError, match="too many"):
        decode_message(pack(*items, extra), 1)  # what version 2 adds: test_wire_versions


@pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda m: type(m).__name__)
def test_no_item_of_a_message_may_be_of_another_type(message):
    items = list(msgpack.unpackb(encode_message(message), use_list=False))
    for at, was in enumerate(items):
        for wrong in (None, True, -5, 1 << 63, 2.5, "x\n", b"x", (0,), ("a", "b"), ((),)):
            if type(wrong) is type(was):
                continue
            with pytest.raises(RemoteProtocolError):
                decode_message(pack(*items[:at], wrong, *items[at + 1 :]))


@pytest.mark.parametrize(
    "frame",
    [
        pack(),
        pack("unknown"),
        pack("Ack", 1),
        pack(b"ack", 1),
        pack("x" * 33),
        pack("have", bytes(32), -2, False, b""),
        pack("have", bytes(32), 0, False, bytes(15)),
        pack("have", bytes(32), 0, False, bytes(16 * 4097)),
        pack("want", bytes(32), bytes(16 * 4097)),
        pack("digest", bytes(32), 0, ((0, 3, bytes(16)),)),  # no power of two
        pack("digest", bytes(32), 0, ((1, 2, bytes(16)),)),  # not aligned
        pack("digest", bytes(32), 0, ((0, 0, bytes(16)),)),
        pack("digest", bytes(32), 0, tuple((i, 1, bytes(16)) for i in range(513))),
        pack("digest", bytes(32), 0, ((0, 1, bytes(16), 0),)),
        pack("checkpoints", bytes(32), tuple((1, bytes(32), bytes(32), 1) for _ in range(65))),
        pack("checkpoints", bytes(32), ((1, bytes(32), bytes(32), 0),)),
        pack("checkpoints", bytes(32), ((1, bytes(32), bytes(32), (1 << 40) + 1),)),
        pack("addresses", tuple(("p", ()) for _ in range(1025))),
        pack("addresses", (("p", ("a",) * 17),)),
        pack("addresses", (("p", ("a" * 257,)),)),
        pack("addresses", (("p", ("\x1b[2J",)),)),
        pack("facts", (b"not in an array",), (), ()),
        pack("facts", ((b"one", b"two"),), (), ()),
        pack("ask-heard", 7, ("p",) * 33),
        pack("ask-heard", 7, ("p" * 65,)),
        pack("heard", 7, tuple(("p", 1) for _ in range(33))),
        pack("heard", 7, (("p", -1),)),
        pack("heard", 7, (("p", (1 << 40) + 1),)),
        pack("heard", 7, (("p", True),)),
        pack("doubted", 1),
        msgpack.packb("ack"),
        msgpack.packb({"ack": 1}),
        msgpack.packb({}),
        msgpack.packb(["ack", {}]),
        msgpack.packb(["ack", {"a": 1}]),
        msgpack.packb(["ack", msgpack.ExtType(5, b"")]),
        msgpack.packb(["ack", msgpack.ExtType(5, b"x")]),
        msgpack.packb(["ack", msgpack.Timestamp(1, 2)]),
        b"\x92\xa3ack\xc7\x00\xff",  # a timestamp of no bytes
        b"\x92\xa3ack\xd9\x02\xff\xfe",  # not UTF-8
        b"\xc1",
        b"",
        encode_message(Ack(1)) + b"\xc0",
        encode_message(Ack(1)) * 2,
        b"\x91" * 100_000,
        b"\x91" * 400 + b"\xc0",
    ],
)
def test_what_is_not_a_message_is_refused(frame):
    with pytest.raises(RemoteProtocolError):
        decode_message(frame)


def test_a_frame_that_is_too_long_is_refused_before_it_is_decoded():
    with pytest.raises(RemoteProtocolError, match="at most"):
        unpack(bytes(MAX_FRAME + 1), "message")
    with pytest.raises(ValueError, match="Want"):
        encode_message(Want(bytes(32), bytes(MAX_FRAME)))


def test_an_array_that_is_too_long_is_refused():
    assert unpack(pack(*range(MAX_ITEMS)), "x").integer() == 0
    with pytest.raises(RemoteProtocolError):
        unpack(pack(*range(MAX_ITEMS + 1)), "x")


def test_a_frame_of_many_small_arrays_is_refused_before_it_fills_the_memory():
    """16 MiB of them took 430 MiB."""
    inner = b"\xdc\x10\x00" + b"\x91\xc0" * MAX_ITEMS
    bomb = b"\xdc\x01\x00" + inner * 256
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            decode_message(bomb)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_the_fullest_message_of_each_kind_is_read():
    facts = tuple(bytes([i % 256]) for i in range(MAX_NAMES))
    addresses = tuple((f"p{i}", tuple("abcdefghijklmnop")) for i in range(1024))
    ranges = tuple(Range(i, 1, bytes(16)) for i in range(MAX_RANGES))
    for full in (Facts(facts, facts, facts), Addresses(addresses), Digest(bytes(32), 9, ranges)):
        assert decode_message(encode_message(full)) == full


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x92\xa3ack\xdd\xff\xff\xff\xff",  # an array of 4 billion items
        b"\x92\xa3ack\xdf\xff\xff\xff\xff",  # a map of as many
        b"\x92\xa3ack\xc6\xff\xff\xff\xff",  # 4 GB of bytes
        b"\x92\xa3ack\xdb\xff\xff\xff\xff",  # 4 GB of text
        b"\x92\xa3ack\xc9\xff\xff\xff\xff\x05",  # 4 GB of extension
        b"\x92\xa3ack\xc6\x00\xff\xff\xff" + bytes(100),  # 16 MB of bytes, of which 100 come
        b"\xdc\x10\x00" * 20,  # arrays of 4096, nested
    ],
)
def test_a_claimed_length_allocates_nothing(bomb):
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            decode_message(bomb)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def mutated(rng: random.Random, frames: list[bytes]) -> bytes:
    """A frame as a bug or an attacker would send it."""
    frame = bytearray(rng.choice(frames))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(frame) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(frame):
            frame[at] = rng.randrange(256)
        elif kind == 1:
            frame[at:at] = rng.randbytes(rng.randint(1, 4))
        elif kind == 2:
            del frame[at : at + rng.randint(1, 8)]
        elif kind == 3:
            frame[at:] = rng.choice(frames)[at:]
        elif at < len(frame):
            frame[at] = rng.choice([0xC0, 0xC1, 0xC7, 0x80, 0xDD, 0xDF, 0xC6, 0xCB, 0xFF])
    return bytes(frame)


def fuzz(count: int, seed: int) -> tuple[int, int]:
    net = Consortium(2)
    run = net.run()
    one, other = net.delta(run, 3, 0), net.delta(run, 3, 0, some_payload(run, 3, 0, salt=1))
    delta, proof = one.encode(), Proof.of(one.signed, other.signed).encode()
    facts = encode_message(Facts((delta,), (net.signed[0],), (proof,)))
    frames = [encode_message(m) for m in ONE_OF_EACH] + [facts]
    rng = random.Random(seed)
    read = refused = 0
    for i in range(count):
        decode, pool = [
            (decode_message, frames),
            (decode_message, frames),
            (Delta.decode, [delta]),
            (Proof.decode, [proof]),
        ][i % 4]
        data = rng.randbytes(rng.randrange(80)) if rng.random() < 0.1 else mutated(rng, pool)
        try:
            decode(data)
            read += 1
        except RemoteProtocolError:
            refused += 1
    return read, refused


def test_random_and_mutated_frames_raise_nothing_but_remote_protocol_error():
    read, refused = fuzz(4000, seed=3)
    assert read > 100
    assert refused > 2000


@pytest.mark.slow
def test_20000_random_and_mutated_frames_raise_nothing_but_remote_protocol_error():
    assert sum(fuzz(20_000, seed=4)) == 20_000


# --- golden bytes ------------------------------------------------------------------------------

DATA = Path(__file__).with_name("data")


def golden() -> dict[str, bytes]:
    """One of each format, of fixed keys and constants: Ed25519 signs deterministically."""
    net = Consortium(2)
    run = net.run()
    one, other = net.delta(run, 3, 0), net.delta(run, 3, 0, some_payload(run, 3, 0, salt=1))
    found = {f"message-{type(m).__name__.lower()}": encode_message(m) for m in ONE_OF_EACH}
    return found | {
        "payload": one.payload,
        "delta": one.encode(),
        "proof": Proof.of(one.signed, other.signed).encode(),
        "roster-v1": net.signed[0],
        "roster-v2": net.signed[1],
        "run": net.signed_run(),
    }


@pytest.mark.parametrize("name", sorted(golden()))
def test_the_bytes_of_the_format_have_not_changed(name):
    """If this fails on purpose, the protocol's version must change with it."""
    text = (DATA / f"{name}.hex").read_text("ascii")
    assert golden()[name] == bytes.fromhex("".join(text.split()))
