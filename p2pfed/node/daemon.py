"""The composition root of the node: one lock, one nursery, everything wired once.

Order of the start: lock, key, rosters and store, admin socket, peers, trainer, run. Order of the
end, on SIGINT or SIGTERM: say goodbye to the peers, stop the trainer, close. After SIGKILL the next
start goes on from the store. An error of ours is told as one `P2PFedError`; a bug ends the daemon
loudly.
"""

from __future__ import annotations

import datetime as dt
import logging
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from p2pfed.admin.server import serve_admin
from p2pfed.config import Settings
from p2pfed.errors import ConfigError, FactRejected, P2PFedError
from p2pfed.gossip.core import Core
from p2pfed.gossip.events import LeaveNetwork, TrainerChanged
from p2pfed.identity.book import RosterBook
from p2pfed.identity.bootstrap import BootstrapList
from p2pfed.identity.keys import NodeKey
from p2pfed.identity.signing import DELTA, sign
from p2pfed.network import open_network
from p2pfed.node.directory import DataDirectory
from p2pfed.node.eventlog import EventLog
from p2pfed.node.gate import RosterGate
from p2pfed.node.operator import Operator
from p2pfed.node.shell import Shell
from p2pfed.node.store import Store
from p2pfed.node.trainer import Trainer, exchange_folder

__all__ = ["run_node"]

logger = logging.getLogger(__name__)

GOODBYE = 0.5  # seconds for the goodbyes to leave


def _wall() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def run_node(settings: Settings) -> int:
    """Run the daemon until it is told to stop; returns the exit code.

    Raises:
        P2PFedError: It cannot start: key, directory, socket or address.
    """
    logging.basicConfig(
        level=settings.log.level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    directory = DataDirectory(settings.node.data_dir)
    with directory.locked():
        key = NodeKey.load(settings.key_file)
        try:
            trio.run(_main, settings, directory, key)
        except BaseExceptionGroup as group:
            deliberate, bugs = group.split(P2PFedError)
            if bugs is not None or deliberate is None:
                raise
            raise _first(deliberate) from group
    return 0


def _first(group: BaseExceptionGroup[P2PFedError]) -> P2PFedError:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


async def _main(settings: Settings, directory: DataDirectory, key: NodeKey) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        store = Store(directory.store)
        try:
            await _serve(settings, directory, key, store, signals)
        finally:
            store.close()


async def _serve(
    settings: Settings,
    directory: DataDirectory,
    key: NodeKey,
    store: Store,
    signals: AsyncIterator[int],
) -> None:
    book = _believed_rosters(settings, directory)
    log = EventLog(store, _wall)
    gate = RosterGate(directory)
    core = Core(
        own_id=key.peer_id,
        sign=lambda data: sign(key.seed, DELTA, data),
        book=book,
        rng=random.Random(),  # noqa: S311 - whom to gossip with, not a secret
        has_trainer=settings.train.enabled,
        recall=store.header,
    )
    core.sharing = bool(store.recall("sharing", default=True))
    with exchange_folder(directory.root) as exchange:
        async with (
            open_network(
                seed=key.seed,
                listen=settings.node.listen,
                announce=settings.node.announce,
                gatekeeper=gate,
                reach=settings.network.reach,
                relay=settings.network.relay,
                allowed_networks=settings.network.allowed_networks,
                upload_bytes_per_second=settings.network.upload_limit_mbit * 125_000 or None,
            ) as network,
            trio.open_nursery() as nursery,
        ):
            core.addresses = tuple(network.addresses())
            shell = Shell(
                core,
                directory=directory,
                store=store,
                log=log,
                network=network,
                nursery=nursery,
                wall=_wall,
            )
            shell.spent = store.recall("spent", default={})
            shell.present = settings.network.rejoin and not store.recall("left", default=False)
            gate.shell = shell
            if not shell.present:
                shell.feed(LeaveNetwork())
            operator = Operator(settings, shell, directory, _read_bootstrap(settings))
            mode = int(settings.admin.mode, 8)
            await nursery.start(
                lambda task_status: serve_admin(
                    operator, socket=settings.admin_socket, mode=mode, task_status=task_status
                )
            )
            if settings.train.enabled:
                shell.feed(TrainerChanged(up=False))  # until it says that it is ready
                shell.trainer = Trainer(
                    settings.file,
                    exchange,
                    on_ready=operator.trainer_ready,
                    on_gone=lambda lost: shell.feed(TrainerChanged(up=False, lost=lost)),
                )
                nursery.start_soon(shell.trainer.run)
            nursery.start_soon(shell.hear_for_ever)
            operator.resume()
            nursery.start_soon(shell.tick_for_ever)
            log.add("node.ready", {"peer": key.peer_id, "addresses": list(core.addresses)})
            async for number in signals:
                log.add("node.stopping", {"signal": signal.Signals(number).name})
                break
            shell.feed(LeaveNetwork())
            log.flush()
            await trio.sleep(GOODBYE)
            nursery.cancel_scope.cancel()


def _believed_rosters(settings: Settings, directory: DataDirectory) -> RosterBook:
    book = RosterBook(bytes.fromhex(settings.network.id) or None)
    for signed in directory.rosters():
        try:
            book.restore(signed)
        except FactRejected as error:
            raise ConfigError(
                f"a roster in {directory.root / 'rosters'} does not verify",
                error.what,
                "move the file away; the peers will send the right one",
            ) from error
    return book


def _read_bootstrap(settings: Settings) -> list[BootstrapList]:
    return [BootstrapList.parse(_text(path), str(path)) for path in settings.network.bootstrap]


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the bootstrap list {path}", str(error)) from error
