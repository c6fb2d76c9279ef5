"""How the trainer's processes meet through torch.distributed, and that nobody else is among them.

They find each other by a file in a private folder, and talk over TCP on the loopback device. Gloo
asks nobody who he is: whoever connects first to a port, which every user of the machine can see, is
taken for the process that was expected, and would be handed patients' contributions before any
noise. So each process looks up whose the other ends of its new connections are, before a word.

Invariant: no job, gradient or row passes before every other end is known to be this user's. Once
all are connected gloo takes no further connection in the place of one.

Source: torch.distributed, c10d and gloo's `tcp` transport.

Not here: the kernel's table (`tcp_table`), what the processes do together (`crew`).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from p2pfed.tcp_table import ESTABLISHED, sockets
from p2pfed.training.patients import Part

__all__ = ["ANY_S", "meet", "talking"]

ANY_S = 365.25 * 86400  # that one bears who waits for the next job
_MEETING_S = 120.0  # until all have said where they are
# How the table ends what is 127.x.y.z, and ::1.
_LOOPBACK = ("7F", "00000000000000000000000001000000")
_SETTLED_S = 5.0  # until every end has been accepted, and stands in the table
_LOOK_S = 0.05


def meet(meeting: Path, part: Part, silence_s: float) -> None:
    """Meet the others; afterwards the default process group is there.

    Args:
        meeting: A file in a private folder, the same for all.
        part: Which of how many this process is.
        silence_s: Seconds without a word of another that are borne.

    Raises:
        RuntimeError: Not all came, or one that is not this user's took a place.
    """
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ |= {
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        "TORCH_NCCL_BLOCKING_WAIT": "1",  # out of patience, it raises; else it ends the process
    }
    store = dist.FileStore(str(meeting), part.world)  # type: ignore[attr-defined] # in its docs
    store.set_timeout(dt.timedelta(seconds=_MEETING_S))
    backends = ["cpu:gloo"]
    if torch.cuda.is_available():
        backends.append("cuda:nccl")
    if torch.xpu.is_available():
        backends.append("xpu:xccl")
    before = _own_sockets()
    with talking():
        dist.init_process_group(
            ",".join(backends),
            store=store,
            rank=part.rank,
            world_size=part.world,
            timeout=dt.timedelta(seconds=silence_s),  # gloo keeps this one for rows
        )
    try:
        _check_whose(_own_sockets() - before, part.world - 1)
    except BaseException:
        dist.destroy_process_group()
        raise


@contextlib.contextmanager
def talking() -> Iterator[None]:
    """Say in our words what torch.distributed raises, in its own, of every kind of silence."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "one of the trainer's processes has died or did not keep up; the trainer's log says why"
        ) from error


def _own_sockets() -> set[str]:
    """Inodes of this process's sockets."""
    found = set()
    for file in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):  # it was closed meanwhile
            found.add(str(file.readlink()))
    return {name[len("socket:[") : -1] for name in found if name.startswith("socket:[")}


def _check_whose(inodes: Collection[str], others: int) -> None:
    """Whether the other ends of these connections are this user's, and there are enough of them.

    An end that its process has not accepted yet has no owner: it is looked at again.

    Raises:
        RuntimeError: They are not, or the kernel does not say.
    """
    until = time.monotonic() + _SETTLED_S
    while None in (users := _users_behind(inodes)) and time.monotonic() < until:
        time.sleep(_LOOK_S)
    if len(users) < others or None in users:
        raise RuntimeError(
            "the system does not say whose the trainer's other processes are (/proc/net/tcp);"
            " it works with one: set train.gpus = 1"
        )
    strangers = set(users) - {os.geteuid()}
    if strangers:
        raise RuntimeError(
            "another program took the place of one of the trainer's processes"
            f" (of user {', '.join(sorted(map(str, strangers)))} on this machine); it was told"
            " nothing; look for it, and set train.gpus = 1 until it is gone"
        )


def _users_behind(inodes: Collection[str]) -> list[int | None]:
    """Who has the other end of each of these connections on loopback; None where it has nobody."""
    rows = list(sockets(ESTABLISHED))
    users = {(row.local, row.remote): row.user for row in rows if row.inode != "0"}
    return [
        users.get((row.remote, row.local))
        for row in rows
        if row.inode in inodes and row.local.partition(":")[0].endswith(_LOOPBACK)
    ]
