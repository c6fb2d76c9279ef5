"""The second implementation, 5: the fold (section 4 of `docs/protocol.md`).

Plain Python: its integers are exact, its floats are IEEE 754 doubles, its `round` rounds half to
even, and it fuses nothing. Nothing of p2pfed is imported.

Invariant: one order of operations, that of the document; so the result is equal in every bit.

Not here: which deltas are folded and with what weight (`second_formats.py`), checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import struct
from fractions import Fraction
from math import floor, isqrt, sqrt
from typing import Any

Vector = list[int]
ONE = 1 << 16


def read_genesis(file: bytes) -> list[float]:
    """The tensor `model` of a safetensors file: a uint64 length, a JSON head, then the numbers."""
    (length,) = struct.unpack_from("<Q", file)
    tensor = json.loads(file[8 : 8 + length])["model"]
    assert tensor["dtype"] == "F32"
    start, end = tensor["data_offsets"]
    return list(
        struct.unpack(f"<{(end - start) // 4}f", file[8 + length + start : 8 + length + end])
    )


# --- robust rules ------------------------------------------------------------------------------


def square(vector: Vector) -> int:
    return sum(q * q for q in vector)


def factors(norms: list[Any], present: list[bool] | None = None) -> list[int]:
    """Factors of squared norms; `present` says whose norms make the median."""
    present = present or [norm != 0 for norm in norms]
    known = sorted(norm for norm, is_there in zip(norms, present, strict=True) if is_there)
    if not known:
        return [ONE] * len(norms)
    median = known[(len(known) - 1) // 2]
    return [
        ONE if norm <= median else isqrt(floor(Fraction(median) * (1 << 32) / norm))
        for norm in norms
    ]


def mixture(vectors: list[Vector], weights: list[int], rule: str) -> tuple[list[int], Vector, int]:
    """Coefficients of the payloads, the weighted sum s and its divisor D."""
    whole = sum(weights)
    if rule == "none":
        return weights, _sum(weights, vectors), whole
    if rule == "nearest-neighbour-mixing":
        coefficients = _neighbours(vectors, weights)
        return coefficients, _sum(coefficients, vectors), 1 << 38
    clipped = [w * f for w, f in zip(weights, factors(list(map(square, vectors))), strict=True)]
    total, s = ONE * whole, _sum(clipped, vectors)
    if rule == "clip-median":
        return clipped, s, total
    centre = [round(float(each) / total) for each in s]
    norms = [square([q - v for q, v in zip(x, centre, strict=True)]) for x in vectors]
    cut = factors(norms, [any(x) for x in vectors])
    coefficients = [w * f for w, f in zip(weights, cut, strict=True)]
    rest = total - sum(coefficients)
    return coefficients, _sum([*coefficients, rest], [*vectors, centre]), total


def _sum(coefficients: list[int], vectors: list[Vector]) -> Vector:
    columns = zip(*vectors, strict=True)
    return [sum(c * q for c, q in zip(coefficients, each, strict=True)) for each in columns]


def _neighbours(vectors: list[Vector], weights: list[int]) -> list[int]:
    n = len(vectors)
    near = []
    for x in vectors:
        far = [square([a - b for a, b in zip(x, y, strict=True)]) for y in vectors]
        reach = sorted(far)[n - (n - 1) // 4 - 1]
        near.append([j for j in range(n) if far[j] <= reach])
    sums = [_sum([1] * len(group), [vectors[j] for j in group]) for group in near]
    norms = [Fraction(square(s), len(group) ** 2) for s, group in zip(sums, near, strict=True)]
    coefficients = [0] * n
    for w, f, group in zip(weights, factors(norms), near, strict=True):
        for j in group:
            coefficients[j] += (w * f << 38) // (ONE * sum(weights) * len(group))
    return coefficients


# --- the state ---------------------------------------------------------------------------------


class State:
    """Model and moments before a round.

    Args:
        genesis: The first model.
        grid_bits, robust, outer: What the run file says.
    """

    def __init__(
        self, genesis: list[float], grid_bits: int, robust: str, outer: dict[str, Any]
    ) -> None:
        self.grid, self.robust = float(1 << grid_bits), robust
        self.outer = outer
        self.model = [round(value * self.grid) for value in genesis]
        self.first, self.second = [0.0] * len(genesis), [0.0] * len(genesis)
        self.power1 = self.power2 = 1.0

    def hash(self) -> bytes:
        packed = struct.pack(f"<{len(self.model)}i", *self.model)
        return hashlib.blake2b(packed, digest_size=32).digest()

    def fold(self, vectors: list[Vector], weights: list[int]) -> None:
        """One round; without payloads nothing changes."""
        if not vectors:
            return
        _, s, total = mixture(vectors, weights, self.robust)
        outer, divisor = self.outer, float(total) * self.grid
        rate, epsilon = float(outer["learning_rate"]), float(outer["epsilon"])
        self.power1 *= outer["beta1"]
        self.power2 *= outer["beta2"]
        if outer["name"] in ("fedadam", "fedyogi") and outer["bias_correction"]:
            rho = sqrt(1 - self.power2)
            rate, epsilon = rate * rho / (1 - self.power1), epsilon * rho
        for i, each in enumerate(s):
            g = float(each) / divisor
            d = g * rate if outer["name"] == "fedavg" else self._step(i, g, rate, epsilon)
            self.model[i] = min(max(self.model[i] + round(d * self.grid), -(1 << 31)), 2**31 - 1)

    def _step(self, i: int, g: float, rate: float, epsilon: float) -> float:
        outer = self.outer
        name, beta1, beta2 = outer["name"], outer["beta1"], outer["beta2"]
        m = self.first[i] = self.first[i] * beta1 + g * (1 - beta1)
        u, v = g * g, self.second[i]
        if name == "fedadam":
            v = v * beta2 + u * (1 - beta2)
        elif name == "fedyogi":
            v = v - u * (1 - beta2) * ((v > u) - (v < u))
        else:
            v = v + u
        self.second[i] = v
        return m / (sqrt(v) + epsilon) * rate
