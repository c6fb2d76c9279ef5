"""Releases of one hospital, and what its ledger must say after any crash.

Map: `releases` (what a child does; it tells of each draw and of all that leaves) -> `disks_after`
or a kill -> `look` (the real ledger opens what is left, each round is asked for again) -> `faults`;
`survey` does all of it for power losses, `kill_everywhere` for kills.

Invariant that `faults` holds against every crash: each draw has its own debit, made before it; what
was given away is stored, byte for byte, and given again; the ledger opens.

Not here: what may be left of files (`power_loss`), the tests (`test_privacy_crashes`).
"""

from __future__ import annotations

import signal
import tempfile
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from hashlib import blake2b
from pathlib import Path
from unittest import mock

import numpy as np
from power_loss import crashes, record, write_files
from system_calls import said, say, trace

from p2pfed.errors import PrivacyError
from p2pfed.privacy.accountant import Budget
from p2pfed.privacy.gate import NotWorth, encode_release, release_round
from p2pfed.privacy.gaussian import GaussianPlan
from p2pfed.privacy.ledger import Ledger, ReleaseKey
from p2pfed.privacy.mechanisms import make_plan
from p2pfed.privacy.svt import SvtPlan
from p2pfed.privacy.units import PatientRows
from p2pfed.privacy.worth import WORTH, WorthGate, WorthPlan

KINDS = ("svt", "gaussian", WORTH)
BUDGET = Budget(1000.0, 1e-5)
PATIENTS = [b"%d" % number for number in range(64)]
PARAMETERS = 4000
ROUNDS = {"svt": 3, "gaussian": 2, WORTH: 4}
SHORT = {"svt": 1, "gaussian": 1, WORTH: 2}  # rounds until something is released


def plan_of(kind, parameters=PARAMETERS):
    return make_plan(
        "svt" if kind == "svt" else "gaussian",
        num_parameters=parameters,
        clip=1,
        bits=10,
        budget=Fraction(1, 2),
        shuffle_seed=b"seed",
    )


def gate_of(kind):
    """Noise of length 64 and a strong update of length 64; the threshold is half of that.

    The noise of a test is geometric with scales below 2; it passes 30 with probability 1e-7.
    """
    return (
        WorthGate(WorthPlan(epsilon=Fraction(8), ratio=Fraction(1, 2))) if kind == WORTH else None
    )


def ask(ledger, kind, number, gate=None, *, parameters=PARAMETERS, **changes):
    """One round at one hospital; with a worth gate every other update is empty."""
    size = 0.0 if kind == WORTH and number % 2 == 0 else parameters**-0.5
    terms = {
        "plan": plan_of(kind, parameters),
        "dataset": ledger.register("heart", PATIENTS),
        "key": ReleaseKey(b"run", number),
        "budget": BUDGET,
        **changes,
    }
    rows = np.full((len(PATIENTS), parameters), size, np.float32)
    return release_round(PatientRows(rows), ledger=ledger, worth=gate, **terms)


@contextmanager
def drawing(tell):
    """Have `tell` called with the name of what was paid for, before each draw on a payment."""

    def told(real, name):
        def draw(*args, **kwargs):
            tell(name)
            return real(*args, **kwargs)

        return draw

    with (
        mock.patch.object(GaussianPlan, "draw", told(GaussianPlan.draw, "gaussian")),
        mock.patch.object(SvtPlan, "draw", told(SvtPlan.draw, "svt")),
        mock.patch.object(WorthGate, "open", told(WorthGate.open, WORTH)),
    ):
        yield


def releases(path, kind, *, rounds):
    """What the child does: round after round; it tells what is drawn and what it gives away."""
    gate = gate_of(kind)
    told = drawing(lambda name: say(b"draw %d %s" % (number, name.encode())))
    with told, Ledger.open(path) as ledger:
        for number in range(rounds):
            say(b"ask")
            given = ask(ledger, kind, number, gate)
            assert isinstance(given, NotWorth) == (kind == WORTH and number % 2 == 0)
            if not isinstance(given, NotWorth):
                say(b"give %d %s" % (number, fingerprint(encode_release(given.release))))


def fingerprint(data):
    return blake2b(data, digest_size=16).hexdigest().encode()


@dataclass
class Past:
    """What had happened outside the files when the crash came.

    Attributes:
        draws: How often noise was drawn, by (round, what was paid for).
        given: Round and fingerprint of all that left.
    """

    draws: Counter = field(default_factory=Counter)
    given: set = field(default_factory=set)

    def hear(self, told):
        match told.split():
            case b"draw", number, name:
                self.draws[int(number), name.decode()] += 1
            case b"give", number, output:
                self.given.add((int(number), output))


@dataclass
class Found:
    """What a ledger says after a crash, and how it answers when a round is asked for again.

    Attributes:
        refused: Why it does not open or go on; empty if it does.
        debits: How many there are, by (round, what was paid for).
        outputs: Round and fingerprint of all that is stored.
        redrawn: Stored rounds that were not given again as they are.
        draws: How often noise was drawn for the round that was asked for.
        debits_then: Like `debits`, after that.
    """

    refused: str = ""
    debits: Counter = field(default_factory=Counter)
    outputs: set = field(default_factory=set)
    redrawn: set = field(default_factory=set)
    draws: Counter = field(default_factory=Counter)
    debits_then: Counter = field(default_factory=Counter)


def debits_of(ledger):
    details = (entry.detail for entry in ledger.entries() if entry.kind == "debit")
    return Counter((detail["round"], detail["mechanism"]) for detail in details)


def look(path, kind):
    """Open what a crash left, as the product does, and ask for every round that was begun."""
    found = Found()
    try:
        with Ledger.open(path) as ledger:
            found.debits = debits_of(ledger)
            for number in sorted({number for number, _ in found.debits} or {0}):
                ask_again(ledger, kind, number, found)
            found.debits_then = debits_of(ledger)
    except PrivacyError as error:
        found.refused = str(error)
    return found


def ask_again(ledger, kind, number, found):
    stored, drawn = ledger.output(ReleaseKey(b"run", number)), Counter()
    with drawing(lambda name: drawn.update([(number, name)])):
        given = ask(ledger, kind, number, gate_of(kind), parameters=16)
    found.draws += drawn
    if stored is not None:
        found.outputs.add((number, fingerprint(stored.payload)))
        if drawn or encode_release(given.release) != stored.payload:
            found.redrawn.add(number)


def faults(past, found):
    """Name what is wrong with a ledger after a crash; nothing if all is well.

    Power may be lost at any time, so a ledger that must be mended by hand is a fault as well.
    """
    if found.refused:
        return ["it does not open or go on"]
    wrong = []
    if past.draws - found.debits:
        wrong.append("released > debited")
    if past.given - found.outputs:
        wrong.append("an output that was given away is lost")
    if found.redrawn or (past.draws + found.draws) - found.debits_then:
        wrong.append("drawn twice on one debit")
    return wrong


def disks_after(folder, child, past):
    """Yield every disk that a power loss may leave, its name, and what had happened by then."""
    start, log = record(child, folder)
    heard, seen = 0, set()
    for step, disk in crashes(start, log):
        for op in log[heard:step]:
            past.hear(op.data)
        heard = step
        name = b"".join(part for file in disk for part in (file.encode(), fingerprint(disk[file])))
        moment = name, past.draws.total(), len(past.given)
        if moment not in seen:
            seen.add(moment)
            yield disk, name, past


@dataclass
class Survey:
    """What a search through crash states found.

    Attributes:
        states: Different disks that were looked at.
        wrong: How many of them had each fault.
    """

    states: int = 0
    wrong: Counter = field(default_factory=Counter)


def survey(kind, *, every=1, rounds=0, inside=nullcontext, after=nullcontext, first=None):
    """Record releases, and look at every disk (or one of so many) that a power loss may leave.

    `inside` and `after` are planted faults, in what is recorded and in what opens it afterwards;
    `first` is what an earlier crash left.
    """
    looked, wrong = {}, set()
    disk, past = first or ({}, Past())
    with scratch() as folder:
        write_files(folder, disk)

        def child():
            with inside():
                releases(folder / "ledger", kind, rounds=rounds or ROUNDS[kind])

        with after():
            for disk, name, now in disks_after(folder, child, past):
                if name not in looked:
                    looked[name] = None
                    if len(looked) % every == 0:
                        write_files(folder, disk)
                        looked[name] = look(folder / "ledger", kind)
                if looked[name]:
                    wrong.update((fault, name) for fault in faults(now, looked[name]))
    states = sum(found is not None for found in looked.values())
    return Survey(states, Counter(fault for fault, _ in wrong))


@contextmanager
def scratch():
    """A folder, in memory where that is possible: nothing here waits for a real disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder).resolve()


class Killer:
    """Kills a traced child before its n-th system call since it first told so."""

    def __init__(self, last=0, since=b"ask"):
        self.last, self.since, self.count, self.past = last, since, 0, Past()

    def __call__(self, stop):
        told = said(stop)
        if told is not None:
            self.past.hear(told)
        if not stop.after and (self.count or (told or b"").startswith(self.since)):
            self.count += 1
            return self.count == self.last
        return False


def calls_of(kind, rounds, since):
    """Count the system calls from there to the end."""
    with scratch() as folder:
        all_of_it = Killer(since=since)
        assert trace(partial(releases, folder / "ledger", kind, rounds=rounds), all_of_it) == 0
        assert all_of_it.past.given
    return all_of_it.count


def kill_everywhere(kind, *, every=1, since=b"ask", inside=nullcontext):
    """Kill child after child, each some system calls later; look at what they leave.

    `inside` is a planted fault in what is killed.
    """
    result, rounds = Survey(), SHORT[kind]
    for point in range(1, calls_of(kind, rounds, since) + 1, every):
        killer = Killer(point, since)
        with scratch() as folder:
            with inside():
                status = trace(partial(releases, folder / "ledger", kind, rounds=rounds), killer)
            assert status in {-signal.SIGKILL, 0}, "it failed by itself"
            result.wrong.update(faults(killer.past, look(folder / "ledger", kind)))
        result.states += status != 0  # 0: it ended before, for the noise took a few calls less
    return result
