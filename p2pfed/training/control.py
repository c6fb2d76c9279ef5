"""The control protocol between a trainer and its node's network process: lines of JSON.

One object of at most 1 MiB per line, over a stream socket; vectors and payloads are files in the
exchange folder. Requests: `round`, `evaluate`, `stop`; the end of the stream is a `stop`. Every
request gets one answer, an object with `event`.

Invariant: what is written here is what the gate released, fixed texts and public numbers.

Not here: who answers (`answers`), what is told of an error (`guarded`), the network process's end
(node room). Nothing here needs torch: `service` waits for a daemon without it.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from p2pfed.errors import ConfigError
from p2pfed.identity.run import Run

__all__ = ["MOST_LINE_BYTES", "Message", "Request", "lines", "send"]

Message = dict[str, Any]

MOST_LINE_BYTES = 1 << 20
_A_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


class Request:
    """One line from the network process, checked."""

    def __init__(self, line: bytes, exchange: Path) -> None:
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            raise ConfigError("a request is not a JSON object")
        self._data: Message = data
        self.op = self.text("op")
        if self.op not in {"round", "evaluate", "stop"}:
            raise ConfigError(f"no request {self.op[:40]!r}")
        if self.op == "stop":
            return
        self.round = self.whole("round")
        name = self.text("view")
        if not _A_NAME.fullmatch(name):  # a path is not even looked up: that would tell of it
            raise ConfigError("the view is not named as a file of the exchange folder is")
        self.view = exchange / name

    @property
    def scale(self) -> Fraction:
        """Two whole numbers, at most 2**53, the second not 0."""
        below = self.whole("scale_of")
        if below == 0:
            raise ConfigError("the request's scale_of is 0")
        return Fraction(self.whole("scale"), below)

    def text(self, key: str) -> str:
        """The text under a key."""
        value = self._data.get(key)
        if not isinstance(value, str) or not _is_writable(value):
            raise ConfigError(f"the request's {key} is not a text")
        return value

    @property
    def names_run(self) -> bool:
        """Whether it says which run it is about; a round must."""
        return bool(self._data.get("run"))

    def run(self) -> Run:
        """The run that it is about.

        Raises:
            ConfigError: It does not say.
            FactRejected: It is no run file.
        """
        return Run.decode(self.text("run").encode())

    def whole(self, key: str) -> int:
        """The whole number under a key, 0 to 2**53."""
        value = self._data.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 53:
            raise ConfigError(f"the request's {key} is not a whole number")
        return value

    def heads(self) -> list[bytes]:
        """Ledger heads that peers have seen, signed by this node."""
        value = self._data.get("heads", [])
        if not isinstance(value, list):
            raise ConfigError("the request's heads are not a list")
        try:
            return [bytes.fromhex(head) for head in value]
        except (TypeError, ValueError) as error:
            raise ConfigError("the request's heads are not hexadecimal") from error


def _is_writable(text: str) -> bool:
    """Half of a surrogate pair can be said in JSON, and nowhere else."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """Yield requests as they come, None for one that is too long, until the stream ends."""
    while line := stream.readline(MOST_LINE_BYTES + 1):
        if len(line) <= MOST_LINE_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(MOST_LINE_BYTES)
        yield None


def send(control: socket.socket, message: Message) -> bool:
    """Send one line; False when the network process has gone."""
    try:
        control.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        return False
    return True
