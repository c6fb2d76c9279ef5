"""Network namespaces: what runs in them, how one thread gets into one, how they go away.

Invariants: names begin with this process's id (`own_name`), so that no two processes share one;
what a dead process has left is removed by `sweep`; only processes within a namespace that is
removed are killed.

Source: ip-netns(8), setns(2). Not here: hosts and cables (`netlab`).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "ETC",
    "NETNS",
    "execute",
    "ip",
    "kill_all",
    "own_name",
    "pids",
    "remove",
    "sweep",
    "within",
]

MARK = "p2pfedlab"
CLONE_NEWNET = 0x40000000
ETC = Path("/etc/netns")  # `ip netns exec` lays these files over /etc
NETNS = Path("/run/netns")
PATIENCE = 10.0  # seconds for killed processes to go
_numbers = itertools.count(1)


def own_name() -> str:
    """A beginning for names that nobody else uses."""
    return f"{MARK}-{os.getpid()}-{next(_numbers)}"


def ip(lines: Sequence[str], namespace: str = "") -> None:
    """Run `ip` commands, one a line, in a namespace."""
    if not lines:
        return
    command = ["ip", *(["-n", namespace] if namespace else []), "-batch", "-"]
    done = subprocess.run(
        command, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()} (of: {'; '.join(lines)})")


def execute(namespace: str, *command: str) -> None:
    """Run a program in a namespace and wait for it."""
    whole = ["ip", "netns", "exec", namespace, *command]
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(whole)}: {done.stderr.strip()}")


@contextmanager
def within(namespace: str) -> Iterator[None]:
    """Be in a namespace, this thread alone."""
    with open("/proc/thread-self/ns/net") as here:  # noqa: PTH123 - a file descriptor
        with (NETNS / namespace).open() as there:
            _set_namespace(there.fileno())
        try:
            yield
        finally:
            _set_namespace(here.fileno())


def _set_namespace(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def pids(namespace: str) -> list[int]:
    """Processes that run in a namespace."""
    command = ["ip", "netns", "pids", namespace]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    return [int(pid) for pid in told.stdout.split()]


def kill_all(namespace: str) -> None:
    """Kill all that runs in a namespace; returns when it is gone."""
    deadline = time.monotonic() + PATIENCE
    while running := pids(namespace):  # again: one may have been forking
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise OSError(f"in {namespace} still run, {PATIENCE:.0f} s after SIGKILL: {running}")
        time.sleep(0.01)


def remove(namespace: str) -> None:
    """Kill what runs in a namespace and remove it, whatever of it exists."""
    try:
        kill_all(namespace)
    finally:
        with contextlib.suppress(OSError):  # it may never have been made
            ip([f"netns del {namespace}"])
        shutil.rmtree(ETC / namespace, ignore_errors=True)
        with contextlib.suppress(OSError):
            ETC.rmdir()  # only if nobody else has anything there


def sweep() -> None:
    """Remove the labs of processes that are dead."""
    for path in NETNS.glob(f"{MARK}-*"):
        owner = re.match(rf"{MARK}-(\d+)-", path.name)
        if owner is not None and not Path(f"/proc/{owner[1]}").exists():
            remove(path.name)
