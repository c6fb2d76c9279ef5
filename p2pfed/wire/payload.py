"""The released part of a delta: gap-coded indices and int16 values on the run's grid.

Layout, little endian: `K` (uint32), then K gaps (uint16), then K values (int16). The first gap is
the first index, each later gap the distance to the index before. A gap that needs more than 16 bits
is carried by filler entries: gap 0xFFFF with value 0, which advance by 65535 and name no index. So
the bytes are 4 per released coordinate plus 4 for each run of 65535 untouched ones.

Invariant: decoding returns strictly increasing indices below `num_parameters`, or refuses; and
`decode(encode(p)) == p`. Vectorised both ways.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2pfed.errors import RemoteProtocolError

__all__ = ["Payload", "decode_payload", "encode_payload", "max_payload_bytes"]

_FILL = 0xFFFF


@dataclass(frozen=True, slots=True, eq=False)
class Payload:
    """A sparse vector on the run's grid.

    Attributes:
        indices: Strictly increasing positions, shape (K,), int64.
        values: Multiples of the grid, shape (K,), int16.
    """

    indices: NDArray[np.int64]
    values: NDArray[np.int16]

    def __post_init__(self) -> None:
        if self.indices.shape != self.values.shape or self.indices.ndim != 1:
            raise ValueError(f"{self.indices.shape=} and {self.values.shape=} must be equal 1-d")

    def __repr__(self) -> str:
        return f"Payload(K={self.indices.size})"


def max_payload_bytes(num_parameters: int, max_released: int) -> int:
    """The longest encoding that `decode_payload` accepts for these bounds, bytes."""
    return 4 + 4 * (max_released + num_parameters // _FILL + 1)


def encode_payload(payload: Payload) -> bytes:
    """Encode a payload; see the module docstring for the layout.

    Raises:
        ValueError: The indices are not strictly increasing from 0 up.
    """
    gaps = np.diff(payload.indices, prepend=np.int64(0))
    if gaps.size and (payload.indices[0] < 0 or (gaps[1:] <= 0).any()):
        raise ValueError("indices must be strictly increasing and not negative")
    fillers = gaps // _FILL
    total = int(gaps.size + fillers.sum())
    ends = np.cumsum(fillers + 1) - 1  # where each real entry lands behind its fillers
    coded = np.full(total, _FILL, dtype="<u2")
    coded[ends] = (gaps - fillers * _FILL).astype("<u2")
    values = np.zeros(total, dtype="<i2")
    values[ends] = payload.values
    return struct.pack("<I", total) + coded.tobytes() + values.tobytes()


def decode_payload(data: bytes, *, num_parameters: int, max_released: int) -> Payload:
    """Decode and check a payload from a peer.

    Args:
        data: The encoded bytes.
        num_parameters: Length of the model's flat vector; our own number, never the sender's.
        max_released: Most coordinates that the run allows in one delta.

    Raises:
        RemoteProtocolError: Wrong length, too many entries, or an index out of order or range.
    """
    if not 4 <= len(data) <= max_payload_bytes(num_parameters, max_released):
        raise RemoteProtocolError(f"a payload of {len(data)} bytes is outside the run's limits")
    (total,) = struct.unpack_from("<I", data)
    if len(data) != 4 + 4 * total:
        raise RemoteProtocolError(f"a payload of {len(data)} bytes claims {total} entries")
    gaps = np.frombuffer(data, "<u2", total, 4).astype(np.int64)
    values = np.frombuffer(data, "<i2", total, 4 + 2 * total)
    positions = np.cumsum(gaps)
    filler = gaps == _FILL
    if values[filler].any() or (total and filler[-1]):
        raise RemoteProtocolError("a filler entry of the payload carries a value or ends it")
    indices, kept = positions[~filler], values[~filler].astype(np.int16)
    if indices.size > max_released:
        raise RemoteProtocolError(f"{indices.size} coordinates; the run allows {max_released}")
    if indices.size and (indices[-1] >= num_parameters or (np.diff(indices) <= 0).any()):
        raise RemoteProtocolError("payload indices are out of order or out of range")
    return Payload(indices, kept)
