"""Real daemons in the hosts of a network lab, or on loopback, which may be struck in part.

`Hosted` is the demo's `Federation` with three differences: a daemon may live in a host of a `Lab`
and listen on that host's address; its network process and its trainer can be struck apart; and a
start does not wait. Hospital k of the cast lives in host k, from 1 on.

Invariant: as for `Federation`, `running` leaves no process behind, frozen ones included.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from netlab import Lab

from p2pfed.demo.federation import START_DEADLINE, Daemon, Federation, wait_for
from p2pfed.demo.plan import Cast, Hospital

__all__ = ["Hosted", "Part", "a_cast"]

Part = Literal["network", "trainer", "both"]


def a_cast(count: int) -> Cast:
    """So many hospitals of unequal size on the data that scikit-learn carries."""
    names = ("Ash", "Beech", "Cedar", "Dogwood", "Elm", "Fir", "Gorse", "Hazel", "Ivy", "Juniper")
    if not 1 <= count <= len(names):
        raise ValueError(f"{count} hospitals: from 1 to {len(names)}")
    hospitals = [
        Hospital(name, 120 - 10 * site, {"site": site, "sites": count})
        for site, name in enumerate(names[:count])
    ]
    return Cast("breast-cancer", None, tuple(hospitals), "", "", "")


class Hosted(Federation):
    """See the module docstring.

    Args:
        folder: Where everything lies; must not exist.
        cast: Who takes part.
        epsilon: Lifetime budget of every hospital, as text.
        lab: Gives a host to each hospital; None: all on loopback.
        address: Multiaddr beginning of a host, without its port, e.g. `/ip6/fd77::1`.
    """

    def __init__(
        self,
        folder: Path,
        cast: Cast,
        *,
        epsilon: str,
        lab: Lab | None = None,
        address: Callable[[int], str] | None = None,
    ) -> None:
        self._lab = lab
        self._address = address or self._usual_address
        self._hosts = {hospital.name: i for i, hospital in enumerate(cast.hospitals, 1)}
        super().__init__(folder, cast, epsilon=epsilon)

    def _usual_address(self, host: int) -> str:
        return "/ip4/127.0.0.1" if self._lab is None else f"/ip4/{self._lab.hosts[host].inner}"

    def _prepare(self, hospital: Hospital, epsilon: str) -> Daemon:
        daemon = super()._prepare(hospital, epsilon)
        file = daemon.folder / "p2pfed.toml"
        before, text = f"/ip4/127.0.0.1/tcp/{daemon.port}", file.read_text("utf-8")
        assert before in text
        file.write_text(text.replace(before, self.listens(daemon)), "utf-8")
        return daemon

    def host(self, daemon: Daemon) -> int:
        """The number of a daemon's host."""
        return self._hosts[daemon.name]

    def listens(self, daemon: Daemon) -> str:
        """Where it can be dialled, without its identity."""
        return f"{self._address(self.host(daemon))}/tcp/{daemon.port}"

    def write_bootstrap(self, *addresses: str) -> None:
        """One bootstrap list for all, naming the first node at its own or at these addresses."""
        at = [f"{a}/p2p/{self.first.key.peer_id}" for a in addresses or (self.listens(self.first),)]
        text = (
            "version = 1\n"
            'network = "lab"\n'
            f'network_id = "{self.stewards.roster.network_id.hex()}"\n'
            "[[peer]]\n"
            f"name = {json.dumps(self.first.name)}\n"
            f"addrs = {json.dumps(at)}\n"
        )
        for daemon in self.daemons.values():
            (daemon.folder / "bootstrap.toml").write_text(text, "utf-8")

    # --- processes -----------------------------------------------------------------------------

    def begin(self, daemon: Daemon) -> None:
        """Start a daemon and do not wait for it."""
        command = [sys.executable, "-m", "p2pfed", "node", "-c", str(daemon.folder / "p2pfed.toml")]
        with (daemon.folder / "daemon.log").open("ab") as log:
            options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            options["start_new_session"] = True
            daemon.process = (
                subprocess.Popen(command, **options)
                if self._lab is None
                else self._lab.start(self.host(daemon), command, **options)
            )

    def enrol_all(self) -> None:
        """Start all, and give them the roster and the run."""
        roster = self.stewards.admit([d.member for d in self.daemons.values()])
        for daemon in self.daemons.values():
            self.begin(daemon)
        for daemon in self.daemons.values():
            wait_for(
                lambda d=daemon: d.status() is not None, START_DEADLINE, f"{daemon.name} starts"
            )
            self.enrol(daemon, roster)

    def stop(self, daemon: Daemon) -> None:
        """Stop a daemon gracefully, also a frozen one."""
        self.thaw(daemon)
        super().stop(daemon)

    def thaw(self, daemon: Daemon) -> None:
        """Let whatever of a daemon is frozen go on."""
        if daemon.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.process.pid, signal.SIGCONT)

    def strike(self, daemon: Daemon, part: Part, number: signal.Signals) -> None:
        """Send a signal to a daemon's network process, to its trainer, or to both at once."""
        assert daemon.process is not None
        with contextlib.suppress(ProcessLookupError):
            if part == "both":
                os.killpg(daemon.process.pid, number)
            elif part == "network":
                os.kill(daemon.process.pid, number)
            else:
                os.kill(self.trainer_pid(daemon), number)
        if number is signal.SIGKILL and part != "trainer":
            daemon.process.wait()

    def trainer_pid(self, daemon: Daemon) -> int:
        """The trainer's process; raises ProcessLookupError if there is none."""
        status = daemon.status()
        pid = status["trainer"]["pid"] if status is not None else None
        if pid is None:
            raise ProcessLookupError(f"{daemon.name} has no trainer")
        return int(pid)
