"""What is held of a run: cold or hot, every question has one answer."""

from __future__ import annotations

import sys

from consortium import Consortium, peer_of, some_payload
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfed.gossip.facts import RunFacts
from p2pfed.gossip.held import Held
from p2pfed.wire.delta import Proof

NET = Consortium(3)
RUN = NET.run(rounds=20)
DELTAS = [NET.delta(RUN, r, i) for r in range(6) for i in range(3)]
BY_NAME = {d.fact: d.signed for d in DELTAS}


def answers(held: Held) -> list:
    return [
        (
            sorted(held.entries(r)),
            sorted(held.origins(r)),
            [held.entry(r, peer_of(i)) for i in range(4)],
            [held.signed(r, peer_of(i)) for i in range(4)],
        )
        for r in range(7)
    ] + [len(held), held.count(peer_of(1)), sorted(held.rounds())]


@settings(max_examples=40, deadline=None)
@given(st.permutations(DELTAS), st.lists(st.tuples(st.integers(0, 17), st.integers(0, 7))))
def test_cool_changes_no_answer(order, coolings):
    held, cooled = Held(), Held(BY_NAME.__getitem__)
    for at, delta in enumerate(order):
        held.add(delta.signed)
        cooled.add(delta.signed)
        for when, before in coolings:
            if when == at:
                cooled.cool(before)
    assert answers(cooled) == answers(held)


def test_a_second_variant_of_a_cold_delta_is_still_proven():
    facts = RunFacts(RUN, NET.book(), BY_NAME.__getitem__)
    for delta in DELTAS:
        facts.add(delta.signed)
    facts.cool(6)
    assert facts.add(DELTAS[4].signed) is None  # the same again
    other = NET.delta(RUN, 1, 1, some_payload(RUN, 1, 1, 9))
    proof = facts.add(other.signed)
    assert isinstance(proof, Proof)
    assert facts.add_proof(proof)
    assert not facts.tree.facts(1) & {DELTAS[4].fact, other.fact}


def test_a_cold_delta_takes_forty_bytes_and_its_name():
    held = Held(BY_NAME.__getitem__)
    for delta in DELTAS:
        held.add(delta.signed)
    held.cool(6)
    assert not held._hot
    assert sum(map(len, held._cold.values())) == 40 * len(DELTAS)
    assert sys.getsizeof(held._cold[0]) < 40 * 3 + 60


def test_without_an_archive_nothing_gets_cold():
    held = Held()
    held.add(DELTAS[0].signed)
    held.cool(9)
    assert held.signed(0, peer_of(0)) is DELTAS[0].signed
