"""One stream's two windows and what waits in memory on either side."""

from __future__ import annotations

import random
import sys

import pytest

from p2pfed.network.flow import INITIAL_WINDOW, Flow

MIB = 1 << 20


def arrive(flow: Flow, data: bytes, record: int = 0) -> None:
    """What the muxer does with a frame of a longer record: counts its header, keeps its body."""
    flow.expect(len(data))
    assert flow.window >= 0
    record = max(record, len(data))
    flow.keep(memoryview(bytearray(data.ljust(record)))[: len(data)], record)


def memory_of(flow: Flow) -> int:
    """Bytes that hold what waits to be read, the records behind views included."""
    behind = {id(piece.obj): piece.obj for piece in flow.inbox if isinstance(piece, memoryview)}
    return (
        sys.getsizeof(flow.inbox)
        + sum(map(sys.getsizeof, flow.inbox))
        + sum(map(sys.getsizeof, behind.values()))
    )


def everything_in(flow: Flow, most: int = 1 << 30) -> bytes:
    taken = b""
    while flow.held:
        taken += bytes(flow.take(most))
    return taken


# -- sending ---------------------------------------------------------------------------------------


def test_nothing_is_emitted_beyond_the_peers_window():
    flow = Flow(1)
    flow.push(bytes(INITIAL_WINDOW + 1))
    assert len(flow.emit(1 << 30)) == INITIAL_WINDOW
    assert not flow.may_send
    flow.credit += 1
    assert flow.may_send
    assert len(flow.emit(1 << 30)) == 1


def test_what_is_emitted_is_what_was_pushed_in_order():
    rng = random.Random(1)
    flow, data = Flow(1), rng.randbytes(100_000)
    flow.push(data)
    emitted = b""
    while flow.may_send:
        emitted += bytes(flow.emit(rng.randint(1, 9000)))
    assert emitted == data


def test_the_end_is_due_only_after_all_that_was_pushed():
    flow = Flow(1, credit=3)
    flow.push(b"12345")
    flow.is_ending = True
    assert bytes(flow.emit(10)) == b"123"
    assert not flow.may_send
    flow.credit = 9
    assert bytes(flow.emit(10)) == b"45"
    assert flow.may_send  # the FIN
    flow.sent_fin = True
    assert not flow.may_send


def test_a_push_that_was_withdrawn_is_not_emitted():
    flow = Flow(1)
    flow.push(b"never mind")
    assert not flow.begun
    flow.withdraw()
    assert not flow.may_send
    flow.push(b"this")
    assert bytes(flow.emit(10)) == b"this"
    assert flow.begun


def test_pushing_twice_at_a_time_is_our_bug():
    flow = Flow(1)
    flow.push(b"one")
    with pytest.raises(AssertionError):
        flow.push(b"two")


# -- receiving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_property_what_came_is_handed_out_in_order_however_it_is_cut(seed):
    rng = random.Random(seed)
    flow, sent, taken = Flow(1), bytearray(), bytearray()
    for _ in range(200):
        if rng.random() < 0.6:
            size = rng.choice([1, rng.randint(1, 100), rng.randint(1, 20_000)])
            data = rng.randbytes(min(size, flow.window))
            if data:
                arrive(flow, data, record=len(data) * rng.randint(1, 4))
                sent += data
        elif flow.held:
            taken += flow.take(rng.choice([1, 7, 5000, 1 << 20]))
            flow.grant(4 * MIB, 16 * MIB)
        assert flow.held == sum(map(len, flow.inbox)) == len(sent) - len(taken)
    assert bytes(taken) + everything_in(flow) == bytes(sent)


@pytest.mark.parametrize(
    ("size", "record"),
    [
        (1, 65_535),  # one byte in a record that is full of pings
        (1, 1),
        (100, 65_535),
        (4095, 65_535),
        (4096, 65_535),
        (4096, 8192),  # the least that is kept with its record
        (20_000, 65_535),
        (65_523, 65_535),
    ],
)
def test_what_came_takes_little_more_memory_than_its_bytes(size, record):
    flow = Flow(1)
    for _ in range(min(4000, INITIAL_WINDOW // size)):
        arrive(flow, bytes(size), record)
    assert memory_of(flow) < 2.1 * flow.held + 1000


@pytest.mark.parametrize("seed", range(5))
def test_property_the_factor_holds_for_a_mixture_that_tries_to_avoid_the_copying(seed):
    """Small pieces between pieces that are kept with their record."""
    rng = random.Random(seed)
    flow = Flow(1)
    while flow.window > 4100:
        for size in (1, 4096):
            arrive(flow, bytes(size), rng.choice([size, 2 * size]))
    assert memory_of(flow) < 2.3 * flow.held


def test_a_piece_is_handed_out_in_part():
    flow = Flow(1)
    arrive(flow, b"abcdef")
    assert [bytes(flow.take(n)) for n in (2, 3, 9)] == [b"ab", b"cde", b"f"]
    assert flow.held == 0


def test_a_piece_handed_out_does_not_change_with_what_comes_later():
    flow = Flow(1)
    arrive(flow, b"abc")
    first = flow.take(2)
    arrive(flow, b"def")
    assert bytes(first) == b"ab"
    assert everything_in(flow) == b"cdef"


# -- the window ------------------------------------------------------------------------------------


def test_the_peer_may_send_more_once_half_of_the_share_was_taken():
    flow = Flow(1)
    arrive(flow, bytes(INITIAL_WINDOW))
    flow.take(INITIAL_WINDOW // 2 - 1)
    assert flow.grant(INITIAL_WINDOW, 0) == (0, 0)
    flow.take(1)
    assert flow.grant(INITIAL_WINDOW, 0) == (0, INITIAL_WINDOW // 2)
    assert flow.window == INITIAL_WINDOW // 2


def test_the_share_doubles_while_the_reader_keeps_up_and_stops_at_the_largest():
    flow = Flow(1)
    shares = []
    for _ in range(6):
        arrive(flow, bytes(flow.window))
        everything_in(flow)
        flow.grant(MIB, 16 * MIB)
        shares.append(flow.share)
    assert shares == [512 * 1024, MIB, MIB, MIB, MIB, MIB]


def test_the_share_does_not_grow_beyond_what_is_free():
    flow = Flow(1)
    arrive(flow, bytes(INITIAL_WINDOW))
    everything_in(flow)
    assert flow.grant(MIB, 1000) == (1000, INITIAL_WINDOW + 1000)
    arrive(flow, bytes(flow.window))
    everything_in(flow)
    assert flow.grant(MIB, -5) == (0, INITIAL_WINDOW + 1000)


def test_nothing_is_granted_to_a_stream_that_has_ended():
    for end in ("is_finished", "is_reset"):
        flow = Flow(1)
        arrive(flow, bytes(INITIAL_WINDOW))
        everything_in(flow)
        setattr(flow, end, True)
        assert flow.grant(MIB, MIB) == (0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_property_window_and_held_never_pass_the_share(seed):
    rng = random.Random(seed)
    flow, free = Flow(1), 3 * MIB
    for _ in range(300):
        if rng.random() < 0.5 and flow.window:
            arrive(flow, bytes(rng.randint(1, flow.window)))
        elif flow.held:
            flow.take(rng.randint(1, flow.held))
            growth, window = flow.grant(MIB, free)
            free -= growth
            assert window >= growth >= 0
        assert flow.window >= 0
        assert flow.window + flow.held <= flow.share <= MIB
    assert flow.share == INITIAL_WINDOW + 3 * MIB - free


def test_what_is_announced_and_has_not_come_is_not_taken_for_read():
    """Else a peer could have a whole window more under way with each long frame."""
    flow = Flow(1)
    arrive(flow, b"x")
    flow.expect(INITIAL_WINDOW - 1)
    flow.take(1)
    assert flow.grant(4 * MIB, 4 * MIB) == (0, 0)


# -- the end ---------------------------------------------------------------------------------------


def test_a_reset_drops_what_waits_both_ways():
    flow = Flow(1)
    arrive(flow, b"unread")
    flow.push(b"unsent")
    flow.drop()
    assert (flow.held, len(flow.inbox), flow.may_send, flow.is_reset) == (0, 0, False, True)


def test_a_stream_is_over_when_both_have_ended_and_all_is_read():
    flow = Flow(1)
    arrive(flow, b"x")
    flow.is_finished = True
    assert not flow.is_over
    flow.sent_fin = True
    assert not flow.is_over
    flow.take(1)
    assert flow.is_over
