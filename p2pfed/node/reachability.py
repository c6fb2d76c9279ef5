"""How others reach this node, as far as it has seen: for the admin socket and `p2pfed doctor`.

Nobody is asked to dial back: a member that dials us directly is the proof that it works, and one
more request that every peer can send would be one more that a liar can send. What is said here
holds since this node last had no connection at all.
"""

from __future__ import annotations

from typing import Any

from p2pfed.config import Settings
from p2pfed.node.shell import Shell

__all__ = ["reachability"]


def reachability(settings: Settings, shell: Shell) -> dict[str, Any]:
    """What /v1/reachability says; every value can be written as JSON.

    Returns:
        `listen`, `announce`, `mode` and `relays_for_others` as configured; `addresses` as announced
        now; `visited`: `outside`, `near` (only from private addresses) or `""`; `relay_wanted`;
        `relays`: who holds a place for us (name and peer id); `possible_relays`: how many other
        connected members might; `connections`: members by the kind of their connection.
    """
    seen = shell.network.reached()
    members = shell.core.membership

    def named(peer_id: str) -> dict[str, str]:
        peer = members.get(peer_id)
        return {"name": peer_id if peer is None else peer.name, "peer_id": peer_id}

    return {
        "listen": list(settings.node.listen),
        "announce": list(settings.node.announce),
        "mode": settings.network.reach,
        "relays_for_others": settings.network.relay,
        "addresses": list(shell.core.introduction.addresses),
        "visited": seen.visited,
        "relay_wanted": seen.relay_wanted,
        "relays": [named(peer_id) for peer_id in seen.relays],
        "possible_relays": len(set(seen.possible_relays) - set(seen.relays)),
        "connections": {
            "direct_in": seen.direct_in,
            "direct_out": seen.direct_out,
            "relayed": seen.relayed,
        },
    }
