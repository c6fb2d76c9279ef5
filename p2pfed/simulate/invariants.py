"""What must hold whatever happens, checked while it happens.

After every event (cheap, incremental)
    one delta is signed per round, and none with a ledger that went back; debited >= released;
    a frame of a member that is known to be revoked stores nothing;
    what a node keeps because of others is bounded (sampled: one event in `BOUND_EVERY`).
At every fold (`Folds`)
    equal facts give equal models; no payload is folded twice.
At checkpoints
    what counts, and with what weight, is what the rosters say, computed here independently of
    `gossip`; equal sets of facts have equal chains, whatever the order in which they came;
    a connected quorum advances within `patience` deadlines, and nobody in it is left behind.
In the end
    all honest members hold the same facts, and full folds from the genesis give one model.

A broken invariant raises `Broken`. Liars are not held to anything.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator

from p2pfed.gossip.events import Effect, Event, Received, StoreDelta, StoreProof, StoreRoster
from p2pfed.gossip.facts import RunFacts
from p2pfed.gossip.fold import model_hash
from p2pfed.identity.book import RosterBook
from p2pfed.identity.roster import MAX_SAMPLES
from p2pfed.simulate.cast import Cast
from p2pfed.simulate.folds import Broken
from p2pfed.simulate.heap import EventHeap
from p2pfed.simulate.node import SimulatedNode
from p2pfed.simulate.reference import fold_from_genesis
from p2pfed.simulate.scenario import Scenario
from p2pfed.simulate.timeline import Timeline

__all__ = ["Invariants"]

BOUND_EVERY = 64
FULLY_CHECKED = 16  # nodes per checkpoint, in turn; all of them where there are fewer
ASIDE_EACH = 8  # deltas per origin that wait until the node comes near, see gossip/intake.py
ASKED_EACH = 1024  # names asked of one peer, see gossip/asked.py


class Invariants:
    """See the module docstring.

    Args:
        heap: The world.
        cast: The consortium.
        timeline: What happens to the world.
        scenario: Gives patience and who lies.

    Attributes:
        checked: How many events were checked.
    """

    def __init__(self, heap: EventHeap, cast: Cast, timeline: Timeline, scenario: Scenario) -> None:
        self.checked = 0
        self._heap = heap
        self._cast = cast
        self._timeline = timeline
        self._scenario = scenario
        self._liars = {cast.peers[m] for m in scenario.lies}
        self._signed: dict[tuple[str, int], bytes] = {}
        self._releases: dict[str, int] = {}
        self._chains: dict[bytes, bytes] = {}  # digest of a set of facts -> its chain
        self._turn = 0
        self._advanced_at = 0.0
        self._quorum_since: float | None = None
        self._history: deque[tuple[float, int]] = deque()

    @property
    def releases(self) -> int:
        """How many deltas honest nodes released."""
        return len(self._signed)

    def honest(self) -> list[SimulatedNode]:
        """Nodes that are up and do not lie, by member."""
        nodes = (node for _, node in sorted(self._timeline.nodes.items()))
        return [n for n in nodes if n.core is not None and n.peer_id not in self._liars]

    # --- after every event ---------------------------------------------------------------------

    def watch(self, node: SimulatedNode, event: Event, effects: list[Effect]) -> None:
        """Check one event.

        Raises:
            Broken: An invariant does not hold.
        """
        self.checked += 1
        if node.peer_id in self._liars:
            return
        stored = False
        for effect in effects:
            if isinstance(effect, StoreDelta):
                stored = True
                if effect.own:
                    self._check_release(node, effect)
            elif isinstance(effect, StoreProof):
                stored = True
                origin = effect.origin
                if origin not in self._liars:
                    raise Broken(f"{node.name} holds a proof against {origin}, who is honest")
        if stored and isinstance(event, Received):
            self._check_sender(node, event, effects)
        if self.checked % BOUND_EVERY == 0:
            self._check_bounds(node)

    def _check_release(self, node: SimulatedNode, effect: StoreDelta) -> None:
        header = effect.delta.header
        key = (header.origin, header.round)
        known = self._signed.setdefault(key, effect.delta.fact)
        if known != effect.delta.fact:
            raise Broken(f"{node.name} signed two deltas for round {header.round}")
        if header.releases > node.disk.ledger.debits:
            raise Broken(
                f"{node.name} released {header.releases} times and debited"
                f" {node.disk.ledger.debits}"
            )
        if header.releases <= self._releases.get(header.origin, 0):
            raise Broken(f"{node.name} released with a ledger that went back")
        self._releases[header.origin] = header.releases

    def _check_sender(self, node: SimulatedNode, event: Received, effects: list[Effect]) -> None:
        if any(isinstance(effect, StoreRoster) for effect in effects) or node.core is None:
            return  # it was revoked by this very frame
        roster = node.core.book.current
        if roster is not None and roster.member(event.peer) is None:
            raise Broken(f"{node.name} took a fact from {event.peer}, who is known to be revoked")

    def _check_bounds(self, node: SimulatedNode) -> None:
        core = node.core
        if core is None:
            return
        members = len(self._cast.peers)
        waiting = core.waiting()
        bounds = {"set_aside": ASIDE_EACH * members, "asked": ASKED_EACH * max(1, members)}
        for what, bound in bounds.items():
            if waiting.get(what, 0) > bound:
                raise Broken(f"{node.name} keeps {waiting[what]} {what}; the bound is {bound}")
        if len(core.membership.peers) > members:
            raise Broken(f"{node.name} keeps {len(core.membership.peers)} peers")

    # --- at checkpoints ------------------------------------------------------------------------

    def check(self) -> None:
        """Everything that needs more than one event.

        Raises:
            Broken: An invariant does not hold.
        """
        nodes = self.honest()
        for node in self._some(nodes):
            core = node.core
            assert core is not None
            self._check_bounds(node)
            if core.facts is not None and core.facts.adopted is None:
                self._check_weights(node, core.facts, core.book)

    def _some(self, nodes: list[SimulatedNode]) -> Iterator[SimulatedNode]:
        """A few, in turn."""
        for _ in range(min(len(nodes), FULLY_CHECKED)):
            self._turn += 1
            yield nodes[self._turn % len(nodes)]

    def _check_weights(self, node: SimulatedNode, facts: RunFacts, book: RosterBook) -> None:
        if facts.num_deltas != len(node.disk.deltas):
            raise Broken(
                f"{node.name} believes {facts.num_deltas} deltas and stores {len(node.disk.deltas)}"
            )
        expected = expected_weights(node, facts, book)
        late = facts.late_rounds
        for round_ in range(facts.tree.end):
            found = {(c.fact, c.origin, c.weight) for c in facts.counted(round_)}
            wrong = found - expected.get(round_, set())
            missing = expected.get(round_, set()) - found
            if wrong or (missing and round_ not in late):
                raise Broken(
                    f"{node.name} counts {sum(w for _, _, w in found)} in round {round_}; the"
                    f" rosters say {sum(w for _, _, w in expected.get(round_, set()))}"
                )
        if not late:
            self._check_chain(node, facts, expected)

    def _check_chain(
        self, node: SimulatedNode, facts: RunFacts, expected: dict[int, set[tuple[bytes, str, int]]]
    ) -> None:
        digest = hashlib.blake2b(digest_size=16)
        for round_ in range(facts.tree.end):
            for fact, _, weight in sorted(expected.get(round_, ())):
                digest.update(fact + weight.to_bytes(4, "little"))
            digest.update(b"/")
        chain = facts.chain(facts.tree.end)
        if self._chains.setdefault(digest.digest(), chain) != chain:
            raise Broken(f"{node.name}: equal facts have unequal chains")

    # --- progress ------------------------------------------------------------------------------

    def check_progress(self) -> None:
        """A connected quorum advances, and takes everybody with it.

        Raises:
            Broken: It does not, for longer than `patience` deadlines.
        """
        now, members = self._heap.now, self._quorum()
        if members is None:
            self._quorum_since = None
            self._history.clear()
            return
        if self._quorum_since is None:
            self._quorum_since = self._advanced_at = now
        furthest = max(node.round for node in members)
        if not self._history or furthest > self._history[-1][1]:
            self._history.append((now, furthest))
            self._advanced_at = now
        patience = self._patience()
        stuck = now - max(self._advanced_at, self._quorum_since)
        if stuck > patience and furthest < self._heap.run.rounds:
            raise Broken(f"a connected quorum stays in round {furthest} for {stuck:.0f} s")
        while len(self._history) > 1 and self._history[1][0] <= now - patience:
            self._history.popleft()
        then, reached = self._history[0]
        if then <= now - patience and self._timeline.disturbed_at <= then:
            for node in members:
                if node.started_at <= then and node.round < reached:
                    raise Broken(
                        f"{node.name} is in round {node.round}; the others passed {reached}"
                        f" {patience:.0f} s ago"
                    )

    def _patience(self) -> float:
        scenario, run = self._scenario, self._heap.run
        round_s = run.deadline_s + run.min_round_interval_s + scenario.train_s[1]
        return scenario.patience * (round_s + scenario.tick_s) + scenario.liveness.away_after

    def _quorum(self) -> list[SimulatedNode] | None:
        """The honest nodes of the island that holds enough of the weight, if there is one."""
        if self._timeline.is_rough:
            return None
        now = self._heap.now
        roster = self._cast.rosters[-1]
        whole = sum(m.samples for m in roster.members if m.trains)
        islands: dict[int, list[SimulatedNode]] = {}
        for node in self.honest():
            core = node.core
            progress = core.progress if core is not None else None
            if roster.member(node.peer_id) is None or progress is None or node.slowness > 10:
                continue
            if node.peer_id in self._timeline.left or now < node.frozen_until:
                continue
            if core is not None and not core.why_not_contributing():
                islands.setdefault(self._timeline.island_of(node.peer_id), []).append(node)
        for nodes in islands.values():
            weight = sum(member.samples for n in nodes if (member := roster.member(n.peer_id)))
            if weight >= self._heap.run.min_live * whole and weight * 2 > whole:
                return nodes
        return None

    # --- the end -------------------------------------------------------------------------------

    def has_settled(self) -> bool:
        """Whether all honest members hold the same facts, archives and late deltas included."""
        seen = set()
        for node in self._members():
            core = node.core
            assert core is not None
            facts = core.facts
            if facts is None or facts.adopted is not None:
                return False
            tree = facts.tree
            rounds = tuple(r.digest for r in tree.cover())
            seen.add((tree.end, rounds, core.book.hashes))
            if len(seen) > 1:
                return False
        return True

    def check_the_end(self) -> None:
        """One set of facts, one model.

        Raises:
            Broken: There are two.
        """
        members = self._members()
        if not self.has_settled():
            rounds = sorted({node.round for node in members})
            raise Broken(
                f"{self._scenario.settle_s:.0f} s after everything healed the honest members do"
                f" not hold the same facts (rounds {rounds[0]} to {rounds[-1]})"
            )
        models: dict[bytes, set[bytes]] = {}  # by chain: some have late deltas still to fold
        for n, node in enumerate(members):
            facts, progress = node.core.facts, node.core.progress  # type: ignore[union-attr]
            assert facts is not None
            self._check_weights(node, facts, node.core.book)  # type: ignore[union-attr]
            end = facts.tree.end
            if (
                progress is not None
                and progress.folded is not None
                and progress.folded.round == end
            ):
                models.setdefault(progress.folded.chain, set()).add(progress.folded.model_hash)
            if n % max(1, len(members) // 3) == 0:
                state, chain = fold_from_genesis(node, self._heap, end)
                models.setdefault(chain, set()).add(model_hash(state))
        if any(len(found) > 1 for found in models.values()):
            raise Broken("the folds of equal facts, in full and step by step, give unequal models")

    def _members(self) -> list[SimulatedNode]:
        roster = self._cast.rosters[-1]
        return [node for node in self.honest() if roster.member(node.peer_id) is not None]


def expected_weights(
    node: SimulatedNode, facts: RunFacts, book: RosterBook
) -> dict[int, set[tuple[bytes, str, int]]]:
    """What counts, from what is stored and the rosters alone: round -> (name, origin, weight)."""
    banned: dict[str, int] = {}
    for proof in facts.proofs:
        header = proof.first.header
        banned[header.origin] = min(header.round, banned.get(header.origin, header.round))
    for one in book.current.revoked if book.current is not None else ():
        banned[one.peer_id] = min(one.from_round, banned.get(one.peer_id, one.from_round))
    expected: dict[int, set[tuple[bytes, str, int]]] = {}
    for fact, delta in node.disk.deltas.items():
        header = delta.header
        roster = book.get(header.roster_hash)
        member = roster.member(header.origin) if roster is not None else None
        if member is None or not member.trains:
            continue
        if header.round >= banned.get(header.origin, header.round + 1):
            continue
        if header.origin not in facts.seated(header.roster_hash, header.round):
            continue
        assert roster is not None
        weight = facts.weights(header.roster_hash)[header.origin]
        check_weight(facts, [m.samples for m in roster.members if m.trains], member.samples, weight)
        expected.setdefault(header.round, set()).add((fact, header.origin, weight))
    return expected


def check_weight(facts: RunFacts, samples: Iterable[int], own: int, weight: int) -> None:
    """Whether w is floor((n**a * M**(b - a)) ** (1 / b)), by powers instead of roots.

    Raises:
        Broken: It is not.
    """
    rules = facts.run.averaging
    if rules.sample_cap:
        counts = sorted(samples)
        median = counts[(len(counts) - 1) // 2]
        own = max(1, min(own, int(rules.sample_cap * median)))
    a, b = rules.weight_power.numerator, rules.weight_power.denominator
    exact = own**a * MAX_SAMPLES ** (b - a)
    if not weight**b <= exact < (weight + 1) ** b:
        raise Broken(f"a member with {own} samples weighs {weight}")
