"""One simulated hospital: what it has on disk, what it has in memory, its clock and its ledger.

What a crash loses is what a real crash loses. Rosters, checkpoints, the ledger and the node's own
deltas are durable when they are written; foreign deltas and proofs are durable from the next
`sync` on (an own delta syncs everything before it, as one log does), and a crash may lose any tail
of what was written since.

The ledger keeps the order of the real one: debit, draw, output, release. A crash between two of
these steps costs budget and never overspends.
"""

from __future__ import annotations

import copy
import datetime as dt
import hashlib
import random
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from p2pfed.gossip.core import Core
from p2pfed.gossip.events import Event, Note
from p2pfed.gossip.fold import ModelState
from p2pfed.gossip.replay import MemoryCheckpoints, Replay
from p2pfed.identity.keys import peer_id_of
from p2pfed.wire.delta import Delta
from p2pfed.wire.versions import NEWEST

__all__ = ["Clock", "Disk", "Ledger", "SimulatedNode"]

START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


@dataclass(slots=True)
class Clock:
    """A node's clocks as functions of the true time, seconds.

    Attributes:
        rate: Seconds of the node per true second (drift).
        skew: How far its calendar is ahead.
    """

    rate: float = 1.0
    skew: float = 0.0
    _true: float = 0.0
    _shown: float = 0.0

    def read(self, true: float) -> float:
        """The monotonic clock at a true time."""
        return self._shown + (true - self._true) * self.rate

    def wall(self, true: float) -> dt.datetime:
        """The calendar at a true time."""
        return START + dt.timedelta(seconds=true + self.skew)

    def set(self, true: float, *, skew_s: float, rate: float, jump_s: float = 0.0) -> None:
        """Show another calendar and run at another rate from now on, after a jump forward.

        Args:
            true: The true time.
            skew_s: How far the calendar is ahead from now on.
            rate: Seconds of the node per true second.
            jump_s: How far the monotonic clock jumps (a machine that slept).
        """
        self._shown, self._true = self.read(true) + jump_s, true
        self.rate, self.skew = rate, skew_s


@dataclass(slots=True)
class Ledger:
    """What was paid and what was drawn for it.

    Attributes:
        debits: Releases paid for.
        head: Hash over all of them, 32 bytes.
        known: Every head that it ever had.
        outputs: Round -> (payload, debits then, head then): drawn and kept.
    """

    debits: int = 0
    head: bytes = bytes(32)
    known: set[bytes] = field(default_factory=set)
    outputs: dict[int, tuple[bytes, int, bytes]] = field(default_factory=dict)

    def debit(self, round_: int) -> None:
        """Pay for one release."""
        self.debits += 1
        entry = self.debits.to_bytes(8, "little") + round_.to_bytes(8, "little")
        self.head = hashlib.blake2b(self.head + entry, digest_size=32).digest()
        self.known.add(self.head)

    def copy(self) -> Ledger:
        """A backup."""
        return Ledger(self.debits, self.head, set(self.known), dict(self.outputs))

    def keep(self, round_: int, payload: bytes) -> None:
        """Keep what was drawn for the last debit."""
        self.outputs[round_] = (payload, self.debits, self.head)


@dataclass(slots=True)
class Disk:
    """What is stored.

    Attributes:
        rosters: Signed rosters, in the order in which they were believed.
        deltas: By name.
        proofs: Encoded.
        unsynced: Names of deltas, and proofs, that a crash may lose, oldest first.
        adopted: The believed checkpoint whose archive is not complete yet.
    """

    rosters: list[bytes]
    deltas: dict[bytes, Delta] = field(default_factory=dict)
    proofs: list[bytes] = field(default_factory=list)
    unsynced: list[bytes] = field(default_factory=list)
    adopted: tuple[int, bytes, int] | None = None
    checkpoints: MemoryCheckpoints = field(default_factory=MemoryCheckpoints)
    ledger: Ledger = field(default_factory=Ledger)

    def keep(self, delta: Delta, *, durable: bool) -> None:
        """Store a delta."""
        self.deltas[delta.fact] = delta
        if durable:
            self.unsynced.clear()
        else:
            self.unsynced.append(delta.fact)

    def keep_proof(self, proof: bytes) -> None:
        """Store a proof."""
        self.proofs.append(proof)
        self.unsynced.append(proof)

    def lose(self, chance: random.Random) -> int:
        """Lose a tail of what was not synced; returns how many."""
        kept = chance.randint(0, len(self.unsynced))
        lost = self.unsynced[kept:]
        for item in lost:
            if self.deltas.pop(item, None) is None:
                self.proofs.remove(item)
        self.unsynced.clear()
        return len(lost)

    def copy(self) -> Disk:
        """A backup; what is stored in it is shared, since it never changes."""
        return Disk(
            list(self.rosters),
            dict(self.deltas),
            list(self.proofs),
            [],
            self.adopted,
            copy.copy(self.checkpoints),
            self.ledger.copy(),
        )


class SimulatedNode:
    """One hospital in the world.

    Args:
        seed: Its secret key.
        public_key: Its public key.
        rosters: Signed rosters that it starts with, oldest first.
        name: What people call it.
    """

    def __init__(
        self, seed: bytes, public_key: bytes, rosters: list[bytes], name: str = ""
    ) -> None:
        self.seed = seed
        self.peer_id = peer_id_of(public_key)
        self.name = name or self.peer_id
        self.version = NEWEST  # of the wire, the highest that it speaks
        self.index = 0  # in the order in which nodes came into the world
        self.disk = Disk(list(rosters))
        self.clock = Clock()
        self.core: Core | None = None
        self.incarnation = 0
        self.born_at = 0.0  # when it was first started
        self.started_at = 0.0
        self.slowness = 1.0  # latency and training take so many times longer
        self.frozen_until = 0.0  # stopped: its process sees and does nothing till then
        self.unseen: list[Event] = []  # what it will see then, all at once
        self.dies_within: int | None = None  # effects it still performs of the next list, then dies
        self.replay: Replay | None = None
        self.model: NDArray[np.int32] = np.zeros(0, np.int32)
        self.offered: dict[bytes, tuple[ModelState, bytes]] = {}
        self.up: dict[str, None] = {}  # peers that it is connected to, in order
        self.wanted: dict[str, None] = {}  # peers that it dials
        self.notes: list[Note] = []
        self.bytes_received = 0
        self.fact_bytes_received = 0
        self.trained_rounds: list[int] = []

    @property
    def deltas(self) -> dict[bytes, Delta]:
        """The stored deltas by name."""
        return self.disk.deltas

    @property
    def checkpoints(self) -> MemoryCheckpoints:
        """The stored checkpoints."""
        return self.disk.checkpoints

    @property
    def round(self) -> int:
        """The round that it is in; 0 while it is down."""
        progress = self.core.progress if self.core is not None else None
        return progress.round if progress is not None else 0

    @property
    def hash(self) -> bytes:
        """Hash of the newest folded model."""
        progress = self.core.progress if self.core is not None else None
        return progress.folded.model_hash if progress is not None and progress.folded else b""
