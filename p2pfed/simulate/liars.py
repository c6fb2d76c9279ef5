"""Byzantine members: the real core, and around it what may do harm.

A liar takes part as usual, so that it is connected and believed, and does one thing besides or
instead:

`equivocate`  signs a second delta for each of its rounds and shows it to half of its peers
`far-ahead`   signs deltas for the last round of the run, and for round 10**9
`hasty`       signs a delta for the next round every second
`flip`        turns the sign of everything it releases and makes it four times as large
`replay`      sends frames again that it heard long ago
`garbage`     sends random bytes, and frames with one bit turned
`miscount`    signs deltas that hold other counts than they say

Invariant: whatever it does is drawn from the generator given, so a seed repeats it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from p2pfed.gossip.core import Core
from p2pfed.gossip.events import Effect, Event, Received, Released, Send, StoreDelta
from p2pfed.identity.signing import DELTA, fact_hash, sign
from p2pfed.simulate.folds import Folds
from p2pfed.simulate.node import SimulatedNode
from p2pfed.wire.delta import Delta, Header
from p2pfed.wire.messages import Facts, encode_message
from p2pfed.wire.payload import Payload

__all__ = ["Liar"]

EVERY = 1.0  # seconds of its clock between two lies
HEARD = 50
BILLION = 10**9


class Liar:
    """See the module docstring; everything else is the core's.

    Args:
        core: What it would be if it were honest.
        node: Where it lives.
        folds: Encodes payloads as the run does.
        lie: What it does.
        chance: Draws what is drawn.
    """

    def __init__(
        self, core: Core, node: SimulatedNode, folds: Folds, lie: str, chance: random.Random
    ) -> None:
        self._core = core
        self._node = node
        self._folds = folds
        self._lie = lie
        self._chance = chance
        self._heard: list[bytes] = []
        self._next = 0.0
        self._hasty = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """What the core does, and the lie."""
        if self._lie == "flip" and isinstance(event, Released):
            event = self._flipped(event)
        effects = self._core.handle(event, now)
        if isinstance(event, Received):
            self._heard = [*self._heard[1 - HEARD :], event.frame]
        if self._lie == "equivocate":
            effects += self._second_deltas(effects)
        makers: dict[str, Callable[[], bytes | None]] = {
            "far-ahead": self._far_ahead,
            "hasty": self._next_round,
            "replay": self._replayed,
            "garbage": self._garbage,
            "miscount": self._miscounted,
        }
        if self._lie in makers and now >= self._next and self._core.facts is not None:
            self._next = now + EVERY
            frame = makers[self._lie]()
            if frame is not None:
                effects += [Send(peer, frame) for peer in list(self._node.up)]
        return effects

    # --- what it sends -------------------------------------------------------------------------

    def _flipped(self, event: Released) -> Released:
        payload = self._folds.decode(event.payload)
        values = np.clip(payload.values.astype(np.int64) * -4, -(1 << 15), (1 << 15) - 1)
        if self._folds.values == "int8":
            values = -payload.values.astype(np.int64)
        flipped = replace_values(payload, values)
        return replace(event, payload=self._folds.encode(flipped))

    def _second_deltas(self, effects: list[Effect]) -> list[Effect]:
        own = [e.delta for e in effects if isinstance(e, StoreDelta) and e.own]
        told: list[Effect] = []
        for delta in own:
            payload = self._folds.decode(delta.payload)
            other = self._folds.encode(replace_values(payload, -payload.values.astype(np.int64)))
            header = replace(delta.header, payload_hash=fact_hash(other))
            frame = _facts(Delta.make(header, other, self._sign))
            peers = list(self._node.up)
            chosen = self._chance.sample(peers, (len(peers) + 1) // 2)
            told += [Send(peer, frame) for peer in chosen]
        return told

    def _far_ahead(self) -> bytes | None:
        rounds = self._folds.run.rounds
        return self._made(self._chance.choice((rounds - 1, BILLION)))

    def _next_round(self) -> bytes | None:
        self._hasty += 1
        return self._made(min(self._hasty, self._folds.run.rounds - 1))

    def _replayed(self) -> bytes | None:
        return self._chance.choice(self._heard) if self._heard else None

    def _garbage(self) -> bytes | None:
        if not self._heard or self._chance.random() < 0.5:
            return self._chance.randbytes(self._chance.randrange(200))
        frame = bytearray(self._chance.choice(self._heard))
        frame[self._chance.randrange(len(frame))] ^= 1 << self._chance.randrange(8)
        return bytes(frame)

    def _miscounted(self) -> bytes | None:
        progress = self._core.progress
        round_ = progress.round if progress is not None else 0
        return self._made(round_, num_released=self._chance.randrange(1 << 20), releases=BILLION)

    # --- made by hand --------------------------------------------------------------------------

    def _sign(self, data: bytes) -> bytes:
        return sign(self._node.seed, DELTA, data)

    def _made(self, round_: int, **changes: Any) -> bytes | None:
        run, roster = self._folds.run, self._core.book.current
        if roster is None:
            return None
        payload = self._folds.encode(Payload(np.zeros(1, np.int64), np.array([8], np.int16)))
        header = Header(
            run_id=run.run_id,
            round=round_,
            origin=self._node.peer_id,
            roster_hash=roster.hash,
            view_hash=bytes(32),
            mechanism=run.mechanism,
            spent_nano_rho=0,
            releases=round_ + 1,
            ledger_head=bytes(32),
            payload_hash=fact_hash(payload),
            num_released=self._folds.decode(payload).values.size,
        )
        return _facts(Delta.make(replace(header, **changes), payload, self._sign))


def replace_values(payload: Payload, values: np.ndarray[Any, Any]) -> Payload:
    """The same coordinates with other values."""
    if payload.is_dense:
        return Payload.dense(values.astype(np.int16))
    return Payload(payload.indices, values.astype(np.int16))


def _facts(delta: Delta) -> bytes:
    return encode_message(Facts((delta.encode(),), (), ()))
