"""Anti-entropy: find out in which facts two peers differ, and ask for what is missing only.

A peer shows digests of ranges of rounds (`Digest`); where they differ the other shows the parts,
down to one round, whose names it lists (`Have`); who lacks a name asks for it (`Want`) and gets the
fact (`Facts`). A new delta is announced by name at once. Rosters and proofs ("documents") are
listed by name likewise.

Invariants: a payload travels only as an answer to a `Want`; a fact is asked of one peer at a time
(again after `PATIENCE` seconds); answering costs no more than the question lists.

Source: push-pull anti-entropy (Demers et al. 1987, section 1.3), with range digests in place of
checksums of the whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

from p2pfed.gossip.events import Effect, Send, SendStored
from p2pfed.gossip.facts import RunFacts
from p2pfed.identity.book import RosterBook
from p2pfed.identity.signing import fact_hash
from p2pfed.wire.codec import pack
from p2pfed.wire.messages import (
    DOCUMENTS,
    HASH_BYTES,
    NAME_BYTES,
    Digest,
    Have,
    Message,
    Range,
    Want,
    encode_message,
)

__all__ = ["NO_RUN", "Sync"]

PATIENCE = (
    5.0  # seconds until a fact is asked of somebody else; a 16 MiB frame takes 1.3 s at 100 Mbit/s
)
NO_RUN = bytes(32)  # documents belong to the network, not to a run
MAX_WANTED = 1024


def _split(names: bytes) -> list[bytes]:
    distinct = dict.fromkeys(names[i : i + NAME_BYTES] for i in range(0, len(names), NAME_BYTES))
    return list(distinct)


def _send(peer: str, message: Message) -> Send:
    return Send(peer, encode_message(message))


class Sync:
    """The node's side of anti-entropy.

    Args:
        book: The believed rosters.
        is_set_aside: Whether a delta of this name is held back because it is too far ahead.
    """

    def __init__(self, book: RosterBook, is_set_aside: Callable[[bytes], bool]) -> None:
        self._book = book
        self._is_set_aside = is_set_aside
        self._facts: RunFacts | None = None
        self._asked: dict[bytes, tuple[float, str]] = {}  # name -> (until when, of whom)

    def take_run(self, facts: RunFacts) -> None:
        """From now on the deltas of this run are kept in step as well."""
        self._facts = facts

    # --- documents -----------------------------------------------------------------------------

    def _documents(self) -> dict[bytes, tuple[str, bytes]]:
        """Name -> (kind, bytes) of all rosters and proofs.

        A proof is named by what it proves, so that two peers with two proofs of it are in step.
        """
        found = {h[:NAME_BYTES]: ("roster", self._book.signed(h) or b"") for h in self._book.hashes}
        for proof in self._facts.proofs if self._facts is not None else ():
            header = proof.first.header
            proven = pack(header.run_id, header.origin, header.round)
            found[fact_hash(proven)[:NAME_BYTES]] = ("proof", proof.encode())
        return found

    def documents_digest(self) -> bytes:
        """Digest of the names of all rosters and proofs; equal means in step."""
        names = b"".join(sorted(self._documents()))
        return hashlib.blake2b(names, digest_size=HASH_BYTES).digest()

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

    def announce(self, peers: Iterable[str], round_: int, fact: bytes) -> list[Effect]:
        """Tell peers that we hold a new delta."""
        if self._facts is None:
            return []
        have = Have(self._facts.run.run_id, round_, False, fact[:NAME_BYTES])
        return [_send(peer, have) for peer in peers]

    def on_digest(self, peer: str, digest: Digest) -> list[Effect]:
        """Compare a peer's digests with ours; answer where they differ."""
        facts = self._facts
        if facts is None or digest.run_id != facts.run.run_id:
            return []
        effects: list[Effect] = []
        finer: list[Range] = []
        agreed = 0  # the rounds [0, agreed) are the same on both sides
        for theirs in digest.ranges:
            if facts.tree.digest(theirs.start, theirs.length) == theirs.digest:
                agreed = theirs.start + theirs.length if theirs.start == agreed else agreed
                continue
            if theirs.length == 1:
                effects.append(self._list_round(peer, theirs.start, full=True))
            else:
                finer += facts.tree.parts(theirs.start, theirs.length)
        if digest.end:  # they hold nothing from here on
            beyond = range(digest.end, facts.tree.end)
            effects += [self._list_round(peer, r, full=True) for r in beyond[:64]]
            if agreed >= facts.adopted_round:
                facts.archive_complete()
        for start in range(0, len(finer), 256):
            ranges = tuple(finer[start : start + 256])
            effects.append(_send(peer, Digest(facts.run.run_id, 0, ranges)))
        return effects

    def _list_round(self, peer: str, round_: int, *, full: bool) -> Effect:
        assert self._facts is not None
        names = b"".join(sorted(f[:NAME_BYTES] for f in self._facts.tree.facts(round_)))
        return _send(peer, Have(self._facts.run.run_id, round_, full, names))

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
        room = MAX_WANTED - sum(of == peer for _, of in self._asked.values())
        missing = [n for n in theirs if n not in held and self._may_ask(n, peer, now)]
        wanted = missing[: max(0, room)]
        if wanted:
            self._asked.update(dict.fromkeys(wanted, (now + PATIENCE, peer)))
            effects.append(_send(peer, Want(run_id, b"".join(wanted))))
        extra = sorted(held - set(theirs)) if have.full else []
        if extra:
            effects.append(_send(peer, Have(run_id, have.round, False, b"".join(extra))))
        return effects

    def _may_ask(self, name: bytes, peer: str, now: float) -> bool:
        if self._facts is not None and self._facts.named(name) is not None:
            return False  # held, but out of the set: its origin is proven to equivocate
        until, of = self._asked.get(name, (now, ""))
        if of == peer:
            until += PATIENCE  # it had its turn; somebody else may have it now
        return until <= now and not self._is_set_aside(name)

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

    def arrived(self, name: bytes) -> None:
        """A fact is here; nobody needs to be asked for it."""
        self._asked.pop(name, None)

    def forget_stale(self, now: float) -> None:
        """Drop questions that were never answered, so that the table stays bounded."""
        self._asked = {n: asked for n, asked in self._asked.items() if asked[0] + PATIENCE > now}
