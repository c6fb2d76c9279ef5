"""The gate's fixed order, shown with real processes, real files and real SIGKILLs."""

from __future__ import annotations

import os
import random
import signal
import time
from fractions import Fraction
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfed.errors import BudgetExhausted, UpdateRejected
from p2pfed.privacy.accountant import Budget
from p2pfed.privacy.gate import decode_release, encode_release, release_round
from p2pfed.privacy.keystream import KeyStream
from p2pfed.privacy.ledger import Ledger, ReleaseKey
from p2pfed.privacy.mechanism import Release
from p2pfed.privacy.mechanisms import make_plan
from p2pfed.privacy.noise import ExactNoise
from p2pfed.privacy.units import HOSPITAL, PATIENT, PatientRows

BUDGET = Budget(3.0, 1e-5)
COST = BUDGET.rho_nano // 4
PATIENTS = [b"a", b"b", b"c"]
ROWS = np.ones((3, 6), np.float32)


def plan_of(mechanism="svt", cost=COST, unit=PATIENT):
    return make_plan(
        mechanism,
        unit=unit,
        num_parameters=6,
        clip=1,
        bits=10,
        budget=Fraction(cost, 10**9),
        shuffle_seed=b"1",
    )


def release(
    ledger,
    number=1,
    *,
    rows=ROWS,
    mechanism="svt",
    cost=COST,
    budget=BUDGET,
    unit=PATIENT,
    **more,
):
    return release_round(
        rows if hasattr(rows, "chunks") else PatientRows(rows),
        plan=plan_of(mechanism, cost, unit),
        ledger=ledger,
        dataset=ledger.register("heart", PATIENTS),
        key=ReleaseKey(b"run", number),
        budget=budget,
        **more,
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger"


@pytest.fixture
def ledger(path):
    with Ledger.open(path) as opened:
        yield opened


def counts(path):
    with Ledger.open(path) as ledger:
        spent = ledger.spent(ledger.register("heart", PATIENTS), delta=1e-5)
        return spent.debits, spent.releases, spent.rho_nano


@pytest.mark.parametrize("mechanism", ["svt", "gaussian", "none"])
def test_a_round_is_released_and_paid_once(ledger, path, mechanism):
    rows = ROWS[:1] if mechanism == "none" else ROWS
    released = release(ledger, mechanism=mechanism, rows=rows)
    again = release(ledger, mechanism=mechanism, rows=rows * 5)
    assert encode_release(again.release) == encode_release(released.release)
    unit = "hospital" if mechanism == "none" else "patient"
    assert (again.mechanism, again.unit, again.spent) == (mechanism, unit, released.spent)
    assert released.spent.rho_nano == (0 if mechanism == "none" else COST)
    assert released.spent.releases == 1
    assert released.spent.head == ledger.head
    ledger.close()
    assert counts(path)[:2] == (1, 1)


def test_a_repeat_after_later_rounds_tells_the_budget_as_it_was(ledger):
    first = release(ledger, 1)
    release(ledger, 2)
    assert release(ledger, 1).spent == first.spent  # a signed delta must not come in two versions


def test_two_rounds_of_the_same_data_differ(ledger):
    first, second = (release(ledger, n, mechanism="gaussian").release for n in (1, 2))
    assert (first.values != second.values).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("mechanism", ["svt", "gaussian", "none"])
def test_nan_spends_nothing(ledger, bad, mechanism):
    rows = ROWS[:1].copy()
    rows[0, 3] = bad
    ledger.register("heart", PATIENTS)
    before = ledger.entries()
    with pytest.raises(UpdateRejected):
        release(ledger, rows=rows, mechanism=mechanism)
    with pytest.raises(UpdateRejected):
        release(ledger, rows=ROWS[:1, :5], mechanism=mechanism)
    with pytest.raises(UpdateRejected, match="hospital"):
        release(ledger, mechanism=mechanism, unit=HOSPITAL)
    assert ledger.entries() == before


def test_the_hospital_as_a_unit_makes_one_contribution(ledger):
    assert release(ledger, rows=ROWS[:1], unit=HOSPITAL).unit == "hospital"


def test_after_the_budget_nothing_is_drawn(ledger):
    for number in range(4):
        release(ledger, number)

    class Never(KeyStream):
        def _fill(self, raw, size):
            raise AssertionError("noise was drawn")

    with pytest.raises(BudgetExhausted):
        release(ledger, 4, noise=lambda: ExactNoise(Never()))
    assert (
        release(ledger, 3, noise=lambda: ExactNoise(Never())).spent.releases == 4
    )  # old rounds are still given


def test_the_debit_is_durable_before_the_first_random_word(ledger):
    class Watch(KeyStream):
        seen = None

        def _fill(self, raw, size):
            if Watch.seen is None:
                Watch.seen = [entry.kind for entry in ledger.entries()]
            super()._fill(raw, size)

    release(ledger, noise=lambda: ExactNoise(Watch()))
    assert Watch.seen == ["open", "register", "debit"]


def test_a_second_reading_that_fails_leaves_the_debit_spent(ledger):
    class Turns(PatientRows):
        readings = 0

        def chunks(self):
            Turns.readings += 1
            yield self.rows * (1 if Turns.readings == 1 else np.float32(np.nan))

    with pytest.raises(UpdateRejected):
        release(ledger, rows=Turns(np.repeat(ROWS, 1000, axis=0)))  # surely accepted
    assert [entry.kind for entry in ledger.entries()][2:] == ["debit"]
    assert release(ledger).spent.rho_nano == 2 * COST


# -- SIGKILL -------------------------------------------------------------------------------------


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class DyingStream(KeyStream):
    """Dies at the n-th reading."""

    last = 1

    def _fill(self, raw, size):
        DyingStream.last -= 1
        if DyingStream.last <= 0:
            die()
        super()._fill(raw, size)


class DyingRows(PatientRows):
    """Dies at the n-th reading."""

    last = 1

    def chunks(self):
        DyingRows.last -= 1
        if DyingRows.last <= 0:
            die()
        return super().chunks()


class DyingLedger(Ledger):
    """Dies with the draw in hand."""

    def store_output(self, debit, payload):
        die()


def killed(path, point):
    """Run one round in a real child process that is killed at `point`."""
    child = os.fork()
    if child == 0:
        try:
            DyingRows.last = {"before the debit": 1, "between two readings": 2}.get(point, 99)
            DyingStream.last = {"before the noise": 1, "within the noise": 6}.get(point, 10**9)
            kind = DyingLedger if point == "before the output" else Ledger
            release(kind.open(path), rows=DyingRows(ROWS), noise=lambda: ExactNoise(DyingStream()))
            die()  # after the output, before anything could be sent
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


POINTS = {
    "before the debit": (0, 0),
    "before the noise": (1, 0),
    "within the noise": (1, 0),
    "between two readings": (1, 0),
    "before the output": (1, 0),
    "before the release": (1, 1),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_never_gives_more_outputs_than_debits(path, point):
    debits, outputs = POINTS[point]
    killed(path, point)
    assert counts(path) == (debits, outputs, debits * COST)
    with Ledger.open(path) as ledger:
        stored = ledger.output(ReleaseKey(b"run", 1))
        released = release(ledger)
    if stored is not None:  # what was drawn is given, not drawn again
        assert encode_release(released.release) == stored.payload
    else:
        assert counts(path) == (debits + 1, 1, (debits + 1) * COST)


@pytest.mark.parametrize("point", ["before the noise", "before the output"])
def test_a_crash_loop_burns_the_budget_and_never_passes_it(path, point):
    for attempt in range(1, 5):
        killed(path, point)
        assert counts(path) == (attempt, 0, attempt * COST)
    with Ledger.open(path) as ledger, pytest.raises(BudgetExhausted):
        release(ledger)
    assert counts(path) == (4, 0, 4 * COST)


@pytest.mark.slow
def test_kills_at_random_times_never_redraw_or_overspend(path):
    budget, cost = Budget(100.0, 1e-5), Budget(100.0, 1e-5).rho_nano // 500
    told: dict[int, set[str]] = {}
    rng = random.Random(3)
    exhausted, kills = False, 0
    while not exhausted and kills < 100:
        kills += 1
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                with Ledger.open(path) as ledger:
                    for number in range(10**6):
                        out = release(ledger, number, cost=cost, budget=budget).release
                        digest = sha256(encode_release(out)).hexdigest()
                        os.write(write, f"{number} {digest}\n".encode())
            except BudgetExhausted:
                os.write(write, b"exhausted\n")
            finally:
                os._exit(0)
        os.close(write)
        time.sleep(rng.uniform(0.01, 0.12))  # the kill must come at any time
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(read) as pipe:
            for line in pipe.read().splitlines():
                if line == "exhausted":
                    exhausted = True
                else:
                    number, digest = line.split()
                    told.setdefault(int(number), set()).add(digest)
        debits, outputs, rho_nano = counts(path)
        assert len(told) <= outputs <= debits <= 500
        assert rho_nano == debits * cost
    assert told
    assert all(len(versions) == 1 for versions in told.values())
    with Ledger.open(path) as ledger:
        for number, versions in told.items():
            payload = ledger.output(ReleaseKey(b"run", number)).payload
            assert {sha256(payload).hexdigest()} == versions


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 2**31), unique=True, max_size=30).map(sorted),
    st.sampled_from([1, 100, 2**14, 2**30, 2**60]),
    st.randoms(use_true_random=False),
)
def test_what_the_ledger_keeps_is_what_was_released_in_few_bytes(indices, most, chance):
    values = np.array([chance.randint(-most, most) for _ in indices], np.int64)
    kept = encode_release(Release(np.array(indices, np.int64), values))
    back = decode_release(kept)
    assert back.indices.tolist() == indices
    assert back.values.tolist() == values.tolist()
    assert back.values.flags.writeable
    assert len(kept) <= 6 + 16 * len(indices)
    for broken in (kept[:-1], kept + b"x", kept[:5], b"\x08\x03" + kept[2:]):
        with pytest.raises(ValueError, match="a release of"):
            decode_release(broken)


def test_a_dense_release_is_kept_without_indices():
    values = np.arange(-50, 50)
    assert len(encode_release(Release(np.arange(100), values))) == 6 + 100
