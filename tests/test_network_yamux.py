"""The muxer: two of them joined in memory, and one against frames that no muxer of ours writes."""

from __future__ import annotations

import random
import struct
import sys

import pytest

from p2pfed.errors import PeerUnreachable, RemoteProtocolError
from p2pfed.network.flow import INITIAL_WINDOW
from p2pfed.network.noise import MAX_PLAINTEXT
from p2pfed.network.yamux import Bounds, Muxer

MIB = 1 << 20
DATA, WINDOW, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8


def frame(kind: int, flags: int, stream: int, body: bytes = b"", length: int | None = None):
    size = len(body) if length is None else length
    return struct.pack("!BBHII", 0, kind, flags, stream, size) + body


def records(muxer: Muxer, most: int = 4, **options) -> list[bytearray]:
    """The next batch as the other side gets it: one piece for each record."""
    pieces, _ = muxer.batch(most, **options)
    return [bytearray(head) + bytearray(body) for head, body in pieces]


def frames(muxer: Muxer) -> list[tuple[int, int, int, int]]:
    """All frames to be sent, as (kind, flags, stream, length); bodies are left out."""
    found = []
    while muxer.has_output:
        held = b"".join(records(muxer))
        position = 0
        while position < len(held):
            _, kind, flags, stream, length = struct.unpack_from("!BBHII", held, position)
            found.append((kind, flags, stream, length))
            position += 12 + (length if kind == DATA else 0)
    return found


def hear(muxer: Muxer, *pieces: bytes):
    """Let it receive frames in one record; returns what changed."""
    return muxer.receive(bytearray(b"".join(pieces)))


def listener(**bounds) -> Muxer:
    """The side that was dialled; the peer opens odd streams."""
    return Muxer(initiator=False, bounds=Bounds(**bounds) if bounds else None)


def carry(source: Muxer, target: Muxer) -> None:
    """Bring everything across."""
    while source.has_output:
        for record in records(source):
            target.receive(record)


def pair(**bounds) -> tuple[Muxer, Muxer]:
    held = Bounds(**bounds) if bounds else None
    return Muxer(initiator=True, bounds=held), Muxer(initiator=False, bounds=held)


def joined(*, urgent: bool = False):
    """Two muxers with one stream between them, its ends first."""
    one, other = pair()
    ours = one.open(urgent=urgent)
    carry(one, other)
    carry(other, one)
    return ours, other.opened.popleft(), one, other


def read_all(muxer: Muxer, flow) -> bytes:
    taken = b""
    while flow.held:
        taken += bytes(muxer.take(flow, 1 << 30))
    return taken


def memory_of(muxer: Muxer) -> int:
    """Bytes that hold what waits to be read, the records behind views included."""
    pieces = [piece for flow in muxer.flows for piece in flow.inbox]
    behind = {id(piece.obj): piece.obj for piece in pieces if isinstance(piece, memoryview)}
    return sum(map(sys.getsizeof, [*pieces, *behind.values()]))


# -- two muxers ------------------------------------------------------------------------------------


class Side:
    """One end that opens, pushes, reads and ends streams at random.

    Attributes:
        way: Bytes under way to it.
        flows: Its ends of all streams, by number.
        sent: What it pushed, by number.
        got: What it read, by number.
    """

    def __init__(self, muxer: Muxer, rng: random.Random) -> None:
        self.muxer, self.rng = muxer, rng
        self.way = bytearray()
        self.flows, self.sent, self.got = {}, {}, {}

    def add(self, flow) -> None:
        self.flows[flow.id] = flow
        self.sent[flow.id], self.got[flow.id] = bytearray(), bytearray()

    def work(self, *, is_late: bool) -> None:
        rng, muxer = self.rng, self.muxer
        if len(self.flows) < 6 and not is_late and rng.random() < 0.05:
            self.add(muxer.open(urgent=rng.random() < 0.3))
        while muxer.opened:
            self.add(muxer.opened.popleft())
        for number, flow in self.flows.items():
            if is_late:
                muxer.end(flow)
            elif not flow.outbox:
                data = rng.randbytes(rng.choice([1, 100, 70_000]))
                muxer.push(flow, data)
                self.sent[number] += data
            if flow.held:
                self.got[number] += muxer.take(flow, rng.choice([1, 1000, 1 << 20]))
            assert flow.window >= 0
            assert flow.window + flow.awaited + flow.held <= flow.share <= MIB

    def deliver(self) -> None:
        count = self.rng.choice([1, 11, 12, 13, 5000, 65_519])
        piece = bytearray(self.way[:count])
        del self.way[:count]
        self.muxer.receive(piece)


@pytest.mark.parametrize("seed", range(12))
def test_property_what_is_pushed_arrives_whatever_the_chunks_and_the_schedule(seed):
    rng = random.Random(seed)
    one, other = (Side(muxer, rng) for muxer in pair(streams=6, window=MIB, memory=4 * MIB))
    for turn in range(1_000_000):
        side, peer = rng.choice([(one, other), (other, one)])
        side.work(is_late=turn > 300)
        for record in records(side.muxer, rng.randint(1, 4)):
            peer.way += record
        side.deliver()
        if turn > 300 and not (one.muxer.flows or other.muxer.flows or one.way or other.way):
            break
    assert one.flows.keys() == other.flows.keys()
    assert len(one.flows) >= 6
    assert sum(map(len, one.sent.values())) > 300_000
    for here, there in ((one, other), (other, one)):
        assert here.got == there.sent
        assert all(flow.is_finished and not flow.is_reset for flow in here.flows.values())


def test_a_frame_fills_a_record_exactly():
    ours, _, one, _ = joined()
    one.push(ours, bytes(200_000))
    sizes = [len(record) for record in records(one, 4)]
    assert sizes == [
        MAX_PLAINTEXT,
        MAX_PLAINTEXT,
        MAX_PLAINTEXT,
        200_000 - 3 * (MAX_PLAINTEXT - 12) + 12,
    ]


def test_data_may_go_with_the_opening_before_the_peer_has_agreed():
    one, other = pair()
    flow = one.open()
    one.push(flow, b"early")
    carry(one, other)
    assert read_all(other, other.opened.popleft()) == b"early"


def test_a_stream_ends_cleanly_by_the_peers_end_and_only_after_its_bytes():
    ours, theirs, one, other = joined()
    one.push(ours, b"last words")
    one.end(ours)
    carry(one, other)
    assert theirs.is_finished
    assert not theirs.is_reset
    assert read_all(other, theirs) == b"last words"


def test_an_end_goes_one_way():
    ours, theirs, one, other = joined()
    one.end(ours)
    carry(one, other)
    other.push(theirs, b"I have something left")
    carry(other, one)
    assert read_all(one, ours) == b"I have something left"
    with pytest.raises(PeerUnreachable):
        one.push(ours, b"we have ended")


def test_a_stream_that_both_have_ended_is_forgotten_once_it_is_read():
    ours, theirs, one, other = joined()
    one.push(ours, b"x")
    one.end(ours)
    other.end(theirs)
    carry(one, other)
    carry(other, one)
    assert one.flows == []
    assert other.flows == [theirs]
    other.take(theirs, 1)
    assert other.flows == []


def test_a_reset_is_no_end():
    ours, theirs, one, other = joined()
    one.push(ours, b"lost")
    carry(one, other)
    one.reset(ours)
    carry(one, other)
    assert theirs.is_reset
    assert not theirs.is_finished
    assert theirs.held == 0
    assert one.flows == other.flows == []
    with pytest.raises(PeerUnreachable):
        other.push(theirs, b"x")


def test_a_ping_is_answered_with_its_number():
    one, other = pair()
    one.ping(77)
    carry(one, other)
    carry(other, one)
    assert one.pong == 77
    assert other.pong == -1


def test_who_goes_says_so_and_opens_nothing_more():
    one, other = pair()
    one.part()
    carry(one, other)
    assert other.is_parting
    with pytest.raises(PeerUnreachable):
        other.open()


def test_at_most_so_many_streams_are_open_of_our_side():
    one, _ = pair(streams=3, window=MIB, memory=4 * MIB)
    flows = [one.open() for _ in range(3)]
    with pytest.raises(PeerUnreachable):
        one.open()
    one.reset(flows[0])
    assert one.open().id == 7


def test_the_last_stream_number_is_the_last():
    one, _ = pair()
    one._next_id = 2**32 - 1
    one.open()
    with pytest.raises(PeerUnreachable):
        one.open()


def test_bounds_that_could_not_hold_their_streams_are_our_bug():
    with pytest.raises(ValueError, match="too few"):
        Bounds(streams=10, memory=2 * 10 * INITIAL_WINDOW - 1)


# -- order -----------------------------------------------------------------------------------------


def two_streams():
    """A bulk and an urgent stream, with nothing waiting."""
    one, other = pair()
    bulk, urgent = one.open(), one.open(urgent=True)
    carry(one, other)
    carry(other, one)
    return bulk, urgent, one, other


def test_urgent_goes_before_bulk_that_was_pushed_earlier():
    bulk, urgent, one, _ = two_streams()
    one.push(bulk, bytes(200_000))
    records(one, 1)
    one.push(urgent, b"now")
    assert one.has_urgent
    pieces, drained = one.batch(2)
    assert bytes(pieces[0][1]) == b"now"
    assert drained == [urgent]
    assert len(pieces[1][1]) == MAX_PLAINTEXT - 12


def test_only_urgent_and_control_go_while_bulk_must_wait():
    bulk, urgent, one, _ = two_streams()
    one.push(bulk, b"later")
    one.ping(1)
    assert [len(record) for record in records(one, urgent_only=True)] == [12]
    assert records(one, urgent_only=True) == []
    assert not one.has_urgent
    assert one.has_output
    one.push(urgent, b"now")
    assert [len(record) for record in records(one, urgent_only=True)] == [15]
    assert [len(record) for record in records(one)] == [17]


def test_bulk_streams_take_turns_one_record_each():
    one, other = pair()
    flows = [one.open() for _ in range(3)]
    carry(one, other)
    for flow in flows:
        one.push(flow, bytes(150_000))
    order = [stream for kind, _, stream, _ in frames(one) if kind == DATA]
    assert order == [1, 3, 5, 1, 3, 5, 1, 3, 5]


def test_a_stream_whose_window_is_closed_holds_nobody_up():
    bulk, urgent, one, _ = two_streams()
    one.push(urgent, bytes(INITIAL_WINDOW + 1))
    one.push(bulk, b"mine")
    sent = sum(length for kind, _, stream, length in frames(one) if stream == urgent.id)
    assert sent == INITIAL_WINDOW
    assert not bulk.outbox
    hear(one, frame(WINDOW, 0, urgent.id, length=1))
    assert frames(one) == [(DATA, 0, urgent.id, 1)]


def test_a_push_withdrawn_before_it_was_sent_leaves_the_stream_whole():
    ours, theirs, one, other = joined()
    one.push(ours, b"never mind")
    one.withdraw(ours)
    assert records(one) == []
    one.push(ours, b"this")
    carry(one, other)
    assert read_all(other, theirs) == b"this"
    assert not theirs.is_reset


def test_a_push_withdrawn_half_way_resets_its_stream_and_nothing_else():
    bulk, urgent, one, other = two_streams()
    ends = {flow.id: flow for flow in other.opened}
    one.push(bulk, bytes(200_000))
    for record in records(one, 1):
        other.receive(record)
    one.withdraw(bulk)
    one.push(urgent, b"still here")
    carry(one, other)
    assert ends[bulk.id].is_reset
    assert read_all(other, ends[urgent.id]) == b"still here"


def test_an_end_that_was_asked_for_is_sent_though_the_push_before_it_is_withdrawn():
    ours, theirs, one, other = joined()
    ours.credit = 0
    one.push(ours, b"waits for leave")
    one.end(ours)
    one.withdraw(ours)
    carry(one, other)
    assert theirs.is_finished


def test_no_end_follows_a_push_that_was_withdrawn_half_way():
    ours, theirs, one, other = joined()
    one.push(ours, bytes(200_000))
    one.end(ours)
    for record in records(one, 1):
        other.receive(record)
    one.withdraw(ours)
    assert frames(one) == [(WINDOW, RST, ours.id, 0)]
    assert theirs.held


# -- the window ------------------------------------------------------------------------------------


def test_a_reader_that_keeps_up_is_sent_more_at_a_time():
    ours, theirs, one, other = joined()
    shares = []
    for _ in range(8):
        one.push(ours, bytes(ours.credit))
        carry(one, other)
        read_all(other, theirs)
        carry(other, one)
        shares.append(theirs.share)
    assert shares[:3] == [2 * INITIAL_WINDOW, 4 * INITIAL_WINDOW, 8 * INITIAL_WINDOW]
    assert shares[-1] == Bounds().window


def test_a_peer_whose_bytes_nobody_reads_gets_one_window_and_no_more():
    ours, theirs, one, other = joined()
    one.push(ours, bytes(16 * MIB))
    for _ in range(50):
        carry(one, other)
        carry(other, one)
    assert theirs.held == INITIAL_WINDOW
    assert len(ours.outbox) == 16 * MIB - INITIAL_WINDOW


def fill(muxer: Muxer, peer_opens: int, rounds: int) -> None:
    """A peer that opens streams, sends all it may and is read, so that every window grows."""
    ids = range(1, 2 * peer_opens, 2)
    hear(muxer, *(frame(WINDOW, SYN, number) for number in ids))
    use_all(muxer, rounds)


def use_all(muxer: Muxer, rounds: int) -> None:
    for _ in range(rounds):
        for flow in muxer.flows:
            hear(muxer, frame(DATA, 0, flow.id, bytes(flow.window)))
            read_all(muxer, flow)
        frames(muxer)


def test_all_windows_together_stay_within_the_bound_however_they_grew():
    """First a few streams grow, then all the others are opened, by both sides."""
    bounds = Bounds(streams=8, window=2 * MIB, memory=6 * MIB)
    muxer = Muxer(initiator=False, bounds=bounds)
    fill(muxer, 3, 6)
    assert sum(flow.share for flow in muxer.flows) > 3 * INITIAL_WINDOW
    hear(muxer, *(frame(WINDOW, SYN, number) for number in range(7, 17, 2)))
    for _ in range(8):
        muxer.open()
    assert len(muxer.flows) == 16
    assert sum(flow.share for flow in muxer.flows) <= bounds.memory


def test_a_window_that_a_stream_gave_back_can_be_used_by_another():
    muxer = listener(streams=2, window=MIB, memory=2 * MIB)
    for number in range(1, 40, 2):
        hear(muxer, frame(WINDOW, SYN, number))
        use_all(muxer, 4)
        [flow] = muxer.flows
        assert flow.share == MIB
        muxer.reset(flow)
    assert muxer.flows == []


def test_a_peer_that_sends_single_bytes_among_pings_cannot_take_more_memory_than_it_may():
    muxer = listener()
    hear(muxer, frame(WINDOW, SYN, 1))
    ping = frame(PING, ACK, 0)
    record = frame(DATA, 0, 1, b"x") + ping * 5000
    for _ in range(8):
        hear(muxer, record)
    [flow] = muxer.flows
    assert flow.held == 8
    assert memory_of(muxer) < 200


def test_a_window_of_single_byte_frames_takes_little_more_memory_than_its_bytes():
    muxer = listener()
    hear(muxer, frame(WINDOW, SYN, 1))
    for _ in range(40):
        hear(muxer, frame(DATA, 0, 1, b"x") * 500)
    assert memory_of(muxer) < 2 * 20_000


# -- what a peer may not do ------------------------------------------------------------------------


BREACHES = {
    "a version that is not 0": b"\x01" + frame(PING, SYN, 0)[1:],
    "an unknown type": frame(4, 0, 0),
    "unknown flags": frame(PING, 16, 0),
    "all flags": frame(WINDOW, 0xFFFF, 1),
    "a ping on a stream": frame(PING, SYN, 1),
    "a farewell on a stream": frame(GO_AWAY, 0, 1),
    "data on stream 0": frame(DATA, 0, 0, b"x"),
    "a window of stream 0": frame(WINDOW, 0, 0),
    "a stream of our parity": frame(WINDOW, SYN, 2),
    "a stream opened twice": frame(WINDOW, SYN, 1) * 2,
    "a stream opened out of order": frame(WINDOW, SYN, 3) + frame(WINDOW, SYN, 1),
    "a number used again": frame(WINDOW, SYN, 1) + frame(WINDOW, RST, 1) + frame(WINDOW, SYN, 1),
    "data on a stream that was never opened": frame(DATA, 0, 1, b"x"),
    "empty data on a stream that was never opened": frame(DATA, 0, 1),
    "a window of a stream that was never opened": frame(WINDOW, 0, 1, length=1),
    "a reset of a stream that was never opened": frame(WINDOW, RST, 5),
    "an end of a stream of ours that was never opened": frame(WINDOW, FIN, 2),
    "a frame longer than the window": frame(WINDOW, SYN, 1)
    + frame(DATA, 0, 1, length=INITIAL_WINDOW + 1),
    "the longest frame there is": frame(WINDOW, SYN, 1) + frame(DATA, 0, 1, length=2**32 - 1),
    "data beyond the window": frame(WINDOW, SYN, 1)
    + frame(DATA, 0, 1, bytes(INITIAL_WINDOW))
    + frame(DATA, 0, 1, b"x"),
    "data beyond the window with the opening": frame(DATA, SYN, 1, length=INITIAL_WINDOW + 1),
    "data after the end": frame(WINDOW, SYN, 1) + frame(WINDOW, FIN, 1) + frame(DATA, 0, 1, b"x"),
    "data after an end with bytes": frame(WINDOW, SYN, 1)
    + frame(DATA, FIN, 1, b"x")
    + frame(DATA, 0, 1, b"y"),
    "data after the peer's own reset": frame(WINDOW, SYN, 1)
    + frame(WINDOW, RST, 1)
    + frame(DATA, 0, 1, b"x"),
    "a credit of more than 4 GiB": frame(WINDOW, SYN, 1)
    + frame(WINDOW, 0, 1, length=2**32 - 1) * 2,
    "a flood of pings": frame(PING, SYN, 0) * 513,
    "a flood of streams": b"".join(frame(WINDOW, SYN, number) for number in range(1, 1200, 2)),
}


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_ends_the_connection(name):
    with pytest.raises(RemoteProtocolError):
        hear(listener(), BREACHES[name])


def hear_cut(muxer: Muxer, body: bytes, rng: random.Random, most: int) -> None:
    """Let it receive bytes in small pieces; large ones where there are very many."""
    position = 0
    while position < len(body):
        count = rng.randint(1, most) if position < 5000 else 5000
        hear(muxer, body[position : position + count])
        position += count


@pytest.mark.parametrize("name", BREACHES)
@pytest.mark.parametrize("most", [1, 40])
def test_a_breach_is_seen_however_the_bytes_are_cut(name, most):
    with pytest.raises(RemoteProtocolError):
        hear_cut(listener(), BREACHES[name], random.Random(name), most)


FINE = {
    "empty data": frame(DATA, 0, 1),
    "an empty end twice": frame(WINDOW, FIN, 1) * 2,
    "empty data after the end": frame(WINDOW, FIN, 1) + frame(DATA, 0, 1),
    "a window after the end": frame(WINDOW, FIN, 1) + frame(WINDOW, 0, 1, length=5),
    "a window after a reset": frame(WINDOW, RST, 1) + frame(WINDOW, 0, 1, length=5),
    "a reset twice": frame(WINDOW, RST, 1) * 2,
    "an answer that nobody asked for": frame(PING, ACK, 0, length=9),
    "a ping with no flag": frame(PING, 0, 0, length=9),
    "an agreement twice": frame(WINDOW, ACK, 1) * 2,
    "the whole window": frame(DATA, 0, 1, bytes(INITIAL_WINDOW)),
}


@pytest.mark.parametrize("name", FINE)
def test_what_is_odd_but_allowed_is_borne(name):
    muxer = listener()
    hear(muxer, frame(WINDOW, SYN, 1), FINE[name])
    hear(muxer, frame(WINDOW, SYN, 3), frame(DATA, FIN, 3, b"still alive"))
    assert read_all(muxer, muxer.flows[-1]) == b"still alive"


def test_an_end_may_come_with_the_last_bytes_and_counts_after_them():
    muxer = listener()
    body = frame(WINDOW, SYN, 1) + frame(DATA, FIN, 1, b"abc")
    hear(muxer, body[:-1])
    [flow] = muxer.flows
    assert not flow.is_finished
    changed = hear(muxer, body[-1:])
    assert flow.is_finished
    assert flow in changed
    assert read_all(muxer, flow) == b"abc"


def test_a_reset_with_bytes_drops_them_and_counts_them():
    muxer = listener()
    hear(muxer, frame(WINDOW, SYN, 1))
    [flow] = muxer.flows
    changed = hear(muxer, frame(DATA, RST, 1, b"abc"), frame(PING, SYN, 0, length=5))
    assert flow.is_reset
    assert flow in changed
    assert flow.held == 0
    assert (PING, ACK, 0, 5) in frames(muxer)


def test_a_reset_with_bytes_beyond_the_window_is_still_a_breach():
    with pytest.raises(RemoteProtocolError):
        hear(listener(), frame(WINDOW, SYN, 1), frame(DATA, RST, 1, length=INITIAL_WINDOW + 1))


def test_a_header_and_a_body_may_be_split_at_every_byte():
    body = (
        frame(WINDOW, SYN, 1, length=1000)
        + frame(DATA, 0, 1, b"hello ")
        + frame(PING, SYN, 0, length=3)
        + frame(DATA, FIN, 1, b"world")
    )
    for cut in range(len(body) + 1):
        muxer = listener()
        hear(muxer, body[:cut])
        hear(muxer, body[cut:])
        [flow] = muxer.flows
        assert flow.credit == INITIAL_WINDOW + 1000
        assert flow.is_finished
        assert read_all(muxer, flow) == b"hello world"
        assert frames(muxer) == [(WINDOW, ACK, 1, 0), (PING, ACK, 0, 3)]


def test_streams_beyond_the_bound_are_reset_and_the_others_live():
    muxer = listener(streams=2, window=MIB, memory=2 * MIB)
    hear(muxer, *(frame(WINDOW, SYN, number) for number in (1, 3, 5, 7)))
    assert frames(muxer) == [
        (WINDOW, ACK, 1, 0),
        (WINDOW, ACK, 3, 0),
        (WINDOW, RST, 5, 0),
        (WINDOW, RST, 7, 0),
    ]
    hear(muxer, frame(DATA, 0, 5, b"sent before it knew"), frame(DATA, 0, 1, b"fine"))
    assert [read_all(muxer, flow) for flow in muxer.flows if flow.held] == [b"fine"]


def test_a_stream_that_comes_while_the_peer_is_going_is_reset():
    muxer = listener()
    hear(muxer, frame(GO_AWAY, 0, 0), frame(WINDOW, SYN, 1))
    assert frames(muxer) == [(WINDOW, RST, 1, 0)]


def test_a_peer_that_asks_and_reads_the_answers_may_ask_on():
    muxer = listener()
    for _ in range(20):
        hear(muxer, frame(PING, SYN, 0) * 500)
        assert len(frames(muxer)) == 500


def test_answers_that_nobody_reads_are_bounded():
    muxer, most = listener(), Bounds().answers
    for number in range(1, most, 2):
        hear(muxer, frame(WINDOW, SYN, number), frame(PING, SYN, 0))
    assert len(muxer._control) == most
    with pytest.raises(RemoteProtocolError, match="on and on"):
        hear(muxer, frame(PING, SYN, 0))
    assert len(muxer._control) == most


def test_what_comes_on_a_stream_that_we_reset_is_counted_against_what_was_under_way():
    muxer = listener()
    hear(muxer, frame(WINDOW, SYN, 1), frame(DATA, 0, 1, bytes(1000)))
    muxer.reset(muxer.flows[0])
    left = INITIAL_WINDOW - 1000
    hear(muxer, frame(DATA, 0, 1, bytes(left)))
    with pytest.raises(RemoteProtocolError, match="over"):
        hear(muxer, frame(DATA, 0, 1, b"x"))


def test_a_body_that_is_under_way_when_we_reset_its_stream_is_skipped():
    muxer = listener()
    body = frame(DATA, FIN, 1, bytes(1000))
    hear(muxer, frame(WINDOW, SYN, 1), body[:500])
    [flow] = muxer.flows
    muxer.reset(flow)
    hear(muxer, body[500:], frame(PING, SYN, 0, length=4))
    assert flow.held == 0
    assert not flow.is_finished
    assert (PING, ACK, 0, 4) in frames(muxer)
