"""A small consortium for tests: keys from fixed seeds, signed rosters, a run, signed deltas.

Three stewards, of whom two must sign; hospitals `h0`, `h1`, … with different weights. Everything is
a function of its arguments, so that a failing test fails again.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from p2pfed.gossip.facts import RunFacts
from p2pfed.identity.book import RosterBook
from p2pfed.identity.keys import NodeKey
from p2pfed.identity.roster import Member, Roster, Steward
from p2pfed.identity.run import Outer, Run
from p2pfed.identity.signing import DELTA, ROSTER, RUN, SignedDocument, fact_hash, sign
from p2pfed.wire.delta import Delta, Header
from p2pfed.wire.payload import Payload, count_released, encode_payload

EXPIRES = dt.datetime(2027, 1, 1, tzinfo=dt.UTC)
STEWARD_SEEDS = [bytes([200 + i]) * 32 for i in range(5)]


@cache
def key_of(i: int) -> NodeKey:
    """Key of hospital i."""
    return NodeKey((i + 1).to_bytes(32, "big"))


@cache
def peer_of(i: int) -> str:
    """Peer id of hospital i."""
    return key_of(i).peer_id


def steward(i: int) -> Steward:
    return Steward(f"steward {i}", NodeKey(STEWARD_SEEDS[i]).public_key)


def hospital(
    i: int, samples: int | None = None, roles: tuple[str, ...] = ("train",), name: str = ""
) -> Member:
    """Member i; its weight is 50 + 10 i unless said otherwise."""
    return Member(name or f"h{i}", peer_of(i), roles, 50 + 10 * i if samples is None else samples)


def signed(payload: bytes, *by: int, person: bytes = ROSTER) -> bytes:
    """The document, signed by these stewards (0 and 1 if none is named)."""
    document = SignedDocument(payload)
    for i in by or (0, 1):
        document = document.signed_by(STEWARD_SEEDS[i], person)
    return document.encode()


def founded(network: str = "test network") -> Roster:
    """Version 1: three stewards, two must sign, no members."""
    first = Roster.found(
        network, stewards=[steward(i) for i in range(3)], threshold=2, expires=EXPIRES
    )
    return Roster.decode(first.encode())


class Consortium:
    """Signed rosters v1..vn; v1 founds the network, v2 lists `n` hospitals.

    Attributes:
        rosters: The decoded rosters, v1 first.
        signed: Their signed bytes.
    """

    def __init__(self, n: int = 3, *, samples: Sequence[int] = (), network: str = "test network"):
        first = founded(network)
        self.rosters = [first]
        self.signed = [signed(first.encode())]
        members = [hospital(i, samples[i] if samples else None) for i in range(n)]
        self.publish(first.next(members=members))

    @property
    def roster(self) -> Roster:
        return self.rosters[-1]

    def publish(self, draft: Roster, *by: int) -> bytes:
        """Sign one more version; returns its signed bytes."""
        payload = draft.encode()
        self.rosters.append(Roster.decode(payload))
        self.signed.append(signed(payload, *by))
        return self.signed[-1]

    def grow(self, *members: Member) -> bytes:
        return self.publish(self.roster.next(members=[*self.roster.members, *members]))

    def book(self, *versions: int) -> RosterBook:
        """A book that holds these versions (all, if none is named)."""
        book = RosterBook()
        for version in versions or range(1, len(self.signed) + 1):
            book.add(self.signed[version - 1])
        return book

    def run(self, **constants: Any) -> Run:
        """A run without noise over 40 parameters; any constant can be replaced."""
        return Run.decode(self.run_draft(**constants).encode())

    def run_draft(self, **constants: Any) -> Run:
        defaults = Run(
            name="a run",
            network_id=self.rosters[0].hash,
            task="toy",
            task_id=bytes(32),
            genesis=bytes(32),
            num_parameters=40,
            rounds=20,
            grid_bits=12,
            mechanism="none",
            unit="none",
            epsilon=Fraction(0),
            delta=Fraction(0),
            clip=Fraction(1),
            block_size=1,
            segment_blocks=1,
            select_share=Fraction(0),
            top_fraction=Fraction(1),
            outer=Outer("fedavg", 1.0),
            robust="none",
            quorum=0.8,
            min_live=0.5,
            deadline_s=5.0,
            min_round_interval_s=0.5,
        )
        return replace(defaults, **constants)

    def signed_run(self, *by: int, **constants: Any) -> bytes:
        return signed(self.run_draft(**constants).encode(), *by, person=RUN)

    def delta(
        self,
        run: Run,
        round_: int,
        i: int,
        payload: Payload | None = None,
        *,
        roster: Roster | None = None,
        **changes: Any,
    ) -> Delta:
        """A delta of hospital i; two calls with different payloads contradict each other."""
        payload = payload if payload is not None else some_payload(run, round_, i)
        data = encode_payload(payload, num_parameters=run.num_parameters, width=run.encoding.values)
        header = Header(
            run_id=run.run_id,
            round=round_,
            origin=peer_of(i),
            roster_hash=(roster or self.roster).hash,
            view_hash=bytes(32),
            mechanism=run.mechanism,
            spent_nano_rho=0,
            releases=round_ + 1,
            ledger_head=bytes(32),
            payload_hash=fact_hash(data),
            num_released=count_released(data),
        )
        seed = key_of(i).seed
        return Delta.make(replace(header, **changes), data, lambda data: sign(seed, DELTA, data))

    def facts(self, run: Run, deltas: Iterable[Delta] = (), book: RosterBook | None = None):
        facts = RunFacts(run, book or self.book())
        for delta in deltas:
            facts.add(delta.signed)
        return facts


def sparse(pairs: dict[int, int]) -> Payload:
    """A payload from index -> value."""
    indices = sorted(pairs)
    return Payload(np.array(indices, np.int64), np.array([pairs[i] for i in indices], np.int16))


def some_payload(run: Run, round_: int, i: int, salt: int = 0) -> Payload:
    """An arbitrary payload that depends on its arguments only."""
    digest = fact_hash(f"{round_}/{i}/{salt}".encode()) * (run.num_parameters // 16 + 1)
    values = np.frombuffer(digest, "<i2", run.num_parameters) // 16
    kept = np.arange(run.num_parameters) % 3 != (round_ + i) % 3
    return Payload(np.flatnonzero(kept), values[kept].astype(np.int16))
