"""The second implementation, 4: what is believed, which deltas count, the chain, digests.

Sections 1, 3, 4 and 6 of `docs/protocol.md`; nothing of p2pfed is imported.

Invariant: chain and model are functions of what is held, in whatever order it came.

Not here: reading and checking (`second_formats.py`), asking others (`second_peer.py`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from contextlib import suppress

from msgpack import packb as pack
from second_fold import State
from second_formats import (
    ROSTER,
    Delta,
    Document,
    Run,
    h,
    hash_of,
    read_delta,
    read_document,
    read_proof,
    require,
)
from second_transport import Wrong


class Rosters:
    """The rosters that are believed, by name."""

    def __init__(self, first: bytes) -> None:
        roster = read_document(first, ROSTER)
        require(roster.signed_by(roster), "the first roster is not signed by its own stewards")
        self.held = {roster.name: roster}
        self.signed = {roster.name: first}

    @property
    def newest(self) -> Document:
        return max(self.held.values(), key=lambda roster: roster.says["version"])

    @property
    def network_id(self) -> bytes:
        roster = self.newest
        return roster.name if roster.says["version"] == 1 else hash_of(roster, "network_id")

    def believe(self, data: bytes) -> Document:
        """Take one more roster in.

        Raises:
            Wrong: It is not to be believed.
        """
        roster, newest = read_document(data, ROSTER), self.newest
        if roster.name in self.held:
            return roster
        first = roster.says["version"] == 1
        network = roster.name if first else hash_of(roster, "network_id")
        require(network == self.network_id, "a roster of another network")
        require(roster.signed_by(roster), "too few stewards of its own signed a roster")
        if roster.says["version"] > newest.says["version"]:
            require(roster.signed_by(newest), "too few stewards of the newest roster signed it")
            if roster.says["version"] == newest.says["version"] + 1:
                require(hash_of(roster, "previous") == newest.name, "it follows another roster")
        else:
            known = {hash_of(each, "previous") for each in self.held.values()}
            require(roster.name in known, "no believed roster names it")
        self.held[roster.name], self.signed[roster.name] = roster, data
        return roster

    def believe_all(self, signed: Iterable[bytes]) -> None:
        """Take in those that can be believed, in whatever order they come; drop the others."""
        waiting, before = list(signed), -1
        while before != len(self.held):  # one may vouch for another that came before it
            before = len(self.held)
            for data in waiting:
                with suppress(Wrong, ValueError):
                    self.believe(data)


class Facts:
    """The rosters, deltas and proofs that a peer holds of one run.

    Attributes:
        deltas: By round and origin.
        proofs: The earliest round that is proven and its proof, by origin.
        genesis: The first model, once it is there.
    """

    def __init__(self, rosters: Rosters, run: Run) -> None:
        self.rosters, self.run = rosters, run
        self.deltas: dict[tuple[int, str], Delta] = {}
        self.proofs: dict[str, tuple[int, bytes]] = {}
        self.genesis: list[float] = []

    # --- taking in ---

    def take_delta(self, wire: bytes) -> Delta:
        """Hold a delta, once it is checked and if some roster lists its origin.

        A second one of the same round and origin makes a proof, and is not held.
        """
        delta = read_delta(wire, self.run)
        if not self._is_listed(delta.origin):
            return delta
        held = self.deltas.setdefault((delta.round, delta.origin), delta)
        if held.name != delta.name:
            both = sorted((held.header, delta.header), key=lambda header: header.name)
            parts = [part for each in both for part in (each.data, each.signature)]
            self.take_proof(pack(parts))
        return delta

    def take_proof(self, wire: bytes) -> None:
        """Hold a proof, if it says more than what is held."""
        run, round_, origin = read_proof(wire)
        if run != self.run.run_id or not self._is_listed(origin):
            return
        if origin not in self.proofs or round_ < self.proofs[origin][0]:
            self.proofs[origin] = round_, wire

    def _is_listed(self, peer: str) -> bool:
        return any(roster.member(peer) for roster in self.rosters.held.values())

    # --- which deltas count ---

    def is_proven(self, origin: str, round_: int) -> bool:
        """Whether a proof takes an origin out of a round."""
        return origin in self.proofs and self.proofs[origin][0] <= round_

    def of_round(self, round_: int) -> list[Delta]:
        """What is held of a round, without those that a proof takes out, by origin."""
        found = [d for (at, peer), d in self.deltas.items() if at == round_]
        standing = [d for d in found if not self.is_proven(d.origin, round_)]
        return sorted(standing, key=lambda delta: delta.origin)

    def counting(self, round_: int) -> list[tuple[Delta, int]]:
        """The deltas of a round that count and their weights, by origin."""
        found = []
        for delta in self.of_round(round_):
            roster = self.rosters.held.get(delta.roster)
            if roster is None or delta.origin not in drawn(self.run, roster, round_):
                continue
            if not self.rosters.newest.revoked(delta.origin, round_):
                found.append((delta, self.run.weight(roster, delta.origin)))
        return found[:1024]

    def chain(self, round_: int) -> bytes:
        """The chain before a round."""
        chain = self.run.run_id
        for at in range(round_):
            told = [d.name + struct.pack("<I", weight) for d, weight in self.counting(at)]
            chain = h(chain + b"".join(told), b"p2pfed-chain")
        return chain

    def model(self, round_: int) -> State:
        """The state before a round."""
        run = self.run
        state = State(self.genesis, run.says["grid_bits"], run.says["robust"], run.outer)
        for at in range(round_):
            counted = self.counting(at)
            state.fold([delta.values for delta, _ in counted], [w for _, w in counted])
        return state

    # --- digests ---

    def digest(self, start: int, length: int) -> bytes:
        """The digest of a round, or of an aligned range of rounds."""
        if length == 1:
            parts = sorted(delta.name for delta in self.of_round(start))
        else:
            half = length // 2
            parts = [self.digest(start, half), self.digest(start + half, half)]
        return h(b"".join(parts), size=16) if any(map(any, parts)) else bytes(16)

    def cover(self) -> tuple[int, list[list[int | bytes]]]:
        """The end of what is held, and the fewest aligned ranges up to there."""
        ranges, start = [], 0
        end = max((at + 1 for at, _ in self.deltas if self.of_round(at)), default=0)
        while start < end:
            length = 1
            while start % (2 * length) == 0 and start + 2 * length <= end:
                length *= 2
            ranges.append([start, length, self.digest(start, length)])
            start += length
        return max(1, end), ranges

    def documents(self) -> dict[bytes, bytes]:
        """Rosters and proofs by the name under which they are listed, of 16 bytes."""
        rosters = {name[:16]: signed for name, signed in self.rosters.signed.items()}
        return rosters | {self._name(origin): wire for origin, (_, wire) in self.proofs.items()}

    def documents_digest(self) -> bytes:
        """Two halves: of the rosters, of the proofs of the run."""
        rosters = sorted(name[:16] for name in self.rosters.held)
        proofs = sorted(map(self._name, self.proofs))
        return h(b"".join(rosters), size=8) + h(b"".join(proofs), size=8)

    def _name(self, origin: str) -> bytes:
        """A proof is named by what it proves."""
        return h(pack([self.run.run_id, origin, self.proofs[origin][0]]))[:16]


def seats(roster: Document) -> list[str]:
    """Peer ids by seat."""
    return sorted(each["peer_id"] for each in roster.says["members"])


def lot(run_id: bytes, round_: int, peer: str) -> bytes:
    """What decides whether a member is drawn for a round: the lowest ones are."""
    return h(run_id + struct.pack("<Q", round_) + peer.encode(), b"p2pfed-seat", 16)


def drawn(run: Run, roster: Document, round_: int) -> Iterable[str]:
    """Whose deltas of a round count, by a roster."""
    peers = [each["peer_id"] for each in roster.trains()]
    lots = sorted(peers, key=lambda peer: lot(run.run_id, round_, peer))
    return lots[: run.averaging["committee"] or 64]
