"""Hosts in network namespaces on one bridge, and everything that may happen to their cables.

Map: `Lab` makes hosts 1, 2, ... (`up`, `up_behind_nat`), breaks and heals the network between them
(`cut`, `partition`, `one_way`, `rate`, `hide`, `allow_only`, `heal`), and starts, freezes and kills
programs in them. `missing` says why it cannot work here; tests skip with that. Host i has the
addresses 10.77.0.i/24 and fd77::i/64, i in hexadecimal.

How it breaks: a cut cable takes the bridge's port down, so the host loses its carrier. A silent
drop from a to b is a permanent neighbour entry at a: what a sends to b goes to a link-layer address
that nobody has. The carrier stays up and nobody is told, neither by ICMP nor by RST. This needs
iproute2 and nothing else; only the host behind a NAT needs nft.

Invariants: at the end, and after a failure, all namespaces and all that runs in them are gone; no
process outside of them is touched. A lab whose process was killed is removed by the next one. The
namespaces of two labs share nothing (`namespaces`), so the addresses may be the same.

Source: ip-neighbour(8), ip-rule(8), tc-tbf(8). Not here: loss and latency (this needs
netem, which a kernel may lack; see `tcp_proxy`) and the daemons in the hosts (`hosted`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from namespaces import ETC, execute, ip, kill_all, own_name, pids, remove, sweep, within

__all__ = ["Host", "Lab", "missing"]

NOBODY = "02:00:00:00:00:00"  # no host has this link-layer address


@dataclass(slots=True)
class Host:
    """One host of a lab.

    Attributes:
        number: From 1 on; the last part of its addresses.
        namespace: Where its programs run.
        wire: The namespace whose eth0 is on the bridge: the host's own, or its gateway's.
        ip4: Its address on the bridge; behind a NAT, what the others see.
        ip6: The same for IPv6; empty behind a NAT.
        inner: Its own IPv4 address: `ip4`, or a private one behind a NAT.
        programs: What was started with `Lab.start`: arguments and options.
    """

    number: int
    namespace: str
    wire: str
    ip4: str
    ip6: str
    inner: str
    programs: list[tuple[list[str], dict[str, Any]]] = field(default_factory=list)

    @property
    def mac(self) -> str:
        """Link-layer address on the bridge."""
        return f"02:77:00:00:{self.number >> 8:02x}:{self.number & 255:02x}"

    @property
    def addresses(self) -> list[str]:
        """All its addresses on the bridge."""
        return [address for address in (self.ip4, self.ip6) if address]


class Lab:
    """See the module docstring; use it in a `with` block.

    Args:
        hosts: How many to begin with.
        ipv4: Whether hosts have IPv4 addresses, besides 127.0.0.1.

    Raises:
        OSError: A command failed; what it said is in the message.
    """

    def __init__(self, hosts: int = 0, *, ipv4: bool = True) -> None:
        self.hosts: dict[int, Host] = {}
        self._first, self._ipv4 = hosts, ipv4
        self._name = own_name()
        self._hub = f"{self._name}-hub"
        self._namespaces: list[str] = []
        self._broken: set[tuple[int, int]] = set()  # nothing passes from the one to the other
        self._forbidden: set[tuple[int, int]] = set()  # the same by a firewall: stays after heal()
        self._pinned: dict[tuple[int, int], str] = {}
        self._unplugged: set[int] = set()

    def __enter__(self) -> Self:
        """Remove what dead labs have left, and make the first hosts."""
        sweep()
        try:
            self._add(self._hub)
            ip(["link set lo up", "link add lan type bridge forward_delay 0"], self._hub)
            ip(["link set lan up"], self._hub)
            self.up(self._first)
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Remove everything."""
        self.down()

    def _add(self, namespace: str) -> None:
        self._namespaces.append(namespace)
        ip([f"netns add {namespace}"])
        ip(["link set lo up"], namespace)

    def down(self) -> None:
        """Kill what runs in the hosts and remove them; may be called twice."""
        while self._namespaces:
            remove(self._namespaces.pop())

    # --- hosts -----------------------------------------------------------------------------------

    def up(self, count: int) -> list[Host]:
        """Make so many more hosts."""
        return [self._plain(len(self.hosts) + 1) for _ in range(count)]

    def _plain(self, i: int) -> Host:
        namespace = f"{self._name}-{i}"
        ip4 = f"10.77.0.{i}" if self._ipv4 else ""
        host = Host(i, namespace, namespace, ip4, f"fd77::{i:x}", ip4)
        self._add(namespace)
        self._connect(host)
        return host

    def _connect(self, host: Host) -> None:
        """Lay the cable from the bridge to the host, or to its gateway."""
        port = f"port{host.number}"
        ip(
            [
                f"link add {port} type veth peer name eth0 address {host.mac} netns {host.wire}",
                f"link set {port} master lan up",
            ],
            self._hub,
        )
        lengths = {host.ip4: "24", host.ip6: "64 nodad"}
        lines = [f"address add {a}/{lengths[a]} dev eth0" for a in host.addresses]
        ip([*lines, "link set eth0 up"], host.wire)
        self.hosts[host.number] = host
        self._pin()

    def up_behind_nat(self, *, reaches: Collection[int] | None = None) -> Host:
        """Make a host that can only dial out: a private subnet behind a masquerading gateway.

        The gateway has the host's number on the bridge. It answers dials with a RST, as nothing
        listens there; the host behind it has no IPv6.

        Args:
            reaches: The only hosts that its firewall lets it dial; the rest is dropped silently.
        """
        i = len(self.hosts) + 1
        namespace, gateway = f"{self._name}-{i}", f"{self._name}-gw{i}"
        host = Host(i, namespace, gateway, f"10.77.0.{i}", "", f"192.168.{i}.2")
        self._add(namespace)
        self._add(gateway)
        self._connect(host)
        ip([f"link add inner type veth peer name eth0 netns {namespace}"], gateway)
        ip([f"address add 192.168.{i}.1/24 dev inner", "link set inner up"], gateway)
        ip([f"address add {host.inner}/24 dev eth0", "link set eth0 up"], namespace)
        ip([f"route add default via 192.168.{i}.1"], namespace)
        _masquerade(gateway)
        if reaches is not None:
            self.allow_only(i, reaches)
        return host

    def name(self, i: int, names: dict[str, str]) -> None:
        """Give host i a hosts file; programs that are started later read it as /etc/hosts.

        Args:
            i: The host.
            names: Address by name.
        """
        folder = ETC / self.hosts[i].namespace
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", "::1 localhost"]
        lines += [f"{address} {name}" for name, address in names.items()]
        (folder / "hosts").write_text("\n".join(lines) + "\n")

    @contextmanager
    def inside(self, i: int) -> Iterator[Host]:
        """Be in host i, this thread alone: sockets that are made in the block belong to it."""
        with within(self.hosts[i].namespace):
            yield self.hosts[i]

    # --- the network -----------------------------------------------------------------------------

    def cut(self, i: int) -> None:
        """Pull host i's cable: its carrier is gone."""
        self._unplugged.add(i)
        ip([f"link set port{i} down"], self._hub)

    def heal(self, i: int | None = None) -> None:
        """Plug host i's cable in; without i: every cable, and nothing is dropped any more.

        Firewalls (`hide`, `allow_only`) and rates stay.
        """
        plugged = self._unplugged if i is None else self._unplugged & {i}
        ip([f"link set port{number} up" for number in sorted(plugged)], self._hub)
        self._unplugged -= plugged
        if i is None:
            self._broken.clear()
            self._pin()

    def partition(self, *groups: Collection[int]) -> None:
        """Drop everything between hosts of different groups, silently; carriers stay up."""
        for one, other in itertools.permutations(groups, 2):
            self._broken |= set(itertools.product(one, other))
        self._pin()

    def one_way(self, a: int, b: int) -> None:
        """Drop silently what a sends to b; what b sends to a arrives."""
        self._broken.add((a, b))
        self._pin()

    def allow_only(self, i: int, to: Collection[int]) -> None:
        """A firewall at host i: nothing of it reaches any other host than these."""
        self._forbidden |= {(i, other) for other in self.hosts if other != i and other not in to}
        self._pin()

    def _pin(self) -> None:
        """Write the neighbour entries that the dropped pairs need.

        The way back of a dropped one gets a right entry: IPv6 would ask for it and miss the answer.
        """
        dropped = self._broken | self._forbidden
        wanted = {(b, a): self.hosts[a].mac for a, b in dropped}
        wanted |= dict.fromkeys(dropped, NOBODY)
        for a, host in self.hosts.items():
            lines = []
            for b, other in self.hosts.items():
                before, after = self._pinned.get((a, b)), wanted.get((a, b))
                if before == after:
                    continue
                entry = [(address, "dev eth0") for address in other.addresses]
                if after is None:
                    lines += [f"neigh del {address} {device}" for address, device in entry]
                else:
                    lines += [
                        f"neigh replace {address} lladdr {after} {device} nud permanent"
                        for address, device in entry
                    ]
            ip(lines, host.wire)
        self._pinned = wanted

    def hide(self, i: int, port: int) -> None:
        """A firewall at host i: dials to this TCP port vanish; the host can only dial out.

        Without a NAT and without nft: a rule looks at incoming packets before the table of local
        addresses does.
        """
        host = self.hosts[i]
        for family in ("-4", "-6"):
            command = f"ip {family} -n {host.wire} rule"
            held = subprocess.run(command.split(), capture_output=True, text=True, check=True)
            lines = [f"add pref 5 iif eth0 ipproto tcp dport {port} blackhole"]
            if re.search(r"^0:", held.stdout, re.MULTILINE):
                lines += ["add pref 10 lookup local", "del pref 0"]
            for line in lines:
                subprocess.run([*command.split(), *line.split()], check=True, capture_output=True)

    def rate(self, i: int, rate: str | None) -> None:
        """Limit what host i sends and receives, as in "10mbit"; None: no limit any more."""
        host = self.hosts[i]
        for namespace, device in ((host.wire, "eth0"), (self._hub, f"port{i}")):
            change = ["del"] if rate is None else ["replace"]
            limit = [] if rate is None else f"tbf rate {rate} burst 32k latency 100ms".split()
            execute(namespace, "tc", "qdisc", *change, "dev", device, "root", *limit)

    # --- programs --------------------------------------------------------------------------------

    def start(self, i: int, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a program in host i; `options` are those of `subprocess.Popen`.

        The process is the program itself: `ip netns exec` becomes it.
        """
        self.hosts[i].programs.append((list(command), options))
        return self._started(i, command, options)

    def _started(
        self, i: int, command: Sequence[str], options: dict[str, Any]
    ) -> subprocess.Popen[bytes]:
        prefix = ["ip", "netns", "exec", self.hosts[i].namespace]
        return subprocess.Popen([*prefix, *command], **options)

    def pids(self, i: int) -> list[int]:
        """Processes that run in host i."""
        return pids(self.hosts[i].namespace)

    def signal(self, i: int, number: signal.Signals) -> None:
        """Send a signal to all that runs in host i."""
        for pid in self.pids(i):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def freeze(self, i: int) -> None:
        """Stop all that runs in host i; its kernel goes on to acknowledge what arrives."""
        self.signal(i, signal.SIGSTOP)

    def thaw(self, i: int) -> None:
        """Let all that was frozen in host i go on."""
        self.signal(i, signal.SIGCONT)

    def kill(self, i: int) -> None:
        """Kill all that runs in host i, at once; returns when it is gone."""
        kill_all(self.hosts[i].namespace)

    def restart(self, i: int) -> list[subprocess.Popen[bytes]]:
        """Kill all that runs in host i and start its programs anew, in the order of `start`."""
        self.kill(i)
        return [self._started(i, *program) for program in self.hosts[i].programs]


def _masquerade(namespace: str) -> None:
    execute(namespace, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
    execute(namespace, "nft", "add table ip nat")
    execute(namespace, "nft", "add chain ip nat out { type nat hook postrouting priority 100; }")
    execute(namespace, "nft", "add rule ip nat out oifname eth0 masquerade")


# --- what is missing -----------------------------------------------------------------------------


@functools.cache
def missing(feature: str = "") -> str:
    """Why the lab cannot work on this machine, found by trying; empty if it can.

    Args:
        feature: Also "nat" (`up_behind_nat`), "rate" or "hide".
    """
    if os.geteuid() != 0:
        return "network namespaces need root"
    tools = ["ip", *{"nat": ["nft"], "rate": ["tc"]}.get(feature, [])]
    if absent := [tool for tool in tools if shutil.which(tool) is None]:
        return f"there is no {absent[0]!r} on this machine"
    if feature and (why := missing()):
        return why
    try:
        with Lab(1) as lab:
            if feature == "nat":
                lab.up_behind_nat()
            if feature == "rate":
                lab.rate(1, "1mbit")
            if feature == "hide":
                lab.hide(1, 1)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no {feature or 'network namespaces'} on this machine: {error}"
    return ""
