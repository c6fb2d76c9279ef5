"""What one lying member may do to a hospital that joins."""

from __future__ import annotations

from consortium import Consortium, peer_of

from p2pfed.gossip.events import FetchCheckpoint, Folded
from p2pfed.gossip.progress import Phase, Presence, Progress
from p2pfed.gossip.sync import Sync
from p2pfed.wire.messages import CheckpointOffer, decode_message


def test_one_member_that_answers_first_cannot_end_the_run_of_a_joiner_with_a_model_of_its_own():
    net = Consortium(5)
    run = net.run(rounds=1000)
    facts, honest = net.facts(run), net.facts(run)
    joiner = Progress(facts, peer_of(0), joining=True, round_=0)
    liar = peer_of(4)
    first = Presence(frozenset({peer_of(0), liar}), frozenset(), frozenset(), frozenset({liar}))
    everyone = frozenset(peer_of(i) for i in range(5))
    all_there = Presence(everyone, everyone, frozenset(), everyone - {peer_of(0)})

    def advance(now, presence):
        return joiner.advance(now, net.roster, presence, contributes=True, ahead={})

    joiner.offered(liar, (CheckpointOffer(1000, b"c" * 32, b"d" * 32, 100),), 0.0)
    effects = [*advance(0.0, first), *advance(1.5, first), *advance(6.0, first)]
    for fetch in [e for e in effects if isinstance(e, FetchCheckpoint)]:
        joiner.fetched(fetch.offer, ok=True)
        advance(7.0, all_there)
        joiner.on_folded(Folded(joiner.round, b"c" * 32, b"m" * 32))
    for round_ in range(40):  # then the joiner gets all that the others hold
        for i in range(1, 5):
            signed = net.delta(run, round_, i).signed
            honest.add(signed)
            facts.add(signed)
    mine, theirs = Sync(net.book(), lambda _key: False), Sync(net.book(), lambda _key: False)
    mine.take_run(facts)
    theirs.take_run(honest)
    for effect in theirs.opening(peer_of(0)):
        mine.on_digest(peer_of(1), decode_message(effect.frame))
    assert facts.tree.cover() == honest.tree.cover()
    assert facts.chain(1000) == honest.chain(1000)
    assert joiner.phase is not Phase.FINISHED
