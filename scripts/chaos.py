"""Kills and freezes real daemons at random while they train; see scripts/chaos.

Map: `plan` draws all that will happen from the seed, `Chaos` lets it happen and measures,
`come_to_rest` waits for one model; `tests/left_on_disk.py` judges what lies on the disks after
that. One line is printed for each event.

A kill strikes the network process, its trainer, or both at once; what was killed is started again
at once (a trainer by its own daemon). *Up* is a daemon whose admin socket answers; *back* is one
that also takes part in the run and hears a peer, or a trainer that is ready under a new process id.
A frozen one is *seen* when another node says that it is suspect or away; meanwhile the kills go on
elsewhere. At the end all stop sharing; when all have folded the same deltas, they are stopped.

Ends with 1 if one of these does not hold: each daemon is back in time and contributes again; all
come to one model; every database is whole and every delta verifies; nobody signed twice for a
round; no ledger released more than was debited; and an independent fold of what each node has
stored gives the same model.

The daemons run on loopback or, with --namespaces, each in a host of its own (`tests/netlab.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from hosted import Hosted, Part, a_cast
from left_on_disk import faults_on_disk
from netlab import Lab, missing

from p2pfed.admin.client import Client
from p2pfed.demo.federation import Daemon, wait_for
from p2pfed.demo.plan import run_constants
from p2pfed.errors import P2PFedError

PARTS: dict[str, tuple[list[Part], list[int]]] = {
    "kill": (["network", "both", "trainer"], [4, 4, 2]),
    "freeze": (["network", "both", "trainer"], [5, 4, 1]),
}
EPSILON = 100
INTERVAL = 0.5  # seconds between rounds, at least
SECONDS_AN_EVENT = 90.0  # more than any event takes: the run must not end before the chaos
MOST_GAP = 6.0  # seconds between one node being back and the next event
MOST_FROZEN = 20.0
GIVE_UP = 120.0  # seconds until a node that is not back counts as lost
SETTLE = 180.0  # seconds for all to contribute again, and for all to hold the same
QUIET = 4.0  # seconds of no change that count as the end: longer than a round's deadline
POLL = 0.1
LOOK = 0.25  # the same where all others are asked


@dataclass(slots=True)
class Event:
    """One kill or freeze, and what came of it; times in seconds.

    Attributes:
        what: "kill" or "freeze".
        node: Index of the daemon.
        part: What of it.
        gap: Wait before it.
        frozen: How long it stays frozen; 0 for a kill.
        name: The daemon's name.
        at: When it happened, from the beginning of the chaos.
        seen: From the freeze until another node noticed; None if none did.
        up: From the restart until its admin socket answers.
        back: From the restart, or from the end of the freeze, until it is back; None: never.
    """

    what: str
    node: int
    part: Part
    gap: float
    frozen: float
    name: str = ""
    at: float = 0.0
    seen: float | None = None
    up: float | None = None
    back: float | None = None

    def told(self) -> str:
        """The line of this event."""
        how = f" {self.frozen:.1f} s" if self.frozen else ""
        seen = f"seen after {self.seen:.1f} s, " if self.seen is not None else ""
        up = f"up after {self.up:.1f} s, " if self.up is not None else ""
        back = "NOT back" if self.back is None else f"back after {self.back:.1f} s"
        return f"{self.at:7.1f} s  {self.what}{how} {self.name} ({self.part}): {seen}{up}{back}"


def plan(
    kills: int,
    freezes: int,
    *,
    nodes: int,
    seed: int,
    most_gap: float = MOST_GAP,
    most_frozen: float = MOST_FROZEN,
) -> list[Event]:
    """All that will happen, by the seed alone; which moment of a round it hits, chance decides."""
    rng = random.Random(seed)
    kinds = ["kill"] * kills + ["freeze"] * freezes
    rng.shuffle(kinds)
    return [
        Event(
            what,
            rng.randrange(nodes),
            rng.choices(*PARTS[what])[0],
            rng.uniform(0, most_gap),
            rng.uniform(1, most_frozen) if what == "freeze" else 0.0,
        )
        for what in kinds
    ]


# --- what happens --------------------------------------------------------------------------------


class Chaos:
    """Lets a plan happen to a federation that runs."""

    def __init__(self, federation: Hosted) -> None:
        self._federation = federation
        self._daemons = list(federation.daemons.values())
        self._began = time.monotonic()
        self._frozen: int | None = None
        self._over = threading.Event()

    def happen(self, events: list[Event]) -> None:
        """Let all events happen, one after the other; at most one node is frozen meanwhile."""
        with ThreadPoolExecutor(1) as pool:
            freeze: Future[None] | None = None
            try:
                for event in events:
                    time.sleep(event.gap)
                    if event.what == "kill":
                        self._kill(event)
                        continue
                    if freeze is not None:
                        freeze.result()
                    self._frozen = event.node
                    freeze = pool.submit(self._freeze, event)
                if freeze is not None:
                    freeze.result()
            finally:
                self._over.set()  # who interrupts us does not wait for a frozen node

    def _kill(self, event: Event) -> None:
        if event.node == self._frozen:
            event.node = (event.node + 1) % len(self._daemons)
        daemon, pid = self._struck(event), None
        if event.part == "trainer":
            try:
                pid = self._federation.trainer_pid(daemon)
            except ProcessLookupError:  # between two of its lives
                event.part = "network"
        self._federation.strike(daemon, event.part, signal.SIGKILL)
        began = time.monotonic()
        if event.part != "trainer":
            self._federation.begin(daemon)
            event.up = self._seconds_since(began, lambda: _ask(daemon, "/v1/status") is not None)
        event.back = self._seconds_since(began, lambda: _is_back(daemon, other_trainer_than=pid))
        print(event.told(), flush=True)

    def _freeze(self, event: Event) -> None:
        daemon = self._struck(event)
        others = [other for other in self._daemons if other is not daemon]
        self._federation.strike(daemon, event.part, signal.SIGSTOP)
        try:
            began = time.monotonic()
            event.seen = self._seconds_since(
                began, lambda: _is_doubted(daemon, others), patience=event.frozen, every=LOOK
            )
            self._over.wait(max(0.0, began + event.frozen - time.monotonic()))
        finally:
            self._federation.thaw(daemon)
            began = time.monotonic()
        event.back = self._seconds_since(
            began, lambda: _is_back(daemon) and not _is_doubted(daemon, others), every=LOOK
        )
        self._frozen = None
        print(event.told(), flush=True)

    def _seconds_since(
        self,
        began: float,
        condition: Callable[[], bool],
        *,
        patience: float = GIVE_UP,
        every: float = POLL,
    ) -> float | None:
        """Seconds from `began` until a condition holds; None if it takes more than `patience`."""
        while not condition():
            if time.monotonic() > began + patience or self._over.wait(every):
                return None
        return round(time.monotonic() - began, 2)

    def _struck(self, event: Event) -> Daemon:
        daemon = self._daemons[event.node]
        event.name, event.at = daemon.name, round(time.monotonic() - self._began, 1)
        return daemon


def _ask(daemon: Daemon, path: str) -> Any:
    """What a daemon answers, or None; a frozen one is not waited for."""
    try:
        return Client(daemon.client.path, timeout=1.0).get(path)
    except P2PFedError:
        return None


def _is_back(daemon: Daemon, other_trainer_than: int | None = None) -> bool:
    status = _ask(daemon, "/v1/status")
    if status is None or status["run"] is None or status["run"]["phase"] == "joining":
        return False
    trainer = status["trainer"]
    renewed = trainer["state"] == "ready" and trainer["pid"] != other_trainer_than
    return status["peers"]["alive"] >= 1 and (other_trainer_than is None or renewed)


def _is_doubted(daemon: Daemon, by: list[Daemon]) -> bool:
    """Whether one of the others has heard it before and does not any more."""
    return any(
        peer["name"] == daemon.name and peer["state"] in {"suspect", "away"}
        for other in by
        for peer in _ask(other, "/v1/peers") or []
    )


# --- the end -------------------------------------------------------------------------------------


def come_to_rest(daemons: list[Daemon]) -> tuple[int, str]:
    """Wait until all contribute again; then nobody shares any more, and all come to hold the same.

    Returns:
        Rounds in the model, and its hash.

    Raises:
        TimedOut: They do not.
    """
    own = {d.name: _run(d).get("own_deltas", 0) for d in daemons}
    for daemon in daemons:
        wait_for(
            lambda d=daemon: _run(d).get("own_deltas", 0) > own[d.name],
            SETTLE,
            f"{daemon.name} contributes again",
        )
    for daemon in daemons:
        daemon.client.post("/v1/share", {"on": False})
    held, since = set[tuple[Any, ...]](), time.monotonic()

    def rest() -> bool:
        nonlocal held, since
        now = {(_run(d).get("deltas"), _run(d).get("model_hash")) for d in daemons}
        if now != held:
            held, since = now, time.monotonic()
        return len(held) == 1 and time.monotonic() > since + QUIET

    wait_for(rest, SETTLE, "all come to hold the same deltas and the same model")
    [(_, model)] = held
    # Some may be in a later round, in which nobody releases anything any more.
    return max(_run(d).get("model_round", 0) for d in daemons), model


def _run(daemon: Daemon) -> dict[str, Any]:
    return (_ask(daemon, "/v1/status") or {}).get("run") or {}


# --- all of it -----------------------------------------------------------------------------------


def chaos(
    federation: Hosted, events: list[Event], limit: float
) -> tuple[dict[str, Any], list[str]]:
    """Run a federation through a plan; returns the summary and what failed."""
    constants = run_constants("svt", rounds=1, epsilon=Fraction(EPSILON))
    constants |= {
        "rounds": int((SETTLE + SECONDS_AN_EVENT * (1 + len(events))) / INTERVAL),
        "deadline_s": 2.0,
        "min_round_interval_s": INTERVAL,
    }
    daemons = list(federation.daemons.values())
    failures, rounds, model = [], 0, ""
    with federation.running():
        run = federation.make_run("chaos", constants, seed=0)
        federation.write_bootstrap()
        federation.enrol_all()
        wait_for(lambda: all(_run(d).get("own_deltas") for d in daemons), SETTLE, "the run begins")
        try:
            Chaos(federation).happen(events)
            rounds, model = come_to_rest(daemons)
        except P2PFedError as error:
            failures.append(str(error))
        federation.stop_all()
        if not failures:
            failures += faults_on_disk(daemons, run.run_id, rounds, model)
    for event in events:
        if event.back is None or (event.part != "trainer" and event.back > limit):
            failures.append(f"after more than {limit:g} s: {event.told().strip()}")
    ended = {"run": run.run_id.hex(), "rounds": rounds, "model": model}
    return ended | _summary(events), failures


def _summary(events: list[Event]) -> dict[str, Any]:
    def times(of: list[float | None]) -> dict[str, Any]:
        known = [seconds for seconds in of if seconds is not None]
        median = round(statistics.median(known), 2) if known else None
        return {"count": len(of), "median_s": median, "max_s": max(known, default=None)}

    kinds = sorted({(e.what, e.part) for e in events})
    return {
        "back": {
            f"{what} {part}": times([e.back for e in events if (e.what, e.part) == (what, part)])
            for what, part in kinds
        },
        "up": times([e.up for e in events if e.up is not None]),
        "seen": times([e.seen for e in events if e.seen is not None]),
    }


def main() -> int:
    """Do all of it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--freezes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--most-gap", type=float, default=MOST_GAP, help="seconds between events")
    parser.add_argument("--most-frozen", type=float, default=MOST_FROZEN, help="seconds")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds until it must be back")
    parser.add_argument("--namespaces", action="store_true", help="each in a host of its own; root")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--folder", type=Path, help="keep the nodes there; must not exist")
    args = parser.parse_args()
    if args.namespaces and missing():
        parser.error(missing())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that all is stopped
    folder = args.folder or Path(tempfile.mkdtemp(prefix="chaos-")) / "nodes"
    events = plan(
        args.kills,
        args.freezes,
        nodes=args.nodes,
        seed=args.seed,
        most_gap=args.most_gap,
        most_frozen=args.most_frozen,
    )
    with Lab(args.nodes) if args.namespaces else contextlib.nullcontext() as lab:
        federation = Hosted(folder, a_cast(args.nodes), epsilon=str(EPSILON), lab=lab)
        summary, failures = chaos(federation, events, args.limit)
    for kind, times in summary["back"].items():
        print(
            f"{kind}: {times['count']}, back after {times['median_s']} s in the median,"
            f" {times['max_s']} s at most"
        )
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    if args.json:
        done = {"seed": args.seed, "nodes": args.nodes, "namespaces": args.namespaces, **summary}
        done |= {"failures": failures, "events": [asdict(event) for event in events]}
        args.json.write_text(json.dumps(done, indent=1) + "\n", "utf-8")
    if failures:
        print(f"seed {args.seed}; everything lies in {folder}", file=sys.stderr)
        return 1
    if args.folder is None:
        shutil.rmtree(folder.parent)
    print(f"{args.kills} kills, {args.freezes} freezes, {summary['rounds']} rounds: one model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
