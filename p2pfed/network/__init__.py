"""The network room: authenticated links between members, frames, bulk files. No policy.

``peers`` is what the node uses and ``events`` what it hears. From the outside in: ``host`` owns
sockets, handshake and gate; ``wire``, ``noise``, ``yamux`` and ``flow`` are one connection without
policy, ``link`` runs it; ``session`` is one peer, whichever link carries it; ``dialling`` and
``reach`` keep us connected and reachable, ``speaking`` is what we say on a link, ``serving``
answers what members open; ``relay``, ``circuit`` and ``reservations`` lead around firewalls.
``framing``, ``multistream``, ``blob``, ``identify``, ``ping`` and ``addresses`` are formats,
``limits`` and ``pace`` bounds. Nothing here decides whom to trust: that is the :class:`Gatekeeper`,
which the node implements. Design: "Network"; libp2p specifications.
"""

from __future__ import annotations

from p2pfed.network.events import (
    AddressesChanged,
    FrameReceived,
    NetworkEvent,
    NetworkTotals,
    PeerConnected,
    PeerDisconnected,
    PeerStats,
    Reached,
    VersionsDiffer,
)
from p2pfed.network.host import Gatekeeper
from p2pfed.network.limits import Limits
from p2pfed.network.peers import PeerNetwork, open_network

__all__ = [
    "AddressesChanged",
    "FrameReceived",
    "Gatekeeper",
    "Limits",
    "NetworkEvent",
    "NetworkTotals",
    "PeerConnected",
    "PeerDisconnected",
    "PeerNetwork",
    "PeerStats",
    "Reached",
    "VersionsDiffer",
    "open_network",
]
