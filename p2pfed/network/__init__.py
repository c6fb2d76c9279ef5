"""The network room: authenticated links between members, frames, bulk files. No policy.

``peers`` is what the node uses and ``events`` what it hears; ``host`` owns sockets, handshake and
gate, ``link`` one connection, ``session`` one peer; ``framing``, ``multistream`` and ``blob`` are
the formats, ``limits`` the bounds. Nothing here decides whom to trust: that is the
:class:`Gatekeeper`, which the node implements. Design: "Network"; libp2p specifications.
"""

from __future__ import annotations

from p2pfed.network.events import (
    FrameReceived,
    NetworkEvent,
    NetworkTotals,
    PeerConnected,
    PeerDisconnected,
    PeerStats,
)
from p2pfed.network.host import Gatekeeper
from p2pfed.network.limits import Limits
from p2pfed.network.peers import PeerNetwork, open_network

__all__ = [
    "FrameReceived",
    "Gatekeeper",
    "Limits",
    "NetworkEvent",
    "NetworkTotals",
    "PeerConnected",
    "PeerDisconnected",
    "PeerNetwork",
    "PeerStats",
    "open_network",
]
