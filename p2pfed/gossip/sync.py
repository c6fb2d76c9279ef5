"""Anti-entropy: find out in which facts two peers differ, and ask for what is missing only.

A peer shows digests of ranges of rounds (`Digest`); where they differ the other shows the parts,
down to one round, whose seats it shows (`spread`). Rosters and proofs ("documents") are listed by
name (`Have`); who lacks a name asks for it (`Want`) and gets the fact (`Facts`). So are the deltas
of a round that seats cannot tell apart.

Invariants: a payload travels only as an answer to a question; a fact is asked of one peer at a time
(`asked`); answering costs no more than the question lists.

Source: push-pull anti-entropy (Demers et al. 1987, section 1.3), with range digests in place of
checksums of the whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from p2pfed.gossip.asked import MAX_WANTED, PATIENCE, Asked, Key
from p2pfed.gossip.digests import EMPTY
from p2pfed.gossip.events import Effect, Send, SendStored
from p2pfed.gossip.facts import RunFacts
from p2pfed.gossip.seating import Seating
from p2pfed.gossip.spread import Spread
from p2pfed.identity.book import RosterBook
from p2pfed.identity.signing import fact_hash
from p2pfed.wire.beat import HASH_BYTES
from p2pfed.wire.codec import pack
from p2pfed.wire.delta import SignedHeader
from p2pfed.wire.messages import (
    DOCUMENTS,
    NAME_BYTES,
    Beat,
    Digest,
    Have,
    Message,
    Range,
    Want,
    encode_message,
)
from p2pfed.wire.payload import max_payload_bytes

__all__ = ["NO_RUN", "Sync"]

NO_RUN = bytes(32)  # documents belong to the network, not to a run
LISTED_BEYOND = 64  # rounds after the other side's last one that are shown at once


def _split(names: bytes) -> list[bytes]:
    distinct = dict.fromkeys(names[i : i + NAME_BYTES] for i in range(0, len(names), NAME_BYTES))
    return list(distinct)


def _half(documents: dict[bytes, tuple[str, bytes]], kind: str) -> bytes:
    names = b"".join(sorted(name for name, (of, _) in documents.items() if of == kind))
    return hashlib.blake2b(names, digest_size=HASH_BYTES // 2).digest()


def _send(peer: str, message: Message) -> Send:
    return Send(peer, encode_message(message))


class Sync:
    """The node's side of anti-entropy.

    Args:
        book: The believed rosters.
        is_set_aside: Whether a delta of this name, or of this (round, origin), is held back because
            it is too far ahead.
        patience: Seconds until a small fact is asked of somebody else.
    """

    def __init__(
        self,
        book: RosterBook,
        is_set_aside: Callable[[Key], bool],
        *,
        patience: float = PATIENCE,
    ) -> None:
        self._book = book
        self._is_set_aside = is_set_aside
        self._facts: RunFacts | None = None
        self._documents_at: object = None
        self._documents_held: dict[bytes, tuple[str, bytes]] = {}
        self._documents_digest = b""
        self.asked = Asked(patience)
        self.seating = Seating(book)
        self.spread = Spread(
            self.seating, self.asked, lambda round_, origin: is_set_aside((round_, origin))
        )

    def take_run(self, facts: RunFacts) -> None:
        """From now on the deltas of this run are kept in step as well."""
        self._facts = facts
        run = facts.run
        self.asked.most_bytes = max_payload_bytes(
            run.num_parameters, run.max_released, run.encoding.values
        )
        self.spread.take_run(facts)

    # --- documents -----------------------------------------------------------------------------

    def _documents(self) -> dict[bytes, tuple[str, bytes]]:
        """Name -> (kind, bytes) of all rosters and proofs; kept until there is one more.

        A proof is named by what it proves, so that two peers with two proofs of it are in step.
        """
        proofs = self._facts.proofs if self._facts is not None else ()
        at = (self._book.hashes, proofs)
        if at == self._documents_at:
            return self._documents_held
        found = {h[:NAME_BYTES]: ("roster", self._book.signed(h) or b"") for h in self._book.hashes}
        for proof in proofs:
            header = proof.first.header
            proven = pack(header.run_id, header.origin, header.round)
            found[fact_hash(proven)[:NAME_BYTES]] = ("proof", proof.encode())
        self._documents_digest = b"".join(_half(found, kind) for kind in ("roster", "proof"))
        self._documents_at, self._documents_held = at, found
        return found

    def documents_digest(self) -> bytes:
        """Digest of the names of all rosters (first half) and of the run's proofs (second half)."""
        self._documents()
        return self._documents_digest

    def documents_agree(self, beat: Beat) -> bool:
        """Whether a peer holds the same documents; in another run, the same rosters."""
        mine = self.documents_digest()
        same_run = beat.run_id == (self._facts.run.run_id if self._facts is not None else b"")
        compared = HASH_BYTES if same_run else HASH_BYTES // 2
        return beat.documents[:compared] == mine[:compared]

    def list_documents(self, peer: str) -> Effect:
        """Tell a peer the names of all our documents."""
        return _send(peer, Have(NO_RUN, DOCUMENTS, True, b"".join(sorted(self._documents()))))

    # --- deltas --------------------------------------------------------------------------------

    def opening(self, peer: str) -> list[Effect]:
        """Show a peer what we hold of the run."""
        if self._facts is None:
            return []
        tree = self._facts.tree
        # A joiner without the whole archive must not be taken for one that holds all there is.
        end = 0 if self._facts.adopted_round else max(1, tree.end)
        return [_send(peer, Digest(self._facts.run.run_id, end, tree.cover()))]

    def on_digest(self, peer: str, digest: Digest) -> list[Effect]:
        """Compare a peer's digests with ours; answer where they differ."""
        facts = self._facts
        if facts is None or digest.run_id != facts.run.run_id:
            return []
        effects: list[Effect] = []
        finer: list[Range] = []
        rounds: list[int] = []
        agreed = 0  # the rounds [0, agreed) are the same on both sides
        for theirs in digest.ranges:
            if facts.tree.digest(theirs.start, theirs.length) == theirs.digest:
                agreed = theirs.start + theirs.length if theirs.start == agreed else agreed
                continue
            if theirs.length == 1:
                rounds.append(theirs.start)
            else:
                finer += facts.tree.parts(theirs.start, theirs.length)
        if digest.end:  # they hold nothing from here on
            beyond = range(digest.end, facts.tree.end)[:LISTED_BEYOND]
            rounds += [r for r in beyond if facts.tree.digest(r, 1) != EMPTY]
            facts.confirmed(peer, agreed)
        for start in range(0, len(finer), 256):
            ranges = tuple(finer[start : start + 256])
            effects.append(_send(peer, Digest(facts.run.run_id, 0, ranges)))
        return effects + self.spread.show(peer, sorted(set(rounds)))

    # --- names and facts -----------------------------------------------------------------------

    def on_have(self, peer: str, have: Have, now: float) -> list[Effect]:
        """Ask for the names that we lack; list those that the other side lacks."""
        if have.round == DOCUMENTS:
            held = set(self._documents())
            run_id = NO_RUN
        elif self._facts is not None and have.run_id == self._facts.run.run_id:
            held = {f[:NAME_BYTES] for f in self._facts.tree.facts(have.round)}
            run_id = have.run_id
        else:
            return []
        theirs = _split(have.names)
        effects: list[Effect] = []
        missing = [n for n in theirs if n not in held and self._may_ask(n, peer, now)]
        wanted = missing[: self.asked.room(peer)]
        if wanted:
            self.asked.ask(wanted, peer, now)
            effects.append(_send(peer, Want(run_id, b"".join(wanted))))
        extra = sorted(held - set(theirs)) if have.full else []
        if extra:
            effects.append(_send(peer, Have(run_id, have.round, False, b"".join(extra))))
        return effects

    def _may_ask(self, name: bytes, peer: str, now: float) -> bool:
        if self._facts is not None and self._facts.named(name) is not None:
            return False  # held, but out of the set: its origin is proven to equivocate
        return self.asked.may_ask(name, peer, now) and not self._is_set_aside(name)

    def on_want(self, peer: str, want: Want) -> list[Effect]:
        """Answer with the facts that we hold."""
        documents = self._documents()
        deltas, rosters, proofs = [], [], []
        for name in _split(want.names)[:MAX_WANTED]:
            signed = self._facts.named(name) if self._facts is not None else None
            kind, data = documents.get(name, ("", b""))
            if signed is not None:
                deltas.append(signed.fact)
            elif kind == "roster":
                rosters.append(data)
            elif kind == "proof":
                proofs.append(data)
        if not (deltas or rosters or proofs):
            return []
        return [SendStored(peer, tuple(deltas), tuple(rosters), tuple(proofs))]

    def arrived(self, delta: SignedHeader) -> None:
        """A delta is here; nobody needs to be asked for it."""
        self.asked.arrived(delta.fact[:NAME_BYTES])
        self.asked.arrived((delta.header.round, delta.header.origin))
