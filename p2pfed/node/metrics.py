"""What a monitoring system may know of a node: the catalogue of metrics, and their values.

`CATALOGUE` says what there is; `values` takes it from what the operator is shown (`view`), the
network's counters and the operating system, and is a pure function of these; `observe` gathers
them.

Invariants. Everything here is of the public plane: the node's own measures of its model are not in
it; a peer's is, where that peer released it. What is not known is left out, never shown as 0. The
number of series is bounded by the roster, the states and kinds that the code names: nothing that a
peer sends makes a new one, except the name of its measure, which replaces the one before.

Not here: how it is written and served (`admin/prometheus.py`).
"""

from __future__ import annotations

import datetime as dt
import math
import os
import resource
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import trio

from p2pfed import __version__
from p2pfed.admin.prometheus import Family
from p2pfed.gossip.progress import Phase
from p2pfed.network.events import NetworkTotals
from p2pfed.node.shell import Shell

__all__ = [
    "CATALOGUE",
    "Metric",
    "Observed",
    "Process",
    "families",
    "observe",
    "values",
]

Samples = list[tuple[tuple[str, ...], float]]
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of the catalogue; see `Family`."""

    name: str
    kind: Literal["gauge", "counter"]
    labels: tuple[str, ...]
    text: str


def _metric(name: str, kind: Literal["gauge", "counter"], labels: str, text: str) -> Metric:
    return Metric(name, kind, tuple(labels.split()), text)


CATALOGUE: tuple[Metric, ...] = (
    _metric("p2pfed_build_info", "gauge", "version", "1; the version of p2pfed."),
    _metric("p2pfed_present", "gauge", "", "1 in the network, 0 after leave."),
    _metric("p2pfed_health", "gauge", "", "Warnings that p2pfed status shows."),
    _metric("p2pfed_peers", "gauge", "state", "Members besides this node, by state."),
    _metric("p2pfed_peer_round", "gauge", "peer", "The round that a peer said it is in."),
    _metric("p2pfed_peer_rtt_seconds", "gauge", "peer", "A peer's last round-trip time."),
    _metric("p2pfed_peer_seen_seconds", "gauge", "peer", "Seconds since a peer was heard."),
    _metric("p2pfed_peer_measure", "gauge", "peer name",
            "The measure of its model that a peer released by its own policy."),
    _metric("p2pfed_bytes_total", "counter", "peer direction",
            "Bytes on the socket to (sent) and from (received) a peer."),
    _metric("p2pfed_relayed_bytes_total", "counter", "",
            "Bytes that this node carried between others."),
    _metric("p2pfed_relay_circuits", "gauge", "", "Connections of others through this node now."),
    _metric("p2pfed_exchange_failures_total", "counter", "reason",
            "Broken frames of members (breach), strangers' connections (refused), and in pairwise"
            " mode meetings that came to nothing (meeting)."),
    _metric("p2pfed_run_info", "gauge", "run task mechanism", "1; the run taken part in."),
    _metric("p2pfed_round", "gauge", "", "The round that this node is in."),
    _metric("p2pfed_run_rounds", "gauge", "", "Rounds of the run."),
    _metric("p2pfed_round_age_seconds", "gauge", "",
            "Seconds since the round at hand began; left out once the run has finished."),
    _metric("p2pfed_round_seconds", "gauge", "part",
            "The last round, until this node's own training ended (training) and after (waiting)."),
    _metric("p2pfed_model_round", "gauge", "", "The round whose model is held."),
    _metric("p2pfed_model_agreement", "gauge", "",
            "Of the peers whose model is of the same round, the share with the same hash."),
    _metric("p2pfed_consensus_distance", "gauge", "",
            "In pairwise mode: length from a model to the mean, as the last meeting here tells."),
    _metric("p2pfed_deltas", "gauge", "", "Deltas of the run that are held."),
    _metric("p2pfed_contributing", "gauge", "", "1 if this node releases in this round."),
    _metric("p2pfed_releases_total", "counter", "", "Releases that the ledger has booked."),
    _metric("p2pfed_epsilon_spent", "gauge", "", "Epsilon spent so far, at the hospital's delta."),
    _metric("p2pfed_epsilon_limit", "gauge", "", "The hospital's lifetime limit of epsilon."),
    _metric("p2pfed_trainer_up", "gauge", "", "1 if a trainer is there and ready."),
    _metric("p2pfed_trainer_restarts_total", "counter", "", "Trainers that ended."),
    _metric("p2pfed_roster_version", "gauge", "", "Version of the roster in force."),
    _metric("p2pfed_roster_expires_seconds", "gauge", "",
            "Seconds until the roster expires; below 0 it has."),
    _metric("p2pfed_events_total", "counter", "type", "Events of the event log."),
    _metric("p2pfed_store_bytes", "gauge", "", "Size of store.db with its journal."),
    _metric("p2pfed_disk_free_bytes", "gauge", "", "Free bytes on the data directory's disk."),
    _metric("process_cpu_seconds_total", "counter", "", "Processor time of the network process."),
    _metric("process_resident_memory_bytes", "gauge", "", "Its memory."),
    _metric("process_open_fds", "gauge", "", "Its open file descriptors."),
    _metric("process_max_fds", "gauge", "", "How many it may have."),
    _metric("process_start_time_seconds", "gauge", "", "When it started, Unix time."),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Process:
    """What Linux says of a process; seconds, bytes, Unix time."""

    cpu_s: float
    resident_bytes: int
    open_fds: int
    max_fds: float
    started: float


@dataclass(frozen=True, slots=True)
class Observed:
    """All that the values are made of.

    Attributes:
        status: As `View.status` gives it.
        peers: As `View.peers` gives them.
        totals: The network's counters.
        now: The calendar time.
        round_age: Seconds since the round at hand began; None before the first.
        events: Events by type, since the start.
        store_bytes: Size of the store; None where the disk does not tell.
        disk_free: Free bytes; None where the disk does not tell.
        process: None on a system without /proc.
    """

    status: Mapping[str, Any]
    peers: Iterable[Mapping[str, Any]]
    totals: NetworkTotals
    now: dt.datetime
    round_age: float | None = None
    events: Mapping[str, int] = field(default_factory=dict)
    store_bytes: int | None = None
    disk_free: int | None = None
    process: Process | None = None


def families(observed: Observed) -> list[Family]:
    """The catalogue with its values now; what is not known has no samples."""
    known = values(observed)
    return [Family(m.name, m.kind, m.text, m.labels, known.get(m.name, ())) for m in CATALOGUE]


def values(observed: Observed) -> dict[str, Samples]:
    """Samples by the name of the metric, in the order of the labels of the catalogue."""
    return {
        **_of_node(observed),
        **_of_run(observed),
        **_of_peers(observed),
        **_of_machine(observed),
    }


def _one(number: float | None) -> Samples:
    return [] if number is None else [((), number)]


def _of_node(observed: Observed) -> dict[str, Samples]:
    status, totals = observed.status, observed.totals
    failures: Samples = [(("breach",), totals.breaches), (("refused",), totals.refused)]
    meetings = (status["run"] or {}).get("meetings")
    if meetings:
        failures.append((("meeting",), meetings["failed"]))
    roster = status["roster"] or {}
    trainer = status["trainer"]
    has_trainer = trainer["state"] != "none"
    return {
        "p2pfed_build_info": [((__version__,), 1)],
        "p2pfed_present": _one(int(status["present"])),
        "p2pfed_health": _one(len(status["health"])),
        "p2pfed_peers": [((state,), number) for state, number in status["peers"].items()],
        "p2pfed_relayed_bytes_total": _one(totals.relayed_bytes),
        "p2pfed_relay_circuits": _one(totals.circuits),
        "p2pfed_exchange_failures_total": failures,
        "p2pfed_trainer_up": _one(int(trainer["state"] == "ready") if has_trainer else None),
        "p2pfed_trainer_restarts_total": _one(trainer["restarts"] if has_trainer else None),
        "p2pfed_roster_version": _one(roster.get("version")),
        "p2pfed_roster_expires_seconds": _one(_until(roster.get("expires"), observed.now)),
        "p2pfed_events_total": [((kind,), n) for kind, n in sorted(observed.events.items())],
    }


def _until(moment: str | None, now: dt.datetime) -> float | None:
    if moment is None:
        return None
    return round((dt.datetime.fromisoformat(moment) - now).total_seconds(), 3)


def _of_run(observed: Observed) -> dict[str, Samples]:
    status, run = observed.status, observed.status["run"]
    privacy = status["privacy"]
    limit = privacy["epsilon"] or None  # 0: this hospital has set none
    known: dict[str, Samples] = {
        "p2pfed_contributing": _one(int(status["contributing"]["yes"])),
        "p2pfed_releases_total": _one(privacy["releases"]),
        "p2pfed_epsilon_spent": _one(privacy["spent_epsilon"]),
        "p2pfed_epsilon_limit": _one(limit),
        "p2pfed_round_seconds": _parts(status["round_seconds"]),
    }
    if run is None:
        return known
    finished = run["phase"] == Phase.FINISHED.value
    return known | {
        "p2pfed_run_info": [((run["name"], run["task"], run["mechanism"]), 1)],
        "p2pfed_round": _one(run["round"]),
        "p2pfed_run_rounds": _one(run["rounds"]),
        "p2pfed_round_age_seconds": _one(None if finished else observed.round_age),
        "p2pfed_model_round": _one(run["model_round"] if run["model_hash"] else None),
        "p2pfed_model_agreement": _one(_agreement(run, observed.peers)),
        "p2pfed_consensus_distance": _one(run.get("consensus_distance")),
        "p2pfed_deltas": _one(run["deltas"]),
    }


def _parts(clock: Mapping[str, Any] | None) -> Samples:
    """Of the last round's time."""
    if not clock:
        return []
    training = round(clock["seconds"] - clock["waiting"], 3)
    return [(("training",), training), (("waiting",), clock["waiting"])]


def _agreement(run: Mapping[str, Any], peers: Iterable[Mapping[str, Any]]) -> float | None:
    """None where there is nobody to compare with, and in pairwise mode, where models differ."""
    if "meetings" in run or not run["model_hash"]:
        return None
    hashes = [
        peer["model_hash"]
        for peer in peers
        if peer["state"] in {"alive", "suspect"}
        and peer["model_hash"]
        and peer["model_round"] == run["model_round"]
    ]
    return hashes.count(run["model_hash"]) / len(hashes) if hashes else None


def _of_peers(observed: Observed) -> dict[str, Samples]:
    # A revoked peer's name may be another member's by now; among the others names are unique.
    peers = [peer for peer in observed.peers if peer["state"] != "revoked"]

    def each(number: Callable[[Mapping[str, Any]], float | None]) -> Samples:
        found = [(peer["name"], number(peer)) for peer in peers]
        return [((name,), value) for name, value in found if value is not None]

    return {
        "p2pfed_peer_round": each(lambda peer: peer["round"]),
        "p2pfed_peer_rtt_seconds": each(
            lambda peer: None if peer["rtt_ms"] is None else peer["rtt_ms"] / 1000
        ),
        "p2pfed_peer_seen_seconds": each(lambda peer: peer["seen_s"]),
        "p2pfed_peer_measure": [
            ((peer["name"], str(measure["name"])), measure["value"])
            for peer in peers
            if (measure := peer.get("measure")) and math.isfinite(measure["value"])
        ],
        "p2pfed_bytes_total": [
            ((peer["name"], direction), peer[f"{direction}_bytes"])
            for peer in peers
            for direction in ("sent", "received")
        ],
    }


def _of_machine(observed: Observed) -> dict[str, Samples]:
    known = {
        "p2pfed_store_bytes": _one(observed.store_bytes),
        "p2pfed_disk_free_bytes": _one(observed.disk_free),
    }
    process = observed.process
    if process is None:
        return known
    return known | {
        "process_cpu_seconds_total": _one(round(process.cpu_s, 2)),
        "process_resident_memory_bytes": _one(process.resident_bytes),
        "process_open_fds": _one(process.open_fds),
        "process_max_fds": _one(process.max_fds),
        "process_start_time_seconds": _one(round(process.started, 2)),
    }


# --- gathering ---------------------------------------------------------------------------------


def observe(
    status: Mapping[str, Any], peers: list[dict[str, Any]], shell: Shell, data_dir: Path
) -> Observed:
    """Gather what the values are made of.

    Args:
        status: As `View.status` gives it.
        peers: As `View.peers` gives them.
        shell: The node.
        data_dir: Its data directory.
    """
    return Observed(
        status=status,
        peers=peers,
        totals=shell.network.totals(),
        now=shell.wall(),
        round_age=shell.clock.age(trio.current_time()),
        events=shell.log.counts,
        store_bytes=_store_bytes(data_dir),
        disk_free=_disk_free(data_dir),
        process=this_process(),
    )


def _store_bytes(data_dir: Path) -> int | None:
    sizes = []
    for name in ("store.db", "store.db-wal"):
        try:
            sizes.append((data_dir / name).stat().st_size)
        except OSError:  # the journal is not always there
            continue
    return sum(sizes) if sizes else None


def _disk_free(data_dir: Path) -> int | None:
    try:
        return shutil.disk_usage(data_dir).free
    except OSError:
        return None


def this_process(proc: Path = _PROC) -> Process | None:
    """What Linux says of this process; None where it does not.

    Args:
        proc: Where the process file system is.
    """
    try:
        fields = (proc / "self/stat").read_text().rpartition(")")[2].split()
        pages = int((proc / "self/statm").read_text().split()[1])
        boot = (proc / "stat").read_text().partition("\nbtime ")[2].split(maxsplit=1)[0]
        open_fds = sum(1 for _ in (proc / "self/fd").iterdir())
    except (OSError, IndexError, ValueError):
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Process(
        cpu_s=(int(fields[11]) + int(fields[12])) / ticks,
        resident_bytes=pages * resource.getpagesize(),
        open_fds=open_fds,
        max_fds=math.inf if soft == resource.RLIM_INFINITY else soft,
        started=int(boot) + int(fields[19]) / ticks,
    )
