"""privacy ledger: every record with what it cost, the totals, and whether it all verifies.

Three sources: the trainer's private socket where one answers, else the ledger file, else an
auditor's export. None of them is changed; what is printed holds no secret and no fingerprint.
"""

from __future__ import annotations

import os
from pathlib import Path

from p2pfed.cli.files import read_bytes, write_new
from p2pfed.cli.locate import config_path, private_data
from p2pfed.cli.options import describe, with_socket
from p2pfed.cli.privacy import paragraph
from p2pfed.cli.text import emit, number, printable, table, utc
from p2pfed.errors import ConfigError, DaemonNotRunning

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Iterator
    from typing import Any

    from p2pfed.privacy.extract import Extract, Record
    from p2pfed.privacy.review import DataSet, Review, Row

__all__ = ["ledger"]

_LONGEST_EXPORT = 1 << 28  # bytes; a million records


def ledger(parser: ArgumentParser) -> None:
    """Fill in the command `privacy ledger`."""
    describe(
        parser,
        "Print and verify the privacy ledger: every record, and what each data set has spent.\n"
        "Without FILE it asks the trainer if one runs, else it reads the ledger that the\n"
        "configuration names. Nothing is changed. An export is for an auditor: no secret and no\n"
        "patient, but totals that can be added up again.",
        endpoint="GET /v1/ledger of the private socket, without FILE",
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="a ledger that no trainer has open")
    parser.add_argument(
        "--export", metavar="OUT", help="write an auditor's export; not overwritten"
    )
    parser.add_argument("--verify", metavar="EXPORT", help="verify and print an export instead")
    parser.add_argument(
        "--head",
        metavar="HEX",
        help="32 bytes that the ledger must have had as its head: from a signed delta of the node",
    )
    with_socket(parser)
    parser.set_defaults(run=_ledger)


def _ledger(args: Namespace) -> None:
    from p2pfed.privacy.extract import encode_export
    from p2pfed.privacy.review import review

    wanted = _head(args.head)
    source, name, extract = _read(args)
    found = review(extract, name=name, at_most=source == "trainer")
    at = None if wanted is None else extract.at_head(wanted)
    if args.export:
        write_new(args.export, encode_export(extract))
    data = {
        "source": source,
        "file": None if source == "trainer" else name,
        "verified": "by the trainer" if source == "trainer" else "here",
        "records": len(extract.records),
        "head": extract.head.hex(),
        "head_at_record": at,
        "entries": [_entry(row) for row in found.rows],
        "data_sets": [_data_set(one) for one in found.datasets],
        "export": args.export,
    }
    lines = [] if args.export else list(_rows(found))
    lines += [*_totals(found, at_most=source == "trainer"), *_verdict(source, extract, args, at)]
    emit(args, "privacy-ledger", data, lines)


def _head(text: str | None) -> bytes | None:
    if text is None:
        return None
    try:
        head = bytes.fromhex(text)
    except ValueError:
        head = b""
    if len(head) != 32:
        raise ConfigError(f"--head {text!r}", "a head has 64 hexadecimal digits", "copy all of it")
    return head


def _read(args: Namespace) -> tuple[str, str, Extract]:
    from p2pfed.privacy.extract import as_told, decode_export, read_ledger

    if args.verify:
        if args.file or args.export:
            other = "--export" if args.export else "a ledger"
            raise ConfigError(f"--verify and {other}", "one thing at a time", "give one of them")
        return (
            "export",
            args.verify,
            decode_export(read_bytes(args.verify, _LONGEST_EXPORT), name=args.verify),
        )
    if args.file is None:
        told = _told(args)
        if told is not None:
            if args.export:
                raise ConfigError(
                    "no export from a running trainer",
                    "it does not show what the chain is made of",
                    "run p2pfed task pause, this again, then p2pfed task resume",
                )
            return "trainer", "the trainer's ledger", as_told(told)
    path = Path(args.file) if args.file else _ledger_path(args)
    return "ledger", str(path), read_ledger(path)


def _told(args: Namespace) -> Any:
    """The entries that a running trainer shows; None without one."""
    try:
        answer = private_data(args, "ledger")
    except DaemonNotRunning as error:  # nothing says where
        raise ConfigError(
            "cannot tell where the ledger is",
            error.why,
            "name it: p2pfed privacy ledger FILE, or say where: p2pfed -c CONFIG privacy ledger",
        ) from error
    return answer.get("entries") if isinstance(answer, dict) else None


def _ledger_path(args: Namespace) -> Path:
    from p2pfed.config import load_settings

    named = args.socket or (None if args.config else os.environ.get("P2PFED_SOCKET"))
    found = None if named else config_path(args)
    if found is None:
        raise ConfigError(
            f"no trainer answers beside {named}",
            "it does not run, or you may not read its private socket",
            "name its ledger: p2pfed privacy ledger FILE",
        )
    return load_settings(found).ledger_path


# --- for programs ------------------------------------------------------------------------------


def _entry(row: Row) -> dict[str, Any]:
    record = row.record
    digests = {"body_digest": record.body_digest.hex(), "digest": record.digest.hex()}
    chain = {"chain": record.chain.hex(), **digests}
    after = {"epsilon_after": row.epsilon, "route": row.route}
    time = utc(record.fields["at"], "%Y-%m-%dT%H:%M:%SZ")
    return {**record.fields, "time": time, "seq": record.seq, **chain, **after}


def _data_set(one: DataSet) -> dict[str, Any]:
    shown = {name: getattr(one, name) for name in one.__dataclass_fields__}
    limit = one.limit and {"epsilon": one.limit.epsilon, "delta": one.limit.delta}
    return {**shown, "limit": limit, "shares_with": list(one.shares_with)}


# --- for people --------------------------------------------------------------------------------

_HEAD = (
    "SEQ",
    "TIME (UTC)",
    "KIND",
    "SET",
    "RUN",
    "ROUND",
    "TRY",
    "WHAT",
    "RHO",
    "PURE ε",
    "SUM ε",
)


def _rows(found: Review) -> Iterator[str]:
    names = _names(found)
    terms: dict[tuple[str, str], str] = {}
    debits: dict[int, Record] = {}
    rows = [_row(row, names, terms, debits) for row in found.rows]
    yield from table(_HEAD, rows)
    for (unit, relation), letter in terms.items():
        text = f"unit {unit}; neighbours by {relation}"
        yield from paragraph(printable(text), first=f"{letter}  ")
    yield ""


def _names(found: Review) -> dict[str, str]:
    return {one.id: f"D{i}" for i, one in enumerate(found.datasets, 1)}


def _row(
    row: Row, names: dict[str, str], terms: dict[tuple[str, str], str], debits: dict[int, Record]
) -> tuple[str, ...]:
    record, fields = row.record, row.record.fields
    kind = fields["kind"]
    start = (str(record.seq), utc(fields["at"]), kind, names.get(row.dataset, ""))
    if kind == "debit":
        debits[record.seq] = record
        who = (str(fields["unit"]), str(fields["relation"]))
        letter = terms.setdefault(who, f"({chr(ord('a') + len(terms) % 26)})")
        pure = fields["pure_nano"]
        costs = (_nano(fields["rho_nano"]), "-" if pure is None else _nano(pure))
        what = f"{fields['mechanism']} {letter}"
        return (*start, *_key(record), what, *costs, number(row.epsilon))
    if kind == "output":
        debit = debits[fields["debit"]]
        return (*start, *_key(debit), f"drawn on {debit.seq}", "", "", number(row.epsilon))
    return (*start, "", "", "", "", "", "", "")


def _key(debit: Record) -> tuple[str, str, str]:
    fields = debit.fields
    return str(fields["run"])[:8], str(fields["round"]), str(fields["attempt"])


def _nano(amount: int) -> str:
    return number(amount / 1e9)


def _totals(found: Review, *, at_most: bool) -> Iterator[str]:
    names = _names(found)
    for one in found.datasets:
        yield from paragraph(printable(one.name), first=f"{names[one.id]}  ")
        text = "nothing was debited yet"
        if one.limit is not None:
            bound = "at most " if at_most and one.shares_with else ""
            spent = f"{bound}ε {number(one.epsilon)} of {number(one.limit.epsilon)} spent"
            how = f"δ {number(one.limit.delta)}, route {one.route}; rho {_nano(one.rho_nano)}"
            counts = f"{one.debits} debits, {one.releases} releases"
            text = f"{spent} ({how}); {counts}{_forecast(one)}"
        yield from paragraph(text, first="    ")
        others = ", ".join(names[other] for other in one.shares_with)
        if others:
            may = "may share patients with" if at_most else "shares patients with"
            yield from paragraph(f"{may} {others}, whose debits count here too", first="    ")
        if one.unprotected:
            yield f"# warning: {one.unprotected} of them left WITHOUT noise: no ε protects them"
    if found.datasets:
        yield ""


def _forecast(one: DataSet) -> str:
    if one.left is None:
        return ""
    if one.left == 0:
        return "; no further one like the newest fits"
    until = "" if one.last_round is None else f": stops by itself at round ≈ {one.last_round}"
    return f"; about {one.left:,} more like the newest fit{until}"


def _verdict(source: str, extract: Extract, args: Namespace, at: int | None) -> Iterator[str]:
    count = len(extract.records)
    if source == "trainer":
        yield "verified by the trainer when it opened the ledger; not again here"
        yield f"{count} records, head {extract.head.hex()}"
    else:
        yield f"verified: {count} records, head {extract.head.hex()}"
    if source == "export":
        yield "recomputed: the whole chain, all totals, all limits, and the seal"
        yield from paragraph(
            f"not shown: the bodies of {_records(extract.hidden)}, which hold the ledger's secret"
            " or patients' fingerprints; the chain binds their digests, by which the hospital can"
            " prove on site what is said of them"
        )
    if args.export:
        yield f"export: {args.export}"
    if at is not None:
        place = "now" if at == count else f"after record {at} of {count}"
        yield f"the head asked for is the ledger's head {place}"
    elif source != "trainer":
        yield from paragraph(
            "An older copy or another ledger verifies as well: compare with the head in a signed"
            " delta of this node, which every member keeps, by --head HEX."
        )


def _records(numbers: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"record{'s' * (len(numbers) != 1)} {shown or '-'}{more}"
