"""One row per patient: equal to the plain loop, and a function of that patient alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import mse_loss

from p2pfed.errors import ConfigError, UpdateRejected
from p2pfed.training.contributions import PatientContributions
from p2pfed.training.local import initial_vector
from p2pfed.training.task import HyperParameters, Split, Task
from p2pfed.training.vector import get_vector, set_vector
from p2pfed.training.watch import Watch


class Small(Task):
    name = "small"

    def model(self):
        return nn.Sequential(
            nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 1), nn.Flatten(0)
        )

    def data(self, folder, options):
        raise NotImplementedError

    def loss(self, output, target):
        return mse_loss(output, target, reduction="none")

    def metrics(self, model, split):
        return {}


class Stepwise(Small):
    hyper = HyperParameters(patient_steps=3, patient_learning_rate=0.2)


class Branching(Small):
    """Control flow on data: vmap refuses it."""

    def loss(self, output, target):
        sign = 1.0 if float(output.sum().detach()) > 0 else 2.0
        return sign * super().loss(output, target)


class Normed(Small):
    def model(self):
        return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1), nn.Flatten(0))


def patients(counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts)
    owner = torch.tensor([p for p, count in enumerate(counts) for _ in range(count)])
    order = torch.randperm(total, generator=generator)
    x = torch.randn(total, 3, generator=generator)
    return Split(x, torch.randn(total, generator=generator), owner[order])


def rows_of(contributions):
    found = np.full((contributions.num_patients, contributions.num_parameters), np.nan, np.float32)
    for who, rows in contributions.labelled_chunks():
        found[who] = rows
    return found


def naive(task, vector, split):
    rows = []
    for records in split.records_of:
        model = task.model()
        set_vector(model, vector)
        model.eval()
        if not task.hyper.patient_steps:
            task.loss(model(split.x[records]), split.y[records]).mean().backward()
            rows.append(np.concatenate([-p.grad.numpy().ravel() for p in model.parameters()]))
            continue
        sgd = torch.optim.SGD(model.parameters(), lr=task.hyper.patient_learning_rate)
        for _ in range(task.hyper.patient_steps):
            sgd.zero_grad()
            task.loss(model(split.x[records]), split.y[records]).mean().backward()
            sgd.step()
        rows.append(get_vector(model) - vector)
    return np.stack(rows)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=7),
    seed=st.integers(0, 1000),
    chunk=st.sampled_from([1, 700, 1 << 20]),
    task=st.sampled_from([Small(), Stepwise(), Branching()]),
)
def test_rows_equal_the_plain_loop_over_patients(counts, seed, chunk, task):
    split, vector = patients(counts, seed), initial_vector(task, seed=seed)
    found = rows_of(PatientContributions(task, vector, split, chunk_bytes=chunk))
    np.testing.assert_allclose(found, naive(task, vector, split), rtol=2e-4, atol=2e-6)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(
    counts=st.lists(st.integers(1, 2), min_size=2, max_size=6),
    who=st.integers(0, 5),
    task=st.sampled_from([Small(), Stepwise(), Branching()]),
)
def test_formal_guarantee_one_patient_moves_one_row(counts, who, task):
    """Whatever one patient's records become, every other row stays the same to the bit."""
    split, vector = patients(counts), initial_vector(task, seed=1)
    who %= len(counts)
    x = split.x.clone()
    x[split.records_of[who]] = 1e3
    before = rows_of(PatientContributions(task, vector, split))
    after = rows_of(PatientContributions(task, vector, replace(split, x=x)))
    others = [p for p in range(len(counts)) if p != who]
    assert (before[others] == after[others]).all()
    assert (before[who] != after[who]).any()


def test_removing_a_patient_removes_exactly_its_row():
    split, vector = patients([2, 1, 2, 1]), initial_vector(Small(), seed=1)
    kept = split.patient != 2
    renumbered = split.patient[kept] - (split.patient[kept] > 2).long()
    without = Split(split.x[kept], split.y[kept], renumbered)
    whole = rows_of(PatientContributions(Small(), vector, split))
    part = rows_of(PatientContributions(Small(), vector, without))
    np.testing.assert_allclose(part, np.delete(whole, 2, axis=0), rtol=1e-5, atol=1e-7)


def test_two_readings_agree():
    contributions = PatientContributions(
        Small(), initial_vector(Small(), seed=1), patients([1] * 9)
    )
    first, second = (np.concatenate(list(contributions.chunks())) for _ in range(2))
    assert (first == second).all()
    assert first.dtype == np.float32


def test_memory_bounds_the_patients_of_a_chunk():
    vector = initial_vector(Small(), seed=1)
    each = PatientContributions(Small(), vector, patients([1] * 9))._bytes_of(0)
    assert each > 16 * vector.size  # its activations count as well
    chunks = PatientContributions(Small(), vector, patients([1] * 9), chunk_bytes=4 * each)
    assert [len(rows) for rows in chunks.chunks()] == [4, 4, 1]


def test_memory_that_runs_out_halves_the_chunk_and_says_so():
    """The same rows come, and a task that cannot do even one patient still fails."""
    vector, split, watch = initial_vector(Small(), seed=1), patients([1] * 9), Watch()

    class Scarce(PatientContributions):
        def _rows(self, chosen):
            if len(chosen) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super()._rows(chosen)

    scarce = Scarce(Small(), vector, split, watch=watch)
    scarce.room = 2
    assert [len(rows) for rows in scarce.chunks()] == [2, 2, 2, 2, 1]
    assert [len(rows) for rows in scarce.chunks()] == [2, 2, 2, 2, 1]  # it is remembered
    assert watch.notes == [f"memory ran out: {n} patients at a time from now on" for n in (4, 2)]
    whole = rows_of(PatientContributions(Small(), vector, split))
    np.testing.assert_allclose(rows_of(scarce), whole, atol=1e-6)
    scarce.room = 0
    with pytest.raises(torch.OutOfMemoryError):
        list(scarce.chunks())


def test_a_patient_whose_gradient_overflows_contributes_zeros():
    """A refusal that one patient can cause would tell of this patient."""
    split, vector = patients([1] * 4), initial_vector(Small(), seed=1)
    y = split.y.clone()
    y[split.records_of[2]] = 3e38
    with np.errstate(all="ignore"):
        rows = np.concatenate(
            list(PatientContributions(Small(), vector, replace(split, y=y)).chunks())
        )
    assert (rows[2] == 0).all()
    assert (rows[[0, 1, 3]] != 0).any(axis=1).all()


def test_formal_guarantee_no_refusal_tells_that_every_patient_overflows():
    """A refusal costs no budget: one patient who is an exception must not prevent it."""
    split, vector = patients([1] * 4), initial_vector(Small(), seed=1)
    broken = PatientContributions(Small(), vector, replace(split, y=torch.full((4,), 3e38)))
    with np.errstate(all="ignore"):
        for _ in range(2):
            assert all((rows == 0).all() for rows in broken.chunks())
            assert broken.unusable == 4


def test_a_model_with_running_statistics_is_refused():
    with pytest.raises(ConfigError, match="running_mean"):
        PatientContributions(Normed(), initial_vector(Normed(), seed=1), patients([1, 1]))


def test_a_view_of_another_size_is_refused():
    with pytest.raises(UpdateRejected):
        PatientContributions(Small(), np.zeros(3, np.float32), patients([1, 1]))
