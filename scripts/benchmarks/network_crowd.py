"""One node among many peers: how late its event loop is, what peers cost it, and whether it leaks.

The node under test has a process of its own, `hub`; its peers live in others. Nothing but the
network room runs in it: what is measured is links, streams, frames and files.

* `network/lag`: how late a task wakes that sleeps 5 ms at a time, with 50 members connected, each
  with a small frame every second: `idle`; while one member fetches files of 64 MiB one after the
  other from the node, `sending`; and while the node fetches them from it, `receiving`.
* `network/memory/idle`: resident bytes per connected peer, beyond those of the first two.
* `network/memory/busy`: resident bytes per peer that sends on as many streams as it may whatever
  flow control lets it, first while all is read, then while nothing is, against the bound on what
  nobody reads in `Limits`; `unread` is how much that was.
* `network/soak`: bursts of connecting, frames to and fro, a file, strangers with garbage, and
  disconnecting; memory and descriptors are read at rest after each. `growth` is between the
  medians of the first and the last quarter of what follows the warm-up, itself a quarter. The
  rates are multiples of what a node sees: a link per peer and day, 1 MB per peer and minute.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import trio
from goals import Goal
from network_baselines import LOOPBACK, PROTOCOL
from network_processes import Child, Failed, Orders
from network_ways import MIB, Members, heard, quiet_library, seed_of
from rows import Row

from p2pfed.network import FrameReceived, Limits, PeerConnected, PeerNetwork, open_network
from p2pfed.network.host import Host
from p2pfed.network.link import Link, Stream

__all__ = ["busy", "crowd", "soak"]

START_SECONDS = 60.0
SETTLE_SECONDS = 2.0

PEERS = 50
FIRST = 2  # what the first link alone brings (code, buffers) is not a peer's
PROCESSES = 3
LAG_SECONDS = 10.0
PROBE_SECONDS = 0.005
FILE_BYTES = 64 * MIB
LAG_GOAL_MS = 100.0
IDLE_GOAL_MB = 1.0

BUSY_PEERS = 4
PIECE = bytes(64 * 1024)

CHURNERS = 4
ECHOES = 4  # frames to and fro per link
FRAME = bytes(1_000_000)
SOAK_FILE_BYTES = 2 * MIB
BURST_SECONDS = 4.0
REST_SECONDS = 1.0
GROWTH_GOAL_MB = 1.0

Address = tuple[str, list[str]]


# --- the node under test, and its peers ----------------------------------------------------------


async def hub(orders: Orders, folder: Path, size: int) -> None:
    """A node that sends frames of one length back and holds one file; says where it is."""
    quiet_library()
    gate = Members()
    name = gate.add(_file(folder / "hub", size))
    async with (
        open_network(seed=seed_of("hub"), listen=[LOOPBACK], gatekeeper=gate) as network,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(_echo, network)
        orders.answer(((network.peer_id, network.addresses()), name))
        while True:
            match await orders.next():
                case "connected":
                    orders.answer(network.totals().connected)
                case "lag", fetched:
                    began = _moved(network)
                    async with trio.open_nursery() as meanwhile:
                        if fetched is not None:
                            fetch = partial(_fetch_on, network, *fetched, folder / "by-hub")
                            meanwhile.start_soon(fetch)
                        late = await _lateness()
                        meanwhile.cancel_scope.cancel()
                    orders.answer((late, _moved(network) - began))


async def guests(orders: Orders, prefix: str, to: Address, name: bytes, folder: Path) -> None:
    """Members that stay connected: as many as ordered; the first one fetches, and is fetched from.

    Says who the first one is and the name of its file.
    """
    quiet_library()
    gate = Members()
    own = gate.add(_file(folder / prefix, FILE_BYTES))
    networks: list[PeerNetwork] = []

    async def stay(number: int, task_status: trio.TaskStatus[PeerNetwork]) -> None:
        seed = seed_of(f"{prefix}{number}")
        async with open_network(seed=seed, listen=[], gatekeeper=gate) as network:
            network.keep_connected(*to)
            await heard(network, PeerConnected)
            task_status.started(network)
            nursery.start_soon(_echo, network)  # which hears what there is to hear
            while True:
                assert network.send(to[0], b"beat" * 50), "a guest has lost the hub"
                await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        while True:
            match await orders.next():
                case "connect", count:
                    for _ in range(count):
                        networks.append(await nursery.start(stay, len(networks)))
                    orders.answer((networks[0].peer_id, own))
                case "fetch":
                    with trio.move_on_after(LAG_SECONDS):
                        await _fetch_on(networks[0], to[0], name, folder / f"by-{prefix}")
                    orders.answer(None)


async def _echo(network: PeerNetwork) -> None:
    async for event in network.events:
        if isinstance(event, FrameReceived) and len(event.frame) == len(FRAME):
            network.send(event.peer, event.frame)


async def _fetch_on(network: PeerNetwork, peer: str, name: bytes, destination: Path) -> None:
    while True:
        await network.fetch(peer, name, destination, max_bytes=FILE_BYTES)


async def _lateness() -> list[float]:
    """Seconds by which each of many short sleeps was too long."""
    late, end = [], trio.current_time() + LAG_SECONDS
    while (due := trio.current_time() + PROBE_SECONDS) < end:
        await trio.sleep_until(due)
        late.append(trio.current_time() - due)
    return late


def _moved(network: PeerNetwork) -> int:
    totals = network.totals()
    return totals.bytes_sent + totals.bytes_received


def _file(path: Path, size: int) -> Path:
    path.write_bytes(os.urandom(size))
    return path


# --- lag, and the memory of idle peers -----------------------------------------------------------


def crowd(parts: Sequence[str]) -> list[Row]:
    """The rows of lag, of idle peers' memory, or both."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="p2pfed-bench-")))
        node = stack.enter_context(Child("the hub", hub, folder, FILE_BYTES))
        to, name = node.hear(START_SECONDS)
        hosts = [
            stack.enter_context(Child(f"guests {i}", guests, f"guest{i}-", to, name, folder))
            for i in range(PROCESSES)
        ]
        first = hosts[0].ask(("connect", FIRST), START_SECONDS)
        time.sleep(SETTLE_SECONDS)
        before = node.memory()
        for i, host in enumerate(hosts):
            share = len(range(i, PEERS, PROCESSES)) - (FIRST if i == 0 else 0)
            host.ask(("connect", share), START_SECONDS)
        time.sleep(SETTLE_SECONDS)
        idle = (node.memory() - before) / (PEERS - FIRST) / 1e6
        rows: list[Row] = []
        if "lag" in parts:
            late, _ = node.ask(("lag", None), START_SECONDS)
            rows += _lag("idle", late, None)
            hosts[0].order("fetch")
            rows += _lag("sending", *node.ask(("lag", None), START_SECONDS))
            hosts[0].hear(START_SECONDS)
            rows += _lag("receiving", *node.ask(("lag", first), START_SECONDS))
        if (left := node.ask("connected", START_SECONDS)) != PEERS:
            raise Failed(f"{left} of {PEERS} peers are still connected")
    if "memory" in parts:
        ratio = idle / IDLE_GOAL_MB
        rows.append(Goal("network/memory/idle", idle, "MB", "1 MB a peer", ratio, "lower", 1.0))
    return rows


def _lag(state: str, late: list[float], moved: int | None) -> list[Row]:
    """The rows of one state."""
    ordered = sorted(1e3 * each for each in late)
    name, p99 = f"network/lag/{state}", ordered[len(ordered) * 99 // 100]
    rows = [
        Row(f"{name}/p50", statistics.median(ordered), "ms", better="lower"),
        Goal(f"{name}/p99", p99, "ms", "100 ms", p99 / LAG_GOAL_MS, "lower", 1.0),
        Row(f"{name}/max", ordered[-1], "ms", better="lower"),
    ]
    if moved is not None:
        rows.append(Row(f"{name}/rate", moved / LAG_SECONDS / 1e6, "MB/s", better="higher"))
    return rows


# --- the memory of busy peers --------------------------------------------------------------------


def busy() -> list[Row]:
    """What a peer can make us hold that keeps to flow control."""
    bound = Limits().unread_bytes
    with ExitStack() as stack:
        node = stack.enter_context(Child("the sink", sink))
        pushing = stack.enter_context(Child("the busy peers", pushers, node.hear(START_SECONDS)))
        pushing.hear(START_SECONDS)
        time.sleep(SETTLE_SECONDS)
        before = node.memory()
        pushing.ask("push", START_SECONDS)
        time.sleep(SETTLE_SECONDS)  # the windows grow while somebody reads
        node.ask("stop", START_SECONDS)
        sent = pushing.ask("settle", START_SECONDS)
        unread = sent - node.ask("read", START_SECONDS)
        held = (node.memory() - before) / BUSY_PEERS
    told = f"the bound of {bound / 1e6:.3g} MB"
    return [
        Goal("network/memory/busy", held / 1e6, "MB", told, held / bound, "lower", 1.0),
        Row("network/memory/busy/unread", unread / BUSY_PEERS / 1e6, "MB"),
    ]


async def sink(orders: Orders) -> None:
    """A host that reads all its streams until it is told to stop."""
    quiet_library()
    host = Host(seed=seed_of("sink"), gatekeeper=Members(), limits=Limits())
    reading, read = [True], [0]

    async def drain(stream: Stream) -> None:
        while reading[0]:
            piece = await stream.read(MIB)
            read[0] += len(piece)
        await trio.sleep_forever()

    async def converse(link: Link) -> None:
        assert await host.admit(link)
        while True:
            link.spawn(partial(drain, await link.accept()))

    async with trio.open_nursery() as nursery:
        (address,) = await host.listen([LOOPBACK], lambda link: link.run(converse), nursery)
        orders.answer((host.peer_id, address))
        while True:
            reading[0] = await orders.next() not in {"stop", "read"}
            orders.answer(read[0])


async def pushers(orders: Orders, to: tuple[str, str]) -> None:
    """Peers that send as much as is taken; say in the end how many bytes that was."""
    quiet_library()
    limits, links, taken = Limits(), [], [0]
    go = trio.Event()

    async def push(stream: Stream) -> None:
        while True:
            await stream.write(PIECE)
            taken[0] += len(PIECE)

    async def converse(link: Link) -> None:
        streams = [await link.open(PROTOCOL, one_way=True) for _ in range(limits.streams)]
        await go.wait()
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(push, stream)

    async with trio.open_nursery() as nursery:
        for number in range(BUSY_PEERS):
            seed = seed_of(f"busy{number}")
            host = Host(seed=seed, gatekeeper=Members(), limits=limits)
            links.append(await host.dial(*to))
            nursery.start_soon(links[-1].run, converse)
        orders.answer(None)
        while True:
            if await orders.next() == "push":
                go.set()
            else:
                before = -1
                while taken[0] != before:  # nothing more is taken for a second
                    before = taken[0]
                    await trio.sleep(1)
            assert not any(link.done.is_set() for link in links), "a busy peer was cut off"
            orders.answer(taken[0])


# --- soak ----------------------------------------------------------------------------------------


def soak(minutes: float) -> list[Row]:
    """Bursts for so long."""
    memory, files, links, moved = [], [], 0, 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="p2pfed-bench-")))
        node = stack.enter_context(Child("the hub", hub, folder, SOAK_FILE_BYTES))
        to, name = node.hear(START_SECONDS)
        peers = stack.enter_context(Child("the peers", churn, to, name, folder))
        began = time.monotonic()
        while time.monotonic() - began < 60 * minutes:
            opened, carried = peers.ask("burst", START_SECONDS + BURST_SECONDS)
            links, moved = links + opened, moved + carried
            _wait_for(lambda: node.ask("connected", START_SECONDS) == 0, "the hub is alone again")
            time.sleep(REST_SECONDS)
            memory.append(node.memory() / 1e6)
            files.append(float(node.descriptors()))
        lasted = (time.monotonic() - began) / 60
    growth, usual = _growth(memory), CHURNERS * lasted
    return [
        Row("network/soak/links", links * 24 * 60 / usual, "x the usual rate"),
        Row("network/soak/bytes", moved / 1e6 / usual, "x the usual rate"),
        Row("network/soak/days", links / CHURNERS, "days of links of a peer"),
        Row("network/soak/memory", memory[-1], "MB", better="lower"),
        Goal("network/soak/growth", growth, "MB", "1 MB", growth / GROWTH_GOAL_MB, "lower", 1.0),
        Row("network/soak/descriptors", files[-1], "files and sockets", better="lower"),
        Row("network/soak/descriptors/growth", _growth(files), "of them", better="lower"),
    ]


def _growth(samples: list[float]) -> float:
    """From the first to the last quarter of what follows the warm-up."""
    after = samples[len(samples) // 4 :]
    part = max(1, len(after) // 4)
    return statistics.median(after[-part:]) - statistics.median(after[:part])


def _wait_for(is_so: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + START_SECONDS
    while not is_so():
        if time.monotonic() > end:
            raise Failed(f"waited {START_SECONDS:g} s in vain until {what}")
        time.sleep(0.1)


async def churn(orders: Orders, to: Address, name: bytes, folder: Path) -> None:
    """Peers that come and go; says after each burst how many links and bytes there were."""
    quiet_library()
    port = int(to[1][0].split("/")[4])

    async def come_and_go(number: int, visits: list[int]) -> None:
        end = trio.current_time() + BURST_SECONDS
        while trio.current_time() < end:
            with trio.fail_after(START_SECONDS):
                visits.append(await _visit(number, to, name, folder))
                await _stranger(port)

    while await orders.next():
        visits: list[int] = []
        async with trio.open_nursery() as nursery:
            for number in range(CHURNERS):
                nursery.start_soon(come_and_go, number, visits)
        orders.answer((len(visits), sum(visits)))


async def _visit(number: int, to: Address, name: bytes, folder: Path) -> int:
    """One link from its first byte to its last; returns the bytes that it carried."""
    destination = folder / f"visitor{number}"
    seed = seed_of(f"visitor{number}")
    async with open_network(seed=seed, listen=[], gatekeeper=Members()) as network:
        network.keep_connected(*to)
        await heard(network, PeerConnected)
        for _ in range(ECHOES):
            assert network.send(to[0], FRAME), "a frame was not taken"
            assert (await heard(network, FrameReceived)).frame == FRAME, "another frame came back"
        await network.fetch(to[0], name, destination, max_bytes=SOAK_FILE_BYTES)
        return _moved(network)


async def _stranger(port: int) -> None:
    """Somebody who knocks at the wrong door, and waits to be sent away."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as tcp:
        await tcp.send_all(b"GET / HTTP/1.1\r\nHost: " + os.urandom(2048))
        try:
            while await tcp.receive_some():
                pass
        except trio.BrokenResourceError:
            pass  # closed with our bytes unread
