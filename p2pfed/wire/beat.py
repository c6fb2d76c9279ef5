"""The beat: the one message that says who a node is and what it holds; different in each version.

    1  ends with the addresses
    2  may go on with a measure (`measure`), and with at most `MAX_ADDED` items that later versions
       put behind it, which are passed over

Invariant: what is written for a version can be read by it, whatever else this node knows.

Not here: what a node puts into one (`gossip/introduction.py`), when it is sent and what follows
(`gossip/heartbeat.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from p2pfed.wire.codec import Items
from p2pfed.wire.measure import Measure, read_measure

__all__ = ["MAX_ADDRESSES", "Beat", "beat_items", "is_sayable", "read_beat"]

HASH_BYTES = 16  # of a digest
MAX_ADDRESSES = 16
MAX_ADDRESS = 256  # bytes, as of every text
MAX_ROUND = 1 << 31
MAX_ADDED = 4  # items that later versions may put behind the last one known


@dataclass(frozen=True, slots=True)
class Beat:
    """I am here; this is what I hold.

    Attributes:
        sequence: Grows with every beat of this process; answered by `Ack`.
        network_id: 32 bytes; another one ends the connection.
        run_id: The run that this node takes part in, 32 bytes, or empty.
        task_id: Hash of its task, 32 bytes, or empty.
        round: The round that it is in.
        contributes: Whether its deltas are to be waited for.
        model_round: The round of its newest model.
        model_hash: Hash of that model, 32 bytes, or empty.
        documents: Digest of its rosters and proofs.
        addresses: Multiaddrs under which it can be dialled.
        measure: What its hospital lets all members know of its newest evaluation; from version 2
            on.
    """

    sequence: int
    network_id: bytes
    run_id: bytes
    task_id: bytes
    round: int
    contributes: bool
    model_round: int
    model_hash: bytes
    documents: bytes
    addresses: tuple[str, ...]
    measure: Measure | None = None


def is_sayable(address: str) -> bool:
    """Whether an address may be in a beat: a relay of ours may have a name that is too long."""
    return len(address.encode("utf-8")) <= MAX_ADDRESS and address.isprintable()


def beat_items(beat: Beat, version: int) -> tuple[Any, ...]:
    """The fields of a beat as a version has them."""
    measure = beat.measure if version > 1 else None
    told = () if measure is None else ((measure.name, measure.round, measure.hundredths),)
    return (
        beat.sequence,
        beat.network_id,
        beat.run_id,
        beat.task_id,
        beat.round,
        beat.contributes,
        beat.model_round,
        beat.model_hash,
        beat.documents,
        beat.addresses,
        *told,
    )


def read_beat(items: Items, version: int) -> Beat:
    """Read the fields of a beat.

    Raises:
        RemoteProtocolError: They are not what the version says.
    """
    beat = Beat(
        sequence=items.integer(),
        network_id=items.raw(32),
        run_id=items.raw(0, 32),
        task_id=items.raw(0, 32),
        round=items.integer(0, MAX_ROUND),
        contributes=items.flag(),
        model_round=items.integer(0, MAX_ROUND),
        model_hash=items.raw(0, 32),
        documents=items.raw(HASH_BYTES),
        addresses=items.texts(MAX_ADDRESSES),
    )
    if version == 1 or items.at_end():
        return beat
    measure = read_measure(items)
    items.skip(MAX_ADDED)
    return beat if measure is None else replace(beat, measure=measure)
