"""Crashes and bad input at every step of a release: never more released than was paid for.

A child makes real releases through the gate on a real ledger, and all that it does to the files is
recorded. Every disk that a power loss may leave is opened by the real ledger; see `ledger_crashes`
for what must hold. Then the same with real kills before each system call, and with a full disk.
"""

from __future__ import annotations

import os
import resource
import sqlite3
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from itertools import count, takewhile
from unittest import mock

import pytest
from ledger_crashes import (
    BUDGET,
    KINDS,
    PATIENTS,
    SHORT,
    Past,
    ask,
    debits_of,
    disks_after,
    drawing,
    faults,
    fingerprint,
    gate_of,
    kill_everywhere,
    look,
    releases,
    scratch,
    survey,
)
from power_loss import crashes, record
from system_calls import said, say, trace

from p2pfed.errors import BudgetExhausted, PrivacyError, StateInUse
from p2pfed.privacy.accountant import Budget
from p2pfed.privacy.gate import encode_release
from p2pfed.privacy.ledger import Ledger

# -- the model of a power loss --------------------------------------------------------------------


def left_by(folder, work):
    """Return all that a power loss may leave of what `work` does, as (file, content) pairs."""
    start, log = record(work, folder)
    return {tuple(disk.items()) for _, disk in crashes(start, log)}


def test_what_is_not_synced_may_be_lost_torn_or_never_be_written(tmp_path):
    def work():
        with (tmp_path / "a").open("wb", buffering=0) as file:
            file.write(b"x" * 1024)

    states = left_by(tmp_path, work)
    for content in (b"", b"x" * 512, bytes(512) + b"x" * 512, bytes(1024), b"x" * 1024):
        assert (("a", content),) in states
    assert () in states


def test_what_is_synced_stays_and_a_name_only_with_its_folder(tmp_path):
    def work(whole):
        with (tmp_path / "a").open("wb", buffering=0) as file:
            file.write(b"new")
            os.fsync(file.fileno())
        (tmp_path / "a").rename(tmp_path / "b")
        if whole:
            descriptor = os.open(tmp_path, os.O_RDONLY)
            os.fsync(descriptor)
            say(b"done")

    states = left_by(tmp_path, partial(work, False))
    assert {(), (("a", b"new"),), (("b", b"new"),)} <= states
    (tmp_path / "b").unlink()
    start, log = record(partial(work, True), tmp_path)
    done = [op.data for op in log].index(b"done")
    assert [disk for step, disk in crashes(start, log) if step > done] == [{"b": b"new"}]


# -- power loss -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_some_disks_after_a_power_loss(kind):
    """A sample of the full search below."""
    found = survey(kind, every=40)
    assert found.states > 50
    assert not found.wrong


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_power_loss_releases_more_than_was_debited():
    """Every prefix of all that was written, and of what was not synced any part."""
    found = {kind: survey(kind) for kind in KINDS}
    assert not any(each.wrong for each in found.values()), found
    assert sum(each.states for each in found.values()) >= 10_000, found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_power_loss_while_recovering_from_another(kind):
    with scratch() as folder:
        work = partial(releases, folder / "ledger", kind, rounds=2)
        left = [
            ({**disk}, deepcopy(past))
            for disk, _, past in disks_after(folder, work, Past())
            if disk.get("ledger-wal") and past.draws
        ]
    again = [survey(kind, every=40, rounds=2, first=first) for first in left[:: len(left) // 4]]
    assert sum(found.states for found in again) > 50
    assert not any(found.wrong for found in again)


# -- planted faults -------------------------------------------------------------------------------


def pragmas(*changes):
    """Return a fault: some of the ledger's SQLite statements are others."""

    class Connection(sqlite3.Connection):
        def execute(self, statement, *args):
            return super().execute(dict(changes).get(statement, statement), *args)

    @contextmanager
    def planted():
        with mock.patch.object(sqlite3, "connect", partial(sqlite3.connect, factory=Connection)):
            yield

    return planted


OVER = "released > debited"
NORMAL = ("PRAGMA synchronous=FULL", "PRAGMA synchronous=NORMAL")
OFF = ("PRAGMA synchronous=FULL", "PRAGMA synchronous=OFF")
NOT_FOLDED = ("PRAGMA wal_checkpoint(TRUNCATE)", "SELECT 1")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_with_synchronous_normal_planted_the_search_fails(kind):
    """NORMAL leaves syncing to the fold-back of the log; here to SQLite's own, which is rare."""
    planted = pragmas(NORMAL, NOT_FOLDED)
    found = survey(kind, every=20, rounds=SHORT[kind], inside=planted)
    assert found.wrong[OVER]
    assert found.wrong["drawn twice on one debit"]


@pytest.mark.slow
def test_with_synchronous_off_planted_the_search_fails():
    found = survey("gaussian", every=20, rounds=1, inside=pragmas(OFF))
    assert found.wrong["it does not open or go on"]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [[NORMAL], [NOT_FOLDED]], ids=["normal", "not folded back"])
def test_folding_the_log_back_and_syncing_it_are_each_enough(changes):
    """The journal does both; so NORMAL alone is not seen from outside."""
    found = survey("gaussian", every=20, rounds=2, inside=pragmas(*changes))
    assert found.states > 50
    assert not found.wrong


@contextmanager
def stored_late():
    """The gate gives the release away before its output is stored."""
    store = Ledger.store_output

    def late(self, debit, payload):
        say(b"give %d %s" % (debit.key.round, fingerprint(payload)))
        return store(self, debit, payload)

    with mock.patch.object(Ledger, "store_output", late):
        yield


@contextmanager
def paid_late():
    """The gate gives the release away before it is paid for."""
    pay, store = Ledger.debit, Ledger.store_output

    def promise(self, dataset, **terms):
        return dataset, terms

    def late(self, promised, payload):
        dataset, terms = promised
        say(b"give %d %s" % (terms["key"].round, fingerprint(payload)))
        return store(self, pay(self, dataset, **terms), payload)

    with mock.patch.multiple(Ledger, debit=promise, store_output=late):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_ledger_written_after_the_release_is_caught(kind):
    for fault, late in (("an output that was given away is lost", stored_late), (OVER, paid_late)):
        assert survey(kind, every=20, rounds=SHORT[kind], inside=late).wrong[fault]
        assert kill_everywhere(kind, since=b"give", inside=late).wrong[fault]


@contextmanager
def old_debits():
    """The gate draws again on a debit whose output was lost in a crash."""
    pay = Ledger.debit

    def again(self, dataset, *, key, **terms):
        return self._newest.get(key) or pay(self, dataset, key=key, **terms)

    with mock.patch.object(Ledger, "debit", again):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_draw_on_a_debit_is_caught(kind):
    found = survey(kind, every=20, rounds=SHORT[kind], after=old_debits)
    assert set(found.wrong) == {"drawn twice on one debit"}


# -- SIGKILL --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_at_some_system_calls_never_releases_more_than_was_debited(kind):
    found = kill_everywhere(kind, every=6)
    assert found.states > 10
    assert not found.wrong


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kill_at_no_system_call_releases_more_than_was_debited():
    found = {kind: kill_everywhere(kind) for kind in KINDS}
    assert not any(each.wrong for each in found.values()), found
    assert min(each.states for each in found.values()) > 60


# -- bad input ------------------------------------------------------------------------------------


class Filler:
    """Fills the disk at a traced child's n-th write to a file of the folder, or in its middle."""

    def __init__(self, folder, last, part):
        self.folder, self.last, self.part = folder, last, part
        self.count, self.past, self.errors = 0, Past(), []

    def __call__(self, stop):
        told = said(stop)
        if told is not None:
            self.past.hear(told)
            self.errors += [told] if told.startswith(b"error") else []
        elif (
            stop.name == "pwrite"
            and not stop.after
            and stop.file(stop.args[0]).parent == self.folder
        ):
            self.count += 1
            if self.count == self.last:
                room = stop.args[3] + int(stop.args[2] * self.part)
                resource.prlimit(stop.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))


def on_a_full_disk(path, kind):
    try:
        releases(path, kind, rounds=SHORT[kind])
    except PrivacyError as error:
        say(b"error " + str(error).encode())


def full_at(kind, part, point):
    """Fill the disk at one write; tells whether the releases came so far."""
    with scratch() as folder:
        filler = Filler(folder, point, part)
        assert trace(partial(on_a_full_disk, folder / "ledger", kind), filler) == 0
        assert not faults(filler.past, look(folder / "ledger", kind)), point
    if filler.count >= point:
        assert len(filler.errors) == 1, point
        assert b"cannot be opened or written" in filler.errors[0]
        assert not filler.past.given, "it was released all the same"
    return filler.count >= point


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_full_at_any_step_gives_a_clear_error_and_nothing_leaves(kind, part):
    points = takewhile(partial(full_at, kind, part), count(1))
    assert sum(1 for _ in points) > 30


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger"


def never():
    """No noise may be drawn inside."""

    def fail(name):
        raise AssertionError(f"{name} was drawn")

    return drawing(fail)


def test_a_second_trainer_is_refused_in_the_middle_of_a_release(path):
    """A forked child tries, at the moment of the draw."""
    said_no = []

    def second(_):
        child = os.fork()
        if child == 0:
            try:
                Ledger.open(path)
            except StateInUse:
                os._exit(7)
            finally:
                os._exit(0)
        said_no.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    with Ledger.open(path) as ledger, drawing(second):
        ask(ledger, "gaussian", 0)
        assert said_no == [7]
        assert debits_of(ledger).total() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_ledger_of_another_data_set_pays_for_nothing(path, kind):
    with Ledger.open(path.with_name("other")) as other:
        theirs = other.register("heart", PATIENTS)
        before = debits_of(other)
        with Ledger.open(path) as ledger, never():
            for paying, dataset in ((ledger, theirs), (other, ledger.register("heart", PATIENTS))):
                with pytest.raises(PrivacyError, match="not in this ledger"):
                    ask(paying, kind, 1, gate_of(kind), dataset=dataset)
                assert debits_of(paying) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_below_what_is_spent_pays_for_nothing(path, kind):
    with Ledger.open(path) as ledger:
        gate = gate_of(kind)
        first = ask(ledger, kind, 1, gate, parameters=16)
        before = ledger.entries()
        with never():
            with pytest.raises(BudgetExhausted, match="nothing was spent"):
                ask(ledger, kind, 3, gate, budget=Budget(0.5, BUDGET.delta))
            again = ask(ledger, kind, 1, gate, budget=Budget(0.5, BUDGET.delta))
        assert encode_release(again.release) == encode_release(first.release)
        assert ledger.entries() == before


def test_a_ledger_set_back_to_an_older_copy_is_told_by_the_heads_it_forgot(path):
    heads = []
    with Ledger.open(path) as ledger:
        heads.append(ask(ledger, "gaussian", 0, parameters=16).spent.head)
    older = path.read_bytes()
    with Ledger.open(path) as ledger:
        heads.append(ask(ledger, "gaussian", 1, parameters=16).spent.head)
        assert ledger.knows(heads)
    path.write_bytes(older)
    with Ledger.open(path) as ledger:  # nothing in the file itself is wrong
        assert ledger.knows(heads[:1])
        assert not ledger.knows(heads)
        ask(ledger, "gaussian", 1, parameters=16)
        assert not ledger.knows(heads), "drawn anew: another history"
