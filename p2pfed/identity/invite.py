"""Invites and requests: one line of text each, carried by mail between a steward and a hospital.

An *invite* says which network, for whom, until when, and holds a secret of its own; the steward
signs it. A *request* is the answer of the hospital's new node: its public key, bound to exactly
that invite by a keyed hash (the secret is the key) and by a signature (it holds the private key).

Invariants. Nothing in here is private but the secret, and no list of secrets exists: a secret is a
keyed hash of the invite's number under the steward's key, so only that steward can check a request.
A line that was mistyped is told as a typo before anything is said about signatures. Two numbers
are read over the phone, because whoever can change mail could answer both sides: the invite's
fingerprint (which network, which steward) and the request's (which node, answering which invite).

The bytes are in docs/joining.md. Not here: which invites are used or revoked
(`cli.invite_record`), what is admitted (`roster`), clocks (the caller says the time).
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from p2pfed.errors import ConfigError, FactRejected, PolicyError
from p2pfed.identity.armour import VERSION, Reader, armoured, opened, phone_digits, short_text
from p2pfed.identity.keys import StewardKey, peer_id_of
from p2pfed.identity.roster import MAX_SAMPLES, ROLES
from p2pfed.identity.signing import sign, verifies

__all__ = ["NUMBER_BYTES", "Invite", "Request", "moment_text"]

# BLAKE2b personalisations, at most 16 bytes each.
INVITE = b"p2pfed-invite"
REQUEST = b"p2pfed-request"
_SECRET = b"p2pfed-invsecret"
_PROOF = b"p2pfed-invproof"

NUMBER_BYTES = 8
SECRET_BYTES = 20
MOST_ADDRESSES = 4


@dataclass(frozen=True, slots=True)
class Invite:
    """One invite; see the module docstring.

    Attributes:
        network_id: Hash of the network's first roster, 32 bytes.
        expires: When it ends, in whole seconds UTC.
        number: Its name among the steward's invites, 8 bytes.
        secret: What the hospital proves to have received, 20 bytes.
        steward: Public key of the steward who made it, 32 bytes.
        network: The network's name, for people.
        name: Whom it is for: the member's name in the roster.
        signature: The steward's, 64 bytes.
    """

    network_id: bytes
    expires: dt.datetime
    number: bytes
    secret: bytes = field(repr=False)
    steward: bytes
    network: str
    name: str
    signature: bytes = b""

    @classmethod
    def make(
        cls,
        key: StewardKey,
        *,
        network_id: bytes,
        network: str,
        name: str,
        number: bytes,
        expires: dt.datetime,
    ) -> Invite:
        """The invite with this number; the same arguments give the same bytes.

        Args:
            key: The steward's.
            network_id: Hash of the network's first roster, 32 bytes.
            network: The network's name.
            name: Whom it is for; 1 to 64 printable characters.
            number: 8 random bytes, never used before with this key.
            expires: When it ends.

        Raises:
            ConfigError: A name that no roster could hold.
        """
        secret = hashlib.blake2b(number, digest_size=SECRET_BYTES, key=key.seed, person=_SECRET)
        draft = cls(
            network_id,
            expires.astimezone(dt.UTC).replace(microsecond=0),
            number,
            secret.digest(),
            key.public_key,
            network,
            name,
        )
        return replace(draft, signature=sign(key.seed, INVITE, draft._signed()))

    def _signed(self) -> bytes:
        return b"".join(
            [
                VERSION,
                self.network_id,
                int(self.expires.timestamp()).to_bytes(8, "big"),
                self.number,
                self.secret,
                self.steward,
                short_text(self.network, "the network's name"),
                short_text(self.name, "the name"),
            ]
        )

    def encode(self) -> str:
        """The line `p2pfed1-…`."""
        return armoured("p2pfed1-", self._signed() + self.signature)

    @classmethod
    def parse(cls, text: str) -> Invite:
        """Read an invite; blanks, line breaks and capitals do not matter.

        Raises:
            ConfigError: It is no invite, or was mistyped or cut.
            FactRejected: It is not signed by the steward that it names.
        """
        read = Reader(opened("p2pfed1-", text, "invite"), "invite")
        read.version()
        invite = cls(
            network_id=read.take(32),
            expires=_moment(int.from_bytes(read.take(8), "big")),
            number=read.take(NUMBER_BYTES),
            secret=read.take(SECRET_BYTES),
            steward=read.take(32),
            network=read.text(),
            name=read.text(),
            signature=read.take(64),
        )
        read.done()
        if not verifies(invite.steward, INVITE, invite._signed(), invite.signature):
            raise FactRejected(
                "the invite is not signed by the steward that it names",
                "somebody changed it on its way",
                "call the steward, on a number that you know, and ask for a new one",
            )
        return invite

    @property
    def digest(self) -> bytes:
        """What a request names it by, 32 bytes; tells nothing of the secret."""
        return hashlib.blake2b(self._signed(), digest_size=32, person=INVITE).digest()

    @property
    def fingerprint(self) -> str:
        """Six groups of four digits that stand for the network and the steward.

        It is the same for all invites of one steward into one network.
        """
        return phone_digits(self.network_id + self.steward)

    def check_date(self, now: dt.datetime) -> None:
        """Raise PolicyError if it has ended, and say what this machine's clock shows."""
        if now >= self.expires:
            raise PolicyError(
                f"the invite for {self.name} ended at {moment_text(self.expires)}",
                f"this machine's clock shows {moment_text(now)}",
                "ask the steward for a new one; or set the clock, if that is what is wrong",
            )


@dataclass(frozen=True, slots=True)
class Request:
    """A node's answer to an invite; see the module docstring.

    Attributes:
        number: That of the invite, 8 bytes.
        public_key: The node's, 32 bytes.
        samples: Patients that it trains on, public.
        roles: Out of `ROLES`.
        name: What it is to be called.
        addresses: Multiaddrs without `/p2p/ID` where others can dial it; may be empty.
        proof: Keyed hash under the invite's secret, 32 bytes.
        signature: The node's, 64 bytes.
    """

    number: bytes
    public_key: bytes
    samples: int
    roles: tuple[str, ...]
    name: str
    addresses: tuple[str, ...] = ()
    proof: bytes = b""
    signature: bytes = b""

    @classmethod
    def make(
        cls,
        invite: Invite,
        seed: bytes,
        public_key: bytes,
        *,
        samples: int,
        roles: Sequence[str],
        addresses: Sequence[str] = (),
    ) -> Request:
        """Answer an invite.

        Args:
            invite: The invite, as `Invite.parse` read it.
            seed: The node's Ed25519 seed, 32 bytes.
            public_key: Its public half, 32 bytes.
            samples: Patients that it trains on.
            roles: Out of `ROLES`.
            addresses: Where others can dial it.

        Raises:
            ConfigError: A number or an address that does not fit.
        """
        if not 0 <= samples <= MAX_SAMPLES:
            raise ConfigError(f"{samples} patients", f"a roster takes 0 to {MAX_SAMPLES}")
        if len(addresses) > MOST_ADDRESSES:
            raise ConfigError(
                f"{len(addresses)} addresses", f"a request carries at most {MOST_ADDRESSES}"
            )
        ordered = tuple(role for role in ROLES if role in roles)
        draft = cls(invite.number, public_key, samples, ordered, invite.name, tuple(addresses))
        proof = draft._proof(invite)
        signature = sign(seed, REQUEST, draft._told(invite, proof))
        return replace(draft, proof=proof, signature=signature)

    def _body(self) -> bytes:
        roles = sum(1 << i for i, role in enumerate(ROLES) if role in self.roles)
        return b"".join(
            [
                VERSION,
                self.number,
                self.public_key,
                self.samples.to_bytes(4, "big"),
                bytes([roles]),
                short_text(self.name, "the name"),
                bytes([len(self.addresses)]),
                *(short_text(address, "the address", 200) for address in self.addresses),
            ]
        )

    def _proof(self, invite: Invite) -> bytes:
        said = invite.digest + self._body()
        return hashlib.blake2b(said, digest_size=32, key=invite.secret, person=_PROOF).digest()

    def _told(self, invite: Invite, proof: bytes) -> bytes:
        return invite.digest + self._body() + proof

    def encode(self) -> str:
        """The line `p2pfedreq1-…`."""
        return armoured("p2pfedreq1-", self._body() + self.proof + self.signature)

    @classmethod
    def parse(cls, text: str) -> Request:
        """Read a request; whether it is true is what `check` says.

        Raises:
            ConfigError: It is no request, or was mistyped or cut.
        """
        read = Reader(opened("p2pfedreq1-", text, "request"), "request")
        read.version()
        number, public_key = read.take(NUMBER_BYTES), read.take(32)
        samples, bits = int.from_bytes(read.take(4), "big"), read.take(1)[0]
        name = read.text()
        count = read.take(1)[0]
        if samples > MAX_SAMPLES or bits >= 1 << len(ROLES) or count > MOST_ADDRESSES:
            raise read.malformed()
        request = cls(
            number,
            public_key,
            samples,
            tuple(role for i, role in enumerate(ROLES) if bits >> i & 1),
            name,
            tuple(read.text(200) for _ in range(count)),
            read.take(32),
            read.take(64),
        )
        read.done()
        return request

    @property
    def peer_id(self) -> str:
        """The libp2p peer id of the node."""
        return peer_id_of(self.public_key)

    @property
    def fingerprint(self) -> str:
        """Six groups of four digits that stand for this very request."""
        return phone_digits(self._body() + self.proof + self.signature)

    def check(self, invite: Invite) -> None:
        """Whether this is the answer to `invite`, unchanged, by the holder of its key.

        Raises:
            FactRejected: It is not.
        """
        if not hmac.compare_digest(self._proof(invite), self.proof):
            raise FactRejected(
                f"the request does not answer the invite for {invite.name}",
                "who wrote it did not know the invite's secret, or it was changed on its way",
                "call the hospital, on a number that you know, and have it sent again",
            )
        if not verifies(self.public_key, REQUEST, self._told(invite, self.proof), self.signature):
            raise FactRejected(
                "the request is not signed by the node that it names",
                "whoever wrote it may not hold that node's key",
                "call the hospital, on a number that you know, and have it sent again",
            )
        if self.name != invite.name:
            raise FactRejected(
                f"the request is of {self.name}, the invite is for {invite.name}",
                "the name in the roster is the one that the steward invited",
                "make an invite for the right name, if that is meant",
            )


def moment_text(moment: dt.datetime) -> str:
    """A moment for people: `2027-01-31 08:00 UTC`."""
    return moment.astimezone(dt.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _moment(seconds: int) -> dt.datetime:
    try:
        return dt.datetime.fromtimestamp(seconds, dt.UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise ConfigError("the invite ends at no possible time", "", "ask for a new one") from error
