"""Folds of all nodes of one world, and the invariant that equal facts give equal models.

Each node folds by the real `Replay`. With `full_every` = k > 1 only one fold in k is done in full:
it starts at the newest state of a common library that stands for the right chain, recomputes at
least its own last round from the node's own stored payloads, and is compared with what others
computed for the same chain. The other k - 1 take the model from the library where it is there
already. So every model is computed, about one in k twice, and the cost of a round no longer grows
with the number of nodes.

Invariants: one chain has one model hash, whoever folded it; the deltas that a plan counts are
distinct, of distinct origins, of their round, and stored by the node that folds them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from p2pfed.gossip.fold import ModelState, model_hash
from p2pfed.gossip.joining import checkpoint_interval, kept_rounds
from p2pfed.gossip.replay import Replay
from p2pfed.identity.run import Run
from p2pfed.wire.payload import Payload, decode_payload, encode_payload

if TYPE_CHECKING:
    from p2pfed.gossip.events import Fold
    from p2pfed.simulate.node import SimulatedNode

__all__ = ["Broken", "Folds"]

STATES = 256  # that the library holds; a few rounds behind nobody needs them any more
PAYLOADS = 4096


class Broken(AssertionError):
    """An invariant does not hold; says which, and for whom."""


class _Library:
    """States by chain, as the checkpoints of whoever folds next."""

    def __init__(self) -> None:
        self.states: OrderedDict[bytes, ModelState] = OrderedDict()
        self.wanted: Mapping[int, bytes] = {}

    def chains(self) -> Mapping[int, bytes]:
        """Of the states that may be started from."""
        return {r: chain for r, chain in self.wanted.items() if chain in self.states}

    def load(self, round_: int) -> ModelState:
        """A copy of the state of a round."""
        return self.states[self.wanted[round_]].copy()

    def save(self, state: ModelState, chain: bytes) -> None:
        """Keep a copy of a state."""
        if chain not in self.states:
            self.states[chain] = state.copy()
            if len(self.states) > STATES:
                self.states.popitem(last=False)

    def prune(self, keep: frozenset[int]) -> None:
        """Nothing: others may need it."""


class Folds:
    """See the module docstring.

    Args:
        run: The run.
        genesis: Its first model, shape (P,).
        full_every: One in how many folds is done in full.
    """

    def __init__(self, run: Run, genesis: NDArray[np.float32], *, full_every: int = 1) -> None:
        self.models: dict[bytes, bytes] = {}  # chain -> hash of its model
        self.in_full = 0
        self.taken_over = 0
        self.run = run
        self._genesis = genesis
        self._full_every = full_every
        self._library = _Library()
        self._payloads: OrderedDict[bytes, Payload] = OrderedDict()
        self._plans: dict[bytes, tuple[bytes, ...]] = {}  # chain after a round -> what it counted

    def start(self, node: SimulatedNode) -> None:
        """A node's process begins."""
        node.replay = Replay(
            self.run,
            lambda: self._genesis,
            node.disk.checkpoints,
            lambda fact: self._payload(node, fact),
        )

    def fold(self, node: SimulatedNode, wanted: Fold) -> tuple[ModelState, bytes] | None:
        """The state that a node wants and its chain, or None if it needs an older plan.

        Raises:
            Broken: The plan or its result contradicts an invariant.
        """
        self._check_plan(node, wanted)
        if self._full_every > 1 and not wanted.adopted:
            return self._by_library(node, wanted)
        assert node.replay is not None
        state = node.replay.fold(wanted)
        if state is None:
            return None
        self.in_full += 1
        if node.replay.chain:
            self.compare(node, node.replay.chain, model_hash(state))
        return state, node.replay.chain

    def compare(self, node: SimulatedNode, chain: bytes, found: bytes) -> None:
        """Equal facts, equal models.

        Raises:
            Broken: Somebody has another model of the same facts.
        """
        known = self.models.setdefault(chain, found)
        if known != found:
            raise Broken(
                f"equal facts, unequal models: {node.name} has {found.hex()[:12]} of the facts"
                f" {chain.hex()[:12]}, another node {known.hex()[:12]}"
            )

    def hash_of(self, chain: bytes, state: ModelState) -> bytes:
        """Hash of the model that stands for a chain."""
        return self.models.get(chain) or model_hash(state)

    def _by_library(self, node: SimulatedNode, wanted: Fold) -> tuple[ModelState, bytes] | None:
        chain = wanted.chain(wanted.round) or b""
        library, full = self._library, (node.index + wanted.round) % self._full_every == 0
        state = None if full else library.states.get(chain)
        if state is None:
            state = self._in_full(node, wanted)
            if state is None:
                return None
            self.in_full += 1
            self.compare(node, chain, model_hash(state))
            library.save(state, chain)
        else:
            self.taken_over += 1
        self._keep_checkpoints(node, wanted)
        return state, chain

    def _in_full(self, node: SimulatedNode, wanted: Fold) -> ModelState | None:
        """From the newest state that is older than the one wanted."""
        rounds = range(wanted.first, max(1, wanted.round))
        own = {r: chain for r, chain in node.disk.checkpoints.chains().items() if r in rounds}
        for round_, chain in own.items():  # a checkpoint that it fetched may be known to it alone
            self._library.save(node.disk.checkpoints.held[round_][0], chain)
        self._library.wanted = {r: wanted.chain(r) or b"" for r in rounds}
        replay = Replay(
            self.run, lambda: self._genesis, self._library, lambda f: self._payload(node, f)
        )
        return replay.fold(wanted)

    def _keep_checkpoints(self, node: SimulatedNode, wanted: Fold) -> None:
        kept = kept_rounds(wanted.round, checkpoint_interval(self.run.num_parameters))
        held = node.disk.checkpoints.held
        for round_ in kept:
            chain = wanted.chain(round_)
            state = self._library.states.get(chain) if chain is not None else None
            if state is not None and chain is not None:
                held[round_] = (state, chain)
        node.disk.checkpoints.prune(kept)

    # --- payloads and plans --------------------------------------------------------------------

    @property
    def values(self) -> str:
        """How wide the run's values are."""
        return self.run.encoding.values

    def encode(self, payload: Payload) -> bytes:
        """A payload as the run writes it."""
        run = self.run
        return encode_payload(payload, num_parameters=run.num_parameters, width=run.encoding.values)

    def decode(self, data: bytes) -> Payload:
        """A payload as the run reads it."""
        run = self.run
        return decode_payload(
            data,
            num_parameters=run.num_parameters,
            max_released=run.max_released,
            width=run.encoding.values,
        )

    def _payload(self, node: SimulatedNode, fact: bytes) -> Payload:
        delta = node.deltas.get(fact)
        if delta is None:
            raise Broken(f"{node.name} folds a delta that it has not stored")
        payload = self._payloads.get(fact)
        if payload is None:
            payload = self.decode(delta.payload)
            self._payloads[fact] = payload
            if len(self._payloads) > PAYLOADS:
                self._payloads.popitem(last=False)
        return payload

    def _check_plan(self, node: SimulatedNode, wanted: Fold) -> None:
        for round_ in range(max(wanted.first, wanted.adopted), wanted.round):
            chain = wanted.chain(round_ + 1) or b""
            counted = wanted.deltas(round_)
            facts = tuple(item.fact for item in counted)
            known = self._plans.get(chain)
            if known is None:
                self._check_round(node, round_, wanted)
                self._plans[chain] = facts
            elif known != facts:
                raise Broken(f"{node.name}: one chain stands for two plans of round {round_}")

    def _check_round(self, node: SimulatedNode, round_: int, wanted: Fold) -> None:
        counted = wanted.deltas(round_)
        if len({c.fact for c in counted}) != len(counted):
            raise Broken(f"{node.name}: a payload of round {round_} is folded twice")
        if len({c.origin for c in counted}) != len(counted):
            raise Broken(f"{node.name}: an origin counts twice in round {round_}")
        for item in counted:
            delta = node.deltas.get(item.fact)
            if delta is None or (delta.header.round, delta.header.origin) != (round_, item.origin):
                raise Broken(f"{node.name}: the plan of round {round_} names a wrong delta")
