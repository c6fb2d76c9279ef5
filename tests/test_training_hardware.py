"""What is computed with: the choice, and what a CPU leaves as it is."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from p2pfed.errors import ConfigError
from p2pfed.training.hardware import CPU, Hardware, is_out_of_memory, share_of_processors


@pytest.fixture
def machine(monkeypatch):
    """Say what this machine has: machine("cuda", "xpu")."""

    def has(*kinds, bf16=True):
        for kind in ("cuda", "mps", "xpu"):
            module = getattr(torch, kind)
            monkeypatch.setattr(module, "is_available", lambda kind=kind: kind in kinds)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: bf16)

    return has


def test_auto_takes_the_best_accelerator_there_is(machine):
    for kinds, expected in [
        (("cuda", "mps", "xpu"), "cuda"), (("mps", "xpu"), "mps"), (("xpu",), "xpu"), ((), "cpu"),
    ]:  # fmt: skip
        machine(*kinds)
        assert Hardware.chosen("auto").device.type == expected


def test_a_device_that_is_not_there_is_refused_with_what_to_do(machine):
    machine("xpu")
    for kind in ("cuda", "mps"):
        with pytest.raises(ConfigError, match=f"train.device is {kind}") as caught:
            Hardware.chosen(kind)
        assert "auto" in caught.value.do


def test_bf16_is_taken_where_the_gpu_has_it_and_refused_where_it_does_not(machine):
    machine("cuda")
    assert Hardware.chosen().autocast is torch.bfloat16
    assert Hardware.chosen(precision="float32").autocast is None
    machine("cuda", bf16=False)
    assert Hardware.chosen().autocast is None
    with pytest.raises(ConfigError, match="bf16"):
        Hardware.chosen(precision="bf16")


def test_gpus_get_fused_steps_and_channels_last(machine):
    machine("cuda")
    gpu = Hardware.chosen(index=1)
    assert (gpu.device, gpu.fused, gpu.channels_last) == (torch.device("cuda", 1), True, True)
    machine()
    assert Hardware.chosen() == CPU


def test_channels_last_changes_the_layout_and_no_value():
    as_a_gpu = Hardware(torch.device("cpu"), channels_last=True)
    torch.manual_seed(0)
    model, x = nn.Conv3d(2, 3, 3), torch.randn(1, 2, 5, 5, 5)
    expected = model(x)
    [placed_x] = as_a_gpu.take(x)
    assert placed_x.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(as_a_gpu.place(model)(placed_x), expected)


def test_bf16_is_for_products_and_the_models_values_stay_float32():
    halves = Hardware(torch.device("cpu"), autocast=torch.bfloat16)
    model = nn.Linear(3, 3)
    with halves.computing():
        assert model(torch.ones(1, 3)).dtype is torch.bfloat16
    assert model.weight.dtype is torch.float32


def test_the_network_process_keeps_a_processor(monkeypatch):
    for processors, threads in [(1, 1), (2, 1), (16, 15)]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=processors: set(range(n)))
        assert share_of_processors() == threads


def test_memory_that_ran_out_is_told_from_other_failures():
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("size mismatch"))


@pytest.mark.parametrize(
    "text",
    [
        "std::bad_alloc",
        "MPS backend out of memory (MPS allocated: 17.9 GB, other allocations: 400 MB). Tried to",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_memory_that_ran_out_is_known_by_what_each_allocator_says(text):
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(ValueError(text))  # a task's own words
