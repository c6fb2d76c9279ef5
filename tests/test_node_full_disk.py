"""What ends a daemon is told in words where it is the disk, and loudly where it is a bug."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pfed.admin.client import Client
from p2pfed.demo.federation import wait_for
from p2pfed.errors import AdminError, StateInUse, StoreFailed
from p2pfed.node.daemon import told_error

FOLDER = Path("/var/lib/p2pfed")
FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_in_three_lines():
    told = told_error(ExceptionGroup("", [ExceptionGroup("", [FULL])]), FOLDER)
    assert isinstance(told, StoreFailed) and told.exit_code == 1
    assert str(told).splitlines() == [
        "cannot write in /var/lib/p2pfed",
        "No space left on device",
        "make room or mend the disk, then start again: the node goes on from its store",
    ]


def test_an_error_of_ours_is_told_as_it_is():
    ours = StateInUse("another daemon runs")
    assert told_error(ExceptionGroup("", [ours, FULL]), FOLDER) is ours


@pytest.mark.parametrize("bug", [KeyError("x"), OSError(errno.EBADF, "Bad file descriptor")])
def test_a_bug_is_no_full_disk_and_ends_the_daemon_loudly(bug):
    assert told_error(ExceptionGroup("", [FULL, bug]), FOLDER) is None


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A disk of two megabytes at a path that is short enough for a socket."""
    folder = Path(tempfile.mkdtemp(prefix="p2pfed-"))
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        folder.rmdir()
        pytest.skip("needs root that may mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


@pytest.mark.slow
def test_a_node_on_a_full_disk_says_so_and_starts_once_there_is_room(small_disk):
    command = [sys.executable, "-m", "p2pfed"]
    home = small_disk / "node"
    made = [*command, "init", "--name", "Gate", "--dir", str(home)]
    subprocess.run(made, check=True, capture_output=True, timeout=30)
    file = home / "p2pfed.toml"
    file.write_text(file.read_text().replace("/ip4/0.0.0.0/tcp/4201", "/ip4/127.0.0.1/tcp/0"))
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as out:
        os.posix_fallocate(out.fileno(), 0, shutil.disk_usage(small_disk).free)
    assert shutil.disk_usage(small_disk).free == 0
    node = [*command, "node", "-c", str(file)]
    full = subprocess.run(node, capture_output=True, text=True, timeout=30, check=False)
    last = full.stderr.strip().splitlines()[-3:]
    assert full.returncode in {1, 2}, full.stderr
    assert "Traceback" not in full.stderr
    assert "bug" not in full.stderr and last[-1]
    ballast.unlink()
    process = subprocess.Popen(node, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        client = Client(home / "admin.sock")

        def answers() -> bool:
            try:
                return bool(client.get("/v1/status"))
            except AdminError:
                return False

        wait_for(answers, 30, "the node runs")
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(home, ignore_errors=True)
