"""This node's own model in pairwise mode: a vector in memory, and on disk all that made it.

One SQLite file per run, beside the checkpoints: a base vector, and a journal of what was added
since, written as it came over the wire (a step or a change, with how often it counts). A crash at
any moment leaves the model at one journal entry or the next; entries go into the base when they
take more room than it. Open tickets lie in the same file, so that moving and the ticket's end are
one transaction.

Invariants: an event comes back only when what it tells is on the disk (WAL, synchronous=FULL); a
change counts once per round, a step once per ticket. One generation of the model writes: when a run
is accepted again, what an older one still does is refused by the file and changes nothing.

Everything here blocks and is called in a worker thread, one call at a time; when is decided in
`gossip/local_rounds.py`.
"""

from __future__ import annotations

import math
import random
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from p2pfed.errors import ConfigError, P2PFedError
from p2pfed.gossip.events import Folded
from p2pfed.gossip.fold import ModelState, genesis_state, model_hash
from p2pfed.gossip.meeting_events import (
    CloseMeeting,
    Learn,
    Learnt,
    MakeStep,
    Meeting,
    PairEffect,
    PairEvent,
    Quote,
    Quoted,
    SendStep,
    StepMade,
    StepTaken,
    Survived,
    TakeStep,
    TakeStock,
)
from p2pfed.gossip.pairwise import (
    add_change,
    apart,
    from_grid,
    make_step,
    move,
    quote,
    shares,
    to_grid,
)
from p2pfed.identity.run import Run
from p2pfed.node.checkpoints import DiskCheckpoints, read_genesis
from p2pfed.node.handover import Handover
from p2pfed.node.snapshot import Snapshot
from p2pfed.wire.payload import decode_payload

__all__ = ["PairModel"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS base (one INTEGER PRIMARY KEY CHECK (one = 1), vector BLOB,
  seq INTEGER NOT NULL, round INTEGER NOT NULL, learnt INTEGER NOT NULL,
  generation INTEGER NOT NULL);
INSERT OR IGNORE INTO base VALUES (1, NULL, 0, 0, -1, 0);
CREATE TABLE IF NOT EXISTS journal (seq INTEGER PRIMARY KEY AUTOINCREMENT, times INTEGER NOT NULL,
  data BLOB NOT NULL, ticket BLOB);
CREATE TABLE IF NOT EXISTS given (ticket BLOB PRIMARY KEY, exchange BLOB NOT NULL,
  peer TEXT NOT NULL, initiator INTEGER NOT NULL, answerer INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS made (ticket BLOB PRIMARY KEY, exchange BLOB NOT NULL,
  peer TEXT NOT NULL, initiator INTEGER NOT NULL, answerer INTEGER NOT NULL);
"""
_CHANGE = 0  # "times" of a change by local training, which is a payload and no vector


class Superseded(Exception):
    """The run was accepted again; a newer model owns the file."""


class PairModel:
    """See the module docstring.

    Args:
        run: The run.
        genesis: File of its first model.
        checkpoints: Where the copy for joiners is kept.
        file: The SQLite file.
        view: Where the newest model is written for the trainer; None without one.
        rng: Chance of the rounding.

    Raises:
        FactRejected: The genesis file is not the one that the run names.
        ConfigError: The SQLite file cannot be used.
    """

    def __init__(
        self,
        run: Run,
        genesis: Path,
        checkpoints: DiskCheckpoints,
        file: Path,
        view: Path | None,
        *,
        rng: random.Random | None = None,
    ) -> None:
        self.checkpoints = checkpoints
        self._run = run
        self._values = run.encoding.values
        self._view = None if view is None else Handover(view)
        self._chance = (rng or random.Random()).randbytes  # noqa: S311 - rounding, no secret
        self._genesis = from_grid(genesis_state(read_genesis(genesis, run), run).model)
        self._lock = threading.Lock()
        self.consensus_distance: float | None = None  # as the last meeting here tells
        try:
            file.touch(mode=0o600)
            file.chmod(0o600)
            self._db = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
            self._db.execute("UPDATE base SET generation = generation + 1")
            self._generation = self._one("SELECT generation FROM base")
            self._model = self._read()
        except (sqlite3.Error, OSError, ValueError, P2PFedError) as error:
            raise ConfigError(
                f"cannot use the model's file {file}",
                str(error),
                "if it is damaged, move it away: the node then copies a peer's model",
            ) from error

    def close(self) -> None:
        """Close the file; a call under way ends first."""
        with self._lock:
            self._db.close()

    @property
    def model(self) -> NDArray[np.int64]:
        """The model now, in fine units, shape (P,); a copy."""
        with self._lock:
            return self._model.copy()

    def newest(self) -> Snapshot:
        """The model now, a copy; it holds no deltas of others, only what was met."""
        with self._lock:
            state = self._state(self._one("SELECT round FROM base"))
        return Snapshot(state, self._run.run_id, Counter(), 0)

    def held(self) -> Survived:
        """What survived the last stop."""
        with self._lock:
            round_, learnt, seq = self._row("SELECT round, learnt, seq FROM base")
            entries = self._one("SELECT COUNT(*) FROM journal")
            made = tuple(Meeting(*row) for row in self._db.execute("SELECT * FROM made"))
            given = tuple(Meeting(*row) for row in self._db.execute("SELECT * FROM given"))
        return Survived(round_, learnt, not (round_ or seq or entries), given, made)

    def perform(self, effect: PairEffect) -> PairEvent | Folded | None:
        """Do one piece of work; None where there is nothing to tell.

        Raises:
            sqlite3.Error: The disk failed; the model on it is the one before.
            ConfigError: There is no room for the view.
        """
        with self._lock:
            try:
                return self._perform(effect)
            except (Superseded, sqlite3.ProgrammingError):  # the latter: closed
                return None

    def _perform(self, effect: PairEffect) -> PairEvent | Folded | None:
        match effect:
            case Quote():
                return self._quote(effect.meeting)
            case MakeStep():
                return self._make_step(effect)
            case SendStep():
                return self._kept_step(effect.ticket)
            case TakeStep():
                return self._take_step(effect)
            case CloseMeeting():
                self._close_meeting(effect.ticket)
                return None
            case Learn():
                return self._learn(effect)
            case TakeStock():
                return self._take_stock(effect.round)
            case _:
                assert_never(effect)

    # --- meetings ------------------------------------------------------------------------------

    def _quote(self, meeting: Meeting) -> Quoted:
        with self._transaction() as db:
            db.execute("INSERT INTO given VALUES (?, ?, ?, ?, ?)", _row_of(meeting))
        vector = quote(self._model, self._genesis, self._values, self._chance)
        return Quoted(meeting.ticket, vector)

    def _make_step(self, effect: MakeStep) -> StepMade:
        meeting, values = effect.meeting, self._values
        moves = shares(meeting.initiator, meeting.answerer)
        step = make_step(
            self._model, self._genesis, effect.quoted, moves, values=values, chance=self._chance
        )
        with self._transaction() as db:
            db.execute("INSERT INTO made VALUES (?, ?, ?, ?, ?)", _row_of(meeting))
            self._write(db, -moves[0], step, meeting.ticket)
        move(self._model, step, -moves[0], values)
        self._tell_distance(step, moves)
        return StepMade(meeting.ticket, step)

    def _kept_step(self, ticket: bytes) -> StepMade | None:
        row = self._db.execute("SELECT data FROM journal WHERE ticket = ?", (ticket,)).fetchone()
        return None if row is None else StepMade(ticket, row[0])

    def _take_step(self, effect: TakeStep) -> StepTaken:
        meeting = effect.meeting
        moves = shares(meeting.initiator, meeting.answerer)
        with self._transaction() as db:
            ended = db.execute("DELETE FROM given WHERE ticket = ?", (meeting.ticket,)).rowcount
            if ended:
                self._write(db, moves[1], effect.step, None)
        if ended:
            move(self._model, effect.step, moves[1], self._values)
            self._tell_distance(effect.step, moves)
        return StepTaken(meeting.ticket)

    def _tell_distance(self, step: bytes, moves: tuple[int, int]) -> None:
        far = apart(step, self._model.size, moves, self._values, self._run.grid_bits)
        self.consensus_distance = far / math.sqrt(2)

    def _close_meeting(self, ticket: bytes) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM given WHERE ticket = ?", (ticket,))
            db.execute("DELETE FROM made WHERE ticket = ?", (ticket,))
            db.execute("UPDATE journal SET ticket = NULL WHERE ticket = ?", (ticket,))
            db.execute("DELETE FROM journal WHERE ticket IS NULL AND seq <= (SELECT seq FROM base)")

    # --- rounds --------------------------------------------------------------------------------

    def _learn(self, effect: Learn) -> Learnt:
        if effect.round > self._one("SELECT learnt FROM base"):
            with self._transaction() as db:
                db.execute("UPDATE base SET learnt = ?", (effect.round,))
                self._write(db, _CHANGE, effect.payload, None)
            self._add(_CHANGE, effect.payload)
        return Learnt(effect.round)

    def _take_stock(self, round_: int) -> Folded:
        with self._transaction() as db:
            db.execute("UPDATE base SET round = ?", (round_,))
        unfolded = (
            "SELECT COALESCE(SUM(LENGTH(data)), 0) FROM journal, base WHERE journal.seq > base.seq"
        )
        if self._one(unfolded) > self._model.nbytes:
            self._fold_journal()
        state = self._state(round_)
        if round_:
            self.checkpoints.save(state, self._run.run_id)
            self.checkpoints.prune(frozenset(sorted(self.checkpoints.chains())[-2:]))
        if self._view is not None:
            self._view.write(state.model, grid_bits=self._run.grid_bits)
        return Folded(round_, self._run.run_id, model_hash(state))

    def _state(self, round_: int) -> ModelState:
        none = np.zeros(0)
        return ModelState(round_, to_grid(self._model), none, none)

    def adopt(self, round_: int) -> None:
        """Take over a fetched copy of a peer's model as this node's own first one.

        Raises:
            FactRejected: It is not a model of this run; it is deleted.
        """
        state = self.checkpoints.load(round_)
        with self._lock:
            if self._one("SELECT COUNT(*) FROM journal"):
                return  # this node has a model of its own by now
            self._model = from_grid(state.model)
            self._fold_journal(round_)

    # --- disk ----------------------------------------------------------------------------------

    def _fold_journal(self, round_: int | None = None) -> None:
        with self._transaction() as db:
            db.execute(
                "UPDATE base SET vector = ?, round = COALESCE(?, round),"
                " seq = COALESCE((SELECT MAX(seq) FROM journal), seq, 0)",
                (self._model.astype("<i8").tobytes(), round_),
            )
            db.execute("DELETE FROM journal WHERE ticket IS NULL")

    def _read(self) -> NDArray[np.int64]:
        vector, seq = self._row("SELECT vector, seq FROM base")
        self._model = self._genesis.copy()
        if vector is not None:
            self._model = np.frombuffer(vector, "<i8").astype(np.int64)
            if self._model.shape != self._genesis.shape:
                raise ValueError("the model in it has another size")
        rows = self._db.execute(
            "SELECT times, data FROM journal WHERE seq > ? ORDER BY seq", (seq,)
        )
        for times, data in rows:
            self._add(times, data)
        return self._model

    def _add(self, times: int, data: bytes) -> None:
        if times != _CHANGE:
            move(self._model, data, times, self._values)
            return
        change = decode_payload(
            data,
            num_parameters=self._run.num_parameters,
            max_released=self._run.max_released,
            width=self._values,
        )
        add_change(self._model, change.indices, change.values)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Durable when it ends without an error, undone else."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._refuse_if_superseded()
            yield self._db
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _write(self, db: sqlite3.Connection, times: int, data: bytes, ticket: bytes | None) -> None:
        db.execute(
            "INSERT INTO journal (times, data, ticket) VALUES (?, ?, ?)", (times, data, ticket)
        )

    def _refuse_if_superseded(self) -> None:
        if self._one("SELECT generation FROM base") != self._generation:
            raise Superseded

    def _row(self, query: str) -> tuple[Any, ...]:
        with closing(self._db.execute(query)) as rows:
            row: tuple[Any, ...] = rows.fetchone()
            return row

    def _one(self, query: str) -> int:
        return int(self._row(query)[0])


def _row_of(meeting: Meeting) -> tuple[bytes, bytes, str, int, int]:
    return (
        meeting.ticket,
        meeting.exchange,
        meeting.peer,
        meeting.initiator,
        meeting.answerer,
    )
