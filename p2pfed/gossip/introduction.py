"""Who this node says it is, and what it makes of who a peer says to be.

A beat introduces its sender: network, run, task, round, newest model, documents, addresses, and a
measure where the hospital shares one. A peer of another run or task is noted when it begins to
differ; one of our run is asked for its checkpoints while we join, until it has told them.

Invariant: every beat composed here can be written, whatever addresses the network room has found.

Not here: when beats are sent, how they are answered, and peers of another network (`heartbeat`).
"""

from __future__ import annotations

from collections.abc import Callable

from p2pfed.gossip.events import Effect, Note
from p2pfed.gossip.guard import Guard
from p2pfed.gossip.heartbeat import send
from p2pfed.gossip.membership import Peer
from p2pfed.gossip.progress import Phase, Progress
from p2pfed.gossip.sync import Sync
from p2pfed.identity.book import RosterBook
from p2pfed.wire.beat import MAX_ADDRESSES, Beat, is_sayable
from p2pfed.wire.measure import Measure
from p2pfed.wire.messages import AskCheckpoints

__all__ = ["Introduction"]


class Introduction:
    """See the module docstring.

    Args:
        book: Says which network this is.
        sync: Gives the digest of documents.
        guard: Says whether another note about a peer is too many.
        contributes: Whether this node's deltas are to be waited for.
        addresses: Where this node can be dialled.

    Attributes:
        addresses: As above; the next beat tells a change.
        task_id: Hash of our task; empty while no trainer has told it.
        measure: Of our newest evaluation, where policy shares it.
    """

    def __init__(
        self,
        book: RosterBook,
        sync: Sync,
        guard: Guard,
        *,
        contributes: Callable[[], bool],
        addresses: tuple[str, ...],
    ) -> None:
        self.addresses = addresses
        self.task_id = b""
        self.measure: Measure | None = None
        self._book = book
        self._sync = sync
        self._guard = guard
        self._contributes = contributes
        self._progress: Progress | None = None

    def take_run(self, progress: Progress) -> None:
        """From now on this node is in this run; a measure was of another one."""
        self._progress = progress
        self.measure = None

    def compose(self, sequence: int) -> Beat:
        """The beat that says what holds now."""
        progress = self._progress
        folded = progress.folded if progress is not None else None
        return Beat(
            sequence=sequence,
            network_id=self._book.network_id or bytes(32),
            run_id=progress.facts.run.run_id if progress is not None else b"",
            task_id=self.task_id,
            round=progress.round if progress is not None else 0,
            contributes=self._contributes(),
            model_round=folded.round if folded is not None else 0,
            model_hash=folded.model_hash if folded is not None else b"",
            documents=self._sync.documents_digest(),
            addresses=tuple(filter(is_sayable, self.addresses))[:MAX_ADDRESSES],
            measure=self.measure,
        )

    def heard(self, peer: Peer, beat: Beat, before: Beat | None, now: float) -> list[Effect]:
        """A peer of our network has introduced itself.

        Args:
            peer: Who it is.
            beat: What it says.
            before: What it said the last time; None if this is the first.
            now: Seconds.
        """
        progress = self._progress
        if progress is None or not beat.run_id:
            return []
        run = progress.facts.run
        same_run = beat.run_id == run.run_id
        if not same_run or beat.task_id not in {b"", run.task_id}:
            begins = before is None or before.run_id != beat.run_id
            if not begins or not self._guard.tells(peer, "peer.differs", now):
                return []
            differs = "task" if same_run else "run"
            data = {"peer": peer.peer_id, "name": peer.name, "differs": differs}
            return [Note("peer.differs", data)]
        if progress.phase is Phase.JOINING and peer.peer_id not in progress.answered:
            return [send(peer.peer_id, AskCheckpoints(beat.run_id))]
        return []
