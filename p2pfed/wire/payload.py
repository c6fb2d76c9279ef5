"""The released part of a delta: integers on the run's grid, sparse or dense, 16 or 8 bits each.

Layout, little endian: layout (uint8: 0 sparse, 1 dense), bits of a value (uint8: 16 or 8), exponent
e (uint16), number of coordinates K (uint32); if sparse the gaps (uint16 each); then the values.

* Sparse: the first gap is the first index, each later gap the distance to the index before. A gap
  that needs more than 16 bits is carried by filler entries: gap 0xFFFF with value 0, which advance
  by 65535 and name no index. So there are K entries and one for each run of 65535 untouched ones.
* Dense: the values of all P coordinates, zeros included, and no gap; K = P.
* 16 bits: a value is its int16, e = 0. 8 bits: a value is q * 2**e, |q| <= 127, 0 <= e <= 8, and e
  is the least that holds the largest value. Every decoded value fits int16.

A payload is written dense exactly where that is shorter, so its length is at most that of
`max_payload_bytes`: what a hospital was shown.

Invariant: decoding returns strictly increasing indices below `num_parameters`, or refuses; what
decodes is canonical; `decode(encode(p))` is the same vector. Vectorised both ways. What a value is
worth (the grid) and how it is rounded is not here: `training/local.py`.
"""

from __future__ import annotations

import struct
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from p2pfed.errors import RemoteProtocolError

__all__ = [
    "HEAD_BYTES",
    "MOST_EXPONENT",
    "MOST_INT8",
    "Payload",
    "count_released",
    "decode_payload",
    "encode_payload",
    "least_exponent",
    "max_payload_bytes",
]

MOST_INT8: Final = 127  # symmetric: -128 is refused
MOST_EXPONENT: Final = 8  # 127 * 2**8 fits int16

_Coded = NDArray[np.signedinteger[Any]]
_Width = np.dtype[np.signedinteger[Any]]

_HEAD = struct.Struct("<BBHI")
HEAD_BYTES: Final = _HEAD.size
_SPARSE, _DENSE = 0, 1
_FILL = 0xFFFF
_GAP = np.dtype("<u2")
_VALUE: dict[str, _Width] = {"int16": np.dtype("<i2"), "int8": np.dtype("i1")}


@final
class Payload:
    """A vector on the run's grid, sparse or dense; not changed once made.

    Args:
        indices: Strictly increasing positions, shape (K,), int64; None for all of them.
        values: Multiples of the grid, shape (K,), int16; may be read-only.

    Attributes:
        values: As given.

    Raises:
        ValueError: The shapes differ.
    """

    __slots__ = ("_indices", "values")

    def __init__(self, indices: NDArray[np.int64] | None, values: NDArray[np.int16]) -> None:
        shape = values.shape if indices is None else indices.shape
        if shape != values.shape or values.ndim != 1:
            raise ValueError(f"indices of {shape} and {values.shape=} must be equal 1-d")
        self._indices = indices
        self.values = values

    @classmethod
    def dense(cls, values: NDArray[np.int16]) -> Payload:
        """The payload of all P coordinates, shape (P,); its indices are made when asked for."""
        return cls(None, values)

    @property
    def is_dense(self) -> bool:
        """Whether `values` are those of all coordinates, in order."""
        return self._indices is None

    @property
    def indices(self) -> NDArray[np.int64]:
        """Strictly increasing positions, shape (K,), int64; for a dense one made at each call."""
        return np.arange(self.values.size) if self._indices is None else self._indices

    def __repr__(self) -> str:
        return f"Payload(K={self.values.size}{', dense' if self.is_dense else ''})"


def max_payload_bytes(num_parameters: int, max_released: int, width: str = "int16") -> int:
    """The longest encoding that `decode_payload` accepts for these bounds, bytes."""
    each = _VALUE[width].itemsize
    sparse = (_GAP.itemsize + each) * (max_released + num_parameters // _FILL)
    return HEAD_BYTES + min(sparse, each * num_parameters)


def least_exponent(largest: float) -> int:
    """The least e with `largest` <= 127 * 2**e; at most 8, which may be too little.

    Args:
        largest: The largest magnitude of a vector, in units of the grid.
    """
    return next((e for e in range(MOST_EXPONENT) if largest <= MOST_INT8 << e), MOST_EXPONENT)


def encode_payload(payload: Payload, *, num_parameters: int, width: str = "int16") -> bytes:
    """Encode a payload in the shorter layout; see the module docstring.

    Args:
        payload: What to write.
        num_parameters: P, the length of the model's flat vector.
        width: The run's `encoding.values`.

    Raises:
        ValueError: The indices are not strictly increasing from 0 and below P, or a value is not
            one of 127 * 2**e to -127 * 2**e in steps of 2**e.
    """
    kept, count = payload.values, payload.values.size
    coded, exponent = (kept, 0) if width == "int16" else _to_int8(kept)
    coded = np.ascontiguousarray(coded, _VALUE[width])
    if payload.is_dense:
        if count != num_parameters:
            raise ValueError(f"a dense payload of {count} values for {num_parameters} parameters")
        return _written(_DENSE, coded, exponent, count)
    gaps = _gaps(payload.indices, num_parameters)
    fillers = gaps // _FILL if count and int(gaps.max()) >= _FILL else None
    entries = count if fillers is None else count + int(fillers.sum())
    if (_GAP.itemsize + coded.itemsize) * entries > coded.itemsize * num_parameters:
        everything = np.zeros(num_parameters, coded.dtype)
        everything[payload.indices] = coded
        return _written(_DENSE, everything, exponent, num_parameters)
    if fillers is None:
        return _written(_SPARSE, coded, exponent, count, gaps.astype(_GAP))
    ends = np.cumsum(fillers + 1) - 1  # where each real entry lands behind its fillers
    short = np.full(entries, _FILL, _GAP)
    short[ends] = gaps - fillers * _FILL
    padded = np.zeros(entries, coded.dtype)
    padded[ends] = coded
    return _written(_SPARSE, padded, exponent, count, short)


def count_released(data: bytes) -> int:
    """How many coordinates an encoding that was made here carries: the delta's `num_released`."""
    count: int = _HEAD.unpack_from(data)[3]
    return count


def decode_payload(
    data: bytes, *, num_parameters: int, max_released: int, width: str = "int16"
) -> Payload:
    """Decode and check a payload from a peer.

    Args:
        data: The encoded bytes; int16 values of the result are a view of them.
        num_parameters: Length of the model's flat vector; our own number, never the sender's.
        max_released: Most coordinates other than zero that the run allows in one delta.
        width: The run's `encoding.values`.

    Raises:
        RemoteProtocolError: Another width than the run's, wrong length, too many entries, an index
            out of order or range, a value or an exponent out of range, or not the shortest form.
    """
    most = max_payload_bytes(num_parameters, max_released, width)
    if not HEAD_BYTES <= len(data) <= most:
        raise RemoteProtocolError(f"a payload of {len(data)} bytes; the run allows {most}")
    layout, bits, exponent, count = _HEAD.unpack_from(data)
    dtype = _VALUE[width]
    if bits != 8 * dtype.itemsize:
        raise RemoteProtocolError(f"a payload of {bits}-bit values; the run's are {width}")
    if exponent > (MOST_EXPONENT if width == "int8" else 0):
        raise RemoteProtocolError(f"a payload with the exponent {exponent}")
    if layout == _DENSE:
        payload = _dense(data, dtype, exponent, count, num_parameters)
        if max_released < count and np.count_nonzero(payload.values) > max_released:
            raise RemoteProtocolError(f"a dense payload; the run allows {max_released} coordinates")
        return payload
    if layout != _SPARSE:
        raise RemoteProtocolError(f"a payload of the unknown layout {layout}")
    if count > max_released:
        raise RemoteProtocolError(f"{count} coordinates; the run allows {max_released}")
    return _sparse(data, dtype, exponent, count, num_parameters)


def _dense(data: bytes, dtype: _Width, exponent: int, count: int, num_parameters: int) -> Payload:
    if count != num_parameters or len(data) != HEAD_BYTES + dtype.itemsize * count:
        raise RemoteProtocolError(f"{len(data)} bytes claim {count} values, dense")
    coded = np.frombuffer(data, dtype, count, HEAD_BYTES)
    return Payload.dense(_from_coded(coded, exponent))


def _sparse(data: bytes, dtype: _Width, exponent: int, count: int, num_parameters: int) -> Payload:
    entries, rest = divmod(len(data) - HEAD_BYTES, _GAP.itemsize + dtype.itemsize)
    if rest or entries < count:
        raise RemoteProtocolError(f"{len(data)} bytes claim {count} coordinates")
    if len(data) > HEAD_BYTES + dtype.itemsize * num_parameters:
        raise RemoteProtocolError(f"a sparse payload of {len(data)} bytes, longer than a dense one")
    gaps = np.frombuffer(data, _GAP, entries, HEAD_BYTES)
    coded = np.frombuffer(data, dtype, entries, HEAD_BYTES + gaps.nbytes)
    indices = gaps.astype(np.int64)  # before the sum: numpy is slow where it casts on the way
    np.cumsum(indices, out=indices)  # of at most 2**32 uint16: it fits
    named = gaps != _FILL
    if np.count_nonzero(named) != count or (entries and not named[-1]):
        raise RemoteProtocolError(f"fillers out of place, or not {count} coordinates")
    still = gaps[1:] == 0  # an index twice, unless a filler stands between
    if still.any() and (still & named[:-1]).any():
        raise RemoteProtocolError("a payload names an index twice")
    if entries and indices[-1] >= num_parameters:
        raise RemoteProtocolError(f"index {indices[-1]} of {num_parameters}")
    if count < entries:
        if coded[~named].any():
            raise RemoteProtocolError("a filler entry of the payload carries a value")
        indices, coded = indices[named], coded[named]
    return Payload(indices, _from_coded(coded, exponent))


def _gaps(indices: NDArray[np.int64], num_parameters: int) -> NDArray[np.int64]:
    gaps = np.empty(indices.size, np.int64)
    gaps[:1] = indices[:1]
    np.subtract(indices[1:], indices[:-1], out=gaps[1:])
    if gaps.size and not (
        gaps[0] >= 0 and gaps[1:].min(initial=1) > 0 and indices[-1] < num_parameters
    ):
        raise ValueError(f"indices must be strictly increasing, from 0 to below {num_parameters}")
    return gaps


def _written(
    layout: int,
    coded: _Coded,
    exponent: int,
    count: int,
    gaps: NDArray[np.uint16] | None = None,
) -> bytes:
    head = _HEAD.pack(layout, 8 * coded.itemsize, exponent, count)
    return b"".join((head, b"" if gaps is None else gaps.data, coded.data))


def _largest(values: _Coded) -> int:
    return max(int(values.max(initial=0)), -int(values.min(initial=0)))


def _to_int8(values: NDArray[np.int16]) -> tuple[NDArray[np.int8], int]:
    largest = _largest(values)
    exponent = least_exponent(largest)
    if largest > MOST_INT8 << exponent or (
        exponent and np.bitwise_or.reduce(values) & ((1 << exponent) - 1)
    ):
        raise ValueError(f"values up to {largest} are not 8-bit values times 2**{exponent}")
    coded = np.empty(values.shape, np.int8)
    np.right_shift(values, np.int16(exponent), out=coded, casting="unsafe")
    return coded, exponent


def _from_coded(coded: _Coded, exponent: int) -> NDArray[np.int16]:
    if coded.dtype.itemsize == 2:
        return coded.astype(np.int16, copy=False)
    largest = _largest(coded)
    if largest > MOST_INT8 or (exponent and 2 * largest <= MOST_INT8):
        raise RemoteProtocolError(f"8-bit values up to {largest} with the exponent {exponent}")
    values = coded.astype(np.int16)
    values <<= exponent
    return values
