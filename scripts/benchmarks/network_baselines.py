"""What our links are compared with: bare TCP, libsodium frames, TLS 1.3, and stock py-libp2p.

Each baseline is a server, which hands every stream that is opened to a handler and yields its
address, and a client, which yields a stream to it. All run on trio and on loopback.

* `raw-tcp`: trio's TCP streams and nothing else.
* `raw+libsodium`: frames of 64 KiB, each sealed with libsodium's ChaCha20-Poly1305 (PyNaCl).
* `tls13`: trio's TLS streams, TLS 1.3 with the cipher that OpenSSL prefers (AES-256-GCM).
* `stock`: a host of py-libp2p with Noise and yamux, as the library comes.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import ssl
import struct
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from libp2p import new_host
from libp2p.abc import IHost
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr
from nacl import bindings

from p2pfed.network.framing import ByteStream

__all__ = ["BASELINES", "LOOPBACK", "PROTOCOL", "Ends", "Handle"]

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
PROTOCOL = "/p2pfed/bench/1"
SOCKET_READ = 256 * 1024
SODIUM_FRAME = 64 * 1024

Handle = Callable[[ByteStream], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Ends:
    """A server, and a client that is given the server's address."""

    serve: Callable[[Handle], AbstractAsyncContextManager[Any]]
    connect: Callable[[Any], AbstractAsyncContextManager[ByteStream]]


# --- TCP, libsodium, TLS -------------------------------------------------------------------------


class Plain:
    """A stream of trio's as a byte stream."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream

    async def read(self, n: int) -> bytes:
        """Up to so many bytes."""
        return bytes(await self._stream.receive_some(min(n, SOCKET_READ)))

    async def write(self, data: bytes) -> None:
        """All of it."""
        await self._stream.send_all(data)


class Sealed:
    """Frames of a length, 4 bytes, and as many bytes of ciphertext; one key, counted nonces."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._key = bytes(range(32))
        self._sent = self._opened = 0
        self._held = bytearray()
        self._plain = memoryview(b"")

    async def read(self, n: int) -> bytes:
        """Up to so many bytes of one frame."""
        if not self._plain:
            (length,) = struct.unpack("!I", await self._take(4))
            frame = await self._take(length)
            nonce = struct.pack("<4xQ", self._opened)
            self._opened += 1
            opened = bindings.crypto_aead_chacha20poly1305_ietf_decrypt(
                frame, None, nonce, self._key
            )
            if n >= len(opened):
                return opened
            self._plain = memoryview(opened)
        piece, self._plain = bytes(self._plain[:n]), self._plain[n:]
        return piece

    async def write(self, data: bytes) -> None:
        """All of it."""
        for start in range(0, len(data), SODIUM_FRAME):
            nonce = struct.pack("<4xQ", self._sent)
            self._sent += 1
            frame = bindings.crypto_aead_chacha20poly1305_ietf_encrypt(
                data[start : start + SODIUM_FRAME], None, nonce, self._key
            )
            await self._stream.send_all(struct.pack("!I", len(frame)) + frame)

    async def _take(self, count: int) -> bytes:
        while len(self._held) < count:
            piece = await self._stream.receive_some(SOCKET_READ)
            assert piece, "the connection ended in the middle of a frame"
            self._held += piece
        taken = bytes(memoryview(self._held)[:count])
        del self._held[:count]
        return taken


@asynccontextmanager
async def _tcp_serving(
    wrap: Callable[[trio.SocketStream], ByteStream], handle: Handle
) -> AsyncIterator[int]:
    async def receive(tcp: trio.SocketStream) -> None:
        await handle(wrap(tcp))

    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, receive, 0, host="127.0.0.1")
        (listener,) = await nursery.start(serve)
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def _tcp_connected(
    wrap: Callable[[trio.SocketStream], ByteStream], port: int
) -> AsyncIterator[ByteStream]:
    async with await trio.open_tcp_stream("127.0.0.1", port) as tcp:
        yield wrap(tcp)


@asynccontextmanager
async def _tls_serving(handle: Handle) -> AsyncIterator[tuple[int, str]]:
    certificate, key = _self_signed()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    with tempfile.NamedTemporaryFile("w") as file:  # the ssl module takes nothing but a path
        file.write(certificate + key)
        file.flush()
        context.load_cert_chain(file.name)

    def wrap(tcp: trio.SocketStream) -> ByteStream:
        return Plain(trio.SSLStream(tcp, context, server_side=True))

    async with _tcp_serving(wrap, handle) as port:
        yield port, certificate


@asynccontextmanager
async def _tls_connected(address: tuple[int, str]) -> AsyncIterator[ByteStream]:
    port, certificate = address
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=certificate)

    def wrap(tcp: trio.SocketStream) -> ByteStream:
        return Plain(trio.SSLStream(tcp, context, server_hostname="127.0.0.1"))

    async with _tcp_connected(wrap, port) as stream:
        yield stream


def _self_signed() -> tuple[str, str]:
    """A certificate for 127.0.0.1 and its key, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "bench")])
    now = dt.datetime.now(dt.UTC)
    here = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([here]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    return certificate.public_bytes(pem).decode(), private.decode()


# --- stock py-libp2p -----------------------------------------------------------------------------


def _stock_host() -> IHost:
    keys = create_new_key_pair(os.urandom(32))
    noise = NoiseTransport(keys, noise_privkey=create_x25519_key_pair().private_key)
    return new_host(key_pair=keys, sec_opt={NOISE: noise}, muxer_opt={YAMUX: Yamux})


@asynccontextmanager
async def _stock_serving(handle: Handle) -> AsyncIterator[tuple[str, str]]:
    host = _stock_host()
    async with host.run(listen_addrs=[Multiaddr(LOOPBACK)]):
        host.set_stream_handler(PROTOCOL, handle)
        yield str(host.get_id()), str(host.get_addrs()[0]).partition("/p2p/")[0]


@asynccontextmanager
async def _stock_connected(address: tuple[str, str]) -> AsyncIterator[ByteStream]:
    host, peer = _stock_host(), ID.from_base58(address[0])
    async with host.run(listen_addrs=[]):
        await host.connect(PeerInfo(peer, [Multiaddr(address[1])]))
        yield await host.new_stream(peer, [PROTOCOL])


def _over_tcp(wrap: Callable[[trio.SocketStream], ByteStream]) -> Ends:
    return Ends(partial(_tcp_serving, wrap), partial(_tcp_connected, wrap))


BASELINES = {
    "raw-tcp": _over_tcp(Plain),
    "raw+libsodium": _over_tcp(Sealed),
    "tls13": Ends(_tls_serving, _tls_connected),
    "stock": Ends(_stock_serving, _stock_connected),
}
