"""The payload codec: decode(encode(p)) == p, and nothing else decodes."""

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
from p2pfed.wire.payload import Payload, decode_payload, encode_payload, max_payload_bytes

BIG = 1 << 24
VALUES = st.integers(-(1 << 15), (1 << 15) - 1)
# Indices whose gaps lie around one, two and three fillers as often as anywhere else.
GAPS = st.one_of(
    st.integers(1, 40),
    st.integers(65_530, 65_540),
    st.integers(131_065, 131_075),
    st.integers(1, 1_000_000),
)


@st.composite
def payloads(draw):
    gaps = draw(st.lists(GAPS, max_size=12))
    first = draw(st.sampled_from([0, 1, 65_534, 65_535, 65_536, 200_000]))
    indices = np.cumsum([first, *gaps])[: len(gaps)] if gaps else np.zeros(0, np.int64)
    values = draw(st.lists(VALUES, min_size=len(gaps), max_size=len(gaps)))
    return Payload(indices.astype(np.int64), np.array(values, np.int16))


def same(a: Payload, b: Payload) -> bool:
    return np.array_equal(a.indices, b.indices) and np.array_equal(a.values, b.values)


@settings(max_examples=60)
@given(payloads())
def test_decode_of_encode_is_the_payload_itself(payload):
    data = encode_payload(payload)
    again = decode_payload(data, num_parameters=BIG, max_released=payload.indices.size)
    assert same(again, payload)
    assert again.indices.dtype == np.int64
    assert again.values.dtype == np.int16
    assert encode_payload(again) == data
    assert len(data) <= max_payload_bytes(BIG, payload.indices.size)


@given(st.binary(max_size=60))
def test_what_decodes_is_canonical(data):
    """No two byte strings stand for one payload."""
    try:
        payload = decode_payload(data, num_parameters=200_000, max_released=20)
    except RemoteProtocolError:
        return
    assert encode_payload(payload) == data


def raw(gaps: list[int], values: list[int], total: int | None = None) -> bytes:
    count = len(gaps) if total is None else total
    return struct.pack(f"<I{len(gaps)}H{len(values)}h", count, *gaps, *values)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        raw([1], [1], total=2),
        raw([1], [1], total=0),
        raw([1, 0], [1, 1]),  # index 1 twice
        raw([1, 1], [1]),
        raw([0xFFFF, 1], [7, 1]),  # a filler with a value
        raw([1, 0xFFFF], [1, 0]),  # ends with a filler
        raw([0xFFFF], [0]),
        raw([100], [1]),  # index 100 of 100
        raw([0xFFFF, 50], [0, 1]),
        raw([1] * 11, [1] * 11),  # eleven where ten are allowed
        raw([1], [1]) + b"\0",
        struct.pack("<I", 0xFFFFFFFF),
        struct.pack("<I", 0xFFFFFFFF) + bytes(40),
    ],
)
def test_a_payload_outside_its_bounds_is_refused(data):
    with pytest.raises(RemoteProtocolError):
        decode_payload(data, num_parameters=100, max_released=10)


def test_an_empty_payload_is_one():
    assert decode_payload(raw([], []), num_parameters=1, max_released=1).indices.size == 0


def test_the_extremes_of_an_index_and_of_a_value_survive():
    payload = sparse({0: -(1 << 15), 99: (1 << 15) - 1})
    again = decode_payload(encode_payload(payload), num_parameters=100, max_released=2)
    assert same(again, payload)


@pytest.mark.parametrize("indices", [[-1], [3, 3], [4, 3]])
def test_indices_out_of_order_are_our_own_bug(indices):
    with pytest.raises(ValueError, match="increasing"):
        encode_payload(Payload(np.array(indices), np.ones(len(indices), np.int16)))


def test_shapes_that_differ_are_our_own_bug():
    with pytest.raises(ValueError, match="1-d"):
        Payload(np.arange(2), np.ones(3, np.int16))


def test_a_claimed_length_allocates_nothing():
    bomb = struct.pack("<I", 0xFFFFFFFF) + bytes(100)
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            decode_payload(bomb, num_parameters=1 << 30, max_released=1 << 30)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_random_bytes_raise_nothing_but_remote_protocol_error():
    rng = random.Random(1)
    refused = 0
    for _ in range(2000):
        count = rng.randrange(8)
        data = struct.pack("<I", count) + rng.randbytes(4 * count + (rng.random() < 0.1))
        try:
            decode_payload(data, num_parameters=rng.choice([1, 100, BIG]), max_released=5)
        except RemoteProtocolError:
            refused += 1
    assert 1000 < refused < 2000
