"""The machine: clock, disk, memory, GPU, open files, the service; gatherers and their judges."""

from __future__ import annotations

import ctypes
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from p2pfed.doctor.finding import Finding, fail, ok, warn
from p2pfed.doctor.left import LeftFolder

__all__ = [
    "Clock",
    "Gpus",
    "Unit",
    "clock",
    "clock_state",
    "disk",
    "gpu",
    "gpus",
    "left",
    "limit_of_files",
    "memory",
    "memory_bytes",
    "open_files",
    "service",
    "unit",
]

_LEAST_FREE = 1 << 28  # bytes; below this a full disk, which stops the daemon, is near
_LEAST_MEMORY = 1 << 30
_TIME_ERROR = 5  # of adjtimex(2): nobody keeps the clock
_AHEAD = 120.0  # seconds that a file may lie in the future


def size(count: float) -> str:
    """Bytes in the unit that fits."""
    for unit_name in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit_name}"
        count /= 1000
    return f"{count:.3g} TB"


# --- clock -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Clock:
    """What is known of the wall clock.

    Attributes:
        kept: Whether somebody keeps it (NTP, PTP); None: the system does not tell.
        behind_s: By how many seconds the newest of the node's own files lies in the future.
    """

    kept: bool | None
    behind_s: float


def clock_state(files: Iterable[Path], now: float) -> Clock:
    """Ask the kernel whether the clock is kept, and files whether it went back.

    What NTP servers, chrony and systemd alike leave in the kernel is read with adjtimex(2), as
    `timedatectl` does; that changes nothing and works in a container too.
    """
    newest = now
    for file in files:
        try:
            newest = max(newest, file.stat().st_mtime)
        except OSError:
            continue
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
    except (OSError, AttributeError):
        state = -1
    return Clock(None if state < 0 else state != _TIME_ERROR, newest - now)


def clock(found: Clock) -> Finding:
    """Whether the wall clock can be relied on: rosters expire by it."""
    mend = "timedatectl set-ntp true   (or start chronyd)"
    if found.behind_s > _AHEAD:
        return fail(
            "clock",
            f"files of this node are {found.behind_s / 60:.0f} min in the future: it is slow",
            mend,
        )
    if found.kept is False:
        return warn("clock", "nobody keeps this machine's clock (no NTP)", mend)
    return ok("clock", "kept by NTP" if found.kept else "whether NTP keeps it is not told here")


# --- room --------------------------------------------------------------------------------------


def disk(free: int, needed: int, where: Path) -> Finding:
    """Room for the run's archive.

    Args:
        free: Bytes.
        needed: Bytes that the accepted run may still take.
        where: The state folder.
    """
    more = f"make room, or move {where} to a larger disk (with the daemon stopped)"
    if free < _LEAST_FREE:
        return fail("disk", f"{size(free)} free at {where}: a full disk stops the daemon", more)
    if free < needed + _LEAST_FREE:
        return warn("disk", f"{size(free)} free, the run may still take {size(needed)}", more)
    run = f", the run takes at most {size(needed)} more" if needed else ""
    return ok("disk", f"{size(free)} free{run}")


def memory_bytes() -> tuple[int, int] | None:
    """Memory of this machine and what is available of it, bytes; None if it does not tell."""
    try:
        text = Path("/proc/meminfo").read_text("ascii")
    except OSError:
        return None
    found = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", text, re.MULTILINE))
    if len(found) != 2:
        return None
    return int(found["MemTotal"]) * 1024, int(found["MemAvailable"]) * 1024


def memory(found: tuple[int, int] | None, limit_gb: float, *, trains: bool) -> Finding:
    """Memory for the trainer, and whether `train.memory_gb` can be had."""
    if found is None:
        return ok("memory", "this machine does not tell")
    total, free = found
    if trains and limit_gb * 1e9 > total:
        return warn(
            "memory",
            f"train.memory_gb is {limit_gb:g} GB, this machine has {size(total)}",
            "set train.memory_gb to less than the machine has",
        )
    if trains and free < _LEAST_MEMORY:
        return warn(
            "memory",
            f"{size(free)} of {size(total)} available: the trainer may be killed",
            "end other programs, or use a smaller batch; train.memory_gb limits the trainer",
        )
    return ok("memory", f"{size(free)} of {size(total)} available")


def left(folders: Sequence[LeftFolder]) -> Iterator[Finding]:
    """Models that killed daemons left in memory; nothing where there are none."""
    if not folders:
        return
    held = sum(one.size for one in folders)
    paths = " ".join(shlex.quote(str(one.path)) for one in folders[:3])
    more = f" and {len(folders) - 3} more" if len(folders) > 3 else ""
    one_or_more = "a daemon that was" if len(folders) == 1 else "daemons that were"
    yield warn(
        "memory",
        f"{size(held)} in shared memory were left by {one_or_more} killed: {paths}{more}",
        f"rm -r {paths}   (the next start with the same folder does it too)",
    )


# --- GPU ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gpus:
    """The GPUs of this machine.

    Attributes:
        listed: One text for each that `nvidia-smi` names; None: there is no such program.
        seen: How many torch sees; None: not asked.
        device: What the running trainer computes with; empty: it did not tell.
    """

    listed: tuple[str, ...] | None
    seen: int | None
    device: str = ""


def gpus(ask_torch: list[str] | None, device: str) -> Gpus:
    """Ask `nvidia-smi`, and torch in a process of its own.

    Args:
        ask_torch: The command that prints how many GPUs torch sees; None: torch is not asked.
        device: What the running trainer says.
    """
    listed = None
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,memory.free,memory.total"
        text = _output(["nvidia-smi", query, "--format=csv,noheader"], 20)
        listed = tuple(line.strip() for line in (text or "").splitlines() if line.strip())
    seen = None
    if ask_torch and not device:
        text = (_output(ask_torch, 120) or "").strip()
        seen = int(text) if text.isdigit() else None
    return Gpus(listed, seen, device)


def gpu(found: Gpus, wanted: str) -> Finding:
    """Whether the trainer has what `train.device` asks for.

    Args:
        found: The GPUs.
        wanted: `train.device`.
    """
    names = "; ".join(found.listed or ())
    if found.device:
        if wanted not in {"auto", "cpu"} and not found.device.startswith(wanted):
            return fail(
                "gpu",
                f"train.device is {wanted}, the trainer computes on {found.device}",
                "restart the daemon; if it stays so: p2pfed task check",
            )
        return ok("gpu", f"the trainer computes on {found.device}{names and f'; {names}'}")
    if wanted not in {"auto", "cuda"}:
        return ok("gpu", f"none is asked for (train.device is {wanted}){names and f'; {names}'}")
    if found.seen:
        return ok("gpu", f"torch sees {found.seen}{names and f': {names}'}")
    if names and found.seen == 0:
        return fail(
            "gpu",
            f"torch sees no GPU, nvidia-smi does: {names}",
            "install a torch built for CUDA, and a driver that is not older: see pytorch.org",
        )
    if wanted == "cuda":
        return fail(
            "gpu",
            "train.device is cuda, and there is no GPU here",
            'see: nvidia-smi; or set train.device = "auto"',
        )
    return ok("gpu", names or "none: the processor computes")


def _output(command: list[str], seconds: float) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603 - fixed commands
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


# --- limits and service ------------------------------------------------------------------------


def limit_of_files(pid: int | None) -> int | None:
    """How many files a process may have open; None: unlimited, or we may not see it."""
    try:
        text = Path("/proc", str(pid or "self"), "limits").read_text("ascii")
    except OSError:
        return None
    match = re.search(r"^Max open files\s+(\d+)", text, re.MULTILINE)
    return int(match[1]) if match else None


def open_files(limit: int | None, members: int) -> Finding:
    """Whether there are files enough for a connection to each member, and some more."""
    needed = 256 + 2 * members
    if limit is not None and limit < needed:
        return warn(
            "open-files",
            f"{limit} may be open at once, {members} members need about {needed}",
            f"LimitNOFILE={max(4096, needed)} in the unit, or: ulimit -n {max(4096, needed)}",
        )
    return ok("open-files", f"{'any number' if limit is None else limit} may be open at once")


@dataclass(frozen=True, slots=True)
class Unit:
    """A service of p2pfed's, as systemd knows it.

    Attributes:
        systemd: Whether systemd runs this machine.
        name: Of the unit.
        loaded: Whether there is such a unit.
        enabled: Whether it starts with the machine.
        active: Whether it runs.
    """

    systemd: bool
    name: str = "p2pfed.service"
    loaded: bool = False
    enabled: bool = False
    active: bool = False


def unit(name: str) -> Unit:
    """Ask systemd, where there is one."""
    if not Path("/run/systemd/system").is_dir() or not shutil.which("systemctl"):
        return Unit(systemd=False)
    wanted = "--property=LoadState,UnitFileState,ActiveState"
    text = _output(["systemctl", "show", wanted, name], 10) or ""
    told = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    return Unit(
        systemd=True,
        name=name,
        loaded=told.get("LoadState") == "loaded",
        enabled=told.get("UnitFileState", "").startswith("enabled"),
        active=told.get("ActiveState") == "active",
    )


def service(found: Unit) -> Finding:
    """Whether the node, or its trainer, comes back after a reboot."""
    short = found.name.removesuffix(".service")
    what = "trainer" if short.endswith("-trainer") else "node"
    if not found.systemd:
        return ok("service", "systemd does not run here: who restarts the node is up to you")
    if not found.loaded:
        return ok(
            "service",
            f"there is no {found.name}: after a reboot nobody starts the {what}",
            "see docs/operations.md, Under systemd",
        )
    if not found.enabled:
        return warn(
            "service",
            f"{found.name} does not start with the machine",
            f"systemctl enable --now {short}",
        )
    state = "runs" if found.active else f"does not run now: systemctl start {short}"
    return ok("service", f"{found.name} is enabled and {state}")
