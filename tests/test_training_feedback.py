"""What a run without a mechanism remembers from round to round, and that nothing else can."""

from __future__ import annotations

import inspect
import sys
import typing
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_training_round import NONE, SAMPLES, VIEW, hospital_with, make_run

from p2pfed.identity.rules import Averaging, Encoding
from p2pfed.privacy.gate import Released as GateOutput
from p2pfed.privacy.mechanism import Release
from p2pfed.tasks.breast_cancer import BreastCancer
from p2pfed.training import feedback as feedback_module
from p2pfed.training.contributions import PatientContributions
from p2pfed.training.feedback import DriftCorrection, ErrorFeedback, LocalMemory, RawChange
from p2pfed.training.local import quantise, train_local
from p2pfed.training.round import Refused, Released
from p2pfed.training.vector import MeanDelta
from p2pfed.wire.payload import Payload, decode_payload

__all__ = ["hospital_with"]  # the fixture

LEFT = {**NONE, "top_fraction": Fraction(1, 10), "encoding": Encoding("int8", error_feedback=True)}
GRID = 14


@pytest.fixture(scope="module", autouse=True)
def _warm():
    """Torch loads its optimisers at the first step, which would be the first test's time."""
    hospital = BreastCancer().data(None, {"site": 0})
    how = {"steps": 1, "learning_rate": 0.1, "batch_size": 16, "seed": 1}
    train_local(BreastCancer(), hospital.train, VIEW, **how)


def sent_vector(result, run) -> np.ndarray:
    assert isinstance(result, Released)
    payload = decode_payload(
        result.payload,
        num_parameters=31,
        max_released=run.max_released,
        width=run.encoding.values,
    )
    whole = np.zeros(31)
    whole[payload.indices] = payload.values / 2.0**GRID
    return whole


# --- error feedback ------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    st.lists(arrays(np.float32, 6, elements=st.floats(-1, 1, width=32)), min_size=1, max_size=6),
    st.integers(1, 6),
)
def test_what_was_sent_and_what_is_left_is_all_that_was_trained(changes, kept):
    """Invariant: the sum of all payloads and the residual is the sum of all changes."""
    memory, sent = ErrorFeedback(), np.zeros(6)
    for round_, values in enumerate(changes):
        change = RawChange(round_, 1, values)
        row = memory.added_to(change)
        largest = np.sort(np.argsort(-np.abs(row), kind="stable")[:kept])
        payload = quantise(largest, row[largest], grid_bits=GRID, width="int8").payload
        memory.keep(change, payload, unit=2.0**-GRID)
        sent[payload.indices] += payload.values * 2.0**-GRID
    left = memory.added_to(RawChange(9, 1, np.zeros(6, np.float32)))
    np.testing.assert_allclose(sent + left, np.sum(changes, axis=0), atol=1e-5)


@pytest.mark.slow
def test_what_a_round_left_out_is_sent_by_the_next(hospital_with):
    run = make_run(**LEFT)
    hospital = hospital_with(allow_none=True)
    first = sent_vector(hospital.run_round(run, 0, VIEW, samples=SAMPLES), run)
    second = sent_vector(hospital.run_round(run, 1, VIEW, samples=SAMPLES), run)
    assert np.count_nonzero(first) == np.count_nonzero(second) == 4
    fresh = sent_vector(
        hospital_with(allow_none=True, ledger=_other(hospital)).run_round(
            run, 1, VIEW, samples=SAMPLES
        ),
        run,
    )
    assert np.abs(second).sum() > 1.2 * np.abs(fresh).sum()


def test_a_repeated_round_neither_uses_nor_changes_what_is_left(hospital_with):
    run = make_run(**LEFT)
    hospital = hospital_with(allow_none=True)
    straight = [hospital.run_round(run, r, VIEW, samples=SAMPLES).payload for r in range(3)]
    hospital = hospital_with(allow_none=True, ledger=_other(hospital))
    repeated = []
    for r in range(3):
        repeated.append(hospital.run_round(run, r, VIEW, samples=SAMPLES).payload)
        for again in range(r + 1):
            result = hospital.run_round(run, again, VIEW + 1, samples=SAMPLES)
            assert result.payload == straight[again]
    assert repeated == straight


def test_another_run_starts_with_nothing_left(hospital_with):
    run, other = make_run(**LEFT), make_run(**LEFT, name="second")
    hospital = hospital_with(allow_none=True)
    hospital.run_round(run, 0, VIEW, samples=SAMPLES)
    after = hospital.run_round(other, 0, VIEW, samples=SAMPLES).payload
    hospital = hospital_with(allow_none=True, ledger=_other(hospital))
    assert hospital.run_round(other, 0, VIEW, samples=SAMPLES).payload == after


def _other(hospital) -> Path:
    return Path(hospital.policy.ledger).with_name("another.db")


# --- by type, not by hope ------------------------------------------------------------------------

MISUSE = """
from p2pfed.privacy.gate import Released
from p2pfed.privacy.mechanism import Release
from p2pfed.training.contributions import PatientContributions
from p2pfed.training.feedback import DriftCorrection, ErrorFeedback, RawChange
from p2pfed.wire.payload import Payload

def allowed(e: ErrorFeedback, d: DriftCorrection, p: Payload, change: RawChange) -> None:
    e.added_to(change); e.keep(change, p, unit=1.0); d.keep(change)

def gate(e: ErrorFeedback, d: DriftCorrection, p: Payload, noised: Released) -> None:
    e.added_to(noised)
    e.keep(noised, p, unit=1.0)
    d.keep(noised)

def release(e: ErrorFeedback, d: DriftCorrection, p: Payload, noised: Release) -> None:
    e.added_to(noised)
    e.keep(noised, p, unit=1.0)
    d.keep(noised)

def patients(e: ErrorFeedback, d: DriftCorrection, p: Payload, rows: PatientContributions) -> None:
    e.added_to(rows)
    e.keep(rows, p, unit=1.0)
    d.keep(rows)
"""


@pytest.mark.slow
def test_the_type_checker_lets_no_noised_release_near_the_memory(tmp_path, monkeypatch):
    from mypy import api as mypy

    root = Path(__file__).resolve().parent.parent
    monkeypatch.chdir(root)
    file = tmp_path / "misuse.py"
    file.write_text(MISUSE)
    out, _, code = mypy.run(["--strict", "--follow-imports=silent", str(file)])
    wrong = [line for line in out.splitlines() if " error: " in line]
    assert code == 1
    assert len(wrong) == 9, out
    assert all('expected "RawChange"' in line for line in wrong)


def test_only_a_raw_change_is_remembered_and_only_local_training_makes_one():
    for kept in (
        ErrorFeedback.added_to,
        ErrorFeedback.keep,
        DriftCorrection.keep,
        LocalMemory.keep,
    ):
        assert typing.get_type_hints(kept)["change"] is RawChange
    source = inspect.getsource(sys.modules["p2pfed.training.round"])
    assert "RawChange" not in source
    assert inspect.getsource(feedback_module).count("RawChange(") == 1
    for other in (GateOutput, Release, PatientContributions):
        assert not issubclass(other, RawChange)


def test_a_release_with_noise_has_nothing_that_could_be_remembered():
    release = Release(np.arange(3), np.ones(3, np.int64))
    payload = Payload(np.arange(3), np.ones(3, np.int16))
    for memory in (ErrorFeedback(), DriftCorrection()):
        arguments = {"sent": payload, "unit": 1.0} if isinstance(memory, ErrorFeedback) else {}
        with pytest.raises(AttributeError):
            memory.keep(GateOutput(release, "svt", "patient", None), **arguments)


@pytest.mark.parametrize("mechanism", ["svt", "gaussian"])
def test_a_run_with_noise_leaves_the_memory_empty(hospital_with, mechanism):
    hospital = hospital_with()
    result = hospital.run_round(make_run(mechanism=mechanism), 0, VIEW, samples=SAMPLES)
    assert isinstance(result, Released)
    assert hospital._memory[1] == LocalMemory(None, None)


# --- drift correction ----------------------------------------------------------------------------


def test_the_correction_is_the_mean_step_less_the_own_raw_step():
    drift = DriftCorrection()
    assert drift.correction(MeanDelta(0, np.ones(2, np.float32))) is None
    drift.keep(RawChange(0, 10, np.array([1, 2], np.float32)))
    first = drift.correction(MeanDelta(0, np.array([3, 4], np.float32)))
    assert first.tolist() == pytest.approx([0.2, 0.2])
    drift.keep(RawChange(1, 10, np.array([3, 4], np.float32)))  # raw: .1, .2 after the correction
    second = drift.correction(MeanDelta(1, np.array([0, 0], np.float32)))
    assert second.tolist() == pytest.approx([-0.1, -0.2])


def test_a_mean_of_a_round_without_this_hospital_changes_nothing_and_none_counts_twice():
    drift = DriftCorrection()
    drift.keep(RawChange(4, 1, np.array([1], np.float32)))
    assert drift.correction(None) is None
    for round_ in (3, 5):
        assert drift.correction(MeanDelta(round_, np.array([9], np.float32))) is None
    for value in (3.0, 7.0):
        mean = MeanDelta(4, np.array([value], np.float32))
        assert drift.correction(mean).tolist() == [2]


def test_hospitals_that_pull_apart_meet_at_the_common_optimum_with_drift_correction():
    """Two parabolas of different width: many local steps without correction end elsewhere."""
    width, centre, steps, rate = np.array([1.0, 9.0]), np.array([0.0, 1.0]), 20, 0.05

    def trained(corrected: bool) -> float:
        model, memories = np.float32(0), [DriftCorrection(), DriftCorrection()]
        mean = None
        for round_ in range(200):
            changes = []
            for i, memory in enumerate(memories):
                shift, x = memory.correction(mean) if corrected else None, float(model)
                for _ in range(steps):
                    x -= rate * width[i] * (x - centre[i])
                    x += 0.0 if shift is None else float(shift[0])
                changes.append(np.array([x - model], np.float32))
                memory.keep(RawChange(round_, steps, changes[-1]))
            mean = MeanDelta(round_, np.mean(changes, axis=0))
            model += mean.values[0]
        return float(model)

    best = (width * centre).sum() / width.sum()
    assert abs(trained(corrected=False) - best) > 0.2
    assert abs(trained(corrected=True) - best) < 0.001


def test_a_shift_is_added_to_every_step():
    hospital = BreastCancer().data(None, {"site": 0})
    shift = np.linspace(-1, 1, 31, dtype=np.float32) / 64
    how = {"steps": 4, "learning_rate": 0.0, "batch_size": 16, "seed": 1}
    ended = train_local(BreastCancer(), hospital.train, VIEW, shift=shift, **how).vector
    np.testing.assert_allclose(ended, VIEW + 4 * shift, atol=1e-6)
    torch.testing.assert_close(
        train_local(BreastCancer(), hospital.train, VIEW, **how).vector, VIEW, rtol=0, atol=0
    )


def test_a_round_uses_the_mean_of_the_round_before(hospital_with):
    run = make_run(
        **NONE | {"top_fraction": Fraction(1)}, averaging=Averaging(drift_correction=True)
    )
    hospital = hospital_with(allow_none=True)
    first = sent_vector(hospital.run_round(run, 0, VIEW, samples=SAMPLES), run)
    mean = MeanDelta(0, (first + np.full(31, 0.5)).astype(np.float32))
    with_mean = hospital.run_round(run, 1, VIEW, samples=SAMPLES, mean=mean)
    again = hospital.run_round(run, 1, VIEW, samples=SAMPLES)
    assert again == with_mean
    other = hospital_with(allow_none=True, ledger=_other(hospital))
    other.run_round(run, 0, VIEW, samples=SAMPLES)
    without = other.run_round(run, 1, VIEW, samples=SAMPLES)
    moved = sent_vector(with_mean, run) - sent_vector(without, run)
    assert (moved > 0.1).all()  # each step went its share of the half further up


# --- participation scaling -----------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["svt", "none"])
def test_released_values_are_scaled_after_the_gate(hospital_with, mechanism):
    averaging = Averaging(participation_scaling=True)
    how = {"averaging": averaging, **(NONE if mechanism == "none" else {})}
    run, hospital = make_run(**how), hospital_with(allow_none=True)
    plain = hospital.run_round(run, 0, VIEW, samples=SAMPLES)
    scaled = hospital.run_round(run, 0, VIEW, samples=SAMPLES, scale=Fraction(5, 2))
    assert scaled.spent_nano_rho == plain.spent_nano_rho
    assert scaled.releases == plain.releases == 1
    np.testing.assert_allclose(
        sent_vector(scaled, run), 2.5 * sent_vector(plain, run), atol=2 * 2.0**-GRID
    )


@pytest.mark.parametrize("scale", [Fraction(0), Fraction(1, 2), Fraction(9, 2), Fraction(1 << 53)])
def test_a_scale_out_of_range_is_refused(hospital_with, scale):
    run = make_run(averaging=Averaging(participation_scaling=True))
    hospital = hospital_with()
    result = hospital.run_round(run, 0, VIEW, samples=SAMPLES, scale=scale)
    assert result == Refused("the run does not scale deltas so")
    assert hospital.spent.debits == 0


def test_a_run_without_participation_scaling_refuses_to_scale(hospital_with):
    result = hospital_with().run_round(make_run(), 0, VIEW, samples=SAMPLES, scale=Fraction(2))
    assert result == Refused("the run does not scale deltas so")


# --- eight bits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["svt", "gaussian", "none"])
def test_every_mechanism_releases_eight_bits_when_the_run_says_so(hospital_with, mechanism):
    how = NONE if mechanism == "none" else {"mechanism": mechanism}
    wide, low = make_run(**how), make_run(**how, encoding=Encoding("int8"))
    hospital = hospital_with(allow_none=True)
    result = hospital.run_round(low, 0, VIEW, samples=SAMPLES)
    sent = sent_vector(result, low)
    step = 2.0**-GRID * 2 ** next(e for e in range(9) if np.abs(sent).max() * 2**GRID <= 127 * 2**e)
    assert (sent / step == np.rint(sent / step)).all()
    if mechanism == "none":
        exact = sent_vector(hospital.run_round(wide, 0, VIEW, samples=SAMPLES), wide)
        # The two runs train with seeds of their own: alike in size, not equal.
        assert np.abs(sent).max() < 3 * np.abs(exact).max()
