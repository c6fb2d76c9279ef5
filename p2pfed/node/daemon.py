"""The composition root of the node: one lock, one nursery, everything wired once.

Order of the start: lock, key, rosters and store, admin socket, peers, trainer, run. Order of the
end, on SIGINT or SIGTERM: say goodbye to the peers, stop the trainer, close. After SIGKILL the next
start goes on from the store. An error of ours is told as one `P2PFedError`; a bug ends the daemon
loudly.
"""

from __future__ import annotations

import datetime as dt
import errno
import logging
import os
import random
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import trio

from p2pfed import __version__
from p2pfed.admin.prometheus import serve_metrics
from p2pfed.admin.server import serve_admin
from p2pfed.config import Settings
from p2pfed.errors import ConfigError, FactRejected, P2PFedError, StoreFailed
from p2pfed.gossip.core import Core
from p2pfed.gossip.events import LeaveNetwork, TrainerChanged
from p2pfed.identity.book import RosterBook
from p2pfed.identity.keys import NodeKey
from p2pfed.identity.signing import DELTA, sign
from p2pfed.network import open_network
from p2pfed.node.directory import DataDirectory
from p2pfed.node.eventlog import EventLog
from p2pfed.node.gate import RosterGate
from p2pfed.node.joined import Joined
from p2pfed.node.logs import begin_logging
from p2pfed.node.notify import Manager
from p2pfed.node.operator import Operator
from p2pfed.node.reload import read_bootstrap
from p2pfed.node.shell import Shell
from p2pfed.node.spawned import Spawned
from p2pfed.node.store import Store
from p2pfed.node.trainer import Source, Trainer, exchange_folder

__all__ = ["run_node"]

logger = logging.getLogger(__name__)

LOOP = "loop"  # the value of train.task with which no trainer is started
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
GOODBYE = 0.5  # seconds for the goodbyes to leave


def _wall() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def run_node(settings: Settings) -> int:
    """Run the daemon until it is told to stop; returns the exit code.

    Raises:
        P2PFedError: It cannot start: key, directory, socket or address.
    """
    begin_logging(settings)
    directory = DataDirectory(settings.node.data_dir)
    try:
        with directory.locked():
            trio.run(_main, settings, directory, NodeKey.load(settings.key_file))
    except (BaseExceptionGroup, OSError) as error:
        group = error if isinstance(error, BaseExceptionGroup) else ExceptionGroup("", [error])
        told = told_error(group, settings.node.data_dir)
        if told is None:
            raise
        raise told from error
    return 0


def told_error(group: BaseExceptionGroup[BaseException], folder: Path) -> P2PFedError | None:
    """What a person is told of what ended the daemon; None if there is a bug in it."""
    told, bugs = group.split(lambda error: isinstance(error, P2PFedError) or _is_of_the_disk(error))
    if told is None or bugs is not None:
        return None
    first: BaseException = told
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    if isinstance(first, P2PFedError):
        return first
    return StoreFailed(
        f"cannot write in {folder}",
        str(getattr(first, "strerror", "")) or str(first),
        "make room or mend the disk, then start again: the node goes on from its store",
    )


def _is_of_the_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _DISK


async def _main(settings: Settings, directory: DataDirectory, key: NodeKey) -> None:
    # What the receiver has not given when it closes it delivers anew: to stop twice is to stop.
    stops = (signal.SIGINT, signal.SIGTERM)
    before = [(number, signal.signal(number, signal.SIG_IGN)) for number in stops]
    try:
        with trio.open_signal_receiver(*stops, signal.SIGHUP) as signals:
            store = Store(directory.store)
            try:
                await _serve(settings, directory, key, store, signals)
            finally:
                store.close()
    finally:
        for number, handler in before:
            signal.signal(number, handler)


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
    manager = Manager.taken_from(os.environ)
    account = settings.trainer_account
    group = None if account is None else account[1]
    with exchange_folder(
        directory.root, group=group, spare=settings.loop_socket.parent if account else None
    ) as exchange:
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
            core.introduction.addresses = tuple(network.addresses())
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
            operator = Operator(settings, shell, directory, read_bootstrap(settings))
            source = _source_of_trainers(settings, exchange) if settings.train.enabled else None
            if source is not None:
                shell.trainer = _trainer(source, settings, exchange, operator, shell)
            mode = int(settings.admin.mode, 8)
            await nursery.start(
                partial(
                    serve_admin,
                    operator,
                    socket=settings.admin_socket,
                    mode=mode,
                    group=settings.admin.group,
                )
            )
            if settings.metrics.listen:
                listen = settings.metrics.listen
                await nursery.start(partial(serve_metrics, operator, listen=listen))
            if isinstance(source, Joined):
                await nursery.start(source.listen)
            if shell.trainer is not None:
                nursery.start_soon(shell.trainer.run)
            nursery.start_soon(operator.boundary.watch)
            nursery.start_soon(shell.hear_for_ever)
            operator.resume()
            nursery.start_soon(shell.tick_for_ever)
            addresses = list(core.introduction.addresses)
            log.add("node.ready", {"peer": key.peer_id, "addresses": addresses})
            manager.tell(READY="1")
            nursery.start_soon(manager.keep_told, lambda: _in_a_line(core))
            async for number in signals:
                if number == signal.SIGHUP:
                    nursery.start_soon(_reload, operator)  # a SIGTERM is heard meanwhile
                    continue
                log.add("node.stopping", {"signal": signal.Signals(number).name})
                break
            manager.tell(STOPPING="1")
            shell.feed(LeaveNetwork())
            log.flush()
            await trio.sleep(GOODBYE)
            nursery.cancel_scope.cancel()


async def _reload(operator: Operator) -> None:
    """Read the configuration again; one that is wrong is told in log and status."""
    try:
        await operator.reload()
    except P2PFedError as error:
        logger.error("the configuration was not read again: %s", error)  # noqa: TRY400 - in words
    except Exception:  # a bug costs the reload, never the daemon
        logger.exception("the configuration was not read again")


def _source_of_trainers(settings: Settings, exchange: Path) -> Joined | Spawned:
    """A child of ours; or what joins: a training loop, or the trainer of another user."""
    loop = settings.train.task == LOOP
    if not loop and not settings.train.user:
        return Spawned(settings.file, exchange)
    welcome = {
        "exchange": str(exchange),
        "data_dir": str(settings.node.data_dir),
        "node": settings.node.name,
        "version": __version__,
    }
    account = settings.trainer_account
    return Joined(settings.loop_socket, welcome, account=account, service=not loop)


def _in_a_line(core: Core) -> str:
    """What this node does, for the service manager: `3 peers, round 42`."""
    number = len(core.membership.present())
    peers = f"{number} peer{'s' * (number != 1)}"
    return peers if core.progress is None else f"{peers}, round {core.progress.round}"


def _trainer(
    source: Source, settings: Settings, exchange: Path, operator: Operator, shell: Shell
) -> Trainer:
    """The node's trainer; paused if the operator left it so."""
    paused = bool(shell.store.recall("paused", default=False))
    nobody = paused or not source.comes_by_itself
    shell.feed(TrainerChanged(up=False, lost=nobody))  # until one says that it is ready
    return Trainer(
        source,
        exchange,
        on_ready=operator.trainer_ready,
        on_gone=lambda lost: shell.feed(TrainerChanged(up=False, lost=lost)),
        longest_answer=settings.train.longest_round,
        paused=paused,
    )


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
