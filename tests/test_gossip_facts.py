"""The believed facts of a run: who counts, from which round on, with what weight."""

from __future__ import annotations

import contextlib

import pytest
from consortium import Consortium, hospital, peer_of, some_payload
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfed.errors import FactRejected
from p2pfed.gossip.facts import RunFacts
from p2pfed.wire.delta import Proof

NET = Consortium(3)
RUN = NET.run()
ALL = [NET.delta(RUN, r, i) for r in range(5) for i in range(3)]


def variant(round_: int, i: int, salt: int = 1):
    return NET.delta(RUN, round_, i, some_payload(RUN, round_, i, salt))


def proof_of(round_: int, i: int, salts=(0, 1)) -> Proof:
    one, other = (variant(round_, i, salt) for salt in salts)
    return Proof.of(one.signed, other.signed)


def counted(facts: RunFacts, rounds: int = 5) -> list[tuple[int, str, int]]:
    return [(r, c.origin, c.weight) for r in range(rounds) for c in facts.counted(r)]


@pytest.mark.slow
@settings(max_examples=30)
@given(st.permutations(ALL))
def test_the_order_in_which_deltas_arrive_does_not_matter(deltas):
    one, other = NET.facts(RUN, ALL), NET.facts(RUN, deltas)
    assert counted(one) == counted(other)
    assert one.chain(5) == other.chain(5)
    assert one.tree.cover() == other.tree.cover()


def test_a_delta_weighs_what_the_roster_that_it_names_says():
    net = Consortium(2, samples=[10, 20])
    net.publish(net.roster.next(members=[hospital(0, 99), hospital(1, 20)]))
    run = net.run()
    facts = net.facts(
        run,
        [
            net.delta(run, 0, 0, roster=net.rosters[1]),
            net.delta(run, 0, 1),
            net.delta(run, 1, 0),
        ],
    )
    assert sorted(c.weight for c in facts.counted(0)) == [10, 20]
    assert [c.weight for c in facts.counted(1)] == [99]


@pytest.mark.parametrize("member", [None, hospital(5, roles=("relay",)), hospital(5, samples=0)])
def test_a_delta_of_one_who_does_not_train_counts_nothing(member):
    net = Consortium(2)
    if member is not None:
        net.grow(member)
    run = net.run()
    assert net.facts(run, [net.delta(run, 0, 5)]).counted(0) == ()


def test_a_delta_under_an_unknown_roster_waits_and_then_counts():
    net = Consortium(2)
    net.grow(hospital(5))
    run = net.run()
    book = net.book(1, 2)
    deltas = [net.delta(run, 0, 0, roster=net.rosters[1]), net.delta(run, 1, 5)]
    facts = net.facts(run, deltas, book)
    before = facts.chain(2)
    assert facts.counted(1) == ()
    book.add(net.signed[2])
    facts.rosters_changed()
    assert [c.origin for c in facts.counted(1)] == [peer_of(5)]
    assert facts.chain(2) != before
    assert facts.chain(2) == net.facts(run, deltas).chain(2)


@pytest.mark.parametrize("from_round", [0, 2, 4, 9])
def test_revocation_takes_out_exactly_the_rounds_from_its_round_on(from_round):
    net = Consortium(3)
    run = net.run()
    deltas = [net.delta(run, r, i) for r in range(5) for i in range(3)]
    facts = net.facts(run, deltas, book := net.book())
    untouched = [facts.chain(r) for r in range(6)]
    book.add(net.publish(net.roster.revoke(peer_of(1), reason="test", from_round=from_round)))
    facts.rosters_changed()
    never = net.facts(
        run,
        [d for d in deltas if d.header.origin != peer_of(1) or d.header.round < from_round],
        book,
    )
    assert [facts.chain(r) for r in range(6)] == [never.chain(r) for r in range(6)]
    for r in range(6):
        assert (facts.chain(r) == untouched[r]) == (r <= from_round)


@pytest.mark.parametrize("proven", [0, 2, 4])
@pytest.mark.parametrize("early", [True, False], ids=["proof first", "deltas first"])
def test_a_proof_takes_its_origin_out_from_the_proven_round_on(proven, early):
    facts = NET.facts(RUN, [] if early else ALL)
    assert facts.add_proof(proof_of(proven, 1))
    for delta in ALL if early else []:
        facts.add(delta.signed)
    kept = [d for d in ALL if d.header.origin != peer_of(1) or d.header.round < proven]
    clean = NET.facts(RUN, kept)
    assert facts.chain(5) == clean.chain(5)
    assert counted(facts) == counted(clean)
    assert [facts.tree.digest(r, 1) for r in range(5)] == [
        clean.tree.digest(r, 1) for r in range(5)
    ]


def test_a_second_variant_gives_a_proof_and_is_not_taken_in():
    facts = NET.facts(RUN, ALL)
    assert facts.add(ALL[0].signed) is None
    proof = facts.add(variant(0, 0).signed)
    assert proof is not None
    assert {proof.first.fact, proof.second.fact} == {ALL[0].fact, variant(0, 0).fact}
    assert facts.num_deltas == len(ALL)


@settings(max_examples=40)
@given(st.permutations([proof_of(r, 1, s) for r in (3, 1, 4) for s in ((0, 1), (0, 2), (1, 2))]))
def test_of_many_proofs_for_one_round_one_is_kept_and_the_flood_changes_nothing(proofs):
    facts = NET.facts(RUN, ALL)
    for proof in proofs:
        facts.add_proof(proof)
    assert len(facts.proofs) == 1
    chain = facts.chain(5)
    for salts in ((0, 1), (0, 2), (1, 2)):
        assert not facts.add_proof(proof_of(1, 1, salts))
    assert facts.chain(5) == chain


def test_chains_say_which_deltas_are_folded():
    one, other = NET.facts(RUN, ALL), NET.facts(RUN, [d for d in ALL if d is not ALL[7]])
    late = ALL[7].header.round
    for r in range(6):
        assert (one.chain(r) == other.chain(r)) == (r <= late)
    other.add(ALL[7].signed)
    assert one.chain(5) == other.chain(5)


def test_an_adopted_checkpoint_is_believed_until_the_archive_is_complete():
    whole = NET.facts(RUN, ALL)
    joiner = NET.facts(RUN, ALL[9:])
    own = joiner.chain(3)
    joiner.adopt(3, whole.chain(3))
    assert joiner.chain(5) == whole.chain(5) != own
    assert joiner.adopted == (3, whole.chain(3))
    for delta in ALL[:9]:
        joiner.add(delta.signed)
    joiner.archive_complete()
    assert joiner.adopted_round == 0
    assert joiner.chain(5) == whole.chain(5)


def _changing_network():
    """Deltas under three rosters, a member added, one revoked, one forgotten, one equivocating."""
    net = Consortium(4)
    run = net.run(rounds=8)
    old = [net.delta(run, r, i) for r in range(4) for i in range(4)]
    net.grow(hospital(5, 30))
    mid = [net.delta(run, r, i) for r in (4, 5) for i in (0, 1, 2, 3, 5)]
    net.publish(net.roster.revoke(peer_of(1), reason="key lost", from_round=2))
    net.publish(net.roster.revoke(peer_of(3), reason="left the study", from_round=0))
    new = [net.delta(run, r, i) for r in (6, 7) for i in (0, 2, 5)]
    proof = Proof.of(mid[2].signed, net.delta(run, 4, 2, some_payload(run, 4, 2, 9)).signed)
    return net, run, [*old, *mid, *new], proof


CHANGING = _changing_network()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_one_hash_whatever_the_order_of_deltas_rosters_revocations_and_proofs(data):
    net, run, deltas, proof = CHANGING
    news = [("delta", d) for d in deltas] + [("proof", proof)]
    news += [("roster", signed) for signed in net.signed[2:]]
    order = data.draw(st.permutations(news))
    book = net.book(1, 2)
    facts, early = RunFacts(run, book), []
    for kind, fact in order:
        if kind == "delta":
            facts.add(fact.signed, late=data.draw(st.booleans()))
        elif kind == "proof":
            facts.add_proof(fact)
        else:
            early.append(fact)
            for signed in list(early):  # one may vouch for another that came before it
                with contextlib.suppress(FactRejected):
                    book.add(signed)
                    early.remove(signed)
            facts.rosters_changed()
    for signed in net.signed[2:]:  # whoever was refused is sent again by the next peer
        book.add(signed)
    facts.rosters_changed()
    facts.fold_late(facts.late_rounds)
    whole = net.facts(run, deltas)
    whole.add_proof(proof)
    assert facts.chain(8) == whole.chain(8)
    assert counted(facts, 8) == counted(whole, 8)
    assert {origin for _, origin, _ in counted(whole, 8)} == {peer_of(i) for i in (0, 1, 2, 5)}
