"""What the operator may do through the admin socket; the node's side of it.

Join, leave, share, pause, block a peer, accept a run, hand over a roster, read the configuration
again; none of them can raise a budget. What the operator sees is in `view`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import trio

from p2pfed.admin.rights import operator_ids
from p2pfed.config import Settings
from p2pfed.errors import FactRejected, PolicyError
from p2pfed.gossip.events import (
    JoinNetwork,
    LeaveNetwork,
    RosterOffered,
    SetSharing,
    TrainerChanged,
)
from p2pfed.gossip.progress import Phase
from p2pfed.identity.bootstrap import BootstrapList
from p2pfed.identity.invited import check_first_roster, is_invited
from p2pfed.identity.roster import Roster
from p2pfed.identity.run import Run, check_kept_run, check_signed_run
from p2pfed.node.boundary import Boundary
from p2pfed.node.checkpoints import DiskCheckpoints
from p2pfed.node.directory import DataDirectory
from p2pfed.node.genesis import most_bytes, take_genesis, why_absent
from p2pfed.node.logtap import follow_log, log_level
from p2pfed.node.model import Model
from p2pfed.node.pairing import PairModel
from p2pfed.node.reload import Reloading, with_values_of
from p2pfed.node.shell import Shell
from p2pfed.node.view import View

__all__ = ["Operator"]

logger = logging.getLogger(__name__)

_UNVOUCHED = "unvouched"  # in the store: nothing but its own word said who sent the first roster
GENESIS_RETRY = 1.0  # seconds between rounds of asking the peers for the genesis


class Operator(View):
    """See the module docstring; implements the admin room's `AdminBackend`.

    Args:
        settings: The node's settings.
        shell: The node.
        directory: Where rosters and runs are kept.
        bootstrap: The configured bootstrap lists.

    Attributes:
        operators: User ids that may write on the socket, besides root and the daemon's own.
        boundary: What of the trainer's this process could open.

    Raises:
        ConfigError: `admin.operators` names somebody unknown.
    """

    def __init__(
        self,
        settings: Settings,
        shell: Shell,
        directory: DataDirectory,
        bootstrap: list[BootstrapList],
    ) -> None:
        super().__init__(settings, shell, bootstrap)
        self._directory = directory
        self._task_id = ""
        self._run_scope: trio.CancelScope | None = None
        self._taking = trio.Lock()
        self.operators = operator_ids(settings.admin.operators)
        self._reloading = Reloading(shell.network, shell.log)
        self.boundary = Boundary.of(settings)
        self._of_next_trainer: tuple[Settings, tuple[str, ...]] | None = None

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
            self._begin(check_kept_run(signed, self._core.book.newest_first()), signed)
        except FactRejected as error:
            self._shell.log.add("run.rejected", {"reason": error.what})

    def _dial_known(self) -> set[str]:
        """Keep a connection with everybody whose address is known: these."""
        known = self._shell.store.addresses()
        for listed in self._bootstrap:
            for peer in listed.peers:
                self._shell.bootstrap[peer.peer_id] = peer.addresses
                known[peer.peer_id] = [*peer.addresses, *known.get(peer.peer_id, [])]
        for peer_id, addresses in known.items():
            self._shell.network.keep_connected(peer_id, list(dict.fromkeys(addresses))[:16])
        return set(known)

    def _begin(self, run: Run, signed: bytes) -> None:
        if self._run_scope is not None:
            self._run_scope.cancel()
        self._run_scope = trio.CancelScope()
        self._shell.begin(self._start_run, run, signed, self._run_scope)

    async def _start_run(self, run: Run, signed: bytes, scope: trio.CancelScope) -> None:
        """Get the genesis, then start; ends when another run is accepted."""
        shell, genesis = self._shell, self._directory.blob(run.genesis)
        with scope:
            while (
                why := await trio.to_thread.run_sync(why_absent, genesis, run.genesis)
            ) is not None:
                waits = f"run {run.name!r} waits for its first model from a peer"
                shell.awaited = f"{waits} ({why})" if why else waits
                present = tuple(p.peer_id for p in self._core.membership.present())
                if not await shell.fetch(present, run.genesis, genesis, max_bytes=most_bytes(run)):
                    await trio.sleep(GENESIS_RETRY)
            folder = self._directory.checkpoints(run.run_id)
            checkpoints = DiskCheckpoints(folder, run)
            view = shell.trainer.exchange / "view.safetensors" if shell.trainer else None
            try:
                model: Model | PairModel = (
                    PairModel(run, genesis, checkpoints, folder / "model.db", view)
                    if run.averaging.mode == "pairwise"
                    else Model(run, genesis, checkpoints, shell.store, view)
                )
            except FactRejected as error:
                shell.log.add("run.rejected", {"reason": error.what})
                return
            shell.start_run(run, signed, model)
            if shell.trainer is not None:
                shell.trainer.leave_round("another run was accepted")
            self._check_task()

    def trainer_ready(self, hello: dict[str, Any]) -> None:
        """The trainer started and said which task it has."""
        self._task_id = str(hello.get("task_id", ""))
        self._core.introduction.task_id = bytes.fromhex(self._task_id)
        if self._of_next_trainer is not None:  # it has read the file for itself
            self._settings = with_values_of(self._settings, *self._of_next_trainer)
            self._of_next_trainer = None
        self._core.introduction.measure = None  # whether one is shared is this trainer's decision
        self._check_task()
        self._shell.feed(TrainerChanged(up=True))
        progress = self._core.progress
        if progress is not None and progress.phase is Phase.FINISHED and progress.folded:
            # No round will bring it the last model; a training loop that joins would wait for ever.
            self._shell.begin(self._shell.evaluate, progress.folded.round)

    def _check_task(self) -> None:
        run = self._shell.run
        if run is not None and self._task_id:
            same = self._task_id == run.task_id.hex()
            text = f"the installed task {self._settings.train.task!r} is not the one of the run"
            if not same:
                self._core.verdict = text
            elif self._core.verdict == text:
                self._core.verdict = ""

    def runs(self) -> list[dict[str, Any]]:
        """The accepted runs; `active` marks the one that this node takes part in."""
        roster, active = self._core.book.current, self._shell.store.recall("run")
        runs = []
        for signed in self._directory.runs() if roster is not None else []:
            assert roster is not None
            try:
                run = check_kept_run(signed, self._core.book.newest_first())
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

    # --- acting --------------------------------------------------------------------------------

    async def join(
        self, *, roster: bytes | None, bootstrap: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Join the network, or come back to it after `leave`."""
        lists = [BootstrapList.of(data, "the bootstrap list") for data in bootstrap]
        offered = None if roster is None else self._checked(roster)
        believed = offered or self._core.book.current
        if believed is None:
            raise PolicyError(
                "this node holds no roster",
                "without it nobody can be told from a stranger",
                "ask a steward for it, then run: p2pfed join --roster FILE --bootstrap FILE",
            )
        for listed in lists:
            if listed.network_id and listed.network_id != believed.network_id.hex():
                raise PolicyError(
                    f"the bootstrap list is of the network {listed.network_id[:16]}…",
                    f"the roster is of {believed.network_id.hex()[:16]}…",
                    "use the list that came with the roster",
                )
        # Nothing is refused from here on; so a refused join has changed nothing.
        if roster is not None:
            await self.offer_roster(roster)
        current = self._core.book.current or believed
        for listed in lists:
            for peer in listed.peers:
                self._shell.bootstrap[peer.peer_id] = peer.addresses
                self._shell.store.keep_addresses(peer.peer_id, peer.addresses)
        self._shell.store.remember("left", False)
        self._shell.present = True
        self._shell.feed(JoinNetwork())
        known = self._dial_known()
        others = {member.peer_id for member in current.members} - {self._core.own_id}
        self._shell.log.add("node.joined", {"roster": current.version})
        return {
            "network": current.network,
            "network_id": current.network_id.hex(),
            "vouched": not self._nothing_vouches(),
            "roster_version": current.version,
            "member": current.member(self._core.own_id) is not None,
            "peers": len(others),
            "dialled": len(others & known),
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

    async def pause(self, on: bool) -> dict[str, Any]:
        """End the trainer and start none until it is switched off again; receiving goes on."""
        trainer = self._shell.trainer
        if trainer is None:
            raise PolicyError(
                "there is no training to pause here",
                "this node has no trainer: train.enabled is false",
                "set train.enabled and train.task in the configuration, and start the daemon again",
            )
        self._shell.store.remember("paused", on)
        if on != trainer.paused:
            self._shell.log.add("task.paused" if on else "task.resumed", {})
        if on:
            await trainer.pause()
        else:
            trainer.resume()
        return {"paused": on}

    async def block(self, peer: str, on: bool) -> dict[str, Any]:
        """Have no connection with a member, or have one again; the others are not told.

        What it signed still arrives through the others, and counts: the stewards decide on that.
        """
        peer_id = str(self.peer(peer)["peer_id"])
        blocked = self._shell.blocked - {peer_id} | ({peer_id} if on else set())
        self._shell.store.remember("blocked", sorted(blocked))
        self._shell.blocked = blocked
        await self._shell.network.recheck()
        if not on and self._shell.present:
            self._dial_known()
        self._shell.log.add("peer.blocked" if on else "peer.unblocked", {"peer": peer_id})
        return {"peer_id": peer_id, "blocked": on}

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
            async with self._taking:  # gigabytes, it may be; and one at a time at one place
                blob = self._directory.blob(run.genesis)
                await trio.to_thread.run_sync(take_genesis, run, genesis, blob)
        self._directory.keep_run(run.run_id, signed)
        self._shell.store.remember("run", run.run_id.hex())
        self._shell.log.add("run.accepted", {"run": run.name, "id": run.run_id.hex()})
        archive = self._archive(run)
        if archive is not None and archive.warning:
            self._shell.log.add("archive.short", asdict(archive))
        self._begin(run, signed)
        shown = None if archive is None else {**asdict(archive), "warning": archive.warning}
        return {"id": run.run_id.hex(), "name": run.name, "archive": shown}

    def _check_policy(self, run: Run) -> None:
        if run.mechanism == "none" and not self._settings.privacy.allow_none:
            raise PolicyError(
                f"run {run.name!r} has mechanism none",
                "this hospital's configuration does not allow releases without privacy",
                "set privacy.allow_none = true in the configuration file, if that is meant",
            )

    def _checked(self, signed: bytes) -> Roster | None:
        """What the book says of a roster; the first one must also be of who invited this node."""
        if self._core.book.current is None:
            check_first_roster(self._directory.root, signed, self._core.own_id)
        return self._core.book.check(signed, explain=True)

    async def offer_roster(self, signed: bytes) -> dict[str, Any]:
        """Take a roster from the operator's hand; the first one is believed, see `_checked`."""
        before = self._core.book.current
        self._checked(signed)
        self._shell.feed(RosterOffered(signed))
        current = self._core.book.current
        assert current is not None
        self._dial_known()
        if before is None:
            if not is_invited(self._directory.root):
                self._shell.store.remember(_UNVOUCHED, True)
            self.resume()
        return {"version": current.version, "changed": current is not before}

    def _nothing_vouches(self) -> bool:
        """Whether the first roster was believed as it came: without invite or pinned id."""
        return not self._settings.network.id and bool(self._shell.store.recall(_UNVOUCHED))

    # --- the socket and the configuration ------------------------------------------------------

    def note_write(self, uid: int, user: str, endpoint: str, outcome: str) -> None:
        """Keep who wrote; on the disk when this returns, unless it is full."""
        told = {"uid": uid, "user": user, "endpoint": endpoint, "outcome": outcome}
        self._shell.log.add("admin.write", told)
        self._shell.log.flush()

    def logs(self, level: str) -> AsyncGenerator[dict[str, Any], None]:
        """Log records of at least this level from now on."""
        return follow_log(log_level(level))

    async def reload(self) -> dict[str, Any]:
        """Read the configuration file again; see `node.reload`."""
        anew, found = await self._reloading.read(lambda: self._settings)
        told = self._reloading.apply(anew, found)
        self.operators = anew.operators
        self._settings = with_values_of(self._settings, anew.settings, found.live)
        self._of_next_trainer = (anew.settings, found.of_trainer)
        if "network.bootstrap" in found.live:
            self._bootstrap = anew.bootstrap
            if self._shell.present:
                self._dial_known()
        return told

    def _health(self) -> list[str]:
        lines = [*super()._health(), *self._reloading.health(), *self.boundary.health()]
        current = self._core.book.current
        if current is not None and self._nothing_vouches():
            lines.append(
                "nothing vouched for the first roster (no invite, no network.id): compare its"
                f' network\'s id with a steward, then set network.id = "{current.network_id.hex()}"'
            )
        trouble = self._shell.log.trouble
        return [*lines, *([trouble] if trouble else [])]
