"""Noise: the library's XX handshake, and a record layer of our own behind it.

This is the one module that reaches into py-libp2p's internals: the two cipher states and the
peer's key that its handshake leaves behind (`agree`). Version 0.8.1 is pinned, and a test fails
loudly on any other.

A record is ``length (2 bytes) | ChaCha20-Poly1305 ciphertext``, nonces count from 0 each way. The
library encrypts and writes each record by itself, reads each length and each body by itself, and
ruins the connection when a write is cancelled half-way. Here several records are sealed into one
buffer for one write, one read brings many, and no buffer is held by a connection that is quiet.

Invariant: a record that was sealed goes out whole and in order, or the connection ends; a record
that does not authenticate ends it.

Source: libp2p/specs noise/README.md; The Noise Protocol Framework, revision 34, sections 5.1, 7.5.
Not here: what is inside the records (``yamux``), sockets (``wire``), who may connect (``host``).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID
from libp2p.security.noise.transport import Transport as NoiseTransport

from p2pfed.errors import RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from libp2p.crypto.keys import KeyPair

    from p2pfed.network.wire import Buffer, Wire

__all__ = ["MAX_PLAINTEXT", "NOISE", "Channel", "Handshake", "Opener", "Sealer"]
__all__ += ["keep_freed_memory"]

NOISE = str(PROTOCOL_ID)
TAG = 16
MAX_PLAINTEXT = 65535 - TAG
_QUIET = 8 * 1024  # room for the records of a connection that only talks
_BUSY = 256 * 1024 + 65537  # one large read behind a record that came in part
_LENGTH = struct.Struct("!H")
_NONCE = struct.Struct("<4xQ")
# A header and its body are put together here; no task is switched while it is in use.
_scratch = memoryview(bytearray(MAX_PLAINTEXT))


def keep_freed_memory() -> None:
    """Have the allocator keep some megabytes that were freed.

    glibc gives the top of the heap back and takes it again with every few records, and the page
    faults cost as much as decrypting. It stops once a large block was freed: mallopt(3), "dynamic
    mmap threshold". Elsewhere this does nothing.
    """
    bytearray(16 * 1024 * 1024)


class Sealer:
    """Encrypts our direction.

    Args:
        key: 32 bytes.
        nonce: Records sealed so far.
    """

    def __init__(self, key: bytes, nonce: int = 0) -> None:
        self._aead = ChaCha20Poly1305(key)
        self._nonce = nonce
        self._out = memoryview(bytearray(_QUIET))

    def seal(self, pieces: Iterable[tuple[bytes, Buffer]]) -> memoryview:
        """Seal each (head, body) as one record of ``head + body``, at most ``MAX_PLAINTEXT``.

        Returns:
            The records; valid until the next call.
        """
        pieces = list(pieces)
        size = sum(len(head) + len(body) + 2 + TAG for head, body in pieces)
        if size > len(self._out):
            self._out = memoryview(bytearray(size))
        out, position = self._out, 0
        for head, body in pieces:
            plain = body
            if head:
                length = len(head) + len(body)
                _scratch[: len(head)] = head
                _scratch[len(head) : length] = body
                plain = _scratch[:length]
            end = position + 2 + len(plain) + TAG
            _LENGTH.pack_into(out, position, len(plain) + TAG)
            nonce = _NONCE.pack(self._nonce)
            self._aead.encrypt_into(nonce, plain, None, out[position + 2 : end])
            self._nonce += 1
            position = end
        return out[:position]

    def rest(self) -> None:
        """Give the large buffer back; called when there is nothing to send."""
        if len(self._out) > _QUIET:
            self._out = memoryview(bytearray(_QUIET))


class Opener:
    """Decrypts the peer's direction, from whatever pieces the socket gives.

    Args:
        key: 32 bytes.
        nonce: Records opened so far.
    """

    def __init__(self, key: bytes, nonce: int = 0) -> None:
        self._aead = ChaCha20Poly1305(key)
        self._nonce = nonce
        self._in = bytearray(_QUIET)
        self._end = 0  # of what is in it

    def room(self) -> memoryview:
        """Where the next bytes go; tell how many with :meth:`filled`."""
        return memoryview(self._in)[self._end :]

    def filled(self, count: int) -> list[bytearray]:
        """Open the records that are complete now.

        Raises:
            RemoteProtocolError: A record is too short or does not authenticate.
        """
        end = self._end + count
        was_full = end == len(self._in)
        records, position = [], 0
        with memoryview(self._in) as held:
            while end - position >= 2:
                (length,) = _LENGTH.unpack_from(held, position)
                if end - position - 2 < length:
                    break
                if length < TAG:
                    raise RemoteProtocolError(f"a Noise record has {length} bytes")
                plain = bytearray(length - TAG)
                sealed = held[position + 2 : position + 2 + length]
                try:
                    self._aead.decrypt_into(_NONCE.pack(self._nonce), sealed, None, plain)
                except InvalidTag:
                    raise RemoteProtocolError("a Noise record does not authenticate") from None
                self._nonce += 1
                position += 2 + length
                if plain:
                    records.append(plain)
            left = bytes(held[position:end])
        if was_full and len(self._in) == _QUIET:
            self._in = bytearray(_BUSY)
        elif not left and count < _QUIET < len(self._in):
            self._in = bytearray(_QUIET)
        self._in[: len(left)] = left
        self._end = len(left)
        return records


class Channel:
    """An authenticated, encrypted connection to one peer, in records.

    Args:
        wire: The socket, or a relayed stream in its place.
        peer: Who answered, base58.
        sealer: Encrypts what we send.
        opener: Decrypts what comes.
    """

    def __init__(self, wire: Wire, peer: str, sealer: Sealer, opener: Opener) -> None:
        self.wire = wire
        self.peer = peer
        self._sealer = sealer
        self._opener = opener
        self._early = bytearray()

    async def send(self, pieces: Iterable[tuple[bytes, Buffer]]) -> None:
        """Write each (head, body) as a record; one caller at a time, and never cancelled.

        Raises:
            PeerUnreachable: The connection is gone.
        """
        await self.wire.write(self._sealer.seal(pieces))

    def seal(self, pieces: Iterable[tuple[bytes, Buffer]]) -> memoryview:
        """Seal records for one write to ``wire``, which must follow."""
        return self._sealer.seal(pieces)

    def rest(self) -> None:
        """There is nothing to send: hold no large buffer."""
        self._sealer.rest()

    async def receive(self) -> list[bytearray]:
        """Wait for records; empty at the end of the connection.

        Raises:
            RemoteProtocolError: A record does not authenticate.
            PeerUnreachable: The connection broke.
        """
        if self._early:
            early, self._early = self._early, bytearray()
            return [early]
        while True:
            count = await self.wire.read_into(self._opener.room())
            if not count:
                return []
            if records := self._opener.filled(count):
                return records

    # -- as a byte stream, until the muxer takes over ------------------------------------------

    async def read(self, n: int) -> bytes:
        """Return 1 to ``n`` bytes, or ``b""`` at the end."""
        if not self._early:
            self._early = bytearray(b"".join(await self.receive()))
        taken = bytes(self._early[:n])
        del self._early[:n]
        return taken

    async def write(self, data: Buffer) -> None:
        """Write a few bytes."""
        await self.send(((b"", data),))


class Handshake:
    """Noise XX with our identity; makes channels.

    Args:
        keys: The node's Ed25519 key pair; the static Noise key is new with each start.
    """

    def __init__(self, keys: KeyPair) -> None:
        self._transport = NoiseTransport(keys, noise_privkey=create_x25519_key_pair().private_key)

    async def agree(self, wire: Wire, dialled: str | None) -> Channel:
        """Shake hands over a fresh connection.

        Args:
            wire: The connection.
            dialled: Who we want to have reached; None for an inbound connection.

        Raises:
            Exception: Whatever the library meets in arbitrary bytes; also if somebody else than
                ``dialled`` answered.
        """
        raw: Any = wire  # the handshake needs read and write only
        if dialled is None:
            session: Any = await self._transport.secure_inbound(raw)
        else:
            session = await self._transport.secure_outbound(raw, ID.from_base58(dialled))
        ciphers = session.conn.noise_state.noise_protocol
        send, receive = ciphers.cipher_state_encrypt, ciphers.cipher_state_decrypt
        return Channel(
            wire,
            str(session.get_remote_peer()),
            Sealer(send.k, send.n),
            Opener(receive.k, receive.n),
        )
