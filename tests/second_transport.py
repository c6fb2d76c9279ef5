"""The second implementation, 1: peer ids, multistream-select and Noise XX over TCP.

Written from section 5 of `docs/protocol.md` and the public specifications that it names; nothing
of p2pfed or libp2p is imported. A `Pipe` is anything that bytes come from and go to.

Invariant: a handshake returns a channel to whoever holds the key of the peer id that it returns.

Not here: the streams (`second_muxer.py`), circuits.
"""

from __future__ import annotations

import hashlib
import hmac
from abc import ABC, abstractmethod
from collections.abc import Sequence

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from nacl.signing import SigningKey, VerifyKey

MULTISTREAM, NOISE, YAMUX = "/multistream/1.0.0", "/noise", "/yamux/1.0.0"
BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
ED25519 = bytes.fromhex("08011220")  # a protobuf: key type 1, then 32 bytes of key


class Wrong(Exception):
    """The other side, or a byte that it sent, is against the protocol."""


class Ended(Exception):
    """The connection or the stream is over."""


# --- peer ids ----------------------------------------------------------------------------------


def peer_id(public_key: bytes) -> str:
    """The one spelling of the peer id of an Ed25519 key."""
    packed = b"\x00\x24" + ED25519 + public_key
    number, text = int.from_bytes(packed, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = BASE58[digit] + text
    return "1" * (len(packed) - len(packed.lstrip(b"\0"))) + text


def public_key(peer: str) -> bytes:
    """The key in a peer id.

    Raises:
        Wrong: It is not the one spelling of the id of an Ed25519 key.
    """
    number = 0
    for character in peer:
        number = number * 58 + BASE58.find(character)
    key = (number & ((1 << 256) - 1)).to_bytes(32, "big")
    if peer_id(key) != peer:
        raise Wrong(f"not a peer id: {peer!r}")
    return key


# --- bytes that come in pieces -----------------------------------------------------------------


class Pipe(ABC):
    """Reads so many bytes of what comes in pieces; the subclass gives pieces and writes."""

    def __init__(self) -> None:
        self._held = bytearray()

    @abstractmethod
    async def some(self) -> bytes:
        """The next piece; empty at the end."""

    @abstractmethod
    async def write(self, data: bytes) -> None:
        """Write all of it."""

    async def read(self, n: int) -> bytes:
        """Exactly n bytes.

        Raises:
            Ended: There are not so many.
        """
        while len(self._held) < n:
            piece = await self.some()
            if not piece:
                raise Ended
            self._held += piece
        data = bytes(self._held[:n])
        del self._held[:n]
        return data


class Plain(Pipe):
    """A TCP connection."""

    def __init__(self, socket: trio.SocketStream) -> None:
        super().__init__()
        self._socket = socket

    async def some(self) -> bytes:
        try:
            return bytes(await self._socket.receive_some(1 << 16))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""

    async def write(self, data: bytes) -> None:
        try:
            await self._socket.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as gone:
            raise Ended from gone


# --- multistream-select ------------------------------------------------------------------------


def line(text: str) -> bytes:
    """A line with its length before it; no line here needs more than one byte of length."""
    data = text.encode() + b"\n"
    assert len(data) <= 127
    return bytes([len(data)]) + data


async def read_line(pipe: Pipe) -> str:
    """The next line, without its newline."""
    (length,) = await pipe.read(1)
    data = await pipe.read(length) if 0 < length <= 127 else b""
    if not data.endswith(b"\n"):
        raise Wrong(f"{length} bytes, {data!r}: not a line of multistream-select")
    return data[:-1].decode()


async def propose(pipe: Pipe, protocols: Sequence[str]) -> str:
    """Propose one after the other; returns the first that the other side speaks.

    Raises:
        Wrong: It speaks none of them.
    """
    await pipe.write(line(MULTISTREAM) + line(protocols[0]))
    if await read_line(pipe) != MULTISTREAM:
        raise Wrong("the other side does not speak multistream-select")
    for i, protocol in enumerate(protocols):
        if i:
            await pipe.write(line(protocol))
        answer = await read_line(pipe)
        if answer == protocol:
            return protocol
        if answer != "na":
            raise Wrong("neither consent nor refusal")
    raise Wrong(f"none of {', '.join(protocols)} is spoken")


async def consent(pipe: Pipe, served: Sequence[str]) -> str:
    """Answer proposals until one is served, which is returned."""
    await pipe.write(line(MULTISTREAM))
    if await read_line(pipe) != MULTISTREAM:
        raise Wrong("the other side does not speak multistream-select")
    for _ in range(8):
        wanted = await read_line(pipe)
        await pipe.write(line(wanted if wanted in served else "na"))
        if wanted in served:
            return wanted
    raise Wrong("nothing that is served was proposed")


# --- Noise: Noise_XX_25519_ChaChaPoly_SHA256, with libp2p's payload ----------------------------


class Cipher:
    """One direction: a key and a counter (none and no encryption without a key)."""

    def __init__(self, key: bytes = b"") -> None:
        self._aead = ChaCha20Poly1305(key) if key else None
        self._count = 0

    def _nonce(self) -> bytes:
        self._count += 1
        return bytes(4) + (self._count - 1).to_bytes(8, "little")

    def seal(self, data: bytes, also: bytes = b"") -> bytes:
        return self._aead.encrypt(self._nonce(), data, also) if self._aead else data

    def open(self, data: bytes, also: bytes = b"") -> bytes:
        return self._aead.decrypt(self._nonce(), data, also) if self._aead else data


class Handshake:
    """The symmetric state of a Noise handshake."""

    def __init__(self) -> None:
        self._chain = self._hash = b"Noise_XX_25519_ChaChaPoly_SHA256"  # has 32 bytes
        self._cipher = Cipher()
        self.mix(b"")  # the prologue is empty

    def mix(self, data: bytes) -> None:
        self._hash = hashlib.sha256(self._hash + data).digest()

    def _derive(self, secret: bytes) -> tuple[bytes, bytes]:
        key = hmac.digest(self._chain, secret, "sha256")
        first = hmac.digest(key, b"\1", "sha256")
        return first, hmac.digest(key, first + b"\2", "sha256")

    def agree(self, ours: X25519PrivateKey, theirs: bytes) -> None:
        """Mix in a Diffie-Hellman secret; from here on the handshake is encrypted."""
        secret = ours.exchange(X25519PublicKey.from_public_bytes(theirs))
        self._chain, key = self._derive(secret)
        self._cipher = Cipher(key)

    def seal(self, data: bytes) -> bytes:
        sealed = self._cipher.seal(data, self._hash)
        self.mix(sealed)
        return sealed

    def open(self, sealed: bytes) -> bytes:
        data = self._cipher.open(sealed, self._hash)
        self.mix(sealed)
        return data

    def split(self) -> tuple[Cipher, Cipher]:
        """The dialler's and the listener's direction."""
        first, second = self._derive(b"")
        return Cipher(first), Cipher(second)


class Noise(Pipe):
    """What was agreed on: messages of at most 65535 bytes, each sealed, behind a uint16."""

    def __init__(self, plain: Pipe, out: Cipher, into: Cipher) -> None:
        super().__init__()
        self._plain, self._out, self._into = plain, out, into
        self._one_writes = trio.Lock()

    async def some(self) -> bytes:
        try:
            length = int.from_bytes(await self._plain.read(2), "big")
            return self._into.open(await self._plain.read(length))
        except Ended:
            return b""

    async def write(self, data: bytes) -> None:
        async with self._one_writes:
            for at in range(0, len(data), 65519):
                sealed = self._out.seal(data[at : at + 65519])
                await self._plain.write(len(sealed).to_bytes(2, "big") + sealed)


SIGNED = b"noise-libp2p-static-key:"


def _payload(key: SigningKey, static: bytes) -> bytes:
    """Protobuf of libp2p: 1 the public key (a protobuf), 2 its signature of the static key."""
    identity = ED25519 + bytes(key.verify_key)
    signature = key.sign(SIGNED + static).signature
    return bytes([0x0A, len(identity)]) + identity + bytes([0x12, len(signature)]) + signature


def _identity(payload: bytes, static: bytes) -> str:
    """The peer id that a payload proves; fields other than 1 and 2 are passed over."""
    fields, rest = {}, payload
    while rest:
        tag, length = rest[0], rest[1]  # all fields known have lengths of one byte
        if tag & 7 != 2 or length > 127:
            break
        fields[tag >> 3], rest = rest[2 : 2 + length], rest[2 + length :]
    key = fields[1].removeprefix(ED25519)
    VerifyKey(key).verify(SIGNED + static, fields[2])
    return peer_id(key)


async def _tell(plain: Pipe, message: bytes) -> None:
    await plain.write(len(message).to_bytes(2, "big") + message)


async def _hear(plain: Pipe) -> bytes:
    return await plain.read(int.from_bytes(await plain.read(2), "big"))


async def noise_as_dialler(plain: Pipe, key: SigningKey) -> tuple[Noise, str]:
    """Shake hands; returns the channel and who the other side is."""
    state, ephemeral = Handshake(), X25519PrivateKey.generate()
    static = X25519PrivateKey.generate()
    ours = ephemeral.public_key().public_bytes_raw()
    state.mix(ours)
    await _tell(plain, ours + state.seal(b""))  # -> e
    message = await _hear(plain)
    theirs = message[:32]  # <- e, ee, s, es
    state.mix(theirs)
    state.agree(ephemeral, theirs)
    their_static = state.open(message[32:80])
    state.agree(ephemeral, their_static)
    other = _identity(state.open(message[80:]), their_static)
    our_static = static.public_key().public_bytes_raw()
    sealed = state.seal(our_static)  # -> s, se
    state.agree(static, theirs)
    await _tell(plain, sealed + state.seal(_payload(key, our_static)))
    out, into = state.split()
    return Noise(plain, out, into), other


async def noise_as_listener(plain: Pipe, key: SigningKey) -> tuple[Noise, str]:
    """The other side of the same handshake."""
    state, ephemeral = Handshake(), X25519PrivateKey.generate()
    static = X25519PrivateKey.generate()
    message = await _hear(plain)
    theirs = message[:32]  # -> e
    state.mix(theirs)
    state.open(message[32:])
    ours = ephemeral.public_key().public_bytes_raw()
    our_static = static.public_key().public_bytes_raw()
    state.mix(ours)
    state.agree(ephemeral, theirs)
    sealed = state.seal(our_static)
    state.agree(static, theirs)
    await _tell(plain, ours + sealed + state.seal(_payload(key, our_static)))  # <- e, ee, s, es
    message = await _hear(plain)
    their_static = state.open(message[:48])  # -> s, se
    state.agree(ephemeral, their_static)
    other = _identity(state.open(message[48:]), their_static)
    into, out = state.split()
    return Noise(plain, out, into), other
