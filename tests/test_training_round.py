"""One round: policy, budget, repetition, post-processing. Real ledger, real gate, real patients."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import broken_tasks
import numpy as np
import pytest
import torch
from torch import nn

from p2pfed.config import Settings
from p2pfed.errors import BudgetExhausted, UpdateRejected
from p2pfed.identity.run import Gate, Outer, Run
from p2pfed.privacy.accountant import Cost, epsilon_spent
from p2pfed.privacy.gate import decode_release
from p2pfed.privacy.ledger import Ledger, ReleaseKey
from p2pfed.privacy.worth import WORTH
from p2pfed.tasks.breast_cancer import BreastCancer
from p2pfed.training.contributions import PatientContributions
from p2pfed.training.guarded import TaskFailed
from p2pfed.training.local import initial_vector, train_local
from p2pfed.training.round import Exhausted, Hospital, Refused, Released, Skipped
from p2pfed.training.task import Split, TaskData, task_id
from p2pfed.wire.payload import decode_payload

SAMPLES = 116


def make_run(**changes):
    task = BreastCancer()
    run = Run(
        name="first",
        network_id=bytes(32),
        task=task.name,
        task_id=task_id(task),
        genesis=bytes(32),
        num_parameters=31,
        rounds=4,
        grid_bits=14,
        mechanism="svt",
        unit="patient",
        epsilon=Fraction(10),
        delta=Fraction(1, 100_000),
        clip=Fraction(1),
        block_size=1,
        segment_blocks=2,
        select_share=Fraction(1, 5),
        top_fraction=Fraction(1, 2),
        outer=Outer("fedadam", 0.05),
        robust="none",
        quorum=0.8,
        min_live=0.5,
        deadline_s=60.0,
        min_round_interval_s=0.0,
    )
    return Run.decode(replace(run, **changes).encode())


NONE = {"mechanism": "none", "unit": "none", "epsilon": Fraction(0), "delta": Fraction(0)}


def make_settings(tmp_path, **privacy):
    privacy = {"epsilon": "10", "ledger": tmp_path / "ledger.db", **privacy}
    return Settings.model_validate(
        {
            "node": {"name": "a", "data_dir": tmp_path},
            "train": {"task": "breast-cancer", "options": {"site": 0}},
            "privacy": privacy,
        }
    )


@pytest.fixture
def hospital_with(tmp_path):
    ledgers = []

    def make(task=None, **privacy):
        while ledgers:
            ledgers.pop().close()
        settings = make_settings(tmp_path, **privacy)
        ledgers.append(Ledger.open(settings.ledger_path))
        task = task or BreastCancer()
        return Hospital(settings, task, task.data(None, {"site": 0}), ledgers[-1])

    yield make
    for ledger in ledgers:
        ledger.close()


VIEW = initial_vector(BreastCancer(), seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["svt", "gaussian"])
def test_a_round_releases_a_payload_that_the_run_allows(hospital_with, mechanism):
    run = make_run(mechanism=mechanism)
    result = hospital_with().run_round(run, 0, VIEW, samples=SAMPLES)
    assert isinstance(result, Released)
    payload = decode_payload(result.payload, num_parameters=31, max_released=run.max_released)
    assert payload.indices.size > 0
    assert result.mechanism == mechanism
    assert result.releases == 1
    assert 0 < result.spent_epsilon < 10
    assert len(result.ledger_head) == 32


def test_the_payload_is_the_noisy_sum_over_the_public_number_of_patients(hospital_with):
    hospital, run = (
        hospital_with(),
        make_run(epsilon=Fraction(1000), rounds=1, mechanism="gaussian", top_fraction=Fraction(1)),
    )
    hospital = hospital_with(epsilon="1000")
    result = hospital.run_round(run, 0, VIEW, samples=SAMPLES)
    payload = decode_payload(result.payload, num_parameters=31, max_released=31)
    mean = np.zeros(31)
    mean[payload.indices] = payload.values / 2.0**14
    rows = np.concatenate(
        list(PatientContributions(BreastCancer(), VIEW, hospital.data.train).chunks())
    )
    rows /= np.maximum(1, np.linalg.norm(rows, axis=1, keepdims=True))
    # sigma = 1 / sqrt(2 rho) / 116 = 2.5e-4 for rho near 780; 8 sigma over 31 values: p < 1e-12
    np.testing.assert_allclose(mean, rows.sum(axis=0) / SAMPLES, atol=8 * 2.5e-4 + 2**-14)


def test_a_round_is_released_once_and_given_again_byte_for_byte(hospital_with):
    run = make_run()
    first = hospital_with().run_round(run, 2, VIEW, samples=SAMPLES)
    again = hospital_with().run_round(run, 2, VIEW + 1, samples=SAMPLES)  # new process, other view
    assert isinstance(first, Released)
    assert again == first
    assert again.releases == 1


def test_without_privacy_a_round_has_one_answer_too(hospital_with):
    run = make_run(**NONE)
    first = hospital_with(allow_none=True).run_round(run, 0, VIEW, samples=SAMPLES)
    again = hospital_with(allow_none=True).run_round(run, 0, VIEW + 1, samples=SAMPLES)
    assert isinstance(first, Released)
    assert again == first
    assert first.spent_nano_rho == 0


@pytest.mark.slow
def test_without_privacy_the_largest_changes_of_local_training_are_sent(hospital_with):
    hospital, run = hospital_with(allow_none=True, epsilon=0), make_run(**NONE)
    result = hospital.run_round(run, 0, VIEW, samples=SAMPLES)
    payload = decode_payload(result.payload, num_parameters=31, max_released=run.max_released)
    hyper, split = BreastCancer.hyper, hospital.data.train
    import hashlib

    seed = int.from_bytes(hashlib.blake2b(run.run_id + bytes(8), digest_size=7).digest())
    change = train_local(
        BreastCancer(), split, VIEW, steps=hyper.local_steps, seed=seed,
        learning_rate=hyper.learning_rate, batch_size=hyper.batch_size,
    ).vector - VIEW  # fmt: skip
    largest = np.sort(np.argsort(-np.abs(change))[:16])
    assert payload.is_dense  # 16 of 31 are shorter so
    assert np.flatnonzero(payload.values).tolist() == largest.tolist()
    np.testing.assert_allclose(payload.values[largest] / 2.0**14, change[largest], atol=2**-14)


def test_all_releases_of_a_run_stay_within_its_epsilon(hospital_with):
    hospital, run = hospital_with(epsilon="1000"), make_run()
    results = [hospital.run_round(run, r, VIEW, samples=SAMPLES) for r in range(5)]
    assert [type(r) for r in results] == [Released] * 4 + [Exhausted]
    assert results[4].releases == 4
    assert 9.9 < epsilon_spent({Cost(results[4].spent_nano_rho, None): 1}, 1e-5) <= 10


def test_a_lifetime_budget_of_three_rounds_allows_three_releases(hospital_with):
    run = make_run(rounds=40)
    one = hospital_with().run_round(run, 0, VIEW, samples=SAMPLES)
    three = epsilon_spent({Cost(one.spent_nano_rho, None): 3}, 1e-5)
    hospital = hospital_with(epsilon=str(three * 1.000001))
    results = [hospital.run_round(run, r, VIEW, samples=SAMPLES) for r in range(6)]
    assert [type(r) for r in results] == [Released] * 3 + [Exhausted] * 3
    assert results[5].releases == 3
    assert results[5].spent_nano_rho == 3 * one.spent_nano_rho


def test_a_new_run_does_not_refill_the_lifetime_budget(hospital_with):
    hospital = hospital_with(epsilon="10")
    for r in range(4):
        assert isinstance(hospital.run_round(make_run(), r, VIEW, samples=SAMPLES), Released)
    other = make_run(name="second")
    assert isinstance(hospital.run_round(other, 0, VIEW, samples=SAMPLES), Exhausted)


@pytest.mark.parametrize(
    ("changes", "privacy", "part"),
    [
        ({"task_id": b"x" * 32}, {}, "version of the task"),
        ({"num_parameters": 32}, {}, "another size"),
        (NONE, {}, "not allowed here"),
        ({}, {"epsilon": 0, "allow_none": True}, "no lifetime budget"),
        ({"rounds": 1_000_000, "epsilon": Fraction(1, 10**5)}, {}, "too many rounds"),
    ],
)
def test_a_run_against_the_hospitals_policy_is_refused(hospital_with, changes, privacy, part):
    hospital = hospital_with(**privacy)
    result = hospital.run_round(make_run(**changes), 0, VIEW, samples=SAMPLES)
    assert isinstance(result, Refused)
    assert part in result.reason
    assert hospital.spent.debits == 0


def test_a_unit_below_the_floor_is_refused(hospital_with):
    nobody = replace(make_run(), unit="none")  # a signed run cannot say so; a broken peer could
    for floor, run in (("patient", nobody), ("hospital", make_run())):
        hospital = hospital_with(unit=floor)
        result = hospital.run_round(run, 0, VIEW, samples=SAMPLES)
        assert result == Refused("the run's unit is below our floor")
        assert hospital.spent.debits == 0


@pytest.mark.slow
def test_the_hospital_as_the_unit_is_above_both_floors_and_makes_one_contribution(hospital_with):
    run = make_run(unit="hospital")
    for floor in ("patient", "hospital"):
        hospital = hospital_with(unit=floor)
        assert isinstance(hospital.run_round(run, 0, VIEW, samples=SAMPLES), Released)
        [debit] = [entry for entry in hospital.ledger.entries() if entry.kind == "debit"][-1:]
        assert debit.detail["unit"] == "hospital"
        assert debit.detail["relation"].startswith("replacement: the hospital's whole")


@pytest.mark.slow
def test_groups_of_patients_make_one_contribution_each_and_are_replaced_not_zeroed(hospital_with):
    run = make_run(gate=Gate(patients_per_row=5))
    hospital = hospital_with()
    assert isinstance(hospital.run_round(run, 0, VIEW, samples=SAMPLES), Released)
    debit = hospital.ledger.entries()[-2]
    assert debit.detail["relation"].startswith("replacement: one patient of a group of 5")
    groups = hospital._grouped(5)
    assert groups.num_patients == -(-hospital.data.train.num_patients // 5)
    assert hospital._grouped(5) is groups
    too_few = make_run(gate=Gate(patients_per_row=SAMPLES + 1))
    refused = hospital.run_round(too_few, 0, VIEW, samples=SAMPLES)
    assert refused == Refused("the roster names fewer patients than a group has")


@pytest.mark.slow
def test_a_worth_gate_is_paid_for_once_and_says_no_for_free(hospital_with):
    """No update is a thousand times as long as its noise: every answer is "no" (below 1e-9)."""
    gate = Gate(worth_releases=2, worth_ratio=Fraction(1000))
    hospital, run = hospital_with(), make_run(gate=gate)
    for number in range(4):
        result = hospital.run_round(run, number, VIEW, samples=SAMPLES)
        assert result == Skipped("the worth gate said no: this update is not worth its budget")
    kinds = [entry.kind for entry in hospital.ledger.entries()]
    assert kinds == ["open", "register", "debit"]
    assert hospital.ledger.entries()[-1].detail["mechanism"] == WORTH
    again = hospital_with()  # a restart ends the instance: the next one is paid for anew
    again.run_round(run, 0, VIEW, samples=SAMPLES)
    assert [entry.kind for entry in again.ledger.entries()] == [*kinds, "debit"]


@pytest.mark.slow
def test_another_grid_has_a_worth_gate_of_its_own_which_is_paid_for(hospital_with):
    """The sensitivity in grid units follows the roster's samples, which may change in a run."""
    gate = Gate(worth_releases=4, worth_ratio=Fraction(1000))
    hospital, run = hospital_with(), make_run(gate=gate, rounds=8)
    for number, samples in enumerate((1 << 20, SAMPLES, SAMPLES, 1 << 20)):
        assert isinstance(hospital.run_round(run, number, VIEW, samples=samples), Skipped)
    paid = [entry.detail["mechanism"] for entry in hospital.ledger.entries()[2:]]
    assert paid == [WORTH, WORTH]  # and none for the third and the fourth round


def test_a_run_whose_noise_could_not_be_drawn_is_refused_before_anything_is_paid(hospital_with):
    changes = {"epsilon": Fraction(1, 10**8), "mechanism": "svt-textbook", "rounds": 1}
    hospital, run = hospital_with(), make_run(**changes, select_share=Fraction(999_999, 10**6))
    result = hospital.run_round(run, 0, VIEW, samples=SAMPLES)
    assert isinstance(result, Refused)
    assert hospital.spent.debits == 0


@pytest.mark.slow
def test_a_yes_of_the_worth_gate_releases_and_ends_its_instance(hospital_with):
    gate = Gate(
        worth_releases=2, worth_ratio=Fraction(0)
    )  # a threshold of 0: surely within some rounds
    hospital, run = hospital_with(), make_run(gate=gate, rounds=200)
    results = [hospital.run_round(run, n, VIEW, samples=SAMPLES) for n in range(60)]
    released = [result for result in results if isinstance(result, Released)]
    assert len(released) == 2  # the run's epsilon is spread over these
    assert isinstance(results[-1], Exhausted)
    mechanisms = [
        entry.detail["mechanism"] for entry in hospital.ledger.entries() if entry.kind == "debit"
    ]
    assert mechanisms == [WORTH, "svt", WORTH, "svt"]
    assert hospital.spent.epsilon <= 10


@pytest.mark.parametrize(
    ("number", "samples"), [(-1, 116), (5, 116), (10**12, 116), (0, 0), (0, 1 << 40)]
)
def test_a_round_that_the_run_does_not_have_is_refused(hospital_with, number, samples):
    result = hospital_with().run_round(make_run(), number, VIEW, samples=samples)
    assert isinstance(result, Refused)


class Overflowing(BreastCancer):
    def loss(self, output, target):
        return super().loss(output, target) * torch.tensor(float("nan"))


class Normed(BreastCancer):
    def model(self):
        return nn.Sequential(nn.BatchNorm1d(30), nn.Linear(30, 1), nn.Flatten(0))


@pytest.mark.slow
def test_formal_guarantee_no_patient_decides_whether_a_round_is_released(tmp_path):
    """A model whose sums meet both infinities is NaN for all patients but one of zeros."""
    view = np.zeros(31, np.float32)
    view[0:30:2], view[1:30:2] = 3e38, -3e38
    for exception in (False, True):
        x = torch.ones(20, 30)
        x[7] *= not exception
        split = Split(x, torch.zeros(20), torch.arange(20))
        with Ledger.open(tmp_path / f"{exception}.db") as ledger:
            hospital = Hospital(
                make_settings(tmp_path), BreastCancer(), TaskData(split, split), ledger
            )
            result = hospital.run_round(make_run(), 0, view, samples=20)
            assert isinstance(result, Released)
            assert (hospital.spent.debits, hospital.unusable) == (1, 20 - exception)


def test_without_privacy_a_loss_that_is_not_a_number_skips_the_round(hospital_with):
    task = Overflowing()
    hospital = hospital_with(task, allow_none=True)
    run = make_run(task_id=task_id(task), **NONE)
    result = hospital.run_round(run, 0, VIEW, samples=SAMPLES)
    assert isinstance(result, Skipped)
    assert not any(character.isdigit() for character in result.reason)
    assert hospital.spent.debits == 0


@pytest.mark.parametrize("clip", [Fraction(1, 10**6), Fraction(1), Fraction(10**6)])
@pytest.mark.parametrize("samples", [1, 116, 100_000, 16_000_000])
@pytest.mark.parametrize("mechanism", ["svt", "gaussian"])
def test_the_sum_over_all_patients_fits_the_grid(hospital_with, clip, samples, mechanism):
    plan = hospital_with()._plan(make_run(clip=clip, mechanism=mechanism), 0, samples)
    assert plan.limit >= 2**4
    assert samples * plan.limit < 2**31 or clip == 10**6  # such a clip starts above the grid


@pytest.mark.slow
def test_running_statistics_are_refused_under_privacy_and_stay_at_home_without(hospital_with):
    task = Normed()
    view = initial_vector(task, seed=0)
    hospital = hospital_with(task, allow_none=True)
    size = {"task_id": task_id(task), "num_parameters": view.size}
    refused = hospital.run_round(make_run(**size), 0, view, samples=SAMPLES)
    assert isinstance(refused, Refused)
    assert "running_mean" in refused.reason
    assert isinstance(
        hospital.run_round(make_run(**size, **NONE), 0, view, samples=SAMPLES), Released
    )


def test_the_threshold_follows_from_the_nodes_own_releases_alone(hospital_with):
    """A restarted trainer that has only the ledger steers to the same threshold."""
    hospital, run = hospital_with(), make_run()
    for r in (0, 2):
        hospital.run_round(run, r, VIEW, samples=SAMPLES)
    steered = hospital._plan(run, 3, SAMPLES)
    assert hospital_with()._plan(run, 3, SAMPLES) == steered
    release = decode_release(hospital_with().ledger.output(ReleaseKey(run.run_id, 0)).payload)
    accepted = release.indices.size / steered.num_segments
    first, second = (hospital_with()._plan(run, r, SAMPLES) for r in (0, 1))
    assert (second.threshold > first.threshold) == (accepted > 0.97)
    assert second.threshold != first.threshold
    assert first.shuffle_seed != second.shuffle_seed


class RefusesAsWeDo(broken_tasks.Sound):
    """Its own code raises one of our errors, which elsewhere skips a round."""

    def loss(self, output, target):
        raise UpdateRejected("patient R-1001")


class SpentAsWeSay(broken_tasks.Sound):
    def loss(self, output, target):
        raise BudgetExhausted("patient R-1001")


class FailsInTheEnd(broken_tasks.Sound):
    """The rows of some patients, or some steps, are there already when it fails."""

    hyper = replace(broken_tasks.Sound.hyper, local_steps=4)
    calls = 0

    def data(self, folder, options):
        parts = [broken_tasks.split(f"{n}-", 3, of_each=n) for n in (1, 2)]
        owner = torch.cat([parts[0].patient, parts[1].patient + 3])
        x, y = (torch.cat([getattr(part, key) for part in parts]) for key in "xy")
        ids = parts[0].patient_ids + parts[1].patient_ids
        return TaskData(Split(x, y, owner, ids), broken_tasks.split("b", 3))

    def loss(self, output, target):
        self.calls += 1
        if self.calls > 2:
            raise RuntimeError("the second group of patients, or the third step")
        return super().loss(output, target)


BROKEN = {
    broken_tasks.LossRaises: ValueError,
    broken_tasks.LossIsFloat: Exception,
    broken_tasks.LabelsOutOfRange: Exception,
    broken_tasks.EatsMemory: MemoryError,
    RefusesAsWeDo: TaskFailed,
    SpentAsWeSay: TaskFailed,
    FailsInTheEnd: RuntimeError,
}


@pytest.mark.parametrize("mechanism", ["svt", "gaussian"])
@pytest.mark.parametrize(
    ("task", "unit"),
    [
        (task, unit)
        for task in BROKEN
        for unit in ("patient", "hospital")
        if (task, unit) != (RefusesAsWeDo, "hospital")  # zeros, as for NaN: that is paid for
    ],
)
def test_formal_guarantee_a_task_that_fails_spends_nothing(hospital_with, task, mechanism, unit):
    """Whatever breaks before the debit, in the first patient or the last, costs no budget."""
    made = task()
    hospital = hospital_with(made)
    size = hospital.num_parameters
    run = make_run(
        task=made.name, task_id=task_id(made), num_parameters=size, mechanism=mechanism, unit=unit
    )
    for _ in range(2):  # nor the second time
        with pytest.raises(BROKEN[task]):
            hospital.run_round(run, 0, initial_vector(made, seed=0), samples=6)
        assert hospital.spent.debits == 0
        assert [entry.kind for entry in hospital.ledger.entries()] == ["open", "register"]


class FailsWhenPaid(broken_tasks.Sound):
    """Fails as soon as the ledger has a debit."""

    ledger = None

    def loss(self, output, target):
        if any(entry.kind == "debit" for entry in self.ledger.entries()):
            raise MemoryError
        return super().loss(output, target)


@pytest.mark.parametrize(("mechanism", "spent"), [("svt", 1), ("gaussian", 0)])
def test_only_svt_computes_again_after_the_debit_which_then_stays(hospital_with, mechanism, spent):
    """As docs/privacy.md says of what a lost round may cost."""
    task = FailsWhenPaid()
    hospital = hospital_with(task)
    task.ledger = hospital.ledger
    run = make_run(task=task.name, task_id=task_id(task), num_parameters=4, mechanism=mechanism)
    view = initial_vector(task, seed=0)
    if spent:
        with pytest.raises(MemoryError):
            hospital.run_round(run, 0, view, samples=6)
    else:
        assert isinstance(hospital.run_round(run, 0, view, samples=6), Released)
    outputs = [entry.kind for entry in hospital.ledger.entries()].count("output")
    assert (hospital.spent.debits, outputs) == (1, 1 - spent)
