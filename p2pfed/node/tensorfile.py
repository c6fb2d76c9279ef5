"""The header of a safetensors file whose data somebody writes piece by piece.

The library writes whole files from whole arrays; a model on its way is converted as it is written.
The format is that of safetensors 0.5: eight bytes of length, JSON, then the tensors one after the
other; the header is padded with spaces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["FLOAT", "header"]

FLOAT = np.dtype("<f4")


def header(
    names: Sequence[str],
    length: int,
    metadata: Mapping[str, str] | None = None,
    *,
    size: int | None = None,
) -> bytes:
    """All that stands before the data of tensors of shape (length,), float32, in this order.

    Args:
        names: Of the tensors.
        length: Of each.
        metadata: Texts that go with them.
        size: Bytes that it takes; None for what is needed, a multiple of 8.
    """
    each = FLOAT.itemsize * length
    described: dict[str, Any] = {
        name: {
            "dtype": "F32",
            "shape": [length],
            "data_offsets": [number * each, (number + 1) * each],
        }
        for number, name in enumerate(names)
    }
    if metadata:
        described["__metadata__"] = dict(metadata)
    text = json.dumps(described).encode("ascii")
    padded = text.ljust(len(text) + -len(text) % 8 if size is None else size - 8)
    return len(padded).to_bytes(8, "little") + padded
