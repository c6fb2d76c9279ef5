"""What was agreed and signed: roster, run, and the versions that must fit together.

The signed files are read from the state folder and verified here again, or taken from the daemon
where we may not read them.
"""

from __future__ import annotations

import datetime as dt
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from p2pfed.doctor.finding import Finding, fail, ok, warn
from p2pfed.errors import FactRejected
from p2pfed.identity.book import RosterBook
from p2pfed.identity.roster import Roster
from p2pfed.identity.run import Run, check_kept_run

__all__ = ["HeldRun", "accepted", "believed", "missing_pins", "roster", "run", "versions"]

_SOON = dt.timedelta(days=14)


def believed(signed: Iterable[bytes], network_id: str) -> tuple[RosterBook, str]:
    """All rosters that verify, and what is wrong with the first that does not."""
    book = RosterBook(bytes.fromhex(network_id) or None)
    for document in signed:
        try:
            book.restore(document)
        except FactRejected as error:
            return book, error.what
    return book, ""


def roster(
    current: Roster | None, problem: str, peer_id: str, now: dt.datetime, *, vouched: bool = True
) -> Iterator[Finding]:
    """The roster in force: there, verified, lists us, and for how long.

    Args:
        current: The newest one that verifies.
        problem: Why another does not.
        peer_id: Ours; empty if we could not tell.
        now: The time.
        vouched: Whether an invite, or the configuration, said which network is the right one.
    """
    if current is not None and not vouched:
        yield warn(
            "roster",
            f"nothing vouched for the first roster, of the network {current.network}",
            "compare its id with a steward, then set network.id ="
            f' "{current.network_id.hex()}" in the configuration',
        )
    if problem:
        yield fail(
            "roster",
            f"a kept roster does not verify: {problem}",
            "move it out of rosters/; the peers send the right one",
        )
    if current is None:
        if not problem:
            yield fail(
                "roster",
                "no roster is held: nobody can be told from a stranger",
                "get it from a steward: p2pfed join --roster FILE --bootstrap FILE",
            )
        return
    name = f"v{current.version}"
    left = current.expires - now
    until = f"{current.expires:%Y-%m-%d}"
    extend = "a steward signs the next: p2pfed steward extend; then p2pfed join --roster FILE"
    if left <= dt.timedelta(0):
        yield fail("roster", f"{name} expired on {until}: nothing is released any more", extend)
    elif left <= _SOON:
        yield warn("roster", f"{name} expires on {until}, in {left.days} days", extend)
    revoked = any(gone.peer_id == peer_id for gone in current.revoked)
    if peer_id and current.member(peer_id) is None:
        yield fail(
            "roster",
            f"{name} has {'revoked' if revoked else 'no'} member {peer_id}, which is this node",
            "ask a steward: is the peer id right? then p2pfed join --roster FILE",
        )
    elif left > _SOON and not problem and vouched:
        me = f" lists this node, {current.threshold} of {len(current.stewards)} stewards signed"
        yield ok("roster", f"{name}{me if peer_id else ''}, expires on {until}")


@dataclass(frozen=True, slots=True)
class HeldRun:
    """The run that this node takes part in.

    Attributes:
        run: As signed; None if it does not verify.
        problem: Why it does not.
        genesis: Whether its first model is here and is the right one.
        closed_to: Who runs the node, if that user may not read the first model that is here.
        file: Where that is, or would be.
    """

    run: Run | None
    problem: str
    genesis: bool
    closed_to: str = ""
    file: Path | None = None


def accepted(signed: bytes, rosters: Sequence[Roster]) -> tuple[Run | None, str]:
    """The run in a kept file, or why it is none."""
    if not rosters:
        return None, "no roster vouches for it"
    try:
        return check_kept_run(signed, rosters), ""
    except FactRejected as error:
        return None, error.what


def run(held: HeldRun | None, *, trains: bool) -> Finding:
    """The accepted run and its first model."""
    if held is None:
        found = "no run is accepted: nothing is trained"
        fix = "when the stewards have signed one: p2pfed run accept FILE"
        return warn("run", found, fix) if trains else ok("run", "none; it relays and tells", fix)
    if held.run is None:
        return fail(
            "run",
            f"the accepted run does not verify: {held.problem}",
            "accept it again: p2pfed run accept FILE",
        )
    name = held.run.name
    if held.closed_to:
        who, where = held.closed_to, shlex.quote(str(held.file))
        return fail(
            "run",
            f"{who}, who runs the node, may not read the first model of {name}: {held.file}",
            f"chown {shlex.quote(who)} {where}",
        )
    if not held.genesis:
        return warn(
            "run",
            f"{name} waits for its first model, which is not here",
            "peers send it; or by hand: p2pfed run accept FILE --genesis FILE",
        )
    return ok("run", f"{name}, {held.run.rounds} rounds, mechanism {held.run.mechanism}")


def missing_pins() -> list[str]:
    """Libraries that must have one exact version, and have another or none."""
    try:
        wanted = requires("p2pfed") or []
    except PackageNotFoundError:
        return []
    found = []
    for line in wanted:
        match = re.match(r"([\w.-]+)==([\w.]+)\s*$", line)
        if match is None:
            continue
        try:
            here = version(match[1])
        except PackageNotFoundError:
            here = "none"
        if here != match[2]:
            found.append(f"{match[1]} {here} instead of {match[2]}")
    return found


def versions(
    client: str, daemon: str | None, peers: Sequence[Mapping[str, Any]], pins: Sequence[str]
) -> Iterator[Finding]:
    """Whether command, daemon, libraries and peers fit together.

    Args:
        client: Version of this program.
        daemon: Of the daemon; None if it does not run.
        peers: As /v1/peers tells of them.
        pins: What `missing_pins` found.
    """
    if pins:
        yield fail("versions", "; ".join(pins), "install as README.md says: ./scripts/install")
    if daemon is not None and daemon != client:
        yield warn(
            "versions",
            f"this is p2pfed {client}, the daemon is {daemon}",
            "restart the daemon: systemctl restart p2pfed",
        )
    others = sorted({str(peer["version"]) for peer in peers if peer.get("version")} - {client})
    if not pins and daemon in {None, client}:
        told = f"; peers also {', '.join(others)}" if others else ""
        yield ok("versions", f"p2pfed {client}{told}")
