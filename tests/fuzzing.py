"""Feeds layers with input that a hostile peer could send, and says what must hold whatever it is.

Map: `LAYERS` names the layers (`fuzz_streams`, `fuzz_muxer`, `fuzz_facts`). Each makes an input
(mostly valid, from the product's own encoders and the golden files, then mutated) and feeds it to
the product; `play` runs many, `replay` one. An input is bytes and nothing else, so that a failure
can be kept as a file.

What must hold: nothing but the deliberate errors comes out; no frame takes a second of processor
time; memory does not grow; what is accepted is what an independent reading says, what was written,
or encodes back to the same value.

Not here: processes, totals and the command line (`scripts/fuzz.py`); sockets
(`test_network_hostile`).
"""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import trio
from fuzz_facts import WIRE
from fuzz_input import Layer
from fuzz_muxer import NOISE, YAMUX
from fuzz_streams import CIRCUIT, FRAMING, MULTISTREAM

__all__ = ["LAYERS", "Failure", "Tally", "play", "replay"]

LAYERS: dict[str, Layer] = {
    "yamux": YAMUX,
    "noise": NOISE,
    "framing": FRAMING,
    "multistream": MULTISTREAM,
    "wire": WIRE,
    "circuit": CIRCUIT,
}
MOST_GROWTH = 64 << 20  # bytes of resident memory
MOST_SECONDS = 1.0  # of processor time, for one frame
_WARM_UP = 200  # inputs before memory is measured


@dataclass(frozen=True)
class Failure:
    """An input that broke something."""

    layer: str
    data: bytes
    what: str


@dataclass
class Tally:
    """What a run of one layer came to."""

    accepted: int = 0
    rejected: int = 0
    worst: float = 0.0  # seconds of processor time for one input
    growth: int = 0  # bytes of resident memory
    failure: Failure | None = None

    @property
    def frames(self) -> int:
        return self.accepted + self.rejected


class _TooLong(BaseException):
    """Not an Exception, so that nothing takes it for a peer's mistake."""


@contextlib.contextmanager
def _watchdog(progress: Callable[[], int]) -> Iterator[None]:
    """Interrupt an input that does not come to an end."""
    seen = -1

    def look(*_: object) -> None:
        nonlocal seen
        if progress() == seen:
            raise _TooLong
        seen = progress()

    before = signal.signal(signal.SIGVTALRM, look)
    signal.setitimer(signal.ITIMER_VIRTUAL, 2 * MOST_SECONDS, 2 * MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def play(name: str, frames: int, seed: str) -> Tally:
    """Feed a layer with at least so many frames; ends early with the first failure."""
    layer, tally, number = LAYERS[name], Tally(), 0
    rng = random.Random(f"{name} {seed}")
    baseline = 0

    async def run() -> None:
        nonlocal number, baseline
        while tally.frames < frames and tally.failure is None:
            data = layer.make(rng)
            await _one(name, data, tally)
            number += 1
            if number % 64 == 0:
                await trio.lowlevel.checkpoint()  # what the loop keeps of scopes that are over
            if number == _WARM_UP:
                baseline = _resident()
            if number > _WARM_UP and number % 64 == 0:
                tally.growth = max(tally.growth, _resident() - baseline)
                if tally.growth > MOST_GROWTH:
                    tally.failure = Failure(name, data, f"memory grew by {tally.growth} bytes")

    with _watchdog(lambda: number):
        trio.run(run)
    return tally


def replay(name: str, data: bytes) -> Tally:
    """Feed one input."""
    tally = Tally()
    with _watchdog(lambda: tally.frames):
        trio.run(_one, name, data, tally)
    return tally


async def _one(name: str, data: bytes, tally: Tally) -> None:
    peak, began = _peak(), time.process_time()
    try:
        accepted, rejected = await LAYERS[name].check(data)
    except (_TooLong, Exception) as error:  # noqa: BLE001 - that is what is looked for
        tally.failure = Failure(name, data, _told(error))
        return
    took = time.process_time() - began
    tally.accepted += accepted
    tally.rejected += rejected
    tally.worst = max(tally.worst, took)
    if took > MOST_SECONDS * max(1, accepted + rejected):
        tally.failure = Failure(name, data, f"took {took:.1f} s")
    elif _peak() - peak > MOST_GROWTH:
        tally.failure = Failure(name, data, f"took {(_peak() - peak) >> 20} MiB at once")


def _told(error: BaseException) -> str:
    *_, where = traceback.extract_tb(error.__traceback__)
    return f"{error!r} at {Path(where.filename).name}:{where.lineno}: {where.line}"


def _resident() -> int:
    pages = Path("/proc/self/statm").read_text("ascii").split()[1]
    return int(pages) * resource.getpagesize()


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
