"""A child process that stops before and after each of its system calls: strace, in small.

Map: `trace` (run a function in a forked child; be told each `Stop`, and kill it at any) -> `Stop`
(which call, its arguments, the child's memory and files); `say` -> `said` (what the child tells).

It needs Linux 5.3 on x86-64 or arm64 and a kernel that lets a process trace its child; no
privilege and no other program.

Not here: what the calls do to files (`power_loss`).
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_NUMBERS = {
    "x86_64": {
        1: "write",
        2: "open",
        18: "pwrite",
        74: "fsync",
        75: "fsync",
        77: "ftruncate",
        82: "rename",
        87: "unlink",
        257: "openat",
        263: "unlinkat",
        264: "renameat",
        316: "renameat",
    },
    "aarch64": {
        35: "unlinkat",
        38: "renameat",
        46: "ftruncate",
        56: "openat",
        64: "write",
        68: "pwrite",
        82: "fsync",
        83: "fsync",
        276: "renameat",
    },
}[platform.machine()]

_TRACEME, _SYSCALL, _SETOPTIONS, _GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
_OPTIONS = 0x100001  # system calls are told from signals; the child dies with its tracer
_ENTRY, _EXIT = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class _Info(ctypes.Structure):
    """The kernel's ptrace_syscall_info; `words` are number and arguments, or the result."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("pointers", ctypes.c_uint64 * 2),
        ("words", ctypes.c_uint64 * 9),
    )


@dataclass(frozen=True)
class Stop:
    """The child stands before or after a system call.

    Attributes:
        pid: The child.
        after: The call is done.
        name: Of the call; empty for one that changes no file's content or name.
        args: Its six arguments.
        result: What it returned, once it is done.
    """

    pid: int
    after: bool
    name: str
    args: tuple[int, ...]
    result: int = 0

    def read(self, address: int, count: int) -> bytes:
        """Return bytes of the child's memory."""
        with Path(f"/proc/{self.pid}/mem").open("rb", buffering=0) as memory:
            return os.pread(memory.fileno(), count, address)

    def text(self, address: int) -> str:
        """Return a path from the child's memory."""
        return self.read(address, 4096).split(b"\0", 1)[0].decode()

    def file(self, descriptor: int) -> Path:
        """Return what an open descriptor of the child is of."""
        return Path(f"/proc/{self.pid}/fd/{descriptor}").readlink()


def trace(work: Callable[[], None], watch: Callable[[Stop], bool | None]) -> int:
    """Run `work` in a forked child that stops before and after each system call.

    Args:
        work: The child ends after it: with 0, or with 1 if it raises.
        watch: Is told each stop; the child is killed there if it says True.

    Returns:
        The exit status as of `os.waitstatus_to_exitcode`.
    """
    child = os.fork()
    if child == 0:
        try:
            assert _libc.ptrace(_TRACEME, 0, None, None) == 0, "this process may not be traced"
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001 -- the child must not run the parent's clean-up
            traceback.print_exc()
        os._exit(1)
    try:
        return _watch(child, watch)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise


def _watch(child: int, watch: Callable[[Stop], bool | None]) -> int:
    status = os.waitpid(child, 0)[1]
    _libc.ptrace(_SETOPTIONS, child, None, _OPTIONS)
    info, before, give = _Info(), Stop(child, False, "", ()), 0
    while os.WIFSTOPPED(status):
        if os.WSTOPSIG(status) == signal.SIGTRAP | 0x80:
            _libc.ptrace(_GET_SYSCALL_INFO, child, ctypes.sizeof(info), ctypes.addressof(info))
            words = list(info.words)
            if info.op == _ENTRY:
                stop = before = Stop(child, False, _NUMBERS.get(words[0], ""), tuple(words[1:7]))
            else:
                assert info.op == _EXIT, "the kernel does not tell about system calls"
                result = ctypes.c_int64(words[0]).value
                stop = Stop(child, True, before.name, before.args, result)
            if watch(stop):
                os.kill(child, signal.SIGKILL)
        _libc.ptrace(_SYSCALL, child, None, give)
        status = os.waitpid(child, 0)[1]
        told = os.WIFSTOPPED(status) and os.WSTOPSIG(status) not in {
            signal.SIGTRAP | 0x80,
            signal.SIGSTOP,
        }
        give = os.WSTOPSIG(status) if told else 0
    return os.waitstatus_to_exitcode(status)


def say(told: bytes) -> None:
    """Tell something to the outside: only the tracer hears it."""
    with suppress(OSError):
        os.write(-1, told)


def said(stop: Stop) -> bytes | None:
    """Return what the child is about to `say`, if that is what it does here."""
    if stop.name == "write" and not stop.after and ctypes.c_int32(stop.args[0]).value == -1:
        return stop.read(stop.args[1], stop.args[2])
    return None
