"""Deltas of any age: they count, exactly, and cost the others little."""

from __future__ import annotations

from fractions import Fraction

import pytest
from consortium import Consortium, peer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scenario import World, facts_of

from p2pfed.gossip.events import Fold, Folded, Note, Received, SetSharing, Train
from p2pfed.gossip.facts import RunFacts
from p2pfed.gossip.joining import kept_rounds
from p2pfed.gossip.lateness import due
from p2pfed.gossip.progress import Phase, Presence, Progress
from p2pfed.identity.rules import Averaging
from p2pfed.wire.delta import Proof
from p2pfed.wire.messages import Facts, encode_message

NET = Consortium(3)
RUN = NET.run(rounds=40, deadline_s=5.0, averaging=Averaging(hot_rounds=4, late_interval_s=60.0))
PEERS = frozenset(peer_of(i) for i in range(3))
THERE = Presence(PEERS, PEERS, frozenset(), PEERS - {peer_of(0)})


def of_type(effects, kind):
    return [effect for effect in effects if isinstance(effect, kind)]


class Way:
    """Progress of h0 from round 20 on; every fold succeeds at once."""

    def __init__(self, run=RUN, round_: int = 20, deltas=None) -> None:
        deltas = deltas if deltas is not None else [(r, i) for r in range(20) for i in range(3)]
        self.facts = NET.facts(run, [NET.delta(run, r, i) for r, i in deltas])
        self.progress = Progress(self.facts, peer_of(0), joining=False, round_=round_)
        self.now = 0.0
        self.folds: list[Fold] = []
        self.run = run

    def advance(self, seconds: float = 0.0) -> list:
        self.now += seconds
        done = []
        for _ in range(4):
            effects = self.progress.advance(self.now, NET.roster, THERE, contributes=True, ahead={})
            done += effects
            for fold in of_type(effects, Fold):
                self.folds.append(fold)
                self.progress.on_folded(Folded(fold.round, fold.chains[-1], bytes(32)))
        return done

    def arrive(self, round_: int, i: int) -> None:
        late = self.progress.is_late(round_)
        self.facts.add(NET.delta(self.run, round_, i).signed, late=late)

    def next_round(self) -> None:
        round_ = self.progress.round
        for i in range(3):
            self.arrive(round_, i)
        self.progress.trained(round_)
        self.advance(6.0)
        assert self.progress.round == round_ + 1


def test_the_set_is_never_closed_a_delta_of_any_age_counts_in_the_end():
    way = Way(deltas=[(r, i) for r in range(20) for i in range(3) if (r, i) != (1, 2)])
    way.advance()
    way.arrive(1, 2)
    way.next_round()
    full = NET.facts(RUN, [NET.delta(RUN, r, i) for r in range(21) for i in range(3)])
    assert way.folds[-1].chains[-1] == full.chain(21)


def test_old_deltas_are_folded_at_most_once_per_interval():
    missing = {(r, 0) for r in range(10)}
    way = Way(deltas=[(r, i) for r in range(20) for i in range(3) if (r, i) not in missing])
    way.advance()
    deep = 0
    for r in range(10):  # one old delta before each of ten round starts, 6 s apart
        way.arrive(r, 0)
        way.next_round()
        deep += way.folds[-1].first < 20
    assert deep == 1  # the first at once, the others wait for the interval
    assert way.facts.late_rounds == set(range(1, 10))
    way.now += 60
    way.next_round()
    assert not way.facts.late_rounds
    full = NET.facts(RUN, [NET.delta(RUN, r, i) for r in range(31) for i in range(3)])
    assert way.folds[-1].chains[-1] == full.chain(31)


def test_a_delta_of_the_last_round_counts_at_the_next_round_start():
    way = Way(deltas=[(r, i) for r in range(20) for i in range(3) if (r, i) != (19, 2)])
    way.advance()
    way.arrive(19, 2)
    assert not way.facts.late_rounds


@given(st.integers(0, 300), st.integers(1, 64))
def test_every_late_delta_counts_within_twice_as_many_rounds_as_it_is_late(delta_round, age):
    starts = range(delta_round + age, delta_round + 3 * age + 1)
    counted = [r for r in starts if due({delta_round}, r, hot_rounds=200, old_too=False)]
    assert counted


def test_who_sends_everything_late_costs_a_few_folds_a_round():
    """At worst: at every round start a delta of every age waits; so many rounds are replayed."""
    hot, rounds = 50, range(1000, 1400)
    replayed = 0
    for r in rounds:
        found = due(range(r - hot, r), r, hot_rounds=hot, old_too=False)
        oldest = min(found)
        checkpoint = max(c for c in kept_rounds(r, 1) if c <= oldest)
        replayed += r - checkpoint
    assert replayed / len(rounds) <= 14


def test_while_no_round_starts_late_deltas_are_folded_more_and_more_rarely():
    way = Way(round_=39, deltas=[(r, i) for r in range(39) for i in (0, 1)])
    way.advance()
    way.next_round()
    assert way.progress.phase is Phase.FINISHED
    way.advance(2)
    before, began = len(way.folds), way.now
    for r in range(38, 2, -1):  # one late delta every two seconds
        way.arrive(r, 2)
        way.advance(2)
    assert way.now == began + 72
    assert len(way.folds) - before <= 7
    way.advance(200)
    way.advance(200)
    full = NET.facts(
        RUN,
        [NET.delta(RUN, r, i) for r in range(40) for i in range(3) if r > 2 or i < 2],
    )
    assert way.folds[-1].chains[-1] == full.chain(40)


def test_what_waits_is_in_the_digests_at_once():
    facts = NET.facts(RUN, [NET.delta(RUN, 0, 0)])
    other = NET.facts(RUN, [NET.delta(RUN, 0, 0), NET.delta(RUN, 0, 1)])
    facts.add(NET.delta(RUN, 0, 1).signed, late=True)
    assert facts.tree.cover() == other.tree.cover()
    assert facts.chain(1) != other.chain(1)
    facts.fold_late({0})
    assert facts.chain(1) == other.chain(1)


@settings(max_examples=30)
@given(st.permutations([(r, i) for r in range(6) for i in range(3)]), st.sets(st.integers(0, 17)))
def test_the_chain_does_not_depend_on_what_came_late_or_when_it_was_folded(order, folded_at):
    facts = NET.facts(RUN)
    for at, (r, i) in enumerate(order):
        facts.add(NET.delta(RUN, r, i).signed, late=at % 2 == 0)
        facts.chain(3)
        if at in folded_at:
            facts.fold_late(facts.late_rounds)
    facts.fold_late(facts.late_rounds)
    assert facts.chain(6) == NET.facts(RUN, [NET.delta(RUN, r, i) for r, i in order]).chain(6)


# --- plans ---------------------------------------------------------------------------------------


def test_a_plan_tells_only_of_what_has_to_be_folded():
    way = Way()
    way.advance()
    assert (way.folds[-1].first, len(way.folds[-1].plan)) == (0, 20)  # nothing is known of the disk
    way.next_round()
    way.next_round()
    assert (way.folds[-1].first, len(way.folds[-1].plan)) == (21, 1)


def test_a_late_delta_asks_for_a_plan_from_the_newest_right_checkpoint():
    way = Way(deltas=[(r, i) for r in range(20) for i in range(3) if (r, i) != (18, 2)])
    way.advance()
    way.progress.checkpoints_changed({r: way.facts.chain(r) for r in (0, 8, 16, 18, 20)})
    way.arrive(18, 2)
    while way.facts.late_rounds:
        way.next_round()
    assert way.folds[-1].first == 18


def test_when_the_state_is_gone_the_plan_begins_with_the_genesis():
    way = Way()
    way.advance()
    way.next_round()
    way.progress.folding.is_running = True  # as between a Fold and its end
    way.progress.fold_fell_short()
    way.next_round()
    assert way.folds[-1].first == 0


# --- forgetting ----------------------------------------------------------------------------------


def revoked(net: Consortium, i: int, from_round: int) -> bytes:
    return net.publish(net.roster.revoke(peer_of(i), reason="test", from_round=from_round))


def joined_at(net: Consortium, round_: int):
    """Facts of one who took over a checkpoint and holds nothing before it."""
    book = net.book()
    run = net.run(rounds=40)
    deltas = [net.delta(run, r, i) for r in range(24) for i in range(3)]
    full = net.facts(run, deltas, book)
    facts = RunFacts(run, book)
    facts.adopt(round_, full.chain(round_))
    for delta in deltas:
        if delta.header.round >= round_:
            facts.add(delta.signed)
    return facts, full, book


def send_the_rest(facts: RunFacts, full: RunFacts) -> None:
    """All deltas of the archive arrive, and a peer that lacks nothing confirms it."""
    for r in range(24):
        for origin in full.origins(r):
            facts.add(full._held.signed(r, origin))
    for peer in (1, 2):
        facts.confirmed(peer_of(peer), 24)


def test_a_joiner_owes_the_rounds_before_its_checkpoint_to_one_who_wants_out():
    net = Consortium(3)
    facts, full, book = joined_at(net, 16)
    assert not facts.owed
    book.add(revoked(net, 2, 0))
    facts.rosters_changed()
    full.rosters_changed()
    assert facts.owed == range(16)
    facts.confirmed(peer_of(1), 9)
    assert facts.owed == range(9, 16)
    send_the_rest(facts, full)
    assert not facts.owed
    assert facts.chain(24) == full.chain(24)


def test_nothing_is_owed_when_the_member_leaves_from_a_later_round_on():
    net = Consortium(3)
    facts, _, book = joined_at(net, 16)
    book.add(revoked(net, 2, 16))
    facts.rosters_changed()
    assert not facts.owed


def test_a_revocation_known_before_the_checkpoint_is_in_it():
    net = Consortium(3)
    signed = revoked(net, 2, 0)
    facts, _, book = joined_at(net, 16)
    assert book.signed(net.roster.hash) == signed
    assert not facts.owed
    net.publish(net.roster.next())
    book.add(net.signed[-1])
    facts.rosters_changed()
    assert not facts.owed


def test_who_owes_makes_no_model_and_names_the_missing_rounds():
    net = Consortium(3)
    facts, full, book = joined_at(net, 16)
    progress = Progress(facts, peer_of(0), joining=False, round_=24)
    there = Presence(PEERS, PEERS, frozenset(), PEERS)

    def advance(now):
        return progress.advance(now, net.roster, there, contributes=True, ahead={})

    book.add(revoked(net, 2, 3))
    facts.rosters_changed()
    [note] = advance(1.0)
    assert (note.type, dict(note.data)) == ("forget.refused", {"first_round": 0, "last_round": 15})
    assert advance(100.0) == []
    send_the_rest(facts, full)
    effects = advance(101.0)
    assert next(n.type for n in of_type(effects, Note)) == "forget.archive_complete"
    assert of_type(effects, Fold)


@pytest.mark.slow
@pytest.mark.parametrize("outer", ["fedadam", "fedyogi"])
def test_forgetting_in_a_live_network_ends_on_the_hash_of_a_fold_that_never_had_the_member(outer):
    """Also deltas older than three times the hot rounds."""
    from p2pfed.identity.run import Outer

    averaging = Averaging(hot_rounds=3, late_interval_s=1.0)
    world = World(5, rounds=30, averaging=averaging, outer=Outer(outer, 0.03))
    world.add(*range(5))
    while world.node(0).core.progress.round < 20 and world.heap.now < 200:
        world.run_until(world.heap.now + 1)
    signed = revoked(world.net, 4, 0)
    world.hand_roster(signed, 0)
    world.run_to_the_end()
    rest = [world.node(i) for i in range(4)]
    assert len({n.hash for n in rest}) == 1
    never = {f: d for f, d in rest[0].deltas.items() if d.header.origin != peer_of(4)}
    assert len(never) < len(rest[0].deltas)
    assert rest[0].hash == world.fold_of(never.values())


# --- participation -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "share"),
    [((), 1), ((0,), Fraction(1, 8)), ((6, 7), 1), ((0, 2, 4, 6), Fraction(1, 2)), ((7,), 1)],
)
def test_participation_is_the_share_of_rounds_since_the_first_delta(mine, share):
    run = NET.run(averaging=Averaging(participation_scaling=True, hot_rounds=20))
    facts = NET.facts(run, [NET.delta(run, r, 0) for r in mine])
    assert facts.participation(peer_of(0), 8) == share


@pytest.mark.parametrize(("on", "scale"), [(True, 4), (False, 1)])
def test_who_is_rarely_there_takes_larger_steps_up_to_four_if_the_run_says_so(on, scale):
    averaging = Averaging(participation_scaling=on, hot_rounds=20)
    run = NET.run(rounds=40, averaging=averaging)
    way = Way(run, deltas=[(r, i) for r in range(20) for i in range(3) if i or r == 2])
    [train] = of_type(way.advance(), Train)
    assert train.scale == scale


def test_partitions_longer_than_the_hot_rounds_merge_exactly():
    averaging = Averaging(hot_rounds=3, late_interval_s=2.0)
    world = World(6, rounds=24, averaging=averaging, min_live=0.3, deadline_s=2.0)
    world.add(*range(6))
    world.run_until(4)
    world.cut(0, 1, 2)
    while min(n.core.progress.round for n in world.nodes) < 15 and world.heap.now < 200:
        world.run_until(world.heap.now + 1)
    assert facts_of(world.node(0)) != facts_of(world.node(5))
    world.cut()
    world.run_to_the_end()
    assert all(n.core.progress.phase is Phase.FINISHED for n in world.nodes)
    assert len({n.hash for n in world.nodes}) == 1
    assert all(len(n.trained_rounds) == len(set(n.trained_rounds)) for n in world.nodes)


def test_a_node_whose_checkpoints_vanish_folds_from_the_genesis():
    world = World(3, rounds=6)
    world.add(*range(3))
    world.run_until(3)
    node = world.node(0)
    node.checkpoints.held.clear()
    node.replay._state = None
    world.run_to_the_end()
    assert len({n.hash for n in world.nodes}) == 1


def test_nodes_that_all_stopped_contributing_still_fold_what_they_hear():
    world = World(4, rounds=200, min_live=0.3, deadline_s=2.0)
    world.add(*range(4))
    world.run_until(3)
    world.cut(0, 1)
    world.run_until(14)
    for node in world.nodes:
        world.heap.give(node, SetSharing(False))
    world.run_until(18)
    world.cut()
    world.run_until(120)
    assert len({node.core.facts.tree.cover() for node in world.nodes}) == 1
    assert len({node.hash for node in world.nodes}) == 1
    assert world.nodes[0].core.progress.phase is Phase.GATHERING


def test_rounds_that_a_third_of_the_weight_was_missing_from_count_at_once():
    """This node was away; no member alone can make it so."""
    way = Way(deltas=[(r, i) for r in range(20) for i in range(3) if r < 3 or i == 0])
    way.advance()
    way.next_round()  # the interval for old deltas has begun
    way.arrive(4, 1)
    way.next_round()
    way.arrive(5, 1)
    way.next_round()
    assert way.facts.late_rounds == {5}  # 60 of 180 are no more than a third
    way.arrive(5, 2)
    way.next_round()
    assert not way.facts.late_rounds


def test_an_own_delta_that_comes_back_while_training_is_not_contradicted():
    world = World(3, rounds=9, min_round_interval_s=2.0)
    world.add(*range(3))
    node = world.node(1)
    while not (node.core.progress.training and node.core.progress.round == 2):
        world.run_until(world.heap.now + 0.05)
        assert world.heap.now < 60
    back = world.net.delta(world.run, 2, 1)  # what it had signed before its store was lost
    frame = encode_message(Facts((back.encode(),), (), ()))
    world.heap.give(node, Received(world.node(0).peer_id, frame))
    world.run_to_the_end()
    assert not [n for n in node.notes if n.type == "peer.equivocated"]
    assert not node.core.facts.proofs


def test_a_member_that_comes_back_is_owed_its_rounds_too():
    net = Consortium(3)
    revoked(net, 2, 0)
    facts, full, book = joined_at(net, 16)
    assert not facts.owed
    members = [*net.roster.members, *net.rosters[1].members[2:]]
    book.add(net.publish(net.roster.next(members=members, revoked=[])))
    facts.rosters_changed()
    assert facts.owed == range(16)
    send_the_rest(facts, full)
    assert not facts.owed


def test_a_proof_for_a_round_of_the_believed_checkpoint_is_owed_as_well():
    net = Consortium(3)
    facts, _, _ = joined_at(net, 16)
    one, other = (net.delta(facts.run, 4, 1, releases=n).signed for n in (1, 2))
    facts.add_proof(Proof.of(one, other))
    assert facts.owed == range(16)
