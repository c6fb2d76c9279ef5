"""Sets of seats: what is decoded is what was encoded, in few bytes, and never beyond the roster."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfed.errors import RemoteProtocolError
from p2pfed.wire.seats import decode_seats, encode_seats, seats_in

SIZES = st.integers(0, 1024)


@st.composite
def sets_of_seats(draw):
    """A size, and a set of that size that is sparse, dense or anything."""
    size = draw(SIZES)
    seats = st.integers(0, max(0, size - 1))
    some = draw(st.sets(seats, max_size=20)) if size else set()
    bits = sum(1 << seat for seat in some)
    kind = draw(st.sampled_from(["sparse", "dense", "any"]))
    if kind == "dense":
        bits ^= (1 << size) - 1
    if kind == "any":
        bits = draw(st.integers(0, (1 << size) - 1))
    return size, bits


@given(sets_of_seats())
def test_decode_of_encode_is_the_set_itself_and_no_longer_than_a_bit_field(case):
    size, bits = case
    data = encode_seats(bits, size)
    assert decode_seats(data, size) == bits
    assert len(data) <= 1 + (size + 7) // 8


@given(st.integers(0, (1 << 300) - 1))
def test_the_seats_of_a_set_are_its_bits(bits):
    seats = seats_in(bits)
    assert seats == sorted(set(seats))
    assert sum(1 << seat for seat in seats) == bits


@pytest.mark.parametrize(
    ("missing", "longest"), [(set(), 1), ({500}, 3), ({0, 999}, 6), (set(range(1, 1000)), 2)]
)
def test_nearly_empty_and_nearly_full_sets_take_a_few_bytes(missing, longest):
    everybody = (1 << 1000) - 1
    bits = everybody - sum(1 << seat for seat in missing)
    assert len(encode_seats(bits, 1000)) <= longest
    assert len(encode_seats(everybody ^ bits, 1000)) <= longest


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (b"", 8),
        (b"\x03", 8),
        (b"\x00\x00\x01", 8),  # seat 8 of 8
        (b"\x01\x08", 8),
        (b"\x02\x08", 8),
        (b"\x01" + b"\xff" * 128 + b"\x00", 1024),
    ],
)
def test_a_seat_beyond_the_roster_and_an_unknown_form_are_refused(data, size):
    with pytest.raises(RemoteProtocolError):
        decode_seats(data, size)


@given(st.binary(max_size=129), SIZES)
def test_random_bytes_are_a_set_of_the_roster_or_refused(data, size):
    try:
        bits = decode_seats(data, size)
    except RemoteProtocolError:
        return
    assert 0 <= bits < 1 << size
