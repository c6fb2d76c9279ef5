"""Prometheus text (exposition format 0.0.4): how it is written, and where it is answered.

`metrics_route` answers GET /v1/metrics on the admin socket. `serve_metrics` answers GET /metrics on
a TCP port of its own, for a Prometheus that cannot read a Unix socket: one page, read only, with no
way to anything else of the node.

Invariants. Whatever stands in a label, the text parses and says the same again. The port's answer
is made at most once a second, whoever asks how often. A client of the port costs one of
`PortLimits.connections` for seconds, never the daemon; what a web page sends is refused, also by a
name that was bound to the loopback address (DNS rebinding).

The port speaks the least of HTTP/1.1 by itself (a head, an answer, the end of the connection):
hypercorn's limits on a head and on a slow reader are the admin socket's (`server`), and nothing
else of HTTP is wanted here.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/ (text-based format). Which
metrics there are is decided in the node room (`node/metrics.py`).
"""

from __future__ import annotations

import ipaddress
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal, Protocol

import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from p2pfed.errors import ConfigError

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # the stubs that libp2p installs know no trio.TaskStatus

__all__ = [
    "CONTENT_TYPE",
    "Family",
    "Measured",
    "PortLimits",
    "exposition",
    "metrics_route",
    "serve_metrics",
]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FRESH = 1.0  # seconds that the port's answer is given again
_REQUEST = re.compile(rb"([A-Z]{1,16}) (\S{1,4096}) HTTP/1\.[01]")
_log = logging.getLogger("p2pfed.metrics")


@dataclass(frozen=True, slots=True)
class Family:
    """One metric with all that is known of it now.

    Attributes:
        name: As Prometheus calls it.
        kind: A counter only grows until the daemon starts again.
        text: What it is, in a sentence.
        labels: Names of the labels.
        samples: Values of the labels, and the number; no two with the same labels.
    """

    name: str
    kind: Literal["gauge", "counter"]
    text: str
    labels: tuple[str, ...]
    samples: Sequence[tuple[tuple[str, ...], float]]


class Measured(Protocol):
    """Whoever can say what is measured."""

    def metrics(self) -> list[Family]:
        """All families, as they are now."""


def exposition(families: Sequence[Family]) -> bytes:
    """The text of these families; one without samples is left out."""
    lines: list[str] = []
    for family in families:
        if not family.samples:
            continue
        lines.append(f"# HELP {family.name} {_escaped(family.text)}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        lines.extend(
            f"{family.name}{_label_text(family.labels, values)} {_number(number)}"
            for values, number in family.samples
        )
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")


def _label_text(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    pairs = zip(names, values, strict=True)
    inside = ",".join(f'{name}="{_escaped(value, quotes=True)}"' for name, value in pairs)
    return f"{{{inside}}}" if inside else ""


def _escaped(text: str, *, quotes: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def _number(number: float) -> str:
    if math.isfinite(number):
        return repr(number)
    return "NaN" if math.isnan(number) else f"{'+' if number > 0 else '-'}Inf"


def metrics_route(backend: Measured) -> Route:
    """The endpoint of the admin socket."""

    async def endpoint(_: Request) -> Response:
        return Response(exposition(backend.metrics()), headers={"content-type": CONTENT_TYPE})

    return Route("/v1/metrics", endpoint, methods=["GET"])


# --- the port ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PortLimits:
    """What clients of the port may ask for.

    Attributes:
        connections: At a time; further ones are closed at once.
        head_bytes: Request line and headers.
        head_s: Seconds for them to arrive.
        write_s: Seconds for the answer to be taken.
    """

    connections: int = 16
    head_bytes: int = 8 * 1024
    head_s: float = 5.0
    write_s: float = 10.0


async def serve_metrics(
    backend: Measured,
    *,
    listen: str,
    limits: PortLimits = PortLimits(),
    task_status: TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer GET /metrics on a TCP port until cancelled.

    Args:
        backend: The node.
        listen: `host:port`; `[::1]:9464` for IPv6.
        limits: What clients may ask for.
        task_status: Started with the port once clients can connect.

    Raises:
        ConfigError: The address is wrong or taken.
    """
    host, port = _host_and_port(listen)
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {listen}",
            error.strerror or str(error),
            "set metrics.listen to a free host:port of this machine, e.g. 127.0.0.1:9464",
        ) from error
    addresses = [listener.socket.getsockname()[0] for listener in listeners]
    open_to_others = not all(_is_loopback(address) for address in addresses)
    if open_to_others:
        _log.warning(
            "metrics are readable by everyone who reaches %s: peers' names, rounds, bytes and the "
            "privacy spent; there is no password",
            listen,
        )
    door = _Door(backend, limits, None if open_to_others else host)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, door.serve, listeners)
        task_status.started(listeners[0].socket.getsockname()[1])


def _host_and_port(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdecimal() or int(port) > 65_535:
        raise ConfigError(
            f"metrics.listen = {listen!r:.80} is no address",
            "it must be a host and a port from 0 to 65535",
            'write it like this: metrics.listen = "127.0.0.1:9464"',
        )
    return host, int(port)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


class _Door:
    def __init__(self, backend: Measured, limits: PortLimits, only_as: str | None) -> None:
        self._backend = backend
        self._limits = limits
        self._only_as = only_as  # the name that a client may use for us, besides an IP address
        self._inside = 0
        self._page = b""
        self._made_at = -math.inf

    async def serve(self, stream: trio.SocketStream) -> None:
        """One client; whatever is wrong with it is the end of it alone."""
        if self._inside >= self._limits.connections:
            return  # serve_listeners closes it
        self._inside += 1
        try:
            await self._answer(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            _log.debug("a client of the metrics port has gone: %r", error)
        except Exception:  # noqa: BLE001 - the wrapper: a bug in a metric costs a scrape, never the daemon
            _log.exception("bug while metrics are asked for; hanging up")
        finally:
            self._inside -= 1

    async def _answer(self, stream: trio.SocketStream) -> None:
        head = b""
        with trio.move_on_after(self._limits.head_s):
            while b"\r\n\r\n" not in head and len(head) <= self._limits.head_bytes:
                piece = await stream.receive_some(4096)
                if not piece:
                    return
                head += piece
        status, with_body = self._judge(head)
        page = self._current() if status is HTTPStatus.OK else f"{status.phrase}\n".encode()
        answer = [
            f"HTTP/1.1 {status.value} {status.phrase}",
            f"Content-Type: {CONTENT_TYPE if status is HTTPStatus.OK else 'text/plain'}",
            f"Content-Length: {len(page)}",
            *(["Allow: GET, HEAD"] if status is HTTPStatus.METHOD_NOT_ALLOWED else []),
            "Cache-Control: no-store",
            "X-Content-Type-Options: nosniff",
            "Connection: close",
        ]
        with trio.move_on_after(self._limits.write_s):
            await stream.send_all("\r\n".join([*answer, "", ""]).encode() + page * with_body)
            await stream.send_eof()
            while await stream.receive_some(4096):  # closing over unread bytes would cut it off
                pass

    def _judge(self, head: bytes) -> tuple[HTTPStatus, bool]:
        """The answer's status, and whether it has a body."""
        top, end, _ = head.partition(b"\r\n\r\n")
        if not end and len(head) <= self._limits.head_bytes:
            return HTTPStatus.REQUEST_TIMEOUT, True
        if not end or len(top) > self._limits.head_bytes:
            return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, True
        first, *rest = top.split(b"\r\n")
        request = _REQUEST.fullmatch(first)
        if request is None:
            return HTTPStatus.BAD_REQUEST, True
        method, target = request.groups()
        if self._is_foreign(rest):
            return HTTPStatus.FORBIDDEN, True
        if target.partition(b"?")[0] != b"/metrics":
            return HTTPStatus.NOT_FOUND, method != b"HEAD"
        if method not in {b"GET", b"HEAD"}:
            return HTTPStatus.METHOD_NOT_ALLOWED, True
        return HTTPStatus.OK, method == b"GET"

    def _is_foreign(self, lines: list[bytes]) -> bool:
        """Whether a web page sent it."""
        fields = [line.partition(b":") for line in lines]
        headers = [(name.strip().lower(), value.strip().lower()) for name, _, value in fields]
        if any(name in {b"origin", b"referer"} for name, _ in headers):
            return True
        hosts = [value.decode("latin1") for name, value in headers if name == b"host"]
        return self._only_as is not None and not all(self._is_ours(host) for host in hosts)

    def _is_ours(self, host: str) -> bool:
        name = re.sub(r":\d*$", "", host)
        if name in {"localhost", "", str(self._only_as).lower()}:
            return True
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return True

    def _current(self) -> bytes:
        now = trio.current_time()
        if now - self._made_at >= FRESH:
            self._page, self._made_at = exposition(self._backend.metrics()), now
        return self._page
