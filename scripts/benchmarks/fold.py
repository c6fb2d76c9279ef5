"""The fold of 16 deltas over 10 million parameters, against streaming the same bytes.

The baseline is what any fold must at least do, in plain numpy: add the values of all payloads,
one payload after the other, to an int32 accumulator (the narrowest type that holds their sum; where
a payload is sparse, as if its values lay side by side), and add a number to every array of the
state that the outer step reads and writes. Neither weights, norms, index look-ups nor the roots and
quotients of the optimiser are in it. `/outer step` folds empty payloads: the least that a round can
cost, however little is released.

The worst that one member can cost the others is to send everything as late as it may, so that old
rounds are folded again and again. With t the time of a fold, in shares of one CPU:
* `/late`: each delta hot_rounds late, when it is still folded in at the next round start:
  hot_rounds * t per round, here of 60 s;
* `/older`: still later ones, which wait for the next late interval, of a run of 1000 rounds from
  its first on: 1000 * t per late_interval_s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from plain import run_of
from rows import Row, interleaved, parser, show

from p2pfed.gossip.fold import ModelState, Weighted, fold_round, genesis_state
from p2pfed.identity.run import Outer
from p2pfed.wire.payload import Payload

SIZE = 10_000_000
MEMBERS = 16
ROUND_S, RUN_ROUNDS = 60.0, 1000
OUTERS = (Outer("fedavg", 1.0), Outer("fedadam", 0.03))
SHARES = {"outer step": 0.0, "1 %": 0.01, "10 %": 0.1, "dense": 1.0}


def payloads_of(share: float) -> list[Payload]:
    """One payload per member; norms differ, so that half of them are clipped."""
    rng = np.random.default_rng(1)
    made = []
    for i in range(MEMBERS):
        size = int(SIZE * share)
        values = rng.integers(-300 - 20 * i, 300 + 20 * i, size, np.int16)
        if share == 1.0:
            made.append(Payload.dense(values))
            continue
        gaps = rng.integers(1, 2 * SIZE // max(1, size), size)
        indices = np.cumsum(gaps)
        inside = indices < SIZE
        made.append(Payload(indices[inside], values[inside]))
    return made


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def stream(payloads: Sequence[Payload], accumulator: np.ndarray, state: ModelState) -> None:
    """The baseline, see the module docstring."""
    for payload in payloads:
        some = accumulator[: payload.values.size]
        np.add(some, payload.values, out=some)
    for array in (state.model, state.first, state.second):
        np.add(array, array.dtype.type(1), out=array)


def main() -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--times", type=int, default=5, help="folds per figure")
    args = arguments.parse_args()
    genesis = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    accumulator = np.zeros(SIZE, np.int32)
    rows = []
    for share_name, share in SHARES.items():
        payloads = payloads_of(share)
        deltas = [Weighted(payload, 100 + 37 * i) for i, payload in enumerate(payloads)]
        for outer in OUTERS:
            run = run_of(SIZE, outer, robust="clip-median")
            plain = replace(run, robust="none")
            state, other = genesis_state(genesis, run), genesis_state(genesis, run)
            clipped, unclipped, baseline = interleaved(
                [
                    lambda s=state, d=deltas, r=run: seconds(lambda: fold_round(s, d, r)),
                    lambda s=state, d=deltas, r=plain: seconds(lambda: fold_round(s, d, r)),
                    lambda s=other, p=payloads: seconds(lambda: stream(p, accumulator, s)),
                ],
                args.times,
            )
            name = f"fold/{share_name}/{outer.name}"
            for label, took in ((name, clipped), (f"{name}/unclipped", unclipped)):
                rows.append(
                    Row(
                        label,
                        1e3 * took,
                        "ms",
                        f"{1e3 * baseline:.0f} ms for plain addition",
                        took / baseline,
                        "lower",
                    )
                )
            late = run.averaging.hot_rounds * clipped / ROUND_S
            older = RUN_ROUNDS * clipped / run.averaging.late_interval_s
            rows.append(Row(f"{name}/late", 100 * late, "% of a CPU"))
            rows.append(Row(f"{name}/older", 100 * older, "% of a CPU"))
    show(rows, as_json=args.json)


if __name__ == "__main__":
    main()
