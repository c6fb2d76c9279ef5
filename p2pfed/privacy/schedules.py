"""Which blocks a sparse vector technique releases: the two schedules, drawn exactly and vectorised.

Map: `candidates` (blocks whose noisy query reaches the public threshold) -> `segmented` or
`sequential` (those that reach the noisy threshold as well); `public_positions` is the order in
which the blocks are looked at.

Both schedules test "query + Geo(l2) >= threshold + Geo(l1)", where Geo is one-sided geometric
noise.

Formal guarantee: the law of the result is exactly that of going through the blocks one by one
(`svt` says what that costs). *Skip-ahead*: the noisy threshold is never below the public one, so
only candidates with query + Geo(l2) >= threshold matter. A block with query q is one with
probability min(1, exp(-(threshold - q) / l2)), and given that, its excess over the threshold is
max(q - threshold, 0) + Geo(l2) once more, because the geometric law has no memory. Threshold noise
that no candidate meets is never drawn: it changes nothing.

Shape suffixes: B = blocks, C = candidates.

Not here: scales and costs (`svt`), the samplers (`noise`).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfed.privacy.noise import NoiseSource, Trials

__all__ = ["Candidates", "candidates", "public_positions", "segmented", "sequential"]

_CHUNK = 1 << 16  # numbers of the update that are read at a time
_AT_ONCE = 1 << 12


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Blocks whose noisy query reaches the public threshold; private until a schedule has chosen.

    Attributes:
        blocks: (C,) int32, increasing.
        excess: (C,) int32, or int64 where needed: by how much the noisy query exceeds the public
            threshold.
    """

    blocks: NDArray[np.int32]
    excess: NDArray[Any]


def candidates(
    total_D: NDArray[Any],
    *,
    block_size: int,
    threshold: int,
    scale: Fraction,
    noise: NoiseSource,
) -> Candidates:
    """Draw the query noise of all blocks, as far as it can matter.

    Args:
        total_D: (D,) integers; a block's query is the floor of its L2 norm.
        block_size: Coordinates per block.
        threshold: The public threshold in grid units.
        scale: l2, of the query noise.
        noise: Fresh noise.
    """
    found: list[NDArray[np.int32]] = []
    above: list[NDArray[Any]] = []
    for start, query_B in _queries(total_D, block_size):
        hits = noise.successes(_trials(np.maximum(threshold - query_B, 0), scale))
        found.append(hits + np.int32(start))
        excess = np.maximum(query_B[hits] - threshold, 0)
        excess += noise.geometric(excess.size, scale)
        fits = excess.max(initial=0) < 1 << 31
        above.append(excess.astype(np.int32) if fits else excess)
    return Candidates(np.concatenate(found), np.concatenate(above))


def segmented(
    found: Candidates,
    *,
    position_C: NDArray[np.int32],
    segment_blocks: int,
    scale: Fraction,
    noise: NoiseSource,
) -> NDArray[np.int32]:
    """In every segment the first block that reaches the segment's own noisy threshold.

    Args:
        found: What `candidates` returned.
        position_C: (C,) each candidate's place in the public order.
        segment_blocks: Places per segment.
        scale: l1, of the threshold noise.
        noise: Fresh noise.

    Returns:
        Blocks, increasing.
    """
    order = np.argsort(position_C)
    segments, segment_C = np.unique(position_C[order] // segment_blocks, return_inverse=True)
    threshold = noise.geometric(segments.size, scale)
    accepted = np.flatnonzero(found.excess[order] >= threshold[segment_C])
    _, first = np.unique(segment_C[accepted], return_index=True)  # then the segment stops
    return np.sort(found.blocks[order[accepted[first]]])


def sequential(
    found: Candidates,
    *,
    position_C: NDArray[np.int32],
    cutoff: int,
    scale: Fraction,
    noise: NoiseSource,
) -> NDArray[np.int32]:
    """Blocks in the public order that reach the threshold, which gets new noise after each.

    Args:
        found: What `candidates` returned.
        position_C: (C,) each candidate's place in the public order.
        cutoff: After so many it stops.
        scale: l1, of the threshold noise.
        noise: Fresh noise.

    Returns:
        Blocks, increasing.
    """
    order = np.argsort(position_C)
    fresh = _numbers(noise.geometric(min(cutoff, order.size), scale))
    accepted = array("i")
    threshold = next(fresh, None)
    for place, excess in enumerate(_numbers(found.excess, order)):
        if threshold is None:
            break
        if excess >= threshold:
            accepted.append(place)
            threshold = next(fresh, None)
    return np.sort(found.blocks[order[accepted]])


def _numbers(values: NDArray[np.int64], order: NDArray[np.intp] | None = None) -> Iterator[int]:
    """Yield the values as Python's numbers, a few at a time: these take much memory."""
    for start in range(0, values.size, _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        yield from (values[part] if order is None else values[order[part]]).tolist()


def public_positions(seed: bytes, blocks: NDArray[Any], count: int) -> NDArray[np.int32]:
    """Return the places of blocks in a public order of `count` blocks, new for each seed.

    The guarantees hold for every order. This one multiplies, adds and folds the high bits onto the
    low ones, four times, in the least range of a power of two that holds them all; places beyond
    `count` go round again. A single multiplication would do harm: where segments and `count` share
    a factor, the first places of all segments would be blocks of one residue class, say of one
    output of a layer.

    Args:
        seed: Public.
        blocks: Numbers below `count`.
        count: How many blocks there are, below 2^31.
    """
    digest = hashlib.blake2b(seed, digest_size=32, person=b"p2pfed-shuffle").digest()
    words = np.frombuffer(digest, "<u4").astype(np.uint64)
    bits = max(1, (count - 1).bit_length())
    place_C = np.empty(blocks.size, np.int32)
    for start in range(0, blocks.size, _CHUNK):
        place = blocks[start : start + _CHUNK].astype(np.uint64)
        again = np.arange(place.size)
        while again.size:
            place[again] = _mixed(place[again], words, bits)
            again = again[place[again] >= count]
        place_C[start : start + _CHUNK] = place
    return place_C


def _mixed(place: NDArray[np.uint64], words: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    """Return a permutation of the numbers below 2^bits, bits at most 31."""
    mask, fold = np.uint64((1 << bits) - 1), np.uint64(-(-bits // 2))
    for odd, plus in zip(words[:4] | np.uint64(1), words[4:], strict=True):
        place = (place * odd + plus) & mask  # below 2^31 times below 2^32
        place ^= place >> fold
    return place


def _queries(total_D: NDArray[Any], block_size: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield the first block's number and the exact floors of the norms, some blocks at a time."""
    at_once = max(1, _CHUNK // block_size)
    for start in range(0, -(-total_D.size // block_size), at_once):
        part = total_D[start * block_size : (start + at_once) * block_size]
        yield start, _floor_norms(part, block_size)


def _floor_norms(part: NDArray[Any], block_size: int) -> NDArray[np.int64]:
    """Return floor of the L2 norm of each block, exactly; squares are below 2^62."""
    if block_size == 1:
        return np.abs(part.astype(np.int64))
    largest = max(int(part.max()), -int(part.min()))
    small = largest**2 * block_size < 1 << 52
    wide = np.zeros((-(-part.size // block_size), block_size), np.float64 if small else np.int64)
    wide.ravel()[: part.size] = part
    np.square(wide, out=wide)
    if small:  # whole numbers below 2^52: sums in any order, and floors of roots, are exact
        length_B: NDArray[np.float64] = np.sqrt(wide @ np.ones(block_size))
        return length_B.astype(np.int64)
    square_B = wide.sum(axis=1)
    root_B: NDArray[np.int64] = np.sqrt(square_B.astype(np.float64)).astype(np.int64)  # within 1
    root_B -= np.square(root_B) > square_B
    root_B += np.square(root_B + 1) <= square_B
    return root_B


def _trials(gap_B: NDArray[np.int64], scale: Fraction) -> Trials:
    """Block i is a candidate with probability exp(-gap_i / scale)."""
    inverse = float(1 / scale)
    return Trials(
        count=gap_B.size,
        near=lambda asked: gap_B[asked].astype(np.float64) * inverse,
        exact=lambda i: int(gap_B[i]) / scale,
        least=float(gap_B.min()) * inverse,
        most=float(gap_B.max()) * inverse,
    )
