"""The messages of circuit relay v2, byte for byte, and the two ends of a circuit."""

from __future__ import annotations

import contextlib

import pytest
import trio
from circuit_fakes import IDS, FakeStream, member, stream_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage as PbHop
from libp2p.relay.circuit_v2.pb.circuit_pb2 import StopMessage as PbStop
from libp2p.utils.varint import encode_varint_prefixed

from p2pfed.errors import PeerUnreachable, RemoteProtocolError
from p2pfed.network import circuit
from p2pfed.network.circuit import Answer, Connect, Limit, Reservation, Reserve, Status

A, B = IDS["a"], IDS["b"]
RAW_A = bytes.fromhex("002408011220") + b"a" * 32  # identity multihash of an Ed25519 key

STATUSES = st.sampled_from(Status)
LIMITS = st.builds(Limit, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
PEERS = st.integers(0, 999).map(member)
CONNECTS = st.builds(Connect, PEERS, LIMITS)
HOPS = (
    st.just(Reserve())
    | CONNECTS
    | st.builds(Answer, STATUSES, limit=LIMITS)
    | st.builds(
        Answer,
        STATUSES,
        st.integers(0, 2**64 - 1),
        st.lists(st.binary(max_size=80), max_size=8).map(tuple),
        LIMITS,
    )
)
STOPS = CONNECTS | st.builds(Answer, STATUSES, limit=LIMITS)


# -- the wire ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "body"),
    [
        (Reserve(), "0800"),
        (Connect(A), "0801" + "1228" + "0a26" + RAW_A.hex()),
        (Answer(Status.OK), "0802" + "2864"),
        (Answer(Status.NO_RESERVATION), "0802" + "28cc01"),
        (
            Answer(Status.OK, 1_800_000_000, (b"xy",), Limit(3600, 1 << 20)),
            "0802" + "1a0a" + "0880a4a7da06" + "12027879" + "2207" + "08901c" + "10808040" + "2864",
        ),
    ],
)
def test_a_hop_message_has_the_specifications_bytes(message, body):
    assert circuit.encode_hop(message).hex() == body
    assert circuit.decode_hop(bytes.fromhex(body)) == message


@pytest.mark.parametrize(
    ("message", "body"),
    [
        (Connect(A), "0800" + "1228" + "0a26" + RAW_A.hex()),
        (Answer(Status.CONNECTION_FAILED), "0801" + "20cb01"),
        (Connect(A, Limit(60)), "0800" + "1228" + "0a26" + RAW_A.hex() + "1a04" + "083c" + "1000"),
    ],
)
def test_a_stop_message_has_the_specifications_bytes(message, body):
    assert circuit.encode_stop(message).hex() == body
    assert circuit.decode_stop(bytes.fromhex(body)) == message


def test_the_statuses_have_the_specifications_numbers_and_words_of_ours():
    assert {each.value: each.name for each in Status} == {
        100: "OK",
        200: "RESERVATION_REFUSED",
        201: "RESOURCE_LIMIT_EXCEEDED",
        202: "PERMISSION_DENIED",
        203: "CONNECTION_FAILED",
        204: "NO_RESERVATION",
        400: "MALFORMED_MESSAGE",
        401: "UNEXPECTED_MESSAGE",
    }
    assert len({each.words for each in Status}) == len(Status)


@given(HOPS)
@settings(max_examples=30)
def test_property_a_hop_message_comes_back(message):
    assert circuit.decode_hop(circuit.encode_hop(message)) == message


@given(STOPS)
@settings(max_examples=30)
def test_property_a_stop_message_comes_back(message):
    assert circuit.decode_stop(circuit.encode_stop(message)) == message


@given(st.binary(max_size=200) | HOPS.map(circuit.encode_hop))
@settings(max_examples=30)
def test_property_any_bytes_are_a_message_or_a_protocol_error(body):
    for decode in (circuit.decode_hop, circuit.decode_stop):
        try:
            message = decode(body)
        except RemoteProtocolError:
            continue
        assert isinstance(message, Reserve | Connect | Answer)


@given(HOPS, st.data())
@settings(max_examples=30)
def test_property_a_damaged_message_is_a_message_or_a_protocol_error(message, data):
    body = bytearray(circuit.encode_hop(message))
    place = data.draw(st.integers(0, len(body) - 1))
    body[place] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(RemoteProtocolError):
        assert isinstance(circuit.decode_hop(bytes(body)), Reserve | Connect | Answer)


def test_fields_we_do_not_know_are_skipped():
    body = PbHop(type=PbHop.RESERVE, senderRecord=b"signed").SerializeToString() + b"\x7a\x01x"
    assert circuit.decode_hop(body) == Reserve()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "0 bytes"),
        (b"\xff" * 8, "not protobuf"),
        (b"\x08", "not protobuf"),
        (b"\x28\x64", "no type"),
        (b"\x08\x07", "unknown type 7"),
        (b"\x08\x02", "status 0"),
        (b"\x08\x02\x28\x63", "status 99"),
        (PbHop(type=PbHop.CONNECT).SerializeToString(), "names no peer"),
        (b"\x08\x01\x12\x02\x0a\x00", "names no peer"),
        (b"\x08\x01\x12\x28\x0a\x26" + b"x" * 38, "names no peer"),
        (b"\x08\x01\x12\x24\x0a\x22" + b"\x12\x20" + b"x" * 32, "names no peer"),  # an RSA key's
        (b"\x08\x00" + b"\x7a\xfd\x1f" + bytes(4093), "4098 bytes"),
    ],
)
def test_a_hop_message_that_lacks_something_is_refused(body, why):
    with pytest.raises(RemoteProtocolError, match=why):
        circuit.decode_hop(body)


@pytest.mark.parametrize("body", [b"", b"\x08\x02", b"\x08\x01", b"\x08\x00", b"\x20\x64"])
def test_a_stop_message_that_lacks_something_is_refused(body):
    with pytest.raises(RemoteProtocolError):
        circuit.decode_stop(body)


# -- reading from a stream -----------------------------------------------------------------------


async def heard(data: bytes, *, then_end: bool = True) -> FakeStream:
    ours, theirs = stream_pair()
    await theirs.write(data)
    if then_end:
        theirs.end()
    return ours


@pytest.mark.parametrize("length", [2, 127, 128, 300, 4096])
async def test_not_a_byte_is_read_past_a_message(length):
    """Protobuf takes unknown fields, so a message of any length can be made."""
    body = PbHop(type=PbHop.RESERVE).SerializeToString()
    if length > 2:
        padding = length - len(body) - (2 if length - 4 < 128 else 3)
        body += encode_padding(padding)
    assert len(body) == length
    stream = await heard(encode_varint_prefixed(body) + b"noise")
    assert await circuit.read_hop(stream) == Reserve()
    assert await stream.read(100) == b"noise"


def encode_padding(size: int) -> bytes:
    return (
        b"\x7a"
        + (bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7]))
        + (bytes(size))
    )


@pytest.mark.parametrize(
    "prefix",
    [b"\x00", b"\x80\x00", b"\x82\x00", b"\x81\x20", b"\xff\xff\x03", b"\xff\xff\xff\xff\x0f"],
)
async def test_a_length_of_nothing_or_too_much_is_refused_before_the_body(prefix):
    stream = await heard(prefix, then_end=False)
    with pytest.raises(RemoteProtocolError):
        await circuit.read_hop(stream)
    assert stream.largest_read == 1


@pytest.mark.parametrize("body", [circuit.encode_hop(Connect(A)), b"\x08\x00" * 200])
async def test_half_a_message_and_an_end_is_unreachable_wherever_it_is_cut(body):
    whole = encode_varint_prefixed(body)
    for kept in range(len(whole)):
        with pytest.raises(PeerUnreachable, match="ended"):
            await circuit.read_hop(await heard(whole[:kept]))


async def test_a_byte_now_and_then_does_not_hold_a_reader(autojump_clock):
    ours, theirs = stream_pair()

    async def drip() -> None:
        for byte in encode_varint_prefixed(circuit.encode_hop(Connect(A))):
            await theirs.write(bytes([byte]))
            await trio.sleep(3)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drip)
        with pytest.raises(PeerUnreachable, match="10 s"):
            await circuit.read_hop(ours, seconds=10)
        assert trio.current_time() == pytest.approx(10)
        nursery.cancel_scope.cancel()


@given(st.lists(HOPS, min_size=1, max_size=3))
@settings(max_examples=15)
def test_property_messages_follow_each_other_and_are_what_the_librarys_classes_read(messages):
    async def once() -> None:
        ours, theirs = stream_pair()
        for message in messages:
            await circuit.write_message(ours, circuit.encode_hop(message))
        expected = b"".join(encode_varint_prefixed(circuit.encode_hop(m)) for m in messages)
        assert theirs.unread == len(expected)
        for message in messages:
            assert await circuit.read_hop(theirs) == message
            library = PbHop.FromString(circuit.encode_hop(message))
            if isinstance(message, Connect):
                assert ID(library.peer.id).to_base58() == message.peer

    trio.run(once)


# -- asking a relay ------------------------------------------------------------------------------


async def answered(work, answer: bytes):
    """Run ``work`` against a relay that answers so; return what it heard and the outcome."""
    ours, relay = stream_pair()
    await relay.write(encode_varint_prefixed(answer))
    outcome = await work(ours)
    return await circuit.read_hop(relay), outcome


GRANT = Answer(Status.OK, 10_000, (b"here",), Limit(60, 1000))


async def test_a_reservation_says_how_long_and_what_limits_hold():
    asked, got = await answered(
        lambda s: circuit.reserve(s, wall=lambda: 6_400.0), circuit.encode_hop(GRANT)
    )
    assert asked == Reserve()
    assert got == Reservation(3_600.0, limit_bytes=1000, limit_seconds=60, addresses=(b"here",))


@pytest.mark.parametrize(("now", "believed"), [(9_999.0, 60.0), (20_000.0, 60.0), (-1e6, 3600.0)])
async def test_a_clock_that_is_wrong_changes_what_is_believed_within_bounds(now, believed):
    _, got = await answered(
        lambda s: circuit.reserve(s, wall=lambda: now), circuit.encode_hop(GRANT)
    )
    assert got.expires_in == believed


async def test_only_the_first_addresses_of_a_relay_are_kept():
    many = Answer(Status.OK, 1, tuple(bytes([n]) for n in range(50)))
    _, got = await answered(circuit.reserve, circuit.encode_hop(many))
    assert got.addresses == many.addresses[:8]


REFUSALS = [each for each in Status if each is not Status.OK]


@pytest.mark.parametrize("status", REFUSALS)
async def test_a_refused_reservation_says_why(status):
    with pytest.raises(PeerUnreachable, match=status.words):
        await answered(circuit.reserve, circuit.encode_hop(Answer(status)))


@pytest.mark.parametrize("status", REFUSALS)
async def test_a_refused_circuit_says_why(status):
    with pytest.raises(PeerUnreachable, match=status.words):
        await answered(lambda s: circuit.connect(s, B), circuit.encode_hop(Answer(status)))


@pytest.mark.parametrize("answer", [circuit.encode_hop(Reserve()), b"\x08\x02", b"\xff\xff"])
@pytest.mark.parametrize("work", [circuit.reserve, lambda s: circuit.connect(s, B)])
async def test_an_answer_that_is_none_is_a_protocol_error(work, answer):
    with pytest.raises(RemoteProtocolError):
        await answered(work, answer)


async def test_a_granted_reservation_without_an_end_is_a_protocol_error():
    with pytest.raises(RemoteProtocolError, match="until when"):
        await answered(circuit.reserve, circuit.encode_hop(Answer(Status.OK)))


async def test_after_an_ok_the_stream_is_the_circuit_from_its_first_byte():
    ours, relay = stream_pair()
    await relay.write(encode_varint_prefixed(circuit.encode_hop(Answer(Status.OK))) + b"hello")
    await circuit.connect(ours, B)
    assert await ours.read(100) == b"hello"
    assert await circuit.read_hop(relay) == Connect(B)


@pytest.mark.parametrize(
    ("work", "seconds"),
    [(circuit.reserve, 10), (lambda s: circuit.connect(s, B), 20), (circuit.accept_stop, 10)],
)
async def test_a_silent_relay_is_given_up(work, seconds, autojump_clock):
    ours, _relay = stream_pair()
    with pytest.raises(PeerUnreachable, match="no progress"):
        await work(ours)
    assert trio.current_time() == pytest.approx(seconds)


# -- being reached -------------------------------------------------------------------------------


async def test_a_circuit_is_accepted_and_says_from_whom():
    ours, relay = stream_pair()
    await relay.write(encode_varint_prefixed(circuit.encode_stop(Connect(A))) + b"hello")
    assert await circuit.accept_stop(ours) == A
    assert await circuit.read_stop(relay) == Answer(Status.OK)
    assert await ours.read(100) == b"hello"


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        (b"\xff\xff", Status.MALFORMED_MESSAGE, RemoteProtocolError),
        (
            PbStop(type=PbStop.CONNECT).SerializeToString(),
            Status.MALFORMED_MESSAGE,
            RemoteProtocolError,
        ),
        (circuit.encode_stop(Answer(Status.OK)), Status.UNEXPECTED_MESSAGE, RemoteProtocolError),
        (circuit.encode_stop(Connect(B)), Status.PERMISSION_DENIED, PeerUnreachable),
    ],
)
async def test_what_is_not_an_admitted_circuit_is_answered_with_the_status(body, status, error):
    ours, relay = stream_pair()
    await relay.write(encode_varint_prefixed(body))
    with pytest.raises(error):
        await circuit.accept_stop(ours, admits=lambda peer: peer == A)
    assert await circuit.read_stop(relay) == Answer(status)
