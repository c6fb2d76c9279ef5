"""Rude clients at real daemons while rounds run: no failed round, no dead daemon."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from rude_requests import RUDE, get

from p2pfed.admin.client import Client
from p2pfed.demo.federation import Federation, wait_for
from p2pfed.demo.plan import Cast, Hospital, run_constants
from p2pfed.errors import DaemonNotRunning, P2PFedError, TimedOut

pytestmark = pytest.mark.slow

ROUNDS = 2000  # more than are played
AT_ONCE = 1000


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    hospitals = [Hospital("Gate", 0)]
    for site, name in enumerate(("North", "South")):
        hospitals.append(Hospital(name, 200, {"site": site, "sites": 2}))
    cast = Cast("breast-cancer", None, tuple(hospitals), "", "", "")
    made = Federation(tmp_path_factory.mktemp("rude") / "nodes", cast, epsilon="10")
    constants = run_constants("svt", rounds=ROUNDS, epsilon=Fraction(10))
    constants |= {"deadline_s": 3.0, "min_round_interval_s": 0.3}
    with made.running():
        made.make_run("long", constants, seed=0)
        made.write_bootstrap()
        made.start_all()
        wait_for(lambda: round_of(made.daemons["North"]) >= 1, 90, "rounds begin")
        yield made


def round_of(daemon) -> int:
    status = daemon.status()
    return status["run"]["round"] if status is not None and status["run"] else -1


@contextlib.contextmanager
def rounds_go_on(net):
    """While the block runs rounds begin, and none fails; after it all daemons are well."""
    daemons = list(net.daemons.values())
    before = {d.name: round_of(d) for d in daemons}
    last = {d.name: list(d.client.stream("/v1/events"))[-1]["seq"] for d in daemons}
    yield
    for daemon in daemons:
        goal = before[daemon.name] + 2
        wait_for(lambda d=daemon, g=goal: round_of(d) >= g, 60, f"rounds go on at {daemon.name}")
        assert daemon.runs
        kinds = Counter(
            e["type"] for e in daemon.client.stream(f"/v1/events?since={last[daemon.name]}")
        )
        assert not kinds["training.failed"], kinds
        assert daemon.status()["trainer"]["restarts"] == 0


def connected(daemon) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(60)
    client.connect(str(daemon.client.path))
    return client


def test_every_kind_of_rude_request_and_every_kind_of_end(net):
    with rounds_go_on(net):
        for daemon in (net.daemons["Gate"], net.daemons["North"]):
            for request in RUDE.values():
                for ending in ("close", "eof", "stay"):
                    client = connected(daemon)
                    with contextlib.suppress(OSError):
                        client.sendall(request)
                        if ending == "eof":
                            client.shutdown(socket.SHUT_WR)
                    if ending != "stay":
                        client.close()
                    assert daemon.client.get("/v1/version")["api"] == 1
                    client.close()


def test_who_does_not_read_and_who_goes_in_the_middle(net):
    daemon = net.daemons["North"]
    with rounds_go_on(net), contextlib.ExitStack() as stack:
        for i in range(40):
            client = stack.enter_context(connected(daemon))
            follow = "/v1/events?follow=1" if i % 2 else "/v1/logs?level=debug&follow=1"
            client.sendall(get(follow))
            if i % 4 == 0:
                client.recv(50)
                client.close()
        assert daemon.client.get("/v1/version")["api"] == 1


def test_two_hundred_that_connect_and_say_nothing(net):
    daemon = net.daemons["North"]
    with rounds_go_on(net), contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(connected(daemon))
        files = list(Path(f"/proc/{daemon.process.pid}/fd").iterdir())
        assert len(files) < 128 + 100  # the others wait in the kernel's queue
        assert Client(daemon.client.path, timeout=30).get("/v1/version")["api"] == 1


def test_a_thousand_requests_at_once_are_answered_or_told_to_come_again(net):
    daemon, outcomes = net.daemons["North"], []
    client = Client(daemon.client.path, timeout=60)

    def one() -> None:
        try:
            outcomes.append(len(client.get("/v1/peers")))
        except P2PFedError as error:
            outcomes.append(error)

    with rounds_go_on(net):
        before = threading.stack_size(256 * 1024)
        threads = [threading.Thread(target=one) for _ in range(AT_ONCE)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        threading.stack_size(before)
        assert time.monotonic() - began < 120
    told = Counter("answered" if found == 2 else repr(found) for found in outcomes)
    refused = [found for found in outcomes if found != 2]
    assert all(isinstance(found, TimedOut) and "busy" in str(found) for found in refused), told
    assert told["answered"] > AT_ONCE / 2, told
    assert not any(isinstance(found, DaemonNotRunning) for found in outcomes)
