"""How much of the machine a trainer may take, set by itself before it reads; and what is left.

Invariant: a task that eats all memory ends as a MemoryError in the trainer, or as the death of the
trainer; never of the daemon beside it. Two means, both inherited by the processes that a task
starts:

* `train.memory_gb` becomes RLIMIT_DATA: what a process may allocate for itself. Files that it maps
  (weights, caches, the model handed over) and memory on a GPU do not count, so that the address
  space that CUDA reserves is no trouble. Each process has the limit for itself.
* when the machine runs out of memory, the kernel kills by `oom_score_adj` (proc(5)): a trainer
  takes the highest. A process may always raise its own, so no rights are needed.

Not here: what is told of a MemoryError (`control`), how the daemon outlives a trainer (node room).
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

from p2pfed.config import Settings
from p2pfed.errors import ConfigError

__all__ = ["MOST_KILLABLE", "free_memory", "keep_within"]

MOST_KILLABLE = 1000
_GB = 10**9
_GROUP = Path("/sys/fs/cgroup")
_OOM_SCORE = Path("/proc/self/oom_score_adj")


def keep_within(settings: Settings) -> None:
    """Bound this process and its children; for a process of our own, never for a user's program.

    Args:
        settings: The node's; `train.memory_gb` is read.

    Raises:
        ConfigError: The system does not take the limit.
    """
    with contextlib.suppress(OSError):  # other systems have no such file
        _OOM_SCORE.write_text(str(MOST_KILLABLE), "ascii")
    gigabytes = settings.train.memory_gb
    if not gigabytes:
        return
    limit = int(gigabytes * _GB)
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    if most != resource.RLIM_INFINITY:
        limit = min(limit, most)  # a stricter one of the system's stands
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot limit the trainer to {gigabytes:g} GB",
            str(error),
            "set train.memory_gb = 0, and let systemd or the container limit it",
        ) from error


def free_memory() -> int | None:
    """Bytes that the machine, and the container, have left; None where the system does not say."""
    limits = list(_free_of_machine())
    with contextlib.suppress(OSError, ValueError):  # of the container, where there is one
        most = int((_GROUP / "memory.max").read_text("ascii"))
        limits.append(most - int((_GROUP / "memory.current").read_text("ascii")))
    return max(0, min(limits)) if limits else None


def _free_of_machine() -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                yield 1024 * int(line.split()[1])
