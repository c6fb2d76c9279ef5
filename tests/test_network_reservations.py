"""Which relays are asked, when, and what is announced: no I/O, time and chance are given."""

from __future__ import annotations

import random

from circuit_fakes import IDS, member
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfed.network.addresses import pack, parse_direct
from p2pfed.network.circuit import Reservation
from p2pfed.network.reservations import MOST_BACK_OFF, Reservations, Uplink

US = IDS["a"]
R1, R2, R3 = (member(number) for number in (1, 2, 3))
HOUR = 3600.0


def uplink(peer: str, *, inbound=False, relayed=False, is_relay=True) -> Uplink:
    return Uplink(object(), peer, inbound, relayed, is_relay)


def policy(mode="auto", seed=1, keep=2) -> Reservations:
    return Reservations(US, mode=mode, rng=random.Random(seed), keep=keep)


def grant(relay: str, seconds=HOUR, *places: str) -> Reservation:
    places = places or ("/ip4/192.0.2.1/tcp/4001",)
    packed = tuple(pack(parse_direct(f"{place}/p2p/{relay}", relay)) for place in places)
    return Reservation(seconds, addresses=packed)


def settle(one: Reservations, now: float, *, refusing: tuple[str, ...] = ()) -> list[str]:
    """Ask until nobody is left to be asked; return who was."""
    asked = []
    while due := one.to_ask(now):
        for up in due:
            asked.append(up.peer)
            if up.peer in refusing:
                one.failed(up.link, now)
            else:
                one.granted(up.link, grant(up.peer), now)
    return asked


def test_two_of_the_relays_are_asked_and_no_more():
    one = policy()
    one.see([uplink(peer) for peer in (R1, R2, R3)])
    assert len(one.to_ask(0)) == 2
    assert one.to_ask(0) == []  # they have not answered yet


def test_hospitals_spread_over_the_relays():
    chosen = set()
    for seed in range(20):
        one = policy(seed=seed, keep=1)
        one.see([uplink(peer) for peer in (R1, R2, R3)])
        chosen.add(one.to_ask(0)[0].peer)
    assert chosen == {R1, R2, R3}


def test_a_relay_we_dialled_comes_before_one_that_dialled_us():
    for seed in range(10):
        one = policy("always", seed, keep=1)
        one.see([uplink(R1, inbound=True), uplink(R2)])
        assert [up.peer for up in one.to_ask(0)] == [R2]


def test_who_is_no_relay_or_is_itself_behind_one_is_not_asked():
    one = policy()
    one.see([uplink(R1, is_relay=False), uplink(R2, relayed=True)])
    assert one.to_ask(0) == []
    assert one.next_at() is None


def test_the_announced_addresses_lead_through_the_relays_to_us():
    one = policy()
    links = [uplink(R1), uplink(R2)]
    one.see(links)
    for up in one.to_ask(0):
        places = ("/ip4/192.0.2.1/tcp/4001", "/dns4/relay.example/tcp/4001")
        one.granted(up.link, grant(up.peer, HOUR, *places), 0)
    assert sorted(one.addresses(1)) == sorted(
        f"{place}/p2p/{relay}/p2p-circuit/p2p/{US}"
        for relay in (R1, R2)
        for place in ("/ip4/192.0.2.1/tcp/4001", "/dns4/relay.example/tcp/4001")
    )
    assert sorted(one.holders) == sorted([R1, R2])
    assert one.addresses(1) == one.addresses(2)  # in a steady order


def test_what_a_relay_says_it_is_without_sense_is_not_announced():
    one = policy(keep=1)
    one.see([uplink(R1)])
    (up,) = one.to_ask(0)
    foreign = pack(parse_direct(f"/ip4/192.0.2.1/tcp/4001/p2p/{R2}", R2))
    anywhere = pack(parse_direct("/ip4/0.0.0.0/tcp/4001"))
    one.granted(up.link, Reservation(HOUR, addresses=(foreign, anywhere, b"\xff", b"")), 0)
    assert one.addresses(0) == (f"/p2p/{R1}/p2p-circuit/p2p/{US}",)


def test_a_reservation_is_renewed_before_half_of_its_time_and_not_in_step():
    times = set()
    for seed in range(20):
        one = policy(seed=seed, keep=1)
        one.see([uplink(R1)])
        settle(one, 100)
        renewal = one.next_at()
        assert 100 + 0.4 * HOUR <= renewal <= 100 + 0.5 * HOUR
        assert one.to_ask(renewal - 1) == []
        assert [up.peer for up in one.to_ask(renewal)] == [R1]
        assert one.addresses(renewal)  # it still holds while it is renewed
        times.add(renewal)
    assert len(times) == 20


def test_renewing_goes_on_for_days_with_one_relay():
    one = policy(keep=1)
    one.see([uplink(R1)])
    now, asked = 0.0, 0
    while now < 48 * HOUR:
        asked += len(settle(one, now))
        assert one.addresses(now)
        now = one.next_at()
    assert 96 <= asked <= 121


def test_a_renewal_that_nobody_answers_ends_with_the_reservation_and_begins_anew():
    one = policy(keep=1)
    one.see([uplink(R1)])
    settle(one, 0)
    (up,) = one.to_ask(0.5 * HOUR)
    assert one.next_at() == HOUR
    assert one.addresses(HOUR - 1)
    assert one.addresses(HOUR) == ()
    one.granted(up.link, grant(R1), HOUR + 1)  # too late: it was given up
    assert one.addresses(HOUR + 1) == ()
    assert [up.peer for up in one.to_ask(HOUR + 1)] == [R1]


def test_when_a_relay_dies_the_next_is_asked_at_once():
    one = policy()
    links = {peer: uplink(peer) for peer in (R1, R2, R3)}
    one.see(links.values())
    held = settle(one, 0)
    dead, other = held
    del links[dead]
    one.see(links.values())
    assert all(dead not in address for address in one.addresses(10))
    assert settle(one, 10) == [next(p for p in links if p != other)]
    assert len(one.addresses(10)) == 2


def test_a_relay_that_dies_while_it_is_asked_is_replaced_and_its_late_answer_is_nothing():
    one = policy(keep=1)
    links = [uplink(R1), uplink(R2)]
    one.see(links)
    (asked,) = one.to_ask(0)
    one.see([up for up in links if up is not asked])
    one.granted(asked.link, grant(asked.peer), 1)
    one.failed(asked.link, 1)
    assert one.addresses(1) == ()
    (next_one,) = one.to_ask(1)
    assert next_one.peer != asked.peer


def test_a_relay_whose_link_is_replaced_is_asked_again_on_the_new_one_at_once():
    one = policy(keep=1)
    one.see([uplink(R1)])
    settle(one, 0)
    new = uplink(R1)
    one.see([new])
    assert one.addresses(1) == ()
    assert one.to_ask(1) == [new]


def test_a_second_link_to_the_same_relay_changes_nothing_while_the_first_lives():
    one = policy(keep=2)
    first = uplink(R1)
    one.see([first])
    settle(one, 0)
    one.see([uplink(R1), first])
    assert one.to_ask(1) == []
    assert len(one.addresses(1)) == 1


def test_a_relay_that_refuses_is_left_alone_longer_and_longer_up_to_a_minute():
    one = policy(keep=1)
    one.see([uplink(R1)])
    now, waits = 0.0, []
    for _ in range(30):
        assert settle(one, now, refusing=(R1,)) == [R1]
        waits.append(one.next_at() - now)
        now = one.next_at()
    assert waits[0] <= 2
    assert max(waits) <= MOST_BACK_OFF
    assert all(wait >= MOST_BACK_OFF / 2 for wait in waits[6:])
    assert settle(one, now) == [R1]
    up = one.to_ask(now + HOUR / 2)[0]
    one.failed(up.link, now + HOUR / 2)
    assert one.next_at() - (now + HOUR / 2) <= 2  # a success wipes the slate


def test_when_one_refuses_another_is_asked_at_once():
    one = policy(keep=1)
    one.see([uplink(peer) for peer in (R1, R2, R3)])
    settle(one, 0, refusing=(R1, R2))
    assert one.holders == (R3,)


def test_never_is_never():
    one = policy("never")
    one.see([uplink(R1)])
    assert one.to_ask(0) == []
    assert one.next_at() is None
    assert one.addresses(0) == ()


def test_auto_stops_once_somebody_has_reached_us_and_what_is_held_runs_out():
    one = policy("auto")
    links = [uplink(R1), uplink(R2)]
    one.see(links)
    settle(one, 0)
    one.see([*links, uplink(R3, inbound=True, is_relay=False)])
    assert not one.is_wanted
    one.see(links)  # the visitor goes, the firewall stays open
    assert one.to_ask(0.6 * HOUR) == []
    assert len(one.addresses(0.6 * HOUR)) == 2
    assert one.next_at() == HOUR
    assert one.addresses(HOUR) == ()
    assert one.next_at() is None
    one.see([])  # the machine moves
    one.see(links)
    assert one.is_wanted


def test_auto_is_not_deceived_by_a_visitor_through_a_relay():
    one = policy("auto")
    one.see([uplink(R1), uplink(R2, inbound=True, relayed=True)])
    assert [up.peer for up in one.to_ask(0)] == [R1]


def test_always_goes_on_though_we_are_reached():
    one = policy("always")
    one.see([uplink(R1), uplink(R2, inbound=True)])
    assert len(one.to_ask(0)) == 2


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["up", "down", "grant", "refuse", "time"]),
        st.integers(0, 4),
        st.floats(0, 4000),
    ),
    max_size=60,
)


@given(EVENTS, st.sampled_from(["auto", "always", "never"]))
@settings(max_examples=40)
def test_property_whatever_happens_the_bounds_hold(events, mode):
    one = policy(mode)
    links: dict[str, Uplink] = {}
    asked: dict[object, Uplink] = {}
    now = 0.0
    for what, number, value in events:
        peer = member(number)
        if what == "up":
            links[peer] = uplink(peer, inbound=value > 3900, relayed=number == 4)
        elif what == "down":
            links.pop(peer, None)
        elif what == "time":
            now += value
        elif asked:
            link, up = asked.popitem()
            if what == "grant":
                one.granted(link, grant(up.peer, 60 + value), now)
            else:
                one.failed(link, now)
        one.see(links.values())
        for up in one.to_ask(now):
            assert up in links.values()
            assert not up.relayed
            asked[up.link] = up
        assert len(one.holders) <= 2
        assert set(one.holders) <= set(links)
        assert len(one.addresses(now)) == len(one.holders)
        following = one.next_at()
        if mode == "never":
            assert following is None
        elif following is not None and one.is_wanted:
            assert following > now
