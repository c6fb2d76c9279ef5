"""The kernel's table of TCP sockets on this machine: whose which end is.

Invariant: what the kernel does not say is left out; nothing is asked of any process.

Source: proc_pid_net(5). Addresses are as the kernel writes them: hexadecimal, `ADDRESS:PORT`.

Not here: what follows from it for a dashboard, a trainer's processes or the doctor.
"""

from __future__ import annotations

from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ESTABLISHED", "LISTENING", "Socket", "sockets"]

ESTABLISHED, LISTENING = "01", "0A"


class Socket:
    """One row.

    Attributes:
        local: Its own address.
        remote: The other end's.
        user: Whose it is.
        inode: By which a process holds it; "0" of a connection that nobody has accepted, or that
            its owner has closed.
    """

    __slots__ = ("inode", "local", "remote", "user")

    def __init__(self, fields: list[str]) -> None:
        self.local, self.remote = fields[1], fields[2]
        self.user, self.inode = int(fields[7]), fields[9]


def sockets(state: str) -> Iterator[Socket]:
    """Every TCP socket in a state, of IPv4 and IPv6.

    Args:
        state: `ESTABLISHED` or `LISTENING`.
    """
    for name in ("tcp", "tcp6"):
        try:
            lines = Path("/proc/net", name).read_text("ascii").splitlines()[1:]
        except OSError:
            continue
        yield from (Socket(fields) for fields in map(str.split, lines) if fields[3] == state)
