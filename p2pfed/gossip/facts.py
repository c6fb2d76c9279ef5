"""The believed facts of one run, and the plan of the fold: which deltas count, with what weight.

Invariants
* The set of deltas only grows and is never closed; a delta of any age counts. One that arrives
  late waits for a `fold_late` (see `lateness`); the digests hold it at once.
* A delta weighs what the roster version that it names says about its origin, for ever, if that
  roster gives its origin a seat in the round. A delta whose roster is not held yet waits (weight
  unknown), and counts as soon as the roster arrives.
* Revocation (of the newest roster) takes a member's deltas out from its `from_round` on; a proof of
  equivocation takes its origin out from the proven round on. Both work by leaving out, so they are
  exact.
* `chain(r)` is a hash over exactly what is folded before round r: equal chains mean equal models.

A joiner that took over a checkpoint believes its chain for the rounds before it (`adopt`) until its
own archive of those rounds is complete (`archive_complete`). If a member is revoked meanwhile from
a round before it, the checkpoint may hold what has to go: `owed` says so, and no model is made
until the archive is there.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from fractions import Fraction

from p2pfed.gossip.committee import Committees
from p2pfed.gossip.digests import DigestTree
from p2pfed.gossip.held import Entry, Held
from p2pfed.gossip.weights import weights_of
from p2pfed.identity.book import RosterBook
from p2pfed.identity.roster import MAX_MEMBERS, Roster
from p2pfed.identity.run import Run
from p2pfed.wire.delta import Header, Proof, SignedHeader
from p2pfed.wire.messages import NAME_BYTES

__all__ = ["Counted", "RunFacts"]

_NOBODY: dict[str, int] = {}
CONFIRMING = 2  # training members that must hold the same archive
REMEMBERED_WEIGHTS = 8  # rosters; deltas in flight name the newest two or three


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
        recall: Reads a stored signed header by its full name, see `held`.
    """

    def __init__(
        self,
        run: Run,
        book: RosterBook,
        recall: Callable[[bytes], SignedHeader | None] | None = None,
    ) -> None:
        self.run = run
        self.tree = DigestTree()
        self._book = book
        self._held = Held(recall)
        self._rounds_by_name: dict[bytes, int] = {}
        self._ledgers: dict[str, tuple[int, frozenset[bytes]]] = {}  # the longest that was named
        self._newest: dict[str, int] = {}
        self._proofs: dict[str, Proof] = {}  # the one of the earliest round per origin
        self._chain: list[bytes] = [run.run_id]
        self._adopted: tuple[int, bytes] | None = None
        self._adopted_under = 0  # the version of the newest roster at that time
        self._adopted_without: dict[str, int] = {}  # who was out then: origin -> from which round
        self._confirmed: dict[str, int] = {}  # peer -> rounds before this one are the same there
        self._late: dict[int, set[str]] = {}  # round -> origins whose deltas wait for `fold_late`
        self._committees = Committees(run)
        self._weights: OrderedDict[bytes, dict[str, int]] = OrderedDict()

    # --- adding --------------------------------------------------------------------------------

    def add(self, signed: SignedHeader, *, late: bool = False) -> Proof | None:
        """Take in a verified header.

        Args:
            signed: The header.
            late: It shall wait for `fold_late` before it counts.

        Returns:
            A proof, if the origin signed another header for this round already; the new header is
            then not part of the set.
        """
        header = signed.header
        entry = self._held.entry(header.round, header.origin)
        if entry is not None:
            held = self._held.signed(header.round, header.origin)
            return None if held is None or entry.fact == signed.fact else Proof.of(held, signed)
        self._held.add(signed)
        self._rounds_by_name[signed.fact[:NAME_BYTES]] = header.round
        self._note_ledger(header)
        self._newest[header.origin] = max(header.round, self._newest.get(header.origin, 0))
        if not self.is_banned(header.origin, header.round):
            self.tree.add(header.round, signed.fact)
        if late and self._adopted is None:  # with holes in the archive old rounds are not folded
            self._late.setdefault(header.round, set()).add(header.origin)
        else:
            self._changed(header.round)
        return None

    def fold_late(self, rounds: AbstractSet[int]) -> None:
        """From now on the deltas of these rounds that waited count."""
        late = rounds & self._late.keys()
        for round_ in late:
            del self._late[round_]
        if late:
            self._changed(min(late))

    def add_proof(self, proof: Proof) -> bool:
        """Take in a verified proof; returns whether it says more than what is held.

        Of many proofs for one round any one will do: who signs a thousand headers makes one proof.
        """
        origin, round_ = proof.first.header.origin, proof.first.header.round
        held = self._proofs.get(origin)
        if held is not None and held.first.header.round <= round_:
            return False
        self._proofs[origin] = proof
        for r in [r for r in self._held.rounds() if r >= round_]:
            entry = self._held.entry(r, origin)
            if entry is not None:
                self.tree.discard(r, entry.fact)
        self._changed(round_)
        return True

    def rosters_changed(self) -> None:
        """A roster was believed: weights and revocations may differ."""
        self._weights.clear()
        self._changed(0)

    # --- asking --------------------------------------------------------------------------------

    @property
    def proofs(self) -> tuple[Proof, ...]:
        """One proof per proven origin."""
        return tuple(self._proofs.values())

    def named(self, name: bytes) -> Entry | None:
        """The delta with this 16-byte name."""
        round_ = self._rounds_by_name.get(name)
        entries = self._held.entries(round_) if round_ is not None else []
        return next((e for e in entries if e.fact.startswith(name)), None)

    def holds(self, round_: int, origin: str) -> bool:
        """Whether there is a delta of one origin in one round."""
        return self._held.holds(round_, origin)

    def entry(self, round_: int, origin: str) -> Entry | None:
        """The delta of one origin in one round."""
        return self._held.entry(round_, origin)

    def entries(self, round_: int) -> list[Entry]:
        """All deltas of a round, whether they count or not, in no order."""
        return self._held.entries(round_)

    def origins(self, round_: int) -> set[str]:
        """Who has a delta in this round, whether it counts or not."""
        return self._held.origins(round_)

    def standing(self, round_: int) -> set[str]:
        """Who has a delta in this round and is neither revoked nor proven to equivocate in it."""
        return {o for o in self.origins(round_) if not self.is_out(o, round_)}

    def cool(self, before: int) -> None:
        """Rounds before this one are asked for rarely: let go of their headers."""
        self._held.cool(before)

    @property
    def missed_rounds(self) -> frozenset[int]:
        """Late rounds in which more than a third of the newest roster's weight waits.

        No member alone makes it so: this node was away, and what it lacks cannot wait.
        """
        roster = self._book.current
        weights = self.weights(roster.hash) if roster is not None else _NOBODY
        third = sum(weights.values()) / 3
        return frozenset(
            r for r, late in self._late.items() if sum(weights.get(o, 0) for o in late) > third
        )

    @property
    def late_rounds(self) -> frozenset[int]:
        """Rounds of which deltas wait for `fold_late`."""
        return frozenset(self._late)

    def participation(self, origin: str, round_: int) -> Fraction:
        """The share of the last `hot_rounds` rounds before this one that hold a delta of a member.

        Counted from its first one on; 1 if it has none.
        """
        window = range(max(0, round_ - self.run.averaging.hot_rounds), round_)
        held = [r for r in window if self._held.entry(r, origin) is not None]
        return Fraction(len(held), round_ - held[0]) if held else Fraction(1)

    def newest_rounds(self) -> dict[str, int]:
        """The round of each origin's newest delta."""
        return dict(self._newest)

    def has_later_ledger(self, origin: str, releases: int, ledger_head: bytes) -> bool:
        """Whether a held delta of the origin knows a ledger as long as this one, and not this one.

        A ledger only grows, so the one that says `releases` and `ledger_head` is an older copy.
        """
        longest, heads = self._ledgers.get(origin, (-1, frozenset()))
        return longest > releases or (longest == releases and bool(heads - {ledger_head}))

    def _note_ledger(self, header: Header) -> None:
        longest, heads = self._ledgers.get(header.origin, (-1, frozenset()))
        if header.releases > longest:
            self._ledgers[header.origin] = header.releases, frozenset({header.ledger_head})
        elif header.releases == longest and len(heads) < 2:  # two are a contradiction already
            self._ledgers[header.origin] = longest, heads | {header.ledger_head}

    def num_of(self, origin: str) -> int:
        """How many deltas of one origin are held."""
        return self._held.count(origin)

    @property
    def num_deltas(self) -> int:
        """How many deltas are held."""
        return len(self._held)

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

    def weights(self, roster_hash: bytes) -> dict[str, int]:
        """What each training member weighs by this roster; empty if it is not held."""
        roster = self._book.get(roster_hash)
        if roster is None:
            return _NOBODY
        if roster_hash not in self._weights:
            self._weights[roster_hash] = weights_of(roster, self.run.averaging)
            if len(self._weights) > REMEMBERED_WEIGHTS:
                self._weights.popitem(last=False)
        return self._weights[roster_hash]

    def seated(self, roster_hash: bytes, round_: int) -> frozenset[str]:
        """Who releases in a round by this roster; empty if it is not held."""
        roster = self._book.get(roster_hash)
        return self._committees.of(roster, round_) if roster is not None else frozenset()

    def turn(self, roster_hash: bytes) -> int:
        """Rounds in which nearly every member has a seat once; 0 where all have one always."""
        training, seated = len(self.weights(roster_hash)), len(self.seated(roster_hash, 0))
        return 0 if training <= seated else 2 * -(-training // seated)

    def counted(self, round_: int) -> tuple[Counted, ...]:
        """The deltas of a round that count, ordered by origin; at most as many as a roster lists.

        Members that were exchanged in between could make it more; the first by peer id count then.
        """
        counted = []
        waiting = self._late.get(round_, ())
        for fact, origin, named in sorted(self._held.entries(round_), key=lambda e: e.origin):
            weight = self.weights(named).get(origin, 0)
            if not weight or origin in waiting or origin not in self.seated(named, round_):
                continue
            if not self.is_out(origin, round_):
                counted.append(Counted(fact, origin, weight))
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

    def adopt(self, round_: int, chain: bytes, *, under: int | None = None) -> None:
        """Believe a checkpoint that stands for all rounds before `round_`.

        Args:
            round_: The first round that is not folded into it.
            chain: What it stands for.
            under: Version of the newest roster when it was believed; now, if None.
        """
        self._adopted = (round_, chain)
        current = self._book.current
        self._adopted_under = under if under is not None else current.version if current else 0
        then = (r for r in self._book.newest_first() if r.version <= self._adopted_under)
        self._adopted_without = self._without(next(then, None))
        self._confirmed.clear()
        self._changed(0)

    def _without(self, roster: Roster | None) -> dict[str, int]:
        """Who is out of a round before the adopted one, and from which on."""
        out = {o: p.first.header.round for o, p in self._proofs.items()}
        for revoked in roster.revoked if roster is not None else ():
            from_round = out.get(revoked.peer_id, revoked.from_round)
            out[revoked.peer_id] = min(from_round, revoked.from_round)
        return {o: r for o, r in out.items() if r < self.adopted_round}

    @property
    def adopted_under(self) -> int:
        """Version of the newest roster when the checkpoint was believed."""
        return self._adopted_under

    def confirmed(self, peer: str, round_: int) -> None:
        """A peer that adopted nothing holds the same deltas as we in all rounds before this one.

        Once that reaches the adopted round at two training members (all, if there are fewer), the
        archive is complete.
        """
        roster = self._book.current
        if self._adopted is None or roster is None or peer not in self.weights(roster.hash):
            return
        self._confirmed[peer] = round_
        if self._num_confirmed() >= min(CONFIRMING, len(self.weights(roster.hash)) - 1):
            self.archive_complete()

    def _num_confirmed(self) -> int:
        return sum(round_ >= self.adopted_round for round_ in self._confirmed.values())

    def archive_complete(self) -> None:
        """All deltas before the adopted round are held: from now on the own set decides."""
        if self._adopted is not None:
            self._adopted = None
            self._late.clear()
            self._changed(0)

    @property
    def owed(self) -> range:
        """Rounds whose deltas are needed to make the model without, or with, a member again.

        Empty if nothing is owed: the archive is complete, or who is out of the believed
        checkpoint's rounds is the same as when it was believed.
        """
        if self._adopted is None or self._without(self._book.current) == self._adopted_without:
            return range(0)
        return range(max(self._confirmed.values(), default=0), self._adopted[0])

    def _changed(self, round_: int) -> None:
        del self._chain[max(1, round_ + 1) :]
