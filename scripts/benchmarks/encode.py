"""Encoding and decoding a delta's payload, in bytes of payload per second, against `memcpy`.

10^7 parameters, of which 1 %, 10 % or all are released, in 16 and in 8 bits. The baseline is
numpy's copy of as many bytes into memory that is there already, timed in turn with them. Dense
16-bit values are a view of the payload: decoding them is a check of the head and copies nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from rows import Row, interleaved, parser, show

from p2pfed.wire.payload import Payload, decode_payload, encode_payload

PARAMETERS = 10_000_000
SHARES = {"1 %": Fraction(1, 100), "10 %": Fraction(1, 10), "dense": Fraction(1)}
TIMES = 9


def main() -> int:
    """Print two rows for each share and width."""
    args = parser(__doc__).parse_args()
    rows: list[Row] = []
    for share, fraction in SHARES.items():
        for width in ("int16", "int8"):
            rows += _rows(f"{width}/{share}", round(PARAMETERS * fraction), width)
    show(rows, as_json=args.json)
    return 0


def _rows(name: str, released: int, width: str) -> list[Row]:
    payload = _payload(released, width)
    bounds = {"num_parameters": PARAMETERS, "width": width}
    data = encode_payload(payload, **bounds)
    source, target = np.frombuffer(data, np.uint8), np.empty(len(data), np.uint8)
    encode, decode, copy = interleaved(
        [
            lambda: _seconds(lambda: encode_payload(payload, **bounds)),
            lambda: _seconds(lambda: decode_payload(data, max_released=released, **bounds)),
            lambda: _seconds(lambda: np.copyto(target, source)),
        ],
        TIMES,
    )
    return [
        Row(f"{what}/{name}", len(data) / s / 1e6, "MB/s", "memcpy", copy / s, "higher")
        for what, s in (("encode", encode), ("decode", decode))
    ]


def _payload(released: int, width: str) -> Payload:
    rng = np.random.default_rng(1)
    values = rng.integers(-127, 128, released, dtype=np.int16)
    values <<= 3
    values[0] = 127 << 3
    if width == "int16":
        values += rng.integers(0, 8, released, dtype=np.int16)
    if released == PARAMETERS:
        return Payload.dense(values)
    return Payload(np.sort(rng.choice(PARAMETERS, released, replace=False)), values)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
