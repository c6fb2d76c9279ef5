"""Members behind firewalls: links through relays, on real loopback sockets in one process."""

from __future__ import annotations

import contextlib
import dataclasses
import os

import pytest
import trio
from test_network_peers import IDS, LOOPBACK, SEEDS, Gate

from p2pfed.network import (
    AddressesChanged,
    FrameReceived,
    Limits,
    PeerConnected,
    PeerDisconnected,
    open_network,
)

pytestmark = pytest.mark.slow

QUICK = Limits(redial_first=0.05, redial_most=0.5, grace_seconds=0.2, direct_seconds=0.5)
HOSPITALS = "abrs"  # r and s are relays


class Heard:
    """Takes in what a network tells."""

    def __init__(self, network) -> None:
        self.network = network
        self.frames: dict[str, list[bytes]] = {}
        self.addresses: list[str] = network.addresses()
        self.lost: list[str] = []

    async def listen(self) -> None:
        async for event in self.network.events:
            match event:
                case FrameReceived(peer, frame):
                    self.frames.setdefault(peer, []).append(frame)
                case AddressesChanged(addresses):
                    self.addresses = list(addresses)
                case PeerDisconnected(peer):
                    self.lost.append(peer)
                case PeerConnected():
                    pass


async def until(condition, seconds: float = 10.0) -> None:
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - counters have no event
            await trio.sleep(0.01)


@contextlib.asynccontextmanager
async def hospital(name: str, nursery, gate: Gate | None = None, **options):
    options.setdefault("limits", QUICK)
    options.setdefault("listen", [])
    async with open_network(
        seed=SEEDS[name], gatekeeper=gate or Gate(HOSPITALS), **options
    ) as network:
        heard = Heard(network)
        nursery.start_soon(heard.listen)
        yield heard
        nursery.cancel_scope.cancel()


def relay(name: str, nursery, gate: Gate | None = None):
    return hospital(name, nursery, gate, listen=LOOPBACK, relay=True)


@contextlib.asynccontextmanager
async def firewalled_pair(*relays: str, gate: Gate | None = None):
    """a and b, which listen on nothing, and relays; b is reached through each relay."""
    async with contextlib.AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        hops = {n: await stack.enter_async_context(relay(n, nursery, gate)) for n in relays}
        a = await stack.enter_async_context(hospital("a", nursery, gate))
        b = await stack.enter_async_context(hospital("b", nursery, gate))
        for end in (a, b):
            for hop in hops.values():
                end.network.keep_connected(hop.network.peer_id, hop.network.addresses())
        await until(lambda: len(b.addresses) == len(relays))
        assert all("/p2p-circuit/p2p/" in address for address in b.addresses)
        a.network.keep_connected(IDS["b"], b.addresses)
        await until(lambda: a.network.stats(IDS["b"]).direction)
        await until(lambda: b.network.stats(IDS["a"]).direction)
        yield a, b, hops


async def test_two_members_that_only_dial_out_talk_through_a_relay_that_sees_no_frame():
    big = os.urandom(1 << 20)
    async with firewalled_pair("r") as (a, b, hops):
        assert a.network.stats(IDS["b"]).via == IDS["r"]
        assert b.network.stats(IDS["a"]).via == IDS["r"]
        assert a.network.send(IDS["b"], b"hello")
        assert b.network.send(IDS["a"], big)
        await until(lambda: b.frames.get(IDS["a"]) == [b"hello"])
        await until(lambda: a.frames.get(IDS["b"]) == [big])
        totals = hops["r"].network.totals()
        assert totals.circuits == 1
        assert totals.relayed_bytes > len(big)
        assert not hops["r"].frames


async def test_when_the_relay_dies_the_members_meet_through_another_one():
    async with (
        trio.open_nursery() as nursery,
        relay("s", nursery) as other,
        hospital("a", nursery) as a,
        hospital("b", nursery) as b,
    ):
        async with trio.open_nursery() as first, relay("r", first) as dying:
            for end in (a, b):
                for hop in (dying, other):
                    end.network.keep_connected(hop.network.peer_id, hop.network.addresses())
            await until(lambda: len(b.addresses) == 2)
            through_r = [address for address in b.addresses if IDS["r"] in address]
            a.network.keep_connected(IDS["b"], through_r)
            await until(lambda: a.network.stats(IDS["b"]).via == IDS["r"])
            await until(lambda: b.network.stats(IDS["a"]).via == IDS["r"])
            assert a.network.send(IDS["b"], b"before")
            await until(lambda: b.frames.get(IDS["a"]) == [b"before"])
        # Nobody has told a that b is reached through s too: it tries the members at hand.
        await until(lambda: a.network.stats(IDS["b"]).via == IDS["s"], 5.0)
        assert a.lost
        await until(lambda: a.network.send(IDS["b"], b"after"), 5.0)
        await until(lambda: b"after" in b.frames[IDS["a"]])


async def test_a_circuit_gives_way_to_a_direct_connection_without_a_loss():
    async with firewalled_pair("r") as (a, b, _):
        # b's firewall is opened: it listens from now on.
        (bound,) = await b.network._host.listen(LOOPBACK, b.network._carry, b.network._nursery)
        a.network.keep_connected(IDS["b"], [*b.addresses, bound])
        for number in range(200):
            assert a.network.send(IDS["b"], b"%d" % number)
            await trio.sleep(0.01)
            if number > 20 and not a.network.stats(IDS["b"]).via:
                break
        assert a.network.stats(IDS["b"]).via == ""
        await until(lambda: len(set(b.frames[IDS["a"]])) == number + 1)
        assert not a.lost
        assert not b.lost


async def test_when_the_relay_dies_both_ends_know_it_as_often_as_it_happens():
    """The end that was dialled, too: it would dial nobody whom it believes to be connected."""
    async with (
        trio.open_nursery() as nursery,
        hospital("a", nursery) as a,
        hospital("b", nursery) as b,
    ):
        for times in range(1, QUICK.links_per_peer + 2):
            async with trio.open_nursery() as life, relay("r", life) as hop:
                for end in (a, b):
                    end.network.keep_connected(IDS["r"], hop.network.addresses())
                await until(lambda: len(b.addresses) == 1)
                a.network.keep_connected(IDS["b"], b.addresses)
                await until(lambda: a.network.stats(IDS["b"]).direction == "outbound")
                await until(lambda: b.network.stats(IDS["a"]).direction == "inbound")
            await until(lambda: not a.network.stats(IDS["b"]).direction, 5.0)
            await until(lambda: not b.network.stats(IDS["a"]).direction, 5.0)
            await until(lambda n=times: b.lost.count(IDS["a"]) == n, 5.0)


async def test_a_relay_that_comes_back_by_a_circuit_is_dialled_directly_at_once():
    """Else it would be asked for a place only when the circuit is next looked at."""
    patient = dataclasses.replace(QUICK, direct_seconds=60.0)
    async with (
        trio.open_nursery() as nursery,
        relay("s", nursery) as other,
        hospital("a", nursery, limits=patient) as a,
        relay("r", nursery) as back,
    ):
        a.network.keep_connected(IDS["s"], other.network.addresses())
        back.network.keep_connected(IDS["s"], other.network.addresses())
        await until(lambda: len(a.addresses) == 1)
        back.network.keep_connected(IDS["a"], a.addresses)
        await until(lambda: a.network.stats(IDS["r"]).via == IDS["s"])
        a.network.keep_connected(IDS["r"], back.network.addresses())
        await until(lambda: a.network.stats(IDS["r"]).direction == "outbound", 5.0)
        await until(lambda: len(a.addresses) == 2, 5.0)


async def test_a_member_that_is_revoked_loses_its_circuits():
    gate = Gate(HOSPITALS)
    async with firewalled_pair("r", gate=gate) as (a, _, hops):
        gate.members.remove(IDS["b"])
        await hops["r"].network.recheck()
        await until(lambda: not a.network.stats(IDS["b"]).direction, 5.0)
        assert hops["r"].network.totals().circuits == 0


async def test_a_node_that_others_reach_asks_for_no_relay():
    async with (
        trio.open_nursery() as nursery,
        relay("r", nursery) as hop,
        hospital("a", nursery, listen=LOOPBACK) as a,
    ):
        hop.network.keep_connected(IDS["a"], a.network.addresses())
        await until(lambda: a.network.stats(IDS["r"]).direction == "inbound")
        await trio.sleep(0.3)
        assert not any("p2p-circuit" in address for address in a.network.addresses())


async def test_a_node_that_listens_everywhere_announces_the_address_that_its_links_have():
    async with (
        trio.open_nursery() as nursery,
        hospital("r", nursery, listen=LOOPBACK) as r,
        hospital("a", nursery, listen=["/ip4/0.0.0.0/tcp/0"]) as a,
    ):
        assert a.addresses == []
        a.network.keep_connected(IDS["r"], r.network.addresses())
        await until(lambda: len(a.addresses) == 1)
        assert a.addresses[0].startswith("/ip4/127.0.0.1/tcp/")
        r.network.keep_connected(IDS["a"], a.addresses)
        await r.network.disconnect(IDS["a"])
        await until(lambda: r.network.stats(IDS["a"]).direction)


async def test_who_is_outside_the_allowed_networks_is_neither_heard_nor_dialled():
    async with (
        trio.open_nursery() as nursery,
        hospital("r", nursery, listen=LOOPBACK, allowed_networks=["192.0.2.0/24"]) as r,
        hospital("a", nursery, listen=LOOPBACK) as a,
    ):
        a.network.keep_connected(IDS["r"], r.network.addresses())
        await until(lambda: r.network.totals().refused > 1)
        assert not a.network.stats(IDS["r"]).direction
        a.network.stop_dialling(IDS["r"])
        r.network.keep_connected(IDS["a"], a.network.addresses())
        await trio.sleep(0.3)
        assert not a.network.stats(IDS["r"]).direction
        assert a.network.totals().refused == 0, "not even a connection was made"
