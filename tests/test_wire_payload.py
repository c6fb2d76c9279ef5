"""The payload codec: decode(encode(p)) is the same vector, and nothing else decodes."""

from __future__ import annotations

import random
import struct
import tracemalloc

import numpy as np
import pytest
from consortium import sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfed.errors import RemoteProtocolError
from p2pfed.wire.payload import (
    HEAD_BYTES,
    Payload,
    count_released,
    decode_payload,
    encode_payload,
    least_exponent,
    max_payload_bytes,
)

BIG = 1 << 24
WIDTHS = pytest.mark.parametrize("width", ["int16", "int8"])
# Indices whose gaps lie around one, two and three fillers as often as anywhere else.
GAPS = st.one_of(
    st.integers(1, 40),
    st.integers(65_530, 65_540),
    st.integers(131_065, 131_075),
    st.integers(1, 1_000_000),
)


def values_of(draw, count: int, width: str) -> np.ndarray:
    if width == "int16":
        some = draw(
            st.lists(st.integers(-(1 << 15), (1 << 15) - 1), min_size=count, max_size=count)
        )
        return np.array(some, np.int16)
    some = draw(st.lists(st.integers(-127, 127), min_size=count, max_size=count))
    largest = max(map(abs, some), default=0)
    exponent = draw(st.integers(0, 8)) if largest > 63 else 0
    return np.array(some, np.int16) << exponent


@st.composite
def payloads(draw, width: str):
    gaps = draw(st.lists(GAPS, max_size=12))
    first = draw(st.sampled_from([0, 1, 65_534, 65_535, 65_536, 200_000]))
    indices = np.cumsum([first, *gaps])[: len(gaps)] if gaps else np.zeros(0, np.int64)
    return Payload(indices.astype(np.int64), values_of(draw, len(gaps), width))


@st.composite
def small_models(draw, width: str):
    """A payload of a model of 1 to 30 parameters: sparse, almost dense, dense."""
    kept = np.array(draw(st.lists(st.booleans(), min_size=1, max_size=30)))
    if kept.all() and draw(st.booleans()):
        return kept.size, Payload.dense(values_of(draw, kept.size, width))
    return kept.size, Payload(np.flatnonzero(kept), values_of(draw, int(kept.sum()), width))


def same(a: Payload, b: Payload) -> bool:
    return np.array_equal(a.indices, b.indices) and np.array_equal(a.values, b.values)


def vector(payload: Payload, size: int) -> np.ndarray:
    whole = np.zeros(size, np.int16)
    whole[payload.indices] = payload.values
    return whole


@WIDTHS
@settings(max_examples=40)
@given(st.data())
def test_decode_of_encode_is_the_payload_itself(width, data):
    payload = data.draw(payloads(width))
    coded = encode_payload(payload, num_parameters=BIG, width=width)
    bounds = {"num_parameters": BIG, "max_released": payload.values.size, "width": width}
    again = decode_payload(coded, **bounds)
    assert same(again, payload)
    assert (again.indices.dtype, again.values.dtype) == (np.int64, np.int16)
    assert encode_payload(again, num_parameters=BIG, width=width) == coded
    assert len(coded) <= max_payload_bytes(BIG, payload.values.size, width)
    assert count_released(coded) == payload.values.size


@WIDTHS
@given(st.data())
def test_decode_of_encode_is_the_same_vector_in_the_shorter_layout(width, data):
    size, payload = data.draw(small_models(width))
    coded = encode_payload(payload, num_parameters=size, width=width)
    again = decode_payload(
        coded, num_parameters=size, max_released=payload.values.size, width=width
    )
    assert (vector(again, size) == vector(payload, size)).all()
    each = 2 if width == "int16" else 1
    as_sparse = (2 + each) * payload.values.size
    assert len(coded) == HEAD_BYTES + min(as_sparse, each * size)
    assert again.is_dense == (as_sparse > each * size)
    assert count_released(coded) == again.values.size == again.indices.size
    assert encode_payload(again, num_parameters=size, width=width) == coded


@WIDTHS
@settings(max_examples=100)
@given(st.data())
def test_what_decodes_is_canonical(width, data):
    """No two byte strings stand for one payload."""
    head = data.draw(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from([8, 16]),
            st.integers(0, 9),
            st.integers(0, 25),
        )
    )
    coded = struct.pack("<BBHI", *head) + data.draw(st.binary(max_size=60))
    bounds = {"num_parameters": data.draw(st.sampled_from([1, 3, 20, 200_000])), "width": width}
    try:
        payload = decode_payload(coded, max_released=20, **bounds)
    except RemoteProtocolError:
        return
    assert encode_payload(payload, **bounds) == coded


@WIDTHS
@settings(max_examples=100)
@given(st.data())
def test_an_altered_payload_is_another_legal_one_or_refused(width, data):
    size, payload = data.draw(small_models(width))
    coded = bytearray(encode_payload(payload, num_parameters=size, width=width))
    kind = data.draw(st.sampled_from(["flip", "cut", "longer"]))
    if kind == "flip":
        coded[data.draw(st.integers(0, len(coded) - 1))] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del coded[data.draw(st.integers(0, len(coded) - 1)) :]
    else:
        coded += data.draw(st.binary(min_size=1, max_size=9))
    most = payload.values.size
    bounds = {"num_parameters": size, "width": width}
    try:
        again = decode_payload(bytes(coded), max_released=most, **bounds)
    except RemoteProtocolError:
        return
    assert kind == "flip"  # another length is never legal
    assert np.count_nonzero(again.values) <= most
    assert (np.diff(again.indices) > 0).all()
    assert again.indices.size == 0 or 0 <= again.indices[0] <= again.indices[-1] < size
    assert encode_payload(again, **bounds) == bytes(coded)


def raw(gaps, values, count=None, *, layout=0, bits=16, exponent=0) -> bytes:
    """The encoding with these fields; `count` is that of the gaps which are no fillers."""
    count = sum(g != 0xFFFF for g in gaps) if count is None else count
    head = struct.pack("<BBHI", layout, bits, exponent, count)
    value = "h" if bits == 16 else "b"
    return head + struct.pack(f"<{len(gaps)}H{len(values)}{value}", *gaps, *values)


def raw8(gaps, values, count=None, **fields) -> bytes:
    return raw(gaps, values, count, bits=8, **fields)


def test_what_the_refused_ones_are_built_from_is_accepted():
    bounds = {"num_parameters": 100, "max_released": 10}
    assert same(decode_payload(raw([1, 2], [5, -6]), **bounds), sparse({1: 5, 3: -6}))
    low = decode_payload(raw8([1, 2], [-127, 3], exponent=8), width="int8", **bounds)
    assert same(low, sparse({1: -32512, 3: 768}))
    far = {"num_parameters": 70_000, "max_released": 10}
    assert same(decode_payload(raw([0xFFFF, 0], [0, 7]), **far), sparse({65_535: 7}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        raw([], [])[:-1],
        raw([1], [1], 2),  # lies about the number of coordinates
        raw([1], [1], 0),
        raw([1], [1], 1 << 31),
        raw([0xFFFF, 1], [0, 1], 2),
        raw([1, 0], [1, 1]),  # index 1 twice
        raw([0, 0], [1, 1]),
        raw([1, 1], [1]),
        raw([0xFFFF, 1], [7, 1]),  # a filler with a value
        raw([1, 0xFFFF], [1, 0]),  # ends with a filler
        raw([0xFFFF], [0]),
        raw([100], [1]),  # index 100 of 100
        raw([0xFFFF, 50], [0, 1]),
        raw([1] * 11, [1] * 11),  # eleven where ten are allowed
        raw([1], [1]) + b"\0",
        raw([1], [1], layout=2),
        raw([1], [1], layout=255),
        raw([1], [1], exponent=1),  # 16 bits have none
        raw8([1], [1]),  # another width than the run's
        raw([1], [1])[:1] + b"\x20" + raw([1], [1])[2:],
        raw([], [1] * 100, 100, layout=1),  # dense, longer than ten coordinates may be
        raw([], [], 0xFFFFFFFF),
        raw([], [0] * 20, 0xFFFFFFFF),
    ],
)
def test_a_payload_outside_its_bounds_is_refused(data):
    with pytest.raises(RemoteProtocolError):
        decode_payload(data, num_parameters=100, max_released=10)


@pytest.mark.parametrize(
    "data",
    [
        raw8([1], [100], exponent=9),
        raw8([1], [100], exponent=0x0100),
        raw8([1], [-128]),
        raw8([1], [63], exponent=1),  # exponent 0 would do
        raw8([], [], exponent=1),
        raw8([1], [0], exponent=1),
        raw([1], [1]),
        raw8([0xFFFF, 1], [1, 1]),
    ],
)
def test_eight_bit_values_out_of_their_range_are_refused(data):
    with pytest.raises(RemoteProtocolError):
        decode_payload(data, num_parameters=70_000, max_released=10, width="int8")


def test_a_dense_payload_is_legal_where_it_is_within_the_runs_bounds():
    """Of 9 parameters, 18 bytes: four sparse coordinates have 16 bytes, five would have 20."""
    kept = raw([], [1, 2, 0, 0, 3, 0, 0, 0, 4], 9, layout=1)
    again = decode_payload(kept, num_parameters=9, max_released=5)
    assert again.is_dense
    assert again.values.tolist() == [1, 2, 0, 0, 3, 0, 0, 0, 4]
    with pytest.raises(RemoteProtocolError, match="the run allows"):
        decode_payload(kept, num_parameters=9, max_released=4)


@pytest.mark.parametrize(
    ("values", "count"), [([1] * 6 + [0] * 3, 9), ([1] * 5, 9), ([1] * 10, 10), ([1] * 9, 5)]
)
def test_a_dense_payload_with_too_many_coordinates_or_another_length_is_refused(values, count):
    with pytest.raises(RemoteProtocolError):
        decode_payload(raw([], values, count, layout=1), num_parameters=9, max_released=5)


def test_a_sparse_payload_that_is_longer_than_the_dense_one_is_refused():
    long = raw([0, 1, 1], [1, 1, 1])
    assert len(decode_payload(long, num_parameters=6, max_released=6).values) == 3
    with pytest.raises(RemoteProtocolError):
        decode_payload(long, num_parameters=5, max_released=5)


def test_an_empty_payload_is_one():
    assert decode_payload(raw([], []), num_parameters=1, max_released=1).indices.size == 0
    assert encode_payload(sparse({}), num_parameters=1) == raw([], [])
    assert encode_payload(sparse({}), num_parameters=1, width="int8") == raw8([], [])


def test_the_extremes_of_an_index_and_of_a_value_survive():
    payload = sparse({0: -(1 << 15), 99: (1 << 15) - 1})
    again = decode_payload(
        encode_payload(payload, num_parameters=100), num_parameters=100, max_released=2
    )
    assert same(again, payload)


@pytest.mark.parametrize("indices", [[-1], [3, 3], [4, 3], [5, 100]])
def test_indices_out_of_order_or_range_are_our_own_bug(indices):
    payload = Payload(np.array(indices), np.ones(len(indices), np.int16))
    with pytest.raises(ValueError, match="increasing"):
        encode_payload(payload, num_parameters=100)


@pytest.mark.parametrize("values", [[129], [32_513], [-32_640], [127, 32_512], [-(1 << 15)]])
def test_values_that_eight_bits_cannot_hold_are_our_own_bug(values):
    payload = Payload(np.arange(len(values)), np.array(values, np.int16))
    with pytest.raises(ValueError, match="8-bit"):
        encode_payload(payload, num_parameters=100, width="int8")


@given(st.floats(0, 127 * 256))
def test_the_exponent_is_the_least_that_holds_the_largest_value(largest):
    exponent = least_exponent(largest)
    assert largest <= 127 * 2**exponent
    assert exponent == 0 or largest > 127 * 2 ** (exponent - 1)


def test_shapes_that_differ_are_our_own_bug():
    with pytest.raises(ValueError, match="1-d"):
        Payload(np.arange(2), np.ones(3, np.int16))
    with pytest.raises(ValueError, match="1-d"):
        Payload.dense(np.ones((2, 2), np.int16))
    with pytest.raises(ValueError, match="3 values for 4"):
        encode_payload(Payload.dense(np.ones(3, np.int16)), num_parameters=4)


def test_a_dense_payload_makes_its_indices_when_they_are_asked_for():
    coded = encode_payload(Payload.dense(np.ones(100_000, np.int16)), num_parameters=100_000)
    tracemalloc.start()
    try:
        payload = decode_payload(coded, num_parameters=100_000, max_released=100_000)
        assert tracemalloc.get_traced_memory()[1] < 10_000
    finally:
        tracemalloc.stop()
    assert (payload.indices == np.arange(100_000)).all()
    assert repr(payload) == "Payload(K=100000, dense)"


def test_a_claimed_length_allocates_nothing():
    bombs = [
        raw([], [7] * 50, 0xFFFFFFFF),
        raw([], [7] * 50, 1 << 30, layout=1),
        raw([], [7] * 50, 1 << 20),
    ]
    tracemalloc.start()
    try:
        for bomb in bombs:
            with pytest.raises(RemoteProtocolError):
                decode_payload(bomb, num_parameters=1 << 30, max_released=1 << 30)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_random_bytes_raise_nothing_but_remote_protocol_error():
    rng = random.Random(1)
    refused = 0
    for _ in range(2000):
        count = rng.randrange(5)
        head = struct.pack("<BBHI", 0, 16, 0, count)
        data = head + rng.randbytes(4 * count + (rng.random() < 0.1))
        try:
            decode_payload(data, num_parameters=rng.choice([1, 100, BIG]), max_released=5)
        except RemoteProtocolError:
            refused += 1
    assert 1000 < refused < 2000
