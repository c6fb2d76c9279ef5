"""TCP ports of this machine: can we listen there, who does, and who answers elsewhere.

Gatherers only, each with a time limit; what is found is judged in `paths`. An address is a
multiaddr as `network.addresses` reads it (a test compares the two; that room loads libp2p).
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from p2pfed.tcp_table import LISTENING, sockets

__all__ = ["Endpoint", "at_once", "connects", "free_to_listen", "holder", "resolved"]

T = TypeVar("T")
_DIRECT = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/([^/\s]+)/tcp/(\d{1,5})(?:/p2p/([^/\s]+))?")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A TCP endpoint.

    Attributes:
        kind: ip4, ip6, dns, dns4 or dns6.
        host: The address or name.
        port: The TCP port.
        peer: Who answers there, if the address says so.
    """

    kind: str
    host: str
    port: int
    peer: str | None = None

    @classmethod
    def read(cls, address: str) -> Endpoint | None:
        """Read a direct multiaddr; None if it is none."""
        match = _DIRECT.fullmatch(address)
        if match is None or int(match[3]) > 65535:
            return None
        if match[1] in {"ip4", "ip6"}:
            try:
                version = ipaddress.ip_address(match[2]).version
            except ValueError:
                return None
            if f"ip{version}" != match[1]:
                return None
        return cls(match[1], match[2], int(match[3]), match[4])

    @property
    def is_name(self) -> bool:
        """Whether the host has to be looked up."""
        return self.kind.startswith("dns")

    @property
    def family(self) -> socket.AddressFamily:
        """The address family that it asks for."""
        six, four = self.kind in {"ip6", "dns6"}, self.kind in {"ip4", "dns4"}
        return socket.AF_INET6 if six else socket.AF_INET if four else socket.AF_UNSPEC


def free_to_listen(endpoint: Endpoint) -> int:
    """0 if we could listen there now, else the error number of the system."""
    family = socket.AF_INET6 if endpoint.kind == "ip6" else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((endpoint.host, endpoint.port))
            probe.listen(1)  # some systems tell only here that another socket listens
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def holder(port: int) -> tuple[int, str] | None:
    """The process that listens on a port, and its name; None where we may not see it."""
    rows = sockets(LISTENING)
    inodes = {row.inode for row in rows if int(row.local.rpartition(":")[2], 16) == port}
    if not inodes:
        return None
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and _has_socket(process, inodes):
            return int(process.name), _name_of(process)
    return None


def _has_socket(process: Path, inodes: set[str]) -> bool:
    try:
        links = list((process / "fd").iterdir())
    except OSError:  # another user's, or it ended
        return False
    return any(_target(link).removeprefix("socket:[").removesuffix("]") in inodes for link in links)


def _target(link: Path) -> str:
    try:
        return os.readlink(link)  # noqa: PTH115 - what it names is no path
    except OSError:  # closed meanwhile
        return ""


def _name_of(process: Path) -> str:
    try:
        return (process / "comm").read_text("utf-8", "replace").strip()
    except OSError:
        return "?"


def resolved(endpoint: Endpoint) -> list[str]:
    """The addresses of its host; empty if the name is not known here. May take seconds."""
    if not endpoint.is_name:
        return [endpoint.host]
    try:
        found = socket.getaddrinfo(
            endpoint.host, endpoint.port, endpoint.family, socket.SOCK_STREAM
        )
    except OSError:
        return []
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def connects(endpoint: Endpoint, seconds: float) -> str:
    """Open a TCP connection and close it; empty if it came about, else why not."""
    try:
        socket.create_connection((endpoint.host, endpoint.port), timeout=seconds).close()
    except TimeoutError:
        return f"no answer within {seconds:g} s"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def at_once(work: Iterable[Callable[[], T]], seconds: float, late: T) -> list[T]:
    """Do things at the same time.

    Args:
        work: What to do.
        seconds: Until nobody is waited for any longer.
        late: The answer of those who are not done then; their threads end with the process.

    Returns:
        The answers, in the order of `work`.
    """
    jobs = list(work)
    answers = [late] * len(jobs)

    def do(number: int, job: Callable[[], T]) -> None:
        answers[number] = job()

    threads = [
        threading.Thread(target=do, args=(number, job), daemon=True)
        for number, job in enumerate(jobs)
    ]
    end = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return list(answers)
