"""The privacy gate: the one entry through which anything of the patients leaves the trainer.

Invariant: the order is fixed: validate and clip (spends nothing) -> debit, durable -> noise ->
output, durable -> return. So a crash at any point never yields more outputs than debits, and a
round that has an output returns it again, byte for byte, with the same spent budget and head.

With a `worth.WorthGate` a test comes first: its own debit, durable -> threshold noise -> one "no"
per round, free, until a "yes" lets the round go on as above.

A refused update (NaN, infinity, wrong shape) is visible to peers as a skipped round and is not
accounted: contributions must be computed so that no patient's values can cause one.

Not here: computing contributions, signing and sending the result.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfed.errors import UpdateRejected
from p2pfed.privacy.accountant import Budget, Cost
from p2pfed.privacy.ledger import DataSetId, Debit, Ledger, ReleaseKey, Spent, StoredOutput
from p2pfed.privacy.mechanism import Mechanism, Release
from p2pfed.privacy.noise import ExactNoise, NoiseSource
from p2pfed.privacy.units import Contributions
from p2pfed.privacy.worth import WORTH, WorthGate

__all__ = ["NotWorth", "Released", "decode_release", "encode_release", "release_round"]

_HEAD = struct.Struct("<BBI")
_KINDS = ("<i1", "<i2", "<i4", "<i8")


@dataclass(frozen=True, slots=True, eq=False)
class Released:
    """What left the gate for one round, and what it had cost by then.

    Attributes:
        release: Indices and values in grid units.
        mechanism: The mechanism it was drawn with.
        unit: The unit of privacy it was drawn for.
        spent: Cumulative, as of this release; `spent.head` is the ledger's head.
    """

    release: Release
    mechanism: str
    unit: str
    spent: Spent


@dataclass(frozen=True, slots=True)
class NotWorth:
    """The worth gate said "no": nothing was released, and nothing more was paid.

    Attributes:
        spent: As of now; what the gate's instance costs is in it.
    """

    spent: Spent


def release_round(
    contributions: Contributions,
    *,
    plan: Mechanism,
    ledger: Ledger,
    dataset: DataSetId,
    key: ReleaseKey,
    budget: Budget,
    worth: WorthGate | None = None,
    noise: Callable[[], NoiseSource] = ExactNoise,
) -> Released | NotWorth:
    """Release one round's update, or give again what was released for it before.

    Formal guarantee: between neighbours as `plan.unit` has them, everything ever released on a
    patient's data through one ledger, the answers of worth gates included, is together (epsilon,
    delta)-differentially private within the budget; the mechanism "none" has no guarantee.

    Args:
        contributions: One row per patient or group (one row in all for the unit "hospital").
        plan: The round's public plan.
        ledger: The open ledger.
        dataset: Whose patients; from `Ledger.register`.
        key: Run and round.
        budget: The lifetime ceiling.
        worth: Asked whether the round is worth its budget; opened, and paid for, where it is not.
        noise: Makes the source of this release's noise.

    Returns:
        The release with the budget spent so far.

    Raises:
        UpdateRejected: NaN, infinity or wrong shape. Nothing was spent, unless it shows in the
            second reading of "svt" only: then the debit stays.
        BudgetExhausted: The budget does not allow it; nothing was spent.
        PrivacyError: The ledger cannot be written; nothing leaves.
    """
    stored = ledger.output(key)
    if stored is None:
        if plan.unit.kind == "hospital" and contributions.num_patients != 1:
            raise UpdateRejected(
                f"{contributions.num_patients} contributions for the unit 'hospital'",
                "the hospital as a whole makes one",
            )
        total = plan.total(contributions)

        def pay(cost: Cost, mechanism: str) -> Debit:
            return ledger.debit(
                dataset,
                key=key,
                cost=cost,
                mechanism=mechanism,
                unit=plan.unit.kind,
                relation=plan.unit.neighbours,
                budget=budget,
            )

        fresh = noise()
        if worth is not None:
            if not worth.is_open:
                ledger.check(
                    dataset, [worth.plan.cost, plan.cost], budget
                )  # a "yes" must be of use
                pay(worth.plan.cost, WORTH)
                worth.open(plan, fresh)
            if not worth.ask(plan, total, fresh):
                return NotWorth(ledger.spent(dataset, delta=budget.delta))
        debit = pay(plan.cost, plan.name)
        release = plan.draw(total, contributions, fresh)
        stored = ledger.store_output(debit, encode_release(release))
    return _released(stored)


def encode_release(release: Release) -> bytes:
    """Return a release as bytes, as short as whole bytes per number allow.

    Layout, little endian: bytes per index (0: the indices are 0, 1, 2, ...), bytes per value (one
    byte each), the number of pairs (uint32), the indices, the values.
    """
    count = release.indices.size
    dense = bool(count) and release.indices[-1] == count - 1  # they grow, so none is left out
    kind = "" if dense else _narrowest(release.indices)
    value = _narrowest(release.values)
    head = _HEAD.pack(np.dtype(kind).itemsize if kind else 0, np.dtype(value).itemsize, count)
    indices = release.indices.astype(kind).tobytes() if kind else b""
    return head + indices + release.values.astype(value).tobytes()


def _narrowest(numbers: NDArray[Any]) -> str:
    low, high = (int(numbers.min()), int(numbers.max())) if numbers.size else (0, 0)
    fits = (k for k in _KINDS if np.iinfo(k).min <= low and high <= np.iinfo(k).max)
    return next(fits)


def decode_release(payload: bytes) -> Release:
    """Return the release that `encode_release` made these bytes of.

    Raises:
        ValueError: The length is not what the head says.
    """
    if len(payload) < _HEAD.size:
        raise ValueError(f"a release of {len(payload)} bytes")
    per_index, per_value, count = _HEAD.unpack_from(payload)
    by_size = {np.dtype(kind).itemsize: kind for kind in _KINDS}
    if len(payload) != _HEAD.size + count * (per_index + per_value) or per_value not in by_size:
        raise ValueError(f"a release of {len(payload)} bytes claims {count} pairs")
    split = _HEAD.size + count * per_index
    indices = np.arange(count, dtype=np.int64)
    if per_index:
        indices = np.frombuffer(payload, by_size[per_index], count, _HEAD.size).astype(np.int64)
    values = np.frombuffer(payload, by_size[per_value], count, split).astype(np.int64)
    return Release(indices, values)


def _released(stored: StoredOutput) -> Released:
    release = decode_release(stored.payload)
    return Released(release, stored.debit.mechanism, stored.debit.unit, stored.spent)
