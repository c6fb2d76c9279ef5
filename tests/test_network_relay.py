"""The relay: reservations, circuits, every refusal, every death; streams in memory."""

from __future__ import annotations

import contextlib

import pytest
import trio
from circuit_fakes import IDS, WINDOW, FakeLink, FakeStream, contained, member
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfed.errors import PeerUnreachable
from p2pfed.network import circuit
from p2pfed.network.addresses import unpack
from p2pfed.network.circuit import STOP, Answer, Connect, Limit, Reserve, Status
from p2pfed.network.relay import CHUNK, CircuitStats, RelayLimits, RelayService

A, B, C, R = IDS["a"], IDS["b"], IDS["c"], IDS["r"]
EPOCH = 1_800_000_000


class World:
    """A relay, and links to it; every stream is served in a task, as a link does it."""

    def __init__(self, nursery: trio.Nursery, **limits) -> None:
        self.strangers: set[str] = set()
        self.addresses = ["/ip4/192.0.2.1/tcp/4001"]
        self.links: dict[str, FakeLink] = {}
        self.nursery = nursery
        self.relay = RelayService(
            R,
            is_member=lambda peer: peer not in self.strangers,
            addresses=lambda: self.addresses,
            limits=RelayLimits(**limits),
            wall=lambda: EPOCH + trio.current_time(),
        )

    def link(self, peer: str, **options) -> FakeLink:
        self.links[peer] = FakeLink(peer, **options)
        return self.links[peer]

    def open(self, peer: str) -> FakeStream:
        """Open a hop stream at ``peer``'s end of its link, which is made if there is none."""
        link = self.links.get(peer) or self.link(peer)
        at_relay = link.stream_to()
        self.nursery.start_soon(contained, self.relay.serve_hop, link, at_relay)
        return link.streams[-1]

    async def say(self, peer: str, body: bytes) -> FakeStream:
        stream = self.open(peer)
        await circuit.write_message(stream, body)
        return stream

    async def ask(self, peer: str, message: circuit.HopMessage) -> Answer:
        """Ask and return the answer."""
        stream = await self.say(peer, circuit.encode_hop(message))
        answer = await circuit.read_hop(stream)
        if answer.status is not Status.OK or isinstance(message, Reserve):
            assert await stream.read(1) == b""  # the relay ends what is answered
        stream.end()
        return answer

    async def reserve(self, peer: str) -> Answer:
        answer = await self.ask(peer, Reserve())
        assert answer.status is Status.OK
        return answer

    async def join(self, source: str = A, target: str = B) -> tuple[FakeStream, FakeStream]:
        """Make a circuit and return its ends."""
        near = await self.say(source, circuit.encode_hop(Connect(target)))
        protocol, far = await self.links[target].opened.receive()
        assert protocol == STOP
        assert await circuit.accept_stop(far) == source
        answer = await circuit.read_hop(near)
        assert answer.status is Status.OK
        return near, far

    @property
    def num_circuits(self) -> int:
        return len(self.relay.stats().circuits)


@contextlib.asynccontextmanager
async def world(**limits):
    async with trio.open_nursery() as nursery:
        yield World(nursery, **limits)
        nursery.cancel_scope.cancel()


async def settled() -> None:
    """Let everything happen that needs no time to pass."""
    await trio.testing.wait_all_tasks_blocked()


async def is_reset(stream: FakeStream) -> bool:
    """Whether the stream is cut; reading then raises and does not end."""
    try:
        while await stream.read(1 << 20):
            pass
    except PeerUnreachable:
        return True
    return False


# -- reservations --------------------------------------------------------------------------------


async def test_a_reservation_says_until_when_and_where_the_relay_is(autojump_clock):
    async with world() as w:
        w.addresses = [
            "/ip4/0.0.0.0/tcp/4001",
            "/ip6/::/tcp/4001",
            f"/dns4/relay.example/tcp/4001/p2p/{R}",
            "/ip4/192.0.2.1/tcp/4001",
            f"/ip4/192.0.2.9/tcp/4001/p2p/{A}",
            "nonsense",
        ]
        answer = await w.reserve(B)
        assert answer.expires_at == EPOCH + 3600
        assert [str(unpack(each, R)) for each in answer.addresses] == [
            f"/dns4/relay.example/tcp/4001/p2p/{R}",
            f"/ip4/192.0.2.1/tcp/4001/p2p/{R}",
        ]
        assert answer.limit == Limit()


async def test_a_relay_with_many_addresses_still_answers(autojump_clock):
    async with world() as w:
        w.addresses = [f"/dns4/{'x' * 60}.{'y' * 60}.example/tcp/{n}" for n in range(1, 99)]
        assert len((await w.reserve(B)).addresses) == 8


async def test_however_often_a_peer_asks_it_has_one_reservation(autojump_clock):
    async with world(reservations=2) as w:
        for _ in range(100):
            await w.reserve(B)
        assert w.relay.stats().reservations == 1
        await w.reserve(C)
        assert w.relay.stats().reservations == 2


async def test_the_sixty_fifth_reservation_is_refused_until_a_link_ends(autojump_clock):
    async with world() as w:
        for number in range(64):
            await w.reserve(member(number))
        assert (await w.ask(A, Reserve())).status is Status.RESERVATION_REFUSED
        await w.reserve(member(7))  # renewing takes no further place
        w.links[member(9)].die()
        assert w.relay.stats().reservations == 63
        await w.reserve(A)
        assert (await w.ask(B, Reserve())).status is Status.RESERVATION_REFUSED


async def test_a_reservation_ends_after_an_hour_and_renewing_begins_another(autojump_clock):
    async with world() as w:
        await w.reserve(B)
        await trio.sleep(1800)
        renewed = await w.reserve(B)
        assert renewed.expires_at == EPOCH + 1800 + 3600
        await trio.sleep(3599)
        await w.join(A, B)
        await trio.sleep(2)
        assert (await w.ask(A, Connect(B))).status is Status.NO_RESERVATION
        assert w.relay.stats().reservations == 0


async def test_a_reservation_is_on_the_link_it_was_last_asked_on(autojump_clock):
    async with world() as w:
        await w.reserve(B)
        old = w.links[B]
        new = w.link(B)
        await w.reserve(B)
        old.die()
        await w.join(A, B)
        assert new.num_opened == 1
        new.die()
        assert (await w.ask(A, Connect(B))).status is Status.NO_RESERVATION


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", [Reserve(), Connect(B)])
async def test_a_stranger_and_a_circuit_within_a_circuit_are_refused(message, autojump_clock):
    async with world() as w:
        await w.reserve(B)
        w.strangers.add(A)
        assert (await w.ask(A, message)).status is Status.PERMISSION_DENIED
        w.link(C, via=R)
        assert (await w.ask(C, message)).status is Status.PERMISSION_DENIED
        assert w.relay.stats().reservations == 1
        assert w.links[B].num_opened == 0


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"\xff\xff", Status.MALFORMED_MESSAGE),
        (b"\x08\x07", Status.MALFORMED_MESSAGE),
        (b"\x08\x01", Status.MALFORMED_MESSAGE),
        (circuit.encode_hop(Answer(Status.OK)), Status.UNEXPECTED_MESSAGE),
    ],
)
async def test_what_is_no_request_is_answered_with_the_status(body, status, autojump_clock):
    async with world() as w:
        stream = await w.say(A, body)
        assert await circuit.read_hop(stream) == Answer(status)
        assert await stream.read(1) == b""
        assert w.relay.stats().refused == 1


async def test_a_message_longer_than_any_is_answered_before_it_has_come(autojump_clock):
    async with world() as w:
        stream = w.open(A)
        await stream.write(b"\xff\x7f")
        assert await circuit.read_hop(stream) == Answer(Status.MALFORMED_MESSAGE)


async def test_half_a_request_leaves_nothing_behind(autojump_clock):
    async with world() as w:
        stream = w.open(A)
        await stream.write(b"\x02\x08")
        stream.end()
        assert await is_reset(stream)
        assert w.relay.stats().reservations == 0
        assert not w.relay._serving


async def test_a_request_that_comes_in_drops_is_dropped_after_ten_seconds(autojump_clock):
    async with world() as w:
        stream = w.open(A)
        for byte in b"\x08\x08\x01\x12":
            await stream.write(bytes([byte]))
            await trio.sleep(2.4)
        assert w.relay._serving[A] == 1
        await trio.sleep(0.5)
        assert await is_reset(stream)
        assert not w.relay._serving


async def test_a_flood_of_silent_requests_is_cut_and_others_are_served(autojump_clock):
    async with world() as w:
        streams = [w.open(A) for _ in range(500)]
        await settled()
        assert w.relay._serving[A] == 32
        assert sum([s._in.reset for s in streams]) == 500 - 32
        await w.reserve(B)
        await trio.sleep(11)
        assert not w.relay._serving


async def test_a_target_without_a_reservation_is_not_disturbed(autojump_clock):
    async with world() as w:
        w.link(B)
        assert (await w.ask(A, Connect(B))).status is Status.NO_RESERVATION
        assert (await w.ask(A, Connect(R))).status is Status.NO_RESERVATION
        assert w.links[B].num_opened == 0


async def test_nobody_is_led_to_a_stranger_or_to_itself(autojump_clock):
    async with world() as w:
        await w.reserve(A)
        await w.reserve(B)
        assert (await w.ask(A, Connect(A))).status is Status.PERMISSION_DENIED
        w.strangers.add(B)
        assert (await w.ask(A, Connect(B))).status is Status.PERMISSION_DENIED


async def test_a_fifth_circuit_between_two_peers_is_refused_until_one_ends(autojump_clock):
    async with world() as w:
        await w.reserve(B)
        ends = [await w.join() for _ in range(4)]
        assert (await w.ask(A, Connect(B))).status is Status.RESOURCE_LIMIT_EXCEEDED
        await w.join(C, B)
        ends[2][0].discard()
        await settled()
        await w.join()


async def test_a_seventeenth_circuit_of_one_peer_is_refused(autojump_clock):
    async with world() as w:
        for number in range(17):
            await w.reserve(member(number))
        for number in range(16):
            await w.join(A, member(number))
        assert (await w.ask(A, Connect(member(16)))).status is Status.RESOURCE_LIMIT_EXCEEDED
        await w.join(B, member(16))


async def test_a_sixty_fifth_circuit_is_refused(autojump_clock):
    async with world() as w:
        for number in range(64):
            await w.reserve(member(number))
            await w.join(member(100 + number), member(number))
        answer = await w.ask(A, Connect(member(5)))
        assert answer.status is Status.RESOURCE_LIMIT_EXCEEDED
        assert w.num_circuits == 64


async def test_a_flood_of_requests_opens_no_more_than_four_streams_at_a_silent_target(
    autojump_clock,
):
    async with world() as w:
        await w.reserve(B)
        statuses = []

        async def ask() -> None:
            near = await w.say(A, circuit.encode_hop(Connect(B)))
            statuses.append((await circuit.read_hop(near, seconds=20)).status)
            near.end()

        async with trio.open_nursery() as nursery:
            for _ in range(32):
                nursery.start_soon(ask)
            await settled()
            assert w.links[B].num_opened == 4
            assert statuses == [Status.RESOURCE_LIMIT_EXCEEDED] * 28
        assert statuses[28:] == [Status.CONNECTION_FAILED] * 4
        assert w.links[B].num_opened == 4
        assert w.num_circuits == 0
        while w.links[B].opened.statistics().current_buffer_used:
            w.links[B].opened.receive_nowait()
        await w.join()


async def test_a_target_that_does_not_even_take_a_stream_fails_after_ten_seconds(autojump_clock):
    async with world() as w:
        await w.reserve(B)
        w.links[B].is_deaf = True
        stream = await w.say(A, circuit.encode_hop(Connect(B)))
        answer = await circuit.read_hop(stream, seconds=20)
        assert answer.status is Status.CONNECTION_FAILED
        assert trio.current_time() == pytest.approx(10)
        assert w.num_circuits == 0


@pytest.mark.parametrize(
    "body",
    [
        circuit.encode_stop(Answer(Status.PERMISSION_DENIED)),
        circuit.encode_stop(Answer(Status.CONNECTION_FAILED)),
        circuit.encode_stop(Connect(A)),
        b"\xff\xff",
    ],
)
async def test_a_target_that_refuses_or_babbles_is_a_failed_connection(body, autojump_clock):
    async with world() as w:
        await w.reserve(B)
        near = await w.say(A, circuit.encode_hop(Connect(B)))
        _, far = await w.links[B].opened.receive()
        assert await circuit.read_stop(far) == Connect(A)
        await circuit.write_message(far, body)
        assert await circuit.read_hop(near) == Answer(Status.CONNECTION_FAILED)
        assert await is_reset(far)
        assert w.num_circuits == 0


async def test_a_target_that_dies_while_it_is_asked_is_a_failed_connection(autojump_clock):
    async with world() as w:
        await w.reserve(B)
        near = await w.say(A, circuit.encode_hop(Connect(B)))
        await w.links[B].opened.receive()
        w.links[B].die()
        assert await circuit.read_hop(near) == Answer(Status.CONNECTION_FAILED)
        assert w.num_circuits == 0


# -- circuits ------------------------------------------------------------------------------------


async def pour(stream: FakeStream, pieces: list[bytes]) -> None:
    for piece in pieces:
        await stream.write(piece)
    stream.end()


async def drink(stream: FakeStream, most: int, into: bytearray) -> None:
    while piece := await stream.read(most):
        into += piece


PIECES = st.lists(st.binary(min_size=1, max_size=2000), max_size=12)


@given(PIECES, PIECES, st.integers(1, 3000), st.integers(1, 3000))
@settings(max_examples=20)
def test_property_what_goes_in_comes_out_at_the_other_end(there, back, window, most):
    async def once() -> None:
        async with world() as w:
            w.link(A, window=window + 100)
            w.link(B, window=window + 100)
            await w.reserve(B)
            near, far = await w.join()
            at_far, at_near = bytearray(), bytearray()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pour, near, there)
                nursery.start_soon(pour, far, back)
                nursery.start_soon(drink, far, most, at_far)
                nursery.start_soon(drink, near, most, at_near)
            assert bytes(at_far) == b"".join(there)
            assert bytes(at_near) == b"".join(back)
            await settled()
            assert w.relay.stats().relayed == len(at_far) + len(at_near)
            assert w.num_circuits == 0

    trio.run(once, clock=trio.testing.MockClock(autojump_threshold=0))


async def test_the_figures_name_the_ends_and_count_the_bytes(autojump_clock):
    async with world() as w:
        await w.reserve(B)
        near, far = await w.join()
        await near.write(b"12345")
        await far.write(b"123")
        await settled()
        assert w.relay.stats().circuits == (CircuitStats(A, B, 8),)
        assert w.relay.stats().relayed == 8


async def test_what_the_source_sends_before_the_answer_is_not_lost(autojump_clock):
    async with world() as w:
        await w.reserve(B)
        near = await w.say(A, circuit.encode_hop(Connect(B)))
        await near.write(b"eager")
        _, far = await w.links[B].opened.receive()
        await circuit.accept_stop(far)
        assert await far.read(100) == b"eager"


@pytest.mark.parametrize("first", ["source", "target"])
async def test_one_side_may_end_and_the_other_goes_on(first, autojump_clock):
    async with world() as w:
        await w.reserve(B)
        ends = await w.join()
        one, other = ends if first == "source" else ends[::-1]
        await one.write(b"question")
        one.end()
        assert await other.read(100) == b"question"
        assert await other.read(100) == b""
        await trio.sleep(20)
        await other.write(b"answer")
        other.end()
        assert await one.read(100) == b"answer"
        assert await one.read(100) == b""  # a clean end, not a reset
        await settled()
        assert w.num_circuits == 0


@pytest.mark.parametrize("from_source", [True, False])
async def test_a_slow_reader_holds_back_the_sender_and_not_the_relays_memory(
    from_source, autojump_clock
):
    async with world() as w:
        await w.reserve(B)
        ends = await w.join()
        writer, reader = ends if from_source else ends[::-1]
        w.nursery.start_soon(contained, writer.write, bytes(10 << 20))
        await settled()
        held_by_relay = writer._out.taken - reader.unread
        assert reader.unread == WINDOW
        assert 0 < held_by_relay <= CHUNK + 100  # and what was said before the circuit
        for link in w.links.values():
            assert max(stream.largest_read for stream in link.streams) <= CHUNK


async def test_a_circuit_without_a_byte_ends_after_thirty_seconds(autojump_clock):
    async with world() as w:
        await w.reserve(B)
        near, far = await w.join()
        await trio.sleep(29)
        await far.write(b".")
        await trio.sleep(29)
        assert w.num_circuits == 1
        await trio.sleep(2)
        assert w.num_circuits == 0
        assert await is_reset(near)
        assert await is_reset(far)


async def test_the_pings_of_the_ends_keep_a_circuit_past_its_reservation(autojump_clock):
    async with world() as w:
        await w.reserve(B)
        near, far = await w.join()
        while trio.current_time() < 4000:
            await near.write(b"?")
            await far.read(1)
            await trio.sleep(25)
        assert w.num_circuits == 1


async def test_a_reader_that_stands_still_ends_the_circuit_after_thirty_seconds(autojump_clock):
    async with world() as w:
        await w.reserve(B)
        near, _far = await w.join()
        with pytest.raises(PeerUnreachable):
            await near.write(bytes(10 << 20))
        assert trio.current_time() == pytest.approx(30)
        assert w.num_circuits == 0


async def test_a_slow_reader_that_takes_something_is_not_taken_for_a_silent_circuit(autojump_clock):
    async with world() as w:
        await w.reserve(B)
        near, far = await w.join()
        w.nursery.start_soon(contained, near.write, bytes(WINDOW + CHUNK))
        await trio.sleep(25)
        while far.unread:
            await far.read(CHUNK)
        await trio.sleep(25)
        assert w.num_circuits == 1


async def test_limits_of_bytes_and_of_time_are_told_and_kept(autojump_clock):
    async with world(circuit_bytes=1000, circuit_seconds=60) as w:
        assert (await w.reserve(B)).limit == Limit(60, 1000)
        near = await w.say(A, circuit.encode_hop(Connect(B)))
        _, far = await w.links[B].opened.receive()
        assert await circuit.read_stop(far) == Connect(A, Limit(60, 1000))
        await circuit.write_message(far, circuit.encode_stop(Answer(Status.OK)))
        assert (await circuit.read_hop(near)).limit == Limit(60, 1000)
        await near.write(bytes(1000))
        await far.write(bytes(1000))
        await settled()
        assert w.num_circuits == 1
        await near.write(b".")
        assert await is_reset(near)
        assert trio.current_time() == 0
        near, far = await w.join()
        for _ in range(5):
            await trio.sleep(11)
            await near.write(b".")
        assert w.num_circuits == 1
        await trio.sleep(6)
        assert w.num_circuits == 0


# -- the death of each -----------------------------------------------------------------------------


async def transfer(w: World) -> tuple[FakeStream, FakeStream]:
    """A circuit with bytes on their way in both directions."""
    await w.reserve(B)
    near, far = await w.join()
    for stream in (near, far):
        w.nursery.start_soon(contained, stream.write, bytes(10 << 20))
    await settled()
    return near, far


async def test_when_the_source_dies_the_target_sees_no_clean_end(autojump_clock):
    async with world() as w:
        _, far = await transfer(w)
        w.links[A].die()
        assert await is_reset(far)
        assert w.num_circuits == 0
        assert trio.current_time() == 0


async def test_when_the_target_dies_the_source_sees_no_clean_end(autojump_clock):
    async with world() as w:
        near, _ = await transfer(w)
        w.links[B].die()
        assert await is_reset(near)
        assert w.num_circuits == 0
        assert (await w.ask(A, Connect(B))).status is Status.NO_RESERVATION
        assert trio.current_time() == 0


async def test_a_link_that_is_over_ends_its_circuits_even_if_its_streams_do_not_say_so(
    autojump_clock,
):
    async with world() as w:
        await w.reserve(B)
        near, _ = await w.join()
        w.links[B].done.set()
        assert await is_reset(near)
        assert trio.current_time() == 0
        assert w.num_circuits == 0


async def test_when_the_relay_dies_both_ends_see_no_clean_end(autojump_clock):
    async with trio.open_nursery() as outer:
        async with world() as w:
            near, far = await transfer(w)
        assert await is_reset(near)
        assert await is_reset(far)
        assert w.num_circuits == 0
        outer.cancel_scope.cancel()


async def test_a_stream_that_is_reset_by_one_end_is_reset_at_the_other(autojump_clock):
    async with world() as w:
        near, far = await transfer(w)
        far.discard()
        assert await is_reset(near)


# -- revocation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("revoked", [A, B])
async def test_a_revoked_peer_loses_its_place_and_circuits_at_once_and_others_keep_theirs(
    revoked, autojump_clock
):
    async with world() as w:
        for peer in (A, B, C):
            await w.reserve(peer)
        near, far = await w.join(A, B)
        await w.join(C, B if revoked == A else A)
        w.strangers.add(revoked)
        w.relay.recheck()
        await settled()
        assert await is_reset(near)
        assert await is_reset(far)
        assert trio.current_time() == 0
        assert w.num_circuits == 1
        assert w.relay.stats().reservations == 2
        assert (await w.ask(revoked, Reserve())).status is Status.PERMISSION_DENIED


async def test_a_circuit_of_a_revoked_peer_ends_within_five_seconds_without_being_told(
    autojump_clock,
):
    async with world() as w:
        near, _ = await transfer(w)
        w.strangers.add(B)
        assert await is_reset(near)
        assert trio.current_time() <= 5


async def test_a_peer_revoked_while_its_circuit_is_opened_gets_none(autojump_clock):
    async with world() as w:
        await w.reserve(B)
        near = await w.say(A, circuit.encode_hop(Connect(B)))
        _, far = await w.links[B].opened.receive()
        w.strangers.add(A)
        w.relay.recheck()
        assert await circuit.read_hop(near) == Answer(Status.CONNECTION_FAILED)
        assert await is_reset(far)


# -- random days -----------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 3)), max_size=30))
@settings(max_examples=20)
def test_property_after_any_day_nothing_is_left(events):
    """Requests, deaths, revocations, resets and time, in any order; then everybody leaves."""
    peers = [member(number) for number in range(4)]

    async def once() -> None:
        async with world(reservations=3, circuits=4, circuits_per_pair=2, message_seconds=1) as w:
            for what, one, other in events:
                source, target = peers[one], peers[other]
                if what == 0:
                    await w.say(source, circuit.encode_hop(Reserve()))
                elif what == 1:
                    await w.say(source, circuit.encode_hop(Connect(target)))
                elif what == 2 and source in w.links:
                    with contextlib.suppress(trio.WouldBlock):
                        _, far = w.links[source].opened.receive_nowait()
                        w.nursery.start_soon(contained, circuit.accept_stop, far)
                elif what == 3 and source in w.links:
                    w.links.pop(source).die()
                elif what == 4:
                    w.strangers ^= {source}
                    w.relay.recheck()
                await trio.sleep(0.1 * other)
                await settled()
                stats = w.relay.stats()
                assert stats.reservations <= 3
                assert len(stats.circuits) <= 4
                ends = {peer for pair in stats.circuits for peer in (pair.source, pair.target)}
                assert not ends & w.strangers
            for link in list(w.links.values()):
                link.die()
            await settled()
            await trio.sleep(2)
            assert w.relay.stats().reservations == 0
            assert w.num_circuits == 0
            assert not w.relay._serving

    trio.run(once, clock=trio.testing.MockClock(autojump_threshold=0))
