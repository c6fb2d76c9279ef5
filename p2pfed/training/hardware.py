"""What a trainer computes with, chosen from what the machine has.

`auto` takes CUDA, then Apple's MPS, then Intel's XPU, then the CPU with one thread less than there
are processors: the network process needs its share. On an accelerator: bf16 where it has it (the
model's own values stay float32), fused optimisers, channels last for 3D images, pinned memory and
copies that do not wait.

Invariant: on a CPU with precision float32 nothing here changes a result.

Not here: more than one accelerator (`crew`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from p2pfed.errors import ConfigError

__all__ = ["CPU", "Hardware", "Precision", "is_out_of_memory", "number_of_accelerators"]

Precision = Literal["auto", "float32", "bf16"]


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device and how it is used.

    Attributes:
        device: Where the model lies.
        autocast: The type that matrix products and convolutions are computed in; None for float32.
        fused: Whether optimisers have fused steps there.
        channels_last: Whether 3D images go channels last.
    """

    device: torch.device
    autocast: torch.dtype | None = None
    fused: bool = False
    channels_last: bool = False

    @classmethod
    def chosen(
        cls, wanted: str = "auto", precision: Precision = "auto", index: int = 0
    ) -> Hardware:
        """What `train.device` and `train.precision` mean on this machine.

        Args:
            wanted: "auto", "cpu", "cuda", "mps" or "xpu".
            precision: "auto", "float32" or "bf16".
            index: Which of several accelerators.

        Raises:
            ConfigError: The machine has no such device, or it has no bf16.
        """
        there = {"cuda": torch.cuda, "mps": torch.mps, "xpu": torch.xpu}
        kind = wanted
        if wanted == "auto":
            kind = next((name for name, each in there.items() if each.is_available()), "cpu")
        if kind != "cpu" and not there[kind].is_available():
            raise ConfigError(f"train.device is {kind} and there is none", "", "use auto or cpu")
        device = torch.device(kind, index) if kind in ("cuda", "xpu") else torch.device(kind)
        has_bf16 = kind == "xpu" or (kind == "cuda" and torch.cuda.is_bf16_supported(False))
        if precision == "bf16" and not has_bf16 and kind != "cpu":
            raise ConfigError(f"train.precision is bf16, which this {kind} device does not have")
        halves = precision == "bf16" or (precision == "auto" and has_bf16)
        return cls(
            device,
            autocast=torch.bfloat16 if halves else None,
            fused=kind in ("cuda", "xpu"),
            channels_last=kind in ("cuda", "xpu"),
        )

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model here, in place."""
        model.to(self.device)
        if self.channels_last and any(p.dim() == 5 for p in model.parameters()):
            # torch's stub for `to` lacks the keyword alone
            model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        return model

    def take(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Tensors here; from pinned memory the copies do not wait."""
        if self.device.type == "cpu" and not self.channels_last:
            return tensors
        if self.device.type == "cuda":
            tensors = tuple(t if t.is_cuda else t.pin_memory() for t in tensors)
        moved = [t.to(self.device, non_blocking=True) for t in tensors]
        if self.channels_last:
            form = torch.channels_last_3d
            moved = [t.contiguous(memory_format=form) if t.dim() == 5 else t for t in moved]
        return moved

    def computing(self) -> contextlib.AbstractContextManager[object]:
        """The context of forward passes."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def wait(self) -> None:
        """Return when everything that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "xpu":
            torch.xpu.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def free_bytes(self) -> int | None:
        """Memory that is free on the device; None where that is not known."""
        if self.device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(free)

    def forget(self) -> None:
        """Give cached memory back after an allocation failed."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "xpu":
            torch.xpu.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()

    def seeded_devices(self) -> Iterable[torch.device]:
        """Devices whose generators a seeded block must give back as they were."""
        return [self.device] if self.device.type in ("cuda", "xpu") else []


CPU = Hardware(torch.device("cpu"))

_RAN_OUT = (
    "DefaultCPUAllocator: can't allocate",  # the CPU's tensors
    "std::bad_alloc",  # the CPU's everything else
    "MPS backend out of memory",
    "CUDA error: out of memory",  # outside of torch's own pool
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device.

    Some raise a plain RuntimeError; its text is all there is.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _RAN_OUT)


def number_of_accelerators(device: torch.device) -> int:
    """How many devices of this kind there are; 1 for a CPU."""
    if device.type == "cuda":
        return torch.cuda.device_count()
    return torch.xpu.device_count() if device.type == "xpu" else 1


def share_of_processors() -> int:
    """Threads for a trainer: one processor's worth stays free for the network process."""
    return max(1, len(os.sched_getaffinity(0)) - 1)
