"""Model <-> vector <-> safetensors file."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from p2pfed.errors import ConfigError, UpdateRejected
from p2pfed.identity.signing import fact_hash
from p2pfed.training.vector import (
    check_no_buffers,
    get_vector,
    num_parameters,
    read_vector,
    set_vector,
    write_vector,
)


@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.integers(0, 2**32 - 1))
def test_setting_a_vector_and_getting_it_back_gives_the_same_bits(widths, seed):
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))
    vector = np.random.default_rng(seed).standard_normal(num_parameters(model)).astype(np.float32)
    set_vector(model, vector)
    assert get_vector(model).tobytes() == vector.tobytes()
    assert model[0].weight.detach().numpy().ravel()[0] == vector[0]


def test_the_vector_is_a_copy():
    model = nn.Linear(2, 1)
    vector = get_vector(model)
    vector[:] = 7
    assert not (get_vector(model) == 7).any()


def test_tied_parameters_count_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert num_parameters(model) == get_vector(model).size == 9


def test_running_statistics_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"'1\.running_mean'"):
        check_no_buffers(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


def test_models_without_shared_statistics_pass():
    model = nn.Sequential(nn.GroupNorm(1, 2), nn.BatchNorm1d(2, track_running_stats=False))
    model.register_buffer("constant", torch.ones(2), persistent=False)
    check_no_buffers(model)


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(2, np.float32),
        np.zeros((3, 1), np.float32),
        np.zeros(3),
        np.array([0, np.nan, 0], np.float32),
        np.array([0, np.inf, 0], np.float32),
    ],
)
def test_a_vector_that_does_not_fit_is_refused_and_the_model_kept(vector):
    model = nn.Linear(2, 1)
    before = get_vector(model)
    with pytest.raises(UpdateRejected):
        set_vector(model, vector)
    assert (get_vector(model) == before).all()


def test_a_file_gives_its_vector_and_hash(tmp_path):
    path = tmp_path / "genesis.safetensors"
    vector = np.arange(5, dtype=np.float32)
    digest = write_vector(path, vector)
    assert digest == hashlib.blake2b(path.read_bytes(), digest_size=32).digest()
    assert (read_vector(path, 5, digest=digest) == vector).all()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_wrong_genesis_is_refused(tmp_path):
    path = tmp_path / "genesis.safetensors"
    write_vector(path, np.zeros(5, np.float32))
    with pytest.raises(UpdateRejected, match="not the file that the run names"):
        read_vector(path, 5, digest=fact_hash(b"another"))


def bad_files():
    one = np.zeros(5, np.float32)
    yield "empty", b""
    yield "garbage", b"\xff" * 100
    yield "a header that lies", (10**9).to_bytes(8, "little") + b"{}"
    yield "another name", safetensors.numpy.save({"weights": one})
    yield "two tensors", safetensors.numpy.save({"model": one, "more": one[:1]})
    yield "wrong length", safetensors.numpy.save({"model": one[:4]})
    yield "wrong shape", safetensors.numpy.save({"model": one[None]})
    yield "wrong type", safetensors.numpy.save({"model": one.astype(np.float64)})
    yield "NaN", safetensors.numpy.save({"model": one * np.nan})
    yield "too large", b"\0" * (1 << 17)
    yield "a pickle", b"cos\nsystem\n(S'false'\ntR."


@pytest.mark.parametrize("data", [pytest.param(d, id=n) for n, d in bad_files()])
def test_a_bad_file_is_refused(tmp_path, data):
    path = tmp_path / "view.safetensors"
    path.write_bytes(data)
    with pytest.raises(UpdateRejected):
        read_vector(path, 5)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UpdateRejected, match="cannot read"):
        read_vector(tmp_path / "none", 5)
