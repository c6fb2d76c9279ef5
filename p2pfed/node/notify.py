"""What the service manager is told: ready, what goes on, still alive, stopping (sd_notify(3)).

Datagrams of `KEY=VALUE` lines to the socket that `NOTIFY_SOCKET` names; without it nothing is said.
`WATCHDOG=1` comes from a task of the event loop: while the loop is stuck none is sent, and systemd
ends the daemon after `WatchdogSec=` and starts it anew.

Invariant: nothing that goes wrong here ends or delays the node. The variables are taken out of the
environment, so that no child speaks in the daemon's name.

Not here: what the status line says (`daemon`).
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Self

import trio

__all__ = ["Manager"]

EVERY = 1.0  # seconds between two looks at the status


@dataclass(frozen=True, slots=True)
class Manager:
    """Who started this process and listens.

    Attributes:
        address: Of its socket; "" where nobody listens.
        patience: Seconds after which it ends a silent process; 0 if it does not.
    """

    address: str = ""
    patience: float = 0.0

    @classmethod
    def taken_from(cls, environment: MutableMapping[str, str]) -> Self:
        """The one that the environment names, whose variables are removed."""
        address = environment.pop("NOTIFY_SOCKET", "")
        patience = environment.pop("WATCHDOG_USEC", "")
        meant = environment.pop("WATCHDOG_PID", "") in {"", str(os.getpid())}
        if not address.startswith(("/", "@")):
            return cls()
        return cls(address, int(patience) / 1e6 if meant and patience.isdigit() else 0.0)

    def tell(self, **facts: str) -> None:
        """Send one message, e.g. `READY="1"`; never waits and never fails."""
        if not self.address:
            return
        text = "\n".join(f"{key}={' '.join(value.split())}" for key, value in facts.items())
        address = "\0" + self.address[1:] if self.address[0] == "@" else self.address
        with (
            contextlib.suppress(OSError),  # it has gone, or its queue is full
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as made,
        ):
            made.sendto(text.encode(), address)

    async def keep_told(self, status: Callable[[], str]) -> None:
        """Feed the watchdog, and tell the status whenever it has changed; until cancelled.

        Args:
            status: One line for `systemctl status`.
        """
        if not self.address:
            return
        every = min(EVERY, self.patience / 3) if self.patience else EVERY
        last = ""
        while True:
            now = status()
            facts = {"STATUS": now} if now != last else {}
            if self.patience:
                facts["WATCHDOG"] = "1"
            if facts:
                self.tell(**facts)
            last = now
            await trio.sleep(every)
