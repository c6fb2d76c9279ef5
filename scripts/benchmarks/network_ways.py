"""Ways of moving bytes from one process to another: the baselines, and our own links.

A way has a server and a client, each in a process of its own, and a relay between them if it leads
over one. The client takes orders: what to transfer, up or down. Every way writes the same pieces of
1 MiB, and each is checked byte for byte, once, before it is timed.

* `ours`: a stream of one of our links, of a protocol that is the benchmark's own.
* `relay`: the same, over a circuit through a relay, which has a process of its own.
* `ours/blob`: a file that a member fetches: read, sent, checked chunk by chunk, synced to disk.
"""

from __future__ import annotations

import logging
import random
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import trio
from network_baselines import BASELINES, LOOPBACK, PROTOCOL, Ends, Handle
from network_processes import Orders

from p2pfed.identity.filehash import ChunkList
from p2pfed.network import (
    Limits,
    NetworkEvent,
    PeerConnected,
    PeerDisconnected,
    PeerNetwork,
    circuit,
    multistream,
    open_network,
)
from p2pfed.network.circuit import HOP, STOP
from p2pfed.network.framing import ByteStream, read_exact
from p2pfed.network.host import Host
from p2pfed.network.link import Link, Stream
from p2pfed.network.relay import RelayService

__all__ = ["CHECKED", "MIB", "WAYS", "Members", "Setting", "client", "heard"]
__all__ += ["quiet_library", "relay", "seed_of", "server"]

MIB = 1 << 20
CHECKED = 8 * MIB  # a transfer of this size is compared byte for byte
STEP_SECONDS = 60.0

Event = TypeVar("Event", bound=NetworkEvent)
Transfer = Callable[[bool, int], Awaitable[None]]  # up or down, how many bytes


@dataclass(frozen=True, slots=True)
class Setting:
    """What both ends know from the start."""

    folder: Path
    sizes: tuple[int, ...]
    via: Any = None  # the relay's address, where there is one


@dataclass(frozen=True, slots=True)
class Way:
    """Two ends, and the relay between them if there is one."""

    serve: Callable[[Setting], AbstractAsyncContextManager[Any]]  # yields its address
    connect: Callable[[Setting, Any], AbstractAsyncContextManager[Transfer]]
    relay: Callable[[], AbstractAsyncContextManager[Any]] | None = None  # yields its address


# --- the processes -------------------------------------------------------------------------------


async def relay(orders: Orders, name: str) -> None:
    """Be the relay of a way until the parent ends; says its address."""
    quiet_library()
    between = WAYS[name].relay
    assert between is not None
    async with between() as address:
        orders.answer(address)
        await orders.next()


async def server(orders: Orders, name: str, setting: Setting) -> None:
    """Be the server of a way until the parent ends; says its address."""
    quiet_library()
    pieces()
    async with WAYS[name].serve(setting) as address:
        orders.answer(address)
        await orders.next()


async def client(orders: Orders, name: str, setting: Setting, address: Any) -> None:
    """Transfer what is ordered, (up, size); says how many seconds each took."""
    quiet_library()
    pieces()
    async with WAYS[name].connect(setting, address) as transfer:
        while True:
            up, size = await orders.next()
            began = time.perf_counter()
            await transfer(up, size)
            orders.answer(time.perf_counter() - began)


def quiet_library() -> None:
    """py-libp2p logs ordinary churn as errors."""
    for name in ("libp2p", "multiaddr"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


# --- one transfer over a stream ------------------------------------------------------------------

REQUEST = struct.Struct("!?Q")


@cache
def pieces() -> tuple[bytes, ...]:
    """16 MiB that are the same in every process; more than a core's own cache holds."""
    return tuple(random.Random(number).randbytes(MIB) for number in range(16))


def _over(ends: Ends) -> Way:
    """Transfers over one stream that stays open."""

    @asynccontextmanager
    async def connect(_: Setting, address: Any) -> AsyncIterator[Transfer]:
        async with ends.connect(address) as stream:
            yield transfer_over(stream)

    return Way(lambda _: ends.serve(answer), connect)


def transfer_over(stream: ByteStream) -> Transfer:
    """The client's side of `answer`."""

    async def transfer(up: bool, size: int) -> None:
        await stream.write(REQUEST.pack(up, size))
        if up:
            await _send(stream, size)
            await read_exact(stream, 1, stall=STEP_SECONDS)  # it has all of it
        else:
            await _receive(stream, size)

    return transfer


async def answer(stream: ByteStream) -> None:
    """Serve transfers until the client is gone."""
    while True:
        up, size = REQUEST.unpack(await read_exact(stream, REQUEST.size, stall=3600.0))
        if up:
            await _receive(stream, size)
            await stream.write(b"!")
        else:
            await _send(stream, size)


async def _send(stream: ByteStream, size: int) -> None:
    for number in range(size // MIB):
        await stream.write(pieces()[number % len(pieces())])


async def _receive(stream: ByteStream, size: int) -> None:
    if size == CHECKED:
        held = await read_exact(stream, size, stall=STEP_SECONDS)
        assert held == b"".join(pieces()[: size // MIB]), "other bytes arrived than were sent"
        return
    left = size
    while left:
        piece = await stream.read(min(left, MIB))
        assert piece, "the stream ended in the middle of a transfer"
        left -= len(piece)


# --- ours ----------------------------------------------------------------------------------------


def seed_of(name: str) -> bytes:
    """A node's key seed."""
    return name.encode().ljust(32, b".")


class Members:
    """A gatekeeper that knows everybody, and holds some files."""

    def __init__(self) -> None:
        self.files: dict[bytes, Path] = {}

    def add(self, path: Path) -> bytes:
        """Hold a file; returns its name."""
        with path.open("rb") as file:
            name = ChunkList.of(file).name
        self.files[name] = path
        return name

    def is_member(self, peer: str) -> bool:  # noqa: ARG002 - everybody
        """Yes."""
        return True

    def current_roster(self) -> bytes:
        """None is offered."""
        return b""

    def consider_roster(self, peer: str, signed: bytes) -> bool:  # noqa: ARG002 - none is needed
        """Whatever it is."""
        return True

    def open_blob(self, peer: str, digest: bytes) -> Path | None:  # noqa: ARG002 - everybody
        """A file of ours."""
        return self.files.get(digest)


def _host(name: str) -> Host:
    return Host(seed=seed_of(name), gatekeeper=Members(), limits=Limits())


async def _serve_one(handle: Handle, link: Link) -> None:
    """Serve the one stream that a client opens."""
    stream = await link.accept()
    await multistream.accept(stream, (PROTOCOL,), stall=STEP_SECONDS)
    await handle(stream)


async def _keep_open(link: Link, protocol: str, task_status: trio.TaskStatus[Stream]) -> None:
    """Run a link; started with a stream of it."""

    async def converse(link: Link) -> None:
        task_status.started(await link.open(protocol))
        await trio.sleep_forever()

    await link.run(converse)


@asynccontextmanager
async def _link_serving(handle: Handle) -> AsyncIterator[tuple[str, str]]:
    host = _host("server")

    async def converse(link: Link) -> None:
        assert await host.admit(link)
        await _serve_one(handle, link)

    async with trio.open_nursery() as nursery:
        (address,) = await host.listen([LOOPBACK], lambda link: link.run(converse), nursery)
        yield host.peer_id, address
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def _link_connected(address: tuple[str, str]) -> AsyncIterator[ByteStream]:
    link = await _host("client").dial(*address)
    async with trio.open_nursery() as nursery:
        yield await nursery.start(partial(_keep_open, link, PROTOCOL))
        link.abort()


async def heard(network: PeerNetwork, kind: type[Event]) -> Event:
    """The next event of this kind, from a peer that does not leave."""
    async for event in network.events:
        assert not isinstance(event, PeerDisconnected), "the connection was lost"
        if isinstance(event, kind):
            return event
    raise AssertionError("the network was closed")


@asynccontextmanager
async def _blob_serving(setting: Setting) -> AsyncIterator[tuple[str, list[str], dict[int, bytes]]]:
    gate, names = Members(), {}
    for size in {CHECKED, *setting.sizes}:
        path = setting.folder / f"blob-{size}"
        with path.open("wb") as file:
            for number in range(size // MIB):
                file.write(pieces()[number % len(pieces())])
        names[size] = gate.add(path)
    seed = seed_of("server")
    async with open_network(seed=seed, listen=[LOOPBACK], gatekeeper=gate) as network:
        yield network.peer_id, network.addresses(), names


@asynccontextmanager
async def _blob_connected(
    setting: Setting, address: tuple[str, list[str], dict[int, bytes]]
) -> AsyncIterator[Transfer]:
    peer, addresses, names = address
    destination = setting.folder / "fetched"
    async with open_network(seed=seed_of("client"), listen=[], gatekeeper=Members()) as network:
        network.keep_connected(peer, addresses)
        await heard(network, PeerConnected)

        async def transfer(_: bool, size: int) -> None:  # a fetch has one direction
            await network.fetch(peer, names[size], destination, max_bytes=size)

        yield transfer


# --- ours, over a relay --------------------------------------------------------------------------


@asynccontextmanager
async def _relay_running() -> AsyncIterator[tuple[str, str]]:
    host = _host("relay")
    service = RelayService(host.peer_id, is_member=lambda _: True, addresses=tuple)

    async def hop(link: Link, stream: Stream) -> None:
        await multistream.accept(stream, (HOP,), stall=STEP_SECONDS)
        await service.serve_hop(link, stream)

    async def converse(link: Link) -> None:
        assert await host.admit(link)
        while True:
            link.spawn(partial(hop, link, await link.accept()))

    async with trio.open_nursery() as nursery:
        (address,) = await host.listen([LOOPBACK], lambda link: link.run(converse), nursery)
        yield host.peer_id, address
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def _circuit_serving(setting: Setting) -> AsyncIterator[str]:
    """A server that listens nowhere; its address is its name."""
    host = _host("server")
    to_relay = await host.dial(*setting.via)
    async with trio.open_nursery() as nursery:
        request = await nursery.start(partial(_keep_open, to_relay, HOP))
        await circuit.reserve(request)
        await request.finish(STEP_SECONDS)

        async def converse(link: Link) -> None:
            assert await host.admit(link)
            await _serve_one(answer, link)

        async def serve() -> None:
            stream = await to_relay.accept()
            await multistream.accept(stream, (STOP,), stall=STEP_SECONDS)
            await circuit.accept_stop(stream)
            await host.receive_through(stream, to_relay.peer, lambda link: link.run(converse))

        nursery.start_soon(serve)
        yield host.peer_id
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def _circuit_connected(setting: Setting, target: str) -> AsyncIterator[Transfer]:
    host = _host("client")
    to_relay = await host.dial(*setting.via)
    async with trio.open_nursery() as nursery:
        stream = await nursery.start(partial(_keep_open, to_relay, HOP))
        await circuit.connect(stream, target)
        link = await host.dial_through(stream, target, to_relay.peer)
        yield transfer_over(await nursery.start(partial(_keep_open, link, PROTOCOL)))
        nursery.cancel_scope.cancel()


WAYS = {
    **{name: _over(ends) for name, ends in BASELINES.items()},
    "ours": _over(Ends(_link_serving, _link_connected)),
    "relay": Way(_circuit_serving, _circuit_connected, _relay_running),
    "ours/blob": Way(_blob_serving, _blob_connected),
}
