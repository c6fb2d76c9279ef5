"""What the operator sees and may do through the admin socket; the node's side of it.

Reads are snapshots of the core, the network's counters and what the trainer *released*; nothing private passes
here, because this process has nothing private. Writes are join, leave, share, accepting a run and
handing over a roster; none of them can raise a budget.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import trio

from p2pfed import __version__
from p2pfed.config import Settings
from p2pfed.errors import FactRejected, NotFound, PolicyError
from p2pfed.gossip.events import (
    JoinNetwork,
    LeaveNetwork,
    RosterOffered,
    SetSharing,
    TrainerChanged,
)
from p2pfed.gossip.membership import Peer, State
from p2pfed.gossip.progress import Phase
from p2pfed.identity.bootstrap import BootstrapList
from p2pfed.identity.roster import Roster
from p2pfed.identity.run import Run, check_signed_run
from p2pfed.node.checkpoints import DiskCheckpoints
from p2pfed.node.directory import DataDirectory, file_digest, write_durably
from p2pfed.node.model import Model
from p2pfed.node.shell import Shell

__all__ = ["Operator"]

logger = logging.getLogger(__name__)

GENESIS_RETRY = 1.0  # seconds between rounds of asking the peers for the genesis
_HEADER_ROOM = 1 << 20  # a safetensors header may be as long


class Operator:
    """See the module docstring; implements the admin room's `AdminBackend`.

    Args:
        settings: The node's settings.
        shell: The node.
        directory: Where rosters and runs are kept.
        bootstrap: The configured bootstrap lists.
    """

    def __init__(
        self,
        settings: Settings,
        shell: Shell,
        directory: DataDirectory,
        bootstrap: list[BootstrapList],
    ) -> None:
        self._settings = settings
        self._shell = shell
        self._core = shell.core
        self._directory = directory
        self._bootstrap = bootstrap
        self._started = trio.current_time()
        self._task_id = ""
        self._run_scope: trio.CancelScope | None = None

    # --- starting ------------------------------------------------------------------------------

    def resume(self) -> None:
        """Dial whom we know and go on with the accepted run."""
        if self._shell.present:
            self._dial_known()
        run_id = self._shell.store.recall("run")
        roster = self._core.book.current
        if run_id is None or roster is None:
            return
        try:
            signed = self._directory.run(bytes.fromhex(run_id))
            self._begin(check_signed_run(signed, roster), signed)
        except FactRejected as error:
            self._shell.log.add("run.rejected", {"reason": error.what})

    def _dial_known(self) -> None:
        known = self._shell.store.addresses()
        for listed in self._bootstrap:
            for peer in listed.peers:
                known[peer.peer_id] = [*peer.addresses, *known.get(peer.peer_id, [])]
        for peer_id, addresses in known.items():
            self._shell.network.keep_connected(peer_id, list(dict.fromkeys(addresses))[:16])

    def _begin(self, run: Run, signed: bytes) -> None:
        if self._run_scope is not None:
            self._run_scope.cancel()
        self._run_scope = trio.CancelScope()
        self._shell.begin(self._start_run, run, signed, self._run_scope)

    async def _start_run(self, run: Run, signed: bytes, scope: trio.CancelScope) -> None:
        """Get the genesis, then start; ends when another run is accepted."""
        shell, genesis = self._shell, self._directory.blob(run.genesis)
        with scope:
            while not genesis.exists():
                present = tuple(p.peer_id for p in self._core.membership.present())
                most = 4 * run.num_parameters + _HEADER_ROOM
                if not await shell.fetch(present, run.genesis, genesis, max_bytes=most):
                    await trio.sleep(GENESIS_RETRY)
            checkpoints = DiskCheckpoints(self._directory.checkpoints(run.run_id), run)
            view = shell.trainer.exchange / "view.safetensors" if shell.trainer else None
            try:
                model = Model(run, genesis, checkpoints, shell.store, view)
            except FactRejected as error:
                shell.log.add("run.rejected", {"reason": error.what})
                return
            shell.start_run(run, signed, model)
            self._check_task()

    def trainer_ready(self, hello: dict[str, Any]) -> None:
        """The trainer started and said which task it has."""
        self._task_id = str(hello.get("task_id", ""))
        self._core.task_id = bytes.fromhex(self._task_id)
        self._check_task()
        self._shell.feed(TrainerChanged(up=True))

    def _check_task(self) -> None:
        run = self._shell.run
        if run is not None and self._task_id:
            same = self._task_id == run.task_id.hex()
            text = f"the installed task {self._settings.train.task!r} is not the one of the run"
            if not same:
                self._core.verdict = text
            elif self._core.verdict == text:
                self._core.verdict = ""

    # --- reading -------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What `p2pfed status` shows."""
        core, shell = self._core, self._shell
        roster, why_not = core.book.current, core.why_not_contributing()
        totals = shell.network.totals()
        states = [p.state for p in core.membership.peers.values()]
        return {
            "name": self._settings.node.name,
            "peer_id": core.own_id,
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(trio.current_time() - self._started, 1),
            "addresses": list(core.addresses),
            "network": {
                "name": roster.network if roster is not None else "",
                "id": (core.book.network_id or b"").hex(),
            },
            "present": shell.present,
            "roster": self._roster_line(roster),
            "run": self._run_line(),
            "sharing": core.sharing,
            "contributing": {"yes": not why_not, "reason": why_not},
            "privacy": self.privacy(),
            "peers": {s.value: states.count(s) for s in State},
            "traffic": {"sent_bytes": totals.bytes_sent, "received_bytes": totals.bytes_received},
            "trainer": self._trainer_line(),
            "health": self._health(),
        }

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
        }

    def _trainer_line(self) -> dict[str, Any]:
        trainer = self._shell.trainer
        if trainer is None:
            return {"state": "none", "restarts": 0, "pid": None}
        return {"state": trainer.state, "restarts": trainer.restarts, "pid": trainer.pid}

    def _health(self) -> list[str]:
        lines = []
        roster, run, trainer = self._core.book.current, self._shell.run, self._shell.trainer
        if roster is None:
            lines.append("no roster is held; run: p2pfed join --roster FILE --bootstrap FILE")
        elif roster.is_expired(self._shell.wall()):
            lines.append(f"roster v{roster.version} has expired: receiving, releasing nothing")
        if not self._shell.present:
            lines.append("this node has left the network; run: p2pfed join")
        if trainer is not None and trainer.problem:
            lines.append(f"trainer: {trainer.problem}")
        if self._core.progress is not None and self._core.progress.phase is Phase.WAITING:
            alive, whole = self._core.weight_alive()
            lines.append(f"waiting for peers: {alive} of {whole} patients' weight is present")
        for peer in self._core.membership.peers.values():
            beat = peer.beat
            if run is not None and beat is not None and beat.run_id not in {b"", run.run_id}:
                lines.append(f"{peer.name} takes part in another run")
            if run is not None and beat is not None and beat.task_id not in {b"", run.task_id}:
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
            "path": "direct" if peer.connected else None,
            "sent_bytes": stats.bytes_sent,
            "received_bytes": stats.bytes_received,
            "model_hash": beat.model_hash.hex() if beat is not None else "",
            "model_round": beat.model_round if beat is not None else None,
            "contributes": beat.contributes if beat is not None else None,
            "seen_s": None if peer.last_heard == float("-inf") else round(silence, 1),
            "roles": list(member.roles) if member is not None else [],
            "samples": member.samples if member is not None else 0,
            "addresses": list(peer.addresses),
        }

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
                "",
                "run: p2pfed peers   (it lists all of them)",
            )
        return self._peer_line(found[0])

    def privacy(self) -> dict[str, Any]:
        """Mechanism, ceiling and what was spent, as far as it was released."""
        run, spent = self._shell.run, self._shell.spent
        left = spent.get("releases_left")
        progress = self._core.progress
        forecast = None
        if left is not None and progress is not None and run is not None:
            forecast = min(run.rounds, progress.round + int(left) + 1)
        return {
            "mechanism": run.mechanism if run is not None else None,
            "unit": run.unit if run is not None else None,
            "epsilon": float(self._settings.privacy.epsilon),
            "delta": float(self._settings.privacy.delta),
            "run_epsilon": float(run.epsilon) if run is not None else None,
            "spent_epsilon": spent.get("spent_epsilon", 0.0),
            "releases": spent.get("releases", 0),
            "forecast_round": forecast,
        }

    def roster(self) -> dict[str, Any]:
        """The roster in force."""
        roster = self._core.book.current
        if roster is None:
            raise NotFound("no roster is held", "", "run: p2pfed join --roster FILE")
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

    def bootstrap(self) -> list[dict[str, Any]]:
        """The peers that are asked first."""
        return [
            {"name": p.name, "peer_id": p.peer_id, "addrs": list(p.addresses)}
            for listed in self._bootstrap
            for p in listed.peers
        ]

    def runs(self) -> list[dict[str, Any]]:
        """The accepted runs; `active` marks the one that this node takes part in."""
        roster, active = self._core.book.current, self._shell.store.recall("run")
        runs = []
        for signed in self._directory.runs() if roster is not None else []:
            assert roster is not None
            try:
                run = check_signed_run(signed, roster)
            except FactRejected as error:
                logger.warning("a kept run file does not verify any more: %s", error.what)
                continue
            runs.append(
                {
                    "id": run.run_id.hex(),
                    "name": run.name,
                    "task": run.task,
                    "mechanism": run.mechanism,
                    "rounds": run.rounds,
                    "active": run.run_id.hex() == active,
                }
            )
        return runs

    def events(self, since: int, limit: int) -> tuple[list[dict[str, Any]], int]:
        """Events after a sequence number, and how many before them are lost."""
        return self._shell.log.since(since, limit)

    async def next_event(self, since: int) -> None:
        """Return once there is an event after a sequence number."""
        await self._shell.log.wait_beyond(since)

    # --- acting --------------------------------------------------------------------------------

    async def join(
        self, *, roster: bytes | None, bootstrap: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Join the network, or come back to it after `leave`."""
        lists = [BootstrapList.of(data, "the bootstrap list") for data in bootstrap]
        if roster is not None:
            await self.offer_roster(roster)
        current = self._core.book.current
        if current is None:
            raise PolicyError(
                "this node holds no roster",
                "without it nobody can be told from a stranger",
                "ask a steward for it, then run: p2pfed join --roster FILE --bootstrap FILE",
            )
        for listed in lists:
            if listed.network_id and listed.network_id != current.network_id.hex():
                raise PolicyError(
                    f"the bootstrap list is of the network {listed.network_id[:16]}…",
                    f"the roster is of {current.network_id.hex()[:16]}…",
                    "use the list that came with the roster",
                )
            for peer in listed.peers:
                self._shell.store.keep_addresses(peer.peer_id, peer.addresses)
        self._shell.store.remember("left", False)
        self._shell.present = True
        self._shell.feed(JoinNetwork())
        self._dial_known()
        member = current.member(self._core.own_id)
        self._shell.log.add("node.joined", {"roster": current.version})
        return {
            "network": current.network,
            "roster_version": current.version,
            "member": member is not None,
            "peers": len(current.members) - (member is not None),
        }

    async def leave(self) -> dict[str, Any]:
        """Say goodbye and stay away until `join`."""
        self._shell.feed(LeaveNetwork())
        self._shell.store.remember("left", True)
        await trio.sleep(0.2)  # let the goodbyes leave
        self._shell.present = False
        for peer in self._core.membership.peers.values():
            self._shell.network.stop_dialling(peer.peer_id)
        await self._shell.network.recheck()
        self._shell.log.add("node.left", {})
        return {"left": True}

    async def share(self, on: bool) -> dict[str, Any]:
        """Start or stop releasing; receiving goes on."""
        self._shell.store.remember("sharing", on)
        self._shell.feed(SetSharing(on))
        return {"sharing": on}

    async def accept_run(self, signed: bytes, genesis: Path | None) -> dict[str, Any]:
        """Take part in a run."""
        roster = self._core.book.current
        if roster is None:
            raise PolicyError("this node holds no roster", "", "run: p2pfed join --roster FILE")
        run = check_signed_run(signed, roster)
        if self._task_id and self._task_id != run.task_id.hex():
            raise PolicyError(
                f"the installed task {self._settings.train.task!r} is not the one of the run",
                f"its hash is {self._task_id[:16]}…, the run says {run.task_id.hex()[:16]}…",
                "install the version of the task that the stewards named",
            )
        if self._settings.train.enabled:
            self._check_policy(run)
        if genesis is not None:
            self._take_genesis(run, genesis)
        self._directory.keep_run(run.run_id, signed)
        self._shell.store.remember("run", run.run_id.hex())
        self._shell.log.add("run.accepted", {"run": run.name, "id": run.run_id.hex()})
        self._begin(run, signed)
        return {"id": run.run_id.hex(), "name": run.name}

    def _check_policy(self, run: Run) -> None:
        if run.mechanism == "none" and not self._settings.privacy.allow_none:
            raise PolicyError(
                f"run {run.name!r} has mechanism none",
                "this hospital's configuration does not allow releases without privacy",
                "set privacy.allow_none = true in the configuration file, if that is meant",
            )

    def _take_genesis(self, run: Run, genesis: Path) -> None:
        try:
            if file_digest(genesis) != run.genesis:
                raise FactRejected(
                    f"{genesis} is not the genesis of run {run.name!r}",
                    "its hash is not the one that the stewards signed",
                )
            write_durably(self._directory.blob(run.genesis), genesis.read_bytes())
        except OSError as error:
            raise FactRejected(f"cannot read the genesis {genesis}", str(error)) from error

    async def offer_roster(self, signed: bytes) -> dict[str, Any]:
        """Take a roster from the operator's hand; the first one is believed as it is."""
        before = self._core.book.current
        self._core.book.check(signed)
        self._shell.feed(RosterOffered(signed))
        current = self._core.book.current
        assert current is not None
        self._dial_known()
        if before is None:
            self.resume()
        return {"version": current.version, "changed": current is not before}
