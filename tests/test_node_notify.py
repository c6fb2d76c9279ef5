"""What the service manager is told, through a real datagram socket."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
import trio
from admin_fakes import short_folder

from p2pfed.node.notify import Manager


@pytest.fixture
def heard():
    """A service manager's socket."""
    with short_folder() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(folder / "notify"))
        made.settimeout(30)
        yield made


def facts(heard: socket.socket) -> dict[str, str]:
    """The next message."""
    return dict(line.split("=", 1) for line in heard.recv(4096).decode().splitlines())


def waiting(heard: socket.socket) -> list[bytes]:
    """All messages that are there."""
    found = []
    heard.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(heard.recv(4096))
    heard.settimeout(30)
    return found


def test_the_environment_names_the_manager_and_is_cleaned():
    environment = {"NOTIFY_SOCKET": "/run/s", "WATCHDOG_USEC": "3000000", "HOME": "/"}
    assert Manager.taken_from(environment) == Manager("/run/s", 3.0)
    assert environment == {"HOME": "/"}


@pytest.mark.parametrize(
    "environment",
    [{}, {"WATCHDOG_USEC": "5"}, {"NOTIFY_SOCKET": "vsock:2:1"}, {"NOTIFY_SOCKET": ""}],
)
async def test_without_a_manager_that_we_can_reach_nothing_is_said(environment):
    manager = Manager.taken_from(environment)
    assert manager == Manager()
    manager.tell(READY="1")
    await manager.keep_told(lambda: pytest.fail("nobody wants to know"))


@pytest.mark.parametrize("address", ["/nobody/there", "@p2pfed-nobody-there"])
def test_a_manager_that_has_gone_is_no_error(address):
    Manager(address).tell(READY="1")


def test_a_watchdog_that_is_meant_for_another_process_is_not_fed():
    environment = {"NOTIFY_SOCKET": "/s", "WATCHDOG_USEC": "9", "WATCHDOG_PID": str(os.getpid())}
    assert Manager.taken_from(dict(environment)).patience == 9e-6
    environment["WATCHDOG_PID"] = "1"
    assert Manager.taken_from(environment) == Manager("/s", 0.0)


def test_a_value_stays_on_its_line(heard):
    Manager(heard.getsockname()).tell(STATUS="3 peers\nREADY=0")
    assert facts(heard) == {"STATUS": "3 peers READY=0"}


def test_an_abstract_socket_is_reached():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(f"\0p2pfed-test-{os.getpid()}")
        made.settimeout(30)
        Manager(f"@p2pfed-test-{os.getpid()}").tell(READY="1")
        assert facts(made) == {"READY": "1"}


async def test_the_status_is_told_when_it_changes_and_the_watchdog_is_fed_always(
    heard, autojump_clock
):
    manager, now = Manager(heard.getsockname(), 60.0), "0 peers"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.keep_told, lambda: now)
        await trio.sleep(2.5)
        now = "1 peer, round 1"
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    fed = b"WATCHDOG=1"
    assert waiting(heard) == [
        b"STATUS=0 peers\n" + fed,
        fed,
        fed,
        b"STATUS=1 peer, round 1\n" + fed,
    ]


async def test_without_a_watchdog_only_changes_are_told(heard, autojump_clock):
    with trio.move_on_after(5):
        await Manager(heard.getsockname()).keep_told(lambda: "0 peers")
    assert waiting(heard) == [b"STATUS=0 peers"]


async def test_a_blocked_event_loop_stops_feeding(heard):
    """In real time: what blocks the loop blocks the feeding, and nothing else feeds."""
    manager = Manager(heard.getsockname(), 0.006)  # fed every 2 ms
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.keep_told, lambda: "")
        while len(waiting(heard)) < 2:  # noqa: ASYNC110 - of sockets nobody is told
            await trio.sleep(0.002)
        waiting(heard)
        threading.Event().wait(0.1)  # a bug: somebody waits and does not let the loop go on
        assert waiting(heard) == []
        await trio.sleep(0.02)
        assert waiting(heard) != []
        nursery.cancel_scope.cancel()


@pytest.mark.slow
def test_a_real_daemon_says_that_it_is_ready_alive_and_stopping(heard, tmp_path):
    folder = tmp_path / "node"
    node = [sys.executable, "-m", "p2pfed"]
    listen = ["--listen", "/ip4/127.0.0.1/tcp/0"]
    command = [*node, "init", "--name", "A", "--dir", str(folder), *listen]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    told = {"NOTIFY_SOCKET": heard.getsockname(), "WATCHDOG_USEC": "600000"}
    admin = f"{heard.getsockname()}.admin"
    command = [*node, "node", "-c", str(folder / "p2pfed.toml"), "--socket", admin]
    with subprocess.Popen(
        command, env={**os.environ, **told}, stderr=subprocess.DEVNULL
    ) as process:
        try:
            assert facts(heard) == {"READY": "1"}
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(admin)  # ready means that it answers
            assert facts(heard) == {"STATUS": "0 peers", "WATCHDOG": "1"}
            assert facts(heard) == {"WATCHDOG": "1"}
            process.send_signal(signal.SIGINT)
            while (said := facts(heard)) == {"WATCHDOG": "1"}:
                pass
            assert said == {"STOPPING": "1"}
            assert process.wait(30) == 0
        finally:
            process.kill()
