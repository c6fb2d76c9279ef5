"""Committees: who releases in a round, drawn by a public hash."""

from __future__ import annotations

from collections import Counter

import pytest
from consortium import Consortium, hospital, peer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scenario import World

from p2pfed.gossip.committee import AUTOMATIC, Committees, seats
from p2pfed.gossip.rounds import furthest_round
from p2pfed.identity.rules import Averaging

NET = Consortium(12)
RUN = NET.run(averaging=Averaging(committee=4), rounds=200)


def test_a_small_network_has_no_committee_and_a_large_one_of_sixty_four():
    assert seats(NET.run(), 64) == 64
    assert seats(NET.run(), 65) == AUTOMATIC == 64
    assert seats(RUN, 1000) == 4
    assert seats(RUN, 3) == 3


@given(st.integers(0, 10**6), st.permutations(range(12)))
def test_the_draw_depends_on_run_round_and_members_and_not_on_their_order(round_, order):
    shuffled = NET.roster.next(members=[NET.roster.members[i] for i in order])
    drawn = Committees(RUN).of(NET.roster, round_)
    assert len(drawn) == 4
    assert drawn == Committees(RUN).of(shuffled, round_)


def test_only_members_that_train_have_a_seat():
    net = Consortium(3)
    net.grow(hospital(3, roles=("relay",)), hospital(4, samples=0))
    run = net.run(averaging=Averaging(committee=5))
    assert Committees(run).of(net.roster, 7) == {peer_of(0), peer_of(1), peer_of(2)}


def test_everyone_gets_a_seat_about_equally_often():
    """200 draws of 4 of 12: a seat in 67 rounds on average.

    By Chernoff P(count < 22 or > 150) for Binomial(200, 1/3) is below 1e-10 for each of twelve
    members; the draw is fixed, so this fails always or never.
    """
    committees = Committees(RUN)
    taken = Counter(peer for r in range(200) for peer in committees.of(NET.roster, r))
    assert set(taken) == {peer_of(i) for i in range(12)}
    assert all(22 <= count <= 150 for count in taken.values())


def test_a_delta_of_one_without_a_seat_counts_nothing():
    facts = NET.facts(RUN, [NET.delta(RUN, 0, i) for i in range(12)])
    seated = Committees(RUN).of(NET.roster, 0)
    assert {c.origin for c in facts.counted(0)} == seated
    assert facts.num_deltas == 12  # held, and the same everywhere, whatever anyone thinks of seats


def test_with_committees_only_those_who_train_are_asked_and_all_hold_one_model():
    world = World(8, averaging=Averaging(committee=3), rounds=12, deadline_s=6.0)
    world.add(*range(8))
    world.run_to_the_end()
    committees = Committees(world.run)
    for node in world.nodes:
        mine = [r for r in range(12) if node.peer_id in committees.of(world.net.roster, r)]
        assert node.trained_rounds == mine
    assert len({node.hash for node in world.nodes}) == 1


def test_a_committee_that_is_away_does_not_stop_the_run():
    world = World(6, averaging=Averaging(committee=1), rounds=8, min_live=0.3, deadline_s=2.0)
    committees = Committees(world.run)
    away = next(iter(committees.of(world.net.roster, 0)))
    world.add(*(i for i in range(6) if peer_of(i) != away))
    world.run_to_the_end()
    assert len({node.hash for node in world.nodes}) == 1
    assert all(node.core.progress.round == 8 for node in world.nodes)


@settings(max_examples=60)
@given(st.data())
def test_a_third_liars_with_less_of_a_committees_weight_drag_nobody(data):
    """Whatever rounds they sign: less than a third of every committee moves no one."""
    peers = [f"p{i}" for i in range(9)]
    weights = dict.fromkeys(peers, 10)
    seated = {r: frozenset(peers[r % 3 :: 3] + peers[(r + 1) % 3 :: 3]) for r in range(60)}
    liars = {"p0", "p4"}  # at most one in any six
    newest = {p: data.draw(st.integers(0, 20)) for p in peers if p not in liars}
    honest = furthest_round(weights, newest, seated.__getitem__)
    lied = newest | {p: data.draw(st.integers(0, 59)) for p in liars}
    assert furthest_round(weights, lied, seated.__getitem__) <= max(honest, *newest.values())


@pytest.mark.parametrize("ahead", [3, 57])
def test_a_committee_member_alone_in_a_far_round_drags_nobody(ahead):
    weights = dict.fromkeys("abcdef", 10)
    assert furthest_round(weights, {"a": ahead}, lambda _r: frozenset("abcd")) == 0


def test_a_third_of_a_far_committees_seats_is_not_a_third_of_the_weight():
    """Who sends a delta for every future round finds one in which the hash seats it well."""
    net = Consortium(12, samples=[10] * 12)
    run = net.run(rounds=200, averaging=Averaging(committee=3))
    facts = net.facts(run)
    liar = peer_of(5)
    for round_ in range(3, 200):
        seated = facts.seated(net.roster.hash, round_)
        target = furthest_round(
            facts.weights(net.roster.hash),
            {liar: round_},
            lambda r: facts.seated(net.roster.hash, r),
            slack=facts.turn(net.roster.hash),
        )
        assert target == 0, (round_, liar in seated)


def test_with_committees_a_node_that_is_behind_still_finds_the_others():
    net = Consortium(12, samples=[10] * 12)
    run = net.run(rounds=200, averaging=Averaging(committee=3))
    facts = net.facts(run)
    newest: dict[str, int] = {}
    for round_ in range(101):
        newest |= dict.fromkeys(facts.seated(net.roster.hash, round_), round_)
    target = furthest_round(
        facts.weights(net.roster.hash),
        newest,
        lambda r: facts.seated(net.roster.hash, r),
        beyond=7,
        slack=facts.turn(net.roster.hash),
    )
    assert target == 100
