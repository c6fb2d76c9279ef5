"""Power loss, simulated: what a process does to the files of a folder, and what a crash may leave.

Map: `record` (all that a child does to a folder, through `system_calls`) -> `Op`s -> `crashes`
(every `Disk` that a power loss at any step may leave) -> `write_files`.

The model is stricter than any file system in use, as in Pillai et al., "All File Systems Are Not
Created Equal" (ALICE), OSDI 2014. What was written to a file is certain after an fsync of that
file; that a name was made, moved or removed is certain after an fsync of the folder. Of everything
else any part may be missing, in any order, and a write may be torn at each 512-byte sector, read
as zeros or as junk. All combinations are tried where few operations are pending; where many are,
all runs of them, all but or only one or two, and some at random.

Invariant: the recording is complete: with nothing lost it gives exactly the folder that the child
left, else `record` fails.

Not here: what the child does and what must hold afterwards (`ledger_crashes`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, combinations
from pathlib import Path
from typing import Final

from system_calls import Stop, said, trace


@dataclass(frozen=True)
class Op:
    """One thing that happened, in order.

    Attributes:
        kind: "write", "truncate", "sync" (of a file), "create", "rename", "unlink", "sync folder",
            or "say" (the child told something to the outside).
        file: Number of the file; files keep it when they are renamed.
        name: New name, or the name that is removed.
        old: The name before a rename.
        at: Where it was written, or the new size.
        data: What was written or said.
    """

    kind: str
    file: int = -1
    name: str = ""
    old: str = ""
    at: int = 0
    data: bytes = b""


@dataclass
class Disk:
    """Names and contents of a folder's files, as a crash may leave them."""

    names: dict[str, int] = field(default_factory=dict)
    files: dict[int, bytes] = field(default_factory=dict)

    def copy(self) -> Disk:
        """Return another disk of the same content."""
        return Disk(dict(self.names), dict(self.files))

    def content(self) -> dict[str, bytes]:
        """Return what a look into the folder would show."""
        return {name: self.files.get(file, b"") for name, file in sorted(self.names.items())}

    def apply(self, op: Op) -> None:
        """Let one operation reach the disk; one on a name that is not there has no effect."""
        old = self.files.get(op.file, b"")
        match op.kind:
            case "write":
                start = old[: op.at].ljust(op.at, b"\0")
                self.files[op.file] = start + op.data + old[op.at + len(op.data) :]
            case "truncate":
                self.files[op.file] = old[: op.at].ljust(op.at, b"\0")
            case "create":
                self.names[op.name] = op.file
            case "rename" if op.old in self.names:
                self.names[op.name] = self.names.pop(op.old)
            case "unlink":
                self.names.pop(op.name, None)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make these the only files of a folder, for their owner only."""
    for file in folder.iterdir():
        file.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
        (folder / name).chmod(0o600)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the names and contents of a folder's files."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def record(work: Callable[[], None], folder: Path) -> tuple[Disk, list[Op]]:
    """Run `work` in a child; return the folder as it was, and all that happened to it since.

    Raises:
        RuntimeError: The child failed, or did something to the folder that is not understood.
    """
    recorder = _Recorder(folder)
    if trace(work, recorder) != 0:
        raise RuntimeError("the recorded child failed")
    end = recorder.start.copy()
    for op in recorder.log:
        end.apply(op)
    if end.content() != files_of(folder):
        raise RuntimeError("the recording is not complete")
    return recorder.start, recorder.log


class _Recorder:
    """Listens to a traced child and writes down what it does in one folder."""

    # Which arguments are paths.
    PATHS: Final = {
        "open": (0,),
        "openat": (1,),
        "unlink": (0,),
        "unlinkat": (1,),
        "rename": (0, 1),
        "renameat": (1, 3),
    }

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.start, self.log = Disk(), list[Op]()
        self.numbers: dict[int, int] = {}  # by inode
        self.count = 0
        self.missing = False
        for file in sorted(self.folder.iterdir()):
            self.start.apply(self.create(file))
            self.start.files[self.count] = file.read_bytes()

    def __call__(self, stop: Stop) -> None:
        told = said(stop)
        if told is not None:
            self.log.append(Op("say", data=told))
        elif stop.name in self.PATHS:
            self.on_names(stop)
        elif stop.name and stop.after and stop.result >= 0:
            self.on_file(stop)

    def create(self, path: Path) -> Op:
        self.count += 1
        self.numbers[path.stat().st_ino] = self.count
        return Op("create", self.count, path.name)

    def on_names(self, stop: Stop) -> None:
        paths = [Path(stop.text(stop.args[i])) for i in self.PATHS[stop.name]]
        path = paths[-1]
        if self.folder not in {p.parent for p in paths}:
            return
        opens = stop.name.startswith("open")
        if not stop.after:
            self.missing = opens and not path.exists()
        elif stop.result >= 0 and opens and self.missing:
            self.log.append(self.create(path))
        elif stop.result >= 0 and not opens:
            self.log.append(Op(stop.name.removesuffix("at"), name=path.name, old=paths[0].name))

    def on_file(self, stop: Stop) -> None:
        descriptor, address, _, at = stop.args[:4]
        path = stop.file(descriptor)
        if path == self.folder and stop.name == "fsync":
            self.log.append(Op("sync folder"))
        if path.parent != self.folder:
            return
        file = self.numbers[Path(f"/proc/{stop.pid}/fd/{descriptor}").stat().st_ino]
        match stop.name:
            case "fsync":
                self.log.append(Op("sync", file))
            case "ftruncate":
                self.log.append(Op("truncate", file, at=address))
            case "write" | "pwrite":
                if stop.name == "write":
                    told = Path(f"/proc/{stop.pid}/fdinfo/{descriptor}").read_text("ascii")
                    at = int(told.split()[1]) - stop.result
                self.log.append(Op("write", file, at=at, data=stop.read(address, stop.result)))


# -- losing ---------------------------------------------------------------------------------------

SECTOR = 512
_NAMES = {"create", "rename", "unlink"}
_ALL_CHOICES = 7  # pending operations of which all choices are tried: 2^7
_CHANCES = 32


def crashes(start: Disk, log: list[Op]) -> Iterator[tuple[int, dict[str, bytes]]]:
    """Yield all that a power loss may leave.

    Args:
        start: What was surely on the disk at first.
        log: What happened since.

    Yields:
        How many operations of the log had happened, and what is then found in the folder. The same
        content may come again.
    """
    sure, pending, chance = start.copy(), list[Op](), random.Random(0)
    yield 0, sure.content()
    for step, op in enumerate(log, 1):
        match op.kind:
            case "sync" | "sync folder":
                done = [other for other in pending if _settles(op, other)]
                pending = [other for other in pending if not _settles(op, other)]
                for other in done:
                    sure.apply(other)
            case "write" | "truncate" | "create" | "rename" | "unlink":
                pending.append(op)
        for kept in _outcomes(pending, chance):
            disk = sure.copy()
            for other in kept:
                disk.apply(other)
            yield step, disk.content()


def _settles(sync: Op, op: Op) -> bool:
    if sync.kind == "sync folder":
        return op.kind in _NAMES
    return op.kind not in _NAMES and op.file == sync.file


def _outcomes(pending: list[Op], chance: random.Random) -> Iterator[list[Op]]:
    """Yield what may have reached the disk of the pending operations, the newest one last."""
    count = len(pending)
    everything = range(count)
    if count <= _ALL_CHOICES:
        choices = chain.from_iterable(combinations(everything, n) for n in range(count + 1))
    else:
        few = [set(c) for n in range(3) for c in combinations(everything, n)]
        runs = [set(everything[start:end]) for start, end in combinations(range(count + 1), 2)]
        some = [{i for i in everything if chance.random() < 0.5} for _ in range(_CHANCES)]
        choices = [*few, *(set(everything) - c for c in few), *runs, *some]
    for chosen in choices:
        yield [pending[i] for i in sorted(chosen)]
    for i, op in enumerate(pending):
        for torn in _torn(op) if op.kind == "write" else ():
            yield [torn]
            yield [*pending[:i], torn]
            yield [*pending[:i], torn, *pending[i + 1 :]]


def _torn(op: Op) -> Iterator[Op]:
    """Yield what a write may leave that did not end: whole sectors of it, zeros, junk."""
    size = len(op.data)
    for cut in range(SECTOR - op.at % SECTOR, size, SECTOR):
        yield replace(op, data=op.data[:cut])
        yield replace(op, at=op.at + cut, data=op.data[cut:])
    yield replace(op, data=bytes(size))
    yield replace(op, data=random.Random(size).randbytes(size))
