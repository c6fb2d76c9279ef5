"""Links over a wire in memory and a virtual clock: streams, cancellation, order, and every end."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import struct

import pytest
import trio
from memory_wire import channels
from trio.testing import wait_all_tasks_blocked

from p2pfed.errors import PeerUnreachable, RemoteProtocolError
from p2pfed.network import multistream
from p2pfed.network.flow import INITIAL_WINDOW
from p2pfed.network.limits import Limits
from p2pfed.network.link import Link
from p2pfed.network.pace import Pace

TALK = "/talk/1"
MIB = 1 << 20
LONG = 5000  # virtual seconds; what is not over by then never will be


async def idle(link: Link) -> None:
    await trio.sleep_forever()


@contextlib.asynccontextmanager
async def linked(*, limits: Limits | None = None, pace: Pace | None = None, room: int = 1 << 30):
    """Two links that run, the dialler's first."""
    limits = limits or Limits()
    dialled, listening = channels(room)
    one = Link(dialled, inbound=False, limits=limits, pace=pace or Pace())
    other = Link(listening, inbound=True, limits=limits, pace=Pace())
    with trio.fail_after(LONG):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.run, idle)
            nursery.start_soon(other.run, idle)
            await wait_all_tasks_blocked()
            yield one, other
            nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def alone(limits: Limits | None = None):
    """A link that runs, and the other end of its connection as records."""
    dialled, listening = channels()
    link = Link(dialled, inbound=False, limits=limits or Limits(), pace=Pace())
    with trio.fail_after(LONG):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.run, idle)
            await wait_all_tasks_blocked()
            yield link, listening
            nursery.cancel_scope.cancel()


async def talk(one: Link, other: Link, *, urgent: bool = False):
    """Open a stream; returns both ends."""
    ends = []

    async def accept() -> None:
        stream = await other.accept()
        assert await multistream.accept(stream, (TALK,), stall=5) == TALK
        ends.append(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        stream = await one.open(TALK, urgent=urgent)
    return stream, ends[0]


async def read_exactly(stream, count: int, most: int = MIB) -> bytes:
    held = bytearray()
    while len(held) < count:
        piece = await stream.read(min(most, count - len(held)))
        assert piece, "the stream ended"
        held += piece
    return bytes(held)


def frame(kind: int, flags: int, stream: int, body: bytes = b"", length: int | None = None):
    size = len(body) if length is None else length
    return struct.pack("!BBHII", 0, kind, flags, stream, size) + body


# -- streams ---------------------------------------------------------------------------------------


async def test_what_is_written_is_read_both_ways(autojump_clock):
    async with linked() as (one, other):
        ours, theirs = await talk(one, other)
        data = random.Random(1).randbytes(3 * MIB)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.write, data)
            assert await read_exactly(theirs, len(data)) == data
        await theirs.write(b"thanks")
        assert await read_exactly(ours, 6) == b"thanks"


async def test_a_clean_end_is_read_as_one_and_the_stream_is_forgotten_by_both(autojump_clock):
    async with linked() as (one, other):
        ours, theirs = await talk(one, other)
        await ours.write(b"bye")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.finish, 5)
            assert await read_exactly(theirs, 3) == b"bye"
            assert await theirs.read(1) == b""
            assert await theirs.read(1) == b""
            await theirs.finish(5)
        assert one._muxer.flows == other._muxer.flows == []
        assert trio.current_time() < 1


async def test_finishing_with_a_peer_that_does_not_takes_its_time_and_no_more(autojump_clock):
    async with linked() as (one, other):
        ours, _ = await talk(one, other)
        began = trio.current_time()
        await ours.finish(5)
        assert trio.current_time() - began == pytest.approx(5)
        assert one._muxer.flows == []


async def test_a_reset_is_read_as_one_and_writing_fails(autojump_clock):
    async with linked() as (one, other):
        ours, theirs = await talk(one, other)
        await ours.write(b"x")
        ours.discard()
        await trio.sleep(0.1)
        with pytest.raises(PeerUnreachable, match="reset"):
            await theirs.read(1)
        with pytest.raises(PeerUnreachable):
            await theirs.write(b"y")


async def test_opening_without_an_answer_is_given_up_and_the_stream_reset(autojump_clock):
    async with linked() as (one, _):
        began = trio.current_time()
        with pytest.raises(PeerUnreachable, match="opening"):
            await one.open(TALK)
        assert trio.current_time() - began == pytest.approx(Limits().open_seconds)
        assert one._muxer.flows == []
        assert not one.is_over


async def test_opening_what_the_peer_does_not_speak_says_so(autojump_clock):
    async with linked() as (one, other), trio.open_nursery() as nursery:

        async def refuse() -> None:
            with pytest.raises(PeerUnreachable):
                await multistream.accept(await other.accept(), (), stall=5)

        nursery.start_soon(refuse)
        with pytest.raises(RemoteProtocolError, match="does not speak"):
            await one.open(TALK)


async def test_more_streams_than_may_be_are_refused_here_and_reset_there(autojump_clock):
    async with linked(limits=Limits(streams=3)) as (one, other):
        for _ in range(3):
            await one.open(TALK, one_way=True)
        with pytest.raises(PeerUnreachable, match="no further stream"):
            await one.open(TALK, one_way=True)
        assert not other.is_over


# -- cancellation ----------------------------------------------------------------------------------


async def test_a_write_cancelled_before_it_was_sent_leaves_its_stream_whole(autojump_clock):
    async with linked() as (one, other):
        ours, theirs = await talk(one, other)
        await ours.write(bytes(ours._flow.credit))  # the window is closed now
        await trio.sleep(0.1)
        held = theirs._flow.held
        with trio.move_on_after(1) as scope:
            await ours.write(b"never mind")
        assert scope.cancelled_caught
        assert await read_exactly(theirs, held) == bytes(held)
        await ours.write(b"this")
        assert await read_exactly(theirs, 4) == b"this"


async def test_a_write_in_a_scope_that_is_over_sends_nothing(autojump_clock):
    async with linked() as (one, other):
        ours, theirs = await talk(one, other)
        with trio.CancelScope() as scope:
            scope.cancel()
            await ours.write(b"never mind")
        assert scope.cancelled_caught
        await ours.write(b"this")
        assert bytes(await theirs.read(99)) == b"this"


async def test_a_write_cancelled_half_way_resets_its_stream_and_nothing_else(autojump_clock):
    async with linked() as (one, other):
        ours, theirs = await talk(one, other)
        with trio.move_on_after(1) as scope:
            await ours.write(bytes(2 * INITIAL_WINDOW))
        assert scope.cancelled_caught
        await trio.sleep(0.1)
        with pytest.raises(PeerUnreachable, match="reset"):
            await read_exactly(theirs, 2 * INITIAL_WINDOW)
        assert not one.is_over
        ours, theirs = await talk(one, other)
        await ours.write(b"another")
        assert bytes(await theirs.read(99)) == b"another"


async def test_twenty_writes_cancelled_at_any_time_harm_no_other_stream(autojump_clock):
    rng = random.Random(7)
    async with linked(room=100_000) as (one, other):
        other.wire.piece = 30_000
        one.wire.rate = 20e6
        steady, heard = await talk(one, other)
        data = rng.randbytes(2 * MIB)
        resets = 0
        async with trio.open_nursery() as nursery:

            async def hear() -> None:
                got = await read_exactly(heard, len(data))
                assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()

            nursery.start_soon(steady.write, data)
            nursery.start_soon(hear)
            for _ in range(20):
                ours, _ = await talk(one, other)
                with trio.move_on_after(rng.uniform(0, 0.05)):
                    await ours.write(bytes(rng.choice([100, 100_000, MIB, MIB])))
                resets += ours._flow.is_reset
                ours.discard()
        assert resets >= 5
        assert not one.broke_protocol
        assert not other.broke_protocol
        ours, theirs = await talk(one, other)
        await ours.write(b"fine")
        assert bytes(await theirs.read(99)) == b"fine"


async def test_a_read_cancelled_while_it_waits_loses_nothing(autojump_clock):
    async with linked() as (one, other):
        ours, theirs = await talk(one, other)
        with trio.move_on_after(1):
            await theirs.read(99)
        await ours.write(b"whole")
        assert bytes(await theirs.read(99)) == b"whole"


async def test_a_read_in_a_scope_that_is_over_takes_nothing(autojump_clock):
    async with linked() as (one, other):
        ours, theirs = await talk(one, other)
        await ours.write(b"whole")
        await trio.sleep(0.1)
        with trio.CancelScope() as scope:
            scope.cancel()
            await theirs.read(99)
        assert scope.cancelled_caught
        with trio.fail_after(5):
            assert bytes(await theirs.read(99)) == b"whole"


# -- order and pace --------------------------------------------------------------------------------


async def test_urgent_goes_before_bulk_and_waits_for_at_most_one_batch(autojump_clock):
    async with linked() as (one, other):
        bulk, _ = await talk(one, other)
        urgent, heard = await talk(one, other, urgent=True)
        one.wire.rate = 1e6  # a batch of four records takes a quarter of a second
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bulk.write, bytes(MIB))
            await trio.sleep(0.001)
            began = trio.current_time()
            await urgent.write(b"now")
            assert await read_exactly(heard, 3) == b"now"
            assert trio.current_time() - began < 0.3
            nursery.cancel_scope.cancel()


async def test_on_a_slow_connection_urgent_waits_for_one_record(autojump_clock):
    async with linked() as (one, other):
        bulk, theirs = await talk(one, other)
        urgent, heard = await talk(one, other, urgent=True)
        one.wire.rate = 200_000.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bulk.write, bytes(4 * MIB))
            nursery.start_soon(read_exactly, theirs, 4 * MIB)
            waits = []
            for _ in range(10):
                await trio.sleep(2)
                began = trio.current_time()
                await urgent.write(b"now")
                await read_exactly(heard, 3)
                waits.append(trio.current_time() - began)
            assert max(waits) < 65_600 / 200_000 + 0.01
            nursery.cancel_scope.cancel()


async def test_two_bulk_streams_share_the_connection(autojump_clock):
    async with linked() as (one, other):
        one.wire.rate = 1e6
        pairs = [await talk(one, other) for _ in range(2)]
        counts = [0, 0]

        async def count(number: int, stream) -> None:
            while True:
                counts[number] += len(await stream.read(MIB))

        async with trio.open_nursery() as nursery:
            for number, (ours, theirs) in enumerate(pairs):
                nursery.start_soon(ours.write, bytes(32 * MIB))
                nursery.start_soon(count, number, theirs)
            await trio.sleep(8)
            nursery.cancel_scope.cancel()
        assert min(counts) > 3.5e6
        assert max(counts) - min(counts) <= 4 * 65_536


@pytest.mark.parametrize("rate", [50_000, 500_000])
async def test_bulk_keeps_to_the_cap_within_a_tenth_and_urgent_does_not_wait(autojump_clock, rate):
    async with linked(pace=Pace(rate)) as (one, other):
        bulk, theirs = await talk(one, other)
        urgent, heard = await talk(one, other, urgent=True)
        count, waits = 0, []
        seconds = 10_000_000 / rate + 10  # a batch, which may overdraw, is a twentieth

        async def read() -> None:
            nonlocal count
            while True:
                count += len(await theirs.read(MIB))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(bulk.write, bytes(int(2 * rate * seconds)))
            nursery.start_soon(read)
            until = trio.current_time() + seconds
            while trio.current_time() < until:
                began = trio.current_time()
                await urgent.write(b"now")
                await read_exactly(heard, 3)
                waits.append(trio.current_time() - began)
                await trio.sleep(1)
            nursery.cancel_scope.cancel()
        assert count / seconds == pytest.approx(rate, rel=0.1)
        assert max(waits) < 0.01


async def test_a_cap_is_over_all_links_together(autojump_clock):
    pace, rate = Pace(1_000_000), 1_000_000
    async with linked(pace=pace) as (one, two), linked(pace=pace) as (three, four):
        counts = [0, 0]

        async def count(number: int, stream) -> None:
            while True:
                counts[number] += len(await stream.read(MIB))

        async with trio.open_nursery() as nursery:
            for number, (source, target) in enumerate(((one, two), (three, four))):
                ours, theirs = await talk(source, target)
                nursery.start_soon(ours.write, bytes(64 * MIB))
                nursery.start_soon(count, number, theirs)
            await trio.sleep(16)
            nursery.cancel_scope.cancel()
        assert sum(counts) == pytest.approx(16 * rate, rel=0.1)
        assert min(counts) > 0.2 * sum(counts)


# -- a peer that is slow, silent or gone -----------------------------------------------------------


async def test_a_reader_that_stalls_for_an_hour_keeps_its_stream_and_holds_one_window(
    autojump_clock,
):
    async with linked(limits=Limits(ping_seconds=30)) as (one, other):
        ours, theirs = await talk(one, other)
        data = random.Random(2).randbytes(MIB)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.write, data)
            await trio.sleep(3600)
            assert theirs._flow.held <= INITIAL_WINDOW
            assert not one.is_over
            assert await read_exactly(theirs, MIB) == data


async def test_a_stalled_reader_holds_nobody_else_up(autojump_clock):
    async with linked() as (one, other):
        stalled, _ = await talk(one, other)
        quick, heard = await talk(one, other)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stalled.write, bytes(MIB))
            nursery.start_soon(quick.write, bytes(2 * MIB))
            with trio.fail_after(1):
                await read_exactly(heard, 2 * MIB)
            nursery.cancel_scope.cancel()


async def test_the_end_of_the_connection_is_a_reset_and_never_a_clean_end(autojump_clock):
    async with linked() as (one, other):
        ours, theirs = await talk(one, other)
        await ours.write(b"all of it?")
        await trio.sleep(0.1)
        one.wire.abort()
        await other.done.wait()
        assert bytes(await theirs.read(99)) == b"all of it?"
        with pytest.raises(PeerUnreachable, match="ended"):
            await theirs.read(99)


async def test_a_link_that_is_killed_wakes_whoever_reads_writes_accepts_or_opens(autojump_clock):
    async with linked() as (one, other):
        reader, _ = await talk(one, other)
        writer, _ = await talk(one, other)
        woken = []

        async def fails(name, work, *args) -> None:
            with pytest.raises(PeerUnreachable):
                await work(*args)
            woken.append(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails, "reader", reader.read, 1)
            nursery.start_soon(fails, "writer", writer.write, bytes(MIB))
            nursery.start_soon(fails, "acceptor", one.accept)
            nursery.start_soon(fails, "opener", one.open, TALK)
            await trio.sleep(1)
            assert woken == []
            one.abort()
            with trio.fail_after(0.1):
                await one.done.wait()
                while len(woken) < 4:  # noqa: ASYNC110
                    await trio.sleep(0.01)
        for work, args in ((one.open, (TALK,)), (one.accept, ()), (writer.write, (b"x",))):
            with pytest.raises(PeerUnreachable):
                await work(*args)


async def test_a_batch_that_nobody_takes_ends_the_link_after_its_time(autojump_clock):
    async with alone(Limits(stall_seconds=20)) as (one, _):
        one.wire.is_stuck = True
        one._muxer.ping(5)
        one.flush()
        await one.done.wait()
        assert trio.current_time() == pytest.approx(20, abs=0.1)


async def test_a_peer_that_says_nothing_is_found_out(autojump_clock):
    async with alone() as (one, _):
        await one.done.wait()
        assert trio.current_time() == pytest.approx(Limits().idle_seconds, abs=0.1)
        assert one.rtt is None


async def test_a_peer_that_trickles_bytes_is_not_taken_for_dead(autojump_clock):
    async with alone() as (one, peer):
        for _ in range(30):
            await trio.sleep(20)
            await peer.send([(b"", frame(2, 2, 0, length=10**9))])
        assert not one.is_over


async def test_the_round_trip_time_is_measured_again_and_again(autojump_clock):
    async with linked() as (one, other):
        one.wire.rate = other.wire.rate = 30 / 0.25  # a ping and its record have 30 bytes
        await trio.sleep(30)
        assert one.rtt == pytest.approx(0.5, abs=0.3)
        one.wire.rate = other.wire.rate = 30 / 1.0
        await trio.sleep(30)
        assert one.rtt == pytest.approx(2.0, abs=1.0)


async def test_ending_a_link_whose_peer_is_frozen_does_not_block(autojump_clock):
    async with linked() as (one, _):
        one.wire.is_stuck = True
        one._muxer.ping(5)
        one.flush()
        await trio.sleep(1)
        with trio.fail_after(0.1):
            one.abort()
            await one.done.wait()


async def test_a_peer_that_says_it_goes_is_let_go(autojump_clock):
    async with alone() as (one, peer):
        await peer.send([(b"", frame(3, 0, 0))])
        with trio.fail_after(0.1):
            await one.done.wait()
        assert not one.broke_protocol


# -- breaches and failures -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"\x07" * 12,
        frame(0, 0, 1, b"x"),
        frame(1, 1, 2) + frame(0, 0, 2, length=2**32 - 1),
        frame(2, 1, 0) * 600,
        b"".join(frame(1, 1, number) for number in range(2, 2000, 2)),
    ],
)
async def test_a_breach_of_yamux_ends_the_link_and_is_counted(autojump_clock, body, caplog):
    async with alone() as (one, peer):
        await peer.send([(b"", body)])
        with trio.fail_after(0.1):
            await one.done.wait()
        assert one.broke_protocol
        assert "broke the protocol" in caplog.text


async def test_a_record_that_was_changed_ends_the_link_and_is_counted(autojump_clock):
    async with alone() as (one, peer):
        data = bytearray(peer.seal([(frame(2, 1, 0), b"")]))
        data[-1] ^= 1
        await peer.wire.write(data)
        with trio.fail_after(0.1):
            await one.done.wait()
        assert one.broke_protocol


async def test_a_task_that_fails_ends_its_link_and_nothing_else(autojump_clock, caplog):
    async with linked() as (one, other):

        async def fail() -> None:
            raise ZeroDivisionError

        one.spawn(fail)
        with trio.fail_after(0.1):
            await one.done.wait()
            await other.done.wait()
        assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_a_task_that_meets_the_peers_failure_ends_alone(autojump_clock):
    async with linked() as (one, _):

        async def fail() -> None:
            raise PeerUnreachable("a stream was reset")

        one.spawn(fail)
        await trio.sleep(1)
        assert not one.is_over


async def test_what_is_settled_and_done_is_told_when_the_link_ends(autojump_clock):
    async with linked() as (one, _):
        one.abort()
        await one.settled.wait()
        await one.done.wait()
        assert one.is_over


# -- memory ----------------------------------------------------------------------------------------


async def test_a_link_that_is_quiet_after_much_traffic_holds_little(autojump_clock):
    async with linked() as (one, other):
        ours, theirs = await talk(one, other)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.write, bytes(4 * MIB))
            await read_exactly(theirs, 4 * MIB)
        await trio.sleep(2 * Limits().ping_seconds)
        for link in (one, other):
            held = link._channel
            assert len(held._sealer._out) + len(held._opener._in) < 20_000


async def test_a_peer_that_opens_streams_and_sends_what_it_may_is_held_to_its_windows(
    autojump_clock,
):
    limits = Limits(streams=4, unread_bytes=8 * INITIAL_WINDOW)
    async with alone(limits) as (one, peer):
        for number in (2, 4, 6, 8):
            await peer.send([(b"", frame(1, 1, number))])
            for _ in range(4):
                await peer.send([(b"", frame(0, 0, number, bytes(65_000)))])
        await trio.sleep(1)
        assert not one.is_over
        assert sum(flow.held for flow in one._muxer.flows) == 4 * 260_000
        await peer.send([(b"", frame(0, 0, 8, bytes(65_000)))])
        with trio.fail_after(0.1):
            await one.done.wait()
        assert one.broke_protocol
