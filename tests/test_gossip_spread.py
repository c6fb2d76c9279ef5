"""Spreading by seat: one message tells a round, nothing is asked twice, names where seats fail."""

from __future__ import annotations

import pytest
from consortium import Consortium, hospital, peer_of, some_payload

from p2pfed.errors import RemoteProtocolError
from p2pfed.gossip.asked import PATIENCE
from p2pfed.gossip.events import SendStored
from p2pfed.gossip.facts import RunFacts
from p2pfed.gossip.spread import PORTIONS, WARM_ROUNDS
from p2pfed.gossip.sync import Sync
from p2pfed.wire.delta import Proof
from p2pfed.wire.messages import Have, decode_message
from p2pfed.wire.seats import decode_seats, encode_seats, seats_in
from p2pfed.wire.spreading import Held, Portion, Wanted

NET = Consortium(5)
RUN = NET.run(rounds=100)
ORDER = sorted(peer_of(i) for i in range(5))


class Node:
    """One side, with what it holds."""

    def __init__(self, *held: tuple[int, int], net: Consortium = NET, aside=(), versions=()):
        self.net = net
        self.facts = RunFacts(RUN, net.book(*versions))
        self.sync = Sync(net.book(*versions), lambda key: key in aside)
        self.sync.take_run(self.facts)
        self.spread = self.sync.spread
        for round_, i in held:
            self.take(round_, i)

    def take(self, round_: int, i: int, salt: int = 0):
        delta = self.net.delta(RUN, round_, i, some_payload(RUN, round_, i, salt))
        self.facts.add(delta.signed)
        self.spread.added(round_, peer_of(i), 2)
        self.sync.arrived(delta.signed)
        return delta


def said(effects, kind):
    messages = [decode_message(e.frame) for e in effects if not isinstance(e, SendStored)]
    return [m for m in messages if isinstance(m, kind)]


def who(portion: Portion) -> set[str]:
    return {ORDER[seat] for seat in seats_in(decode_seats(portion.seats, 5))}


def peers(*hospitals: int) -> set[str]:
    return {peer_of(i) for i in hospitals}


def shown(node: Node, *rounds: int) -> Held:
    [message] = said(node.spread.show("x", rounds), Held)
    return message


def test_what_is_held_is_told_by_seat_and_each_side_gets_what_it_lacks():
    one, other = Node((0, 0), (0, 1)), Node((0, 1), (0, 2), (0, 3))
    effects = other.spread.on_held("one", shown(one, 0), 0.0)
    [wanted], [lacking] = said(effects, Wanted), said(effects, Held)
    assert who(wanted.portions[0]) == peers(0)
    assert lacking.is_answer
    assert who(lacking.portions[0]) == peers(2, 3)
    [stored] = one.spread.on_wanted("other", wanted)
    assert stored.deltas == (NET.delta(RUN, 0, 0).fact,)
    [asked] = said(one.spread.on_held("other", lacking, 0.0), Wanted)
    assert who(asked.portions[0]) == peers(2, 3)


def test_an_answer_is_not_answered_by_what_the_other_lacks():
    one, other = Node((0, 0)), Node((0, 1))
    answer = Held(*[getattr(shown(one, 0), f) for f in ("run", "roster")], True, ())
    assert other.spread.on_held("one", answer, 0.0) == []


def test_two_that_hold_the_same_are_silent():
    one, other = Node((0, 0), (1, 2)), Node((0, 0), (1, 2))
    assert other.spread.on_held("one", shown(one, 0, 1), 0.0) == []


def test_a_delta_is_asked_of_one_peer_at_a_time_by_seat_and_by_name():
    one, other = Node((0, 0)), Node()
    assert said(other.spread.on_held("a", shown(one, 0), 0.0), Wanted)
    assert said(other.spread.on_held("b", shown(one, 0), PATIENCE / 2), Wanted) == []
    assert said(other.spread.on_held("b", shown(one, 0), PATIENCE + 0.1), Wanted)
    other.sync.asked.gone("b")
    assert said(other.spread.on_held("c", shown(one, 0), PATIENCE + 0.2), Wanted)


def test_what_is_set_aside_or_out_of_the_set_is_not_asked_for():
    one = Node((5, 0), (5, 1))
    other = Node((5, 1), aside={(5, peer_of(0))})
    proof = Proof.of(
        NET.delta(RUN, 5, 1).signed, NET.delta(RUN, 5, 1, some_payload(RUN, 5, 1, 1)).signed
    )
    other.facts.add_proof(proof)
    assert said(other.spread.on_held("a", shown(one, 5), 0.0), Wanted) == []


def test_two_variants_of_one_delta_are_found_by_name():
    one, other = Node((0, 0)), Node()
    other.take(0, 0, salt=1)
    [names] = said(other.spread.on_held("one", shown(one, 0), 0.0), Have)
    assert names.full
    assert names.names == some_name(other)


def some_name(node: Node) -> bytes:
    [fact] = node.facts.tree.facts(0)
    return fact[:16]


def test_an_origin_that_is_not_on_the_roster_is_found_by_name():
    net = Consortium(5)
    net.grow(hospital(7))
    veteran = Node(net=net)
    veteran.take(0, 7)
    behind = Node(net=net, versions=(1, 2))
    told = shown(veteran, 0)
    assert said(behind.spread.on_held("x", told, 0.0), Have)  # it does not know the roster
    back = veteran.spread.on_held("x", shown(behind, 0), 0.0)
    assert said(back, Have)[0].names == some_name(veteran)  # seats of the older roster lack h7


def test_a_proof_takes_an_origin_off_its_seat_at_once():
    node = Node((0, 0), (0, 1))
    assert who(shown(node, 0).portions[0]) == peers(0, 1)
    other = NET.delta(RUN, 0, 1, some_payload(RUN, 0, 1, 1))
    node.facts.add_proof(Proof.of(NET.delta(RUN, 0, 1).signed, other.signed))
    assert who(shown(node, 0).portions[0]) == peers(0)
    node.take(0, 2)
    assert who(shown(node, 0).portions[0]) == peers(0, 2)


@pytest.mark.parametrize("seats", [b"", b"\x09", b"\x00\xff\xff", b"\x01\x05"])
def test_seats_that_there_are_not_are_refused(seats):
    node = Node((0, 0))
    told = shown(node, 0)
    with pytest.raises(RemoteProtocolError):
        node.spread.on_held("x", Held(told.run, told.roster, False, (Portion(0, seats),)), 0.0)
    with pytest.raises(RemoteProtocolError):
        node.spread.on_wanted("x", Wanted(told.run, told.roster, (Portion(0, seats),)))


def test_another_run_and_rounds_beyond_the_last_are_none_of_our_business():
    node, full = Node((0, 0)), encode_seats(0b11111, 5)
    told = shown(node, 0)
    assert node.spread.on_held("x", Held(b"?" * 4, told.roster, False, told.portions), 0.0) == []
    assert node.spread.on_wanted("x", Wanted(b"?" * 4, told.roster, told.portions)) == []
    beyond = Held(told.run, told.roster, False, (Portion(RUN.rounds, full),))
    assert node.spread.on_held("x", beyond, 0.0) == []
    without_run = Sync(NET.book(), lambda _key: False).spread
    assert without_run.show("x", [0]) == without_run.on_held("x", told, 0.0) == []


def test_many_rounds_are_shown_in_messages_of_a_few():
    node = Node()
    messages = said(node.spread.show("x", range(40)), Held)
    assert [len(m.portions) for m in messages] == [PORTIONS, PORTIONS, 40 - 2 * PORTIONS]
    assert said(Node().spread.on_held("x", messages[0], 0.0), Wanted) == []


# --- when ----------------------------------------------------------------------------------------


def test_a_new_delta_warms_its_round_for_a_few_contacts():
    node = Node()
    assert not node.spread.is_due(0.0)
    node.take(3, 0)
    contacts, now = 0, 0.0
    while node.spread.is_due(now):
        [held] = said(node.spread.contact("x", now, brisk=0.25), Held)
        assert 3 in [p.round for p in held.portions]
        assert not node.spread.is_due(now + 0.2)
        contacts, now = contacts + 1, now + 0.25
    assert contacts == 2


def test_a_round_that_trickles_in_is_told_ever_more_slowly():
    node, now, gaps = Node(), 0.0, []
    for _ in range(60):
        node.take(0, 0)
        before = now
        while not node.spread.is_due(now):
            now += 0.25
        node.spread.contact("x", now, brisk=0.25)
        gaps.append(now - before)
    assert gaps[1] <= 0.25
    assert gaps == sorted(gaps)
    assert gaps[-1] > 1.0


def test_only_the_newest_rounds_stay_warm():
    node = Node(*((r, 0) for r in range(30)))
    [held] = said(node.spread.contact("x", 0.0, brisk=0.25), Held)
    assert [p.round for p in held.portions] == list(range(30 - WARM_ROUNDS, 30))
