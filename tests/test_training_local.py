"""Ordinary local training and the grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pfed.errors import UpdateRejected
from p2pfed.tasks.breast_cancer import BreastCancer
from p2pfed.training.local import evaluate, initial_vector, quantise, train_local
from p2pfed.training.task import HyperParameters
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
    one, same, other = (train_local(task, hospital.train, start, seed=s, **HOW) for s in (1, 1, 2))
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
    data = encode_payload(result.payload)
    again = decode_payload(data, num_parameters=values.size, max_released=values.size)
    assert (again.values == result.payload.values).all()
    assert (result.payload.values != 0).all()
