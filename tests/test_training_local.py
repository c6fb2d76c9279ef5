"""Ordinary local training and the grid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pfed.errors import UpdateRejected
from p2pfed.tasks.breast_cancer import BreastCancer
from p2pfed.training.local import evaluate, initial_vector, quantise, train_local
from p2pfed.training.task import HyperParameters
from p2pfed.training.watch import Watch
from p2pfed.wire.payload import decode_payload, encode_payload

HOW = {"steps": 12, "learning_rate": 0.05, "batch_size": 16}


@pytest.fixture(scope="module")
def hospital():
    return BreastCancer().data(None, {"site": 0})


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_is_a_function_of_the_seed(hospital, optimizer, monkeypatch):
    monkeypatch.setattr(BreastCancer, "hyper", HyperParameters(optimizer=optimizer))
    task = BreastCancer()
    start = initial_vector(task, seed=3)
    one, same, other = (
        train_local(task, hospital.train, start, seed=s, **HOW).vector for s in (1, 1, 2)
    )
    assert one.tobytes() == same.tobytes() != other.tobytes()
    assert (
        evaluate(task, one, hospital.train)["loss"] < evaluate(task, start, hospital.train)["loss"]
    )


def test_training_and_first_values_leave_torchs_generator_alone(hospital):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    start = initial_vector(BreastCancer(), seed=3)
    train_local(BreastCancer(), hospital.train, start, seed=1, **HOW)
    assert torch.equal(torch.rand(3), expected)


class Diverging(BreastCancer):
    def loss(self, output, target):
        return super().loss(output, target) * torch.tensor(float("inf"))


def test_training_that_diverges_is_an_error(hospital):
    with pytest.raises(UpdateRejected, match="NaN or infinity"):
        train_local(Diverging(), hospital.train, initial_vector(Diverging(), seed=3), seed=1, **HOW)


class Scarce(BreastCancer):
    """Memory for so many records at a time."""

    room = 3

    def loss(self, output, target):
        if len(output) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().loss(output, target)


def test_memory_that_runs_out_halves_the_batch_and_changes_no_result(hospital):
    watch, start = Watch(), initial_vector(BreastCancer(), seed=3)
    whole, pieces = (
        train_local(task, hospital.train, start, seed=1, watch=watch, **HOW).vector
        for task in (BreastCancer(), Scarce())
    )
    np.testing.assert_allclose(pieces, whole, atol=1e-6)
    assert watch.notes == [
        f"memory ran out: batches go in {n} pieces from now on" for n in (2, 4, 8)
    ]
    without = Scarce()
    without.room = 0
    with pytest.raises(torch.OutOfMemoryError):
        train_local(without, hospital.train, start, seed=1, **HOW)


class Drawn(BreastCancer):
    """FedProx, and nothing else: the loss is flat."""

    hyper = replace(BreastCancer.hyper, proximal=0.5)

    def loss(self, output, target):
        return super().loss(output, target) * 0


def test_fedprox_draws_nowhere_from_the_common_model_itself(hospital):
    start = initial_vector(BreastCancer(), seed=3)
    stayed = train_local(Drawn(), hospital.train, start, seed=1, **HOW).vector
    np.testing.assert_array_equal(stayed, start)


def test_fedprox_draws_back_by_its_weight_times_the_distance(hospital):
    """After a shift s per step, step k moves by -rate mu d: d' = d (1 - rate mu) + s."""
    start, shift = initial_vector(BreastCancer(), seed=3), np.full(31, 0.1, np.float32)
    ended = train_local(
        Drawn(), hospital.train, start, seed=1, shift=shift, **HOW | {"steps": 3}
    ).vector
    kept = 1 - HOW["learning_rate"] * 0.5
    np.testing.assert_allclose(ended - start, 0.1 * (1 + kept + kept**2), rtol=1e-5)


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=30), st.integers(4, 16))
def test_quantising_rounds_to_the_nearest_multiple_or_cuts_off(values, bits):
    values = np.array(values)
    result = quantise(np.arange(values.size), values, grid_bits=bits)
    back = np.zeros(values.size)
    back[result.payload.indices] = result.payload.values / 2.0**bits
    most = 32767 / 2.0**bits
    inside = np.abs(values) <= most
    assert np.abs(back - values)[inside].max(initial=0) <= 0.5 / 2**bits
    assert (back[~inside] == np.sign(values[~inside]) * most).all()
    assert result.saturated == (np.abs(np.rint(values * 2.0**bits)) > 32767).sum()
    data = encode_payload(result.payload, num_parameters=values.size)
    again = decode_payload(data, num_parameters=values.size, max_released=values.size)
    assert (again.values[again.values != 0] == result.payload.values).all()
    assert (result.payload.values != 0).all()


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=30), st.integers(4, 16))
def test_quantising_to_eight_bits_keeps_eight_bits_of_the_largest_value(values, bits):
    values = np.array(values)
    size = values.size
    result = quantise(np.arange(size), values, grid_bits=bits, width="int8")
    back = np.zeros(size)
    back[result.payload.indices] = result.payload.values / 2.0**bits
    largest = np.abs(values).max() * 2.0**bits
    exponent = next((e for e in range(8) if largest <= 127 * 2**e), 8)
    step = 2.0 ** (exponent - bits)
    inside = np.abs(values) <= 127.5 * step
    assert np.abs(back - values)[inside].max(initial=0) <= step / 2
    assert (back[~inside] == np.sign(values[~inside]) * 127 * step).all()
    assert result.saturated == (~inside).sum()
    negated = quantise(np.arange(size), -values, grid_bits=bits, width="int8")
    assert (negated.payload.values == -result.payload.values).all()
    data = encode_payload(result.payload, num_parameters=size, width="int8")
    again = decode_payload(data, num_parameters=size, max_released=size, width="int8")
    assert (again.values[again.values != 0] == result.payload.values).all()


def test_half_a_step_is_rounded_to_even():
    halves = np.array([0.5, 1.5, 2.5, -0.5, -1.5]) / 2**4
    assert quantise(np.arange(5), halves, grid_bits=4).payload.values.tolist() == [2, 2, -2]
    halves = np.array([254.0, 1.0, 3.0, -5.0]) / 2**4  # exponent 1: steps of 2
    low = quantise(np.arange(4), halves, grid_bits=4, width="int8")
    assert low.payload.indices.tolist() == [0, 2, 3]
    assert low.payload.values.tolist() == [254, 4, -4]
