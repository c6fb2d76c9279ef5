"""doctor: what is wrong on this machine, in a table, with the line that mends it.

It works before the daemon runs, while it runs, and without a configuration. Exit 9 when a check
fails; warnings alone are no failure. What the checks are: `p2pfed.doctor`, docs/doctor.md.
"""

from __future__ import annotations

import sys

from p2pfed.cli.locate import config_path
from p2pfed.cli.options import confirmed, describe, with_socket
from p2pfed.cli.text import columns, envelope, printable
from p2pfed.errors import CheckFailed, NotPermitted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from p2pfed.doctor.finding import Finding

__all__ = ["as_data", "doctor"]


def doctor(parser: ArgumentParser) -> None:
    """Fill in the command `doctor`."""
    describe(
        parser,
        "Look at configuration, key, clock, ports, peers, roster, disk, data, ledger, task and\n"
        "trainer of this node, before its daemon runs or while it does. Each line says what was\n"
        "found and how to mend it; the numbers are this hospital's own, so look before you send\n"
        "them to somebody (p2pfed bugreport makes what may be sent). Exit 9 if a check fails.",
        endpoint="GET /v1/status, /v1/peers, /v1/reachability   (and /v1/status of the private"
        " socket)",
    )
    parser.add_argument("--offline", action="store_true", help="dial nobody and look up no name")
    parser.add_argument(
        "--task",
        action="store_true",
        default=None,
        help="a dry step of the task even where a trainer has it loaded",
    )
    parser.add_argument(
        "--no-task", dest="task", action="store_false", help="no dry step of the task"
    )
    parser.add_argument(
        "--fix",
        action="store_true",
        help="mend what is safe: rights of the key, the state folder and the ledger that are too"
        " wide, sockets that nobody serves; asks first",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask, with --fix")
    with_socket(parser)
    parser.set_defaults(run=_doctor)


def _doctor(args: Namespace) -> int:
    from p2pfed.doctor.mending import to_mend

    findings = _examined(args, task=args.task)
    mended: list[str] = []
    repairs = to_mend(findings) if args.fix else []
    if repairs:
        mended = _mended(args, findings)
        again = _examined(args, task=False)  # a dry step that was made is not made again
        done = [found for found in findings if found.check == "task"]
        findings = [*(found for found in again if found.check != "task"), *done]
    failed = list(dict.fromkeys(found.check for found in findings if found.status == "FAIL"))
    warned = list(dict.fromkeys(found.check for found in findings if found.status == "warn"))
    if args.json:
        data = {**as_data(findings), "mended": mended}
        print(envelope("doctor", data, ok=not failed))
    else:
        for line in [*mended, *_lines(findings, failed, warned)]:
            print(printable(line))
    return CheckFailed.exit_code if failed else 0


def _examined(args: Namespace, *, task: bool | None) -> list[Finding]:
    from p2pfed.doctor.examine import examine

    return examine(
        _readable(args),
        flags={"admin.socket": args.socket} if args.socket else None,
        offline=args.offline,
        task=task,
        say=lambda text: print(printable(text), file=sys.stderr, flush=True),
    )


def _readable(args: Namespace) -> Path | None:
    """The configuration; one that we may not read is no fault of the node's."""
    import os

    found, told = None, ""
    try:
        found = config_path(args)
        if found is not None and not os.access(found, os.R_OK):
            told = f"cannot read {found}: permission denied"
    except NotPermitted as error:
        told = error.what
    if told:
        raise NotPermitted(
            told,
            "the doctor looks at what the configuration names",
            "run it as root, or as a user who may read that: sudo p2pfed doctor",
        )
    return found


def _mended(args: Namespace, findings: Sequence[Finding]) -> list[str]:
    """Ask, mend, and say what was done."""
    from p2pfed.doctor.mending import described, mend, to_mend

    repairs = to_mend(findings)
    if not confirmed(args, "; ".join(map(described, repairs)) + "?"):
        return []
    told = []
    for one in repairs:
        problem = mend(one)
        outcome = f"not done: {described(one)}: {problem}" if problem else f"done: {described(one)}"
        told.append(outcome)
    return told


def as_data(findings: Sequence[Finding]) -> dict[str, object]:
    """The findings as JSON, and how many of each kind."""
    rows = [
        {"check": one.check, "status": one.status, "found": one.found, "fix": one.fix}
        for one in findings
    ]
    counts = {name: sum(one.status == name for one in findings) for name in ("FAIL", "warn", "ok")}
    return {"checks": rows, "counts": counts}


def _lines(
    findings: Sequence[Finding], failed: Sequence[str], warned: Sequence[str]
) -> Iterator[str]:
    width = max(len(one.check) for one in findings)
    room = columns()
    for one in findings:
        line = f"{one.status:<4}  {one.check:<{width}}  {one.found}"
        if not one.fix:
            yield line
        elif len(line) + len(one.fix) + 5 <= room:
            yield f"{line}   → {one.fix}"
        else:
            yield line
            yield f"{'':<{width + 8}}→ {one.fix}"
    yield ""
    kinds = [("failed", failed), ("to look after", warned)]
    told = [f"{name}: {', '.join(checks)}" for name, checks in kinds if checks]
    yield "; ".join(told) or "all is well"
