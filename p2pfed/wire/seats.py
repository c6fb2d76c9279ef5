"""Sets of seats as bits of an integer, and their shortest form on the wire.

The first byte says how the rest is to be read: a plain bit field (seat 0 is the lowest bit of the
first byte), the gaps between the seats that are in the set, or the gaps between those that are not.
A round begins and ends with nearly empty and nearly full sets, which take a few bytes so.

Invariants: decoding never gives a seat beyond `size`; an encoding is at most one byte longer than
the plain bit field.
"""

from __future__ import annotations

from p2pfed.errors import RemoteProtocolError

__all__ = ["decode_seats", "encode_seats", "seats_in"]

_PLAIN, _IN, _OUT = 0, 1, 2
_LONG = 255  # this gap byte advances by 255 and names no seat
_BITS = [[bit for bit in range(8) if byte >> bit & 1] for byte in range(256)]


def seats_in(bits: int) -> list[int]:
    """The seats of a set, ascending."""
    found, offset = [], 0
    for byte in bits.to_bytes((bits.bit_length() + 7) // 8, "little"):
        found += [offset + bit for bit in _BITS[byte]]
        offset += 8
    return found


def encode_seats(bits: int, size: int) -> bytes:
    """Encode a set of seats.

    Args:
        bits: Bit i is set if seat i is in the set; no bit from `size` on is.
        size: How many seats there are.
    """
    width = (size + 7) // 8
    count = bits.bit_count()
    if count < width:
        gaps = _gaps(bits)
        if len(gaps) < width:
            return bytes([_IN]) + gaps
    if size - count < width:
        gaps = _gaps(bits ^ ((1 << size) - 1))
        if len(gaps) < width:
            return bytes([_OUT]) + gaps
    return bytes([_PLAIN]) + bits.to_bytes(width, "little")


def decode_seats(data: bytes, size: int) -> int:
    """Decode a set of seats.

    Args:
        data: What `encode_seats` gave.
        size: How many seats there are.

    Raises:
        RemoteProtocolError: Empty, of an unknown form, or with a seat beyond `size`.
    """
    kind = data[0] if data else -1
    if kind == _PLAIN:
        bits = int.from_bytes(data[1:], "little")
    elif kind in {_IN, _OUT}:
        bits, seat = 0, -1
        for gap in data[1:]:
            seat += gap if gap == _LONG else gap + 1
            bits |= 0 if gap == _LONG else 1 << seat
    else:
        raise RemoteProtocolError("seats in an unknown form")
    if bits >> size:
        raise RemoteProtocolError(f"a seat beyond {size}")
    return bits ^ ((1 << size) - 1) if kind == _OUT else bits


def _gaps(bits: int) -> bytes:
    """For each seat how many are skipped before it."""
    gaps, last = bytearray(), -1
    for seat in seats_in(bits):
        skipped = seat - last - 1
        gaps += bytes([_LONG]) * (skipped // _LONG) + bytes([skipped % _LONG])
        last = seat
    return bytes(gaps)
