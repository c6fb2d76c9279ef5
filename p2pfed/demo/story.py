"""The demo's story, with real daemons: train, survive a kill, take in a late joiner, let one go.

Two networks run one after the other: with the privacy gate, where all the story happens, and
without privacy, for comparison. At the end the models are compared with training alone and pooled.

The exit code is 0 only if all present nodes end on one model hash, the killed node came back and
contributed again, and the late joiner contributed.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from p2pfed.demo.compare import Comparison, compare
from p2pfed.demo.federation import Daemon, Federation, wait_for
from p2pfed.demo.plan import (
    ROUNDS,
    ROUNDS_WITHOUT,
    Cast,
    breast_cancer,
    heart_disease,
    run_constants,
)
from p2pfed.demo.screen import Screen
from p2pfed.errors import ConfigError
from p2pfed.identity.run import Run
from p2pfed.report.page import demo_page
from p2pfed.training.task import load_task

__all__ = ["run_demo"]

MARK = "p2pfed-demo.txt"  # a folder with this file in it may be replaced
ROUND_DEADLINE = 240.0
SETTLE = 30.0  # seconds for the last late deltas to reach everyone
POLL = 0.4


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one network came to.

    Attributes:
        model: The common model, shape (P,).
        statuses: Last status of every node that was present at the end.
        failures: What should have happened and did not.
    """

    model: NDArray[np.float32]
    statuses: dict[str, dict[str, Any]]
    failures: tuple[str, ...]


def run_demo(options: dict[str, Any]) -> int:
    """Run the demo.

    Args:
        options: `data` (folder or None), `seed`, `out`, `epsilon`, `rounds` (or None), `json`.

    Returns:
        0 if everything happened as it should, else 1.
    """
    screen = Screen(quiet=bool(options["json"]))
    seed, epsilon = int(options["seed"]), _budget(options["epsilon"])
    cast = heart_disease(Path(options["data"])) if options["data"] else breast_cancer()
    out = _fresh_folder(Path(options["out"]))  # nothing is wrong so far: the last one may go
    rounds = int(options["rounds"] or ROUNDS)
    privacy = f"mechanism svt, total ε = {float(epsilon):g}, δ = 1e-5, unit patient"
    screen.head(f"p2pfed demo: five daemons train one model; {privacy}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    with_gate = _with_gate(out / "gate", cast, epsilon, rounds=rounds, seed=seed, screen=screen)
    without = _without_privacy(out / "none", cast, seed=seed, screen=screen)
    screen.say("training alone and pooled, for comparison")
    steps = ROUNDS_WITHOUT * load_task(cast.task).hyper.local_steps
    scores = compare(
        cast,
        together_gate=with_gate.model,
        together_none=without.model,
        steps=steps,
        seed=seed,
    )
    failures = [*with_gate.failures, *without.failures]
    report = _report(cast, with_gate, without, scores, failures, privacy=privacy, seed=seed)
    (out / "report.json").write_text(
        json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8"
    )
    (out / "report.html").write_text(demo_page(report), "utf-8")
    _show_result(screen, out, with_gate, scores)
    for failure in failures:
        screen.head(f"FAILED: {failure}")
    spent = max(s["privacy"]["spent_epsilon"] for s in with_gate.statuses.values())
    screen.head(f"{'done' if not failures else 'failed'}: {privacy}; most spent ε = {spent:.2f}")
    if options["json"]:
        print(json.dumps({"schema": "p2pfed.demo/1", "ok": not failures, "data": report}))
    return 1 if failures else 0


def _terminated(_number: int, _frame: object) -> None:
    sys.exit(143)  # unwinds, so that every daemon is stopped


def _budget(text: str) -> Fraction:
    try:
        epsilon = Fraction(text)
    except ValueError:
        epsilon = Fraction(0)
    if not 0 < epsilon <= 1000:
        raise ConfigError(
            f"--epsilon {text!r} is not a number from 0 to 1000",
            "it is the privacy budget of the whole run, for each patient",
            "try: --epsilon 10",
        )
    return epsilon


def _fresh_folder(out: Path) -> Path:
    if out.exists():
        if not (out / MARK).is_file() and any(out.iterdir()):
            raise ConfigError(
                f"{out} holds something that is not a demo's",
                "the demo would replace it",
                "choose another folder with --out",
            )
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARK).write_text("Made by p2pfed demo; replaced by the next one.\n")
    return out.resolve()


# --- with the gate: the story ------------------------------------------------------------------


@contextmanager
def _network(
    folder: Path, cast: Cast, constants: dict[str, Any], *, epsilon: str, seed: int
) -> Iterator[tuple[Federation, Run]]:
    folder.mkdir()
    federation = Federation(folder / "nodes", cast, epsilon=epsilon)
    with federation.running():
        name = f"demo-{constants['mechanism']}-{seed}"
        run = federation.make_run(name, constants, seed=seed)
        federation.write_bootstrap()
        yield federation, run


def _with_gate(
    folder: Path, cast: Cast, epsilon: Fraction, *, rounds: int, seed: int, screen: Screen
) -> Outcome:
    constants = run_constants("svt", rounds=rounds, epsilon=epsilon)
    budget = str(float(epsilon))
    with (
        _network(folder, cast, constants, epsilon=budget, seed=seed) as (federation, run),
        screen.live(),
    ):
        return _Story(federation, run, screen).tell()


class _Story:
    """One pass through the story; every chapter waits for a round, never for a time."""

    def __init__(self, federation: Federation, run: Run, screen: Screen) -> None:
        self._federation = federation
        self._run = run
        self._screen = screen
        cast = federation.cast
        self._killed = federation.daemons[cast.killed]
        self._late = federation.daemons[cast.late]
        self._leaver = federation.daemons[cast.leaver]
        self._present = dict(federation.daemons)

    def tell(self) -> Outcome:
        federation, screen, rounds = self._federation, self._screen, self._run.rounds
        founders = [d for d in federation.daemons.values() if d is not self._late]
        roster = federation.stewards.admit([d.member for d in founders])
        for daemon in federation.daemons.values():
            screen.say(f"starting {daemon.name}")
            federation.start(daemon)
            if daemon is not self._late:
                federation.enrol(daemon, roster)
        self._reach(rounds // 10)
        screen.say(f"[red]SIGKILL to {self._killed.name}[/red]")
        federation.kill(self._killed)
        killed_at = self._reach(rounds // 10 + 3)
        screen.say(f"restarting {self._killed.name} from its own store")
        federation.start(self._killed)
        self._reach(rounds * 3 // 10)
        self._join_late()
        self._reach(rounds * 7 // 10)
        screen.say(f"{self._leaver.name} leaves for good")
        self._leaver.client.post("/v1/leave")
        federation.stop(self._leaver)
        del self._present[self._leaver.name]
        self._reach(rounds)
        return self._end(killed_at)

    def _join_late(self) -> None:
        """The stewards sign a new roster; only the newcomer gets it from their hand."""
        federation, late = self._federation, self._late
        before = federation.first.client.get("/v1/roster")["version"]
        signed = federation.stewards.admit([late.member])
        self._screen.say(
            f"{late.name} joins late: roster v{federation.stewards.roster.version} in its hand,"
            f" {federation.first.name} still holds v{before}"
        )
        federation.enrol(late, signed)

    def _statuses(self) -> dict[str, dict[str, Any] | None]:
        found = {name: daemon.status() for name, daemon in self._present.items()}
        self._screen.show(found)
        return found

    def _reach(self, round_: int) -> int:
        """Wait until the first node is in a round; returns the round that it is in then."""
        reached = 0

        def there() -> bool:
            nonlocal reached
            time.sleep(POLL)
            status = self._statuses()[self._federation.first.name]
            run = status["run"] if status is not None else None
            reached = run["round"] if run is not None else 0
            return reached >= round_

        wait_for(there, ROUND_DEADLINE, f"{self._federation.first.name} reaches round {round_}")
        return reached

    def _end(self, killed_at: int) -> Outcome:
        statuses = _settled(self._statuses)
        failures = _hash_failures(statuses)
        killed, late = statuses.get(self._killed.name), statuses.get(self._late.name)
        if killed is None or not _contributed_after(self._killed, killed_at):
            failures.append(f"{self._killed.name} did not contribute again after the kill")
        if late is None or not late["run"]["own_deltas"]:
            failures.append(f"{self._late.name} did not take part after it had joined")
        model = self._federation.final_model(self._federation.first, self._run)
        return Outcome(model, statuses, tuple(failures))


def _contributed_after(daemon: Daemon, round_: int) -> bool:
    """Whether a node released in rounds after this one, by its own event log."""
    events = daemon.client.stream("/v1/events?since=0&limit=10000&type=delta.released")
    return any(e.get("data", {}).get("round", -1) > round_ for e in events)


def _settled(
    ask: Callable[[], dict[str, dict[str, Any] | None]],
) -> dict[str, dict[str, Any]]:
    """Wait until all present nodes have finished on one hash; what they say then, or at last."""
    deadline = time.monotonic() + SETTLE
    while True:
        statuses = {n: s for n, s in ask().items() if s is not None and s["run"] is not None}
        if not _hash_failures(statuses) or time.monotonic() > deadline:
            return statuses
        time.sleep(POLL)


def _hash_failures(statuses: dict[str, dict[str, Any]]) -> list[str]:
    runs = {name: status["run"] for name, status in statuses.items()}
    failures = [f"{n} did not finish" for n, r in runs.items() if r["phase"] != "finished"]
    failures += [
        f"{n} has not folded the last round"
        for n, r in runs.items()
        if r["model_round"] != r["rounds"]
    ]
    if len({r["model_hash"] for r in runs.values()}) != 1:
        failures.append("the hospitals' model hashes differ")
    return failures


# --- without privacy, for comparison -----------------------------------------------------------


def _without_privacy(folder: Path, cast: Cast, *, seed: int, screen: Screen) -> Outcome:
    screen.say("the same hospitals once more, without privacy, for comparison")
    constants = run_constants("none", rounds=ROUNDS_WITHOUT, epsilon=Fraction(0))
    with (
        _network(folder, cast, constants, epsilon="0", seed=seed) as (federation, run),
        screen.live(),
    ):
        roster = federation.stewards.admit([d.member for d in federation.daemons.values()])
        for daemon in federation.daemons.values():
            federation.start(daemon)
            federation.enrol(daemon, roster)

        def ask() -> dict[str, dict[str, Any] | None]:
            found = {name: daemon.status() for name, daemon in federation.daemons.items()}
            screen.show(found)
            return found

        def finished() -> bool:
            time.sleep(POLL)
            return all(s and s["run"] and s["run"]["phase"] == "finished" for s in ask().values())

        wait_for(finished, ROUND_DEADLINE, "the run without privacy ends")
        statuses = _settled(ask)
        model = federation.final_model(federation.first, run)
        return Outcome(model, statuses, tuple(_hash_failures(statuses)))


# --- the result --------------------------------------------------------------------------------


def _report(
    cast: Cast,
    with_gate: Outcome,
    without: Outcome,
    scores: list[Comparison],
    failures: list[str],
    *,
    privacy: str,
    seed: int,
) -> dict[str, Any]:
    return {
        "task": cast.task,
        "seed": seed,
        "privacy": privacy,
        "failures": failures,
        "comparison": [s.as_dict() for s in scores],
        "gate": with_gate.statuses,
        "none": without.statuses,
    }


def _show_result(screen: Screen, out: Path, gate: Outcome, scores: list[Comparison]) -> None:
    table = Table(box=None, pad_edge=False, title="accuracy on own tests/all hospitals' tests")
    table.add_column("hospital")
    for column in ("patients", "alone", "with gate", "no privacy", "pooled"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in scores:
        parts = (one.alone, one.together_gate, one.together_none, one.pooled)
        cells = [f"{part.own:.3f}/{part.everyone:.3f}" for part in parts]
        table.add_row(one.hospital, str(one.patients), *cells)
    screen.table(table)
    nodes = Table(box=None, pad_edge=False, title="each node, from its own socket (with the gate)")
    for column in ("node", "model hash", "ε spent", "releases", "sent"):
        nodes.add_column(column, justify="left" if column in {"node", "model hash"} else "right")
    for name, status in gate.statuses.items():
        run, spent = status["run"], status["privacy"]
        sent = f"{status['traffic']['sent_bytes'] / 1000:.0f} kB"
        cells = [f"{spent['spent_epsilon']:.2f}", str(spent["releases"]), sent]
        nodes.add_row(name, run["model_hash"][:32], *cells)
    screen.table(nodes)
    screen.say(f"report: {out / 'report.html'} and report.json; nodes: {out / 'gate' / 'nodes'}")
