"""What a task may do to its node, with real daemons: a round is lost, and nothing else.

Two hospitals without a mechanism; all trouble is North's. The tests stand in no order.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from p2pfed.demo.federation import Daemon, Federation, wait_for
from p2pfed.demo.plan import Cast, Hospital, run_constants

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
ROUNDS = 3000  # more than the tests take
INTERVAL = 0.3
LONGEST = 20.0  # seconds of a round; the first one on a busy machine takes ten
MEMORY_GB = 1.2


class Net:
    """North, who has a wicked task, and South, who has a good one."""

    def __init__(self, folder: Path) -> None:
        self.door = folder / "door"
        self.door.mkdir()
        options = {"sites": 2, "door": str(self.door)}
        good = {"sites": 2, "door": str(folder / "no door"), "site": 1}
        cast = Cast(
            "wicked_task:WickedBreastCancer",
            None,
            (Hospital("North", 150, {**options, "site": 0}), Hospital("South", 150, good)),
            "",
            "",
            "",
        )
        self.federation = Federation(folder / "nodes", cast, epsilon="0")
        self.north, self.south = self.federation.daemons.values()
        file = self.north.folder / "p2pfed.toml"
        limits = f"[train]\nlongest_round = {LONGEST}\nmemory_gb = {MEMORY_GB}"
        file.write_text(file.read_text().replace("[train]", limits))
        constants = run_constants("none", rounds=ROUNDS, epsilon=Fraction(0))
        constants |= {"deadline_s": 1.0, "min_round_interval_s": INTERVAL}
        self.run = self.federation.make_run("long", constants, seed=0)
        self.federation.write_bootstrap()

    def start(self) -> None:
        roster = self.federation.stewards.admit([self.north.member, self.south.member])
        for daemon in (self.north, self.south):
            self.federation.start(daemon)
            self.federation.enrol(daemon, roster)
        self.contributes(self.north)
        self.contributes(self.south)

    def status(self, daemon: Daemon) -> dict[str, Any]:
        status = daemon.status()
        assert status is not None, f"{daemon.name} does not answer"
        return status

    def own(self, daemon: Daemon) -> int:
        run = self.status(daemon)["run"]
        return run["own_deltas"] if run else 0

    def contributes(self, daemon: Daemon, seconds: float = 60.0) -> None:
        """It releases once more."""
        before = self.own(daemon)
        wait_for(lambda: self.own(daemon) > before, seconds, f"{daemon.name} contributes")

    def events(self, kind: str) -> list[dict[str, Any]]:
        found = self.north.client.stream("/v1/events?since=0&limit=20000")
        return [e["data"] for e in found if e["type"] == kind]

    def pid(self) -> int | None:
        return self.status(self.north)["trainer"]["pid"]

    def waiting(self) -> int:
        """North's trainer stands still in the middle of a round; its process."""
        (self.door / "waiting").unlink(missing_ok=True)
        (self.door / "wait").touch()
        wait_for((self.door / "waiting").exists, 60, "North's trainer is in a round")
        pid = self.pid()
        assert pid is not None
        return pid

    def failed(self, reason: str) -> bool:
        return any(reason in event["reason"] for event in self.events("training.failed"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{HERE.parent}{os.pathsep}{HERE}")
        made = Net(tmp_path_factory.mktemp("trouble"))
        with made.federation.running():
            made.start()
            yield made


@pytest.fixture
def net(whole):
    """Both contribute before a test and after it, and no daemon has ended by itself."""
    yield whole
    for deed in whole.door.iterdir():
        deed.unlink()
    whole.contributes(whole.north)
    whole.contributes(whole.south)
    for daemon in (whole.north, whole.south):
        assert whole.status(daemon)["pid"] == daemon.process.pid


def test_a_trainer_killed_in_the_middle_of_a_round_loses_that_round_alone(net):
    pid = net.waiting()
    own = net.own(net.north)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: net.failed("the trainer died"), 20, "the round is lost")
    (net.door / "wait").unlink()
    assert net.own(net.north) == own
    net.contributes(net.south)


# --- memory ------------------------------------------------------------------------------------


def memory_groups() -> tuple[Path, str] | None:
    """Where memory control groups are made here, and what their limit is called."""
    for folder, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        probe = folder / f"p2pfed-probe-{os.getpid()}"
        with contextlib.suppress(OSError):
            probe.mkdir()
            try:
                if (probe / limit).exists():
                    return folder, limit
            finally:
                probe.rmdir()
    return None


@contextlib.contextmanager
def little_memory(processes: list[int], size: int) -> Iterator[None]:
    """These processes may take so many bytes more, all together; then the kernel kills one."""
    found = memory_groups()
    if found is None:
        pytest.skip("control groups with a memory limit cannot be made here (root, and writable)")
    folder, limit = found
    group = folder / f"p2pfed-test-{os.getpid()}"
    group.mkdir()
    before = {pid: _memory_group(pid, folder) for pid in processes}
    try:
        (group / limit).write_text(str(size))
        for pid in processes:
            (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        left = set(map(int, (group / "cgroup.procs").read_text().split()))
        for pid in left:
            back = before.get(pid, next(iter(before.values())))
            with contextlib.suppress(OSError):
                (back / "cgroup.procs").write_text(str(pid))
        wait_for(lambda: not (group / "cgroup.procs").read_text(), 10, "the group is empty")
        group.rmdir()


def _memory_group(pid: int, folder: Path) -> Path:
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, kinds, place = line.split(":", 2)
        if kinds == ("memory" if folder.name == "memory" else ""):
            return folder / place.lstrip("/")
    return folder


def test_a_trainer_that_the_kernel_kills_for_memory_loses_its_round_and_the_daemon_lives(net):
    pid, daemon = net.waiting(), net.status(net.north)["pid"]
    restarts = net.status(net.north)["trainer"]["restarts"]
    # Which of the two goes first is this number's business. They have no group in common here: the
    # kernel may kill a second process before the memory of the first has come back.
    scores = [int(Path(f"/proc/{p}/oom_score").read_text()) for p in (daemon, pid)]
    assert scores[0] < scores[1]
    with little_memory([pid], 300_000_000):
        (net.door / "eat").touch()
        (net.door / "wait").unlink()
        wait_for(
            lambda: net.status(net.north)["trainer"]["restarts"] > restarts, 60, "it is killed"
        )
        assert any("-9" in line for line in net.status(net.north)["health"])
        (net.door / "eat").unlink()


def test_a_task_that_eats_all_memory_meets_its_limit_first(net):
    free = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    if free < 4 << 30:
        pytest.skip("a trainer with its limit does not fit into this machine")
    (net.door / "eat").touch()
    wait_for(lambda: net.failed("the trainer ran out of memory"), 60, "it meets the limit")
    assert not net.failed("RuntimeError")


# --- time, words and mistakes ------------------------------------------------------------------


def test_a_task_that_hangs_is_killed_when_its_time_is_over(net):
    before = net.pid()
    (net.door / "hang").touch()
    wait_for(lambda: net.failed("did not answer in time"), 60, "its time is over")
    (net.door / "hang").unlink()
    wait_for(lambda: net.pid() not in {None, before}, 60, "another one is started")
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)


def test_a_task_that_raises_in_every_round_keeps_its_process_and_is_told_by_its_type(net):
    before = net.pid()
    (net.door / "raise").touch()
    reason = "the task failed with ValueError"
    wait_for(lambda: net.failed(reason), 60, "it fails")
    failures = len(net.events("training.failed"))
    wait_for(lambda: len(net.events("training.failed")) > failures + 1, 60, "it fails again")
    assert net.pid() == before
    assert not net.failed("own mistake")  # its words stay at home
    assert "own mistake" in str(net.north.private.get("/v1/status"))
    net.contributes(net.south)


def test_a_task_that_prints_says_nothing_to_the_daemon(net):
    (net.door / "print").touch()
    net.contributes(net.north)
    log = net.north.sockets / "trainer.log"
    assert "x" * 1000 in log.read_text()
    assert "x" * 1000 not in (net.north.folder / "daemon.log").read_text()


def test_a_task_that_ends_its_process_is_an_error_or_a_restart(net):
    failures = len(net.events("training.failed"))
    (net.door / "exit").touch()
    wait_for(lambda: len(net.events("training.failed")) > failures, 60, "the round is lost")


# --- pause -------------------------------------------------------------------------------------


def cli(daemon: Daemon, *words: str) -> str:
    command = [sys.executable, "-m", "p2pfed", "--socket", str(daemon.client.path), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_a_paused_node_has_no_trainer_over_a_restart_and_others_do_not_wait_for_it(net):
    pid = net.waiting()
    cli(net.north, "task", "pause")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)  # gone when the command returns
    (net.door / "wait").unlink()
    assert "trainer   paused" in cli(net.north, "status")
    own, received = net.own(net.north), net.status(net.north)["run"]["deltas"]
    seen = {p["name"]: p for p in net.south.client.get("/v1/peers")}
    wait_for(
        lambda: (
            {p["name"]: p for p in net.south.client.get("/v1/peers")}["North"]["contributes"]
            is False
        ),
        20,
        "South knows",
    )
    assert seen["North"]["state"] == "alive"
    net.contributes(net.south)
    wait_for(
        lambda: net.status(net.north)["run"]["deltas"] > received + 1, 20, "North goes on receiving"
    )
    assert net.own(net.north) == own
    daemon = net.status(net.north)["pid"]
    os.kill(daemon, signal.SIGTERM)
    net.north.process.wait(20)
    net.federation.start(net.north)
    assert net.status(net.north)["trainer"] == {"state": "paused", "restarts": 0, "pid": None}
    cli(net.north, "task", "resume")
    net.contributes(net.north)
    kinds = {e["type"] for e in net.north.client.stream("/v1/events?since=0&limit=20000")}
    assert {"task.paused", "task.resumed"} <= kinds


# --- the model ---------------------------------------------------------------------------------


def test_the_model_of_a_running_node_is_a_file_with_its_facts(net, tmp_path):
    place = tmp_path / "m.safetensors"
    net.north.client.download("/v1/model", place)
    with safe_open(place, framework="numpy") as file:
        assert set(file.keys()) == {"model"}
        model, facts = file.get_tensor("model"), json.loads(file.metadata()["p2pfed"])
    assert model.shape == (net.run.num_parameters,)
    assert np.isfinite(model).all()
    assert facts["run_id"] == net.run.run_id.hex()
    assert set(facts["deltas"]) == {"North", "South"}
    assert 0 < sum(facts["deltas"].values()) <= 2 * facts["round"]
