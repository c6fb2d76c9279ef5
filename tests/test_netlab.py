"""The lab of network namespaces does to its hosts what it says, seen with plain sockets."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fair_clock import FairClock
from namespaces import NETNS
from netlab import Lab, missing

from p2pfed.demo.federation import wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]

PORT = 4201
SOON = 5.0  # seconds for what must arrive
SILENCE = 0.5  # seconds in which what must not arrive does not
SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]


@pytest.fixture
def lab():
    with Lab(3) as made:
        yield made


@contextlib.contextmanager
def listener(lab: Lab, i: int, family: int = socket.AF_INET):
    with lab.inside(i):
        server = socket.create_server(("", PORT), family=family)
    server.settimeout(SOON)
    with server:
        yield server


@contextlib.contextmanager
def dialled(lab: Lab, i: int, address: str, seconds: float = SOON):
    with lab.inside(i):
        stream = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    stream.settimeout(seconds)
    with stream:
        stream.connect((address, PORT))
        yield stream


@contextlib.contextmanager
def connection(lab: Lab, a: int, b: int, *, ipv6: bool = False):
    """A stream from host a to host b: a's end, b's end."""
    host = lab.hosts[b]
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    with (
        listener(lab, b, family) as server,
        dialled(lab, a, host.ip6 if ipv6 else host.ip4) as near,
    ):
        far, _ = server.accept()
        far.settimeout(SOON)
        with far:
            yield near, far


def arrives(sender: socket.socket, receiver: socket.socket, seconds: float = SOON) -> bool:
    """Whether a byte gets through in that time; one that was late before counts as well."""
    sender.sendall(b"x")
    with selectors.DefaultSelector() as selector:
        selector.register(receiver, selectors.EVENT_READ)
        if not selector.select(seconds):
            return False
    assert receiver.recv(4096)
    return True


def can_dial(lab: Lab, a: int, address: str, seconds: float = SILENCE) -> bool:
    try:
        with dialled(lab, a, address, seconds):
            return True
    except TimeoutError:
        return False


def carrier(lab: Lab, i: int) -> bool:
    command = ["ip", "-n", lab.hosts[i].namespace, "link", "show", "eth0"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return "NO-CARRIER" not in told


# --- the network -------------------------------------------------------------------------------


@pytest.mark.parametrize("ipv6", [False, True])
def test_hosts_reach_each_other(lab, ipv6):
    with connection(lab, 1, 2, ipv6=ipv6) as (near, far):
        assert arrives(near, far)
        assert arrives(far, near)


def test_a_host_has_its_own_network_and_a_thread_comes_back_from_it(lab):
    with lab.inside(1), socket.socket(socket.AF_INET) as stream:
        stream.bind(("10.77.0.1", 0))
    with socket.socket(socket.AF_INET) as stream, pytest.raises(OSError, match="assign"):
        stream.bind(("10.77.0.1", 0))


def test_a_lab_without_ipv4_has_only_ipv6():
    with Lab(2, ipv4=False) as lab:
        with connection(lab, 1, 2, ipv6=True) as (near, far):
            assert arrives(near, far)
        with pytest.raises(OSError, match="unreachable"):
            can_dial(lab, 1, "10.77.0.2")


def test_a_cut_cable_takes_the_carrier_and_heals(lab):
    with connection(lab, 1, 2) as (near, far):
        lab.cut(2)
        assert not carrier(lab, 2)
        assert carrier(lab, 1)
        assert not arrives(near, far, SILENCE)
        lab.heal(2)
        assert carrier(lab, 2)
        assert arrives(near, far)


@pytest.mark.parametrize("ipv6", [False, True])
def test_a_partition_is_silent_and_heals(lab, ipv6):
    with connection(lab, 1, 3, ipv6=ipv6) as (near, far):
        assert arrives(near, far)
        lab.partition([1, 2], [3])
        assert carrier(lab, 1)
        assert carrier(lab, 3)
        assert not arrives(near, far, SILENCE)
        assert not arrives(far, near, SILENCE)  # nor an error: nobody was told
        with connection(lab, 1, 2, ipv6=ipv6) as (one, other):
            assert arrives(one, other)
        lab.heal()
        assert arrives(near, far)
        assert arrives(far, near)


@pytest.mark.parametrize("ipv6", [False, True])
def test_across_a_partition_nobody_answers_a_dial(lab, ipv6):
    host = lab.hosts[3]
    address = host.ip6 if ipv6 else host.ip4
    with listener(lab, 3, socket.AF_INET6 if ipv6 else socket.AF_INET):
        lab.partition([1, 2], [3])
        assert not can_dial(lab, 1, address)
        lab.heal()
        assert can_dial(lab, 1, address, SOON)


@pytest.mark.parametrize("ipv6", [False, True])
def test_a_one_way_cut_loses_one_direction_of_a_datagram_socket(lab, ipv6):
    ends, family = [], socket.AF_INET6 if ipv6 else socket.AF_INET
    with contextlib.ExitStack() as stack:
        for i in (1, 2):
            with lab.inside(i) as host:
                end = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            end.bind((host.ip6 if ipv6 else host.ip4, PORT))
            end.settimeout(SILENCE)
            ends.append(end)
        one, two = ends
        lab.one_way(1, 2)
        one.sendto(b"lost", two.getsockname())
        two.sendto(b"heard", one.getsockname())
        assert one.recv(100) == b"heard"
        with pytest.raises(TimeoutError):
            two.recv(100)
        lab.heal()
        one.sendto(b"again", two.getsockname())
        assert two.recv(100) == b"again"


@pytest.mark.skipif(bool(missing("rate")), reason=missing("rate") or "-")
def test_a_rate_limit_holds_both_ways_and_can_be_taken_away(lab):
    size = 200_000

    def seconds(sender: socket.socket, receiver: socket.socket) -> float:
        began, left = time.monotonic(), size
        sender.sendall(bytes(size))
        while left:
            left -= len(receiver.recv(65536))
        return time.monotonic() - began

    with connection(lab, 1, 2) as (near, far):
        lab.rate(2, "2mbit")
        for ends in ((near, far), (far, near)):
            assert seconds(*ends) > 0.8 * (size - 32_768) * 8 / 2e6  # 32 kB may go at once
        lab.rate(2, None)
        clock = FairClock()
        seconds(near, far)
        assert clock.within(0.5)


# --- hosts that can only dial out --------------------------------------------------------------


@pytest.mark.skipif(bool(missing("nat")), reason=missing("nat") or "-")
def test_a_host_behind_a_nat_dials_out_and_is_seen_as_its_gateway(lab):
    host = lab.up_behind_nat()
    with listener(lab, 1) as server, dialled(lab, host.number, "10.77.0.1") as near:
        far, (seen, _) = server.accept()
        with far:
            assert seen == host.ip4
            assert near.getsockname()[0] == host.inner
            assert arrives(near, far)
            assert arrives(far, near)
    with listener(lab, host.number):
        with pytest.raises(ConnectionRefusedError):
            can_dial(lab, 1, host.ip4)
        with pytest.raises(OSError, match="unreachable"):
            can_dial(lab, 1, host.inner)


@pytest.mark.skipif(bool(missing("nat")), reason=missing("nat") or "-")
def test_a_host_behind_a_nat_may_be_let_out_to_some_only_and_its_cable_be_cut(lab):
    host = lab.up_behind_nat(reaches=[1])
    with listener(lab, 1) as server, listener(lab, 2):
        assert can_dial(lab, host.number, "10.77.0.1", SOON)
        assert not can_dial(lab, host.number, "10.77.0.2")
        lab.heal()  # is no reason to change a firewall
        assert not can_dial(lab, host.number, "10.77.0.2")
        server.accept()[0].close()
        with dialled(lab, host.number, "10.77.0.1") as near:
            far, _ = server.accept()
            with far:
                lab.cut(host.number)
                assert not arrives(near, far, SILENCE)
                lab.heal(host.number)
                assert arrives(near, far)


@pytest.mark.skipif(bool(missing("hide")), reason=missing("hide") or "-")
@pytest.mark.parametrize("ipv6", [False, True])
def test_a_hidden_host_dials_out_but_a_dial_to_it_vanishes(lab, ipv6):
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    address = lab.hosts[3].ip6 if ipv6 else lab.hosts[3].ip4
    lab.hide(3, PORT)
    with listener(lab, 3, family):
        assert not can_dial(lab, 1, address)
        with connection(lab, 3, 1, ipv6=ipv6) as (near, far):
            assert arrives(near, far)
            assert arrives(far, near)


# --- programs ----------------------------------------------------------------------------------


def started(process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@contextlib.contextmanager
def ended_at_last(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """A test that fails while the process is frozen must not wait for its end for ever."""
    with process:
        try:
            yield
        finally:
            process.kill()


def test_programs_are_frozen_go_on_are_killed_and_start_again(lab):
    process = started(lab.start(1, SLEEPER, stdout=subprocess.PIPE))
    other = started(lab.start(2, SLEEPER, stdout=subprocess.PIPE))
    with ended_at_last(process), ended_at_last(other):
        assert lab.pids(1) == [process.pid]
        lab.freeze(1)
        wait_for(lambda: state_of(process.pid) == "T", SOON, "it is frozen")  # not at once
        assert state_of(other.pid) != "T"
        lab.thaw(1)
        wait_for(lambda: state_of(process.pid) != "T", SOON, "it goes on")
        (again,) = lab.restart(1)
        assert process.wait(SOON) == -signal.SIGKILL
        with ended_at_last(started(again)):
            assert lab.pids(1) == [again.pid]
            lab.freeze(1)
            lab.kill(1)  # also what is frozen
            assert again.wait(SOON) == -signal.SIGKILL
        assert lab.pids(1) == []
        lab.kill(2)


def test_a_host_may_have_its_own_names(lab):
    lab.name(1, {"hospital-two.test": lab.hosts[2].ip4})
    command = [
        sys.executable,
        "-c",
        "import socket; print(socket.gethostbyname('hospital-two.test'))",
    ]
    with lab.start(1, command, stdout=subprocess.PIPE) as process:
        assert process.communicate()[0].decode().strip() == lab.hosts[2].ip4


# --- the end -----------------------------------------------------------------------------------


def test_nothing_is_left_of_a_lab_that_fails_and_others_are_not_touched(lab):
    neighbour = started(lab.start(1, SLEEPER, stdout=subprocess.PIPE))
    with neighbour:
        second = Lab(2)
        with pytest.raises(ZeroDivisionError), second:  # noqa: PT012 - it fails within
            name = second.hosts[1].namespace
            second.name(1, {"x.test": "10.77.0.2"})
            second.cut(1)
            process = started(second.start(1, SLEEPER, stdout=subprocess.PIPE))
            second.freeze(1)
            1 / 0  # noqa: B018
        with process:
            assert process.wait(SOON) == -signal.SIGKILL
        assert not (NETNS / name).exists()
        assert not (Path("/etc/netns") / name).exists()
        assert neighbour.poll() is None
        lab.kill(1)


def test_a_lab_whose_process_was_killed_is_removed_by_the_next_one():
    program = (
        "from netlab import *; import os, signal\n"
        f"lab = Lab(1).__enter__(); process = lab.start(1, {SLEEPER!r})\n"
        "print(lab.hosts[1].namespace, process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": str(here)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as dead:
        assert dead.stdout is not None
        namespace, pid = re.findall(r"\S+", dead.stdout.readline().decode())
    assert (NETNS / namespace).exists()
    with Lab(1):
        assert not (NETNS / namespace).exists()
    with contextlib.suppress(FileNotFoundError):
        assert state_of(int(pid)) == "Z"  # dead; its new parent may take its time
