"""What the network tells the node: events and figures. Values only.

Invariant: a peer is named by its base58 id everywhere; no value here holds a socket or a task.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from p2pfed.wire.versions import NEWEST

__all__ = ["AddressesChanged", "FrameReceived", "NetworkEvent", "NetworkTotals", "PeerConnected"]
__all__ += ["PeerDisconnected", "PeerStats", "Reached", "VersionsDiffer"]


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """``peer`` (base58) has let us in: frames of ``version`` can be sent."""

    peer: str
    version: int = field(default=NEWEST, compare=False)


@dataclass(frozen=True, slots=True)
class VersionsDiffer:
    """``peer``, a member, speaks none of our versions but ``theirs`` (empty: it told none)."""

    peer: str
    theirs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PeerDisconnected:
    """The last link to ``peer`` is gone, and with it every frame that still waited."""

    peer: str


@dataclass(frozen=True, slots=True)
class FrameReceived:
    """A whole frame from a member; between its ``PeerConnected`` and ``PeerDisconnected``."""

    peer: str
    frame: bytes
    version: int = field(default=NEWEST, compare=False)  # of the stream that it came on


@dataclass(frozen=True, slots=True)
class AddressesChanged:
    """Others reach us at these addresses now."""

    addresses: tuple[str, ...]


NetworkEvent = PeerConnected | PeerDisconnected | VersionsDiffer | FrameReceived | AddressesChanged


@dataclass(frozen=True, slots=True)
class PeerStats:
    """One peer since our start; bytes on the socket, handshakes and encryption included.

    ``connected_since`` is a ``trio.current_time()``; it and ``direction`` are None while the peer
    is not connected. ``via`` is the relay that the connection goes through, "" for none; ``rtt`` is
    of its last ping, seconds. ``breaches`` counts broken framing and the like.
    """

    bytes_sent: int
    bytes_received: int
    connected_since: float | None
    direction: Literal["inbound", "outbound"] | None
    via: str
    rtt: float | None
    breaches: int


@dataclass(frozen=True, slots=True)
class Reached:
    """How others reach us, since we last had no connection at all.

    ``visited`` says from where members have dialled us directly: ``outside``, ``near`` (private
    addresses only) or nowhere. ``relays`` hold a place for us, ``possible_relays`` (connected
    members) might. The counts are of connected members.
    """

    visited: Literal["outside", "near", ""]
    relay_wanted: bool
    relays: tuple[str, ...]
    possible_relays: tuple[str, ...]
    direct_in: int
    direct_out: int
    relayed: int


@dataclass(frozen=True, slots=True)
class NetworkTotals:
    """All members together, and how many inbound connections did not become a member's.

    ``circuits`` run through us now, ``relayed_bytes`` went through all of them.
    """

    bytes_sent: int
    bytes_received: int
    connected: int
    breaches: int
    refused: int
    relayed_bytes: int
    circuits: int
