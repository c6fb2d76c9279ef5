"""The believed facts of one run, and the plan of the fold: which deltas count, with what weight.

Invariants
* The set of deltas only grows and is never closed; a delta of any age counts.
* A delta weighs what the roster version that it names says about its origin, for ever. A delta
  whose roster is not held yet waits (weight unknown), and counts as soon as the roster arrives.
* Revocation (of the newest roster) takes a member's deltas out from its `from_round` on; a proof of
  equivocation takes its origin out from the proven round on. Both work by leaving out, so they are
  exact.
* `chain(r)` is a hash over exactly what is folded before round r: equal chains mean equal models.

A joiner that took over a checkpoint believes its chain for the rounds before it (`adopt`) until its
own archive of those rounds is complete (`archive_complete`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from p2pfed.gossip.digests import DigestTree
from p2pfed.identity.book import RosterBook
from p2pfed.identity.roster import MAX_MEMBERS
from p2pfed.identity.run import Run
from p2pfed.wire.delta import Proof, SignedHeader
from p2pfed.wire.messages import NAME_BYTES

__all__ = ["Counted", "RunFacts"]


@dataclass(frozen=True, slots=True)
class Counted:
    """One delta that counts: its name, its origin and its weight."""

    fact: bytes
    origin: str
    weight: int


class RunFacts:
    """Headers and proofs of one run; payloads are the caller's.

    Args:
        run: The run.
        book: The believed rosters, shared with the rest of the core.
    """

    def __init__(self, run: Run, book: RosterBook) -> None:
        self.run = run
        self.tree = DigestTree()
        self._book = book
        self._by_round: dict[int, dict[str, SignedHeader]] = {}
        self._by_name: dict[bytes, SignedHeader] = {}
        self._newest: dict[str, int] = {}
        self._proofs: dict[str, Proof] = {}  # the one of the earliest round per origin
        self._chain: list[bytes] = [run.run_id]
        self._adopted: tuple[int, bytes] | None = None

    # --- adding --------------------------------------------------------------------------------

    def add(self, signed: SignedHeader) -> Proof | None:
        """Take in a verified header.

        Returns:
            A proof, if the origin signed another header for this round already; the new header is
            then not part of the set.
        """
        header = signed.header
        held = self._by_round.setdefault(header.round, {}).get(header.origin)
        if held is not None:
            return None if held.fact == signed.fact else Proof.of(held, signed)
        self._by_round[header.round][header.origin] = signed
        self._by_name[signed.fact[:NAME_BYTES]] = signed
        self._newest[header.origin] = max(header.round, self._newest.get(header.origin, 0))
        if not self.is_banned(header.origin, header.round):
            self.tree.add(header.round, signed.fact)
        self._changed(header.round)
        return None

    def add_proof(self, proof: Proof) -> bool:
        """Take in a verified proof; returns whether it says more than what is held.

        Of many proofs for one round any one will do: who signs a thousand headers makes one proof.
        """
        origin, round_ = proof.first.header.origin, proof.first.header.round
        held = self._proofs.get(origin)
        if held is not None and held.first.header.round <= round_:
            return False
        self._proofs[origin] = proof
        for r, origins in self._by_round.items():
            if r >= round_ and origin in origins:
                self.tree.discard(r, origins[origin].fact)
        self._changed(round_)
        return True

    def rosters_changed(self) -> None:
        """A roster was believed: weights and revocations may differ."""
        self._changed(0)

    # --- asking --------------------------------------------------------------------------------

    @property
    def proofs(self) -> tuple[Proof, ...]:
        """One proof per proven origin."""
        return tuple(self._proofs.values())

    def named(self, name: bytes) -> SignedHeader | None:
        """The header of the delta with this 16-byte name."""
        return self._by_name.get(name)

    def header(self, round_: int, origin: str) -> SignedHeader | None:
        """The header of one origin in one round."""
        return self._by_round.get(round_, {}).get(origin)

    def origins(self, round_: int) -> set[str]:
        """Who has a delta in this round, whether it counts or not."""
        return set(self._by_round.get(round_, ()))

    def newest_rounds(self) -> dict[str, int]:
        """The round of each origin's newest delta."""
        return dict(self._newest)

    def has_later_ledger(self, origin: str, releases: int, ledger_head: bytes) -> bool:
        """Whether a held delta of the origin knows a ledger as long as this one, and not this one.

        A ledger only grows, so the one that says `releases` and `ledger_head` is an older copy.
        """
        return any(
            origins[origin].header.releases >= releases
            and origins[origin].header.ledger_head != ledger_head
            for origins in self._by_round.values()
            if origin in origins
        )

    def num_of(self, origin: str) -> int:
        """How many deltas of one origin are held."""
        return sum(origin in origins for origins in self._by_round.values())

    @property
    def num_deltas(self) -> int:
        """How many deltas are held."""
        return len(self._by_name)

    def is_banned(self, origin: str, round_: int) -> bool:
        """Whether a proof takes the origin out of this round."""
        proof = self._proofs.get(origin)
        return proof is not None and round_ >= proof.first.header.round

    def is_out(self, origin: str, round_: int) -> bool:
        """Whether a proof or a revocation takes the origin out of this round."""
        roster = self._book.current
        revoked = roster.revoked if roster is not None else ()
        return self.is_banned(origin, round_) or any(
            r.peer_id == origin and round_ >= r.from_round for r in revoked
        )

    def counted(self, round_: int) -> tuple[Counted, ...]:
        """The deltas of a round that count, ordered by origin; at most as many as a roster lists.

        Members that were exchanged in between could make it more; the first by peer id count then.
        """
        counted = []
        for origin, signed in sorted(self._by_round.get(round_, {}).items()):
            roster = self._book.get(signed.header.roster_hash)
            member = roster.member(origin) if roster is not None else None
            if member is not None and member.trains and not self.is_out(origin, round_):
                counted.append(Counted(signed.fact, origin, member.samples))
        return tuple(counted[:MAX_MEMBERS])

    def chain(self, round_: int) -> bytes:
        """Hash of all that is folded before `round_`, 32 bytes."""
        while len(self._chain) <= round_:
            r = len(self._chain) - 1
            digest = hashlib.blake2b(self._chain[r], digest_size=32, person=b"p2pfed-chain")
            for item in self.counted(r):
                digest.update(item.fact + item.weight.to_bytes(4, "little"))
            if self._adopted is not None and r + 1 == self._adopted[0]:
                self._chain.append(self._adopted[1])
            else:
                self._chain.append(digest.digest())
        return self._chain[round_]

    # --- a joiner's checkpoint -----------------------------------------------------------------

    @property
    def adopted_round(self) -> int:
        """Rounds before this one are believed from a checkpoint; 0 if none."""
        return self._adopted[0] if self._adopted is not None else 0

    @property
    def adopted(self) -> tuple[int, bytes] | None:
        """The believed checkpoint's round and chain, if its archive is not complete yet."""
        return self._adopted

    def adopt(self, round_: int, chain: bytes) -> None:
        """Believe a checkpoint that stands for all rounds before `round_`."""
        self._adopted = (round_, chain)
        self._changed(0)

    def archive_complete(self) -> None:
        """All deltas before the adopted round are held: from now on the own set decides."""
        if self._adopted is not None:
            self._adopted = None
            self._changed(0)

    def _changed(self, round_: int) -> None:
        del self._chain[max(1, round_ + 1) :]
