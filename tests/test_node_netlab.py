"""Real daemons in hosts of their own, and what happens when the network between them breaks.

The daemons do not train: this is about who sees whom. One lab of five for the tests of cuts and
crashes, in the order of the file; smaller ones for IPv6, names, NAT.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import time
from collections.abc import Callable, Iterable

import pytest
from fair_clock import FairClock
from hosted import Hosted, a_cast
from netlab import Lab, missing

from p2pfed.admin.client import Client
from p2pfed.demo.federation import Daemon
from p2pfed.errors import P2PFedError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]

NODES = 5
# Bounds in seconds of a machine that keeps up.
LAN_BOUND = 3.0  # until a peer that is frozen, killed or half open is seen, on a LAN
SEEN = 3 * LAN_BOUND  # with the asking, on a machine that does much else
HEALED = 10.0  # seconds until all are alive again
START = 60.0


class Net:
    """Daemons in a lab, and who is alive for whom."""

    def __init__(self, lab: Lab, federation: Hosted) -> None:
        self.lab = lab
        self.federation = federation
        self.all: dict[int, Daemon] = {federation.host(d): d for d in federation.daemons.values()}

    def start(self) -> None:
        roster = self.federation.stewards.admit([d.member for d in self.all.values()])
        for daemon in self.all.values():
            self.federation.begin(daemon)
        for daemon in self.all.values():
            self.wait(lambda d=daemon: d.status() is not None, START, f"{daemon.name} starts")
            daemon.client.post("/v1/join", {"roster": roster.decode()})
        self.wait(lambda: self.alive() == self.pairs(), START, "all see all")

    def pairs(self, among: Iterable[int] = ()) -> set[tuple[int, int]]:
        return set(itertools.permutations(among or self.all, 2))

    def alive(self, asked: Iterable[int] = ()) -> set[tuple[int, int]]:
        """(a, b): host a, one of those asked, says that host b is alive."""
        by_name = {daemon.name: i for i, daemon in self.all.items()}
        found = set()
        for i in asked or self.all:
            with contextlib.suppress(P2PFedError):
                peers = Client(self.all[i].client.path, timeout=2.0).get("/v1/peers")
                found |= {(i, by_name[p["name"]]) for p in peers if p["state"] == "alive"}
        return found

    def patience(self) -> set[int]:
        """By how much the hosts' own slowness lengthens their timeouts."""
        return {(daemon.status() or {}).get("patience", 0) for daemon in self.all.values()}

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> float:
        """Seconds until a condition held; hosts that find themselves slow are given more."""
        clock, slowness = FairClock(), 1
        while not condition():
            if clock.elapsed > seconds:
                slowness = max(slowness, *self.patience())
                assert clock.within(slowness * seconds), f"{what}: {sorted(self.alive())}"
            time.sleep(0.1)
        return clock.elapsed


def composed(tmp_path_factory, lab: Lab, nodes: int, **options) -> Hosted:
    """Nodes without data."""
    folder = tmp_path_factory.mktemp("hosts") / "nodes"
    federation = Hosted(folder, a_cast(nodes), epsilon="1", lab=lab, **options)
    for daemon in federation.daemons.values():
        file = daemon.folder / "p2pfed.toml"
        file.write_text(file.read_text().replace("enabled = true", "enabled = false"))
    return federation


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    with Lab(NODES) as lab:
        federation = composed(tmp_path_factory, lab, NODES)
        with federation.running():
            federation.write_bootstrap()
            made = Net(lab, federation)
            made.start()
            yield made


@pytest.fixture(autouse=True)
def _mended(request):
    """A test that fails leaves a network in which the next one can pass."""
    yield
    if "net" not in request.fixturenames:
        return
    net = request.getfixturevalue("net")
    net.lab.heal()
    for i, daemon in net.all.items():
        net.lab.thaw(i)
        if not daemon.runs:
            net.federation.begin(daemon)
    net.wait(lambda: net.alive() == net.pairs(), START, "all see all again")
    # Who stood still, or was doubted by several, gives its peers more time for a while.
    time.sleep(2)
    net.wait(lambda: net.patience() == {1}, START, "all keep up again")


def test_a_silent_partition_is_seen_on_both_sides_and_heals(net):
    west, east = [1, 2], [3, 4, 5]
    net.lab.partition(west, east)
    within = net.pairs(west) | net.pairs(east)
    seen = net.wait(lambda: net.alive() == within, SEEN, "both sides see the partition")
    time.sleep(2)  # and it stays so
    assert net.alive() == within
    net.lab.heal()
    healed = net.wait(lambda: net.alive() == net.pairs(), HEALED, "all see all again")
    print(f"partition: seen after {seen:.1f} s, healed after {healed:.1f} s")


def test_a_long_silent_partition_heals_as_fast(net):
    """The kernel's retransmissions and the dials back off meanwhile."""
    net.lab.partition([1, 2], [3, 4, 5])
    time.sleep(30)
    net.lab.heal()
    healed = net.wait(lambda: net.alive() == net.pairs(), HEALED, "all see all again")
    print(f"long partition: healed after {healed:.1f} s")


def test_a_one_way_cut_separates_two_and_no_one_else(net):
    net.lab.one_way(1, 4)  # over TCP nobody is heard who gets no acknowledgement
    rest = net.pairs() - {(1, 4), (4, 1)}
    seen = net.wait(lambda: (4, 1) not in net.alive(), SEEN, "4 does not hear 1")
    assert net.alive() >= rest
    net.lab.heal()
    healed = net.wait(lambda: net.alive() == net.pairs(), HEALED, "all see all again")
    print(f"one way: seen after {seen:.1f} s, healed after {healed:.1f} s")


def test_a_pulled_cable_is_seen_and_heals(net):
    net.lab.cut(5)
    rest = [1, 2, 3, 4]
    seen = net.wait(lambda: net.alive(rest) == net.pairs(rest), SEEN, "5 is gone")
    net.lab.heal(5)
    healed = net.wait(lambda: net.alive() == net.pairs(), HEALED, "all see all again")
    print(f"cable: seen after {seen:.1f} s, healed after {healed:.1f} s")


def test_a_frozen_daemon_is_seen_and_alive_again_when_it_goes_on(net):
    net.lab.freeze(2)
    rest = [1, 3, 4, 5]
    seen = net.wait(lambda: net.alive(rest) == net.pairs(rest), SEEN, "2 is frozen")
    time.sleep(5)
    net.lab.thaw(2)
    healed = net.wait(lambda: net.alive() == net.pairs(), HEALED, "2 goes on")
    print(f"frozen: seen after {seen:.1f} s, alive after {healed:.1f} s")


def test_a_killed_daemon_is_seen_and_alive_again_when_it_is_started(net):
    daemon = net.all[3]
    net.lab.kill(3)
    daemon.process.wait()
    rest = [1, 2, 4, 5]
    seen = net.wait(lambda: net.alive(rest) == net.pairs(rest), SEEN, "3 is killed")
    net.federation.begin(daemon)
    back = net.wait(lambda: net.alive() == net.pairs(), HEALED, "3 is started")
    print(f"killed: seen after {seen:.1f} s, alive after {back:.1f} s")


def test_one_who_vanishes_without_a_word_is_seen_and_its_restart_too(net):
    """Its host loses power: no FIN and no RST, and the new process has another connection."""
    daemon = net.all[4]
    net.lab.cut(4)
    net.lab.kill(4)
    daemon.process.wait()
    rest = [1, 2, 3, 5]
    seen = net.wait(lambda: net.alive(rest) == net.pairs(rest), SEEN, "4 vanished")
    net.lab.heal(4)
    net.federation.begin(daemon)
    back = net.wait(lambda: net.alive() == net.pairs(), HEALED, "4 is started")
    print(f"vanished: seen after {seen:.1f} s, alive after {back:.1f} s")


# --- addresses -----------------------------------------------------------------------------------


@contextlib.contextmanager
def a_net(tmp_path_factory, lab: Lab, *bootstrap: str, **options):
    federation = composed(tmp_path_factory, lab, len(lab.hosts), **options)
    with federation.running():
        federation.write_bootstrap(*bootstrap_of(federation, bootstrap))
        yield Net(lab, federation)


def bootstrap_of(federation: Hosted, addresses: tuple[str, ...]) -> list[str]:
    return [f"{address}/tcp/{federation.first.port}" for address in addresses]


def test_a_network_that_has_only_ipv6_works(tmp_path_factory):
    with (
        Lab(3, ipv4=False) as lab,
        a_net(tmp_path_factory, lab, address=lambda i: f"/ip6/{lab.hosts[i].ip6}") as net,
    ):
        net.start()
        listed = net.all[1].client.get("/v1/peers")
        assert all(address.startswith("/ip6/fd77::") for p in listed for address in p["addresses"])


@pytest.mark.parametrize("kind", ["dns4", "dns6", "dns"])
def test_a_name_in_the_bootstrap_list_works(tmp_path_factory, kind):
    with Lab(3) as lab:
        first = lab.hosts[1]
        for i in lab.hosts:
            lab.name(i, {"first.test": first.ip6 if kind == "dns6" else first.ip4})
        families = {"address": lambda i: f"/ip6/{lab.hosts[i].ip6}"} if kind == "dns6" else {}
        with a_net(tmp_path_factory, lab, f"/{kind}/first.test", **families) as net:
            net.start()


@pytest.mark.skipif(bool(missing("nat")), reason=missing("nat") or "-")
def test_a_hospital_behind_a_nat_sees_all_that_can_be_dialled(tmp_path_factory):
    with Lab(2) as lab:
        lab.up_behind_nat()
        with a_net(tmp_path_factory, lab) as net:
            net.start()


@pytest.mark.skipif(bool(missing("hide")), reason=missing("hide") or "-")
def test_a_hospital_whose_firewall_lets_nobody_in_sees_all(tmp_path_factory):
    with Lab(3) as lab, a_net(tmp_path_factory, lab) as net:
        lab.hide(3, net.all[3].port)
        net.start()
        net.federation.strike(net.all[3], "network", signal.SIGKILL)
        net.federation.begin(net.all[3])
        net.wait(lambda: net.alive() == net.pairs(), HEALED, "it dials the others again")
