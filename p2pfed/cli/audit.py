"""privacy audit: show on this machine that the gate does what it claims; no daemon, no budget.

One line per finding, as it comes. Exit 1 if a claim did not hold. Pictures are drawn only where
--out says so: they show real records.
"""

from __future__ import annotations

from p2pfed.cli.options import describe, with_json
from p2pfed.cli.text import envelope, printable
from p2pfed.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Iterator
    from pathlib import Path

    from p2pfed.audit.findings import Finding

__all__ = ["audit"]

ATTACKS = "attacks"
PARTS = {  # as --only names it -> the module of p2pfed.audit whose findings() it is
    "law": "enumeration",
    "samplers": "samplers",
    "distinguishing": "distinguishing",
}
EPSILON = 5.0  # of the run whose releases are inverted
PATIENTS = 40  # records that are inverted; chance moves the mean gain by .2 dB
DIGITS, DIGITS_QUICK = 24, 12
NO_PROOF = (
    "Failing to invert or to tell members apart is no proof of privacy; the proof is in"
    " docs/privacy.md and the exact law above."
)


def audit(parser: ArgumentParser) -> None:
    """Fill in the command `privacy audit`."""
    describe(
        parser,
        "Check the privacy gate on this machine: the exact law of small releases, the samplers, a\n"
        "distinguishing test, and attacks on real records: was a patient in, and what does the\n"
        "record look like. Spends no budget, and nothing leaves. Exit 1 if a claim did not hold.",
    )
    parser.add_argument(
        "--task",
        help="whose patients are attacked: breast-cancer (default), heart-disease (default with"
        " --data), or module:Class of a task with a linear model",
    )
    parser.add_argument("--data", metavar="DIR", help="the task's files")
    parser.add_argument("--site", help="which of the task's hospitals")
    parser.add_argument("--out", metavar="DIR", help="draw what the attacks found, into DIR")
    parser.add_argument("--quick", action="store_true", help="fewer releases and people")
    parser.add_argument("--only", choices=[*PARTS, ATTACKS], help="one part")
    with_json(parser)
    parser.set_defaults(run=_audit)


def _audit(args: Namespace) -> int:
    folder = _folder(args.out)
    found: list[Finding] = []
    pictures: list[Path] = []
    for finding in _findings(args, folder, pictures):
        found.append(finding)
        if not args.json:
            print(_line(finding), flush=True)
    failed = [finding for finding in found if not finding.passed]
    if args.json:
        print(envelope("privacy-audit", _data(args, found, pictures), ok=not failed))
        return 1 if failed else 0
    print(NO_PROOF)
    for path in pictures:
        print(printable(f"drawn: {path}"))
    if pictures:
        print("The pictures show real records: they stay on this machine, for your eyes only.")
    print(f"{len(found)} claims, {len(failed)} FAILED" if failed else f"{len(found)} claims held")
    return 1 if failed else 0


def _findings(args: Namespace, folder: Path | None, pictures: list[Path]) -> Iterator[Finding]:
    """Run the parts one after another."""
    import importlib

    for part, module in PARTS.items():
        if args.only in {None, part}:
            yield from importlib.import_module(f"p2pfed.audit.{module}").findings(args.quick)
    if args.only in {None, ATTACKS}:
        yield from _attacks(args, folder, pictures)


def _attacks(args: Namespace, folder: Path | None, pictures: list[Path]) -> Iterator[Finding]:
    from pathlib import Path

    from p2pfed.audit import inversion, membership, victims

    task = args.task or ("heart-disease" if args.data else "breast-cancer")
    data = Path(args.data) if args.data else None
    patients = victims.hospital(task, folder=data, site=args.site)
    games = []
    for game in membership.play_all(victims.rows_of(patients), quick=args.quick):
        games.append(game)
        yield membership.finding(game)
    records = inversion.invert(patients, count=PATIENTS, epsilon=EPSILON)
    yield from inversion.findings(records, what=task, epsilon=EPSILON)
    writers = victims.digits()
    count = DIGITS_QUICK if args.quick else DIGITS
    digits = inversion.invert(writers, count=count, epsilon=EPSILON)
    yield from inversion.findings(digits, what=writers.task.name, epsilon=EPSILON)
    if folder is not None:
        from p2pfed.report.attacks import draw_membership, draw_pictures, draw_records

        pictures += [
            draw_pictures(digits, folder, shape=(8, 8), epsilon=EPSILON),
            draw_records(records, folder, task=task, epsilon=EPSILON),
            draw_membership(games, folder, task=task),
        ]


def _folder(out: str | None) -> Path | None:
    """Better before a minute of work than after: the folder of the pictures, made if need be."""
    from pathlib import Path

    if out is None:
        return None
    folder = Path(out)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {out}", error.strerror or str(error)) from error
    return folder


def _line(finding: Finding) -> str:
    verdict = "passed" if finding.passed else "FAILED"
    return printable(f"{verdict}  {finding.name}: {finding.claim}. Found: {finding.found}")


def _data(args: Namespace, found: list[Finding], pictures: list[Path]) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "quick": args.quick,
        "only": args.only,
        "findings": [asdict(finding) for finding in found],
        "pictures": [str(path) for path in pictures],
        "no_proof": NO_PROOF,
    }
