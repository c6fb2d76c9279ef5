"""What the admin socket shows: snapshots of the core, the network's counters and what was released.

Nothing private passes here, because this process has nothing private. Every value can be written as
JSON; the model is a file.
"""

from __future__ import annotations

import datetime as dt
import os
from dataclasses import asdict
from functools import partial
from typing import Any, BinaryIO

import trio

from p2pfed import __version__
from p2pfed.admin.prometheus import Family
from p2pfed.config import Settings
from p2pfed.errors import NotFound
from p2pfed.gossip.membership import Peer, State
from p2pfed.gossip.progress import Phase
from p2pfed.identity.bootstrap import BootstrapList
from p2pfed.identity.roster import Roster
from p2pfed.identity.run import Run
from p2pfed.network import PeerStats
from p2pfed.node.archive import Archive
from p2pfed.node.contribution import why_not
from p2pfed.node.gate import blocked_lines
from p2pfed.node.history import History
from p2pfed.node.likeness import measure_of, meetings_of, speech_of, unlike_lines
from p2pfed.node.metrics import families, observe
from p2pfed.node.provenance import provenance
from p2pfed.node.reachability import reachability
from p2pfed.node.shell import Shell
from p2pfed.node.snapshot import write_snapshot

__all__ = ["View"]


class View:
    """See the module docstring.

    Args:
        settings: The node's settings.
        shell: The node.
        bootstrap: The configured bootstrap lists.
    """

    def __init__(self, settings: Settings, shell: Shell, bootstrap: list[BootstrapList]) -> None:
        self._settings = settings
        self._shell = shell
        self._core = shell.core
        self._bootstrap = bootstrap
        self._started = trio.current_time()
        self._history = History(shell)

    def status(self) -> dict[str, Any]:
        """What `p2pfed status` shows."""
        core, shell = self._core, self._shell
        roster = core.book.current
        reason = why_not(shell)
        totals = shell.network.totals()
        states = [p.state for p in core.membership.peers.values()]
        return {
            "name": self._settings.node.name,
            "peer_id": core.own_id,
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(trio.current_time() - self._started, 1),
            "addresses": list(core.introduction.addresses),
            "network": {
                "name": roster.network if roster is not None else "",
                "id": (core.book.network_id or b"").hex(),
            },
            "present": shell.present,
            "roster": self._roster_line(roster),
            "run": self._run_line(),
            "sharing": core.sharing,
            "contributing": {"yes": not reason, "reason": reason},
            "privacy": self.privacy(),
            "measure": self._own_measure(),
            "peers": {s.value: states.count(s) for s in State},
            "traffic": {"sent_bytes": totals.bytes_sent, "received_bytes": totals.bytes_received},
            "relay": {"circuits": totals.circuits, "relayed_bytes": totals.relayed_bytes},
            "trainer": self._trainer_line(),
            "round_seconds": shell.clock.last or None,
            "patience": core.membership.health.factor,
            "health": self._health(),
        }

    def _own_measure(self) -> dict[str, Any] | None:
        """What this hospital lets all members know of its newest evaluation."""
        measure = self._core.introduction.measure
        return None if measure is None else measure.as_json()

    def _roster_line(self, roster: Roster | None) -> dict[str, Any] | None:
        if roster is None:
            return None
        return {
            "version": roster.version,
            "hash": roster.hash.hex(),
            "expires": roster.expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "expired": roster.is_expired(self._shell.wall()),
            "threshold": roster.threshold,
            "stewards": len(roster.stewards),
            "members": len(roster.members),
        }

    def _run_line(self) -> dict[str, Any] | None:
        progress, run = self._core.progress, self._shell.run
        if progress is None or run is None:
            return None
        folded = progress.folded
        return {
            "id": run.run_id.hex(),
            "name": run.name,
            "task": run.task,
            "mechanism": run.mechanism,
            "unit": run.unit,
            "round": progress.round,
            "rounds": run.rounds,
            "phase": progress.phase.value,
            "model_hash": folded.model_hash.hex() if folded is not None else "",
            "model_round": folded.round if folded is not None else 0,
            "deltas": progress.facts.num_deltas,
            "own_deltas": progress.facts.num_of(self._core.own_id),
            "archive": self._archive_line(),
            **meetings_of(progress, self._shell.model),
        }

    def _archive(self, run: Run | None) -> Archive | None:
        """None without a run or a roster, or where the disk does not tell."""
        roster = self._core.book.current
        if run is None or roster is None:
            return None
        held = self._shell.store.archived(run.run_id)
        try:
            return Archive.of(run, roster, held_bytes=held, folder=self._settings.node.data_dir)
        except OSError:
            return None

    def _archive_line(self) -> dict[str, int] | None:
        archive = self._archive(self._shell.run)
        return None if archive is None else asdict(archive)

    def _trainer_line(self) -> dict[str, Any]:
        trainer = self._shell.trainer
        if trainer is None:
            return {"state": "none", "restarts": 0, "pid": None}
        return {"state": trainer.state, "restarts": trainer.restarts, "pid": trainer.pid}

    def _health(self) -> list[str]:
        lines = []
        roster = self._core.book.current
        if roster is None:
            lines.append("no roster is held; run: p2pfed join --roster FILE --bootstrap FILE")
        elif roster.is_expired(self._shell.wall()):
            lines.append(f"roster v{roster.version} has expired: receiving, releasing nothing")
        elif roster.member(self._core.own_id) is None:
            lines.append(f"roster v{roster.version} does not list this node; ask a steward")
        if self._shell.awaited:
            lines.append(self._shell.awaited)
        archive = self._archive(self._shell.run)
        if archive is not None and archive.warning:
            lines.append(archive.warning)
        if not self._shell.present:
            lines.append("this node has left the network; run: p2pfed join")
        lines += [*blocked_lines(self._shell), *self._path_troubles()]
        lines += self._trainer_advice()
        if self._core.progress is not None and self._core.progress.phase is Phase.WAITING:
            alive, whole = self._core.weight_alive()
            lines.append(f"waiting for peers: {alive} of {whole} patients' weight is present")
        lines += unlike_lines(self._core.membership.peers.values())
        return [*lines, *self._differing_peers()]

    def _trainer_advice(self) -> list[str]:
        trainer = self._shell.trainer
        if trainer is None:
            return []
        lines = [f"trainer: {trainer.problem}"] if trainer.problem else []
        if trainer.paused:
            lines.append("training is paused; go on with: p2pfed task resume")
        return [*lines, trainer.hint] if trainer.hint else lines

    def _path_troubles(self) -> list[str]:
        lines, core = [], self._core
        known = core.introduction.addresses
        if self._shell.present and not known and core.book.current is not None:
            lines.append(
                "nobody can dial this node: it listens on no address and no relay holds a place"
            )
        slow = core.membership.health.factor
        if slow > 2:  # 2 for a second or two is what an outage of others leaves
            lines.append(f"this node keeps up badly: peers may be silent {slow} times as long")
        return lines

    def _differing_peers(self) -> list[str]:
        run, lines = self._shell.run, []
        for peer in self._core.membership.peers.values():
            beat = peer.beat
            if run is None or beat is None:
                continue
            if beat.run_id not in {b"", run.run_id}:
                lines.append(f"{peer.name} takes part in another run")
            if beat.task_id not in {b"", run.task_id}:
                lines.append(f"{peer.name} has another version of the task installed")
        return lines

    def peers(self) -> list[dict[str, Any]]:
        """All members, with what this node has seen of them."""
        return [self._peer_line(p) for p in self._core.membership.peers.values()]

    def _peer_line(self, peer: Peer) -> dict[str, Any]:
        roster = self._core.book.current
        member = roster.member(peer.peer_id) if roster is not None else None
        stats = self._shell.network.stats(peer.peer_id)
        silence = trio.current_time() - peer.last_heard
        beat = peer.beat
        return {
            "name": peer.name,
            "peer_id": peer.peer_id,
            "state": peer.state.value,
            "round": beat.round if beat is not None else None,
            "rtt_ms": None if peer.rtt is None else round(1000 * peer.rtt, 1),
            "patience_s": round(self._core.membership.patience(peer), 1),
            "path": self._path(stats),
            "path_rtt_ms": None if stats.rtt is None else round(1000 * stats.rtt, 1),
            "sent_bytes": stats.bytes_sent,
            "received_bytes": stats.bytes_received,
            "model_hash": beat.model_hash.hex() if beat is not None else "",
            "model_round": beat.model_round if beat is not None else None,
            "contributes": beat.contributes if beat is not None else None,
            "seen_s": None if peer.last_heard == float("-inf") else round(silence, 1),
            "roles": list(member.roles) if member is not None else [],
            "samples": member.samples if member is not None else 0,
            "addresses": list(peer.addresses),
            "blocked": peer.peer_id in self._shell.blocked,
            "measure": measure_of(peer, self._shell.run),
            **speech_of(peer),
        }

    def _path(self, stats: PeerStats) -> str | None:
        """`direct`, or the name of the relay in between."""
        if stats.direction is None:
            return None
        relay = self._core.membership.get(stats.via)
        return "direct" if not stats.via else f"relay {relay.name if relay else stats.via}"

    def peer(self, peer: str) -> dict[str, Any]:
        """One member by peer id, by a unique beginning of it, or by name."""
        found = [
            p
            for p in self._core.membership.peers.values()
            if peer in {p.peer_id, p.name} or (len(peer) >= 4 and p.peer_id.startswith(peer))
        ]
        if len(found) != 1:
            raise NotFound(
                f"{'no' if not found else 'more than one'} peer is called {peer!r:.80}",
                "a peer is meant by its name, its id, or the beginning of its id alone",
                "run: p2pfed peers   (it lists all of them)",
            )
        return self._peer_line(found[0])

    def privacy(self) -> dict[str, Any]:
        """Mechanism, ceiling and what was spent, as far as it was released."""
        run, spent = self._shell.run, self._shell.spent
        left = spent.get("releases_left")
        progress = self._core.progress
        forecast = None
        if (
            left
            and progress is not None
            and run is not None
            and progress.phase is not Phase.FINISHED
        ):
            forecast = min(run.rounds, progress.round + int(left) + 1)
        return {
            "mechanism": run.mechanism if run is not None else None,
            "unit": run.unit if run is not None else None,
            "relation": run.gate.relation(run.unit) if run is not None else None,
            "epsilon": float(self._settings.privacy.epsilon),
            "delta": float(self._settings.privacy.delta),
            "run_epsilon": float(run.epsilon) if run is not None else None,
            "spent_epsilon": spent.get("spent_epsilon", 0.0),
            "releases": spent.get("releases", 0),
            "forecast_round": forecast,
            "share_metrics": self._settings.privacy.share_metrics,
        }

    def metrics(self) -> list[Family]:
        """What a monitoring system may know, see `metrics`."""
        data_dir = self._settings.node.data_dir
        return families(observe(self.status(), self.peers(), self._shell, data_dir))

    async def history(self, first: int, limit: int) -> dict[str, Any]:
        """What became of every round, see `node.history`."""
        return await self._history.since(first, limit)

    async def model(self) -> BinaryIO:
        """The common model of one round with its facts, see `snapshot`."""
        shell = self._shell
        async with shell.fold_turn:  # so that model and facts are of one round
            run, held = shell.run, shell.model
            if run is None or held is None:
                raise NotFound(
                    "this node takes part in no run",
                    shell.awaited or "the common model is the model of a run",
                    "accept one: p2pfed run accept FILE",
                )
            snapshot = await trio.to_thread.run_sync(held.newest)
            if snapshot is None or not snapshot.chain:
                raise NotFound(
                    f"run {run.name!r} has no model here yet",
                    "it is made when a round begins here"
                    if snapshot is None
                    else "a checkpoint that it rests on was lost, and is fetched anew",
                    "wait for a round: p2pfed status",
                )
            return await trio.to_thread.run_sync(
                partial(
                    write_snapshot,
                    snapshot,
                    self._settings.node.data_dir,
                    grid_bits=run.grid_bits,
                    facts=provenance(
                        run, snapshot, self._core, self._settings.node.name, shell.spent
                    ),
                )
            )

    def roster(self) -> dict[str, Any]:
        """The roster in force."""
        roster = self._core.book.current
        if roster is None:
            raise NotFound(
                "no roster is held",
                "this node has not joined a network",
                "run: p2pfed join --roster FILE",
            )
        signed = self._core.book.signed(roster.hash) or b""
        return {
            **(self._roster_line(roster) or {}),
            "network": roster.network,
            "network_id": roster.network_id.hex(),
            "members": [
                {
                    "name": m.name,
                    "peer_id": m.peer_id,
                    "roles": list(m.roles),
                    "samples": m.samples,
                }
                for m in roster.members
            ],
            "revoked": [
                {"peer_id": r.peer_id, "reason": r.reason, "from_round": r.from_round}
                for r in roster.revoked
            ],
            "signed": signed.decode("utf-8"),
        }

    def reachability(self) -> dict[str, Any]:
        """How others reach this node."""
        return reachability(self._settings, self._shell)

    def bootstrap(self) -> list[dict[str, Any]]:
        """The peers that are asked first."""
        return [
            {"name": p.name, "peer_id": p.peer_id, "addrs": list(p.addresses)}
            for listed in self._bootstrap
            for p in listed.peers
        ]

    def events(
        self, since: int, limit: int, *, kind: str = "", after: dt.datetime | None = None
    ) -> tuple[list[dict[str, Any]], int, int]:
        """Events after a number, how many before them are lost, where to go on."""
        found = self._shell.log.find(since, limit, kind=kind, after=after)
        return found.events, found.lost, found.upto

    def before_newest(self, count: int, kind: str) -> int:
        """The number after which the newest events come."""
        return self._shell.log.before_newest(count, kind)

    async def next_event(self, since: int) -> None:
        """Return once there is an event after a sequence number."""
        await self._shell.log.wait_beyond(since)
