"""The lifetime privacy budget of a hospital's patients, kept across runs, tasks and mechanisms.

Map: `Ledger.open` -> `register` (who the patients are) -> `debit` (pay, durably) ->
`store_output` (keep what was drawn, durably) -> `output` (give the same again).

Invariant: over any crash and restart, every stored output has its own earlier debit, and the
debits that touch a patient never add up to more than the budget that was passed. A stored output
is given again for the same key and never redrawn; a debit without output stays spent.

A data set is its patients, not its name: each patient has a fingerprint (BLAKE2b under a secret
that never leaves the ledger), and a debit counts against every data set that shares at least one
patient with the one it was made for. So no renaming, splitting, merging or adding of patients
refills a budget. For each patient this is at least what was spent on that patient. But *who* shares
a data set is not hidden: what was spent is told to the peers, and grows when one patient links two
data sets.

The values that it takes and gives (`records`) can be imported from here too: whoever holds a
ledger needs them.

Not here: storage (`journal`), conversions (`accountant`), the order of a release (`gate`).
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, Self

from p2pfed.errors import BudgetExhausted, LedgerCorrupt, PrivacyError
from p2pfed.privacy.accountant import Budget, Cost, Spending, allows, epsilon_spent, how_spent
from p2pfed.privacy.journal import Journal, JournalEntry
from p2pfed.privacy.records import (
    RECORDS_VERSION,
    DataSetId,
    Debit,
    Entry,
    ReleaseKey,
    Spent,
    StoredOutput,
    fingerprints,
)
from p2pfed.privacy.units import PrivacyUnit

__all__ = ["DataSetId", "Debit", "Ledger", "ReleaseKey", "Spent", "StoredOutput"]

_NOTHING: Final[Counter[Cost]] = Counter()


@dataclass(slots=True)
class _Tally:
    """Running counts of one data set's own debits, so that no question reads all records."""

    costs: Counter[Cost] = field(default_factory=Counter)
    releases: int = 0
    unprotected: int = 0

    def add(self, other: _Tally) -> None:
        self.costs.update(other.costs)
        self.releases += other.releases
        self.unprotected += other.unprotected


class Ledger:
    """The open ledger. Use it as a context manager, from one thread of one process."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._secret = b""
        self._patients: dict[DataSetId, frozenset[str]] = {}
        self._touching: dict[DataSetId, set[DataSetId]] = {}  # share a patient; itself as well
        self._tallies: dict[DataSetId, _Tally] = {}
        self._debits: dict[int, Debit] = {}
        self._newest: dict[ReleaseKey, Debit] = {}
        self._runs: defaultdict[bytes, Counter[Cost]] = defaultdict(Counter)
        self._outputs: dict[ReleaseKey, int] = {}
        self._fields: list[dict[str, Any]] = []
        for entry in journal.entries:
            self._apply(entry)
        if not self._secret:
            secret = os.urandom(32).hex()
            self._write({"kind": "open", "version": RECORDS_VERSION, "secret": secret})

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the ledger, or make it where there is none.

        Raises:
            StateInUse: Another process has it open.
            LedgerCorrupt: It does not verify, or is of another version.
            ConfigError: It is readable or writable by others.
            PrivacyError: The storage failed.
        """
        journal = Journal.open(path)
        try:
            return cls(journal)
        except BaseException:
            journal.close()
            raise

    def close(self) -> None:
        """Close the file and free its lock."""
        self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def head(self) -> bytes:
        """32 bytes that stand for the whole ledger; signed deltas carry it."""
        return self._journal.head

    def knows(self, heads: Iterable[bytes]) -> bool:
        """Whether it ever had each of these heads; one that forgot its own is an old copy."""
        return {entry.chain for entry in self._journal.entries}.issuperset(heads)

    def register(self, name: str, patient_records: Iterable[bytes]) -> DataSetId:
        """Make a data set known by its patients; the same patients give the same id.

        Args:
            name: For display; has no influence on the budget.
            patient_records: One for each patient: bytes that name the patient and do not change
                when the data are edited or processed anew (a record number), or the raw record
                where there is no such number.

        Raises:
            PrivacyError: There is no patient, or the storage failed.
        """
        patients = frozenset(
            blake2b(record, digest_size=16, key=self._secret).hexdigest()
            for record in patient_records
        )
        if not patients:
            raise PrivacyError(f"data set {name!r} has no patients", "there is nobody to protect")
        joined = "".join(sorted(patients))
        digest = blake2b(joined.encode(), digest_size=32, key=self._secret).digest()
        dataset = DataSetId(digest)
        if dataset not in self._patients:
            fields = {"name": name, "dataset": dataset.hex(), "patients": joined}
            self._write({"kind": "register", **fields})
        return dataset

    def debit(
        self,
        dataset: DataSetId,
        *,
        key: ReleaseKey,
        cost: Cost,
        mechanism: str,
        unit: PrivacyUnit,
        relation: str,
        budget: Budget,
    ) -> Debit:
        """Pay for one draw; durable when this returns.

        Args:
            dataset: What `register` returned.
            key: The release to pay for; it must have no output yet.
            cost: What to pay; nothing for the mechanism "none" only.
            mechanism: Its name.
            unit: The unit of privacy.
            relation: Name of the neighbouring relation that the cost holds for.
            budget: The ceiling at this time.

        Raises:
            BudgetExhausted: All costs together would pass the budget; nothing was written.
            PrivacyError: Unknown data set, key with an output already, or the storage failed.
            ValueError: The cost does not fit the mechanism.
        """
        if (cost == Cost.nothing()) != (mechanism == "none"):
            raise ValueError(f"{cost} does not fit mechanism={mechanism!r}")
        if dataset not in self._patients:
            raise PrivacyError("the data set is not in this ledger", "", "Register its patients.")
        if key in self._outputs:
            raise PrivacyError(
                f"round {key.round} has its output already", "a release is never drawn twice"
            )
        self._check(dataset, cost, budget)
        earlier = self._newest.get(key)
        fields = {
            "dataset": dataset.hex(),
            "run": key.run_id.hex(),
            "round": key.round,
            "attempt": 1 + (earlier.attempt if earlier else 0),
            "rho_nano": cost.rho_nano,
            "pure_nano": cost.pure_nano,
            "mechanism": mechanism,
            "unit": unit,
            "relation": relation,
            "epsilon": budget.epsilon,
            "delta": budget.delta,
        }
        return self._debits[self._write({"kind": "debit", **fields}).seq]

    def store_output(self, debit: Debit, payload: bytes) -> StoredOutput:
        """Keep what was drawn on a debit; durable when this returns.

        Raises:
            PrivacyError: The key has an output, the debit is not the newest of its key, or the
                storage failed; the draw must then be thrown away.
        """
        if debit.key in self._outputs or self._newest.get(debit.key) != debit:
            raise PrivacyError(
                f"round {debit.key.round}: this draw may not be stored",
                "its key has an output already, or a newer debit",
            )
        self._write({"kind": "output", "debit": debit.seq, **self._totals(debit)}, payload)
        stored = self.output(debit.key)
        assert stored is not None
        return stored

    def output(self, key: ReleaseKey) -> StoredOutput | None:
        """Return what was stored for a key, or None.

        Raises:
            LedgerCorrupt: The stored bytes do not verify.
        """
        seq = self._outputs.get(key)
        if seq is None:
            return None
        fields = self._fields[seq - 1]
        debit = self._debits[fields["debit"]]
        spent = Spent(
            fields["spent"],
            fields["told"],
            fields["route"],
            fields["debits"],
            fields["releases"],
            fields["unprotected"],
            self._journal.entries[seq - 1].chain,
        )
        return StoredOutput(self._journal.payload(seq), debit, spent)

    def spent(self, dataset: DataSetId, *, delta: float) -> Spent:
        """Return what the patients of a data set have spent so far, and the ledger's head.

        Raises:
            PrivacyError: The data set is not in this ledger.
            ValueError: `delta` is not in (0, 1).
        """
        return self._spent(self._count(dataset), delta)

    def costs(self, dataset: DataSetId) -> Spending:
        """Return the costs that count against the patients of a data set, and how many of each.

        Raises:
            PrivacyError: The data set is not in this ledger.
        """
        return self._count(dataset).costs

    def costs_of_run(self, run_id: bytes) -> Spending:
        """Return the costs of all debits made for a run, whoever's patients they touch."""
        return self._runs[run_id]

    def check(self, dataset: DataSetId, costs: Iterable[Cost], budget: Budget) -> None:
        """Refuse costs that would together pass the budget; writes nothing.

        Raises:
            BudgetExhausted: All costs together would pass the budget.
            PrivacyError: Unknown data set.
        """
        *first, last = costs
        self._check(dataset, last, budget, and_before=Counter(first))

    def entries(self) -> tuple[Entry, ...]:
        """Return all lines for display, oldest first."""
        hidden = {"kind", "at", "secret", "patients"}
        return tuple(
            Entry(
                entry.seq,
                fields["kind"],
                fields["at"],
                {name: value for name, value in fields.items() if name not in hidden},
                entry.chain,
            )
            for entry, fields in zip(self._journal.entries, self._fields, strict=True)
        )

    def _check(
        self,
        dataset: DataSetId,
        cost: Cost,
        budget: Budget,
        *,
        and_before: Counter[Cost] = _NOTHING,
    ) -> None:
        costs = self._count(dataset).costs + and_before
        if not allows(budget, costs, cost):
            now = epsilon_spent(costs, budget.delta)
            then = epsilon_spent(costs + Counter([cost]), budget.delta)
            raise BudgetExhausted(
                f"the release would raise epsilon from {now:.4g} to {then:.4g}",
                f"the budget of these patients is epsilon {budget.epsilon:g} "
                f"at delta {budget.delta:g}; nothing was spent",
                "The node stops contributing and goes on receiving.",
            )

    def _count(self, dataset: DataSetId) -> _Tally:
        """Return the debits and outputs that touch its patients."""
        if dataset not in self._patients:
            raise PrivacyError("the data set is not in this ledger", "", "Register its patients.")
        tally = _Tally()
        for other in self._touching[dataset]:
            tally.add(self._tallies[other])
        return tally

    def _spent(self, tally: _Tally, delta: float) -> Spent:
        epsilon, route = how_spent(tally.costs, delta)
        rho_nano = sum(cost.rho_nano * count for cost, count in tally.costs.items())
        debits = tally.costs.total()
        return Spent(rho_nano, epsilon, route, debits, tally.releases, tally.unprotected, self.head)

    def _totals(self, debit: Debit) -> dict[str, Any]:
        """Return the counts as they will be with this debit's output."""
        tally = self._count(debit.dataset)
        tally.add(_output_of(debit))
        spent = self._spent(tally, debit.delta)
        return {
            "spent": spent.rho_nano,
            "told": spent.epsilon,
            "route": spent.route,
            "debits": spent.debits,
            "releases": spent.releases,
            "unprotected": spent.unprotected,
        }

    def _write(self, fields: dict[str, Any], payload: bytes | None = None) -> JournalEntry:
        body = json.dumps({**fields, "at": int(time.time())}, sort_keys=True).encode()
        entry = self._journal.append(body, payload)
        self._apply(entry)
        return entry

    def _apply(self, entry: JournalEntry) -> None:
        """Take one verified record into memory: the only place that interprets records."""
        fields: dict[str, Any] = json.loads(entry.body)
        self._fields.append(fields)
        match fields["kind"]:
            case "open":
                _check_version(fields.get("version"))
                self._secret = bytes.fromhex(fields["secret"])
            case "register":
                patients = fingerprints(fields["patients"])
                dataset = DataSetId(bytes.fromhex(fields["dataset"]))
                self._tallies[dataset] = _Tally()
                self._patients[dataset] = patients
                self._touching[dataset] = set()
                for other, theirs in self._patients.items():
                    if not patients.isdisjoint(theirs):
                        self._touching[dataset].add(other)
                        self._touching[other].add(dataset)
            case "debit":
                debit = Debit.of(entry.seq, fields)
                self._debits[entry.seq] = self._newest[debit.key] = debit
                self._runs[debit.key.run_id][debit.cost] += 1
                self._tallies[debit.dataset].costs[debit.cost] += 1
            case "output":
                debit = self._debits[fields["debit"]]
                self._outputs[debit.key] = entry.seq
                self._tallies[debit.dataset].add(_output_of(debit))
            case kind:
                raise LedgerCorrupt(
                    f"ledger record {entry.seq} is of the unknown kind {kind!r}",
                    "a newer version may have written it",
                    "Use the newest version that ever opened this ledger.",
                )


def _output_of(debit: Debit) -> _Tally:
    return _Tally(releases=1, unprotected=int(debit.mechanism == "none"))


def _check_version(found: object) -> None:
    if found != RECORDS_VERSION:
        raise LedgerCorrupt(
            f"the ledger's records are of version {found}",
            f"this version of p2pfed reads version {RECORDS_VERSION}",
            "Nothing is released. Use the version that wrote it; never delete it.",
        )
