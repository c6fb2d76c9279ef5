"""The data directory: one living daemon at a time, files whole or absent, closed to others."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from p2pfed.errors import ConfigError, FactRejected, StateInUse
from p2pfed.identity.filehash import file_hash
from p2pfed.identity.signing import fact_hash
from p2pfed.node.directory import DataDirectory, file_digest, write_durably

HERE = Path(__file__).resolve().parent

HOLDER = """
import sys
from pathlib import Path
from p2pfed.node.directory import DataDirectory
with DataDirectory(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""

OVERWRITER = """
import sys
from pathlib import Path
from p2pfed.node.directory import write_durably
path = Path(sys.argv[1])
n = 0
while True:
    write_durably(path, b"%08d" % n * 20_000)
    print(n, flush=True)
    n += 1
"""


def run_python(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
    )


@contextmanager
def holder(root: Path):
    """Another process that holds the directory."""
    process = run_python(HOLDER, str(root))
    assert process.stdout.readline() == b"held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# --- the lock ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_directory_held_by_a_living_process_is_refused_and_its_process_is_named(tmp_path):
    with holder(tmp_path) as process:
        with pytest.raises(StateInUse) as caught, DataDirectory(tmp_path).locked():
            pytest.fail("it was let in")
        assert str(tmp_path) in caught.value.what
        assert str(process.pid) in caught.value.why
        assert caught.value.do
        assert caught.value.exit_code == 7
        assert (tmp_path / "lock").read_text() == f"{process.pid}\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_dead_process_is_free_whatever_its_file_says(tmp_path, number):
    with holder(tmp_path) as process:
        process.send_signal(number)
        process.wait()
        with DataDirectory(tmp_path).locked():
            assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_the_lock_is_free_again_after_an_error_inside(tmp_path):
    directory = DataDirectory(tmp_path)
    with pytest.raises(RuntimeError), directory.locked():
        raise RuntimeError
    with directory.locked():
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_lock_that_cannot_be_opened_is_a_configuration_error(tmp_path):
    directory = DataDirectory(tmp_path)
    (tmp_path / "lock").mkdir()
    with pytest.raises(ConfigError), directory.locked():
        pytest.fail("it was let in")


# --- durable writes ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("writes", [1, 5, 20, 45])
def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path, writes):
    path = tmp_path / "file"
    process = run_python(OVERWRITER, str(path))
    for _ in range(writes):
        done = int(process.stdout.readline())
    process.kill()
    rest, _ = process.communicate()
    done = max([done, *map(int, rest.split(b"\n")[:-1])])  # the last line may be half
    data = path.read_bytes()
    assert data in {b"%08d" % n * 20_000 for n in (done, done + 1)}


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_durably(path, b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_durably(path, b"new")
    assert path.read_bytes() == b"old"


def test_the_data_is_synced_before_the_name_changes_and_the_name_after(tmp_path, monkeypatch):
    steps: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        what = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "data"
        steps.append(what)
        real_sync(descriptor)

    def replace(self, target):
        steps.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    write_durably(tmp_path / "file", b"data")
    assert steps == ["data", "rename", "folder"]


def test_a_short_files_digest_is_blake2b_of_its_bytes_and_a_long_ones_is_of_its_chunks(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 1000)
    assert file_digest(tmp_path / "file") == fact_hash(b"x" * 1000)
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    assert file_digest(tmp_path / "file") == file_hash(b"x" * 3_000_000)


# --- folders and documents ---------------------------------------------------------------------


def test_nobody_else_may_look_into_a_new_directory(tmp_path):
    before = os.umask(0o022)
    try:
        root = tmp_path / "a" / "node"
        directory = DataDirectory(root)
        directory.checkpoints(bytes(32))
    finally:
        os.umask(before)
    folders = [root, *(p for p in root.rglob("*") if p.is_dir())]
    assert len(folders) == 6
    assert {stat.S_IMODE(p.stat().st_mode) for p in folders} == {0o700}


@pytest.mark.parametrize("make", ["file", "unwritable"])
def test_a_directory_that_cannot_be_made_is_a_configuration_error(tmp_path, make):
    place = tmp_path / "place"
    if make == "file":
        place.write_text("")
        root = place / "node"
    else:
        root = Path("/proc/p2pfed/node")
    with pytest.raises(ConfigError) as caught:
        DataDirectory(root)
    assert str(root) in caught.value.what


def test_rosters_are_kept_oldest_first_and_byte_for_byte(tmp_path):
    directory = DataDirectory(tmp_path)
    for version in (11, 2, 100):
        directory.keep_roster(version, bytes([version]) * 32, b"roster %d" % version)
    assert DataDirectory(tmp_path).rosters() == [b"roster 2", b"roster 11", b"roster 100"]


def test_a_run_is_found_by_its_id_and_one_that_was_never_accepted_is_refused(tmp_path):
    directory = DataDirectory(tmp_path)
    directory.keep_run(b"\x01" * 32, b"signed")
    assert directory.run(b"\x01" * 32) == b"signed"
    assert directory.runs() == [b"signed"]
    with pytest.raises(FactRejected, match="never accepted"):
        directory.run(b"\x02" * 32)


def test_a_data_directory_that_others_can_look_into_is_refused(tmp_path):
    folder = tmp_path / "wide"
    folder.mkdir(mode=0o750)
    with pytest.raises(ConfigError, match="mode 0750"):
        DataDirectory(folder)
