"""Mutations of valid input, and a stream that plays it; for the fuzzing of every layer."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from p2pfed.network.framing import CHUNK

__all__ = ["EXTREMES", "Layer", "Tape", "mutated", "sometimes", "split", "written"]

Rng = random.Random
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**64 - 1)


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        make: An input.
        check: Feeds it; returns how many frames were accepted and how many rejected.
    """

    make: Callable[[Rng], bytes]
    check: Callable[[bytes], Awaitable[tuple[int, int]]]


def mutated(rng: Rng, data: bytes, other: bytes = b"") -> bytes:
    """Change one to four things: bits, lengths, pieces left out, doubled or from elsewhere."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(found) + 1)
        kind = rng.randrange(7)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            size, order = rng.choice((1, 2, 4, 8)), rng.choice(("big", "little"))
            value = rng.choice(EXTREMES) & (256**size - 1)
            found[at : at + size] = value.to_bytes(size, order)
        elif kind == 2:
            del found[at:]
        elif kind == 3:
            del found[at : at + rng.choice((1, 4, 12, 100))]
        elif kind == 4:
            found[at:at] = rng.randbytes(rng.choice((1, 2, 12, 40)))
        elif kind == 5:
            piece = found[at : at + rng.choice((1, 12, 60))]
            found[at:at] = piece * rng.choice((1, 1, 1, 50))
        elif other:
            cut = rng.randrange(len(other))
            found[at:] = other[cut:]
    return bytes(found)


def sometimes(rng: Rng, data: bytes, other: bytes = b"") -> bytes:
    """Mutate two thirds; one in fifty is noise alone."""
    luck = rng.random()
    if luck < 0.02:
        return rng.randbytes(rng.randrange(200))
    return data if luck < 0.33 else mutated(rng, data, other)


class Tape:
    """A stream that plays bytes in pieces, then ends, and records what is written.

    It never waits, so that a conversation is one step.
    """

    def __init__(self, heard: bytes, rng: Rng) -> None:
        self.heard, self.at = memoryview(heard), 0
        self.rng = rng
        self.written = bytearray()

    async def read(self, n: int) -> memoryview:
        assert 0 < n <= CHUNK
        count = min(n, self.rng.choice((1, 3, 40, n)))
        taken = self.heard[self.at : self.at + count]
        self.at += len(taken)
        return taken

    async def write(self, data: bytes) -> None:
        self.written += data
        assert len(self.written) < 1 << 20


def split(data: bytes) -> tuple[int, bytes, Rng]:
    """A selector, the rest, and chance that depends on the input alone."""
    rng = random.Random(int.from_bytes(data[-8:], "big") ^ len(data))
    return (data[0] if data else 0), data[1:], rng


class _Sink:
    """Takes what is written without waiting."""

    def __init__(self) -> None:
        self.written = bytearray()

    async def write(self, data: bytes) -> None:
        self.written += data


def written(work: Callable[..., Awaitable[None]], *args: object, **options: object) -> bytes:
    """What a writer of the product writes; nothing waits, so it is over with its first step."""
    sink = _Sink()
    try:
        work(sink, *args, **options).send(None)
    except StopIteration:
        return bytes(sink.written)
    raise AssertionError("it waits")
