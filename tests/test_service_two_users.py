"""Node and trainer as two users: what the network process cannot know, read or open.

A network of two hospitals. One is split: its daemon runs as one user, `p2pfed trainer` as another,
with the rights that docs/service.md describes; every fact of its patients is a mark. After a run
the network process's memory (all that it maps, by /proc) and all its files are searched for the
marks; the same search finds there what the process does know, and each mark in the trainer's memory
and files, or it would prove nothing. The run is accepted by root, as docs/service.md has it.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from other_users import Stage, folder_of, required, why_not
from two_users_task import FILE, MARKS, PATIENTS, write_data

from p2pfed.demo.federation import Daemon, Federation, wait_for
from p2pfed.demo.plan import Cast, Hospital, run_constants

NODE, TRAINER = 61_871, 61_872  # users that no machine has; each has a group of its number
STRANGER = 61_873
ROUNDS = 3
HERE = Path(__file__).resolve().parent


NOT_HERE = why_not()
pytestmark = [
    pytest.mark.slow,
    required(NOT_HERE),
]


class Split:
    """The network, and the split hospital's folders and processes."""

    def __init__(self, base: Path) -> None:
        base.chmod(0o711)
        self.base = base
        cast = Cast(
            "two_users_task:Marked",
            None,
            (Hospital("Ashby", PATIENTS), Hospital("Brook", PATIENTS)),
            "", "", "",
        )  # fmt: skip
        self.federation = Federation(base / "nodes", cast, epsilon="20")
        self.node, self.other = self.federation.daemons.values()
        constants = run_constants("gaussian", rounds=ROUNDS, epsilon=Fraction(20))
        constants |= {"min_round_interval_s": 0.2, "deadline_s": 30.0, "quorum": 1.0}
        self.run = self.federation.make_run("two users", constants, seed=0)
        self.federation.write_bootstrap()
        self.etc = folder_of(0, TRAINER, 0o750, base / "etc")
        self.loop = folder_of(NODE, TRAINER, 0o2750, base / "loop")
        self.data = folder_of(TRAINER, TRAINER, 0o700, base / "data")
        self.home = folder_of(TRAINER, TRAINER, 0o700, base / "trainer")
        self._arrange()
        self.trainer: subprocess.Popen[bytes] | None = None
        stage = Stage(base / "stage")
        self.as_node = stage.command(NODE, TRAINER)  # a member of the trainer's group
        self.as_trainer = stage.command(TRAINER)
        self.as_stranger = stage.command(STRANGER)
        self.as_stray_member = stage.command(STRANGER, TRAINER)

    def _arrange(self) -> None:
        write_data(self.data)
        os.chown(self.data / FILE, TRAINER, TRAINER)
        (self.data / FILE).chmod(0o600)
        text = (self.node.folder / "p2pfed.toml").read_text()
        for old, new in {
            'data_dir = "."': f'data_dir = "{self.node.folder}"',
            "[train]\n": f'[train]\nuser = "{TRAINER}"\ndata = "{self.data}"\n'
            f'loop_socket = "{self.loop}/loop.sock"\nstate = "{self.home}/state"\n',
            f'socket = "{self.node.sockets}/trainer.sock"': f'socket = "{self.home}/trainer.sock"',
            'ledger = "ledger.db"': f'ledger = "{self.home}/ledger.db"',
        }.items():
            assert old in text
            text = text.replace(old, new)
        self.config = self.etc / "p2pfed.toml"
        self.config.write_text(text)
        shutil.move(self.node.folder / "bootstrap.toml", self.etc)
        (self.node.folder / "p2pfed.toml").unlink()
        for path in self.etc.iterdir():
            os.chown(path, 0, TRAINER)
            path.chmod(0o640)
        self.node.sockets.parent.chmod(0o711)
        (self.base / "nodes").chmod(0o711)
        for path in [self.node.folder, *self.node.folder.rglob("*"), self.node.sockets]:
            os.chown(path, NODE, NODE)

    def popen(self, log: Path, who: list[str], word: str) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            return subprocess.Popen(
                [*who, sys.executable, "-m", "p2pfed", word, "-c", str(self.config)],
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd="/",
                start_new_session=True, umask=0o077,
            )  # fmt: skip

    @property
    def log(self) -> Path:
        return self.base / "node.log"

    def start_node(self) -> None:
        self.node.process = self.popen(self.log, self.as_node, "node")
        wait_for(lambda: self.node.status() is not None or not self.node.runs, 90, "it starts")
        assert self.node.runs, self.log.read_text()

    def start_trainer(self) -> None:
        self.trainer = self.popen(self.base / "service.log", self.as_trainer, "trainer")

    def begin(self) -> None:
        roster = self.federation.stewards.admit([self.node.member, self.other.member])
        self.start_trainer()  # before the daemon: it waits
        self.start_node()
        self.node.client.post("/v1/join", {"roster": roster.decode()})
        self.accept_as_root()
        self.federation.start(self.other)
        self.federation.enrol(self.other, roster)

    def accept_as_root(self) -> None:
        """`p2pfed run accept --genesis`, by the machine's operator; other tests see what came."""
        folder = self.federation.folder
        words = ["run", "accept", folder / "run.json", "--genesis", folder / "genesis.safetensors"]
        done = subprocess.run(
            [sys.executable, "-m", "p2pfed", "-c", self.config, *words, "--yes"],
            check=False, capture_output=True, text=True, timeout=60, cwd="/",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def state(self) -> dict[str, Any]:
        status = self.node.status()
        return status["trainer"] if status else {}

    def is_ready(self) -> bool:
        return self.state().get("state") == "ready"

    def is_done(self, daemon: Daemon) -> bool:
        status = daemon.status()
        return bool(status and status["run"] and status["run"]["model_round"] >= ROUNDS)

    @property
    def serving(self) -> int:
        """The process that has the patients."""
        assert self.trainer is not None
        pid = self.trainer.pid
        [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(child)

    def end(self) -> None:
        self.federation.stop_all()
        if self.trainer is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.trainer.pid, signal.SIGTERM)
            self.trainer.wait(20)


@pytest.fixture(scope="module")
def split() -> Iterator[Split]:
    if NOT_HERE:
        pytest.fail(NOT_HERE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        base = Path(tempfile.mkdtemp(prefix="p2pfed-two-"))
        made = None
        try:
            made = Split(base)
            with made.federation.running():
                try:
                    made.begin()
                    yield made
                finally:
                    made.end()
                    print(made.log.read_text())  # shown where a test has failed
        finally:
            shutil.rmtree(base)


def marks_in(data: Any) -> set[str]:
    return {name for name, mark in MARKS.items() if data.find(mark) >= 0}


def marks_of_files(paths: Iterable[Path]) -> tuple[set[str], int]:
    """Marks in the names and contents of files, and how many files that were."""
    found, number = set(), 0
    for path in paths:
        found |= marks_in(str(path).encode())
        if path.is_file() and path.stat().st_size:
            number += 1
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as held:
                found |= marks_in(held)
    return found, number


def memory_of(pid: int) -> Iterator[bytes]:
    """All that a process maps and may read, device memory aside: read through /proc by root."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:  # noqa: PTH123 - not a path of files
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            begin, end, rights, name = re.match(
                r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \S+ *(.*)", line
            ).groups()
            is_device = name.startswith("/dev/") and not name.startswith("/dev/shm/")
            if rights.startswith("r") and not is_device and name not in {"[vvar]", "[vsyscall]"}:
                place, last = int(begin, 16), int(end, 16)
                with contextlib.suppress(OSError):  # gone meanwhile
                    while place < last and (part := os.pread(memory.fileno(), last - place, place)):
                        yield part
                        place += len(part)


def marks_in_memory(pid: int) -> set[str]:
    return {name for part in memory_of(pid) for name in marks_in(part)}


def test_after_a_run_no_mark_is_in_the_network_processs_memory_or_files(split):
    wait_for(lambda: split.is_done(split.node), 90, "the run ends at the split hospital")
    wait_for(lambda: split.is_done(split.other), 30, "the run ends at the other")
    assert split.node.status()["run"]["model_hash"] == split.other.status()["run"]["model_hash"]
    deltas = split.node.client.get("/v1/privacy")
    assert deltas["releases"] == ROUNDS  # the split hospital did train

    process = split.node.process
    known = (b"two users", split.node.key.peer_id.encode(), split.node.name.encode())
    held = [[part.find(word) >= 0 for word in known] for part in memory_of(process.pid)]
    assert all(map(any, zip(*held, strict=True)))  # the search sees what the process does know
    assert marks_in_memory(process.pid) == set()
    files = [*list(split.node.folder.rglob("*")), split.log, split.config]
    files += list(Path("/dev/shm").glob(f"p2pfed-{NODE}-*/*"))
    found, number = marks_of_files(files)
    assert found == set()
    assert number > 5

    in_memory = marks_in_memory(split.serving)
    on_disk, _ = marks_of_files([*split.home.rglob("*"), *split.data.iterdir()])
    assert in_memory | on_disk >= set(MARKS) - {"values as doubles"}
    assert {"patient", "values", "metric"} <= in_memory
    assert {"file name", "patient"} <= marks_of_files([split.home / "trainer.log"])[0]


ATTEMPTS = """
import json, os, socket, sys
told = {}
for kind, path in json.loads(sys.argv[1]):
    try:
        if kind == "connect":
            socket.socket(socket.AF_UNIX).connect(path)
        elif kind == "list":
            os.listdir(path)
        else:
            open(path, kind).close()
        told[path] = "opened"
    except OSError as error:
        told[path] = type(error).__name__
print(json.dumps(told))
"""


def attempted(attempts: list[tuple[str, str]], who: list[str]) -> dict[str, str]:
    command = [*who, sys.executable, "-c", ATTEMPTS, json.dumps(attempts)]
    done = subprocess.run(command, check=True, capture_output=True, cwd="/", timeout=60)
    return json.loads(done.stdout)


def test_the_nodes_user_can_open_nothing_of_the_trainers(split):
    wait_for(split.is_ready, 60, "the trainer is there")
    home, pid = split.home, split.serving
    private = [
        ("list", str(split.data)),
        ("rb", str(split.data / FILE)),
        ("rb", str(home / "ledger.db")),
        ("r+b", str(home / "ledger.db")),
        ("list", str(home / "state")),
        ("rb", str(home / "trainer.log")),
        ("connect", str(home / "trainer.sock")),
        ("rb", f"/proc/{pid}/mem"),
        ("rb", f"/proc/{pid}/environ"),
        ("list", f"/proc/{pid}/fd"),
    ]
    assert set(attempted(private, split.as_node).values()) == {"PermissionError"}
    as_trainer = attempted(private, split.as_trainer)
    for _, path in private[:4] + private[5:7]:  # they are there, for whom they belong to
        assert as_trainer[path] == "opened", path
    nodes = [
        ("rb", str(split.node.folder / "node.key")),
        ("rb", str(split.node.folder / "store.db")),
        ("connect", str(split.node.sockets / "admin.sock")),
    ]
    assert set(attempted(nodes, split.as_trainer).values()) == {"PermissionError"}
    exchange = next(Path("/dev/shm").glob(f"p2pfed-{NODE}-*"))
    shared = [
        ("rb", str(split.config)),
        ("connect", str(split.loop / "loop.sock")),
        ("list", str(exchange)),
    ]
    assert set(attempted(shared, split.as_trainer).values()) == {"opened"}
    strangers = attempted(shared, split.as_stranger)
    assert set(strangers.values()) == {"PermissionError"}


def test_the_first_model_that_root_brought_is_the_nodes_own(split):
    wait_for(split.is_ready, 60, "the trainer is there")
    [blob] = (split.node.folder / "blobs").iterdir()
    assert (blob.stat().st_uid, blob.stat().st_mode & 0o777) == (NODE, 0o600)


def test_a_first_model_of_roots_alone_stops_no_start_and_is_mended_by_its_owner(split):
    """What an older `run accept` left behind, at the next start; nobody else has the file now."""
    [blob] = (split.node.folder / "blobs").iterdir()
    split.federation.stop(split.node)
    split.federation.stop(split.other)
    os.chown(blob, 0, 0)
    split.start_node()
    lines = split.node.status
    wait_for(lambda: f"{blob} cannot be read" in str(lines()["health"]), 30, "it says so")
    assert "Permission denied" in str(lines()["health"])
    os.chown(blob, NODE, NODE)
    wait_for(lambda: lines()["run"] is not None, 30, "the run goes on")
    split.federation.start(split.other)


def test_a_stranger_who_gets_to_the_socket_is_refused_by_the_kernels_word(split):
    path = split.loop / "loop.sock"
    talk = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        "print(s.makefile().readline())"
    )
    command = [*split.as_stray_member, sys.executable, "-c", talk, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, cwd="/", timeout=60)
    told = json.loads(done.stdout)
    assert told["op"] == "refused"
    assert str(STRANGER) in told["why"]


def test_pausing_ends_the_trainer_and_resuming_lets_it_join_again(split):
    wait_for(split.is_ready, 60, "the trainer is there")
    before = split.serving
    split.node.client.post("/v1/task", {"paused": True})
    assert split.state()["state"] == "paused"
    wait_for(lambda: not Path(f"/proc/{before}").exists(), 20, "its process ends")
    split.node.client.post("/v1/task", {"paused": False})
    wait_for(split.is_ready, 60, "it has joined again")
    assert split.serving != before


def test_the_trainer_survives_a_killed_daemon_and_the_daemon_a_killed_trainer(split):
    wait_for(split.is_ready, 60, "the trainer is there")
    os.kill(split.serving, signal.SIGKILL)
    wait_for(lambda: not split.is_ready(), 20, "the daemon sees it")
    wait_for(split.is_ready, 60, "another one has joined")
    split.node.process.kill()
    split.node.process.wait()
    split.start_node()
    wait_for(split.is_ready, 60, "it has joined the new daemon")
    assert split.trainer.poll() is None
    assert split.node.runs


def test_what_the_task_says_of_its_data_stays_in_the_trainers_log(split):
    wait_for(split.is_ready, 60, "the trainer is there")
    broken = split.data / "broken"
    broken.touch()
    os.chown(broken, TRAINER, TRAINER)
    try:
        os.kill(split.serving, signal.SIGKILL)
        wait_for(lambda: "ConfigError" in json.dumps(split.node.status()), 60, "it fails")
        told = json.dumps(split.node.status())
        assert "the task raised ConfigError while reading its data" in told
        assert marks_in(told.encode()) == set()
        assert marks_in(split.log.read_bytes()) == set()
        assert "does not fit" in (split.home / "trainer.log").read_text()
    finally:
        broken.unlink()
