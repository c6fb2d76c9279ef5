"""Every invariant can fail: a planted bug stops the run with the sentence that names it.

Each test plants one bug in the core, in what a node stores or in what folds, and lets the small
scenario run: without a bug it holds everything, as the first test says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from small_scenario import SMALL, scenario_of

from p2pfed.gossip.events import (
    Effect,
    Event,
    Fold,
    Received,
    StoreDelta,
)
from p2pfed.gossip.facts import RunFacts
from p2pfed.identity.signing import DELTA, fact_hash, sign
from p2pfed.simulate import invariants as rules
from p2pfed.simulate.folds import Broken, Folds
from p2pfed.simulate.liars import Liar
from p2pfed.simulate.node import Disk, Ledger
from p2pfed.simulate.play import Stage, play
from p2pfed.simulate.reference import fold_from_genesis
from p2pfed.simulate.timeline import Timeline
from p2pfed.wire.delta import Delta
from p2pfed.wire.payload import Payload

Twist = Callable[[Event, list[Effect]], list[Effect]]


class Twisted:
    """A core whose effects are changed on the way out: the bug."""

    def __init__(self, core: Any, twist: Twist) -> None:
        self._core = core
        self._twist = twist

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def handle(self, event: Event, now: float) -> list[Effect]:
        return self._twist(event, self._core.handle(event, now))


def stage_of(text: str = SMALL, twist: Twist | None = None, whom: str = "h1", **changes) -> Stage:
    """The small world; the effects of one node (or of all: "") are twisted."""
    stage = Stage(scenario_of(text, **changes), 1)

    def wrap(node, core):
        return Twisted(core, twist) if whom in {node.name, ""} else core

    if twist is not None:
        stage.heap.wrap = wrap
        for node in stage.heap.nodes.values():
            node.core = wrap(node, node.core)
    return stage


def node_of(stage: Stage, member: int):
    return stage.timeline.nodes[member]


def _with(delta: Delta, seed: bytes, **changes: Any) -> Delta:
    """A delta with another header, signed."""
    header = replace(delta.header, **changes)
    return Delta.make(header, delta.payload, lambda data: sign(seed, DELTA, data))


def breaks(stage: Stage, words: str) -> None:
    """The run stops, and says these words."""
    with pytest.raises(Broken, match=words):
        _to_the_end(stage)


def _to_the_end(stage: Stage) -> None:
    stage.run_until(60)
    stage.settle()


def without(kind: type) -> Twist:
    return lambda _event, effects: [e for e in effects if not isinstance(e, kind)]


def only_in(stage_or_none: list[Stage], member: int = 1) -> Callable[[RunFacts], bool]:
    """Whether facts are those that a member believes; the list is filled when the world is made."""

    def is_its(facts: RunFacts) -> bool:
        for stage in stage_or_none:
            node = stage.timeline.nodes.get(member)
            return node is not None and node.core is not None and node.core.facts is facts
        return False

    return is_its


def test_without_a_bug_everything_holds_and_is_checked():
    stage = stage_of(twist=lambda _event, effects: effects)
    stage.run_until(60)
    stage.settle()
    assert stage.invariants.releases == 18
    assert stage.invariants.checked > 100


# --- what is signed and paid -------------------------------------------------------------------


def test_two_deltas_signed_for_one_round():
    stage = stage_of()

    def twice(_event, effects):
        own = [e for e in effects if isinstance(e, StoreDelta) and e.own]
        seed = node_of(stage, 1).seed
        other = [_with(e.delta, seed, view_hash=fact_hash(b"another view")) for e in own]
        return [*effects, *(StoreDelta(delta, own=True) for delta in other)]

    node_of(stage, 1).core = Twisted(node_of(stage, 1).core, twice)
    breaks(stage, "^h1 signed two deltas for round 0$")


def test_a_proof_against_somebody_who_is_held_to_be_honest():
    stage = stage_of()
    node = node_of(stage, 1)
    stage.heap.wrap = lambda _n, core: core
    node.core = Liar(node.core, node, stage.heap.folds, "equivocate", stage.heap.rng)
    breaks(stage, f"holds a proof against {node.peer_id}, who is honest$")


def test_a_ledger_that_debits_less_than_it_releases(monkeypatch):
    def keep(ledger, round_, payload):
        ledger.outputs[round_] = (payload, ledger.debits + 1, ledger.head)

    monkeypatch.setattr(Ledger, "keep", keep)
    breaks(stage_of(), r"^h\d released 2 times and debited 1$")


def test_a_ledger_that_goes_back():
    stage = stage_of()
    node = node_of(stage, 1)

    def forgets(_event, effects):
        return [
            replace(effect, delta=_with(effect.delta, node.seed, releases=1))
            if isinstance(effect, StoreDelta) and effect.own
            else effect
            for effect in effects
        ]

    node.core = Twisted(node.core, forgets)
    breaks(stage, "^h1 released with a ledger that went back$")


def test_a_fact_taken_from_a_revoked_member():
    text = SMALL + "[[event]]\nat_s = 9\ndo = 'revoke'\nmembers = ['h2']\nfrom_round = 1\n"
    stage = stage_of(text)
    stage.run_until(20)
    one, revoked = node_of(stage, 0), node_of(stage, 2)
    stored = [StoreDelta(next(iter(one.deltas.values())), own=False)]
    stage.invariants.watch(one, Received(node_of(stage, 1).peer_id, b""), stored)  # as it may
    with pytest.raises(Broken, match=f"^h0 took a fact from {revoked.peer_id}, who is known"):
        stage.invariants.watch(one, Received(revoked.peer_id, b""), stored)


# --- what is bounded ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "bound"),
    [("set_aside", rules.ASIDE_EACH * 3), ("asked", rules.ASKED_EACH * 3)],
)
def test_a_table_that_others_make_grow_without_bound(what, bound):
    stage = stage_of()
    core = node_of(stage, 1).core
    assert what in core.waiting(), "the core names its tables otherwise by now"
    node_of(stage, 1).core = grown = Twisted(core, lambda _event, effects: effects)
    grown.waiting = lambda: {**core.waiting(), what: bound}
    stage.run_until(6)
    grown.waiting = lambda: {**core.waiting(), what: bound + 1}
    breaks(stage, f"^h1 keeps {bound + 1} {what}; the bound is {bound}$")


def test_peers_that_nobody_listed():
    stage = stage_of()
    stage.run_until(6)
    for n in range(3):
        node_of(stage, 1).core.membership.peers[f"stranger {n}"] = None
    node = node_of(stage, 1)
    with pytest.raises(Broken, match=r"^h1 keeps \d+ peers$"):
        stage.invariants._check_bounds(node)


# --- what is folded ----------------------------------------------------------------------------


def test_a_fold_that_is_off_by_one(monkeypatch):
    payload = Folds._payload

    def wrong(folds, node, fact):
        right = payload(folds, node, fact)
        if node.name != "h1":
            return right
        return Payload(right.indices, (right.values + 8).astype(np.int16))

    monkeypatch.setattr(Folds, "_payload", wrong)
    breaks(stage_of(), "^equal facts, unequal models: h")


def test_a_fold_that_drops_a_delta():
    def drops(_event, effects):
        return [
            replace(e, plan=tuple(counted[1:] for counted in e.plan)) if isinstance(e, Fold) else e
            for e in effects
        ]

    breaks(stage_of(twist=drops), "one chain stands for two plans of round 0$")


def test_facts_that_drop_a_delta(monkeypatch):
    counted, worlds = RunFacts.counted, []
    is_its = only_in(worlds)

    def drops(facts, round_):
        found = counted(facts, round_)
        return found[1:] if is_its(facts) else found

    monkeypatch.setattr(RunFacts, "counted", drops)
    worlds.append(stage_of())
    breaks(worlds[0], "^h1 counts 200 in round 0; the rosters say 300$")


def test_a_fold_that_nobody_plans_rightly(monkeypatch):
    """All drop the same delta: the folds agree, and the rosters say otherwise."""
    counted = RunFacts.counted
    monkeypatch.setattr(RunFacts, "counted", lambda facts, round_: counted(facts, round_)[1:])
    breaks(stage_of(), r"^h\d counts \d+ in round 0; the rosters say \d+$")


def test_a_delta_folded_twice(monkeypatch):
    counted = RunFacts.counted

    def twice(facts, round_):
        found = counted(facts, round_)
        return found + found[:1]

    monkeypatch.setattr(RunFacts, "counted", twice)
    breaks(stage_of(), r"^h\d: a payload of round 0 is folded twice$")


@pytest.mark.parametrize(
    ("planned", "told"),
    [
        (lambda a, b, _c: (a, replace(b, origin=a.origin)), "an origin counts twice in round 0"),
        (
            lambda a, b, _c: (replace(a, origin=b.origin),),
            "the plan of round 0 names a wrong delta",
        ),
        (lambda _a, _b, c: (c,), "the plan of round 0 names a wrong delta"),
    ],
)
def test_a_plan_that_counts_what_it_must_not(planned, told):
    stage = stage_of()
    stage.run_until(30)
    node = node_of(stage, 1)
    [a, b, *_], [c, *_] = node.core.facts.counted(0), node.core.facts.counted(1)
    plan = Fold(1, (b"before", b"after"), (planned(a, b, c),))
    with pytest.raises(Broken, match=f"^h1: {told}$"):
        stage.heap.folds.fold(node, plan)


def test_a_delta_that_is_believed_and_not_stored(monkeypatch):
    keep = Disk.keep

    def loses(disk, delta, *, durable):
        if durable or delta.header.round != 1:
            keep(disk, delta, durable=durable)

    monkeypatch.setattr(Disk, "keep", loses)
    breaks(stage_of(), r"names a wrong delta|that it has not stored|believes \d+ deltas and stores")


def test_more_deltas_believed_than_stored():
    stage = stage_of()
    stage.run_until(30)
    node_of(stage, 1).disk.deltas.popitem()
    with pytest.raises(Broken, match=r"^h1 believes (\d+) deltas and stores \d+$"):
        stage.invariants.check()


def test_a_payload_that_is_not_stored():
    stage = stage_of()
    with pytest.raises(Broken, match=r"^h1 folds a delta that it has not stored$"):
        stage.heap.folds._payload(node_of(stage, 1), b"?" * 32)


# --- what counts -------------------------------------------------------------------------------


def test_a_weight_that_is_off_by_one(monkeypatch):
    weights = RunFacts.weights

    def wrong(facts, roster_hash):
        return {peer: weight + 1 for peer, weight in weights(facts, roster_hash).items()}

    monkeypatch.setattr(RunFacts, "weights", wrong)
    breaks(stage_of(), r"^a member with 100 samples weighs \d+$")


def test_equal_facts_with_unequal_chains(monkeypatch):
    chain, worlds = RunFacts.chain, []
    is_its = only_in(worlds)

    def salted(facts, round_):
        right = chain(facts, round_)
        return fact_hash(right) if round_ and is_its(facts) else right

    monkeypatch.setattr(RunFacts, "chain", salted)
    worlds.append(stage_of())
    breaks(worlds[0], r"^h\d: equal facts have unequal chains$")


# --- progress and the end ----------------------------------------------------------------------

IMPATIENT = SMALL.replace("[check]", "away_after_s = 6\n[check]\npatience = 1")


def test_a_quorum_that_makes_no_progress():
    stage = stage_of(IMPATIENT, without(Fold), "")
    breaks(stage, r"^a connected quorum stays in round 0 for \d+ s$")


def test_one_that_is_left_behind():
    stage = stage_of(IMPATIENT, without(Fold), rounds="30")
    breaks(stage, r"^h1 is in round 0; the others passed \d+ \d+ s ago$")


def test_one_that_hears_nothing_and_does_not_agree_in_the_end():
    stage = stage_of()
    stage.run_until(6)
    core = node_of(stage, 1).core
    node_of(stage, 1).core = deaf = Twisted(core, lambda _event, effects: effects)
    deaf.handle = lambda event, now: [] if isinstance(event, Received) else core.handle(event, now)
    stage.run_until(12)
    with pytest.raises(Broken, match=r"^20 s after everything healed the honest members do not"):
        stage.settle()


def test_full_folds_that_do_not_give_what_was_folded_step_by_step(monkeypatch):
    def wrong(node, heap, round_):
        state, chain = fold_from_genesis(node, heap, round_)
        state.model[0] += 1
        return state, chain

    monkeypatch.setattr(rules, "fold_from_genesis", wrong)
    breaks(stage_of(), "^the folds of equal facts, in full and step by step, give unequal models$")


def test_a_core_that_raises(monkeypatch):
    def raises(event, effects):
        if isinstance(event, Received):
            raise KeyError("a peer sent this")
        return effects

    wrapped = Timeline._wrapped
    twisted = lambda *a: Twisted(wrapped(*a), raises)  # noqa: E731
    monkeypatch.setattr(Timeline, "_wrapped", twisted)
    result = play(scenario_of(), 1)
    assert result.broken == "a core raised KeyError: 'a peer sent this'"
    assert "in raises" in result.detail
    assert result.at_s < 5


def test_liars_are_not_held_to_anything():
    stage = stage_of(rounds="3", count="4\nbyzantine = { equivocate = ['h1'] }")
    stage.run_until(30)
    stage.settle()
    honest = stage.invariants.honest()
    assert [node.name for node in honest] == ["h0", "h2", "h3"]
    assert all(node.disk.proofs for node in honest)
