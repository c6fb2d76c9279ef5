"""One peer as the node sees it: queue, choice of link, order of events; no socket, virtual time."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import trio

from p2pfed.network import Limits, PeerConnected, PeerDisconnected, VersionsDiffer
from p2pfed.network.session import Lane, Session

ORDERS = [("ours", "theirs"), ("theirs", "ours")]
SMALL, GREAT = "12D3KooWAaa", "12D3KooWZzz"


@dataclass(eq=False)
class FakeLink:
    inbound: bool
    opened_at: float = 0.0
    sent: int = 10
    received: int = 20
    broke_protocol: bool = False
    is_relayed: bool = False
    rtt: float | None = None
    version: int = 2
    heard: int = 2
    proposed: frozenset[int] = frozenset()
    nothing_common: bool = False

    @property
    def wire(self):
        return SimpleNamespace(via="relay" if self.is_relayed else "")


def session(us: str = SMALL, peer: str = GREAT, **limits) -> Session:
    return Session(peer, us, Limits(**limits))


def adopt(one: Session, link: FakeLink) -> bool:
    one.links.add(link)
    return one.adopt(link)


async def news(one: Session, room: int = 100) -> list[object]:
    send, receive = trio.open_memory_channel(room)
    if one.claim_news():
        await one.tell(send)
    heard = []
    while True:
        try:
            heard.append(receive.receive_nowait())
        except trio.WouldBlock:
            return heard


@pytest.mark.parametrize("order_here", ORDERS)
@pytest.mark.parametrize("order_there", ORDERS)
async def test_both_ends_of_a_simultaneous_dial_keep_the_same_connection(order_here, order_there):
    """``ours`` is dialled by SMALL; whatever order each end sees, both keep the other's."""
    small, great = session(SMALL, GREAT), session(GREAT, SMALL)
    at_small = {"ours": FakeLink(inbound=False), "theirs": FakeLink(inbound=True)}
    at_great = {"ours": FakeLink(inbound=True), "theirs": FakeLink(inbound=False)}
    for name in order_here:
        adopt(small, at_small[name])
    for name in order_there:
        adopt(great, at_great[name])
    assert small.link is at_small["theirs"]
    assert great.link is at_great["theirs"]
    small.release(at_small["ours"])
    assert await news(small) == [PeerConnected(GREAT)]


async def test_a_much_later_connection_replaces_one_the_peer_has_lost():
    one = session(SMALL, GREAT)
    adopt(one, FakeLink(inbound=True))  # the one both would keep
    late = FakeLink(inbound=False, opened_at=3 * Limits().dial_seconds)
    assert adopt(one, late)
    assert one.link is late


async def test_a_second_connection_of_the_same_direction_replaces_the_first():
    one = session()
    adopt(one, FakeLink(inbound=True))
    again = FakeLink(inbound=True, opened_at=0.1)
    assert adopt(one, again)
    assert one.link is again


async def test_events_alternate_over_several_connections():
    one = session()
    for _ in range(3):
        link = FakeLink(inbound=True)
        adopt(one, link)
        assert await news(one) == [PeerConnected(GREAT)]
        assert one.announced.is_set()
        one.release(link)
        assert not one.announced.is_set()
        assert await news(one) == [PeerDisconnected(GREAT)]


async def test_a_connection_the_node_has_not_heard_of_ends_unheard():
    one = session()
    first, second = FakeLink(inbound=True), FakeLink(inbound=True)
    adopt(one, first)
    one.release(first)
    assert await news(one) == []
    adopt(one, second)
    one.release(second)
    adopt(one, first)
    waiting = one.announced
    assert await news(one) == [PeerConnected(GREAT)]
    assert waiting.is_set()


async def test_a_connection_of_another_version_takes_over_nothing_that_was_written_for_the_first():
    one = session()
    adopt(one, FakeLink(inbound=True, version=2))
    assert await news(one) == [PeerConnected(GREAT)]
    assert one.put(b"of version 2")
    older = FakeLink(inbound=True, opened_at=0.1, version=1)
    assert adopt(one, older)
    heard = await news(one)
    assert heard == [PeerDisconnected(GREAT), PeerConnected(GREAT)]
    assert heard[1].version == 1
    assert one.announced.is_set()
    one.put(b"of version 1")
    assert await one.next_frame(older, Lane.URGENT) == b"of version 1"


async def test_a_connection_of_another_version_that_the_node_has_not_heard_of_is_told_once():
    one = session()
    adopt(one, FakeLink(inbound=True, version=1))
    adopt(one, FakeLink(inbound=True, opened_at=0.1, version=2))
    heard = await news(one)
    assert heard == [PeerConnected(GREAT)]
    assert heard[0].version == 2


@pytest.mark.parametrize(
    ("ended", "told"),
    [
        (FakeLink(True, version=0, heard=0, nothing_common=True), [VersionsDiffer(GREAT, ())]),
        (
            FakeLink(True, version=0, heard=0, proposed=frozenset({4, 3}), nothing_common=True),
            [VersionsDiffer(GREAT, (3, 4))],
        ),
        (
            FakeLink(True, version=0, heard=0, proposed=frozenset({3})),
            [],
        ),  # it may have been about to say 2
        (FakeLink(True, version=0, heard=2, proposed=frozenset({3})), []),
        (FakeLink(True, version=0, heard=0), []),
    ],
)
async def test_a_peer_without_a_common_version_is_told_from_one_that_was_cut_off(ended, told):
    one = session()
    one.links.add(ended)
    one.release(ended)
    assert await news(one) == told
    assert one.is_unlike == bool(told)


async def test_who_hangs_up_over_versions_twice_speaks_none_of_ours():
    one = session()
    for told in ([], [VersionsDiffer(GREAT, (1,))]):
        link = FakeLink(True, version=0, heard=0, proposed=frozenset({1}))
        one.links.add(link)
        one.release(link)
        assert await news(one) == told
    adopt(one, FakeLink(inbound=True))
    assert not one.is_unlike


async def test_events_wait_in_order_while_the_node_takes_none(autojump_clock):
    one = session()
    send, receive = trio.open_memory_channel(0)
    link = FakeLink(inbound=True)
    adopt(one, link)
    async with trio.open_nursery() as nursery:
        assert one.claim_news()
        nursery.start_soon(one.tell, send)
        await trio.sleep(1)  # tell() now holds PeerConnected and waits for room
        one.release(link)
        adopt(one, FakeLink(inbound=False))
        assert not one.claim_news()
        heard = [await receive.receive() for _ in range(3)]
    assert heard == [PeerConnected(GREAT), PeerDisconnected(GREAT), PeerConnected(GREAT)]
    assert one.announced.is_set()


LANES = pytest.mark.parametrize(("lane", "size"), [(Lane.URGENT, 5), (Lane.BULK, 5000)])


@LANES
async def test_a_replaced_writer_takes_nothing_off_the_queue(lane, size):
    one = session()
    first, second = FakeLink(inbound=True), FakeLink(inbound=True)
    adopt(one, first)
    assert one.put(b"a" * size)
    assert await one.next_frame(first, lane) == b"a" * size
    adopt(one, second)  # while the first writer was writing
    one.written(first, lane)
    assert await one.next_frame(first, lane) is None
    assert await one.next_frame(second, lane) == b"a" * size
    one.written(second, lane)
    assert one.put(b"b" * size)
    assert await one.next_frame(second, lane) == b"b" * size


@LANES
async def test_a_replaced_writer_that_waits_is_woken(autojump_clock, lane, size):
    one = session()
    first = FakeLink(inbound=True)
    adopt(one, first)
    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                assert await one.next_frame(first, lane) is None

            nursery.start_soon(wait)
            await trio.sleep(0.1)
            adopt(one, FakeLink(inbound=True))


async def test_a_short_frame_does_not_wait_behind_long_ones():
    one = session()
    link = FakeLink(inbound=True)
    adopt(one, link)
    assert one.put(b"l" * 5000)
    assert one.put(b"s")
    assert await one.next_frame(link, Lane.URGENT) == b"s"
    assert await one.next_frame(link, Lane.BULK) == b"l" * 5000


async def test_the_queues_are_bounded_by_count_and_by_bytes_and_end_with_the_connection():
    one = session(queue_frames=3, queue_bytes=10, urgent_bytes=4)
    assert not one.put(b"")
    link = FakeLink(inbound=True)
    adopt(one, link)
    assert [one.put(b"") for _ in range(4)] == [True, True, True, False]
    one.release(link)
    adopt(one, link)
    assert [one.put(b"12345") for _ in range(3)] == [True, True, False]
    assert one.put(b"1"), "a short frame is taken however much bulk waits"
    one.written(link, Lane.BULK)
    assert one.put(b"12345")


async def test_a_direct_connection_replaces_a_circuit_and_not_the_other_way_round():
    one = session()
    circuit, direct = FakeLink(inbound=True, is_relayed=True), FakeLink(inbound=False)
    assert adopt(one, circuit)
    assert one.stats().via == "relay"
    assert adopt(one, direct)
    assert not adopt(one, FakeLink(inbound=True, is_relayed=True, opened_at=0.2))
    assert one.link is direct
    late = FakeLink(inbound=True, is_relayed=True, opened_at=3 * Limits().dial_seconds)
    assert adopt(one, late), "the peer must have lost the direct connection"


async def test_figures_outlive_the_connections_they_were_counted_on():
    one = session()
    link, other = FakeLink(inbound=True, broke_protocol=True), FakeLink(inbound=False)
    adopt(one, link)
    assert (one.stats().bytes_sent, one.stats().direction) == (10, "inbound")
    one.release(link)
    assert (one.stats().bytes_sent, one.stats().direction) == (10, None)
    assert (one.stats().connected_since, one.stats().breaches) == (None, 1)
    adopt(one, other)
    assert (one.stats().bytes_received, one.stats().direction) == (40, "outbound")
