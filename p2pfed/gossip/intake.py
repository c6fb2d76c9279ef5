"""Taking in facts: checked first, then believed, then stored and announced.

Rosters go to the book, proofs and deltas to the facts of the run. A delta further ahead than
`rounds.AHEAD` is set `aside` until the node's own round comes near.

Invariants: nothing malformed, forged, of another run, of a stranger or beyond its bounds changes
anything; a message with one broken fact changes nothing, so that what is believed is always stored;
each new fact is stored once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping

from p2pfed.errors import FactRejected, RemoteProtocolError
from p2pfed.gossip.aside import Aside
from p2pfed.gossip.events import (
    Disconnect,
    Effect,
    Note,
    StopDialling,
    StoreDelta,
    StoreProof,
    StoreRoster,
)
from p2pfed.gossip.membership import Membership, State
from p2pfed.gossip.progress import Progress
from p2pfed.gossip.rounds import AHEAD
from p2pfed.gossip.sync import Sync
from p2pfed.identity.book import RosterBook
from p2pfed.wire.delta import Delta, Proof
from p2pfed.wire.messages import Facts
from p2pfed.wire.payload import decode_payload

__all__ = ["Intake"]

TOLD = 2  # contacts in which a new delta is told; the digests find who has missed it
TOLD_IN_CROWD = 6


class Intake:
    """See the module docstring.

    Args:
        own_id: This node.
        book: The believed rosters.
        membership: The table of peers.
        rng: Chance for choosing whom to tell.
        read_delta: Decodes and verifies a delta; raises RemoteProtocolError.
    """

    def __init__(
        self,
        *,
        own_id: str,
        book: RosterBook,
        membership: Membership,
        rng: random.Random,
        read_delta: Callable[[bytes], Delta] = Delta.decode,
    ) -> None:
        self._aside = Aside()
        self.sync = Sync(book, self._aside.__contains__, patience=membership.liveness.patience)
        self._own_id = own_id
        self._book = book
        self._membership = membership
        self._rng = rng
        self._read_delta = read_delta
        self._progress: Progress | None = None

    def take_run(self, progress: Progress) -> None:
        """From now on facts of this run are taken in."""
        self._progress = progress
        self._aside.clear()
        self.sync.take_run(progress.facts)

    def facts(self, message: Facts, peer_id: str) -> list[Effect]:
        """Take in facts that a peer sent.

        Raises:
            RemoteProtocolError: One of them is broken; then none is believed.
        """
        if self._progress is None:
            return self.rosters(message.rosters)
        proofs = [Proof.decode(data) for data in message.proofs]
        deltas = [self._read_delta(data) for data in message.deltas]
        for delta in deltas:
            self._check(delta)
        effects = self.rosters(message.rosters)
        for proof in proofs:
            effects += self.proof(proof)
        for delta in deltas:
            effects += self._take(delta, peer_id)
        return effects

    # --- documents -----------------------------------------------------------------------------

    def rosters(self, signed: Iterable[bytes]) -> list[Effect]:
        """Believe rosters that verify, in whatever order they come; drop and note the others."""
        effects: list[Effect] = []
        before = self._book.current
        waiting, believed, reason = list(signed), True, ""
        while waiting and believed:  # one may vouch for another that came before it
            rejected, believed = [], False
            for data in waiting:
                try:
                    roster = self._book.add(data)
                except FactRejected as error:
                    reason = error.what
                    rejected.append(data)
                    continue
                if roster is not None:
                    believed = True
                    effects.append(StoreRoster(roster.version, roster.hash, data))
            waiting = rejected
        if waiting:
            effects.append(Note("roster.rejected", {"reason": reason, "count": len(waiting)}))
        if not any(isinstance(e, StoreRoster) for e in effects):
            return effects
        if self._progress is not None:
            self._progress.facts.rosters_changed()
        return effects if self._book.current is before else [*effects, *self._adopt_current()]

    def _adopt_current(self) -> list[Effect]:
        current = self._book.current
        assert current is not None
        effects: list[Effect] = [Note("roster.updated", {"version": current.version})]
        for peer in self._membership.adopt(current):
            if peer.state is State.REVOKED:
                effects += [
                    Note("peer.revoked", {"peer": peer.peer_id, "name": peer.name}),
                    StopDialling(peer.peer_id),
                    Disconnect(peer.peer_id, "revoked", blame=False),
                ]
        return effects

    def proof(self, proof: Proof) -> list[Effect]:
        """Believe a proof of equivocation; its origin is out from that round on."""
        header = proof.first.header
        facts = self._progress.facts if self._progress is not None else None
        if facts is None or header.run_id != facts.run.run_id:
            return []
        if not self._book.has_listed(header.origin) or not facts.add_proof(proof):
            return []
        return [
            StoreProof(header.origin, proof.encode()),
            Note("peer.equivocated", {"peer": header.origin, "round": header.round}),
        ]

    # --- deltas --------------------------------------------------------------------------------

    def _is_of_this_run(self, delta: Delta) -> bool:
        assert self._progress is not None
        return delta.header.run_id == self._progress.facts.run.run_id

    def _check(self, delta: Delta) -> None:
        assert self._progress is not None
        run, header = self._progress.facts.run, delta.header
        if not self._is_of_this_run(delta):
            return  # nobody's fault: it was asked for before another run began here
        if header.round >= run.rounds:
            raise RemoteProtocolError(f"a delta beyond the last round, {header.round}")
        if header.mechanism != run.mechanism:
            raise RemoteProtocolError(f"a delta made with mechanism {header.mechanism!r}")
        payload = decode_payload(
            delta.payload,
            num_parameters=run.num_parameters,
            max_released=run.max_released,
            width=run.encoding.values,
        )
        if payload.values.size != header.num_released:
            raise RemoteProtocolError("a delta whose header miscounts its payload")

    def _take(self, delta: Delta, peer_id: str) -> list[Effect]:
        self.sync.arrived(delta.signed)
        # A stranger's key is made in no time: its deltas would fill any table. If a roster that
        # lists it is still on its way, the delta is asked for again afterwards.
        if not self._is_of_this_run(delta) or not self._book.has_listed(delta.header.origin):
            return []
        if self._is_too_far_ahead(delta):
            self._aside.add(delta)
            return []
        return self.delta(delta, from_peer=peer_id)

    def delta(self, delta: Delta, *, from_peer: str = "") -> list[Effect]:
        """Believe a delta that was checked, or made here (`from_peer` empty)."""
        assert self._progress is not None
        facts = self._progress.facts
        known = facts.num_deltas
        late = bool(from_peer) and self._progress.is_late(delta.header.round)
        proof = facts.add(delta.signed, late=late)
        if proof is not None:
            return self.proof(proof)
        if facts.num_deltas == known:
            return []
        header, crowd = delta.header, self._membership.is_crowd
        self._membership.vouch(header.origin, header.round)
        self.sync.spread.added(header.round, header.origin, TOLD_IN_CROWD if crowd else TOLD)
        effects: list[Effect] = [StoreDelta(delta, own=not from_peer)]
        if not from_peer and not crowd:  # all are connected: tell them at once
            for peer in self._membership.present():
                effects += self.sync.spread.show(peer.peer_id, [header.round])
        return effects

    # --- deltas set aside ----------------------------------------------------------------------

    def _is_too_far_ahead(self, delta: Delta) -> bool:
        assert self._progress is not None
        return delta.header.round > self._progress.round + AHEAD

    def newest_set_aside(self) -> Mapping[str, int]:
        """The newest round of each origin among the deltas that are set aside."""
        return self._aside.newest

    def waiting(self) -> dict[str, int]:
        """How much is kept because of others, by kind; each is bounded."""
        return {"set_aside": len(self._aside), "asked": len(self.sync.asked)}

    def admit(self) -> list[Effect]:
        """Believe the deltas that are no longer too far ahead."""
        if not self._aside:
            return []
        assert self._progress is not None
        effects: list[Effect] = []
        for delta in self._aside.take(self._progress.round + AHEAD):
            effects += self.delta(delta, from_peer=delta.header.origin)
        return effects
