"""Ed25519 signatures over BLAKE2b of exact bytes, and the text envelope that carries them.

Invariant: what is verified is the byte string that was received; no document is ever re-encoded to
check a signature. Each format has its own BLAKE2b personalisation, so that a signature made for one
format can never be shown as one of another (domain separation, RFC 7693 section 2.5).

A signed document is a text file that a person can read: the JSON payload, a marker line, then one
line `PUBLICKEY SIGNATURE` (hex) for each signer. What the payload means is in `roster` and `run`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container
from dataclasses import dataclass

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from p2pfed.errors import FactRejected

__all__ = [
    "DELTA",
    "MAX_SIGNED_BYTES",
    "ROSTER",
    "RUN",
    "SignedDocument",
    "fact_hash",
    "sign",
    "verifies",
]

# BLAKE2b personalisations, at most 16 bytes each.
DELTA = b"p2pfed-delta"
ROSTER = b"p2pfed-roster"
RUN = b"p2pfed-run"

MAX_SIGNED_BYTES = 1 << 18  # 1024 members; a stranger may send this much (docs/protocol.md)
MARKER = b"\n-- p2pfed signatures --\n"
MAX_SIGNATURES = 64


def _digest(person: bytes, payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=32, person=person).digest()


def fact_hash(payload: bytes) -> bytes:
    """The name of a signed fact: BLAKE2b-256 of its payload bytes, 32 bytes."""
    return hashlib.blake2b(payload, digest_size=32).digest()


def sign(seed: bytes, person: bytes, payload: bytes) -> bytes:
    """Sign `payload` for the format `person`; returns 64 bytes.

    Args:
        seed: Ed25519 seed, 32 bytes.
        person: One of the personalisations of this module.
        payload: The exact bytes that will be sent.
    """
    return SigningKey(seed).sign(_digest(person, payload)).signature


def verifies(public_key: bytes, person: bytes, payload: bytes, signature: bytes) -> bool:
    """Whether `signature` over exactly `payload` was made by the holder of `public_key`."""
    return _signs(public_key, _digest(person, payload), signature)


def _signs(public_key: bytes, digest: bytes, signature: bytes) -> bool:
    try:
        VerifyKey(public_key).verify(digest, signature)
    except (BadSignatureError, ValueError, TypeError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class SignedDocument:
    """A payload and the signatures that came with it, in the order of the file.

    Attributes:
        payload: The exact signed bytes.
        signatures: Pairs (public key, signature), 32 and 64 bytes.
    """

    payload: bytes
    signatures: tuple[tuple[bytes, bytes], ...] = ()

    @classmethod
    def parse(cls, data: bytes) -> SignedDocument:
        """Split a file into payload and signatures.

        Raises:
            FactRejected: The file is too long or its signature lines are malformed.
        """
        if len(data) > MAX_SIGNED_BYTES:
            raise FactRejected(
                f"the document has {len(data)} bytes", f"at most {MAX_SIGNED_BYTES} are accepted"
            )
        payload, marker, tail = data.partition(MARKER)
        if not marker:
            return cls(payload.rstrip(b"\n"))
        signatures, lines = [], tail.splitlines()
        if len(lines) > MAX_SIGNATURES:
            raise FactRejected(f"the document carries more than {MAX_SIGNATURES} signatures")
        for line in lines:
            try:
                key, signature = (bytes.fromhex(part) for part in line.decode("ascii").split(" "))
            except ValueError as error:
                raise FactRejected("a signature line of the document is malformed") from error
            signatures.append((key, signature))
        return cls(payload, tuple(signatures))

    def encode(self) -> bytes:
        """The file: payload, marker, signature lines."""
        lines = b"".join(
            f"{key.hex()} {signature.hex()}\n".encode() for key, signature in self.signatures
        )
        return self.payload + MARKER + lines

    def signed_by(self, seed: bytes, person: bytes) -> SignedDocument:
        """This document with one more signature; signing twice with one key changes nothing."""
        key = bytes(SigningKey(seed).verify_key)
        kept = tuple(pair for pair in self.signatures if pair[0] != key)
        return SignedDocument(self.payload, (*kept, (key, sign(seed, person, self.payload))))

    def signers(self, person: bytes, *, among: Container[bytes] | None = None) -> frozenset[bytes]:
        """Public keys whose signature verifies; a key that signed twice counts once.

        Args:
            person: The format.
            among: Check these keys only, so that a stranger's signatures cost nothing.
        """
        checked = {k: s for k, s in self.signatures if among is None or k in among}
        digest = _digest(person, self.payload) if checked else b""
        return frozenset(k for k, s in checked.items() if _signs(k, digest, s))
