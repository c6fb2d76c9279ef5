"""Bounds of the network room, each with where it comes from. No behaviour.

Invariant: every queue, wait, length and count that a peer can drive is bounded by one of these.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]

_KIB, _MIB = 1024, 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """Every bound of this room; seconds and bytes."""

    # A delta of 10^7 parameters at 10 % is 10^6 entries of at most 6 bytes; 2.5 times that.
    max_frame: int = 16 * _MIB
    max_roster: int = 256 * _KIB  # 1024 members of 150 bytes, with room for long names
    # Two of the longest frames, so that one may wait while one is on its way.
    queue_bytes: int = 32 * _MIB
    queue_frames: int = 256  # an anti-entropy burst of one round among 64 hospitals, four times
    urgent_bytes: int = 4096  # longer frames are bulk; beats have 300 bytes, tables of claims 4000
    frames_per_second: float = 500.0  # taken from one peer; a burst of one second's worth
    events: int = 8  # eight of the longest frames are 128 MiB; a slow node holds no more
    # TCP, Noise and yamux need 4 round trips; 3 s are enough at 500 ms each.
    upgrade_seconds: float = 3.0
    stranger_seconds: float = 3.0
    # A roster, one full yamux window of an eager peer's next stream, and as much again.
    stranger_bytes: int = 768 * _KIB
    half_open: int = 64  # the oldest makes room, so silent sockets cannot lock a member out
    links: int = 256  # twice the live members of a 64-member committee, both directions
    links_per_peer: int = 3  # two of a simultaneous dial and one restart
    streams: int = 32  # of one side on one link, circuits that pass through us included
    # Grows to it while the reader keeps up: 400 Mbit/s at a round-trip time of 80 ms.
    window: int = 4 * _MIB
    unread_bytes: int = 24 * _MIB  # all windows of a link: 64 at 256 KiB, and two grown ones
    dial_seconds: float = 5.0
    redial_first: float = 0.3  # a restarted daemon is back within a second
    redial_most: float = 5.0
    redial_left: float = 60.0  # a peer that said goodbye, which may have been a restart
    redial_unlike: float = 60.0  # a peer without a common version: somebody has to update one of us
    direct_seconds: float = 20.0  # between two attempts to replace a circuit
    open_seconds: float = 10.0
    stall_seconds: float = 30.0
    ping_seconds: float = 5.0
    idle_seconds: float = 60.0  # a stock peer's yamux pings at least every 40.5 s, and answers ours
    grace_seconds: float = 3.0  # what is under way on a doubled link still arrives
    close_seconds: float = 2.0
