"""What the ledger's records say: payments, outputs and totals as values.

Map: `ReleaseKey` (which release) -> `Debit` (its payment) -> `StoredOutput` (what was drawn on it)
with `Spent` (what that adds up to); `Entry` is any record as it may be shown.

Invariant: plain values without I/O. None holds the ledger's secret or a patient's fingerprint.

Not here: what may be written and when (`ledger`), the bytes and their chain (`journal`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NewType, Self

from p2pfed.privacy.accountant import Cost, Route

__all__ = [
    "RECORDS_VERSION",
    "DataSetId",
    "Debit",
    "Entry",
    "ReleaseKey",
    "Spent",
    "StoredOutput",
    "fingerprints",
]

RECORDS_VERSION: Final = 2
"""What the record "open" says about all that follow; another version may mean them otherwise."""

DataSetId = NewType("DataSetId", bytes)


def fingerprints(joined: str) -> frozenset[str]:
    """Return the patients' fingerprints, 32 hexadecimal digits each, of a record "register"."""
    return frozenset(joined[start : start + 32] for start in range(0, len(joined), 32))


@dataclass(frozen=True, slots=True)
class ReleaseKey:
    """Names one release of this hospital: there is at most one per run and round.

    Attributes:
        run_id: The run's hash.
        round: The round's number.
    """

    run_id: bytes
    round: int


@dataclass(frozen=True, slots=True)
class Debit:
    """A durable payment; it allows one draw.

    Attributes:
        seq: Number of its record in the ledger.
        key: The release it pays for.
        attempt: 1 for the first payment under this key, 2 after a crash before the output, ...
        dataset: Whose patients.
        cost: What was paid.
        mechanism: "svt", "gaussian" or "none".
        unit: "patient" or "hospital".
        relation: Name of the neighbouring relation that the cost holds for.
        delta: Delta of the budget it was made under.
    """

    seq: int
    key: ReleaseKey
    attempt: int
    dataset: DataSetId
    cost: Cost
    mechanism: str
    unit: str
    relation: str
    delta: float

    @classmethod
    def of(cls, seq: int, fields: Mapping[str, Any]) -> Self:
        """Read the fields of a record "debit"."""
        return cls(
            seq,
            ReleaseKey(bytes.fromhex(fields["run"]), fields["round"]),
            fields["attempt"],
            DataSetId(bytes.fromhex(fields["dataset"])),
            Cost(fields["rho_nano"], fields["pure_nano"]),
            fields["mechanism"],
            fields["unit"],
            fields["relation"],
            fields["delta"],
        )


@dataclass(frozen=True, slots=True)
class Spent:
    """What the patients of a data set have spent.

    Attributes:
        rho_nano: Sum of all debits that count, in nano-rho.
        epsilon: The epsilon of these debits at the delta asked for, rounded up. It speaks of the
            noisy releases only: see `unprotected`.
        route: Which theorem gave it, see `accountant.how_spent`.
        debits: Number of debits that count.
        releases: Number of outputs drawn on them, "none" included.
        unprotected: Number of outputs that left without any noise; above 0 no epsilon protects.
        head: 32 bytes that stand for the whole ledger.
    """

    rho_nano: int
    epsilon: float
    route: Route
    debits: int
    releases: int
    unprotected: int
    head: bytes


@dataclass(frozen=True, slots=True)
class StoredOutput:
    """What was drawn for a key, and what had been spent when it was stored.

    Attributes:
        payload: The bytes given to `store_output`.
        debit: The payment it was drawn on.
        spent: As of the moment of storing, so that a repeat tells exactly the same.
    """

    payload: bytes
    debit: Debit
    spent: Spent


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the ledger for display; no secret, no fingerprint.

    Attributes:
        seq: Its number.
        kind: "open", "register", "debit" or "output".
        at: Unix time in seconds.
        detail: The other fields.
        chain: 32 bytes that stand for the ledger up to here.
    """

    seq: int
    kind: str
    at: int
    detail: Mapping[str, Any]
    chain: bytes
