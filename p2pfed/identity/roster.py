"""The roster: who may join, signed by k of n stewards.

Invariants. The version only grows. The steward set changes only with k signatures of the *old* set
(and k of the new one, so that a mistyped key cannot lock the network). Each roster names the hash
of the one before it, and the first roster's hash *is* the network id: a held roster vouches for
all its ancestors by hash, and for its successor by its stewards' signatures.

Only the role `train` has weight. A revocation names the round from which the member's deltas stop
counting; 0 forgets its whole contribution. Which roster a node believes is decided in `book`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from p2pfed.errors import FactRejected
from p2pfed.identity.fields import Fields, encode_payload, read_payload
from p2pfed.identity.keys import public_key_of
from p2pfed.identity.signing import ROSTER, SignedDocument, fact_hash

__all__ = ["ROLES", "Member", "Revocation", "Roster", "Steward"]

KIND = "p2pfed.roster/1"
ROLES = ("train", "relay", "bootstrap")
MAX_SAMPLES = 1 << 20  # keeps int64 sums of the fold exact, see gossip/fold.py
MAX_MEMBERS = 1024
MAX_STEWARDS = 32
ZERO = bytes(32)


@dataclass(frozen=True, slots=True)
class Steward:
    """One holder of a signing key of the consortium."""

    name: str
    key: bytes


@dataclass(frozen=True, slots=True)
class Member:
    """One node of the consortium.

    Attributes:
        name: What people call the hospital.
        peer_id: Its libp2p peer id.
        roles: Out of `ROLES`.
        samples: Public number of patients that it trains on; its weight in the fold.
    """

    name: str
    peer_id: str
    roles: tuple[str, ...]
    samples: int

    @property
    def trains(self) -> bool:
        """Whether its deltas have weight."""
        return "train" in self.roles and self.samples > 0


@dataclass(frozen=True, slots=True)
class Revocation:
    """One node that is out: its deltas of rounds >= `from_round` do not count."""

    peer_id: str
    reason: str
    from_round: int


@dataclass(frozen=True, slots=True)
class Roster:
    """One version of the roster; see the module docstring.

    Attributes:
        network: Name of the network, for people.
        version: 1 for the first, then growing.
        previous: Hash of the roster before this one; zeros for the first.
        network_id: Hash of the first roster; zeros in the first itself (it cannot hold its own).
        expires: After this moment a node receives but releases nothing.
        threshold: k: how many stewards must sign.
        stewards: The n stewards.
        members: The nodes that may join.
        revoked: The nodes that are out.
        hash: BLAKE2b-256 of the payload; not part of it.
        by_id: The members by peer id; not part of it.
    """

    network: str
    version: int
    previous: bytes
    network_id: bytes
    expires: dt.datetime
    threshold: int
    stewards: tuple[Steward, ...]
    members: tuple[Member, ...]
    revoked: tuple[Revocation, ...]
    hash: bytes = field(default=b"", compare=False)
    by_id: Mapping[str, Member] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_id", {m.peer_id: m for m in self.members})

    # --- reading and writing -------------------------------------------------------------------

    @classmethod
    def decode(cls, payload: bytes) -> Roster:
        """Read a roster from its signed payload.

        Raises:
            FactRejected: The payload is not a well-formed roster.
        """
        fields = read_payload(payload, KIND)
        roster = cls(
            network=fields.text("network", longest=64),
            version=fields.integer("version", low=1, high=1 << 31),
            previous=fields.hex32("previous"),
            network_id=fields.hex32("network_id"),
            expires=_read_time(fields.text("expires")),
            threshold=fields.integer("threshold", low=1, high=MAX_STEWARDS),
            stewards=fields.many("stewards", _read_steward, most=MAX_STEWARDS),
            members=fields.many("members", _read_member, most=MAX_MEMBERS),
            revoked=fields.many("revoked", _read_revocation, most=4 * MAX_MEMBERS),
            hash=fact_hash(payload),
        )
        fields.done()
        roster._check()
        if roster.version == 1:
            if roster.network_id != ZERO:
                raise FactRejected("the first roster names a network", "its own hash is the id")
            return replace(roster, network_id=roster.hash)
        return roster

    def encode(self) -> bytes:
        """The payload to be signed; called once by whoever makes a roster."""
        self._check()
        return encode_payload(
            {
                "type": KIND,
                "network": self.network,
                "network_id": (ZERO if self.version == 1 else self.network_id).hex(),
                "version": self.version,
                "previous": self.previous.hex(),
                "expires": self.expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
                "threshold": self.threshold,
                "stewards": [{"name": s.name, "key": s.key.hex()} for s in self.stewards],
                "members": [
                    {
                        "name": m.name,
                        "peer_id": m.peer_id,
                        "roles": list(m.roles),
                        "samples": m.samples,
                    }
                    for m in self.members
                ],
                "revoked": [
                    {"peer_id": r.peer_id, "reason": r.reason, "from_round": r.from_round}
                    for r in self.revoked
                ],
            }
        )

    def _check(self) -> None:
        names = [m.name for m in self.members]
        peers = [m.peer_id for m in self.members]
        keys = [s.key for s in self.stewards]
        stewards = [s.name for s in self.stewards]
        for what, values in (
            ("member name", names),
            ("peer id", peers),
            ("steward key", keys),
            ("steward name", stewards),
        ):
            if len(set(values)) != len(values):
                raise FactRejected(f"a {what} stands twice in the roster")
        if self.threshold > len(self.stewards):
            raise FactRejected(
                f"the threshold is {self.threshold} of {len(self.stewards)} stewards",
                "no number of signatures could ever reach it",
            )
        both = {r.peer_id for r in self.revoked} & set(peers)
        if both:
            raise FactRejected(f"{min(both)} is both a member and revoked")
        if (self.version == 1) != (self.previous == ZERO):
            raise FactRejected("only the first roster has no previous one")

    # --- making the next version ---------------------------------------------------------------

    @classmethod
    def found(
        cls, network: str, *, stewards: Sequence[Steward], threshold: int, expires: dt.datetime
    ) -> Roster:
        """The first roster of a new network, without members."""
        return cls(network, 1, ZERO, ZERO, expires, threshold, tuple(stewards), (), ())

    def next(
        self,
        *,
        members: Iterable[Member] | None = None,
        revoked: Iterable[Revocation] | None = None,
        stewards: Iterable[Steward] | None = None,
        threshold: int | None = None,
        expires: dt.datetime | None = None,
    ) -> Roster:
        """The draft of the version after this one, with the named parts replaced."""
        if not self.hash:
            raise ValueError("only a decoded roster has a successor")
        return Roster(
            network=self.network,
            version=self.version + 1,
            previous=self.hash,
            network_id=self.network_id,
            expires=self.expires if expires is None else expires,
            threshold=self.threshold if threshold is None else threshold,
            stewards=self.stewards if stewards is None else tuple(stewards),
            members=self.members if members is None else tuple(members),
            revoked=self.revoked if revoked is None else tuple(revoked),
        )

    def revoke(self, peer_id: str, *, reason: str, from_round: int) -> Roster:
        """The draft in which one member is out."""
        if self.member(peer_id) is None:
            raise FactRejected(f"{peer_id} is not a member of roster v{self.version}")
        return self.next(
            members=[m for m in self.members if m.peer_id != peer_id],
            revoked=[*self.revoked, Revocation(peer_id, reason, from_round)],
        )

    # --- asking --------------------------------------------------------------------------------

    def member(self, peer_id: str) -> Member | None:
        """The member with this peer id, if it is one."""
        return self.by_id.get(peer_id)

    def is_expired(self, now: dt.datetime) -> bool:
        """Whether a node must stop releasing under this roster."""
        return now >= self.expires

    def enough_signatures(self, document: SignedDocument) -> bool:
        """Whether k of this roster's stewards signed the document as a roster."""
        known = {s.key for s in self.stewards}
        return len(document.signers(ROSTER, among=known)) >= self.threshold


def _read_time(text: str) -> dt.datetime:
    try:
        return dt.datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=dt.UTC)
    except ValueError as error:
        raise FactRejected(
            f"expires is {text!r:.40}", "expected e.g. 2027-01-31T00:00:00Z"
        ) from error


def _read_steward(fields: Fields) -> Steward:
    steward = Steward(fields.text("name", longest=64), fields.hex32("key"))
    fields.done()
    return steward


def _read_member(fields: Fields) -> Member:
    member = Member(
        name=fields.text("name", longest=64),
        peer_id=fields.text("peer_id", longest=64),
        roles=fields.texts("roles", allowed=ROLES),
        samples=fields.integer("samples", low=0, high=MAX_SAMPLES),
    )
    fields.done()
    public_key_of(member.peer_id)
    return member


def _read_revocation(fields: Fields) -> Revocation:
    revocation = Revocation(
        fields.text("peer_id", longest=64),
        fields.text("reason", longest=200),
        fields.integer("from_round", low=0, high=1 << 31),
    )
    fields.done()
    return revocation
