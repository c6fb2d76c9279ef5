"""Witnesses: before a node releases after a start, others tell it what it has released already.

A state directory that is whole but old cannot be told from a current one by looking at it: a backup
that was restored, a virtual machine's snapshot, a lost store. Spending on from there would spend
the same budget twice, and sign a second delta for a round that has one. The memory of the others
helps: they hold every header that this node ever signed, run by run. So before its first release
after each start a node asks all members that it reaches for the newest header it signed in each
run, and needs `needed` answers; the trainer then refuses to spend unless its ledger knows the
ledger heads in them all (`heads`), and no round up to the newest one of a run is signed again
(`closed_round`).

Invariants: an answer is signed by the asker itself, so it cannot be invented, only withheld; no
answers means no release, and nothing else waits. What was learnt lives as long as the process.

Why members that train: a relay or bootstrap node takes part in no run, so its "none known" is
worth nothing. Why under mechanism `none` as well: a second signature for one round is a proof of
equivocation, whatever was spent on it.

Source: freshness cannot be had from local state (Brandenburger, Cachin, Lorenz, Kapitza 2017,
"Rollback and forking detection"), so the group keeps it.
Not here: who answers with what (`node/store`: all headers are there), the ledger (the trainer's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

from p2pfed.errors import RemoteProtocolError
from p2pfed.gossip.events import Effect, Note, Send, SendWitness
from p2pfed.gossip.membership import Membership
from p2pfed.identity.book import RosterBook
from p2pfed.identity.roster import Roster
from p2pfed.identity.signing import fact_hash
from p2pfed.wire.delta import Header, SignedHeader
from p2pfed.wire.messages import (
    MAX_WITNESSED,
    NAME_BYTES,
    AskWitness,
    Want,
    Witness,
    encode_message,
)

__all__ = ["ENOUGH", "Witnesses", "witness_of"]

ENOUGH = 2  # answers; fewer where there are fewer others
ASK_AGAIN = 5.0  # seconds; a question or its answer may be lost
NO_ROUND = -1


def witness_of(origin: str, held: Iterable[SignedHeader]) -> Witness:
    """What a node that holds these headers answers to `origin`."""
    newest: dict[bytes, SignedHeader] = {}
    for signed in held:
        header = signed.header
        best = newest.get(header.run_id)
        if header.origin == origin and (best is None or best.header.round < header.round):
            newest[header.run_id] = signed
    shown = sorted((s.header_bytes, s.signature) for s in newest.values())
    return Witness(tuple(shown[:MAX_WITNESSED]))


class Witnesses:
    """What this node must know of its own past before it releases.

    Args:
        own_id: This node.
        sign: Signs a header with this node's key.
        book: The believed rosters; say whose answers count.
        membership: The table of peers.
    """

    def __init__(
        self,
        own_id: str,
        sign: Callable[[bytes], bytes],
        book: RosterBook,
        membership: Membership,
    ) -> None:
        self._own_id = own_id
        self._sign = sign
        self._book = book
        self._membership = membership
        self._answered: set[str] = set()
        self._newest: dict[bytes, SignedHeader] = {}  # run id -> the newest header signed here
        self._next_question = float("-inf")
        self._roster: Roster | None = None  # whose training members are these:
        self._training: frozenset[str] = frozenset()

    # --- what is known -------------------------------------------------------------------------

    def remember(self, own: Iterable[SignedHeader]) -> None:
        """Take in headers that this node signed: from its store, or just now."""
        for signed in own:
            header = signed.header
            held = self._newest.get(header.run_id)
            if header.origin == self._own_id and (held is None or held.header.round < header.round):
                self._newest[header.run_id] = signed

    @property
    def heads(self) -> tuple[bytes, ...]:
        """Ledger heads that this node's ledger must know, 32 bytes each; one per run."""
        return tuple(sorted({signed.header.ledger_head for signed in self._newest.values()}))

    def closed_round(self, run_id: bytes) -> int:
        """No round of this run up to this one is signed any more; -1 if all are open."""
        newest = self._newest.get(run_id)
        return NO_ROUND if newest is None else newest.header.round

    @property
    def missing(self) -> int:
        """How many members must still answer before this node may release."""
        others = self._others()
        needed = min(ENOUGH, len(others))
        heard = islice((peer for peer in self._answered if peer in others), needed)
        return needed - sum(1 for _ in heard)

    def _others(self) -> frozenset[str]:
        roster = self._book.current
        if roster is not self._roster:  # asked after every event
            members = roster.members if roster is not None else ()
            self._roster = roster
            self._training = frozenset(m.peer_id for m in members if m.trains) - {self._own_id}
        return self._training

    # --- asking --------------------------------------------------------------------------------

    def connected(self, peer_id: str) -> list[Effect]:
        """A connection is up: ask, unless this member has answered since the start."""
        if peer_id in self._answered or peer_id not in self._others():
            return []
        return [Send(peer_id, encode_message(AskWitness()))]

    def tick(self, now: float) -> list[Effect]:
        """Ask again those who are there and have not answered, while answers are missing."""
        if now < self._next_question or not self.missing:
            return []
        self._next_question = now + ASK_AGAIN
        present = sorted(p.peer_id for p in self._membership.present())
        return [effect for peer_id in present for effect in self.connected(peer_id)]

    def hear(self, peer_id: str, message: AskWitness | Witness) -> list[Effect]:
        """A member asks what is held of it, or tells what it holds of this node's.

        What the member holds and this node does not it asks for.

        Raises:
            RemoteProtocolError: A header is malformed, or not signed by this node.
        """
        if isinstance(message, AskWitness):
            return [SendWitness(peer_id)]
        shown = [self._read(*pair) for pair in message.headers]
        later = [s for s in shown if s.header.round > self.closed_round(s.header.run_id)]
        self.remember(later)
        if peer_id in self._others():
            self._answered.add(peer_id)
        effects: list[Effect] = []
        for signed in later:
            header = signed.header
            want = Want(header.run_id, signed.fact[:NAME_BYTES])
            what = {"run": header.run_id.hex(), "round": header.round, "of": peer_id}
            effects += [Send(peer_id, encode_message(want)), Note("witness.later", what)]
        return effects

    def _read(self, header_bytes: bytes, signature: bytes) -> SignedHeader:
        """Ed25519 signs the same bytes alike (RFC 8032, 5.1.6): sign again to know our own."""
        if self._sign(header_bytes) != signature:
            raise RemoteProtocolError("a witness shows a header that this node did not sign")
        header = Header.decode(header_bytes)
        return SignedHeader(header, header_bytes, signature, fact_hash(header_bytes))
