"""What became of every round, as the public plane knows it: for the dashboard and the report.

Who contributed comes from the deltas that are held, so that a late one is there at the next look;
the rest (hash of the model, how long the round took, what was spent) from the event log, and is
None where the log does not reach back so far. Nothing private passes here.

Invariant: an answer costs time by the rounds that are asked for, not by the events that are stored:
each event is read once, in pieces between which the event loop goes on.

Not here: the endpoint (`admin/history`).
"""

from __future__ import annotations

import datetime as dt
from typing import Any

import trio

from p2pfed.identity.run import Run
from p2pfed.node.shell import Shell

__all__ = ["History"]

_READ_BACK = 10_000  # events before the first look: three to five make a round
_PIECE = 500  # events, or rounds, between two checkpoints of the event loop
_KEPT_ROUNDS = 20_000


class History:
    """See the module docstring.

    Args:
        shell: The node.
    """

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._read_to: int | None = None
        self._run = ""
        self._told_of: str | None = ""  # the run that the event being read is of
        self._notes: dict[int, dict[str, Any]] = {}
        self._began: dict[int, str] = {}
        self._lines: dict[int, tuple[int, dict[str, Any]]] = {}  # with how many origins it had
        self._members: dict[str, int] = {}  # peer id -> its place in every answer

    async def since(self, first: int, limit: int) -> dict[str, Any]:
        """The rounds from `first` on, oldest first.

        Args:
            first: The first round that is wanted.
            limit: The most rounds that are told; what is left out is the oldest.

        Returns:
            `run`, `round` (the one this node is in), `rounds` (of the run), `members` (a list of
            peer ids), and `history`: per round `round`, `origins` (places in `members` of those
            whose delta is held), `model_hash`, `seconds`, `released` (whether this node is among
            them), `epsilon` (spent after it), `meetings` (pairwise mode only).
        """
        await self._catch_up()
        progress, run = self._shell.core.progress, self._shell.run
        if progress is None or run is None:
            return {"run": None, "round": None, "rounds": None, "members": [], "history": []}
        facts, own = progress.facts, self._shell.core.own_id
        lines = []
        for round_ in range(max(first, progress.round + 1 - limit, 0), progress.round + 1):
            held = facts.origins(round_)
            known = self._lines.get(round_)
            if known is None or known[0] != len(held):  # deltas are never taken away
                known = self._lines[round_] = len(held), self._line(round_, held, own)
            lines.append(known[1])
            if len(lines) % _PIECE == 0:
                await trio.lowlevel.checkpoint()
        return {
            "run": run.run_id.hex(),
            "round": progress.round,
            "rounds": run.rounds,
            "members": list(self._members),
            "history": lines,
        }

    def _line(self, round_: int, held: set[str], own: str) -> dict[str, Any]:
        told, members = self._notes.get(round_, {}), self._members
        return {
            "round": round_,
            "origins": [members.setdefault(peer, len(members)) for peer in sorted(held)],
            "model_hash": told.get("hash"),
            "seconds": told.get("seconds"),
            "released": own in held or bool(told.get("released")),
            "epsilon": told.get("epsilon"),
            **({"meetings": told["meetings"]} if "meetings" in told else {}),
        }

    # --- the event log -------------------------------------------------------------------------

    async def _catch_up(self) -> None:
        self._follow(self._shell.run)
        while True:
            if self._read_to is None:
                self._begin()
            found = self._shell.log.find(self._read_to or 0, _PIECE)
            if not found.events:
                return
            for event in found.events:
                self._note(event)
            self._read_to = found.upto
            await trio.lowlevel.checkpoint()

    def _follow(self, run: Run | None) -> None:
        """What was noted of another run is not of this one."""
        name = "" if run is None else run.run_id.hex()
        if name != self._run:
            self._run = name
            for kept in (self._notes, self._began, self._lines, self._members):
                kept.clear()
            self._read_to = None

    def _begin(self) -> None:
        """Where to begin, and which run the events there are of."""
        self._read_to = max(0, self._shell.store.event_range()[1] - _READ_BACK)
        starts = self._shell.log.find(0, _READ_BACK, kind="run.started").events
        before = [event["data"].get("id") for event in starts if event["seq"] <= self._read_to]
        self._told_of = before[-1] if before else self._run

    def _note(self, event: dict[str, Any]) -> None:
        kind, data = event["type"], event["data"]
        if kind == "run.started":
            self._told_of = data.get("id")
        round_ = data.get("round")
        if self._told_of != self._run or not isinstance(round_, int):
            return
        if kind == "round.started":
            self._began[round_] = event["ts"]
        elif kind == "round.finished":
            began = self._began.pop(round_, None)
            self._add(round_, seconds=None if began is None else _seconds(began, event["ts"]))
            if "meetings" in data:
                self._add(round_, meetings=data["meetings"])
        elif kind == "model.folded":
            self._add(round_, hash=data.get("hash"))
        elif kind in {"delta.released", "change.released"}:
            self._add(round_, released=True)
        elif kind == "privacy.spent":
            self._add(round_, epsilon=data.get("spent_epsilon"))

    def _add(self, round_: int, **facts: Any) -> None:
        self._notes.setdefault(round_, {}).update(facts)
        self._lines.pop(round_, None)
        if len(self._notes) > _KEPT_ROUNDS:
            del self._notes[min(self._notes)]


def _seconds(began: str, ended: str) -> float:
    """Between two times of the event log; 0 where the clock was set back."""
    span = dt.datetime.fromisoformat(ended) - dt.datetime.fromisoformat(began)
    return max(0.0, round(span.total_seconds(), 3))
