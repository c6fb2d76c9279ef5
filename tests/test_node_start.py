"""Starts that must fail, each with at most three lines, its exit code and no harm."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from consortium import Consortium

from p2pfed.admin.client import Client
from p2pfed.cli.main import main
from p2pfed.errors import AdminError

pytestmark = pytest.mark.slow

P2PFED = [sys.executable, "-m", "p2pfed"]


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A node without data, made by the command that a hospital would use."""
    folder = tmp_path_factory.mktemp("template") / "node"
    command = [*P2PFED, "init", "--name", "Gate", "--dir", str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    text = (folder / "p2pfed.toml").read_text()
    assert "/ip4/0.0.0.0/tcp/4201" in text
    (folder / "p2pfed.toml").write_text(
        text.replace("/ip4/0.0.0.0/tcp/4201", "/ip4/127.0.0.1/tcp/0")
    )
    return folder


@pytest.fixture
def folder(template) -> Iterator[Path]:
    """A copy of it at a path that is short enough for a socket."""
    root = Path(tempfile.mkdtemp(prefix="p2pfed-"))
    shutil.copytree(template, root / "node")
    yield root / "node"
    shutil.rmtree(root)


def configured(folder: Path, section: str, line: str) -> None:
    """Add one line to a section of the configuration."""
    file = folder / "p2pfed.toml"
    lines = file.read_text().splitlines()
    if f"[{section}]" not in lines:
        lines.append(f"[{section}]")
    key = line.partition(" ")[0]
    lines = [old for old in lines if not old.startswith(f"{key} =")]
    lines.insert(lines.index(f"[{section}]") + 1, line)
    file.write_text("\n".join(lines) + "\n")


def command_of(folder: Path, *more: str) -> list[str]:
    return [*P2PFED, "node", "-c", str(folder / "p2pfed.toml"), *more]


@pytest.fixture
def refused(capsys):
    """Start a daemon in this process, which must refuse; gives what it says."""

    def start(folder: Path, code: int, *more: str) -> str:
        capsys.readouterr()
        assert main(["node", "-c", str(folder / "p2pfed.toml"), *more]) == code
        told = capsys.readouterr()
        assert told.out == ""
        assert "this is a bug" not in told.err
        assert len(told.err.strip().splitlines()) <= 3
        return told.err

    return start


@contextmanager
def running(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon that answers on its socket."""
    client = Client(folder / "admin.sock")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command_of(folder), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                client.get("/v1/status")
                break
            except AdminError:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield process
    finally:
        process.terminate()  # gracefully: it removes what it made in shared memory
        try:
            process.wait(20)
        finally:
            process.kill()


# --- two daemons -------------------------------------------------------------------------------


def test_a_second_daemon_on_one_directory_is_refused_and_the_first_lives(refused, folder):
    with running(folder) as first:
        told = refused(folder, 7).strip().splitlines()
        assert len(told) == 3
        assert str(folder) in told[0]
        assert str(first.pid) in told[1]
        assert Client(folder / "admin.sock").get("/v1/status")["pid"] == first.pid
        other_socket = refused(folder, 7, "--socket", str(folder / "other.sock"))
        assert str(first.pid) in other_socket
        assert not (folder / "other.sock").exists()


def test_a_second_daemon_on_the_same_socket_is_refused_and_the_first_lives(refused, folder):
    other = folder.parent / "other"
    shutil.copytree(folder, other)
    configured(other, "admin", f'socket = "{folder / "admin.sock"}"')
    with running(folder) as first:
        told = refused(other, 7)
        assert "another daemon is listening" in told
        assert str(folder / "admin.sock") in told
        assert Client(folder / "admin.sock").get("/v1/status")["pid"] == first.pid


def test_the_socket_and_the_lock_of_a_killed_daemon_are_taken_over(folder):
    with running(folder) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (folder / "admin.sock").is_socket()
    with running(folder) as second:
        assert Client(folder / "admin.sock").get("/v1/status")["pid"] == second.pid
        second.send_signal(signal.SIGTERM)
        assert second.wait(20) == 0
    assert not (folder / "admin.sock").exists()


def test_an_interrupt_ends_the_daemon_with_exit_code_0_and_no_traceback(folder):
    with running(folder) as daemon:
        daemon.send_signal(signal.SIGINT)
        assert daemon.wait(20) == 0
    assert "Traceback" not in (folder / "log").read_text()


# --- keys, sockets, ports ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_key_that_others_may_read_is_refused(refused, folder, mode):
    (folder / "node.key").chmod(mode)
    told = refused(folder, 2)
    assert f"{mode:04o}" in told
    assert "chmod 600" in told


@pytest.mark.parametrize("content", [None, b"", b"no key\n", b"\xff\xfe"])
def test_a_key_that_is_missing_or_none_is_refused_and_not_replaced(refused, folder, content):
    key = folder / "node.key"
    key.unlink()
    if content is not None:
        key.write_bytes(content)
        key.chmod(0o600)
    told = refused(folder, 2)
    assert str(key) in told
    assert key.exists() == (content is not None)


def test_a_socket_path_that_is_too_long_is_refused_with_the_limit(refused, folder):
    configured(folder, "admin", f'socket = "{folder / ("x" * 120)}"')
    told = refused(folder, 2)
    assert "admin.socket" in told
    assert "107" in told


def test_a_port_that_is_taken_is_named(refused, folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        configured(folder, "node", f'listen = ["/ip4/127.0.0.1/tcp/{port}"]')
        told = refused(folder, 2)
    assert f"/ip4/127.0.0.1/tcp/{port}" in told
    assert not (folder / "admin.sock").exists()


def test_a_file_in_the_place_of_the_socket_is_left_alone(refused, folder):
    (folder / "admin.sock").write_text("mine")
    assert "not a socket" in refused(folder, 2)
    assert (folder / "admin.sock").read_text() == "mine"


# --- damaged state -----------------------------------------------------------------------------


def test_a_damaged_store_is_told_and_left_alone(refused, folder):
    (folder / "store.db").write_bytes(b"no database" * 1000)
    told = refused(folder, 2)
    assert str(folder / "store.db") in told
    assert (folder / "store.db").read_bytes() == b"no database" * 1000


@pytest.mark.parametrize("content", [b"", b"\xff\0", Consortium(1).rosters[0].encode()])
def test_a_kept_roster_that_does_not_verify_is_told(refused, folder, content):
    (folder / "rosters").mkdir()
    (folder / "rosters" / "v0000000001-0123456789abcdef.json").write_bytes(content)
    assert "rosters" in refused(folder, 2)


def test_a_data_directory_that_cannot_be_written_is_told(refused, folder):
    configured(folder, "node", 'data_dir = "/proc/p2pfed"')
    configured(folder, "admin", f'socket = "{folder / "admin.sock"}"')
    configured(folder, "node", f'key_file = "{folder / "node.key"}"')
    assert "/proc/p2pfed" in refused(folder, 2)


def test_a_bootstrap_list_that_is_none_is_told(refused, folder):
    (folder / "b.toml").write_text("not = [toml")
    configured(folder, "network", 'bootstrap = ["b.toml"]')
    assert "b.toml" in refused(folder, 2)


def test_an_unknown_key_is_told_with_its_nearest_neighbour(refused, folder):
    configured(folder, "network", "rejion = true")
    assert "did you mean 'rejoin'" in refused(folder, 2)


def test_no_test_of_this_file_leaves_a_daemon_behind():
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes()
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        assert not (b"p2pfed\0node" in line and int(parent) == os.getpid())
