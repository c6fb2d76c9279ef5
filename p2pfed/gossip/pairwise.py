"""The average of a pair of models, exact in integers: x_i, x_j <- (n_i x_i + n_j x_j)/(n_i + n_j).

A model is a vector of int64 in *fine units*, 2**-24 of the run's grid. In one meeting j quotes its
model to i; i makes a *step* t from it and moves by -a t; t travels to j, who moves by +b t, with
a : b = n_j : n_i in lowest terms.

**The weighted sum n_i x_i + n_j x_j is conserved, exactly**, whatever was quoted, rounded or
changed by training in between: n_i a t = n_j b t, since n_i n_j / gcd(n_i, n_j) is both. t is one
vector of integers, the same bytes on both sides, and no division follows it; all remainders stay in
t, where they leave a disagreement and never a drift. (Cut off at the end of the grid's int32 range
is the one exception; models of a sane run are far from it.) So there is no mass to lose, as
push-sum loses it with every lost message, and weights never move: detailed balance, n_i w_ij =
n_j w_ji (Boyd et al. 2006, "Randomized gossip algorithms", section II).

**Encoding.** Quote and step are vectors q * 2**e: int8 or int16 values, blocks of 256 coordinates
with one exponent e each, the least that holds the block's largest value. The quote is of the
difference to the genesis, which both know. Rounding is stochastic, floor((v + u) / 2**e) with u
uniform on 0..2**e - 1, so that E q 2**e = v exactly: unbiased, each coordinate off by less than
2**e, that is 1/63 (int8) or 1/16383 (int16) of the block's largest value. After a meeting the two
disagree by less than that part of their distance from the genesis (the quote) plus that part of
what they disagreed by (the step) plus 1/16 of a grid unit (division by a + b <= 2**21).

**No robust rule.** A member sees one other model at a time and cannot tell a lie from a hospital
with other patients: one liar can ruin the model (measured: .11 accuracy where the clean run has
.88). Sizes and values are bounded here, so it cannot do more than that. Mode `set` sees all deltas,
clips them and can prove who contradicts itself: it is the default.

Pure functions over numpy vectors; who meets whom and what a crash leaves behind is in `meetings`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import gcd, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfed.errors import RemoteProtocolError

__all__ = [
    "add_change",
    "apart",
    "check_vector",
    "exchange",
    "from_grid",
    "make_step",
    "move",
    "quote",
    "shares",
    "to_grid",
    "vector_bytes",
]

Fine = NDArray[np.int64]
Chance = Callable[[int], bytes]
_Source = Callable[[slice], Fine]

FINE_BITS = 24
BLOCK = 256  # coordinates that share an exponent: 0.4 % more bytes with int8
CHUNK = 256 * BLOCK  # coordinates per pass: a few int64 arrays of it fit in a cache
LIMIT = (2**31 - 1) << FINE_BITS  # of a model, fine units: 2**55
MOST_BITS = 60  # of what a vector from a peer can move a model by: no int64 overflow
_LARGEST = {"int8": 127, "int16": 32767}
_TYPE: dict[str, np.dtype[Any]] = {"int8": np.dtype("i1"), "int16": np.dtype("<i2")}


def from_grid(model: NDArray[np.int32]) -> Fine:
    """A model on the run's grid, shape (P,), in fine units."""
    fine: Fine = model.astype(np.int64) << FINE_BITS
    return fine


def to_grid(model: Fine) -> NDArray[np.int32]:
    """A model in fine units, shape (P,), rounded to the run's grid (half up)."""
    on_grid = np.empty(model.size, np.int32)
    for part in _chunks(model.size):
        rounded = (model[part] + (1 << (FINE_BITS - 1))) >> FINE_BITS
        on_grid[part] = np.minimum(rounded, 2**31 - 1)
    return on_grid


def shares(own: int, other: int) -> tuple[int, int]:
    """By how many steps the initiator and the other one move: (a, b), a : b = other : own.

    Args:
        own: Weight of the initiator, 1 to 2**20.
        other: Weight of the other one.
    """
    if not (1 <= own <= 1 << 20 and 1 <= other <= 1 << 20):
        raise ValueError(f"weights {own} and {other} are not from 1 to 2**20")
    common = gcd(own, other)
    return other // common, own // common


# --- one meeting -------------------------------------------------------------------------------


def quote(model: Fine, genesis: Fine, values: str, chance: Chance) -> bytes:
    """What j shows of its model: the difference to the genesis, rounded.

    Args:
        model: Fine units, shape (P,).
        genesis: Likewise.
        values: `int8` or `int16`.
        chance: Gives n uniform bytes, for the rounding; not for privacy.
    """
    return _encode(model.size, lambda part: model[part] - genesis[part], values, chance)


def make_step(
    model: Fine,
    genesis: Fine,
    quoted: bytes,
    moves: tuple[int, int],
    *,
    values: str,
    chance: Chance,
) -> bytes:
    """The step t that i makes from j's quote, rounded; to be applied by both.

    Args:
        model: Of i, fine units, shape (P,).
        genesis: Likewise.
        quoted: Of j, checked by `check_vector`.
        moves: (a, b) of `shares`.
        values: `int8` or `int16`.
        chance: Gives n uniform bytes, for the rounding.
    """
    parts = moves[0] + moves[1]

    def of(part: slice) -> Fine:
        between = model[part] - genesis[part] - _decode(quoted, model.size, values, part)
        step: Fine = (between + (parts >> 1)) // parts
        return step

    return _encode(model.size, of, values, chance)


def move(model: Fine, step: bytes, times: int, values: str) -> None:
    """Add `times` steps to a model, in place: -a on i's side, b on j's.

    Args:
        model: Fine units, shape (P,).
        step: Checked by `check_vector` with this `times`.
        times: How many steps.
        values: `int8` or `int16`.
    """
    for part in _chunks(model.size):
        moved = model[part] + times * _decode(step, model.size, values, part)
        model[part] = np.clip(moved, -LIMIT, LIMIT)


def apart(step: bytes, size: int, moves: tuple[int, int], values: str, grid_bits: int) -> float:
    """How far from each other the two models were, as the step tells: their difference's length.

    A step is the difference over a + b, rounded, so no more than the encoding is lost. For a
    random pair of n models half of its mean square is the mean square of their distances from
    the mean, the consensus distance.

    Args:
        step: Checked by `check_vector`.
        size: P.
        moves: (a, b) of `shares`.
        values: `int8` or `int16`.
        grid_bits: The run's grid.
    """
    square = 0.0
    for part in _chunks(size):
        piece = _decode(step, size, values, part).astype(np.float64)
        square += float(np.square(piece).sum())
    return sqrt(square) * sum(moves) * 2.0 ** -(grid_bits + FINE_BITS)


def add_change(model: Fine, indices: NDArray[np.int64] | slice, values: NDArray[np.int16]) -> None:
    """Add the change by local training, multiples of the grid, in place."""
    moved = model[indices] + (values.astype(np.int64) << FINE_BITS)
    model[indices] = np.clip(moved, -LIMIT, LIMIT)


def exchange(
    x_i: Fine,
    x_j: Fine,
    n_i: int,
    n_j: int,
    *,
    genesis: Fine,
    values: str = "int8",
    chance: Chance,
) -> tuple[Fine, Fine]:
    """One whole meeting of two models at one place, as the network would do it.

    Args:
        x_i: Of the initiator, fine units (see `from_grid`), shape (P,).
        x_j: Of the other one.
        n_i: Weight of the initiator.
        n_j: Weight of the other one.
        genesis: What both know.
        values: `int8` or `int16`.
        chance: Gives n uniform bytes, for the rounding.

    Returns:
        Both models afterwards; n_i x_i + n_j x_j is what it was.
    """
    moves = shares(n_i, n_j)
    quoted = quote(x_j, genesis, values, chance)
    step = make_step(x_i, genesis, quoted, moves, values=values, chance=chance)
    x_i, x_j = x_i.copy(), x_j.copy()
    move(x_i, step, -moves[0], values)
    move(x_j, step, moves[1], values)
    return x_i, x_j


# --- vectors on the wire -----------------------------------------------------------------------


def vector_bytes(size: int, values: str) -> int:
    """Length of an encoded vector of `size` coordinates."""
    width: int = _TYPE[values].itemsize
    return -(-size // BLOCK) + width * size


def check_vector(data: bytes, size: int, values: str, *, times: int = 1) -> None:
    """Refuse what a peer may not send; no other input is trusted before this.

    Args:
        data: An encoded vector.
        size: P, our own number.
        values: `int8` or `int16`.
        times: By how many of it a model will be moved.

    Raises:
        RemoteProtocolError: Wrong length, or values beyond any model's.
    """
    if len(data) != vector_bytes(size, values):
        raise RemoteProtocolError(f"a vector of {len(data)} bytes is not one of this run")
    exponents = np.frombuffer(data, np.uint8, -(-size // BLOCK))
    bits = int(exponents.max(initial=0)) + _LARGEST[values].bit_length()
    if bits + int(times).bit_length() > MOST_BITS:
        raise RemoteProtocolError("a vector holds values that no model can have")


def _chunks(size: int) -> Iterator[slice]:
    for start in range(0, size, CHUNK):
        yield slice(start, min(start + CHUNK, size))


def _encode(size: int, of: _Source, values: str, chance: Chance) -> bytes:
    exponents = np.empty(-(-size // BLOCK), np.uint8)
    coded = np.empty(size, _TYPE[values])
    for part in _chunks(size):
        vector = of(part)
        blocks = np.zeros((-(-vector.size // BLOCK), BLOCK), np.int64)
        blocks.reshape(-1)[: vector.size] = vector
        powers = _exponents(blocks, _LARGEST[values])
        noise = _noise(blocks.size, int(powers.max()), chance).reshape(blocks.shape)
        blocks = (blocks + (noise & ((np.int64(1) << powers) - 1))) >> powers
        exponents[part.start // BLOCK :][: powers.size] = powers[:, 0]
        coded[part] = blocks.reshape(-1)[: vector.size]
    return bytes(exponents) + coded.tobytes()


def _noise(size: int, bits: int, chance: Chance) -> NDArray[np.int64]:
    """Integers whose lowest `bits` bits are uniform."""
    kind = np.dtype("<u4" if bits <= 32 else "<u8")
    return np.frombuffer(chance(kind.itemsize * size), kind).astype(np.int64)


def _exponents(blocks: NDArray[np.int64], largest: int) -> NDArray[np.int64]:
    """For each block, shape (B, 1), the least e with max |v| <= largest * 2**e (or one more)."""
    most = np.abs(blocks).max(axis=1, keepdims=True)
    bits = np.frexp(most.astype(np.float64))[1].astype(np.int64)
    powers: NDArray[np.int64] = np.maximum(bits - largest.bit_length(), 0)
    powers += most > (np.int64(largest) << powers)
    return powers


def _decode(data: bytes, size: int, values: str, part: slice) -> Fine:
    blocks = -(-size // BLOCK)
    kind = _TYPE[values]
    count = part.stop - part.start
    coded = np.frombuffer(data, kind, count, blocks + kind.itemsize * part.start)
    first = part.start // BLOCK
    powers = np.frombuffer(data, np.uint8, -(-count // BLOCK), first)
    spread = np.repeat(powers.astype(np.int64), BLOCK)[:count]
    vector: Fine = coded.astype(np.int64) << spread
    return vector
