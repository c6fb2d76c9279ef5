"""The trainer's look at the view that was handed over: mapped, checked, or refused."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import safetensors.numpy
import torch

from p2pfed.errors import UpdateRejected
from p2pfed.training.handover import read_view

ONE = np.ones(4, np.float32)
NAMED = {"mean_round": "1"}


def write_view(path, tensors, metadata=None):
    safetensors.numpy.save_file(tensors, path, metadata=metadata)
    return path


def written(header, data=b"", *, pad=8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text = text.ljust(-len(text) % pad + len(text))
    return len(text).to_bytes(8, "little") + text + data


def described(begin, end, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_a_view_may_hold_the_mean_of_a_round(tmp_path):
    mean = np.full(4, 0.5, np.float32)
    path = write_view(tmp_path / "v", {"model": ONE, "mean": mean}, {"mean_round": "12"})
    read, found = read_view(path, 4)
    assert (read == ONE).all()
    assert found.round == 12
    assert (found.values == mean).all()
    read, found = read_view(write_view(tmp_path / "w", {"model": ONE}), 4)
    assert (read == ONE).all()
    assert found is None


def test_a_view_is_what_a_model_can_be_made_of_without_a_copy_and_changes_to_it_stay_here(tmp_path):
    path = write_view(tmp_path / "v", {"model": ONE})
    read, _ = read_view(path, 4)
    assert (read.dtype, read.flags.aligned, read.flags.writeable) == (np.float32, True, True)
    tensor = torch.from_numpy(read)
    tensor += 1
    assert (read == 2).all()
    assert (safetensors.numpy.load_file(path)["model"] == ONE).all()


def not_views():
    wide = np.ones(3, np.float32)
    nan, infinite = ONE * np.nan, np.array([0, 1, -np.inf, 2], np.float32)
    yield "a mean alone", {"mean": ONE}, NAMED
    yield "another tensor", {"model": ONE, "other": ONE}, None
    yield "a mean of no round", {"model": ONE, "mean": ONE}, None
    yield "a negative round", {"model": ONE, "mean": ONE}, {"mean_round": "-1"}
    yield "a digit of another script", {"model": ONE, "mean": ONE}, {"mean_round": "²"}
    yield "a round without end", {"model": ONE, "mean": ONE}, {"mean_round": "9" * 17}
    yield "a short mean", {"model": ONE, "mean": wide}, NAMED
    yield "a long mean", {"model": ONE, "mean": np.ones(5, np.float32)}, NAMED
    yield "a short model", {"model": wide}, None
    yield "another shape", {"model": ONE[None]}, None
    yield "no shape", {"model": np.array(1, np.float32)}, None
    yield "float64", {"model": np.ones(4)}, None
    yield "int32", {"model": np.ones(4, np.int32)}, None
    yield "NaN", {"model": nan}, None
    yield "NaN in the mean", {"model": ONE, "mean": nan}, NAMED
    yield "infinity", {"model": infinite}, None
    yield "minus infinity", {"model": -infinite}, None
    yield "too large", {"model": np.ones(40_000, np.float32)}, None


@pytest.mark.parametrize(
    ("tensors", "metadata"), [pytest.param(t, m, id=n) for n, t, m in not_views()]
)
def test_a_view_that_is_not_one_is_refused(tmp_path, tensors, metadata):
    with pytest.raises(UpdateRejected):
        read_view(write_view(tmp_path / "v", tensors, metadata), 4)


def lies():
    model, data = described(0, 16), ONE.tobytes()
    both = {"model": model, "mean": described(16, 32), "__metadata__": NAMED}
    yield "more data than told", written({"model": model}, data + b"\0")
    yield "less data than told", written({"model": model}, data[:-1])
    yield "two tensors in one place", written({**both, "mean": model}, 2 * data)
    yield "tensors that overlap", written({**both, "mean": described(8, 24)}, 2 * data)
    yield "a hole", written({"model": described(16, 32)}, 2 * data)
    yield "a hole between", written({**both, "mean": described(32, 48)}, 3 * data)
    yield "offsets backwards", written({"model": described(16, 0)}, data)
    yield "offsets below the data", written({"model": described(-16, 0)}, data)
    yield "a huge shape", written({"model": described(0, 16, (2**62, 4))}, data)
    yield "no offsets", written({"model": {"dtype": "F32", "shape": [4]}}, data)
    yield "more told of a tensor", written({"model": {**model, "strides": [1]}}, data)
    yield "a tensor that is a number", written({"model": 4}, data)
    yield "metadata that is a list", written({**both, "__metadata__": ["1"]}, 2 * data)
    yield "a round that is a number", written({**both, "__metadata__": {"mean_round": 1}}, 2 * data)
    yield "no tensor", written({}, data)
    yield "metadata alone", written({"__metadata__": NAMED})


@pytest.mark.parametrize("data", [pytest.param(d, id=n) for n, d in lies()])
def test_a_header_that_lies_is_refused(tmp_path, data):
    (tmp_path / "v").write_bytes(data)
    with pytest.raises(UpdateRejected, match=r"^v|in v"):
        read_view(tmp_path / "v", 4)


def unreadable():
    yield "nothing", b""
    yield "less than a length", b"\1\0\0\0"
    yield "text", b"{}"
    yield "noise", b"\xff" * 100
    yield "a pickle", b"cos\nsystem\n(S'false'\ntR."
    yield "a header longer than the file", (10**9).to_bytes(8, "little") + b"{}"
    yield "a long header", written(b" " * 70_000 + b"{}")
    yield "a list", written([1])
    yield "no JSON", written(b"{'model': 1}")
    yield "no text", written(b'{"model": "\xff"}')
    yield "a thousand brackets", written(b"[" * 60_000)
    yield "an endless number", written(b'{"model": ' + b"9" * 5000 + b"}")
    yield "data at an odd place", written({"model": described(0, 16)}, ONE.tobytes(), pad=1)


@pytest.mark.parametrize("data", [pytest.param(d, id=n) for n, d in unreadable()])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, data):
    (tmp_path / "v").write_bytes(data)
    with pytest.raises(UpdateRejected, match="cannot read v as a view"):
        read_view(tmp_path / "v", 4)


def test_of_a_file_that_is_no_view_neither_bytes_nor_size_nor_being_there_is_told(tmp_path):
    # The network process names folder and file: it could name a patient's.
    (tmp_path / "there").write_text("Jane Doe,1962-03-04\n")
    (tmp_path / "long").write_bytes(b"\xff" * 100_000)
    (tmp_path / "bound").symlink_to("there")
    told = set()
    for name in ("there", "long", "bound", "none"):
        with pytest.raises(UpdateRejected) as refused:
            read_view(tmp_path / name, 4)
        told.add(str(refused.value).replace(name, "it"))
    assert len(told) == 1
    assert str(tmp_path) not in told.pop()


def test_what_is_no_file_of_its_own_is_refused(tmp_path):
    write_view(tmp_path / "v", {"model": ONE})
    (tmp_path / "link").symlink_to("v")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("none", "link", "pipe", "folder", "."):
        with pytest.raises(UpdateRejected, match="as a view"):
            read_view(tmp_path / name, 4)
    assert (read_view(tmp_path / "v", 4)[0] == ONE).all()
