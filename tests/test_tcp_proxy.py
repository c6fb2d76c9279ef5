"""The TCP proxy does to bytes what it says: its ways on a virtual clock, the proxy on loopback."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio
from tcp_proxy import WINDOW, Way, open_proxy
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

TEXT = bytes(range(256)) * 4


@asynccontextmanager
async def a_way(seed=0):
    """A way on the virtual clock: what enters it, itself, and where it leads."""
    near, entry = memory_stream_pair()
    leaving, far = memory_stream_pair()
    way = Way(seed)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(way.carry, entry, leaving)
        yield near, way, far
        nursery.cancel_scope.cancel()


async def received(stream, count):
    data = b""
    while len(data) < count:
        data += await stream.receive_some(count - len(data))
    return data


async def until(condition):
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - the proxy has no event for it
            await trio.sleep(0.001)


async def seconds_until(stream, count):
    began = trio.current_time()
    await received(stream, count)
    return trio.current_time() - began


async def test_without_faults_bytes_come_at_once_and_the_end_comes_after_them(autojump_clock):
    async with a_way() as (near, _, far):
        await near.send_all(TEXT)
        await near.send_eof()
        assert await received(far, len(TEXT)) == TEXT
        assert await far.receive_some(1) == b""
        assert trio.current_time() == 0


async def test_latency_delays_each_byte_and_not_one_after_the_other(autojump_clock):
    async with a_way() as (near, way, far):
        way.latency = 0.25
        for _ in range(3):
            await near.send_all(b"x")
            await wait_all_tasks_blocked()
        assert await seconds_until(far, 3) == pytest.approx(0.25)
        await near.send_eof()
        await far.receive_some(1)
        assert trio.current_time() == pytest.approx(0.5)


async def test_jitter_is_bounded_and_changes_no_order(autojump_clock):
    delays, everything = [], b""
    async with a_way() as (near, way, far):
        way.latency, way.jitter = 0.1, 0.4
        for number in range(20):
            began = trio.current_time()
            await near.send_all(bytes([number]))
            everything += await received(far, 1)
            delays.append(trio.current_time() - began)
        for number in range(20, 40):
            await near.send_all(bytes([number]))
            await wait_all_tasks_blocked()
        everything += await received(far, 20)
    assert everything == bytes(range(40))
    assert 0.1 <= min(delays) < 0.25
    assert 0.4 < max(delays) <= 0.5


async def test_a_rate_holds_on_the_whole(autojump_clock):
    async with a_way() as (near, way, far):
        way.rate = 10_000
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.send_all, bytes(50_000))
            assert await seconds_until(far, 50_000) == pytest.approx(5)
        assert way.carried == 50_000


async def test_a_black_hole_tells_nobody_and_after_healing_all_arrives(autojump_clock):
    async with a_way() as (near, way, far):
        way.black_hole()
        await near.send_all(TEXT)
        with trio.move_on_after(3600) as patience:
            await far.receive_some(1)
        assert patience.cancelled_caught
        way.heal()
        assert await received(far, len(TEXT)) == TEXT
        assert trio.current_time() == 3600


async def test_a_stall_ends_by_itself_or_by_healing(autojump_clock):
    async with a_way() as (near, way, far):
        for healed_after, seconds in ((None, 3), (1, 1)):
            way.stall(3)
            await near.send_all(b"x")
            async with trio.open_nursery() as nursery:
                if healed_after is not None:

                    async def heal():
                        await trio.sleep(1)
                        way.heal()

                    nursery.start_soon(heal)
                assert await seconds_until(far, 1) == pytest.approx(seconds)


async def test_behind_a_black_hole_a_sender_is_stopped_in_the_end(autojump_clock):
    near, entry = trio.testing.lockstep_stream_pair()
    leaving, far = memory_stream_pair()
    way, sent = Way(), 0
    way.black_hole()

    async def send():
        nonlocal sent
        while True:
            await near.send_all(b"x")
            sent += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(way.carry, entry, leaving)
        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        assert WINDOW <= sent <= WINDOW + 3
        way.heal()
        await received(far, sent + 10)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("share", "least", "most"), [(0.01, 60, 140), (1.0, 10_000, 10_000)])
async def test_bits_are_flipped_one_in_a_byte_and_by_the_seed(autojump_clock, share, least, most):
    runs = []
    for seed in (1, 1, 2):
        async with a_way(seed) as (near, way, far):
            way.flips = share
            await near.send_all(bytes(10_000))
            runs.append(await received(far, 10_000))
    for run in runs:
        assert least <= sum(byte != 0 for byte in run) <= most
        assert {byte.bit_count() for byte in run} <= {0, 1}
    assert runs[0] == runs[1] != runs[2]


# --- on loopback -------------------------------------------------------------------------------


@asynccontextmanager
async def an_echo():
    """A proxy before an echo server."""

    async def echo(stream):
        async with stream:
            try:
                while data := await stream.receive_some(65536):
                    await stream.send_all(data)
            except trio.BrokenResourceError:
                broken.set()

    broken = trio.Event()
    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, echo, [listener])
        async with open_proxy("127.0.0.1", listener.socket.getsockname()[1]) as proxy:
            yield proxy, broken
        nursery.cancel_scope.cancel()


async def dialled(proxy):
    return await trio.open_tcp_stream("127.0.0.1", proxy.port)


async def test_a_connection_goes_through_and_ends_when_both_sides_have_said_so():
    async with an_echo() as (proxy, _):
        async with await dialled(proxy) as stream:
            await stream.send_all(TEXT)
            assert await received(stream, len(TEXT)) == TEXT
            assert (proxy.up.carried, proxy.down.carried) == (len(TEXT), len(TEXT))
            assert proxy.connections == 1
            await stream.send_eof()
            assert await stream.receive_some(1) == b""
        await until(lambda: not proxy.connections)


async def test_each_way_can_be_a_black_hole_alone():
    async with an_echo() as (proxy, _), await dialled(proxy) as stream:
        proxy.down.black_hole()
        await stream.send_all(b"there")
        await until(lambda: proxy.up.carried == 5)
        with trio.move_on_after(0.05) as patience:
            await stream.receive_some(1)
        assert patience.cancelled_caught
        proxy.heal()
        assert await received(stream, 5) == b"there"
        proxy.up.black_hole()
        await stream.send_all(b"never")
        with trio.move_on_after(0.05) as patience:
            await stream.receive_some(1)
        assert patience.cancelled_caught
        assert proxy.up.carried == 5


async def test_a_reset_breaks_both_sides_and_the_next_connection_is_served():
    async with an_echo() as (proxy, broken):
        async with await dialled(proxy) as stream:
            await stream.send_all(b"x")
            await received(stream, 1)
            proxy.reset()
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some(1)
            with trio.fail_after(30):
                await broken.wait()
        async with await dialled(proxy) as stream:
            await stream.send_all(b"y")
            assert await received(stream, 1) == b"y"


async def test_before_a_target_that_does_not_listen_the_connection_just_ends():
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    async with open_proxy("127.0.0.1", port) as proxy, await dialled(proxy) as stream:
        assert await stream.receive_some(1) == b""
