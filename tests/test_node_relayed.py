"""Five real daemons that train, two of which nobody can dial: a run through relays, and their end.

Hosts 1 and 2 are relays, host 3 can be dialled. Host 4's firewall lets nobody in. Host 5 is behind
a NAT whose firewall lets it dial the relays only, on a slow line: 3 and 4 reach it through a relay
or not at all. One network for all tests of this file, each of which finds it whole, in any order.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from fair_clock import FairClock
from hosted import Hosted, a_cast
from netlab import Lab, missing
from wide_task import PARAMETERS

from p2pfed.admin.client import Client
from p2pfed.demo.federation import Daemon
from p2pfed.demo.plan import Cast, Hospital, run_constants
from p2pfed.errors import P2PFedError

WHY_NOT = missing() or missing("nat") or missing("rate") or missing("hide")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-"),
]

HERE = Path(__file__).resolve().parent
RELAYS = (1, 2)
FAR = (3, 4)  # whom 5 reaches through a relay
LINE = "8mbit"  # of host 5, each way
DELTA = 2 * PARAMETERS  # bytes; 0.5 s of that line
MEGABYTE = 1_000_000
INTERVAL = 9.0  # seconds between two rounds; in each, 5 receives four deltas and sends its own

START = 120.0  # bounds, in seconds of a machine that keeps up
SEEN = 20.0
THROUGH_ANOTHER = 10.0  # from a relay's death until its circuits are replaced
SILENT = 50.0  # until silence is noticed: 15 s, longer at a node which finds itself slow
RELAY_IS_BACK = 40.0  # a daemon starts
DIRECT = 35.0  # until a direct connection replaces a circuit
ROUND = 45.0


class Slit(Lab):
    """A lab in which a firewall can be opened by one host, and closed again."""

    def allow(self, i: int, other: int) -> None:
        """Host i may dial this one, too."""
        self._forbidden.discard((i, other))
        self._pin()


class WithRelays(Hosted):
    """All listen on all interfaces, as the template says; some are relays."""

    def _prepare(self, hospital: Hospital, epsilon: str) -> Daemon:
        daemon = super()._prepare(hospital, epsilon)
        file = daemon.folder / "p2pfed.toml"
        text = file.read_text("utf-8")
        at = self.listens(daemon)
        assert f'listen = ["{at}"]' in text
        text = text.replace(f'listen = ["{at}"]', f'listen = ["/ip4/0.0.0.0/tcp/{daemon.port}"]')
        if self.host(daemon) in RELAYS:
            text = text.replace("[network]\n", "[network]\nrelay = true\n")
        file.write_text(text, "utf-8")
        return daemon


class Net:
    """The federation, and what its daemons say of each other."""

    def __init__(self, lab: Slit, federation: Hosted) -> None:
        self.lab = lab
        self.federation = federation
        self.all: dict[int, Daemon] = {federation.host(d): d for d in federation.daemons.values()}
        self.numbers = {daemon.name: i for i, daemon in self.all.items()}
        self.origins = {daemon.key.peer_id: i for i, daemon in self.all.items()}

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> float:
        """Seconds until a condition held."""
        clock = FairClock()
        while not condition():
            assert clock.within(seconds), f"{seconds:.0f} s: {what}\n{self.account()}"
            time.sleep(0.1)
        return clock.elapsed

    def account(self) -> str:
        """What there is to say if something did not happen."""
        lines = []
        for i in self.all:
            run = (self.status(i) or {}).get("run") or {}
            at = f"round {run.get('round')} {run.get('phase')} model {run.get('model_round')}"
            seen = {j: f"{p['state']} {p['path']}" for j, p in self.peers(i).items()}
            lines.append(f"{i}: {at} {run.get('model_hash', '')[:8]} {seen}")
        return "\n".join(lines)

    # --- what they say ---------------------------------------------------------------------------

    def _get(self, i: int, path: str) -> Any:
        with contextlib.suppress(P2PFedError):
            return Client(self.all[i].client.path, timeout=2.0).get(path)
        return None

    def status(self, i: int) -> dict[str, Any] | None:
        return self._get(i, "/v1/status")

    def peers(self, i: int) -> dict[int, dict[str, Any]]:
        """What host i says of the others; nothing if it does not answer."""
        return {self.numbers[p["name"]]: p for p in self._get(i, "/v1/peers") or []}

    def alive(self) -> set[tuple[int, int]]:
        """(a, b): host a says that host b is alive."""
        return {(i, j) for i in self.all for j, p in self.peers(i).items() if p["state"] == "alive"}

    def pairs(self, among: Iterable[int] = ()) -> set[tuple[int, int]]:
        return set(itertools.permutations(among or self.all, 2))

    def via(self, peer: dict[str, Any]) -> int | None:
        """The relay in between; None if there is none."""
        path = peer["path"] or ""
        return self.numbers[path.removeprefix("relay ")] if path.startswith("relay ") else None

    def paths(self) -> list[int | None]:
        """The relays between 5 and those that it cannot dial, as both ends say."""
        ends = [(5, j) for j in FAR] + [(j, 5) for j in FAR]
        told = {i: self.peers(i) for i in (5, *FAR)}
        return [self.via(told[i][j]) if j in told[i] else None for i, j in ends]

    def hear_each_other(self, since: float) -> bool:
        """5 and those that it cannot dial: alive, and heard since a moment."""
        seconds = time.monotonic() - since
        told = {i: self.peers(i) for i in (5, *FAR)}
        seen = [told[i].get(j, {}) for i, j in [(5, j) for j in FAR] + [(j, 5) for j in FAR]]
        return all(p and p["state"] == "alive" and p["seen_s"] < seconds - 0.1 for p in seen)

    def circuits(self, i: int) -> set[int]:
        """The relays through which host i says that it is reached."""
        status = self.status(i)
        addresses = status["addresses"] if status is not None else []
        found = [re.search(r"/p2p/(\w+)/p2p-circuit", address) for address in addresses]
        return {self.origins[match[1]] for match in found if match}

    def relayed(self, i: int) -> int:
        """Bytes that passed through a relay."""
        status = self.status(i)
        return status["relay"]["relayed_bytes"] if status is not None else 0

    def round(self, i: int) -> int:
        status = self.status(i)
        return status["run"]["round"] if status is not None and status["run"] else -1

    # --- what they hold --------------------------------------------------------------------------

    def facts(self, i: int) -> dict[tuple[int, int], bytes]:
        """By round and origin the deltas that host i has stored."""
        path = f"file:{self.all[i].folder / 'store.db'}?mode=ro"
        with contextlib.closing(sqlite3.connect(path, uri=True)) as db:
            rows = db.execute("SELECT fact, round, origin FROM deltas").fetchall()
        return {(round_, self.origins[origin]): fact for fact, round_, origin in rows}

    def models(self, among: Iterable[int]) -> set[tuple[int, str]]:
        """Round and hash of the models at these hosts."""
        runs = [(self.status(i) or {}).get("run") or {} for i in among]
        return {(run.get("model_round", -1), run.get("model_hash", "")) for run in runs}

    def wait_for_rounds(self, count: int, among: Iterable[int] = ()) -> float:
        """Seconds until all have folded so many more rounds, of which all hold 5's deltas.

        Afterwards all had one model at the same time, at least once.
        """
        among = tuple(among or self.all)
        first = max(map(self.round, among)) + 1
        wanted = {(round_, 5) for round_ in range(first, first + count)}

        def done() -> bool:
            models = self.models(among)
            return len(models) == 1 and min(models)[0] >= first + count - 1

        took = self.wait(
            lambda: all(wanted <= self.facts(i).keys() for i in among),
            count * ROUND,
            f"deltas of 5 in rounds {first} to {first + count - 1}",
        )
        return took + self.wait(done, 2 * ROUND, "one model everywhere")

    # --- what is done to them --------------------------------------------------------------------

    def start(self) -> float:
        self.federation.enrol_all()
        return self.make_whole()

    def kill(self, *hosts: int) -> None:
        for i in hosts:
            self.federation.strike(self.all[i], "both", signal.SIGKILL)

    def make_whole(self) -> float:
        """Start who is dead, and wait until all is as it was at first."""
        for daemon in self.all.values():
            if not daemon.runs:
                self.federation.begin(daemon)
        took = self.wait(lambda: self.alive() == self.pairs(), START, "all see all")
        took += self.wait(lambda: None not in self.paths(), DIRECT, "5 is reached through relays")
        took += self.wait(lambda: self.circuits(5) == set(RELAYS), SEEN, "two reservations of 5")
        return took + self.wait(lambda: min(map(self.round, self.all)) > 0, START, "the run")

    def busy_relay(self) -> int:
        """Wait until a delta is half through a relay; returns which one."""
        deadline = time.monotonic() + 2 * ROUND
        before = {relay: self.relayed(relay) for relay in RELAYS}
        last, grown = dict(before), dict.fromkeys(RELAYS, 0)
        while time.monotonic() < deadline:
            time.sleep(0.05)
            for relay in RELAYS:
                now = self.relayed(relay)
                step, last[relay] = now - last[relay], now
                # Beats are some hundred bytes; the line carries 40 kB in this time.
                grown[relay] = grown[relay] + step if step > 10_000 else 0
                if grown[relay] > DELTA / 4:
                    return relay
        raise AssertionError(f"nothing passes through the relays\n{self.account()}")


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """Let the daemons' trainers import the task of these tests."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{HERE.parent}{os.pathsep}{HERE}"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@contextlib.contextmanager
def a_net(folder: Path) -> Iterator[Net]:
    with importable(), Slit(4) as lab:
        lab.up_behind_nat(reaches=RELAYS)
        lab.rate(5, LINE)
        cast = Cast("wide_task:WideBreastCancer", None, a_cast(5).hospitals, "", "", "")
        federation = WithRelays(folder / "nodes", cast, epsilon="0", lab=lab)
        constants = run_constants("none", rounds=1000, epsilon=Fraction(0))
        constants |= {"min_round_interval_s": INTERVAL, "deadline_s": 15.0}
        with federation.running():
            federation.make_run("relayed", constants, seed=0)
            federation.write_bootstrap()
            net = Net(lab, federation)
            lab.hide(4, net.all[4].port)
            print(f"start: all is well after {net.start():.1f} s")
            yield net


@pytest.fixture(scope="module")
def kept_net(tmp_path_factory):
    with a_net(tmp_path_factory.mktemp("relayed")) as net:
        yield net


@pytest.fixture
def net(kept_net):
    kept_net.make_whole()
    return kept_net


def test_a_hospital_that_nobody_can_dial_trains_through_relays(net):
    for i, daemon in net.all.items():
        command = [sys.executable, "-m", "p2pfed", "--socket", str(daemon.client.path)]
        told = subprocess.run(
            [*command, "peers", "--json"], capture_output=True, check=True, timeout=60
        ).stdout
        for peer in json.loads(told)["data"]:
            j = net.numbers[peer["name"]]
            is_relayed = {i, j} in ({5, 3}, {5, 4})
            assert (net.via(peer) in RELAYS) if is_relayed else (peer["path"] == "direct")
            assert peer["state"] == "alive"
            assert peer["path_rtt_ms"] > 0
            assert min(peer["sent_bytes"], peer["received_bytes"]) > 0
    before = sum(map(net.relayed, RELAYS))
    took = net.wait_for_rounds(2)
    passed = sum(map(net.relayed, RELAYS)) - before
    assert passed > DELTA
    newest = max(round_ for round_, origin in net.facts(5) if origin == 5)
    held = [net.facts(i) for i in net.all]
    whole = [r for r in range(1, newest + 1) if all((r, o) in h for h in held for o in net.all)]
    assert whole, "all five have a delta in a round that all five hold"
    print(f"two rounds in {took:.1f} s, {passed / MEGABYTE:.1f} MB through the relays")


def test_when_a_relay_dies_amid_a_transfer_the_run_goes_on_through_another_one(net):
    relay = net.busy_relay()
    (other,) = set(RELAYS) - {relay}
    net.kill(relay)
    killed = time.monotonic()
    held = set().union(*(net.facts(i).items() for i in (5, *FAR)))
    lacking = sum(len(held - set(net.facts(i).items())) for i in (5, *FAR))
    net.wait(
        lambda: set(net.paths()) == {other} and net.hear_each_other(killed),
        THROUGH_ANOTHER,
        "5 is alive through the other relay",
    )
    seen = time.monotonic() - killed
    rounds = net.wait_for_rounds(3, sorted(set(net.all) - {relay}))
    for i in (5, *FAR):
        assert held <= set(net.facts(i).items()), "what was on its way arrived after all"
    print(f"{lacking} deltas on their way; alive through another relay after {seen:.1f} s,")
    print(f"three more rounds in {rounds:.1f} s")


def test_a_relay_that_comes_back_is_asked_for_a_place_again(net):
    net.kill(1)
    net.wait(lambda: net.circuits(5) == {2}, SEEN, "5 knows that a way is gone")
    net.wait(lambda: set(net.paths()) == {2}, THROUGH_ANOTHER, "one way is left")
    net.federation.begin(net.all[1])
    began = time.monotonic()
    net.wait(lambda: net.status(1) is not None, START, "the relay starts")
    started = time.monotonic() - began
    net.wait(lambda: net.circuits(5) == set(RELAYS), RELAY_IS_BACK, "two reservations of 5")
    held = time.monotonic() - began
    net.wait(lambda: net.alive() == net.pairs(), RELAY_IS_BACK, "all see all")
    assert set(net.paths()) == {2}, "nobody was torn from the way that worked"
    print(f"relay: up after {started:.1f} s, asked after {held:.1f} s")
    print(f"a round of all in {net.wait_for_rounds(1):.1f} s")


def test_a_direct_connection_takes_the_place_of_a_circuit_while_there_is_one(net):
    net.lab.allow(5, 3)
    try:
        opened = net.wait(
            lambda: "direct" == net.peers(5)[3]["path"] == net.peers(3)[5]["path"],
            DIRECT,
            "5 has dialled 3",
        )
        assert net.alive() == net.pairs()
    finally:
        net.lab.allow_only(5, RELAYS)
    closed = time.monotonic()
    net.wait(lambda: None not in net.paths(), SILENT, "a circuit again")
    gone = time.monotonic() - closed
    net.wait(lambda: net.hear_each_other(closed), SEEN, "all are heard again")
    print(f"direct {opened:.1f} s after the firewall opened, a circuit {gone:.1f} s after its end")


def test_a_relay_whose_host_loses_power_is_replaced_too(net):
    """Nobody is told: its silence has to be noticed."""
    relay = next(via for via in net.paths() if via is not None)
    (other,) = set(RELAYS) - {relay}
    net.lab.cut(relay)
    net.kill(relay)
    began = time.monotonic()
    try:
        net.wait(
            lambda: set(net.paths()) == {other} and net.hear_each_other(began),
            SILENT,
            "5 is alive through the other relay",
        )
        gone = time.monotonic() - began
        net.wait(lambda: net.circuits(5) == {other}, SILENT, "5 knows that a way is gone")
    finally:
        net.lab.heal(relay)
    print(f"silent relay: alive through the other one after {gone:.1f} s")


def test_without_any_relay_a_hospital_is_alone_and_says_so_until_one_returns(net):
    net.kill(*RELAYS)
    began = time.monotonic()
    net.wait(lambda: net.status(5)["peers"]["alive"] == 0, SILENT, "5 hears nobody")
    alone = time.monotonic() - began
    net.wait(lambda: net.status(5)["run"]["phase"] == "waiting for peers", SILENT, "5 waits")
    waits = time.monotonic() - began
    warnings = net.status(5)["health"]
    assert any(line.startswith("waiting for peers: ") for line in warnings), warnings
    assert not net.circuits(5)
    assert all(peer["path"] is None for peer in net.peers(5).values())
    net.federation.begin(net.all[2])
    began = time.monotonic()
    net.wait(lambda: net.status(2) is not None, START, "the relay starts")
    started = time.monotonic() - began
    net.wait(
        lambda: set(net.paths()) == {2} and net.hear_each_other(began),
        RELAY_IS_BACK,
        "5 is alive through the one relay",
    )
    back = time.monotonic() - began - started
    rest = sorted(set(net.all) - {1})
    print(f"alone after {alone:.1f} s, waits after {waits:.1f} s; alive {back:.1f} s after a relay")
    print(f"was up; a round in {net.wait_for_rounds(1, rest):.1f} s")
