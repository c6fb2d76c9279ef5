"""A delta: what one node released in one round, signed, and the proof that a node signed two.

A delta on the wire is `[header bytes, signature, payload bytes]`. The signature covers the header
bytes exactly as received; the header holds the payload's hash, so a header and its signature can be
shown to others without the payload. A delta's name is the hash of its header bytes.

Invariant: one origin signs at most one delta for each (run, round). Two different signed headers of
one (run, round, origin) are a *proof* of equivocation that anyone can check.

What a delta weighs, and whether it counts, is decided in `gossip`, not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from p2pfed.errors import FactRejected, RemoteProtocolError
from p2pfed.identity.keys import public_key_of
from p2pfed.identity.signing import DELTA, fact_hash, verifies
from p2pfed.wire.codec import pack, unpack

__all__ = ["Delta", "Header", "Proof", "SignedHeader"]

VERSION = 1
MAX_ROUND = 1 << 31
MAX_HEADER = 1024


@dataclass(frozen=True, slots=True)
class Header:
    """What an origin says about one release.

    Attributes:
        run_id: Hash of the run file, 32 bytes.
        round: Round that the delta was made for.
        origin: Peer id of the node that made it.
        roster_hash: Roster version under which it was signed; fixes its weight.
        view_hash: Hash of the model that it was computed from.
        mechanism: As the run names it, e.g. `svt`.
        spent_nano_rho: Cumulative budget of the origin's data set after this release, 1e-9 zCDP.
        releases: How many releases the origin's ledger holds; only grows.
        ledger_head: Head of the origin's ledger after this release, 32 bytes.
        payload_hash: Hash of the payload bytes.
        num_released: Number of coordinates in the payload.
    """

    run_id: bytes
    round: int
    origin: str
    roster_hash: bytes
    view_hash: bytes
    mechanism: str
    spent_nano_rho: int
    releases: int
    ledger_head: bytes
    payload_hash: bytes
    num_released: int

    def encode(self) -> bytes:
        """The bytes to be signed; called once, by the origin."""
        return pack(
            VERSION,
            self.run_id,
            self.round,
            self.origin,
            self.roster_hash,
            self.view_hash,
            self.mechanism,
            self.spent_nano_rho,
            self.releases,
            self.ledger_head,
            self.payload_hash,
            self.num_released,
        )

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """Read a header; raises RemoteProtocolError if it is malformed."""
        if len(data) > MAX_HEADER:
            raise RemoteProtocolError("delta header: too long")
        items = unpack(data, "delta header")
        items.integer(VERSION, VERSION)
        header = cls(
            run_id=items.raw(32),
            round=items.integer(0, MAX_ROUND),
            origin=items.text(64),
            roster_hash=items.raw(32),
            view_hash=items.raw(32),
            mechanism=items.text(16),
            spent_nano_rho=items.integer(),
            releases=items.integer(),
            ledger_head=items.raw(32),
            payload_hash=items.raw(32),
            num_released=items.integer(0, 1 << 30),
        )
        items.done()
        return header


@dataclass(frozen=True, slots=True)
class SignedHeader:
    """A header as it was received, with its signature; `fact` is its name, 32 bytes."""

    header: Header
    header_bytes: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    fact: bytes = field(repr=False)

    @classmethod
    def read(cls, header_bytes: bytes, signature: bytes) -> SignedHeader:
        """Decode a header and check the origin's signature over exactly these bytes.

        Raises:
            RemoteProtocolError: Malformed, or not signed by its origin.
        """
        header = Header.decode(header_bytes)
        try:
            key = public_key_of(header.origin)
        except FactRejected as error:
            raise RemoteProtocolError("delta header: the origin is not a peer id") from error
        if not verifies(key, DELTA, header_bytes, signature):
            raise RemoteProtocolError("delta header: the signature does not verify")
        return cls(header, header_bytes, signature, fact_hash(header_bytes))


@dataclass(frozen=True, slots=True)
class Delta:
    """A signed header and its payload bytes."""

    signed: SignedHeader
    payload: bytes = field(repr=False)

    @property
    def header(self) -> Header:
        """What the origin says."""
        return self.signed.header

    @property
    def fact(self) -> bytes:
        """The delta's name, 32 bytes."""
        return self.signed.fact

    @classmethod
    def make(cls, header: Header, payload: bytes, sign: Callable[[bytes], bytes]) -> Delta:
        """Sign a header for `payload`; `sign` is the origin's key."""
        if header.payload_hash != fact_hash(payload):
            raise ValueError("the header names another payload")
        data = header.encode()
        return cls(SignedHeader(header, data, sign(data), fact_hash(data)), payload)

    def encode(self) -> bytes:
        """The delta on the wire and on disk."""
        return pack(self.signed.header_bytes, self.signed.signature, self.payload)

    @classmethod
    def decode(cls, data: bytes) -> Delta:
        """Read a delta and check signature and payload hash.

        Raises:
            RemoteProtocolError: Malformed, forged, or with another payload.
        """
        items = unpack(data, "delta")
        header_bytes, signature = items.raw(longest=MAX_HEADER), items.raw(64)
        payload = items.raw()
        items.done()
        signed = SignedHeader.read(header_bytes, signature)
        if fact_hash(payload) != signed.header.payload_hash:
            raise RemoteProtocolError("delta: the payload is not the one that was signed")
        return cls(signed, payload)


@dataclass(frozen=True, slots=True)
class Proof:
    """Two different headers that one origin signed for one run and round."""

    first: SignedHeader
    second: SignedHeader

    @classmethod
    def of(cls, one: SignedHeader, other: SignedHeader) -> Proof:
        """The proof made of two headers, in an order that does not depend on who saw which first.

        Raises:
            RemoteProtocolError: The two do not contradict each other.
        """
        a, b = one.header, other.header
        if (a.run_id, a.round, a.origin) != (b.run_id, b.round, b.origin) or one.fact == other.fact:
            raise RemoteProtocolError("proof: the two headers do not contradict each other")
        return cls(*sorted((one, other), key=lambda signed: signed.fact))

    def encode(self) -> bytes:
        """The proof on the wire and on disk."""
        return pack(
            *(part for s in (self.first, self.second) for part in (s.header_bytes, s.signature))
        )

    @classmethod
    def decode(cls, data: bytes) -> Proof:
        """Read a proof and check both signatures; raises RemoteProtocolError."""
        items = unpack(data, "proof")
        signed = [SignedHeader.read(items.raw(longest=MAX_HEADER), items.raw(64)) for _ in range(2)]
        items.done()
        return cls.of(*signed)
