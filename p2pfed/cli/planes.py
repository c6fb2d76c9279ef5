"""The trainer's pictures as PNG, for dashboard and report.

Arrays come from the private socket as RAS slices (first axis, second axis) and leave as rows from
the top and columns from the left, as radiologists see them (see `report/three_planes`, which this
does without numpy, so that the command stays small).
"""

from __future__ import annotations

import base64
import binascii
import struct
import zlib

from p2pfed.errors import VersionMismatch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["as_png", "middles"]

PLANES = ("sagittal", "coronal", "axial")
_PARTS = ("image", "target", "predicted")
_MOST_PIXELS = 1 << 22


def as_png(pictures: dict[str, Any]) -> list[dict[str, Any]]:
    """Cases in the order best, median, worst.

    Args:
        pictures: As `GET /v1/pictures` of the private socket gives them.

    Returns:
        Per case `rank`, `case`, `score`, and `planes`: per plane `name`, `width` and `height` in
        pixels, `mm` (width of a pixel), `aspect` (its height by its width), `slices` (per slice
        `image`, `target` and `predicted`, base64 of a grey PNG) and in `middle` the number of
        the one to begin with.

    Raises:
        VersionMismatch: The pictures are not of this form.
    """
    try:
        return [
            {
                "rank": rank,
                "case": str(shown["case"]),
                "score": float(shown["score"]),
                "planes": [_plane(name, shown["planes"][name]) for name in PLANES],
            }
            for rank, shown in pictures.items()
        ]
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise VersionMismatch(
            "the pictures are not of the form that is known here",
            type(error).__name__,
            "restart the daemon after an update, so that both are of one version",
        ) from error


def _plane(name: str, parts: dict[str, Any]) -> dict[str, Any]:
    across, up = (float(s) for s in parts["spacing"])
    first, second = (int(n) for n in parts["image"]["shape"][-2:])
    stack = parts.get("stack") or [parts]
    middle = int(parts.get("middle", len(stack) // 2))
    if not 0 <= middle < len(stack):
        raise ValueError("middle")
    return {
        "name": name,
        "width": first,
        "height": second,
        "mm": across,
        "aspect": up / across,
        "middle": middle,
        "slices": [_slice(one) for one in stack],
    }


def middles(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same cases with the slice in the middle of each plane alone."""

    def middle(plane: dict[str, Any]) -> dict[str, Any]:
        return {**plane, "middle": 0, "slices": [plane["slices"][plane["middle"]]]}

    return [{**case, "planes": [middle(plane) for plane in case["planes"]]} for case in cases]


def _slice(parts: dict[str, Any]) -> dict[str, str]:
    return {part: _png(parts[part]) for part in _PARTS}


def _png(coded: dict[str, Any]) -> str:
    """One slice as base64 of an 8-bit grey PNG (ISO/IEC 15948), turned as it lies on the screen."""
    first, second = (int(n) for n in coded["shape"])
    data = base64.b64decode(coded["data"], validate=True)
    if len(data) != first * second or not 0 < len(data) <= _MOST_PIXELS:
        raise ValueError("shape")
    # Pixel (row, column) is value (first - 1 - column, second - 1 - row), stored at i * second + j.
    rows = (b"\0" + data[second - 1 - row :: second][::-1] for row in range(second))
    header = struct.pack(">IIBBBBB", first, second, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows), 9)), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks)
    return base64.b64encode(png).decode()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
