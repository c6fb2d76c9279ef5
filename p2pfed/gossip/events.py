"""What comes into the core (events) and what goes out of it (effects); plain frozen values.

The shell performs effects in the order given. `StoreDelta` of the node's own delta comes before the
first message that names it, so that after a crash the same bytes are sent again and never others.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from p2pfed.gossip.facts import Counted
from p2pfed.gossip.meeting_events import PairEffect, PairEvent
from p2pfed.wire.delta import Delta
from p2pfed.wire.messages import CheckpointOffer
from p2pfed.wire.versions import NEWEST

__all__ = [
    "CheckpointFetched",
    "CheckpointsChanged",
    "Connected",
    "Disconnect",
    "Disconnected",
    "Effect",
    "Event",
    "FetchCheckpoint",
    "Fold",
    "FoldFellShort",
    "Folded",
    "JoinNetwork",
    "Keep",
    "LeaveNetwork",
    "Note",
    "Received",
    "Released",
    "RosterOffered",
    "Send",
    "SendStored",
    "SendWitness",
    "SetSharing",
    "StopDialling",
    "StoreDelta",
    "StoreProof",
    "StoreRoster",
    "Tick",
    "Train",
    "TrainerChanged",
    "TrainingEnded",
    "Unlike",
]


# --- events ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; `wall` is the calendar time, for the expiry of rosters only."""

    wall: dt.datetime


@dataclass(frozen=True, slots=True)
class Connected:
    """An authenticated connection to a peer is up; `version` of the wire is spoken on it."""

    peer: str
    version: int = NEWEST


@dataclass(frozen=True, slots=True)
class Unlike:
    """A peer was met that speaks none of our versions; empty where it did not say which ones."""

    peer: str
    versions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection to a peer is gone."""

    peer: str


@dataclass(frozen=True, slots=True)
class Received:
    """A peer sent a frame on a stream of some version."""

    peer: str
    frame: bytes = field(repr=False)
    version: int = NEWEST


@dataclass(frozen=True, slots=True)
class RosterOffered:
    """A signed roster came from the operator or with a new connection."""

    signed: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Released:
    """The gate released a payload for a round; the core adds the header and signs."""

    round: int
    payload: bytes = field(repr=False)
    num_released: int
    mechanism: str
    spent_nano_rho: int
    releases: int
    ledger_head: bytes


@dataclass(frozen=True, slots=True)
class TrainingEnded:
    """The trainer has nothing for this round.

    Attributes:
        round: The round that was asked for.
        outcome: `skipped` or `failed` (this round only), `exhausted`, `refused` or `rolled-back`
            (from now on).
        reason: For people.
    """

    round: int
    outcome: str
    reason: str


@dataclass(frozen=True, slots=True)
class Folded:
    """The fold up to `round` is done; `chain` is what it stands for."""

    round: int
    chain: bytes
    model_hash: bytes


@dataclass(frozen=True, slots=True)
class FoldFellShort:
    """A fold found no state to start from: its plan has to begin with the genesis."""


@dataclass(frozen=True, slots=True)
class CheckpointsChanged:
    """The checkpoints on disk, as they are offered to joiners."""

    offers: tuple[CheckpointOffer, ...]


@dataclass(frozen=True, slots=True)
class CheckpointFetched:
    """A checkpoint asked for by `FetchCheckpoint` arrived, or not."""

    offer: CheckpointOffer
    ok: bool


@dataclass(frozen=True, slots=True)
class SetSharing:
    """The operator switched sharing on or off."""

    on: bool


@dataclass(frozen=True, slots=True)
class TrainerChanged:
    """The trainer process came up or went down; `lost` if it does so again and again."""

    up: bool
    lost: bool = False


@dataclass(frozen=True, slots=True)
class LeaveNetwork:
    """The operator leaves: say goodbye to everyone, and nothing more."""


@dataclass(frozen=True, slots=True)
class JoinNetwork:
    """The operator comes back."""


Event = (
    Tick
    | Connected
    | Unlike
    | Disconnected
    | Received
    | RosterOffered
    | Released
    | TrainingEnded
    | Folded
    | FoldFellShort
    | CheckpointsChanged
    | CheckpointFetched
    | SetSharing
    | TrainerChanged
    | LeaveNetwork
    | JoinNetwork
    | PairEvent
)


# --- effects -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Send a frame to a connected peer; may be lost."""

    peer: str
    frame: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SendStored:
    """Send stored facts to a peer; `deltas` are full names, the documents are at hand."""

    peer: str
    deltas: tuple[bytes, ...] = field(repr=False)
    rosters: tuple[bytes, ...] = field(default=(), repr=False)
    proofs: tuple[bytes, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class SendWitness:
    """Send a peer the newest stored header that it signed, of every run."""

    peer: str


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close the connection to a peer; `blame` counts against it."""

    peer: str
    reason: str
    blame: bool


@dataclass(frozen=True, slots=True)
class Keep:
    """Keep a connection to a peer, dialling for ever.

    Attributes:
        peer: Whom.
        addresses: Where it may be.
        has_left: It said goodbye, perhaps to be started anew: dial later and seldom.
    """

    peer: str
    addresses: tuple[str, ...]
    has_left: bool = False


@dataclass(frozen=True, slots=True)
class StopDialling:
    """Do not dial this peer any more."""

    peer: str


@dataclass(frozen=True, slots=True)
class StoreDelta:
    """Keep a delta; `own` ones durably before anything that follows."""

    delta: Delta
    own: bool


@dataclass(frozen=True, slots=True)
class StoreRoster:
    """Keep a believed roster."""

    version: int
    roster_hash: bytes
    signed: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class StoreProof:
    """Keep a proof of equivocation."""

    origin: str
    proof: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Train:
    """Ask the trainer for a contribution to `round`, made from the model of the last fold.

    Attributes:
        round: The round.
        samples: This hospital's public number of patients.
        scale: What the released values are multiplied by; a public number.
    """

    round: int
    samples: int
    scale: Fraction = Fraction(1)


@dataclass(frozen=True, slots=True)
class Fold:
    """Fold all that counts before `round`, outside the core.

    Attributes:
        round: The round whose model is wanted.
        chains: `chains[k]` is what a state of round `first + k` must stand for, up to `round`.
        plan: `plan[k]` are the deltas of round `first + k` that count.
        adopted: Before this round the plan may have holes: only a checkpoint of this round or a
            newer one stands for its chain.
        first: The oldest round of which the plan tells; a state of it should be at hand.
    """

    round: int
    chains: tuple[bytes, ...] = field(repr=False)
    plan: tuple[tuple[Counted, ...], ...] = field(repr=False)
    adopted: int = 0
    first: int = 0

    def chain(self, round_: int) -> bytes | None:
        """What a state of this round must stand for; None if the plan does not say."""
        return self.chains[round_ - self.first] if self.first <= round_ <= self.round else None

    def deltas(self, round_: int) -> tuple[Counted, ...]:
        """The deltas of a round that count, from `first` on."""
        return self.plan[round_ - self.first]


@dataclass(frozen=True, slots=True)
class FetchCheckpoint:
    """Fetch a checkpoint that enough peers vouch for, from one of them."""

    offer: CheckpointOffer
    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Note:
    """Something an operator may want to see in the event log."""

    type: str
    data: Mapping[str, Any]


Effect = (
    Send
    | SendStored
    | SendWitness
    | Disconnect
    | Keep
    | StopDialling
    | StoreDelta
    | StoreRoster
    | StoreProof
    | Train
    | Fold
    | FetchCheckpoint
    | Note
    | PairEffect
)
