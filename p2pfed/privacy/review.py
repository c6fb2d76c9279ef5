"""Adding up a ledger's records anew: the epsilon after each, the totals of each data set.

Map: `extract.Extract` -> `review` -> `Review`: a `Row` per record, a `DataSet` per data set.

Invariant: nothing that a record says about totals is believed. Each is computed again from the
debits before it, with every data set that shares a patient counted, and a record that says less
than that, or breaks a rule that the ledger keeps (a debit within its limit, an output on the
newest debit of its round, one output per round), is an error. What the ledger told may be *more*
than is computed here, for a later version may know a better bound.

Not here: whether the records are those that were written (`extract`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from p2pfed.errors import LedgerCorrupt
from p2pfed.privacy.accountant import NANO, Budget, Cost, Route, Spending, forecast, how_spent
from p2pfed.privacy.extract import Extract, Record
from p2pfed.privacy.records import RECORDS_VERSION
from p2pfed.privacy.worth import WORTH

__all__ = ["DataSet", "Review", "Row", "review"]

_OF_ANOTHER = f"its records are of version {{}}, this version of p2pfed reads {RECORDS_VERSION}"


@dataclass(frozen=True, slots=True)
class Row:
    """One record, and what its data set has spent after it.

    Attributes:
        record: The record.
        dataset: Hexadecimal id of the data set concerned; empty for "open".
        epsilon: After it, at the delta of its debit; None where nothing was ever debited.
        route: Which theorem gave it.
    """

    record: Record
    dataset: str
    epsilon: float | None = None
    route: Route | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """What the patients of one data set have spent, over all data sets that share one of them.

    Attributes:
        id: Hexadecimal.
        name: As it was registered.
        shares_with: Ids of other data sets with at least one patient in common.
        limit: The ceiling as the newest debit has it; None before the first.
        rho_nano: Sum of all debits that count, in 1e-9.
        epsilon: At the limit's delta; 0 before the first debit.
        route: Which theorem gave it.
        debits: Number of debits that count.
        releases: Number of outputs drawn on them.
        unprotected: Of these, how many left without noise.
        left: How many more releases like the newest fit; None where that says nothing.
        last_round: The round after which it stops, if it releases in each; None likewise.
    """

    id: str
    name: str
    shares_with: tuple[str, ...]
    limit: Budget | None
    rho_nano: int
    epsilon: float
    route: Route | None
    debits: int
    releases: int
    unprotected: int
    left: int | None
    last_round: int | None


@dataclass(frozen=True, slots=True)
class Review:
    """All rows, oldest first, and all data sets, in the order of their registration."""

    rows: tuple[Row, ...]
    datasets: tuple[DataSet, ...]


@dataclass(slots=True)
class _Tally:
    name: str
    touching: set[str]
    costs: Counter[Cost] = field(default_factory=Counter)
    releases: int = 0
    unprotected: int = 0


def review(extract: Extract, *, name: str, at_most: bool = False) -> Review:
    """Add up all records.

    Args:
        extract: The records.
        name: Of the file, for errors.
        at_most: Data sets may share less than the records say (`extract.as_told`): totals are upper
            bounds, and are not held against what the outputs say.

    Raises:
        LedgerCorrupt: The records contradict each other.
    """
    adding = _Adding(at_most)
    rows = []
    for record in extract.records:
        try:
            rows.append(adding.add(record))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _wrong(name, record, f"it is not understood ({error!r})") from error
        except _Contradiction as error:
            raise _wrong(name, record, str(error)) from error
    return Review(tuple(rows), tuple(adding.dataset(one) for one in adding.tallies))


class _Contradiction(Exception):
    """Why a record cannot stand where it stands."""


class _Adding:
    """Everything that the records so far add up to."""

    def __init__(self, at_most: bool) -> None:
        self.tallies: dict[str, _Tally] = {}
        self._at_most = at_most
        self._debits: dict[int, dict[str, Any]] = {}
        self._newest: dict[tuple[str, int], int] = {}
        self._outputs: set[tuple[str, int]] = set()

    def add(self, record: Record) -> Row:
        fields = dict(record.fields)
        match fields["kind"]:
            case "open":
                _must(record.seq == 1, "a ledger is opened once, by its first record")
                version = fields.get("version")
                _must(version == RECORDS_VERSION, _OF_ANOTHER.format(version))
                return Row(record, "")
            case "register":
                return self._register(record, fields)
            case "debit":
                return self._debit(record, fields)
            case "output":
                return self._output(record, fields)
            case kind:
                raise _Contradiction(f"its kind {kind!r} is unknown: a newer version wrote it")

    def _register(self, record: Record, fields: dict[str, Any]) -> Row:
        mine = str(fields["dataset"])
        _must(mine not in self.tallies, "its data set is registered already")
        shares = set(fields["shares_with"])
        _must(shares <= set(self.tallies), "it shares patients with an unknown data set")
        self.tallies[mine] = _Tally(str(fields["name"]), {mine, *shares})
        for other in shares:
            self.tallies[other].touching.add(mine)
        return Row(record, mine)

    def _debit(self, record: Record, fields: dict[str, Any]) -> Row:
        key, dataset = (fields["run"], fields["round"]), fields["dataset"]
        earlier = self._debits.get(self._newest.get(key, 0), {"attempt": 0})
        _must(dataset in self.tallies, "its data set is not registered")
        _must(key not in self._outputs, "its round has its output already")
        _must(fields["attempt"] == earlier["attempt"] + 1, "it does not count the attempts")
        self._debits[record.seq], self._newest[key] = fields, record.seq
        self.tallies[dataset].costs[_cost(fields)] += 1
        epsilon, route = how_spent(self._together(dataset).costs, fields["delta"])
        fits = epsilon <= fields["epsilon"] or fields["mechanism"] == "none"
        _must(self._at_most or fits, f"it raises epsilon to {epsilon:.4g}, beyond its limit")
        return Row(record, dataset, epsilon, route)

    def _output(self, record: Record, fields: dict[str, Any]) -> Row:
        debit = self._debits[fields["debit"]]
        key, tally = (debit["run"], debit["round"]), self.tallies[debit["dataset"]]
        _must(self._newest[key] == fields["debit"], "its debit is not the newest of its round")
        _must(key not in self._outputs, "its round has its output already")
        self._outputs.add(key)
        tally.releases += 1
        tally.unprotected += debit["mechanism"] == "none"
        epsilon, route = how_spent(self._together(debit["dataset"]).costs, debit["delta"])
        if not self._at_most:
            self._check_totals(debit["dataset"], fields, epsilon)
        return Row(record, debit["dataset"], epsilon, route)

    def _check_totals(self, dataset: str, fields: dict[str, Any], epsilon: float) -> None:
        together = self._together(dataset)
        found = {
            "spent": _rho_nano(together.costs),
            "debits": together.costs.total(),
            "releases": together.releases,
            "unprotected": together.unprotected,
        }
        for name, value in found.items():
            _must(fields[name] == value, f"it says {name} {fields[name]}, the records {value}")
        less = f"it told epsilon {fields['told']:.6g}, less than the {epsilon:.6g} that was spent"
        _must(fields["told"] >= epsilon, less)

    def _together(self, dataset: str) -> _Tally:
        whole = _Tally("", set())
        for other in self.tallies[dataset].touching:
            tally = self.tallies[other]
            whole.costs.update(tally.costs)
            whole.releases += tally.releases
            whole.unprotected += tally.unprotected
        return whole

    def dataset(self, dataset: str) -> DataSet:
        tally, together = self.tallies[dataset], self._together(dataset)
        mine = [debit for debit in self._debits.values() if debit["dataset"] in tally.touching]
        limit, epsilon, route = None, 0.0, None
        if mine:
            limit = Budget(mine[-1]["epsilon"], mine[-1]["delta"])
            epsilon, route = how_spent(together.costs, limit.delta)
        left, last_round = _forecast(mine, together.costs, limit)
        return DataSet(
            id=dataset,
            name=tally.name,
            shares_with=tuple(one for one in self.tallies if one in tally.touching - {dataset}),
            limit=limit,
            rho_nano=_rho_nano(together.costs),
            epsilon=epsilon,
            route=route,
            debits=together.costs.total(),
            releases=together.releases,
            unprotected=together.unprotected,
            left=left,
            last_round=last_round,
        )


def _forecast(
    debits: list[dict[str, Any]], costs: Spending, limit: Budget | None
) -> tuple[int | None, int | None]:
    """How many more releases like the newest fit, and the last round if each round releases."""
    newest = next((debit for debit in reversed(debits) if debit["mechanism"] != WORTH), None)
    if limit is None or newest is None or not newest["rho_nano"]:
        return None, None
    asked = (one for one in reversed(debits) if one["mechanism"] == WORTH)
    worth = next((one for one in asked if one["run"] == newest["run"]), None)
    if worth is None:
        left = forecast(limit, costs, _cost(newest))
        return left, newest["round"] + left
    both = Fraction(newest["rho_nano"] + worth["rho_nano"], NANO)
    return forecast(limit, costs, Cost.zcdp(both)), None


def _cost(debit: dict[str, Any]) -> Cost:
    return Cost(debit["rho_nano"], debit["pure_nano"])


def _rho_nano(costs: Spending) -> int:
    return sum(cost.rho_nano * count for cost, count in costs.items())


def _must(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _Contradiction(otherwise)


def _wrong(name: str, record: Record, why: str) -> LedgerCorrupt:
    return LedgerCorrupt(
        f"{name} does not add up: record {record.seq}", why, "a person has to look at it"
    )
