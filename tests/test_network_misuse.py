"""What a member, a stranger or our own settings must not do to a node: one sentence each."""

from __future__ import annotations

import contextlib
import datetime as dt
import random

import pytest
import trio
from circuit_fakes import IDS as FAKES
from circuit_fakes import member
from consortium import Consortium, key_of, peer_of
from memory_wire import channels
from node_parts import a_node
from test_network_gate import IDS, LOOPBACK, SEEDS, Gate, node
from test_network_link import alone, frame
from test_network_relayed import IDS as RELAYED
from test_network_relayed import hospital, relay, until

from p2pfed.errors import PeerUnreachable
from p2pfed.gossip.core import Core
from p2pfed.gossip.events import Connected, Keep, Received, Tick
from p2pfed.identity.signing import DELTA, sign
from p2pfed.network import FrameReceived, Limits, PeerConnected, open_network
from p2pfed.network.addresses import Networks, pack, parse_direct
from p2pfed.network.circuit import Answer, Reservation, Status, encode_hop, reserve
from p2pfed.network.host import Host
from p2pfed.network.link import Link
from p2pfed.network.pace import Pace
from p2pfed.network.relay import RelayLimits
from p2pfed.network.reservations import Reservations, Uplink
from p2pfed.network.serving import Serving
from p2pfed.wire.messages import Addresses, decode_message, encode_message
from p2pfed.wire.spreading import Doubted

US, RELAY = FAKES["a"], member(1)


def core_of(net: Consortium, **options) -> Core:
    return Core(
        own_id=peer_of(0),
        sign=lambda data: sign(key_of(0).seed, DELTA, data),
        book=net.book(),
        rng=random.Random(1),
        **options,
    )


# -- what a relay says of itself -------------------------------------------------------------------


def test_a_relay_with_a_long_name_does_not_make_our_beat_one_that_others_refuse():
    one = Reservations(US, mode="auto", rng=random.Random(1))
    up = Uplink(object(), RELAY, inbound=False, relayed=False, is_relay=True)
    one.see([up])
    assert one.to_ask(0) == [up]
    name = ".".join(["a" * 60] * 4)
    place = parse_direct(f"/dns4/{name}/tcp/1/p2p/{RELAY}", RELAY)
    one.granted(up.link, Reservation(3600.0, addresses=(pack(place),)), 0)
    net = Consortium(3)
    core = core_of(net, addresses=one.addresses(0))
    (first, *_) = core.handle(Connected(peer_of(1)), 0.0)
    decode_message(first.frame)  # else whoever hears us hangs up, and refuses us at the third time


async def test_a_reservation_is_renewed_in_time_whatever_the_relays_clock_says(autojump_clock):
    ours = 1e9
    for ahead in (-7200, 0, 7200, 30 * 3600):
        answer = encode_hop(Answer(Status.OK, expires_at=int(ours + ahead) + 3600))

        class Relay:
            said = bytes([len(answer)]) + answer

            async def read(self, n: int) -> bytes:
                head, self.said = self.said[:n], self.said[n:]
                return head

            async def write(self, data) -> None:
                pass

        got = await reserve(Relay(), wall=lambda: ours)
        # It is renewed before half of what is believed is over; the relay keeps it for an hour.
        assert got.expires_in / 2 < RelayLimits().reservation_seconds


# -- strangers -------------------------------------------------------------------------------------


async def test_streams_that_are_opened_and_reset_before_anybody_looks_are_not_kept(autojump_clock):
    async with alone() as (link, far):
        for first in range(0, 20_000, 200):
            pairs = (
                frame(1, 1, 2 * n + 2) + frame(1, 8, 2 * n + 2) for n in range(first, first + 200)
            )
            await far.write(b"".join(pairs))
            await trio.sleep(0.01)
        assert not link.is_over
        assert len(link._muxer.opened) <= Limits().streams


# -- the fence -------------------------------------------------------------------------------------


async def test_a_name_that_leads_out_of_the_allowed_networks_is_not_even_connected_to():
    touched = []
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]

    async def notice() -> None:
        tcp = await listener.accept()
        touched.append(tcp.socket.getpeername())
        await tcp.aclose()

    async with trio.open_nursery() as nursery, listener:
        nursery.start_soon(notice)
        fenced = Host(
            seed=b"x" * 32, gatekeeper=Gate(), limits=Limits(), allowed=Networks(["192.0.2.0/24"])
        )
        with pytest.raises(PeerUnreachable):
            await fenced.dial(IDS["b"], f"/dns4/localhost/tcp/{port}")
        await trio.sleep(0.1)
        assert touched == []
        nursery.cancel_scope.cancel()


# -- links that end --------------------------------------------------------------------------------


async def test_work_given_to_a_link_that_is_just_ending_is_dropped(autojump_clock):
    async def nothing() -> None:
        pass

    for _ in range(100):
        dialled, _other = channels()
        link = Link(dialled, inbound=False, limits=Limits(), pace=Pace())

        async def leave(link) -> None:
            await trio.lowlevel.checkpoint()

        async def insist(link=link) -> None:
            while not link.is_over:
                link.spawn(nothing)  # what Reach.keep does, in the network's own nursery
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(insist)
            nursery.start_soon(link.run, leave)


# -- liars -----------------------------------------------------------------------------------------


def test_in_a_crowd_two_liars_do_not_make_a_node_eight_times_as_patient():
    net = Consortium(40)
    core = core_of(net)
    membership = core.membership
    assert membership.is_crowd
    for i in range(1, 12):
        core.handle(Connected(peer_of(i)), 0.0)
    for step in range(120):
        now = step * 0.25
        core.handle(Tick(dt.datetime(2026, 6, 1, tzinfo=dt.UTC)), now)
        if step % 4 == 0:
            for liar in (1, 2):
                told = encode_message(Doubted(first_hand=True))
                core.handle(Received(peer_of(liar), told), now)
    assert membership.health.factor == 1


def test_a_member_that_moved_is_found_by_what_others_say_of_it():
    """We cannot be dialled and it has a new address: nobody else can bring us together."""
    net = Consortium(4)
    core = core_of(net)
    old, new = ("/ip4/192.0.2.1/tcp/1",), ("/ip4/198.51.100.1/tcp/1",)
    core.handle(Connected(peer_of(2)), 0.0)
    core.membership.get(peer_of(1)).addresses = old  # from its own beat, before it moved
    told = encode_message(Addresses(((peer_of(1), new),)))
    effects = core.handle(Received(peer_of(2), told), 100.0)
    kept = [e for e in effects if isinstance(e, Keep)]
    assert kept
    assert set(kept[0].addresses) == {*old, *new}


# -- through relays --------------------------------------------------------------------------------


def test_a_visitor_from_the_same_house_does_not_show_that_those_outside_can_come_in():
    """Two nodes of one hospital behind one NAT reach each other, and nobody else reaches them."""
    one = Reservations(US, mode="auto", rng=random.Random(1))
    neighbour = Uplink(object(), member(2), True, relayed=False, is_relay=False, is_near=True)
    relay = Uplink(object(), RELAY, False, relayed=False, is_relay=True)
    one.see([neighbour])
    assert not one.is_wanted  # for all we know everybody is in this house
    one.see([neighbour, relay])
    assert one.to_ask(0) == [relay]
    one.see([neighbour, relay, Uplink(object(), member(3), True, relayed=False, is_relay=False)])
    assert not one.is_wanted


@pytest.mark.slow
async def test_who_reaches_several_members_through_one_relay_dials_it_once():
    async with (
        trio.open_nursery() as nursery,
        relay("r", nursery) as hop,
        hospital("b", nursery) as b,
        hospital("s", nursery) as s,
    ):
        for end in (b, s):
            end.network.keep_connected(RELAYED["r"], hop.network.addresses())
        await until(lambda: len(b.addresses) == len(s.addresses) == 1)
        links = set()
        async with hospital("a", nursery) as a:
            a.network.keep_connected(RELAYED["b"], b.addresses)
            a.network.keep_connected(RELAYED["s"], s.addresses)
            with trio.move_on_after(1.5):
                while True:
                    session = hop.network._sessions.get(RELAYED["a"])
                    links |= session.links if session is not None else set()
                    await trio.sleep(0.01)
            assert a.network.stats(RELAYED["b"]).via == RELAYED["r"]
            assert a.network.stats(RELAYED["s"]).via == RELAYED["r"]
            assert a.lost == []
            assert len(links) == 1


class _Relayed:
    peer, is_relayed = "r", True


class _Holds:
    def holds(self, relay: str) -> bool:
        return True


async def test_a_relay_cannot_bring_a_circuit_inside_a_circuit(autojump_clock):
    serving = Serving(None, Gate(), Limits(), tell=None, carry=None, reach=_Holds(), relay=None)
    with pytest.raises(PeerUnreachable, match="inside a circuit"):
        await serving._serve_stop(_Relayed(), None)


# -- rates -----------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_the_rate_of_frames_is_one_peers_and_not_one_streams():
    limits = Limits(frames_per_second=50.0)
    async with node("a", limits=limits) as a, node("b") as b:
        b.keep_connected(a.peer_id, a.addresses())
        assert isinstance(await b.events.receive(), PeerConnected)
        for _ in range(150):
            assert b.send(a.peer_id, b"short")
            assert b.send(a.peer_id, bytes(5000))
        taken = 0
        with trio.move_on_after(1.5):
            async for event in a.events:
                taken += isinstance(event, FrameReceived)
        assert 60 < taken < 140  # 50 at once and 50 a second


@pytest.mark.slow
async def test_an_upload_limit_slows_bulk_down_and_cuts_nobody_off():
    limits = Limits(stall_seconds=0.5, links=8)
    async with contextlib.AsyncExitStack() as stack:
        a = await stack.enter_async_context(
            open_network(
                seed=SEEDS["a"],
                listen=LOOPBACK,
                gatekeeper=Gate("abx"),
                limits=limits,
                upload_bytes_per_second=400_000,
            )
        )
        others = [await stack.enter_async_context(node(name)) for name in "bx"]
        for other in others:
            other.keep_connected(a.peer_id, a.addresses())
            assert isinstance(await other.events.receive(), PeerConnected)
            assert isinstance(await a.events.receive(), PeerConnected)
        for other in others:
            assert a.send(other.peer_id, bytes(300_000))
        with trio.fail_after(30):
            for other in others:
                assert isinstance(await other.events.receive(), FrameReceived)


# -- who is no member any more ---------------------------------------------------------------------


class _Forgetful(Gate):
    """b is revoked while it is being dialled."""

    asked = 0

    def is_member(self, peer: str) -> bool:
        self.asked += 1
        return self.asked <= 2


@pytest.mark.slow
async def test_who_is_revoked_while_it_is_dialled_is_told_nothing():
    theirs = Gate()
    async with node("b", theirs) as b, node("a", _Forgetful(offer=b"ours")) as a:
        a.keep_connected(b.peer_id, b.addresses())
        await trio.sleep(0.5)
        assert theirs.heard == []


# -- hearsay ---------------------------------------------------------------------------------------


async def test_no_hearsay_takes_the_place_of_the_operators_own_list(tmp_path):
    """Else the first member that a newcomer meets could keep it for itself."""
    right, wrong = f"/ip4/192.0.2.7/tcp/1/p2p/{peer_of(2)}", "/ip4/192.0.2.66/tcp/1"
    listed = {"version": 1, "peer": [{"name": "h2", "addrs": [right]}]}
    async with a_node(tmp_path) as node:
        await node.operator.join(roster=node.consortium.signed[-1], bootstrap=[listed])
        node.beat_of(1)
        lie = encode_message(Addresses(((peer_of(2), (wrong,)),)))
        node.network.tell.send_nowait(FrameReceived(peer_of(1), lie))
        await node.until(lambda: any(wrong in where for _, where in node.network.of("keep")))
        assert all(right in where for _, where in node.network.of("keep"))
