"""Identify: what a standard libp2p client asks first, answered to members only.

The peer opens a stream and says nothing; we answer with one ``Identify`` message, its length in
front as a varint, and end the stream. Nobody needs it inside a consortium: members know each other
from the roster and the gossip. It is here so that independent clients (js-libp2p, a stock
py-libp2p host) find in us what they expect of a libp2p peer.

Invariant: the answer holds nothing that a member does not know anyway: our key (it is our peer id),
our program's version, the addresses that our gossip spreads, the protocols we serve, and the
address from which the peer itself came. No signed record, nothing about runs or patients.

Source: libp2p/specs identify/README.md. Not here: ``/ipfs/id/push``, which we neither send nor
serve; reading others' answers; who may ask and what the stream is agreed with (``peers``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.peer.id import ID
from libp2p.utils.varint import encode_uvarint
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from p2pfed import __version__
from p2pfed.network.framing import write_all

if TYPE_CHECKING:
    from collections.abc import Iterable

    from p2pfed.network.framing import ByteStream

__all__ = ["IDENTIFY", "MAX_MESSAGE", "identify_message", "serve_identify"]

IDENTIFY = "/ipfs/id/1.0.0"
MAX_MESSAGE = 4096  # bytes; what rust-libp2p reads at most, go and js read 8192
_FAMILY = "/p2pfed/1"
# An Ed25519 id is the key itself: multihash "identity", 36 bytes, then the marshalled public key.
_KEY_INSIDE = b"\x00\x24"


def identify_message(
    peer: str, *, listen: Iterable[str], protocols: Iterable[str], observed: str = ""
) -> bytes:
    """Write what we tell about ourselves.

    Args:
        peer: Our own id, base58, of an Ed25519 key; the public key is taken from it.
        listen: Our addresses, most useful first; a ``/p2p/…`` at the end that names us is taken
            off, as the specification's clients expect. Those that do not parse are left out, and
            the last ones where the message would pass `MAX_MESSAGE`.
        protocols: What we serve to the one who asks.
        observed: The address from which the asking peer came; empty where there is none to tell
            (a circuit).

    Returns:
        The message, without its length.

    Raises:
        ValueError: The id does not hold its key.
    """
    multihash = ID.from_base58(peer).to_bytes()
    if not multihash.startswith(_KEY_INSIDE):
        raise ValueError(f"{peer} is not the id of an Ed25519 key")
    message = Identify(
        protocol_version=_FAMILY,
        agent_version=f"p2pfed/{__version__}",
        public_key=multihash[len(_KEY_INSIDE) :],
        protocols=protocols,
    )
    if origin := _packed(observed):
        message.observed_addr = origin
    plain = (address.removesuffix(f"/p2p/{peer}") for address in listen)
    for address in filter(None, map(_packed, plain)):
        message.listen_addrs.append(address)
        if message.ByteSize() > MAX_MESSAGE:
            message.listen_addrs.pop()
            break
    return message.SerializeToString()


async def serve_identify(stream: ByteStream, answer: bytes, *, stall: float) -> None:
    """Answer on a stream that the peer opened; nothing is read, and the caller ends the stream.

    Args:
        stream: The opened stream.
        answer: An :func:`identify_message`.
        stall: Seconds the peer may take to accept it.

    Raises:
        PeerUnreachable: The peer took no bytes, or is gone.
    """
    await write_all(stream, encode_uvarint(len(answer)) + answer, stall=stall)


def _packed(address: str) -> bytes:
    """The address in binary form; empty if it does not parse."""
    try:
        return bytes(Multiaddr(address).to_bytes())
    except (MultiaddrError, ValueError):
        return b""
